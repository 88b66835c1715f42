"""Results as answers: summaries in JSON, tables in Arrow.

Bytes are served only once they are seen to be those that were written. A result found damaged or missing
answers no later scan: the next one computes it again.
"""

import asyncio
import hashlib
import io
from collections import OrderedDict
from collections.abc import Awaitable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import pyarrow as pa
from litestar.types import ASGIApp, Receive, Scope, Send

from api.dependencies import Services
from api.files import Extent, Payload, header, is_known
from neural_mri.backing import jobs, keys
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.records import Job
from neural_mri.backing.storage import Damaged, Missing, Store, load_manifest, read_table
from neural_mri.contract.jobs import JobKind, JobView
from neural_mri.contract.problems import Conflict, Gone, ResultNotReady, UnknownTable
from neural_mri.contract.results import ARROW_FILE, ARROW_STREAM, Manifest, TableRef
from neural_mri.contract.summaries import Summary, main_table, summarise, tables_needed

__all__ = (
    "IMMUTABLE",
    "FinishedJob",
    "is_whole",
    "kept_table_answer",
    "lost_results",
    "manifest_of",
    "summary_of",
    "table_answer",
)

IMMUTABLE = "private, max-age=31536000, immutable"
"""A job's table never changes: another attempt would be another job's result."""

VERIFIED_KEPT = 4096

T = TypeVar("T")


class FinishedJob(JobView, frozen=True, kw_only=True):
    """A job that has ended, and its result in short where it has one."""

    result: Summary | None = None


async def manifest_of(services: Services, job: Job) -> Manifest:
    """What a job's result consists of. Raises `ResultNotReady` before it has one, `Gone` after."""
    path = _manifest_path(job)
    return await _withdrawing(services, job, asyncio.to_thread(load_manifest, services.store, path))


def _manifest_path(job: Job) -> str:
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
    path = _manifest_path(job)
    model = await services.model(job.model)
    reading = asyncio.to_thread(_summary, services.store, path, model, job)
    return await _withdrawing(services, job, reading)


def _summary(store: Store, path: str, model: RegisteredModel, job: Job) -> Summary:
    manifest = load_manifest(store, path)
    if model.revision != manifest.revision:
        raise Conflict(
            f"{job.model} has been registered anew with other weights since: its old results are "
            "served as Arrow only",
            revision=manifest.revision,
        )
    refs = (manifest.table(name) for name in tables_needed(manifest))
    tables = {ref.name: read_table(store, ref) for ref in refs if ref is not None}
    return summarise(manifest, tables, model.architecture, job_url=job.view().links["self"])


async def finished(services: Services, job: Job) -> bytes:
    """A job that has ended, as JSON."""
    if job.manifest is None:
        return _finished(job, None)
    path, model = _manifest_path(job), await services.model_of(job)

    def read() -> bytes:
        # Encoded in the same thread: a summary may be megabytes.
        return _finished(job, _summary(services.store, path, model, job))

    return await _withdrawing(services, job, asyncio.to_thread(read))


def _finished(job: Job, result: Summary | None) -> bytes:
    fields = msgspec.structs.asdict(job.view())
    return msgspec.json.encode(FinishedJob(**fields, result=result))


async def is_whole(services: Services, job: Job) -> bool:
    """Whether every byte of a result is still in the store; by size, not by hash."""
    if job.manifest is None:
        return False
    return await asyncio.to_thread(_is_whole, services.store, job.manifest)


async def lost_results(services: Services, paths: Iterable[str]) -> list[str]:
    """Those of many results, given by their manifests, some of whose bytes are no longer in the store."""

    def lost() -> list[str]:
        return [path for path in paths if not _is_whole(services.store, path)]

    return await asyncio.to_thread(lost)


def _is_whole(store: Store, path: str) -> bool:
    try:
        refs = load_manifest(store, path).tables
        return all(store.size(keys.chunk_path(ref.chunk)) == ref.bytes for ref in refs)
    except Gone:
        return False


