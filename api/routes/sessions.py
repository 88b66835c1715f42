"""Saved sessions: made, opened, saved, listed, forked, compared, exported, followed."""

import asyncio
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, Response, delete, get, patch, post, put
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg, FromPath, HeaderParameter, PathParameter, QueryParameter
from litestar.types import ASGIApp

from api.access import readmission
from api.batch_results import in_thread, pieces_answer
from api.bodies import BODIES, Form, bounded
from api.dependencies import Services
from api.differences import Revision, difference
from api.negotiation import preferred
from api.problems import refusals
from api.results import kept_table_answer
from api.session_contents import (
    add_scan,
    arriving,
    content_of,
    kept,
    opened_at,
    settle_all,
    tell_saved,
)
from api.session_files import entries_of, take_in
from api.session_streams import SessionFollowing
from api.streams import MEDIA_TYPE, event_stream
from neural_mri.backing import sessions
from neural_mri.backing.sessions import Made, Opened
from neural_mri.contract.archives import SESSION_FILE, write_archive
from neural_mri.contract.problems import UnknownTable
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM
from neural_mri.contract.sessions import (
    NewScan,
    NewSession,
    PreconditionRequired,
    RevisionView,
    SessionChanges,
    SessionClosed,
    SessionDetail,
    SessionDifference,
    SessionFork,
    SessionPage,
    SessionSave,
    SessionView,
    UnknownRevision,
)

__all__ = (
    "add_session_scan",
    "change_session",
    "compare_sessions",
    "create_session",
    "delete_session",
    "detail_of",
    "export_session",
    "follow_session",
    "fork_session",
    "get_session",
    "get_session_results",
    "get_session_table",
    "import_session",
    "list_revisions",
    "list_sessions",
    "own_session",
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
IfNoneMatch = Annotated[
    str | None,
    HeaderParameter(
        name="If-None-Match", description="A revision that you have already.", required=False
    ),
]
LastEventId = Annotated[
    str | None,
    HeaderParameter(
        name="Last-Event-ID",
        description="The id of the last event that was read: the stream goes on after it.",
        required=False,
    ),
]
AtRevision = Annotated[
    str | None,
    QueryParameter(
        pattern=r"^[0-9a-f]{64}$", description="Which revision; the latest where left out."
    ),
]
Accept = Annotated[
    str | None, HeaderParameter(name="Accept", description="Which form.", required=False)
]
Range = Annotated[
    str | None,
    HeaderParameter(
        name="Range", description="`bytes=FIRST-LAST`: a part of an Arrow file.", required=False
    ),
]
EVENTS = (
    "Server-sent events: `saved` (the session stands at a revision: the first event, and one for each "
    "save), `scan` (where a scan stands that somebody adds), `closed`, the last. Each event's data is a "
    "JSON object that names its `session` and `type`."
)
NOTED = {
    "name": "Where Paris comes from",
    "notes": [{"text": "Heads of layer 21 write the city.", "component": "blocks.21.attn.head_3"}],
    "view": {"mode": "DTI", "layer": 21},
    "message": "First look",
}
FILE = ResponseSpec(bytes, description="The file", media_type=SESSION_FILE, generate_examples=False)
TABLE = {
    200: ResponseSpec(
        bytes, description="The table", media_type=ARROW_FILE, generate_examples=False
    ),
    206: ResponseSpec(
        bytes, description="The part asked for", media_type=ARROW_FILE, generate_examples=False
    ),
    304: ResponseSpec(None, description="You have it already"),
    416: ResponseSpec(None, description="The file has no such part"),
}
KNOWN = {304: ResponseSpec(None, description="You have it already")}


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
    made = Made(author, data.name, sessions.encode_document(document), author, data.message)
    view = await services.sessions.write(sessions.create, made)
    return await _answered(services, view.id, status=201)


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
    answer = await _answered(services, session_id, revision=revision)
    if if_none_match is not None and answer.headers["etag"] in if_none_match:
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
        "written, and the answer, 412, names it as `head`. A save that changes nothing writes nothing."
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
    over = view.head if if_match.strip() == "*" else _tag(if_match)
    document = await content_of(services, data, parent=view.head, session_id=session_id)
    author = services.caller.user
    saved = await services.sessions.write(
        sessions.save, session_id, document, over=over, author=author, message=data.message
    )
    await tell_saved(services, saved, author)
    return await _answered(services, session_id)


def _tag(condition: str) -> str:
    return condition.strip().removeprefix("W/").strip('"')


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
    await services.sessions.write(sessions.delete_session, session_id)
    await services.publisher.publish(session_id, SessionClosed())


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
    return await _answered(services, view.id, status=201)


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
    return await _answered(services, session_id, status=202 if saved is None else 200)


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
    "/api/sessions/{session_id:uuid}/results",
    operation_id="getSessionResults",
    summary="Every result of a session in one file: manifests and Arrow tables",
    description="A zip, nothing in it compressed; each entry is named by its SHA-256.",
    tags=["sessions"],
    responses={200: FILE, **KNOWN, **refusals(404, 410)},
)
async def get_session_results(
    session_id: FromPath[UUID],
    services: NamedDependency[Services],
    revision: AtRevision = None,
    if_none_match: IfNoneMatch = None,
) -> ASGIApp:
    """Read all results."""
    await own_session(services, session_id)
    opened = await opened_at(services, session_id, revision)
    return await archive_of(services, opened, if_none_match, whole=False)


