"""Links to sessions: made and revoked by their owners, followed by whoever has one.

A link's token comes in a header of its own, never in a path: paths are logged, here and on the way here.
"""

import asyncio
from typing import Annotated
from uuid import UUID

import msgspec
from litestar import Response, delete, get, post
from litestar.di import NamedDependency
from litestar.enums import RequestEncodingType
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import BodyKwarg, FromPath, HeaderParameter, PathParameter
from litestar.types import ASGIApp

from api.access import ANYBODY
from api.batch_results import in_thread, pieces_answer
from api.dependencies import Services
from api.files import Payload, is_known
from api.negotiation import Accept, preferred
from api.problems import refusals
from api.redaction import Redaction
from api.results import IMMUTABLE, TABLE, IfNoneMatch, IfRange, Range
from api.session_answers import (
    EVENTS,
    FILE,
    KNOWN,
    LastEventId,
    archive_of,
    detail_of,
    not_modified,
    own_session,
    session_table,
)
from api.session_contents import add_scan, opened_at
from api.session_streams import SessionFollowing
from api.streams import MEDIA_TYPE, event_stream
from neural_mri.backing import session_revisions, sessions, shares
from neural_mri.backing.audit import Deed
from neural_mri.contract.archives import SESSION_FILE, write_archive
from neural_mri.contract.auth import AuditAction, MissingScope
from neural_mri.contract.problems import Unavailable, UnknownTable
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM
from neural_mri.contract.sessions import (
    CreatedShare,
    NewScan,
    NewShare,
    ScanArrived,
    SessionDetail,
    SessionEvent,
    SessionFork,
    SessionSaved,
    ShareAccess,
    ShareView,
    UnknownRevision,
    UnknownShare,
)

__all__ = (
    "contribute_scan",
    "create_share",
    "export_shared",
    "follow_shared",
    "fork_shared",
    "get_shared",
    "get_shared_results",
    "get_shared_table",
    "list_shares",
    "revoke_share",
)

ShareToken = Annotated[
    str,
    HeaderParameter(
        name="Share-Token",
        pattern=r"^[A-Za-z0-9_-]{22}$",
        description="The link's token.",
    ),
]

_ALLOWS = {
    ShareAccess.READ: frozenset({ShareAccess.READ}),
    ShareAccess.FORK: frozenset({ShareAccess.READ, ShareAccess.FORK}),
    ShareAccess.CONTRIBUTE: frozenset(ShareAccess),
}


@post(
    "/api/sessions/{session_id:uuid}/shares",
    status_code=201,
    operation_id="createShare",
    summary="Make a link to a session",
    description=(
        "Whoever has it can open the session without a key; its token is in this answer and nowhere "
        "else. With `redact` prompts and tokens are taken out of everything that the link reaches, "
        "Arrow tables among it."
    ),
    tags=["sessions"],
    responses=refusals(404, 413, 415, 429),
)
async def create_share(
    session_id: FromPath[UUID],
    data: Annotated[
        NewShare,
        BodyKwarg(
            media_type=RequestEncodingType.JSON,
            examples=[
                Example(summary="For a colleague", value={"access": "fork", "label": "Ada"}),
                Example(summary="Without prompts", value={"redact": True}),
            ],
        ),
    ],
    services: NamedDependency[Services],
) -> CreatedShare:
    """Make a link."""
    await own_session(services, session_id)
    return await services.act(_shared, shares.create, services.pepper, session_id, data)


def _shared(share: CreatedShare) -> Deed:
    details = {"share": share.id, "access": share.access, "redacted": share.redacted}
    return Deed(AuditAction.SESSION_SHARED, str(share.session), details)


@get(
    "/api/sessions/{session_id:uuid}/shares",
    operation_id="listShares",
    summary="A session's links, newest first",
    tags=["sessions"],
    responses=refusals(404),
)
async def list_shares(
    session_id: FromPath[UUID], services: NamedDependency[Services]
) -> list[ShareView]:
    """List links."""
    await own_session(services, session_id)
    return await services.sessions.read(shares.of_session, session_id)


@delete(
    "/api/sessions/{session_id:uuid}/shares/{share_id:str}",
    status_code=200,
    operation_id="revokeShare",
    summary="End a link for good",
    tags=["sessions"],
    responses=refusals(404),
)
async def revoke_share(
    session_id: FromPath[UUID],
    share_id: Annotated[str, PathParameter(pattern=r"^[0-9a-f]{12}$", description="Its id.")],
    services: NamedDependency[Services],
) -> ShareView:
    """Revoke a link."""
    await own_session(services, session_id)
    ended = await services.act(_unshared, shares.revoke, session_id, share_id)
    if ended is None:
        raise UnknownShare(f"session {session_id} has no link {share_id}", share=share_id)
    return ended


