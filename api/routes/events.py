"""Event streams."""

from collections.abc import Sequence
from typing import Annotated, Any
from uuid import UUID

from litestar import Request, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, HeaderParameter, QueryParameter
from litestar.types import ASGIApp

from api.access import readmission
from api.dependencies import Services
from api.problems import refusals
from api.streams import MEDIA_TYPE, Following, event_stream, no_content, parse_cursors
from neural_mri.contract.problems import InvalidRequest

__all__ = ("follow_job", "follow_jobs")

LARGEST_SHARED = 32

LastEventId = Annotated[
    str | None,
    HeaderParameter(
        name="Last-Event-ID",
        description="The id of the last event that was read: the stream goes on after it.",
        required=False,
    ),
]
DESCRIPTION = (
    "Server-sent events: `state`, `queue` (where a waiting job stands, at most once a second), "
    "`progress`, `layer_frame`, `activation_frame`, `artifact`, `reset` "
    "(earlier events are gone; the job stands as it says), and one `ended`, the last. Each event's "
    "data is a JSON object that names its `job` and `type`. A stream begins with the job's first "
    "event, or after Last-Event-ID; it ends early where the key it was asked for with is revoked, or the "
    "session closed. Progress and frames are told of a job that somebody may look at as it runs: one whose request did "
    "not wait for the answer, or that is followed before its end. 204: the end has been read already."
)
RESPONSES = {
    200: ResponseSpec(str, description="Events", media_type=MEDIA_TYPE, generate_examples=False),
    204: ResponseSpec(None, description="The end has been read already"),
}


@get(
    "/api/jobs/{job_id:uuid}/events",
    operation_id="followJob",
    summary="A job's events, from its first or from where you stopped",
    description=DESCRIPTION,
    tags=["events"],
    responses={**RESPONSES, **refusals(404)},
)
async def follow_job(
    job_id: FromPath[UUID],
    services: NamedDependency[Services],
    request: Request[Any, Any, Any],
    last_event_id: LastEventId = None,
) -> ASGIApp:
    """Follow a job."""
    return await _follow(services, request, [job_id], last_event_id)


@get(
    "/api/events",
    operation_id="followJobs",
    summary="Several jobs' events on one connection",
    description=f"{DESCRIPTION} An event's id resumes all of the stream's jobs.",
    tags=["events"],
    responses={**RESPONSES, **refusals(404)},
)
async def follow_jobs(
    services: NamedDependency[Services],
    job_ids: Annotated[
        str, QueryParameter(name="jobs", description="Job ids, separated by commas.", min_length=1)
    ],
    request: Request[Any, Any, Any],
    last_event_id: LastEventId = None,
) -> ASGIApp:
    """Follow jobs."""
    return await _follow(services, request, _ids(job_ids), last_event_id)


def _ids(text: str) -> list[UUID]:
    try:
        ids = list(dict.fromkeys(UUID(part.strip()) for part in text.split(",")))
    except ValueError as error:
        raise InvalidRequest(f"jobs is {text!r}: expected job ids, separated by commas") from error
    if len(ids) > LARGEST_SHARED:
        raise InvalidRequest(
            f"jobs names {len(ids)} jobs, one stream carries {LARGEST_SHARED} at most"
        )
    return ids


async def _follow(
    services: Services,
    request: Request[Any, Any, Any],
    job_ids: Sequence[UUID],
    last_event_id: str | None,
) -> ASGIApp:
    jobs = [await services.job(job_id) for job_id in job_ids]
    following = Following(services, jobs, parse_cursors(last_event_id, job_ids))
    if await following.has_ended():
        return no_content
    return event_stream(
        following.chunks,
        readmission(services, request),
        look_seconds=services.settings.heartbeat_seconds,
    )
