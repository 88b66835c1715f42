"""What routes of sessions, and of links to them, ask and answer alike."""

import asyncio
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Response
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, QueryParameter
from litestar.types import ASGIApp

from api.batch_results import in_thread, pieces_answer
from api.dependencies import Services
from api.files import is_known
from api.results import kept_table_answer
from api.session_contents import arriving, kept
from api.session_files import entries_of
from neural_mri.backing import session_revisions, sessions
from neural_mri.backing.session_revisions import Opened
from neural_mri.contract.archives import SESSION_FILE, write_archive
from neural_mri.contract.problems import UnknownTable
from neural_mri.contract.sessions import SessionDetail, SessionView

__all__ = (
    "EVENTS",
    "FILE",
    "KNOWN",
    "AtRevision",
    "LastEventId",
    "answered",
    "archive_of",
    "detail_of",
    "not_modified",
    "own_session",
    "session_table",
)

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
EVENTS = (
    "Server-sent events: `saved` (the session stands at a revision: the first event, and one for each "
    "save), `scan` (where a scan stands that somebody adds), `closed`, the last. Each event's data is a "
    "JSON object that names its `session` and `type`."
)
FILE = ResponseSpec(bytes, description="The file", media_type=SESSION_FILE, generate_examples=False)
KNOWN = {304: ResponseSpec(None, description="You have it already")}


async def own_session(services: Services, session_id: UUID) -> SessionView:
    """The caller's session of that id. Raises `UnknownSession`, for another owner's as well."""
    view = await services.sessions.read(sessions.find, session_id)
    if view is None or view.owner != services.caller.user:
        raise session_revisions.unknown(session_id)
    return view


async def detail_of(
    services: Services, session_id: UUID, revision: str | None = None
) -> SessionDetail:
    """A session, opened; scans that have arrived by now are in it."""
    waiting = await arriving(services, session_id)
    opened = await services.sessions.read(session_revisions.opened, session_id, revision)
    return SessionDetail(
        **msgspec.structs.asdict(opened.view),
        opened=opened.revision,
        document=session_revisions.decode_document(opened.document),
        arriving=waiting,
    )


async def answered(
    services: Services, session_id: UUID, *, status: int = 200, revision: str | None = None
) -> Response[SessionDetail]:
    """A session, opened; its ETag is the revision."""
    detail = await detail_of(services, session_id, revision)
    # Not for a browser's cache: what is on its way, and the name, change without a new revision.
    headers = {"etag": f'"{detail.opened}"', "cache-control": "no-store"}
    if status == 201:
        headers["location"] = detail.links["self"]
    return Response(detail, status_code=status, headers=headers)


async def archive_of(
    services: Services, opened: Opened, if_none_match: str | None, *, whole: bool
) -> ASGIApp:
    """A session's results, and its document where the whole is wanted. Raises `Gone`."""
    document = session_revisions.decode_document(opened.document)
    entries = await asyncio.to_thread(entries_of, services.store, document)
    etag = f'"{opened.revision}-{"session" if whole else "results"}"'
    headers = {"etag": etag, "content-disposition": _attachment(opened, whole=whole)}
    if is_known(if_none_match, etag):
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


async def session_table(services: Services, result: str, name: str, media_type: str) -> ASGIApp:
    """A kept result's table. Raises `UnknownTable`, `Gone`."""
    found = await asyncio.to_thread(kept, services.store, result)
    manifest = found.manifest
    if (ref := manifest.table(name)) is None:
        raise UnknownTable(
            f"the result {result} has no table {name!r}, but "
            + ", ".join(each.name for each in manifest.tables),
            tables=[each.name for each in manifest.tables],
        )
    return await kept_table_answer(
        services.store, found.table(ref), media_type, filename=f"{result[:12]}.{ref.name}.arrow"
    )