def _unshared(share: ShareView | None) -> Deed | None:
    if share is None:
        return None
    return Deed(AuditAction.SESSION_UNSHARED, str(share.session), {"share": share.id})


async def _link(
    services: Services, token: str, wanted: ShareAccess = ShareAccess.READ
) -> ShareView:
    """The link that a token is of. Raises `UnknownShare`, `MissingScope`."""
    link = await services.sessions.read(shares.followed, services.pepper, token)
    if link is None:
        raise UnknownShare("the link is none, or it has expired or been revoked")
    if wanted not in _ALLOWS[link.access]:
        raise MissingScope(
            f"this link allows to {link.access.value}, and not to {wanted.value}",
            scope=wanted.value,
        )
    return link


async def _redaction(services: Services, link: ShareView) -> Redaction:
    """The session as a redacted link shows it. Raises `Gone`."""
    opened = await opened_at(services, link.session)
    document = session_revisions.decode_document(opened.document)
    return await asyncio.to_thread(Redaction, services.store, services.pepper, link.id, document)


async def _shown(services: Services, link: ShareView) -> SessionDetail:
    detail = await detail_of(services, link.session)
    links = {"self": "/api/shared", "results": "/api/shared/results"}
    links |= {"events": "/api/shared/events", "export": "/api/shared/export"}
    if not link.redacted:
        return msgspec.structs.replace(detail, links=links)
    redaction = await _redaction(services, link)
    document = redaction.document()
    revision = redaction.revision
    return msgspec.structs.replace(
        detail,
        name=redaction.name(detail.name),
        head=revision,
        opened=revision,
        document=document,
        arriving=tuple(
            msgspec.structs.replace(arrival, label="", problem=None) for arrival in detail.arriving
        ),
        forked_from=None,
        redacted=True,
        links=links,
    )


@get(
    "/api/shared",
    operation_id="getShared",
    summary="Open the session that a link leads to",
    description="Needs no key: the link is the key.",
    tags=["sessions"],
    opt=ANYBODY,
    responses=refusals(404, 410),
)
async def get_shared(
    services: NamedDependency[Services], token: ShareToken
) -> Response[SessionDetail]:
    """Open a shared session."""
    detail = await _shown(services, await _link(services, token))
    headers = {"etag": f'"{detail.opened}"', "cache-control": "private, no-cache"}
    return Response(detail, headers=headers)


@get(
    "/api/shared/results",
    operation_id="getSharedResults",
    summary="Every result of a shared session in one file",
    tags=["sessions"],
    opt=ANYBODY,
    responses={200: FILE, **KNOWN, **refusals(404, 410)},
)
async def get_shared_results(
    services: NamedDependency[Services], token: ShareToken, if_none_match: IfNoneMatch = None
) -> ASGIApp:
    """Read all results."""
    return await _archive(services, token, if_none_match, whole=False)


@get(
    "/api/shared/export",
    operation_id="exportShared",
    summary="A shared session as one file",
    tags=["sessions"],
    opt=ANYBODY,
    responses={200: FILE, **KNOWN, **refusals(404, 410)},
)
async def export_shared(
    services: NamedDependency[Services], token: ShareToken, if_none_match: IfNoneMatch = None
) -> ASGIApp:
    """Export a shared session."""
    return await _archive(services, token, if_none_match, whole=True)


async def _archive(
    services: Services, token: str, if_none_match: str | None, *, whole: bool
) -> ASGIApp:
    link = await _link(services, token)
    opened = await opened_at(services, link.session)
    if not link.redacted:
        return await archive_of(services, opened, if_none_match, whole=whole)
    redaction = await _redaction(services, link)
    etag = f'"{redaction.revision}-{"session" if whole else "results"}"'
    headers = {"etag": etag, "content-disposition": 'attachment; filename="session.nmri"'}
    if is_known(if_none_match, etag):
        return not_modified(headers)
    pieces = write_archive(
        redaction.entries(),
        name=redaction.name(opened.view.name) if whole else "",
        document=redaction.body if whole else None,
    )
    return pieces_answer(in_thread(pieces), SESSION_FILE, headers)


