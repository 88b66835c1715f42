"""Batches from Python: ten thousand scans in one request, followed on one stream.

batch = mri.batches.submit(ActivationScan(prompt=prompt) for prompt in prompts)
for line in mri.batches.watch(batch): ...
mri.batches.table(batch, "predictions").to_pandas()
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias
from uuid import UUID

import msgspec
import pyarrow as pa

from neural_mri.client.errors import Damaged, NotUnderstood, Refused, Unreachable
from neural_mri.client.exchange import (
    PARTING_SECONDS,
    QUIET_SECONDS,
    Exchange,
    FileBody,
    once,
    pieces,
    require,
)
from neural_mri.client.parting import begun
from neural_mri.client.progress import ShowProgress, both, shown
from neural_mri.client.replacing import replacing
from neural_mri.client.result import Result
from neural_mri.client.watching import messages
from neural_mri.contract.batches import (
    NDJSON,
    BatchEnded,
    BatchEvent,
    BatchLine,
    BatchState,
    BatchView,
    LineEnded,
    OnInvalid,
    decode_batch_event,
)
from neural_mri.contract.jobs import TERMINAL, JobState, Lane
from neural_mri.contract.results import ARROW_STREAM, Manifest
from neural_mri.contract.scans import Scan, encode_scan

__all__ = ("BatchReference", "Batches", "Outcome")

BatchReference: TypeAlias = BatchView | UUID | str
OnBatchEvent = Callable[[BatchEvent], None]

_ZIP = "application/zip"
_GONE = (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
_NAMES = frozenset({"progress", "line", "ended"})
_PAGE = 1000
_SPOOLED = 16 << 20
"""Bytes of a batch that are kept in memory while it is sent; more go to a file."""


class Outcome(NamedTuple):
    """What became of a line of a batch."""

    line: BatchLine
    result: Result | None
    """None where there is none: `line.problem` says why, as that the scan failed, that the line was refused, that the
    result is lost, or that its job has been deleted."""


class Batches:
    """The batches of one service. Raises as `Client` does."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def submit(
        self,
        scans: Iterable[Scan] | Path,
        *,
        lane: Lane | str = Lane.BATCH,
        on_invalid: OnInvalid | str = OnInvalid.REFUSE,
        max_failures: int | None = None,
        name: str = "",
        idempotency_key: str | None = None,
    ) -> BatchView:
        """Ask for many scans; they are sent as they come.

        Args:
            scans: The requests; or an NDJSON file of them, a line each with its `scan_mode`.
            lane: How soon they should run.
            on_invalid: `refuse` raises `Refused`, whose `members["invalid"]` name each line that cannot
                be done; `skip` leaves such lines out.
            max_failures: So many failed scans cancel those that are left.
            name: What it is for.
            idempotency_key: Your own word for this batch: sent again within a day it makes no second one.
                Without one the client makes one up, so that it may send the batch again itself.
        """
        query = {"lane": Lane(lane).value, "on_invalid": OnInvalid(on_invalid).value, "name": name}
        if max_failures is not None:
            query["max_failures"] = str(max_failures)
        with ExitStack() as opened:
            try:
                return self._exchange.ask(
                    BatchView,
                    "POST",
                    "/api/batches",
                    body=FileBody(scans)
                    if isinstance(scans, Path)
                    else opened.enter_context(_Lines(scans)),
                    query=query,
                    headers={"Content-Type": NDJSON, **once(idempotency_key)},
                )
            except _ScansEnded as ended:
                raise ended.error from None

    def run(
        self,
        scans: Iterable[Scan] | Path,
        on_event: OnBatchEvent | None = None,
        *,
        progress: ShowProgress = False,
        **options: Any,
    ) -> list[Outcome]:
        """Submit a batch, wait, and give what became of each line. Interrupted, it cancels the batch.

        `progress` shows meanwhile how far it is; the other options are those of `submit`.
        """
        with begun() as work:
            batch = self.submit(scans, **options)
            work.until(lambda: self.cancel(batch, most_seconds=PARTING_SECONDS))
            self.wait(batch, on_event, progress=progress)
        return list(self.outcomes(batch))

    def list(self, limit: int = 20, *, after: BatchReference | None = None) -> list[BatchView]:
        """The latest batches, newest first; only those older than `after`, the last of the page before."""
        query = {"limit": str(limit)}
        if after is not None:
            query["after"] = str(after.id if isinstance(after, BatchView) else after)
        return self._exchange.ask(list[BatchView], "GET", "/api/batches", query=query)

    def get(self, batch: BatchReference) -> BatchView:
        """How far a batch has come."""
        return self._exchange.ask(BatchView, "GET", _path(batch))

    def cancel(self, batch: BatchReference, *, most_seconds: float = math.inf) -> BatchView:
        """Stop a batch: what waits at once, what runs at its next checkpoint.

        For no longer than `most_seconds`, where that is less than the client's patience.
        """
        return self._exchange.ask(BatchView, "DELETE", _path(batch), most_seconds=most_seconds)

    def watch(self, batch: BatchReference) -> Iterator[BatchEvent]:
        """A batch's events to `BatchEnded`, each line once, through broken connections."""
        told: set[int] = set()
        for message in messages(self._exchange, f"{_path(batch)}/events"):
            if message.event not in _NAMES:
                continue  # of a newer service: nothing we could show
            try:
                event = decode_batch_event(message.data)
            except msgspec.DecodeError as error:
                raise NotUnderstood(
                    f"the stream holds a `{message.event}` that this version cannot read: {error}"
                ) from error
            if isinstance(event, LineEnded):
                if event.line in told:
                    continue
                told.add(event.line)
            yield event
            if isinstance(event, BatchEnded):
                return

    def wait(
        self,
        batch: BatchReference,
        on_event: OnBatchEvent | None = None,
        *,
        progress: ShowProgress = False,
    ) -> BatchView:
        """The batch once every scan of it has ended, however; each event on the way to `on_event`."""
        view = self.get(batch)
        if view.state is not BatchState.RUNNING and on_event is None:
            return view
        with shown(f"batch {view.name or view.id}", progress) as follower:
            hear = both(on_event, follower)
            for event in self.watch(batch):
                if hear is not None:
                    hear(event)
        return self.get(batch)

    def lines(
        self, batch: BatchReference, *, state: JobState | str | None = None
    ) -> Iterator[BatchLine]:
        """What became of each line, in order."""
        query = {"limit": str(_PAGE)} | ({} if state is None else {"state": JobState(state).value})
        after = 0
        while True:
            page = self._exchange.ask(
                list[BatchLine],
                "GET",
                f"{_path(batch)}/lines",
                query={**query, "after": str(after)},
            )
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].line

    def outcomes(self, batch: BatchReference) -> Iterator[Outcome]:
        """Each line that has ended, with its result where there is one; tables are fetched when asked for."""
        known: dict[UUID, Result | Refused] = {}
        for line in self.lines(batch):
            if line.job is not None and line.state is JobState.SUCCEEDED:
                if line.job not in known:
                    known[line.job] = self._result(line.job)
                result = known[line.job]
                if isinstance(result, Refused):
                    yield Outcome(msgspec.structs.replace(line, problem=result.document), None)
                else:
                    yield Outcome(line, result)
            elif line.problem is not None or line.state in TERMINAL:
                yield Outcome(line, None)

    def _result(self, job: UUID) -> Result | Refused:
        """A result, or why there is none any more."""
        try:
            manifest = self._exchange.ask(Manifest, "GET", f"/api/jobs/{job}/manifest")
        except Refused as refused:
            if refused.status not in _GONE:
                raise
            return refused
        return Result(self._exchange, job, manifest)

    def summaries(self, batch: BatchReference, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """Each line that has ended, with its result's summary, as the service sends them."""
        headers = {"Accept": NDJSON}
        path, patience = f"{_path(batch)}/results", self._exchange.patience()
        while True:
            query = {"after": str(after)}
            try:
                with self._exchange.stream(
                    path, headers=headers, quiet_seconds=QUIET_SECONDS, query=query
                ) as response:
                    require(response, NDJSON)
                    for line in response.iter_lines():
                        summary = _summary(line)
                        patience.heard()
                        patience.got_on()
                        after = summary["line"]
                        yield summary
            except (Unreachable, Refused) as error:
                patience.bear(error)
            else:
                return

    def table(self, batch: BatchReference, name: str) -> pa.Table:
        """One table of all results so far that have it, with a column `line`.

        `.to_pandas()` makes a data frame of it, `polars.DataFrame(...)` another.
        """
        response = self._exchange.send(
            "GET",
            f"{_path(batch)}/results",
            query={"table": name},
            headers={"Accept": ARROW_STREAM},
        )
        try:
            with pa.ipc.open_stream(response.content) as reader:
                return reader.read_all()
        except pa.ArrowInvalid as error:
            raise Damaged(f"table {name} of the batch cannot be read: {error}") from error

    def save(self, batch: BatchReference, path: Path) -> None:
        """Write every manifest and table so far, and `lines.json`, into one zip: whole, or not at all."""
        with replacing(path) as file:
            self._exchange.download(f"{_path(batch)}/results", file, _ZIP, headers={"Accept": _ZIP})


def _summary(line: str) -> dict[str, Any]:
    try:
        summary = msgspec.json.decode(line, type=dict[str, Any])
        number = summary.get("line")
    except msgspec.DecodeError as error:
        raise NotUnderstood(f"the results hold what this version cannot read: {error}") from error
    if not isinstance(number, int):
        raise NotUnderstood("the results hold one of no line")
    return summary


class _ScansEnded(Exception):
    """The caller's scans came to an error of their own.

    It may be one that a request is repeated for, as where they ask the service for something; but who asked them
    again would be given none, and the batch would be sent without what is missing.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Lines:
    """Scans, a line each, as often as they are asked for; they themselves are asked for once.

    They may come from a generator that is slow, or endless until it is not: each is sent as it comes, and kept
    beside it. Raises `_ScansEnded` where they raise.
    """

    def __init__(self, scans: Iterable[Scan]) -> None:
        self._scans = iter(scans)
        self._kept = tempfile.SpooledTemporaryFile(_SPOOLED)  # noqa: SIM115 -- closed with this

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def __iter__(self) -> Iterator[bytes]:
        self._kept.seek(0)
        yield from pieces(self._kept)
        while (scan := self._next()) is not None:
            line = encode_scan(scan) + b"\n"
            self._kept.write(line)
            yield line

    def _next(self) -> Scan | None:
        try:
            return next(self._scans, None)
        except Exception as error:
            raise _ScansEnded(error) from error


def _path(batch: BatchReference) -> str:
    if isinstance(batch, BatchView):
        return f"/api/batches/{batch.id}"
    try:
        return f"/api/batches/{batch if isinstance(batch, UUID) else UUID(batch)}"
    except ValueError:
        raise ValueError(f"{batch!r} is not a batch's id: expected a UUID") from None
