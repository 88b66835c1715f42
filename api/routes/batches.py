"""Batches: many scans in one request."""

from typing import Annotated, Any
from uuid import UUID

from litestar import Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, HeaderParameter, QueryParameter
from litestar.types import ASGIApp

from api.access import readmission
from api.answers import IdempotencyKey
from api.batch_results import ZIP, archive_answer, lines_answer, table_answer
from api.batch_streams import BatchFollowing, parse_cursor
from api.batches import Options, feed, submit_batch
from api.bodies import BODIES, Form
from api.dependencies import Services
from api.negotiation import Accept, preferred
from api.problems import refusals
from api.streams import MEDIA_TYPE, event_stream, no_content
from neural_mri.backing import batches
from neural_mri.backing.audit import Deed
from neural_mri.backing.batches import Batch
from neural_mri.contract.auth import AuditAction
from neural_mri.contract.batches import (
    MOST_LINES,
    NDJSON,
    BatchLine,
    BatchRequest,
    BatchView,
    OnInvalid,
    UnknownBatch,
)
from neural_mri.contract.jobs import TERMINAL, JobState, Lane
from neural_mri.contract.problems import InvalidRequest
from neural_mri.contract.results import ARROW_STREAM

__all__ = (
    "cancel_batch",
    "create_batch",
    "follow_batch",
    "get_batch",
    "list_batch_lines",
    "list_batch_results",
    "list_batches",
)

EIFFEL = "The Eiffel Tower is located in the city of"
EXAMPLE = {
    "scans": [
        {"scan_mode": "fMRI", "prompt": EIFFEL, "token_positions": [-1]},
        {"scan_mode": "FLAIR", "prompt": EIFFEL, "answer": " Paris"},
    ]
}
FORMS = (
    Form("application/json", BatchRequest, (EXAMPLE,)),
    Form(NDJSON, bytes),
)

LastEventId = Annotated[
    str | None,
    HeaderParameter(
        name="Last-Event-ID",
        description="The id of the last event that was read: the stream goes on after it.",
        required=False,
    ),
]


@post(
    "/api/batches",
    status_code=202,
    response_description="The batch, and where to look",
    operation_id="createBatch",
    summary="Ask for many scans at once",
    description=(
        f"Up to {MOST_LINES:,} scans, each with its `scan_mode`: a line each (`{NDJSON}`, read as it "
        "arrives), or as one JSON document. Lines that ask for the same scan share one job; scans whose "
        "result is known cost nothing. What cannot be done is refused by the line's number. All that "
        "is accepted is recorded together, or nothing is, and becomes jobs as your limits and the "
        "service's leave room. Sent again under its Idempotency-Key it is the same batch, and what was "
        "not recorded when the answer was lost is recorded then."
    ),
    tags=["batches"],
    opt={BODIES: FORMS},
    request_max_body_size=None,
    responses=refusals(409, 413, 415, 422, 429),
)
async def create_batch(
    request: Request[Any, Any, Any],
    services: NamedDependency[Services],
    lane: Annotated[Lane, QueryParameter(description="How soon its jobs should run.")] = Lane.BATCH,
    on_invalid: Annotated[
        OnInvalid, QueryParameter(description="What becomes of it when a line cannot be done.")
    ] = OnInvalid.REFUSE,
    max_failures: Annotated[
        int | None,
        QueryParameter(
            ge=1, le=MOST_LINES, description="So many failed scans cancel those that are left."
        ),
    ] = None,
    name: Annotated[
        str,
        QueryParameter(max_length=200, pattern=r"^[^\x00]*$", description="What it is for."),
    ] = "",
    idempotency_key: IdempotencyKey = None,
) -> Response[BatchView]:
    """Submit a batch."""
    options = Options(lane, on_invalid, max_failures, name, idempotency_key)
    view = await submit_batch(services, request, options)
    return Response(view, status_code=202, headers={"location": view.links["self"]})


@get(
    "/api/batches",
    operation_id="listBatches",
    summary="Your latest batches, newest first",
    description="As long as a page is full, `after` its last batch begins the next.",
    tags=["batches"],
    responses=refusals(404),
)
async def list_batches(
    services: NamedDependency[Services],
    after: Annotated[
        UUID | None,
        QueryParameter(
            description="Only such as are older than this batch: the last of the page before."
        ),
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=100, description="How many at most.")] = 20,
) -> list[BatchView]:
    """List batches."""
    if after is not None:
        await _batch(services, after)
    found = await services.sessions.read(batches.recent, services.caller.user, limit, after=after)
    return [await services.sessions.read(batches.view, batch) for batch in found]


@get(
    "/api/batches/{batch_id:uuid}",
    operation_id="getBatch",
    summary="How far a batch has come",
    tags=["batches"],
    responses=refusals(404),
)
async def get_batch(batch_id: FromPath[UUID], services: NamedDependency[Services]) -> BatchView:
    """Look at a batch."""
    return await services.sessions.read(batches.view, await _batch(services, batch_id))


