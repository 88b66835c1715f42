"""From the lines of a batch to its jobs: understood one by one, recorded together.

Everything that can be refused is refused before anything is recorded, by the line's number.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import msgspec
from litestar import Request

from api.bodies import NumberedLine, bounded, lines_of
from api.dependencies import Services
from api.expectations import explained, place_in
from api.preparation import prepare
from api.results import lost_results
from api.submissions import submission_of
from neural_mri.backing import batches, feeding, jobs
from neural_mri.backing.batches import Batch, Line, NewBatch, Undone
from neural_mri.backing.faults import crash_point
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.records import Submission
from neural_mri.contract.batches import (
    MOST_LINES,
    NDJSON,
    BatchView,
    InvalidLine,
    LinesInvalid,
    OnInvalid,
)
from neural_mri.contract.jobs import Lane
from neural_mri.contract.problems import InvalidRequest, Problem, TooMany, Unprocessable
from neural_mri.contract.scans import Scan, decode_scan

__all__ = ("Options", "feed", "submit_batch")

REPORTED = 100
"""Refused lines that an answer names; the others are only counted."""
MOST_TOKENS = 8_000_000
"""Of one batch's prompts: each is kept with its text and place, some twenty bytes a token."""
CHUNK = 500
"""Lines recorded in one transaction: in between others have their turn."""
TICKETS = 64
"""Sent to a queue at once; the reaper sends the others as they are needed."""
LINES_A_TURN = 32
"""Understood without letting anybody else have the event loop."""


class Options(NamedTuple):
    """What is wished for a whole batch."""

    lane: Lane
    on_invalid: OnInvalid
    max_failures: int | None
    name: str
    idempotency_key: str | None


class _Scans(msgspec.Struct, forbid_unknown_fields=True):
    """A `BatchRequest` whose scans are read one by one."""

    scans: list[msgspec.Raw]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Remembering(Services):
    """Services that look up each model once: ten thousand lines ask for two or three."""

    models: dict[str | None, RegisteredModel] = field(default_factory=dict)

    @classmethod
    def of(cls, services: Services) -> "_Remembering":
        return cls(**{each.name: getattr(services, each.name) for each in fields(Services)})

    async def model(self, name: str | None) -> RegisteredModel:
        if name not in self.models:
            self.models[name] = await Services.model(self, name)
        return self.models[name]


async def submit_batch(
    services: Services, request: Request[Any, Any, Any], options: Options
) -> BatchView:
    """The batch that a request asks for, recorded.

    Raises `LinesInvalid`, `InvalidRequest`, `TooMany`, `IdempotencyKeyReused`.
    """
    read = await _read(services, request, options)
    if read.invalid and (options.on_invalid is OnInvalid.REFUSE or not read.scan_keys):
        raise _refusal(read.invalid, read.n_lines)
    view = await _record(services, read, options)
    return msgspec.structs.replace(view, invalid=tuple(read.invalid[:REPORTED]))


class _Packed(NamedTuple):
    """A line that is understood, its scan as it will be stored: as objects a token takes ten times the room."""

    line: Line
    submission: str | None = None

    def unpacked(self) -> Line:
        """The line with its scan."""
        if self.submission is None:
            return self.line
        return self.line._replace(submission=feeding.read_kept(self.submission))


class _Read:
    """The lines of a batch, understood."""

    def __init__(self, options: Options) -> None:
        self.invalid: list[InvalidLine] = []
        self._packed: list[_Packed] = []
        self._first_lines: dict[str, int] = {}
        self._n_tokens = 0
        self._digest = hashlib.sha256(msgspec.json.encode(options[:-1]))

    @property
    def n_lines(self) -> int:
        """All that were read, refused ones among them."""
        return len(self._packed)

    @property
    def scan_keys(self) -> AbstractSet[str]:
        """The scans, each once."""
        return self._first_lines.keys()

    def chunks(self) -> Iterator[list[Line]]:
        """Lines in order, so many at a time as are recorded together."""
        for start in range(0, len(self._packed), CHUNK):
            yield [packed.unpacked() for packed in self._packed[start : start + CHUNK]]

    @property
    def digest(self) -> str:
        """Of all that was asked for."""
        return self._digest.hexdigest()

    def note(self, line: NumberedLine) -> None:
        """Count a line among what was asked for."""
        self._digest.update(b"%d:%b\n" % (line.number, line.body.strip()))

    def accept(self, number: int, submission: Submission) -> None:
        """Take a line's scan, or note which earlier line has asked for it.

        Raises `Unprocessable` where the batch's prompts have become too many tokens.
        """
        first = self._first_lines.setdefault(str(submission.scan_key), number)
        if first != number:
            self._packed.append(_Packed(Line(number, repeats=first)))
            return
        self._n_tokens += submission.n_tokens
        if self._n_tokens > MOST_TOKENS:
            raise Unprocessable(
                f"the batch's prompts up to line {number} have {self._n_tokens} tokens, {MOST_TOKENS} is as many as "
                "those of one batch can have: send several",
                line=number,
                limit=MOST_TOKENS,
            )
        self._packed.append(_Packed(Line(number), feeding.kept(submission)))

    def refuse(self, number: int, problem: Problem) -> None:
        """Note why a line cannot be done."""
        self._packed.append(_Packed(Line(number, problem=problem.document())))
        self.invalid.append(
            InvalidLine(
                line=number,
                type=problem.type_urn(),
                title=problem.title(),
                status=problem.status,
                detail=problem.detail,
            )
        )


