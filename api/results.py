"""Results as answers: summaries in JSON, tables in Arrow.

Bytes are served only once they are seen to be those that were written. A result found damaged or missing
answers no later scan: the next one computes it again.
"""

import asyncio
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter
from litestar.types import ASGIApp

from api.dependencies import Services
from api.distant import DistantTable, Fetch, Guarded, checked, hash_of
from api.files import Extent, FilePart, Payload
from neural_mri.backing import jobs, stored
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.records import Job
from neural_mri.backing.storage import Damaged, Missing, Store
from neural_mri.backing.stored import StoredResult, StoredTable, open_result
from neural_mri.contract.jobs import JobKind, JobView
from neural_mri.contract.problems import Conflict, Gone, ResultNotReady, UnknownTable
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM, Manifest
from neural_mri.contract.summaries import Summary, main_table, summarise, tables_needed

__all__ = (
    "IMMUTABLE",
    "TABLE",
    "FinishedJob",
    "IfNoneMatch",
    "IfRange",
    "Range",
    "is_whole",
    "kept_table_answer",
    "lost_results",
    "manifest_of",
    "opened",
    "reading",
    "summary_of",
    "table_answer",
    "whole_result",
)

IMMUTABLE = "private, max-age=31536000, immutable"
"""A job's table never changes: another attempt would be another job's result."""

IfNoneMatch = Annotated[
    str | None,
    HeaderParameter(
        name="If-None-Match", description="The ETag of what you have already.", required=False
    ),
]
IfRange = Annotated[
    str | None,
    HeaderParameter(
        name="If-Range",
        description="The ETag of the file that a Range is of: of another all is given.",
        required=False,
    ),
]
Range = Annotated[
    str | None,
    HeaderParameter(
        name="Range", description="`bytes=FIRST-LAST`: a part of an Arrow file.", required=False
    ),
]
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
"""How routes that give a table answer."""

VERIFIED_KEPT = 4096
_HEAD_BYTES = 8
"""The mark that an Arrow file begins with, and what aligns the rest."""
_TAIL = struct.Struct("<i6s")
"""How an Arrow file ends: how long the footer before it is, and the mark again."""

T = TypeVar("T")


class FinishedJob(JobView, frozen=True, kw_only=True):
    """A job that has ended, and its result in short where it has one."""

    result: Summary | None = None


async def manifest_of(services: Services, job: Job) -> Manifest:
    """What a job's result consists of. Raises `ResultNotReady` before it has one, `Gone` after."""
    return (await opened(services, job)).manifest


async def opened(services: Services, job: Job) -> StoredResult:
    """A job's result, its manifest read. Raises as `manifest_of` does."""
    return await reading(services, job, lambda result: result)


async def reading(
    services: Services, job: Job, work: Callable[[StoredResult], T], *, whole: bool = False
) -> T:
    """What a thread makes of a job's result; with `whole`, all of it is wanted. Raises as `manifest_of` does."""
    path = _path(job)

    def read() -> T:
        return work(open_result(services.store, path, whole=whole))

    return await _withdrawing(services, job, asyncio.to_thread(read))


def _path(job: Job) -> str:
    """Raises `ResultNotReady`."""
    if job.kind is not JobKind.SCAN:
        raise ResultNotReady(f"a {job.kind} job has no result", job=str(job.id))
    if job.manifest is None:
        raise ResultNotReady(
            f"job {job.id} is {job.state}: a result is there once it has succeeded",
            job=str(job.id),
            state=job.state.value,
        )
    return job.manifest


async def summary_of(services: Services, job: Job) -> Summary:
    """A result in short. Raises as `manifest_of` does."""
    _path(job)
    model = await services.model(job.model)
    return await reading(services, job, partial(_summary, model, job), whole=True)


def _summary(model: RegisteredModel, job: Job, result: StoredResult) -> Summary:
    manifest = result.manifest
    if model.revision != manifest.revision:
        raise Conflict(
            f"{job.model} has been registered anew with other weights since: its old results are "
            "served as Arrow only",
            revision=manifest.revision,
        )
    found = map(result.table, tables_needed(manifest))
    tables = {each.ref.name: result.read(each) for each in found if each is not None}
    return summarise(manifest, tables, model.architecture, job_url=job.view().links["self"])


async def finished(services: Services, job: Job) -> bytes:
    """A job that has ended, as JSON."""
    if job.manifest is None:
        return _finished(job, None)
    _path(job)
    model = await services.model_of(job)

    def encoded(result: StoredResult) -> bytes:
        # Encoded in the same thread: a summary may be megabytes.
        return _finished(job, _summary(model, job, result))

    return await reading(services, job, encoded, whole=True)


def _finished(job: Job, result: Summary | None) -> bytes:
    fields = msgspec.structs.asdict(job.view())
    return msgspec.json.encode(FinishedJob(**fields, result=result))


async def is_whole(services: Services, job: Job) -> bool:
    """Whether every byte of a result is still in the store; by size, not by hash."""
    if job.manifest is None:
        return False
    return await asyncio.to_thread(stored.is_whole, services.store, job.manifest)


async def whole_result(services: Services, job: Job, table: str | None = None) -> StoredResult:
    """A job's result, all of it or that table seen to be there: on this machine by its hash, else by its size.

    What was found wanting before is read whole, wherever it is. Raises as `manifest_of` does.
    """

    def seen(result: StoredResult) -> StoredResult:
        for each in result.tables:
            if table not in (None, each.ref.name):
                continue
            path = services.store.local_path(each.path)
            if path is not None:
                checked(_sha256(FilePart(path, each.start, each.end)), each)
            elif not result.is_whole():
                raise Missing(f"some bytes of job {job.id}'s result are missing")
            elif not job.reusable:
                checked(hash_of(partial(result.part, each), each.ref.bytes), each)
        return result

    return await reading(services, job, seen)


