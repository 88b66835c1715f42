"""Results of a batch: line by line as JSON, one table of all of them as Arrow, or everything in one file.

Whatever has ended is there; what has not is left out, and so is what is lost, which is said. Each is sent piece by piece: ten thousand results are
never held at once.
"""

import asyncio
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
from litestar.types import ASGIApp, Receive, Scope, Send

from api.dependencies import Services
from api.results import summary_of, whole_result
from neural_mri.backing import batches, jobs
from neural_mri.backing.batches import Batch
from neural_mri.backing.records import Job
from neural_mri.backing.storage import Store
from neural_mri.backing.stored import StoredResult, StoredTable, read_bytes, read_table
from neural_mri.contract.archives import (
    Entry,
    canonical,
    chunk_entry,
    plain_entry,
    result_digest,
    result_entry,
    write_archive,
)
from neural_mri.contract.batches import LEFT_OUT, NDJSON, BatchLine
from neural_mri.contract.jobs import TERMINAL, JobState
from neural_mri.contract.problems import Gone, Problem, UnknownTable, Unprocessable
from neural_mri.contract.results import ARROW_STREAM, provenance_of, stamp
from neural_mri.contract.summaries import Summary

__all__ = (
    "ZIP",
    "archive_answer",
    "in_thread",
    "lines_answer",
    "pieces_answer",
    "table_answer",
)

ZIP = "application/zip"
PAGE = 200
"""Lines looked up at once."""


class LineResult(BatchLine, frozen=True, kw_only=True):
    """What became of a line, and its result in short where it has one."""

    result: Summary | None = None


class _Found(NamedTuple):
    line: BatchLine
    job: Job | None


async def _ended(
    services: Services, batch: Batch, after: int, *, succeeded: bool = False
) -> AsyncIterator[_Found]:
    """Lines that have ended, or were refused, in order."""
    states = (JobState.SUCCEEDED,) if succeeded else TERMINAL

    def page(session: Any, after: int) -> list[_Found]:
        some = batches.lines(
            session, batch.id, after=after, limit=PAGE, only=states, refused=not succeeded
        )
        return [
            _Found(line, None if line.job is None else jobs.get(session, line.job)) for line in some
        ]

    while found := await services.sessions.read(page, after):
        for each in found:
            yield each
        after = found[-1].line.line


def lines_answer(services: Services, batch: Batch, after: int) -> ASGIApp:
    """Answer with each line's result in short."""

    async def pieces() -> AsyncGenerator[bytes]:
        async for found in _ended(services, batch, after):
            yield await _line(services, found)

    return pieces_answer(pieces, NDJSON)


async def _line(services: Services, found: _Found) -> bytes:
    fields = msgspec.structs.asdict(found.line)
    if found.job is not None and found.job.manifest is not None:
        try:
            fields["result"] = await summary_of(services, found.job)
        except Problem as problem:
            # One result that is gone must not end all the others.
            fields["problem"] = problem.document()
    return await asyncio.to_thread(msgspec.json.encode, LineResult(**fields)) + b"\n"


async def table_answer(services: Services, batch: Batch, name: str, after: int) -> ASGIApp:
    """Answer with one table of all results that have it.

    Results that are lost are left out, and the schema's metadata says so (`LEFT_OUT`). Raises `Gone` where all
    are, `UnknownTable` where none has the table, `Unprocessable` where two kinds of scan call different tables so.
    """
    wanted: list[tuple[int, StoredTable]] = []
    held = _Held(services)
    lost: list[dict[str, Any]] = []
    seen: dict[str, None] = {}
    kinds = set()
    async for found in _ended(services, batch, after, succeeded=True):
        if found.job is None:
            continue
        try:
            result = await whole_result(services, found.job, name)
        except Gone as gone:
            lost.append({"line": found.line.line, **gone.document()})
            continue
        seen |= dict.fromkeys(each.ref.name for each in result.tables)
        if (table := result.table(name)) is not None:
            wanted.append((found.line.line, table))
            held.add(found.job, [table])
            kinds.add(table.ref.table)
    if not wanted:
        raise _no_table(name, list(seen), [each["line"] for each in lost])
    if len(kinds) > 1:
        raise Unprocessable(
            f"tables called {name!r} are of different kinds, {', '.join(sorted(kinds))}: they do not "
            "stand under one another"
        )

    async def pieces() -> AsyncGenerator[bytes]:
        first = await asyncio.to_thread(_numbered, services.store, *wanted[0])
        if lost:
            said = {LEFT_OUT: msgspec.json.encode(lost)}
            first = first.replace_schema_metadata({**(first.schema.metadata or {}), **said})
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, first.schema) as writer:
            writer.write_table(first)
            for line, each in wanted[1:]:
                yield _drained(sink)
                table = await asyncio.to_thread(_numbered, services.store, line, each)
                writer.write_table(table.cast(first.schema))
        yield _drained(sink)

    return pieces_answer(held.withdrawing(pieces), ARROW_STREAM)


