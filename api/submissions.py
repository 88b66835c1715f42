"""From a scan that is understood to a job: queued, or born with a result that is known."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import msgspec
import structlog

from api.dependencies import Services
from api.preparation import Prepared, prepare
from api.results import is_whole
from neural_mri.backing import jobs, keys, tracing
from neural_mri.backing.audit import Deed
from neural_mri.backing.faults import crash_point
from neural_mri.backing.jobs import Submitted
from neural_mri.backing.limits import NotBrief
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.records import Job, Submission
from neural_mri.contract.auth import AuditAction, Scope
from neural_mri.contract.jobs import TERMINAL, JobKind, Lane
from neural_mri.contract.models import ModelRequest
from neural_mri.contract.problems import Conflict, Unprocessable
from neural_mri.contract.scans import AttentionScan, PromptScan, Scan, decode_scan, encode_scan

__all__ = ("submission_of", "submit_attention", "submit_model_job", "submit_scan")

_MODEL_DEEDS: Mapping[JobKind, AuditAction] = MappingProxyType(
    {JobKind.LOAD: AuditAction.MODEL_LOADED, JobKind.UNLOAD: AuditAction.MODEL_UNLOADED}
)

REMEMBERED = 1000
"""Jobs of requests that only read, remembered so that the same request finds them."""


async def submit_scan(
    services: Services,
    scan: Scan,
    lane: Lane,
    idempotency_key: str | None = None,
    *,
    is_watched: bool = True,
) -> Job:
    """The job of a scan: queued, or born succeeded where its result is known.

    `is_watched` says that whoever asks may look at its frames as they come.

    Raises the `Unprocessable` that names what the model or the prompt does not have, `ModelNotLoaded`,
    and `TooMany`.
    """
    prepared = await prepare(services, scan)
    submission = submission_of(services, prepared, lane, idempotency_key)
    return await _submit(services, submission, is_watched=is_watched)


async def submit_attention(services: Services, job: Job, layer: int) -> Job:
    """The job that measures one layer's attention on the prompt of another job's scan.

    Raises `Unprocessable` where that has no prompt, `Conflict` where its weights are not there any more.
    """
    scan = decode_scan(job.request) if job.kind is JobKind.SCAN else None
    if not isinstance(scan, PromptScan):
        raise Unprocessable(
            f"job {job.id} read no prompt: attention is measured on the prompt of another scan",
            job=str(job.id),
        )
    if isinstance(scan, AttentionScan) and layer in scan.layers and job.manifest is not None:
        return job
    model = await services.model(job.model)
    if model.revision != job.revision:
        raise Conflict(
            f"{job.model} has been registered anew with other weights since: scan the prompt again",
            revision=job.revision,
        )
    wanted = AttentionScan(model=job.model, prompt=scan.prompt, layers=(layer,))
    submission = submission_of(services, await prepare(services, wanted), job.lane)
    return await _submit_once(services, submission)


async def _submit_once(services: Services, submission: Submission) -> Job:
    """The job of a request that only reads: asked for again, it makes no second job of the first."""
    key = (submission.owner, str(submission.scan_key))
    if (job_id := services.under_way.get(key)) is not None:
        known = await services.sessions.read(jobs.get, job_id)
        if known is not None and known.state not in TERMINAL:
            return known
    job = await _submit(services, submission)
    services.under_way[key] = job.id
    if len(services.under_way) > REMEMBERED:
        del services.under_way[next(iter(services.under_way))]
    return job


async def _submit(services: Services, submission: Submission, *, is_watched: bool = False) -> Job:
    """Record a job, then tell of it. A known result is used only while all of its bytes are there.

    Raises `MissingScope`: some requests that read have something measured first.
    """
    is_scan = submission.kind is JobKind.SCAN
    services.caller.require(Scope.SCAN_WRITE if is_scan else Scope.MODEL_LOAD)
    limit = services.settings.max_queued_jobs
    submitted = await _recorded(services, submission, limit)
    job = submitted.job
    # Also of a request that is sent again: what it was first answered with may have been found lost just then, and
    # no room have been left to measure it anew.
    if job.cached and job.manifest is not None and not await is_whole(services, job):
        await services.sessions.write(jobs.withdraw_result, job.scan_key, job.manifest)
        job, _ = await services.sessions.write(
            jobs.submit_once, submission, max_queued=limit, usual=services.limits, is_anew=True
        )
    elif not submitted.is_new:
        return job
    crash_point("api.recorded")
    _told(job, services.metrics.accepted(job))
    services.announce(job, is_watched=is_watched)
    return job


async def _recorded(services: Services, submission: Submission, limit: int) -> Submitted:
    """What came of recording a job: at once in the event loop, where no day's work is to be summed up for it."""
    record = partial(jobs.submit_once, max_queued=limit, usual=services.limits)
    owner = submission.owner
    if not services.limits.daily_seconds and owner not in services.summed_up:
        try:
            return await services.act_briefly(_deed, record, submission, briefly=True)
        except NotBrief:  # they have a limit of their own; that may be taken back one day, and costs a thread then
            services.summed_up.add(owner)
    return await services.act(_deed, record, submission)


def _told(job: Job, work: str) -> None:
    """Say in the request's log line, and in its span, which job it made."""
    structlog.contextvars.bind_contextvars(job_id=str(job.id), work=work)
    tracing.here().note(
        {
            "neural_mri.job": str(job.id),
            "neural_mri.kind": job.kind.value,
            "neural_mri.model": job.model,
            "neural_mri.work": work,
        }
    )


def _deed(submitted: Submitted) -> Deed | None:
    """Models are everybody's; scans are their own record."""
    job, is_new = submitted
    action = _MODEL_DEEDS.get(job.kind) if is_new else None
    return None if action is None else Deed(action, job.model, {"job": str(job.id)})


async def submit_model_job(
    services: Services, kind: JobKind, model: RegisteredModel, idempotency_key: str | None = None
) -> Job:
    """The job that loads a model, or unloads it."""
    submission = Submission(
        owner=services.caller.user,
        kind=kind,
        model=model.name,
        revision=model.revision,
        # Any worker may load, and any withdraws what all hold: who is said to hold it may be gone by then.
        queue=keys.CONTROL_QUEUE,
        request=msgspec.json.encode(ModelRequest(model=model.name)),
        deadline_seconds=services.settings.job_deadline_seconds,
        idempotency_key=idempotency_key,
        traceparent=tracing.here().traceparent,
    )
    return await _submit(services, submission)


def submission_of(
    services: Services, prepared: Prepared, lane: Lane, idempotency_key: str | None = None
) -> Submission:
    """The caller's scan, as a job to be."""
    scan, model = prepared.scan, prepared.model
    return Submission(
        owner=services.caller.user,
        kind=JobKind.SCAN,
        model=model.name,
        revision=model.revision,
        queue=keys.scan_queue(model.revision) if scan.needs_loaded_model else keys.CPU_QUEUE,
        request=encode_scan(scan),
        tokens=prepared.tokens,
        operands=prepared.operands,
        forwards=prepared.forwards,
        scan_key=prepared.key,
        lane=lane,
        deadline_seconds=services.settings.job_deadline_seconds,
        idempotency_key=idempotency_key,
        traceparent=tracing.here().traceparent,
    )
