"""What sessions hold: all of it in one file, a table alone, taken in from a file, compared."""

import asyncio
from typing import Annotated, Any
from uuid import UUID

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, PathParameter, QueryParameter
from litestar.types import ASGIApp

from api.bodies import BODIES, Form, bounded
from api.dependencies import Services
from api.differences import Revision, difference
from api.negotiation import Accept, preferred
from api.problems import refusals
from api.results import TABLE, IfNoneMatch, IfRange, Range
from api.session_answers import (
    FILE,
    KNOWN,
    AtRevision,
    answered,
    archive_of,
    own_session,
    session_table,
)
from api.session_contents import opened_at
from api.session_files import take_in
from neural_mri.backing import session_revisions, sessions
from neural_mri.contract.archives import SESSION_FILE
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM
from neural_mri.contract.sessions import SessionDetail, SessionDifference, UnknownRevision

__all__ = (
    "compare_sessions",
    "export_session",
    "get_session_results",
    "get_session_table",
    "import_session",
)


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
    if_none_match: IfNoneMatch = None,  # noqa: ARG001 (read where the bytes are sent)
    if_range: IfRange = None,  # noqa: ARG001
    byte_range: Range = None,  # noqa: ARG001
) -> ASGIApp:
    """Read a table."""
    media_type = preferred(accept, (ARROW_FILE, ARROW_STREAM))
    await own_session(services, session_id)
    if not await services.sessions.read(sessions.holds, session_id, result):
        raise UnknownRevision(
            f"no revision of session {session_id} holds the result {result}", result=result
        )
    return await session_table(services, result, table, media_type)


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
    return await answered(services, view.id, status=201)


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
        document = session_revisions.decode_document(opened.document)
        sides.append(Revision(opened.revision, document))
    return await asyncio.to_thread(difference, services.store, *sides, strongest=strongest)
