"""Sessions as files: what a reader opens, what is exported, and what is taken in."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import IO

import msgspec

from api.dependencies import Services
from api.session_contents import Kept, kept, put_result
from neural_mri.backing import kept_results, keys, session_revisions, sessions
from neural_mri.backing.sessions import Made
from neural_mri.backing.storage import Missing, NamedBytes, Store
from neural_mri.contract.archives import (
    Archive,
    Entry,
    InvalidArchive,
    chunk_entry,
    open_archive,
    result_entry,
)
from neural_mri.contract.sessions import (
    MOST_SCANS,
    Origin,
    SessionDocument,
    SessionView,
    check_depth,
    check_views,
)

__all__ = ("entries_of", "take_in")

SPOOLED_BYTES = 8 << 20
"""A file up to so large is held in memory."""


def entries_of(store: Store, document: SessionDocument) -> list[Entry]:
    """What an archive of a session's results holds. Raises `Gone` where some of it is missing.

    Looks for every byte first: an answer that has begun can only be broken off.
    """
    entries = []
    for scan in document.scans:
        found = kept(store, scan.result)
        entries.append(result_entry(found.body))
        entries += _chunks(store, found)
    return entries


def _chunks(store: Store, found: Kept) -> Iterator[Entry]:
    for ref in found.manifest.tables:
        path = found.table(ref).path
        if store.size(path) != ref.bytes:
            raise Missing(f"the store has not all bytes of table {ref.name}", path=path)
        yield chunk_entry(ref.chunk, ref.bytes, partial(store.get, path))


async def take_in(services: Services, chunks: AsyncIterator[bytes]) -> SessionView:
    """The session that a file holds, as the caller's own.

    Raises `InvalidArchive` and `NestedTooDeeply`, naming what is wrong.
    """
    with tempfile.SpooledTemporaryFile(SPOOLED_BYTES) as file:
        async for chunk in chunks:
            await asyncio.to_thread(file.write, chunk)
        archive, body = await asyncio.to_thread(_opened, services, file)
        await services.sessions.write(kept_results.expect, archive.results)
        made = await asyncio.to_thread(_taken_in, services, archive, body)
    return await services.sessions.write(sessions.create, made)


def _opened(services: Services, file: IO[bytes]) -> tuple[Archive, bytes]:
    """A file, and the document in it, once it is seen that they go together."""
    file.seek(0)
    largest = services.settings.max_session_bytes
    archive = open_archive(file, largest=largest)
    body = archive.document()
    _check(archive, body)
    # Each result keeps tables of its own: a file in which many name one would grow.
    size = sum(
        sum({ref.chunk: ref.bytes for ref in manifest.tables}.values())
        for manifest in archive.results.values()
    )
    if size > largest:
        raise InvalidArchive(
            f"the results of this file would take {size} bytes, a session's take {largest} at most",
            entry="results",
        )
    return archive, body


def _taken_in(services: Services, archive: Archive, body: bytes) -> Made:
    """Keep a file's results, once each byte is seen to be what it is named for."""
    for digest in archive.results:
        put_result(services.store, digest, archive.result(digest), _tables(archive, digest))
    return Made(
        owner=services.caller.user,
        name=archive.name.replace("\0", "")[:200] or "Imported",
        document=body,
        author=services.caller.user,
        message="Imported",
        origin=Origin.IMPORTED,
    )


def _tables(archive: Archive, digest: str) -> Iterator[NamedBytes]:
    """A result's tables, each read when its turn comes."""
    manifest = keys.kept_result_path(digest)
    for ref in archive.results[digest].tables:
        yield NamedBytes(keys.table_path(manifest, ref.chunk), archive.chunk(ref.chunk))


def _check(archive: Archive, body: bytes) -> None:
    """The document is one, and the file has the results that it names, and no others."""
    try:
        document = session_revisions.decode_document(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidArchive(
            f"session.json cannot be read: {error}", entry="session.json"
        ) from error
    if document.version > SessionDocument().version:
        raise InvalidArchive(
            f"session.json is of version {document.version}: upgrade neural_mri",
            entry="session.json",
        )
    if len(document.scans) > MOST_SCANS:
        raise InvalidArchive(
            f"session.json has {len(document.scans)} scans, a session has {MOST_SCANS} at most",
            entry="session.json",
        )
    check_views(document)
    for scan in document.scans:
        check_depth(f"the request of {scan.result} in session.json", scan.request)
    for digest, manifest in archive.results.items():
        check_depth(f"the request in results/{digest}.json", manifest.request)
    named = [scan.result for scan in document.scans]
    _refuse_unlike("results/{}.json", sorted(set(named) - archive.results.keys()), "missing")
    _refuse_unlike(
        "results/{}.json", sorted(archive.results.keys() - set(named)), "no scan's of session.json"
    )
    for scan in document.scans:
        manifest = archive.results[scan.result]
        if (scan.kind, scan.revision, scan.scan_key) != (
            manifest.kind,
            manifest.revision,
            manifest.scan_key,
        ):
            raise InvalidArchive(
                f"session.json says another thing of result {scan.result} than the result itself",
                entry="session.json",
            )


def _refuse_unlike(pattern: str, digests: Sequence[str], what: str) -> None:
    for digest in digests:
        entry = pattern.format(digest)
        raise InvalidArchive(f"{entry} is {what}", entry=entry)
