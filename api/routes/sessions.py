"""Saved sessions: made, opened, saved, listed, forked, followed."""

from collections.abc import Callable
from typing import Annotated, Any
from uuid import UUID

from litestar import Request, Response, delete, get, patch, post, put
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg, FromPath, HeaderParameter, QueryParameter
from litestar.types import ASGIApp

from api.access import readmission
from api.dependencies import Services
from api.files import is_known
from api.problems import refusals
from api.results import IfNoneMatch
from api.session_answers import (
    EVENTS,
    KNOWN,
    AtRevision,
    LastEventId,
    answered,
    own_session,
)
from api.session_contents import (
    add_scan,
    arriving,
    content_of,
    opened_at,
    settle_all,
    tell_saved,
)
from api.session_streams import SessionFollowing
from api.streams import MEDIA_TYPE, event_stream
from neural_mri.backing import session_revisions, sessions
from neural_mri.backing.audit import Deed
from neural_mri.backing.sessions import Made
from neural_mri.contract.auth import AuditAction
from neural_mri.contract.sessions import (
    NewScan,
    NewSession,
    PreconditionRequired,
    RevisionView,
    SessionChanges,
    SessionClosed,
    SessionDetail,
    SessionFork,
    SessionPage,
    SessionSave,
    SessionView,
)

__all__ = (
    "add_session_scan",
    "change_session",
    "create_session",
    "delete_session",
    "follow_session",
    "fork_session",
    "get_session",
    "list_revisions",
    "list_sessions",
    "save_session",
)

MOST_REVISIONS = 2**31 - 1
"""No number is larger than a column holds."""

IfMatch = Annotated[
    str | None,
    HeaderParameter(
        name="If-Match",
        description="The revision that was read, as its ETag has it; `*` saves over whatever is there.",
        required=False,
    ),
]
NOTED = {
    "name": "Where Paris comes from",
    "notes": [{"text": "Heads of layer 21 write the city.", "component": "blocks.21.attn.head_3"}],
    "view": {"mode": "DTI", "layer": 21},
    "message": "First look",
}


@post(
    "/api/sessions",
    status_code=201,
    operation_id="createSession",
    summary="Make a session of scans, notes and key images",
    description=(
        "Scans are named by jobs of yours that have succeeded; their results are kept for as long as "
        "the session is. The answer's ETag is the revision."
    ),
    tags=["sessions"],
    responses=refusals(404, 409, 410, 413, 415, 422, 429),
)
async def create_session(
    data: Annotated[
        NewSession,
        BodyKwarg(
            media_type=RequestEncodingType.JSON,
            examples=[
                Example(summary="Empty", value={"name": "Eiffel"}),
                Example(summary="With a note", value=NOTED),
            ],
        ),
    ],
    services: NamedDependency[Services],
) -> Response[SessionDetail]:
    """Make a session."""
    author = services.caller.user
    document = await content_of(services, data)
    made = Made(
        author, data.name, session_revisions.encode_document(document), author, data.message
    )
    view = await services.sessions.write(sessions.create, made)
    return await answered(services, view.id, status=201)


@get(
    "/api/sessions",
    operation_id="listSessions",
    summary="Your sessions: the pinned ones, then those saved last",
    tags=["sessions"],
    responses=refusals(),
)
async def list_sessions(
    services: NamedDependency[Services],
    words: Annotated[
        str,
        QueryParameter(
            name="q",
            max_length=200,
            pattern=r"^[^\x00]*$",
            description="Words that all stand in the name, notes, prompts, labels or models.",
        ),
    ] = "",
    model: Annotated[
        str | None,
        QueryParameter(
            max_length=200, pattern=r"^[^\x00]*$", description="Only with scans of this model."
        ),
    ] = None,
    pinned: Annotated[bool | None, QueryParameter(description="Only such as are, or not.")] = None,
    after: Annotated[
        str | None, QueryParameter(max_length=200, description="The `next` of the page before.")
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=200, description="How many at most.")] = 50,
) -> SessionPage:
    """List sessions."""
    await settle_all(services, services.caller.user)
    return await services.sessions.read(
        sessions.page,
        services.caller.user,
        limit=limit,
        query=words,
        model=model,
        pinned=pinned,
        after=after,
    )