@get(
    "/api/shared/results/{result:str}/{table:str}",
    operation_id="getSharedTable",
    summary="One table of a shared session's result, in Arrow",
    tags=["sessions"],
    opt=ANYBODY,
    responses={**TABLE, **refusals(404, 406, 410)},
)
async def get_shared_table(
    result: Annotated[str, PathParameter(pattern=r"^[0-9a-f]{64}$", description="Its hash.")],
    table: FromPath[str],
    services: NamedDependency[Services],
    token: ShareToken,
    accept: Accept = None,
    if_none_match: IfNoneMatch = None,  # noqa: ARG001 (read where the bytes are sent)
    if_range: IfRange = None,  # noqa: ARG001
    byte_range: Range = None,  # noqa: ARG001
) -> ASGIApp:
    """Read a table."""
    link = await _link(services, token)
    if not link.redacted:
        media_type = preferred(accept, (ARROW_FILE, ARROW_STREAM))
        opened = await opened_at(services, link.session)
        shown = {scan.result for scan in session_revisions.decode_document(opened.document).scans}
        if result not in shown:
            raise UnknownRevision(f"the session holds no result {result}", result=result)
        return await session_table(services, result, table, media_type)
    preferred(accept, (ARROW_FILE,))
    redaction = await _redaction(services, link)
    found = next((each for each in redaction.results if each.digest == result), None)
    if found is None:
        raise UnknownRevision(f"the session holds no result {result}", result=result)
    ref = found.manifest.table(table)
    if ref is None:
        names = [each.name for each in found.manifest.tables]
        raise UnknownTable(
            f"the result has no table {table!r}, but " + ", ".join(names), tables=names
        )
    body = await asyncio.to_thread(redaction.table, found, ref)
    return Payload(
        body,
        size=len(body),
        etag=ref.chunk,
        media_type=ARROW_FILE,
        cache_control=IMMUTABLE,
    )


@get(
    "/api/shared/events",
    operation_id="followShared",
    summary="A shared session's events",
    description=EVENTS + " The stream ends early when the link does.",
    tags=["sessions"],
    opt=ANYBODY,
    responses={
        200: ResponseSpec(
            str, description="Events", media_type=MEDIA_TYPE, generate_examples=False
        ),
        **refusals(404),
    },
)
async def follow_shared(
    services: NamedDependency[Services], token: ShareToken, last_event_id: LastEventId = None
) -> ASGIApp:
    """Follow a shared session."""
    link = await _link(services, token)

    async def is_good() -> bool:
        try:
            found = await services.sessions.read(shares.followed, services.pepper, token)
        except Unavailable:
            return True  # nobody is shut out because nobody could look
        return found is not None

    shown = _without_texts if link.redacted else _whole
    following = SessionFollowing(services, link.session, last_event_id, shown)
    return event_stream(following.chunks, is_good, look_seconds=services.settings.heartbeat_seconds)


def _whole(event: SessionEvent) -> SessionEvent:
    return event


def _without_texts(event: SessionEvent) -> SessionEvent:
    """That something has changed, and nothing that names a result or quotes anybody."""
    match event:
        case SessionSaved():
            return msgspec.structs.replace(event, revision="", name="", added=())
        case ScanArrived():
            return msgspec.structs.replace(event, label="", problem=None)
        case _:
            return event


@post(
    "/api/shared/fork",
    status_code=201,
    operation_id="forkShared",
    summary="Make a session of your own of a shared one",
    description="Needs a key of yours beside the link, and a link that allows it.",
    tags=["sessions"],
    responses=refusals(404, 413, 415, 429),
)
async def fork_shared(
    data: Annotated[
        SessionFork,
        BodyKwarg(media_type=RequestEncodingType.JSON),
    ],
    services: NamedDependency[Services],
    token: ShareToken,
) -> Response[SessionDetail]:
    """Fork a shared session."""
    link = await _link(services, token, ShareAccess.FORK)
    author = services.caller.user
    source = await opened_at(services, link.session)
    if data.revision not in (None, source.revision):
        raise UnknownRevision(
            f"the link leads to revision {source.revision} alone", revision=data.revision
        )
    view = await services.sessions.write(
        sessions.fork, source, owner=author, name=data.name, author=author
    )
    detail = await detail_of(services, view.id)
    headers = {"etag": f'"{detail.opened}"', "location": detail.links["self"]}
    return Response(detail, status_code=201, headers=headers)


@post(
    "/api/shared/scans",
    status_code=200,
    operation_id="contributeScan",
    summary="Add a scan of yours to a shared session",
    description=(
        "Needs a key of yours beside the link, and a link that allows it. 202: the job has not ended; "
        "the scan is added when it has succeeded."
    ),
    tags=["sessions"],
    responses={
        202: ResponseSpec(SessionDetail, description="On its way", generate_examples=False),
        **refusals(404, 409, 410, 413, 415, 429),
    },
)
async def contribute_scan(
    data: Annotated[NewScan, BodyKwarg(media_type=RequestEncodingType.JSON)],
    services: NamedDependency[Services],
    token: ShareToken,
) -> Response[SessionDetail]:
    """Contribute a scan."""
    link = await _link(services, token, ShareAccess.CONTRIBUTE)
    job = await services.job(data.job)
    saved = await add_scan(services, link.session, job, data.label)
    detail = await _shown(services, link)
    return Response(detail, status_code=202 if saved is None else 200)
