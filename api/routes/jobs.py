"""Jobs: looking at them, stopping them, and deleting them."""

from typing import Annotated
from uuid import UUID

from litestar import Response, delete, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, QueryParameter

from api.dependencies import Services
from api.problems import refusals
from api.session_contents import keeping_sessions, settle_job
from neural_mri.backing import deletion, jobs
from neural_mri.backing.audit import Deed
from neural_mri.backing.jobs import Cancellation
from neural_mri.contract.auth import AuditAction
from neural_mri.contract.jobs import TERMINAL, DeletedJob, JobState, JobView

__all__ = ("cancel_job", "delete_job", "get_job", "list_jobs")

LATEST = 1000
"""Among so many of their latest jobs an owner can look for those in a state."""


@get(
    "/api/jobs",
    operation_id="listJobs",
    summary="Your latest jobs, newest first",
    description="As long as a page is full, `after` its last job begins the next.",
    tags=["jobs"],
    responses=refusals(404),
)
async def list_jobs(
    services: NamedDependency[Services],
    in_state: Annotated[
        JobState | None,
        QueryParameter(name="state", description=f"Only those in a state, of the {LATEST} latest."),
    ] = None,
    scan_key: Annotated[
        str | None,
        QueryParameter(
            pattern=r"^[0-9a-f]{16,64}$",
            description="Only those of this scan: its key as reports and manifests have it, or its first digits.",
        ),
    ] = None,
    after: Annotated[
        UUID | None,
        QueryParameter(
            description="Only such as are older than this job: the last of the page before."
        ),
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=200, description="How many at most.")] = 50,
) -> list[JobView]:
    """List jobs."""
    if after is not None:
        await services.job(after)
    latest = limit if in_state is None else LATEST
    found = await services.sessions.read(
        jobs.recent, services.caller.user, latest, after=after, scan_key=scan_key
    )
    views = [await services.view(job) for job in found]
    return [view for view in views if in_state in (None, view.state)][:limit]


@get(
    "/api/jobs/{job_id:uuid}",
    operation_id="getJob",
    summary="Where a job stands",
    tags=["jobs"],
    responses=refusals(404),
)
async def get_job(job_id: FromPath[UUID], services: NamedDependency[Services]) -> JobView:
    """Look at a job."""
    return await services.view(await services.job(job_id), with_place=True)


@delete(
    "/api/jobs/{job_id:uuid}",
    status_code=200,
    operation_id="cancelJob",
    summary="Stop a job",
    description=(
        "A queued job is cancelled at once. One that runs is asked to stop, and its events tell when "
        "it has; if others wait for the same scan it is cancelled at once, and the scan goes on for "
        "them. One that has ended stays as it is: it is deleted by its `record`. 202 while it still runs."
    ),
    tags=["jobs"],
    responses={
        202: ResponseSpec(JobView, description="Asked to stop", generate_examples=False),
        **refusals(404),
    },
)
async def cancel_job(
    job_id: FromPath[UUID], services: NamedDependency[Services]
) -> Response[JobView]:
    """Stop a job."""
    await services.job(job_id)
    cancellation = await services.act(_cancelled, jobs.request_cancel, job_id)
    if cancellation.moved:
        services.announce(cancellation.job)
    elif cancellation.job.state not in TERMINAL:
        await services.publisher.flag_cancel(cancellation.job.source)
    stopped = cancellation.job.state in TERMINAL
    view = await services.view(cancellation.job)
    return Response(view, status_code=200 if stopped else 202)


def _cancelled(cancellation: Cancellation) -> Deed | None:
    job = cancellation.job
    if job.state in TERMINAL and not cancellation.moved:
        return None  # it had ended: nothing was done
    return Deed(AuditAction.JOB_CANCELLED, str(job.id), {"kind": job.kind, "model": job.model})


@delete(
    "/api/jobs/{job_id:uuid}/record",
    status_code=200,
    operation_id="deleteJob",
    summary="Delete a job that has ended, and its result",
    description=(
        "The job, its request and its events are gone at once, its result within minutes, unless another "
        "job has the same. A line of a batch says that its job was deleted. What a session keeps stays: "
        "`sessions` names those of yours, to be deleted by themselves. 409: the job has not ended; "
        "cancel it first."
    ),
    tags=["jobs"],
    responses=refusals(404, 409),
)
async def delete_job(job_id: FromPath[UUID], services: NamedDependency[Services]) -> DeletedJob:
    """Delete a job."""
    job = await services.job(job_id)
    kept_by: tuple[UUID, ...] = ()
    if job.state in TERMINAL:
        await settle_job(services, job)
        kept_by = await keeping_sessions(services, job)
    deed = Deed(AuditAction.JOB_DELETED, str(job_id), {"kind": job.kind, "model": job.model})
    is_followed = await services.act(lambda _: deed, deletion.delete_job, job_id)
    await services.publisher.forget(job_id, is_followed=is_followed)
    return DeletedJob(id=job_id, sessions=kept_by)