@get(
    "/api/sessions/{session_id:uuid}",
    operation_id="getSession",
    summary="Open a session",
    description=(
        "Needs no worker and no model: the document names every result, and `results` has them all in "
        "one file. The ETag is the revision."
    ),
    tags=["sessions"],
    responses={**KNOWN, **refusals(404)},
)
async def get_session(
    session_id: FromPath[UUID],
    services: NamedDependency[Services],
    revision: AtRevision = None,
    if_none_match: IfNoneMatch = None,
) -> Response[SessionDetail]:
    """Open a session."""
    await own_session(services, session_id)
    answer = await answered(services, session_id, revision=revision)
    if is_known(if_none_match, answer.headers["etag"]):
        known: Response[SessionDetail] = Response(
            None,  # type: ignore[arg-type]  # the reader has it
            status_code=304,
            headers=answer.headers,
        )
        return known
    return answer


@put(
    "/api/sessions/{session_id:uuid}",
    operation_id="saveSession",
    summary="Save a session: a new revision over the one that was read",
    description=(
        "If-Match names the revision that was read. Where somebody has saved another since, nothing is "
        "written, and the answer, 412, names it as `head`. Scans that were only added since stand in "
        "nobody's way: they stay, behind those named here. A save that changes nothing writes nothing."
    ),
    tags=["sessions"],
    responses=refusals(404, 409, 410, 412, 413, 415, 422, 428),
)
async def save_session(
    session_id: FromPath[UUID],
    data: Annotated[
        SessionSave,
        BodyKwarg(
            media_type=RequestEncodingType.JSON,
            examples=[
                Example(
                    summary="Notes and a view",
                    value={name: NOTED[name] for name in ("notes", "view", "message")},
                )
            ],
        ),
    ],
    services: NamedDependency[Services],
    if_match: IfMatch = None,
) -> Response[SessionDetail]:
    """Save a session."""
    view = await own_session(services, session_id)
    if if_match is None:
        raise PreconditionRequired(
            f'If-Match is missing: expected the revision that was read, "{view.head}" by now',
            head=view.head,
        )
    over = _read_of(if_match, view.head)
    document = await content_of(services, data, parent=view.head, session_id=session_id)
    author = services.caller.user
    saved = await services.sessions.write(
        sessions.save, session_id, document, over=over, author=author, message=data.message
    )
    await tell_saved(services, saved, author)
    return await answered(services, session_id)


def _read_of(if_match: str, head: str) -> str | None:
    """The revision that If-Match names, of several the one that is there; None where any will do."""
    tags = [tag.strip().removeprefix("W/").strip('"') for tag in if_match.split(",")]
    if "*" in tags:
        return None
    return head if head in tags else tags[0]


@patch(
    "/api/sessions/{session_id:uuid}",
    operation_id="changeSession",
    summary="Rename a session, or pin it",
    tags=["sessions"],
    responses=refusals(404, 413, 415),
)
async def change_session(
    session_id: FromPath[UUID],
    data: Annotated[
        SessionChanges,
        BodyKwarg(
            media_type=RequestEncodingType.JSON,
            examples=[Example(value={"name": "Where Paris comes from", "pinned": True})],
        ),
    ],
    services: NamedDependency[Services],
) -> SessionView:
    """Change a session."""
    await own_session(services, session_id)
    await arriving(services, session_id)
    return await services.sessions.write(
        sessions.change, session_id, name=data.name, pinned=data.pinned
    )


@delete(
    "/api/sessions/{session_id:uuid}",
    status_code=204,
    operation_id="deleteSession",
    summary="Delete a session, its revisions and its links",
    tags=["sessions"],
    responses=refusals(404),
)
async def delete_session(session_id: FromPath[UUID], services: NamedDependency[Services]) -> None:
    """Delete a session."""
    await own_session(services, session_id)
    await services.act(_deleted(session_id), sessions.delete_session, session_id)
    await services.publisher.publish(session_id, SessionClosed())


