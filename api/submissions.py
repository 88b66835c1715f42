"""From a request to a job: everything that can be refused is refused here, before anything is queued."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from api.dependencies import OWNER, Services
from api.results import is_whole
from neural_mri.backing import jobs, keys
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.records import Job, Submission
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.jobs import TERMINAL, JobKind, Lane
from neural_mri.contract.models import Architecture, ModelRequest
from neural_mri.contract.problems import Conflict, ModelNotLoaded, PromptTooLong, Unprocessable
from neural_mri.contract.scan_keys import scan_key
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
    AttentionScan,
    PromptScan,
    Scan,
    decode_scan,
    encode_scan,
    resolve_positions,
)
from neural_mri.contract.tokens import Tokens

__all__ = (
    "LARGEST_RESULT_BYTES",
    "submit_attention",
    "submit_model_job",
    "submit_scan",
    "tokens_of_prompt",
)

LARGEST_RESULT_BYTES = 512 * 2**20
"""Tables of one scan may take as much, by an estimate from shapes alone."""

REMEMBERED = 1000
"""Jobs of requests that only read, remembered so that the same request finds them."""

FLOAT_BYTES = 4
NEURON_ROW_BYTES = 32
PREDICTION_ROW_BYTES = 40


class Prepared(NamedTuple):
    """A scan as it was understood, for a model that is there."""

    scan: Scan
    model: RegisteredModel
    tokens: Tokens | None


async def submit_scan(services: Services, scan: Scan, lane: Lane) -> Job:
    """The job of a scan: queued, or born succeeded where its result is known.

    Raises the `Unprocessable` that names what the model or the prompt does not have, `ModelNotLoaded`,
    and `TooMany`.
    """
    prepared = await _prepared(services, scan)
    return await _submit(services, _submission(services, prepared, lane))


async def submit_attention(services: Services, job: Job, layer: int) -> Job:
    """The job that measures one layer's attention on the prompt of another job's scan.

    Raises `Unprocessable` where that has no prompt, `Conflict` where its weights are not there any more.
    """
    scan = decode_scan(job.request) if job.kind is JobKind.SCAN else None
    if not isinstance(scan, ActivationScan | AttentionScan):
        raise Unprocessable(
            f"job {job.id} read no prompt: attention is measured on that of an fMRI or attention scan",
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
    submission = _submission(services, await _prepared(services, wanted), job.lane)
    return await _submit_once(services, submission)


async def _submit_once(services: Services, submission: Submission) -> Job:
    """The job of a request that only reads: asked for again, it makes no second job of the first."""
    key = str(submission.scan_key)
    if (job_id := services.under_way.get(key)) is not None:
        known = await services.sessions.read(jobs.get, job_id)
        if known is not None and known.state not in TERMINAL:
            return known
    job = await _submit(services, submission)
    services.under_way[key] = job.id
    if len(services.under_way) > REMEMBERED:
        del services.under_way[next(iter(services.under_way))]
    return job


async def _submit(services: Services, submission: Submission) -> Job:
    """Record a job, then tell of it. A known result is used only while all of its bytes are there."""
    limit = services.settings.max_queued_jobs
    job = await services.sessions.write(jobs.submit, submission, max_queued=limit)
    if job.cached and job.manifest is not None and not await is_whole(services, job):
        await services.sessions.write(jobs.withdraw_result, job.manifest)
        job = await services.sessions.write(jobs.submit, submission, max_queued=limit)
    services.announce(job)
    return job


async def submit_model_job(services: Services, kind: JobKind, model: RegisteredModel) -> Job:
    """The job that loads a model, or unloads it."""
    loading = kind is JobKind.LOAD
    submission = Submission(
        owner=OWNER,
        kind=kind,
        model=model.name,
        revision=model.revision,
        # Any worker may load; to unload is up to those that hold it.
        queue=keys.CONTROL_QUEUE if loading else keys.scan_queue(model.revision),
        request=msgspec.json.encode(ModelRequest(model=model.name)),
        deadline_seconds=services.settings.job_deadline_seconds,
    )
    return await _submit(services, submission)


async def tokens_of_prompt(services: Services, model: RegisteredModel, prompt: str) -> Tokens:
    """A prompt as the model reads it. Raises `PromptTooLong`."""
    tokens = await services.tokenizers.encode(model.tokenizer_digest, prompt)
    n_ctx, bound = model.architecture.n_ctx, services.settings.max_tokens
    if len(tokens) > min(n_ctx, bound):
        limit = f"{model.name} reads {n_ctx}" if n_ctx <= bound else f"this service takes {bound}"
        raise PromptTooLong(
            f"the prompt has {len(tokens)} tokens, {limit} at most",
            n_tokens=len(tokens),
            limit=min(n_ctx, bound),
        )
    return tokens


async def _prepared(services: Services, scan: Scan) -> Prepared:
    model = await services.model(scan.model)
    if scan.needs_loaded_model and not (model.wanted or model.name in services.settings.pinned):
        raise ModelNotLoaded(
            f"no worker is asked to hold {model.name}: POST /api/model/load first",
            model=model.name,
        )
    scan = msgspec.structs.replace(scan, model=model.name)
    if not isinstance(scan, PromptScan):
        return Prepared(scan, model, None)
    if isinstance(scan, AttentionScan):
        scan = msgspec.structs.replace(scan, layers=tuple(sorted(set(scan.layers))))
    tokens = await tokens_of_prompt(services, model, scan.prompt)
    _check(scan, model.architecture, len(tokens))
    return Prepared(scan, model, tokens)


def _check(scan: PromptScan, architecture: Architecture, n_tokens: int) -> None:
    match scan:
        case ActivationScan():
            components = scan.selected(architecture)
            positions = resolve_positions(scan.token_positions, n_tokens)
            size = activation_bytes(scan, architecture, components, len(positions))
            mend = "report fewer components or token_positions, or another aggregation than raw"
        case AttentionScan():
            for layer in scan.layers:
                architecture.check(Component(Kind.ATTN, layer))
            size = len(scan.layers) * architecture.n_heads * n_tokens**2 * FLOAT_BYTES
            mend = "ask for fewer layers at once"
        case _:
            return
    if size > LARGEST_RESULT_BYTES:
        raise Unprocessable(
            f"the result would take some {size / 2**20:.0f} MiB, {LARGEST_RESULT_BYTES >> 20} MiB are "
            f"allowed: {mend}",
            bytes=size,
            limit=LARGEST_RESULT_BYTES,
        )


def activation_bytes(
    scan: ActivationScan,
    architecture: Architecture,
    components: Sequence[Component],
    n_positions: int,
) -> int:
    """About how large the tables of an fMRI scan will be."""
    width = architecture.d_model + 1 if scan.aggregation is Aggregation.RAW else 1
    mlps = sum(component.kind is Kind.MLP for component in components)
    a_position = (
        len(components) * width * FLOAT_BYTES
        + mlps * scan.top_neurons * NEURON_ROW_BYTES
        + scan.top_predictions * PREDICTION_ROW_BYTES
    )
    return a_position * n_positions


def _submission(services: Services, prepared: Prepared, lane: Lane) -> Submission:
    scan, model, tokens = prepared
    key = scan_key(
        scan,
        token_ids=None if tokens is None else tokens.ids,
        revision=model.revision,
        tokenizer_digest=model.tokenizer_digest,
        numerics=model.numerics,
    )
    return Submission(
        owner=OWNER,
        kind=JobKind.SCAN,
        model=model.name,
        revision=model.revision,
        queue=keys.scan_queue(model.revision) if scan.needs_loaded_model else keys.CPU_QUEUE,
        request=encode_scan(scan),
        tokens=tokens,
        scan_key=key,
        lane=lane,
        deadline_seconds=services.settings.job_deadline_seconds,
    )