async def _read(services: Services, request: Request[Any, Any, Any], options: Options) -> _Read:
    read, remembering = _Read(options), _Remembering.of(services)
    async for line in _lines(services, request):
        if read.n_lines == MOST_LINES:
            raise Unprocessable(
                f"the batch has more than {MOST_LINES} scans, as many as one batch can have: send "
                "several",
                limit=MOST_LINES,
            )
        read.note(line)
        try:
            prepared = await prepare(remembering, _decoded(line.body))
        except Problem as problem:
            if problem.status >= 500:
                raise
            read.refuse(line.number, problem)
        else:
            read.accept(line.number, submission_of(services, prepared, options.lane))
        if read.n_lines % LINES_A_TURN == 0:
            await asyncio.sleep(0)
    if not read.n_lines:
        raise InvalidRequest("the batch has no scan: expected a scan's request a line")
    return read


async def _lines(
    services: Services, request: Request[Any, Any, Any]
) -> AsyncIterator[NumberedLine]:
    """Each scan's request, under its line's number."""
    settings = services.settings
    chunks = bounded(request, settings.max_batch_bytes)
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == NDJSON:
        async for line in lines_of(chunks, settings.max_body_bytes):
            yield NumberedLine(*line)
        return
    body = b"".join([chunk async for chunk in chunks])
    try:
        scans = await asyncio.to_thread(msgspec.json.decode, body, type=_Scans)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f'the body is no {{"scans": [...]}}: {error}') from error
    for number, scan in enumerate(scans.scans, 1):
        yield NumberedLine(number, bytes(scan))


def _decoded(body: bytes) -> Scan:
    try:
        return decode_scan(body)
    except msgspec.ValidationError as error:
        raise InvalidRequest(_explained(str(error), body)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(str(error)) from error
    except RecursionError as error:
        raise InvalidRequest("the request is nested too deeply") from error


def _explained(complaint: str, body: bytes) -> str:
    """Why a line that is no scan's request is none, under the field's name."""
    said, path = place_in(complaint)
    # What comes after it may be no JSON at all.
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        said = explained(said, Scan, msgspec.json.decode(body), path)
    return f"{path}: {said}" if path else said


def _refusal(invalid: Sequence[InvalidLine], lines: int) -> LinesInvalid:
    first = invalid[0]
    return LinesInvalid(
        f"{len(invalid)} of {lines} lines cannot be done, line {first.line} among them: {first.detail}; "
        f"nothing was recorded (on_invalid={OnInvalid.SKIP.value} leaves such lines out)",
        refused=len(invalid),
        lines=lines,
        invalid=msgspec.to_builtins(invalid[:REPORTED]),
    )


async def _record(services: Services, read: _Read, options: Options) -> BatchView:
    """Record the batch, line by line, and let it begin.

    Sent again under its Idempotency-Key, it is filled where whoever recorded it first has died meanwhile.
    """
    known = await services.sessions.read(jobs.known_results, read.scan_keys)
    lost = set(await lost_results(services, set(known.values())))
    for key, path in tuple(known.items()):
        if path in lost:
            await services.sessions.write(jobs.withdraw_result, key, path)
            del known[key]
    wanted = NewBatch(
        owner=services.caller.user,
        name=options.name,
        lane=options.lane,
        lines=read.n_lines,
        digest=read.digest,
        max_failures=options.max_failures,
        word=options.idempotency_key,
    )
    while True:
        try:
            batch = await services.sessions.write(batches.begin, wanted)
            if not batch.is_filled:
                await _fill(services, batch, read)
                queued = len(read.scan_keys) - len(known)
                services.metrics.accepted_batch(stored=len(known), queued=queued)
                await feed(services)
                if known:
                    await _feed_known(services, batch)
        except Undone:
            continue  # whoever had begun it has given it up: now it is ours to begin
        return await services.sessions.read(batches.view, batch._replace(is_filled=True))


async def _fill(services: Services, batch: Batch, read: _Read) -> None:
    """Record the lines that are not yet. Raises `Undone`."""
    try:
        for some in read.chunks():
            await services.sessions.write(batches.fill, batch.id, some)
            crash_point("api.batch-chunk")
    except Undone:
        raise
    except BaseException:
        # What it stands on does not answer, or the sender went away: half a batch is none.
        await services.sessions.write(batches.abandon, batch.id)
        raise


async def feed(services: Services) -> None:
    """Have lines of the caller's batches become jobs for as long as there is room, and send tickets.

    The reaper goes on with it.
    """
    queued: Counter[str] = Counter()
    with suppress(TooMany):  # others took the room
        while True:
            fed = await services.sessions.write(
                feeding.feed,
                services.caller.user,
                max_queued=services.settings.max_queued_jobs,
                usual=services.limits,
            )
            if not fed.lines:
                break
            queued += fed.queued
    for queue, count in queued.items():
        await services.tickets.send(queue, min(count, TICKETS))


async def _feed_known(services: Services, batch: Batch) -> None:
    """Have the lines whose results are known become jobs, whatever waits for room before them."""
    after: int | None = 0
    with suppress(TooMany):  # of a result that was just withdrawn: it waits
        while after is not None:
            after = await services.sessions.write(
                feeding.feed_known,
                batch.id,
                after,
                max_queued=services.settings.max_queued_jobs,
                usual=services.limits,
            )
