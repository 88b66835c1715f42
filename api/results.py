"""Results as answers: summaries in JSON, tables in Arrow.

Bytes are served only once they are seen to be those that were written. A result found damaged or missing
answers no later scan: the next one computes it again.
"""

import asyncio
import hashlib
import io
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import pyarrow as pa
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter
from litestar.types import ASGIApp, Receive, Scope, Send

from api.dependencies import Services
from api.files import Extent, FilePart, Payload, header, is_known
from neural_mri.backing import jobs, stored
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.records import Job
from neural_mri.backing.storage import Damaged, Missing, Store
from neural_mri.backing.stored import StoredResult, StoredTable, open_result
from neural_mri.contract.jobs import JobKind, JobView
from neural_mri.contract.problems import Conflict, Gone, ResultNotReady, UnknownTable
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM, Manifest, TableRef
from neural_mri.contract.summaries import Summary, main_table, summarise, tables_needed

__all__ = (
    "IMMUTABLE",
    "TABLE",
    "FinishedJob",
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
HASHED_BYTES = 256 * 1024
"""Read at once to be hashed."""

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
                _check(_sha256(FilePart(path, each.start, each.end)), each.ref)
            elif not result.is_whole():
                raise Missing(f"some bytes of job {job.id}'s result are missing")
            elif not job.reusable:
                result.bytes_of(each)
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
    ref, fetch = table.ref, partial(result.part, table)

    async def remote(part: Extent | None) -> bytes:
        return await _withdrawing(services, job, _fetched(fetch, table, part))

    here = await _withdrawing(services, job, _verified_file(services.store, table))
    if media_type == ARROW_STREAM:
        return _arrow_stream(here or await remote(None), ref)
    return Payload(
        here or remote,
        size=ref.bytes,
        etag=ref.chunk,
        media_type=ARROW_FILE,
        cache_control=IMMUTABLE,
        headers={
            "vary": "accept",
            "content-disposition": f'inline; filename="{job.id}.{ref.name}.arrow"',
        },
    )


async def kept_table_answer(
    store: Store, table: StoredTable, media_type: str, *, filename: str
) -> ASGIApp:
    """Answer with a table that a session keeps. Raises `Missing`, `Damaged`."""
    ref = table.ref
    fetch = partial(stored.read_part, store, table)

    async def remote(part: Extent | None) -> bytes:
        return await _fetched(fetch, table, part)

    here = await _verified_file(store, table)
    if media_type == ARROW_STREAM:
        return _arrow_stream(here or await remote(None), ref)
    return Payload(
        here or remote,
        size=ref.bytes,
        etag=ref.chunk,
        media_type=ARROW_FILE,
        cache_control=IMMUTABLE,
        headers={"vary": "accept", "content-disposition": f'inline; filename="{filename}"'},
    )


class _Seen(NamedTuple):
    """What changes when a file is written."""

    inode: int
    modified_ns: int
    size: int


_verified_parts: OrderedDict[FilePart, _Seen] = OrderedDict()
"""Parts of files whose bytes had the hash they are named for, as the files were then."""


async def _fetched(
    fetch: Callable[[int, int], bytes], table: StoredTable, part: Extent | None
) -> bytes:
    """A table's bytes from a store on another machine. Raises `Missing` and `Damaged`.

    The whole is held against its hash. A part is one request for its bytes alone, so it cannot be; that
    they are those written is then the bucket's own care.
    """
    ref = table.ref
    if part is None:
        body = await asyncio.to_thread(fetch, 0, ref.bytes)
        _check(hashlib.sha256(body).hexdigest(), ref)
        return body
    body = await asyncio.to_thread(fetch, part.start, part.end)
    if len(body) != part.end - part.start:
        raise Damaged(
            f"{table.path} ends before its byte {table.start + part.end}", path=table.path
        )
    return body


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
            _check(await asyncio.to_thread(_sha256, part), ref)
            _verified_parts[part] = seen
            if len(_verified_parts) > VERIFIED_KEPT:
                _verified_parts.popitem(last=False)
    except FileNotFoundError as error:
        raise Missing(f"the bytes of table {ref.name} are not in the store") from error
    return part


def _sha256(part: FilePart) -> str:
    hashed, left = hashlib.sha256(), part.end - part.start
    with part.file.open("rb") as file:
        file.seek(part.start)
        while left > 0 and (piece := file.read(min(left, HASHED_BYTES))):
            hashed.update(piece)
            left -= len(piece)
    return hashed.hexdigest()


def _check(found: str, ref: TableRef) -> None:
    if found != ref.chunk:
        raise Damaged(
            f"the bytes of table {ref.name} have the hash {found}, not the {ref.chunk} they were "
            "stored under"
        )


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


def _arrow_stream(source: FilePart | bytes, ref: TableRef) -> ASGIApp:
    """A stored table in the streaming format, batch by batch."""
    etag = f'"{ref.chunk}-stream"'

    async def answer(scope: Scope, _receive: Receive, send: Send) -> None:
        known = is_known(header(scope, b"if-none-match"), etag)
        await send(
            {
                "type": "http.response.start",
                "status": 304 if known else 200,
                "headers": [
                    (b"content-type", ARROW_STREAM.encode()),
                    (b"etag", etag.encode()),
                    (b"cache-control", IMMUTABLE.encode()),
                    (b"vary", b"accept"),
                ],
            }
        )
        if not known and not scope.get("head_only"):
            parts = _encoded(source)
            while (part := await asyncio.to_thread(next, parts, None)) is not None:
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return answer


def _encoded(source: FilePart | bytes) -> Iterator[bytes]:
    sink = io.BytesIO()
    with pa.ipc.open_file(_buffer(source)) as reader:
        with pa.ipc.new_stream(sink, reader.schema) as writer:
            for index in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(index))
                yield _drained(sink)
        yield _drained(sink)


def _buffer(source: FilePart | bytes) -> pa.Buffer:
    """A table's bytes, of a file those alone that are looked at."""
    if not isinstance(source, FilePart):
        return pa.py_buffer(source)
    with pa.memory_map(str(source.file)) as mapped:
        mapped.seek(source.start)
        return mapped.read_buffer(source.end - source.start)


def _drained(sink: io.BytesIO) -> bytes:
    body = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return body