def _deleted(session_id: UUID) -> Callable[[bool], Deed | None]:
    """The deed of a deletion, where there was something to delete."""
    deed = Deed(AuditAction.SESSION_DELETED, str(session_id), {})
    return lambda was_there: deed if was_there else None


@post(
    "/api/sessions/{session_id:uuid}/fork",
    status_code=201,
    operation_id="forkSession",
    summary="Begin a session of your own where another stands",
    description="Its first revision is the other's, hash and all.",
    tags=["sessions"],
    responses=refusals(404, 413, 415, 429),
)
async def fork_session(
    session_id: FromPath[UUID],
    data: Annotated[
        SessionFork,
        BodyKwarg(
            media_type=RequestEncodingType.JSON,
            examples=[Example(value={"name": "The same with other prompts"})],
        ),
    ],
    services: NamedDependency[Services],
) -> Response[SessionDetail]:
    """Fork a session."""
    await own_session(services, session_id)
    author = services.caller.user
    source = await opened_at(services, session_id, data.revision)
    view = await services.sessions.write(
        sessions.fork, source, owner=author, name=data.name, author=author
    )
    return await answered(services, view.id, status=201)


@post(
    "/api/sessions/{session_id:uuid}/scans",
    status_code=200,
    operation_id="addSessionScan",
    summary="Add a scan to whatever the session holds",
    description=(
        "A revision of its own, which stands in nobody's way. 202: the job has not ended; the scan is "
        "added when it has succeeded, and who follows the session sees it arrive. 429: with those on "
        "their way the session holds as many scans as one can."
    ),
    tags=["sessions"],
    responses={
        202: ResponseSpec(SessionDetail, description="On its way", generate_examples=False),
        **refusals(404, 409, 410, 413, 415, 429),
    },
)
async def add_session_scan(
    session_id: FromPath[UUID],
    data: Annotated[NewScan, BodyKwarg(media_type=RequestEncodingType.JSON)],
    services: NamedDependency[Services],
) -> Response[SessionDetail]:
    """Add a scan."""
    await own_session(services, session_id)
    job = await services.job(data.job)
    saved = await add_scan(services, session_id, job, data.label)
    return await answered(services, session_id, status=202 if saved is None else 200)


@get(
    "/api/sessions/{session_id:uuid}/revisions",
    operation_id="listRevisions",
    summary="The saves of a session, the latest first",
    description="`before` the last number of one page begins the next.",
    tags=["sessions"],
    responses=refusals(404),
)
async def list_revisions(
    session_id: FromPath[UUID],
    services: NamedDependency[Services],
    before: Annotated[
        int | None, QueryParameter(ge=1, le=MOST_REVISIONS, description="A revision's number.")
    ] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="How many at most.")] = 100,
) -> list[RevisionView]:
    """List revisions."""
    await own_session(services, session_id)
    await arriving(services, session_id)
    return await services.sessions.read(sessions.revisions, session_id, limit=limit, before=before)


@get(
    "/api/sessions/{session_id:uuid}/events",
    operation_id="followSession",
    summary="A session's events: saves, and scans as they arrive",
    description=EVENTS,
    tags=["sessions"],
    responses={
        200: ResponseSpec(
            str, description="Events", media_type=MEDIA_TYPE, generate_examples=False
        ),
        **refusals(404),
    },
)
async def follow_session(
    session_id: FromPath[UUID],
    services: NamedDependency[Services],
    request: Request[Any, Any, Any],
    last_event_id: LastEventId = None,
) -> ASGIApp:
    """Follow a session."""
    await own_session(services, session_id)
    return event_stream(
        SessionFollowing(services, session_id, last_event_id).chunks,
        readmission(services, request),
        look_seconds=services.settings.heartbeat_seconds,
    )