async def table_answer(services: Services, job: Job, name: str | None, media_type: str) -> ASGIApp:
    """Answer with a table of a result, the main one where no name is given.

    Raises `UnknownTable` naming what there is, and as `manifest_of` does.
    """
    manifest = await manifest_of(services, job)
    ref = main_table(manifest) if name is None else manifest.table(name)
    if ref is None:
        raise UnknownTable(
            f"the result of job {job.id} has no table {name!r}, but "
            + ", ".join(each.name for each in manifest.tables),
            tables=[each.name for each in manifest.tables],
        )
    if media_type == ARROW_STREAM:
        return _arrow_stream(await _withdrawing(services, job, _verified(services.store, ref)), ref)

    async def remote(part: Extent | None) -> bytes:
        return await _withdrawing(services, job, _fetched(services.store, ref, part))

    source = await _withdrawing(services, job, _verified_file(services.store, ref)) or remote
    return Payload(
        source,
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
    store: Store, ref: TableRef, media_type: str, *, filename: str
) -> ASGIApp:
    """Answer with a table that a session keeps. Raises `Missing`, `Damaged`."""
    if media_type == ARROW_STREAM:
        return _arrow_stream(await _verified(store, ref), ref)

    async def remote(part: Extent | None) -> bytes:
        return await _fetched(store, ref, part)

    return Payload(
        await _verified_file(store, ref) or remote,
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


_verified_files: OrderedDict[Path, _Seen] = OrderedDict()
"""Files whose bytes had the hash they are named for, as they were then."""


async def _verified(store: Store, ref: TableRef) -> Path | bytes:
    """Where a table's bytes are. Raises `Missing`, and `Damaged` when they are not those written."""
    return await _verified_file(store, ref) or await _fetched(store, ref, None)


async def _fetched(store: Store, ref: TableRef, part: Extent | None) -> bytes:
    """A table's bytes from a store on another machine. Raises `Missing` and `Damaged`.

    The whole is held against its hash. A part is one request for its bytes alone, so it cannot be; that
    they are those written is then the bucket's own care.
    """
    path = keys.chunk_path(ref.chunk)
    if part is None:
        body = await asyncio.to_thread(store.get, path)
        _check(hashlib.sha256(body).hexdigest(), ref)
        return body
    body = await asyncio.to_thread(store.get_range, path, part.start, part.end)
    if len(body) != part.end - part.start:
        raise Damaged(f"{path} ends before its byte {part.end}", path=path)
    return body


async def _verified_file(store: Store, ref: TableRef) -> Path | None:
    """The file that has a table's bytes; None where no file here does. Raises as `_verified` does."""
    path = store.local_path(keys.chunk_path(ref.chunk))
    if path is None:
        return None
    try:
        status = path.stat(follow_symlinks=False)
        seen = _Seen(status.st_ino, status.st_mtime_ns, status.st_size)
        if _verified_files.get(path) != seen:
            _check(await asyncio.to_thread(_sha256, path), ref)
            _verified_files[path] = seen
            if len(_verified_files) > VERIFIED_KEPT:
                _verified_files.popitem(last=False)
    except FileNotFoundError as error:
        raise Missing(f"the bytes of table {ref.name} are not in the store") from error
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        await services.sessions.write(jobs.withdraw_result, job.manifest)


def _arrow_stream(source: Path | bytes, ref: TableRef) -> ASGIApp:
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


def _encoded(source: Path | bytes) -> Iterator[bytes]:
    opened: Any = (
        pa.memory_map(str(source)) if isinstance(source, Path) else pa.BufferReader(source)
    )
    sink = io.BytesIO()
    with opened as file, pa.ipc.open_file(file) as reader:
        with pa.ipc.new_stream(sink, reader.schema) as writer:
            for index in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(index))
                yield _drained(sink)
        yield _drained(sink)


def _drained(sink: io.BytesIO) -> bytes:
    body = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return body