@get(
    "/api/sessions/{session_id:uuid}/export",
    operation_id="exportSession",
    summary="The session as one file, to be opened from disk or imported elsewhere",
    description="An .nmri file: the document beside the results. Equal sessions have equal bytes.",
    tags=["sessions"],
    responses={200: FILE, **KNOWN, **refusals(404, 410)},
)
async def export_session(
    session_id: FromPath[UUID],
    services: NamedDependency[Services],
    revision: AtRevision = None,
    if_none_match: IfNoneMatch = None,
) -> ASGIApp:
    """Export a session."""
    await own_session(services, session_id)
    opened = await opened_at(services, session_id, revision)
    return await archive_of(services, opened, if_none_match, whole=True)


async def archive_of(
    services: Services, opened: Opened, if_none_match: str | None, *, whole: bool
) -> ASGIApp:
    """A session's results, and its document where the whole is wanted. Raises `Gone`."""
    document = sessions.decode_document(opened.document)
    entries = await asyncio.to_thread(entries_of, services.store, document)
    etag = f'"{opened.revision}-{"session" if whole else "results"}"'
    headers = {"etag": etag, "content-disposition": _attachment(opened, whole=whole)}
    if if_none_match is not None and etag in if_none_match:
        return not_modified(headers)
    pieces = write_archive(
        entries,
        name=opened.view.name if whole else "",
        document=opened.document if whole else None,
    )
    return pieces_answer(in_thread(pieces), SESSION_FILE, headers)


def _attachment(opened: Opened, *, whole: bool) -> str:
    suffix = "nmri" if whole else "results.nmri"
    return f'attachment; filename="session-{opened.view.id}.{suffix}"'


def not_modified(headers: dict[str, str]) -> ASGIApp:
    """Tell a reader that it has this already."""

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        listed = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 304, "headers": listed})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return answer


@get(
    "/api/sessions/{session_id:uuid}/results/{result:str}/{table:str}",
    operation_id="getSessionTable",
    summary="One table of a session's result, in Arrow",
    description="The file never changes; a part of it can be asked for by Range.",
    tags=["sessions"],
    responses={**TABLE, **refusals(404, 406, 410)},
)
async def get_session_table(
    session_id: FromPath[UUID],
    result: Annotated[str, PathParameter(pattern=r"^[0-9a-f]{64}$", description="Its hash.")],
    table: FromPath[str],
    services: NamedDependency[Services],
    accept: Accept = None,
    byte_range: Range = None,  # noqa: ARG001 (read where the bytes are sent)
) -> ASGIApp:
    """Read a table."""
    media_type = preferred(accept, (ARROW_FILE, ARROW_STREAM))
    await own_session(services, session_id)
    if not await services.sessions.read(sessions.holds, session_id, result):
        raise UnknownRevision(
            f"no revision of session {session_id} holds the result {result}", result=result
        )
    return await session_table(services, result, table, media_type)