@get(
    "/api/batches/{batch_id:uuid}/lines",
    operation_id="listBatchLines",
    summary="What became of each line: its job, or why it was refused",
    description="In order; `after` the last line of one page begins the next.",
    tags=["batches"],
    responses=refusals(404),
)
async def list_batch_lines(
    batch_id: FromPath[UUID],
    services: NamedDependency[Services],
    in_state: Annotated[
        JobState | None,
        QueryParameter(name="state", description="Only lines whose scan is in a state."),
    ] = None,
    after: Annotated[int, QueryParameter(ge=0, le=MOST_LINES, description="A line's number.")] = 0,
    limit: Annotated[
        int, QueryParameter(ge=1, le=MOST_LINES, description="How many at most.")
    ] = 1000,
) -> list[BatchLine]:
    """List lines."""
    await _batch(services, batch_id)
    return await services.sessions.read(
        batches.lines,
        batch_id,
        after=after,
        limit=limit,
        only=None if in_state is None else (in_state,),
        refused=False,
    )


@get(
    "/api/batches/{batch_id:uuid}/results",
    operation_id="listBatchResults",
    summary="The results so far: summaries line by line, one table of all, or everything in a file",
    description=(
        f"As `{NDJSON}`: an object a line that has ended, in order, with its result's summary, or with "
        f"why there is none. As `{ARROW_STREAM}`: the table that `table` names, of all results that "
        "have it, one under the other, with a column `line`; values a token are lists. As "
        f"`{ZIP}`: every manifest and table, and `lines.json`, which says which is whose. A result "
        "that is lost is left out, and the table's schema metadata (`neural_mri.left_out`) and "
        "`lines.json` say so."
    ),
    tags=["batches"],
    responses={
        200: ResponseSpec(bytes, description="Results", media_type=NDJSON, generate_examples=False),
        **refusals(404, 406, 409, 410, 422),
    },
)
async def list_batch_results(
    batch_id: FromPath[UUID],
    services: NamedDependency[Services],
    after: Annotated[int, QueryParameter(ge=0, le=MOST_LINES, description="A line's number.")] = 0,
    table: Annotated[
        str | None, QueryParameter(description="Of Arrow: which table.", max_length=100)
    ] = None,
    accept: Accept = None,
) -> ASGIApp:
    """Read results."""
    media_type = preferred(accept, (NDJSON, ARROW_STREAM, ZIP))
    batch = await _batch(services, batch_id)
    if media_type == ZIP:
        return await archive_answer(services, batch)
    if media_type == ARROW_STREAM:
        if table is None:
            raise InvalidRequest(
                "an Arrow stream is one table of all results: name it, as ?table=predictions"
            )
        return await table_answer(services, batch, table, after)
    return lines_answer(services, batch, after)


@get(
    "/api/batches/{batch_id:uuid}/events",
    operation_id="followBatch",
    summary="A batch's events, from its first or from where you stopped",
    description=(
        "Server-sent events: `progress` (how many scans stand where), `line` (a line's scan has ended), "
        "and one `ended`, the last. Each event's data is a JSON object that names its `batch` and "
        "`type`. Who comes back with Last-Event-ID may be told again of some lines. 204: the end has "
        "been read already."
    ),
    tags=["batches"],
    responses={
        200: ResponseSpec(
            str, description="Events", media_type=MEDIA_TYPE, generate_examples=False
        ),
        204: ResponseSpec(None, description="The end has been read already"),
        **refusals(404),
    },
)
async def follow_batch(
    batch_id: FromPath[UUID],
    services: NamedDependency[Services],
    request: Request[Any, Any, Any],
    last_event_id: LastEventId = None,
) -> ASGIApp:
    """Follow a batch."""
    batch = await _batch(services, batch_id)
    since = parse_cursor(last_event_id)
    if since is None:
        return no_content
    return event_stream(
        BatchFollowing(services, batch, since).chunks,
        readmission(services, request),
        look_seconds=services.settings.heartbeat_seconds,
    )


@delete(
    "/api/batches/{batch_id:uuid}",
    status_code=200,
    operation_id="cancelBatch",
    summary="Stop a batch",
    description=(
        "What waits is cancelled at once, what runs is asked to stop; results that are there stay. One "
        "that has ended stays as it is. 202 while scans are still running."
    ),
    tags=["batches"],
    responses={
        202: ResponseSpec(BatchView, description="Asked to stop", generate_examples=False),
        **refusals(404),
    },
)
async def cancel_batch(
    batch_id: FromPath[UUID], services: NamedDependency[Services]
) -> Response[BatchView]:
    """Stop a batch."""
    await _batch(services, batch_id)

    def deed(cancelled: int) -> Deed | None:
        details = {"batch": str(batch_id), "waiting": cancelled}
        return Deed(AuditAction.JOB_CANCELLED, str(batch_id), details) if cancelled else None

    await services.act(deed, batches.stop, batch_id, by=batches.CALLER)
    await feed(services)  # what waits for room becomes jobs that are cancelled
    for asked in await services.sessions.write(batches.cancel_held, batch_id):
        if asked.moved:
            services.announce(asked.job)
        elif asked.job.state not in TERMINAL:
            await services.publisher.flag_cancel(asked.job.source)
    view = await services.sessions.read(batches.view, await _batch(services, batch_id))
    running = view.counts.queued + view.counts.running
    return Response(view, status_code=202 if running else 200)


async def _batch(services: Services, batch_id: UUID) -> Batch:
    """The caller's batch of that id. Raises `UnknownBatch`, for another owner's as well."""
    found = await services.sessions.read(batches.find, batch_id)
    if found is None or found.owner != services.caller.user:
        raise UnknownBatch(f"there is no batch {batch_id}", batch=str(batch_id))
    return found