def _no_table(name: str, seen: list[str], lost: list[int]) -> Problem:
    """Why there is no table of that name."""
    if lost and not seen:
        return Gone(
            f"the results of all {len(lost)} scans that have succeeded are lost: send the batch again",
            lines=lost,
        )
    return UnknownTable(
        f"no result so far has a table {name!r}, but "
        + (", ".join(seen) or "there is none at all"),
        tables=seen,
    )


class _Held:
    """Whose results hold what an answer is made of.

    In a bucket, bytes are seen to be damaged only as they are sent. That answer breaks off; the next one leaves
    the result out, and says so.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._results: dict[str, set[tuple[str | None, str]]] = {}
        """Scan keys and results, by the path of what is sent."""

    def add(self, job: Job, tables: Iterable[StoredTable]) -> None:
        """A finished job's result, of which these are sent."""
        for table in tables:
            self._results.setdefault(table.path, set()).add((job.scan_key, job.manifest or ""))

    def withdrawing(
        self, pieces: Callable[[], AsyncGenerator[bytes]]
    ) -> Callable[[], AsyncGenerator[bytes]]:
        """The same pieces; what turns out to be gone is computed again by the next scan."""

        async def made() -> AsyncGenerator[bytes]:
            try:
                async with aclosing(pieces()) as given:
                    async for piece in given:
                        yield piece
            except Gone as gone:
                for result in self._results.get(gone.members.get("path", ""), ()):
                    await self._services.sessions.write(jobs.withdraw_result, *result)
                raise

        return made


def _drained(sink: io.BytesIO) -> bytes:
    body = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return body


def _numbered(store: Store, line: int, stored: StoredTable) -> pa.Table:
    """A table with its line's number before it; rows of every width fit under one another."""
    table = read_table(store, stored)
    # What is said of one scan alone does not hold of all.
    said = msgspec.structs.replace(provenance_of(table), scan_key="", positions=None, parameters={})
    table = stamp(table, said)
    for index, column in enumerate(table.schema):
        if pa.types.is_fixed_size_list(column.type):
            item = pa.field("item", column.type.value_type, nullable=False)
            plain = column.with_type(pa.list_(item))
            table = table.set_column(index, plain, table.column(index).cast(plain.type))
    numbers = pa.array([line] * table.num_rows, pa.int32())
    return table.add_column(0, pa.field("line", pa.int32(), nullable=False), numbers)


async def archive_answer(services: Services, batch: Batch) -> ASGIApp:
    """Answer with every manifest and table there is so far, and what became of each line.

    Of a line whose result is lost it is said that it is.
    """
    lines: list[dict[str, Any]] = []
    entries: list[Entry] = []
    held = _Held(services)
    async for found in _ended(services, batch, 0):
        said = msgspec.to_builtins(found.line)
        if found.job is not None and found.job.manifest is not None:
            try:
                result = await whole_result(services, found.job)
            except Gone as gone:
                said["problem"] = gone.document()
            else:
                said["result"] = result_digest(result.body)
                entries += _entries(services.store, result)
                held.add(found.job, result.tables)
        lines.append(said)
    entries.append(plain_entry("lines.json", canonical(lines)))
    headers = {"content-disposition": f'attachment; filename="batch-{batch.id}.zip"'}
    made = in_thread(write_archive(entries, name=batch.name))
    return pieces_answer(held.withdrawing(made), ZIP, headers)


def _entries(store: Store, result: StoredResult) -> Iterator[Entry]:
    """A result's manifest and tables, as an archive holds them."""
    yield result_entry(result.body)
    for table in result.tables:
        # Not the opened result's own way: of ten thousand none is kept open.
        read = partial(read_bytes, store, table)
        yield chunk_entry(table.ref.chunk, table.ref.bytes, read)


def in_thread(pieces: Iterator[bytes]) -> Callable[[], AsyncGenerator[bytes]]:
    """Pieces that are made where making them keeps nobody waiting."""

    async def made() -> AsyncGenerator[bytes]:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    return made


def pieces_answer(
    pieces: Callable[[], AsyncGenerator[bytes]],
    media_type: str,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> ASGIApp:
    """Answer piece by piece. What goes wrong after the first breaks the answer off."""
    fields = {"content-type": media_type, "vary": "accept", **headers}

    async def answer(scope: Scope, _receive: Receive, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
            }
        )
        if not scope.get("head_only"):
            async with aclosing(pieces()) as made:
                async for piece in made:
                    if piece:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return answer