async def session_table(services: Services, result: str, name: str, media_type: str) -> ASGIApp:
    """A kept result's table. Raises `UnknownTable`, `Gone`."""
    manifest = (await asyncio.to_thread(kept, services.store, result)).manifest
    ref = manifest.table(name)
    if ref is None:
        raise UnknownTable(
            f"the result {result} has no table {name!r}, but "
            + ", ".join(each.name for each in manifest.tables),
            tables=[each.name for each in manifest.tables],
        )
    return await kept_table_answer(
        services.store, ref, media_type, filename=f"{result[:12]}.{ref.name}.arrow"
    )


@post(
    "/api/sessions/import",
    status_code=201,
    operation_id="importSession",
    summary="Take in a session's file",
    description=(
        "Each hash is checked before anything is kept, and what is wrong is refused by its entry's name. "
        "The session's revision is the one that was exported. Its results answer no scans: nobody "
        "measured them here."
    ),
    tags=["sessions"],
    opt={BODIES: (Form(SESSION_FILE, bytes),)},
    request_max_body_size=None,
    responses=refusals(413, 415, 422, 429),
)
async def import_session(
    request: Request[Any, Any, Any], services: NamedDependency[Services]
) -> Response[SessionDetail]:
    """Import a session."""
    chunks = bounded(request, services.settings.max_session_bytes)
    view = await take_in(services, chunks)
    return await _answered(services, view.id, status=201)


@get(
    "/api/sessions/{session_id:uuid}/difference",
    operation_id="compareSessions",
    summary="What differs between two sessions, or two revisions of one",
    description=(
        "Which scans were added, removed or changed; of changed ones what was asked differently, and of "
        "their main tables each component before and after. Needs no worker and no model."
    ),
    tags=["sessions"],
    responses=refusals(404, 410),
)
async def compare_sessions(
    session_id: FromPath[UUID],
    services: NamedDependency[Services],
    other: Annotated[UUID, QueryParameter(description="The session to compare with.")],
    revision: AtRevision = None,
    other_revision: AtRevision = None,
    strongest: Annotated[
        int, QueryParameter(ge=0, le=1000, description="Rows of each table to tell of.")
    ] = 20,
) -> SessionDifference:
    """Compare sessions."""
    sides = []
    for wanted, at in ((session_id, revision), (other, other_revision)):
        await own_session(services, wanted)
        opened = await opened_at(services, wanted, at)
        document = sessions.decode_document(opened.document)
        sides.append(Revision(opened.revision, document))
    return await asyncio.to_thread(difference, services.store, *sides, strongest=strongest)


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


async def own_session(services: Services, session_id: UUID) -> SessionView:
    """The caller's session of that id. Raises `UnknownSession`, for another owner's as well."""
    view = await services.sessions.read(sessions.find, session_id)
    if view is None or view.owner != services.caller.user:
        raise sessions.unknown(session_id)
    return view


async def detail_of(
    services: Services, session_id: UUID, revision: str | None = None
) -> SessionDetail:
    """A session, opened; scans that have arrived by now are in it."""
    waiting = await arriving(services, session_id)
    opened = await services.sessions.read(sessions.opened, session_id, revision)
    return SessionDetail(
        **msgspec.structs.asdict(opened.view),
        opened=opened.revision,
        document=sessions.decode_document(opened.document),
        arriving=waiting,
    )


async def _answered(
    services: Services, session_id: UUID, *, status: int = 200, revision: str | None = None
) -> Response[SessionDetail]:
    detail = await detail_of(services, session_id, revision)
    headers = {"etag": f'"{detail.opened}"', "cache-control": "private, no-cache"}
    if status == 201:
        headers["location"] = detail.links["self"]
    return Response(detail, status_code=status, headers=headers)