async def lost_results(services: Services, paths: Iterable[str]) -> list[str]:
    """Those of many results, given by their paths, some of whose bytes are no longer in the store."""

    def lost() -> list[str]:
        return [path for path in paths if not stored.is_whole(services.store, path)]

    return await asyncio.to_thread(lost)


async def table_answer(services: Services, job: Job, name: str | None, media_type: str) -> ASGIApp:
    """Answer with a table of a result, the main one where no name is given.

    Raises `UnknownTable` naming what there is, and as `manifest_of` does.
    """
    result = await opened(services, job)
    manifest = result.manifest
    table = result.table(main_table(manifest).name if name is None else name)
    if table is None:
        raise UnknownTable(
            f"the result of job {job.id} has no table {name!r}, but "
            + ", ".join(each.name for each in manifest.tables),
            tables=[each.name for each in manifest.tables],
        )
    here = await _withdrawing(services, job, _verified_file(services.store, table))
    guarded = partial(_withdrawing, services, job)
    fetch = partial(result.part, table)
    inline = f'inline; filename="{job.id}.{table.ref.name}.arrow"'
    if media_type == ARROW_STREAM:
        return await guarded(_arrow_stream(table, here, fetch, guarded))
    return _answer(table, here or DistantTable(table, fetch, _whole(table), guarded), inline)


async def kept_table_answer(
    store: Store, table: StoredTable, media_type: str, *, filename: str
) -> ASGIApp:
    """Answer with a table that a session keeps. Raises `Missing`, `Damaged`."""
    here = await _verified_file(store, table)
    fetch = partial(stored.read_part, store, table)
    if media_type == ARROW_STREAM:
        return await _arrow_stream(table, here, fetch, _unguarded)
    source = here or DistantTable(table, fetch, _whole(table), _unguarded)
    return _answer(table, source, f'inline; filename="{filename}"')


def _answer(table: StoredTable, source: FilePart | DistantTable, disposition: str) -> Payload:
    return Payload(
        source,
        size=table.ref.bytes,
        etag=table.ref.chunk,
        media_type=ARROW_FILE,
        cache_control=IMMUTABLE,
        headers={"vary": "accept", "content-disposition": disposition},
    )


def _whole(table: StoredTable) -> Extent:
    return Extent(0, table.ref.bytes)


async def _unguarded(reading: Awaitable[T]) -> T:
    return await reading


class _Seen(NamedTuple):
    """What changes when a file is written."""

    inode: int
    modified_ns: int
    size: int


_verified_parts: OrderedDict[FilePart, _Seen] = OrderedDict()
"""Parts of files whose bytes had the hash they are named for, as the files were then."""


async def _verified_file(store: Store, table: StoredTable) -> FilePart | None:
    """The file that has a table's bytes, and where; None where no file here does.

    Raises `Missing`, and `Damaged` where they are not those written.
    """
    path, ref = store.local_path(table.path), table.ref
    if path is None:
        return None
    part = FilePart(path, table.start, table.end)
    try:
        status = path.stat(follow_symlinks=False)
        seen = _Seen(status.st_ino, status.st_mtime_ns, status.st_size)
        if _verified_parts.get(part) != seen:
            checked(await asyncio.to_thread(_sha256, part), table)
            _verified_parts[part] = seen
            if len(_verified_parts) > VERIFIED_KEPT:
                _verified_parts.popitem(last=False)
    except FileNotFoundError as error:
        raise Missing(f"the bytes of table {ref.name} are not in the store") from error
    return part


def _sha256(part: FilePart) -> str:
    with part.file.open("rb") as file:

        def read(start: int, end: int) -> bytes:
            file.seek(part.start + start)
            return file.read(end - start)

        return hash_of(read, part.end - part.start)


async def _withdrawing(services: Services, job: Job, reading: Awaitable[T]) -> T:
    """What was read of a result; where that is gone, the next scan computes it again."""
    try:
        return await reading
    except Gone as gone:
        await _withdraw(services, job, gone)
        raise


async def _withdraw(services: Services, job: Job, gone: Gone) -> None:
    """See to it that the next scan computes again what is gone."""
    gone.members = {**gone.members, "job": str(job.id)}
    if job.manifest is not None:
        await services.sessions.write(jobs.withdraw_result, job.scan_key, job.manifest)


async def _arrow_stream(
    table: StoredTable, here: FilePart | None, fetch: Fetch, guarded: Guarded
) -> ASGIApp:
    """A stored table in the streaming format: an Arrow file is that, between a mark and a footer."""
    size = table.ref.bytes
    tail = await asyncio.to_thread(fetch, max(0, size - _TAIL.size), size)
    length, mark = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (0, b"")
    served = Extent(_HEAD_BYTES, size - _TAIL.size - length)
    if mark != b"ARROW1" or not served.start <= served.end <= size:
        raise Damaged(f"{table.path} holds no Arrow file at {table.start}", path=table.path)
    return Payload(
        DistantTable(table, fetch, served, guarded)
        if here is None
        else FilePart(here.file, here.start + served.start, here.start + served.end),
        size=served.end - served.start,
        etag=f"{table.ref.chunk}-stream",
        media_type=ARROW_STREAM,
        cache_control=IMMUTABLE,
        headers={"vary": "accept"},
    )
