"""Diagnoses over a service: a suite's scans sent as batches, results taken as they come."""

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property, partial
from http import HTTPStatus
from typing import Protocol
from uuid import UUID

import msgspec

from neural_mri.client.batches import Batches
from neural_mri.client.errors import ClientError, Refused
from neural_mri.client.exchange import PARTING_SECONDS
from neural_mri.client.parting import Begun, begun, stay
from neural_mri.client.result import Result
from neural_mri.contract.baselines import Subject, check_comparable, record_key
from neural_mri.contract.batches import BatchView, LineEnded
from neural_mri.contract.findings import Diagnosis
from neural_mri.contract.jobs import JobState, JobView, Lane
from neural_mri.contract.models import ModelInfo, ModelName
from neural_mri.contract.problems import Gone
from neural_mri.contract.scans import Scan
from neural_mri.contract.suites import Suite
from neural_mri.contract.tokens import Tokens
from neural_mri.diagnostics.diagnosis import diagnose
from neural_mri.diagnostics.measuring import Scanned, Scans, measure
from neural_mri.diagnostics.records import Record, Records

__all__ = ("Note", "Progress", "ServiceScans", "diagnosed", "recorded", "silent", "warned")


_TOO_LONG = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.UNPROCESSABLE_ENTITY)
"""Refusals that a shorter batch may not meet. For room under way a batch waits in the service."""


def _fewer(some: int, refused: Refused) -> int:
    """How many to ask for after so many were too many. Raises the refusal where their number is not to blame."""
    limit = refused.members.get("limit")
    if isinstance(limit, int) and limit < some:
        return max(1, limit)
    if limit is None and refused.status == HTTPStatus.UNPROCESSABLE_ENTITY:
        raise refused
    return some // 2  # a larger limit is one of tokens


class Service(Protocol):
    """What of a client is needed here."""

    @property
    def batches(self) -> Batches:
        """Many scans in one request."""

    def model(self, name: str | None = None) -> ModelInfo:
        """A registered model."""

    def tokenize(self, prompt: str, *, model: str | None = None) -> Tokens:
        """A prompt as the model reads it."""

    def wait(self, job: UUID) -> JobView:
        """The job, once it has succeeded; raises where it has not."""

    def result(self, job: UUID) -> Result:
        """What it measured."""


class ServiceScans:
    """One of a service's models."""

    def __init__(self, service: Service, model: ModelName | None) -> None:
        self._service = service
        self._name = model

    @cached_property
    def _info(self) -> ModelInfo:
        return self._service.model(self._name)

    @property
    def subject(self) -> Subject:
        """The checkpoint."""
        info = self._info
        return Subject(
            model=info.name,
            revision=info.revision,
            tokenizer_digest=info.tokenizer_digest,
            numerics=info.numerics,
            family=info.architecture.family,
            n_layers=info.architecture.n_layers,
            n_heads=info.architecture.n_heads,
            n_parameters=info.n_parameters,
        )

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Texts as the checkpoint reads them."""
        return [self._tokens(text) for text in texts]

    def _tokens(self, text: str) -> Tokens:
        stay()
        return self._service.tokenize(text, model=self._info.name)

    def scan(self, scans: Sequence[Scan]) -> Generator[Scanned, None, None]:
        """What each scan measured, in their order. Left before the end, it cancels what is under way."""
        left = [msgspec.structs.replace(scan, model=self._info.name) for scan in scans]
        while left:
            with begun() as work:
                some, batch = self._submitted(left)
                cancel = partial(self._service.batches.cancel, batch)
                work.until(partial(cancel, most_seconds=PARTING_SECONDS))
                yield from self._together(batch, some, work)
            left = left[some:]

    def _submitted(self, scans: Sequence[Scan]) -> tuple[int, BatchView]:
        """A batch of as many of the first scans as the service takes in one request."""
        some = len(scans)
        while True:
            try:
                batch = self._service.batches.submit(
                    scans[:some],
                    lane=Lane.BATCH,
                    name=f"diagnosis of {self._info.name}",
                )
            except Refused as refused:
                if some == 1 or refused.status not in _TOO_LONG:
                    raise
                some = _fewer(some, refused)
            else:
                return some, batch

    def _together(self, batch: BatchView, n_scans: int, work: Begun) -> Iterator[Scanned]:
        batches = self._service.batches
        ended: dict[int, UUID] = {}
        n_given = 0
        try:
            for event in batches.watch(batch):
                if not isinstance(event, LineEnded):
                    continue
                if event.state is not JobState.SUCCEEDED:
                    self._service.wait(event.job)
                ended[event.line] = event.job
                while n_given + 1 in ended:
                    stay()
                    n_given += 1
                    yield self._measured(ended.pop(n_given))
            if n_given < n_scans:
                # Lines that never became jobs are told of by nothing.
                state = batches.get(batch).state.value
                raise ClientError(
                    f"batch {batch.id} has ended, {state}, with {n_given} of {n_scans} scans measured"
                )
        finally:
            if n_given < n_scans:
                work.stop()
                work.end()

    def _measured(self, job: UUID) -> Scanned:
        result = self._service.result(job)
        tables = {name: result.table(name) for name in result.table_names}
        return Scanned(result.manifest.scan_key, tables)


Progress = Callable[[str, int, int], None]
"""Hears of a checkpoint, scans done and scans in all; both are 0 where its record was stored."""


def silent(_model: str, _done: int, _total: int) -> None:
    """Hears everything and says nothing."""


Note = Callable[[str], None]
"""Hears a sentence that is worth knowing and stops nothing."""


def warned(sentence: str) -> None:
    """A warning, as Python has them."""
    warnings.warn(sentence, stacklevel=2)


def recorded(
    suite: Suite,
    scans: Scans,
    records: Records,
    *,
    with_noise: bool,
    on_progress: Progress = silent,
    on_note: Note = warned,
) -> tuple[Record, float]:
    """What the suite measures of a checkpoint, and the seconds it took now: 0 where it was stored.

    Of a candidate that has become a baseline only the noise is still to be measured. A record that is damaged is noted,
    and counts as not measured.
    """
    subject = scans.subject

    def stored(*, noise: bool) -> Record | None:
        try:
            return records.get(record_key(subject, suite.digest, with_noise=noise))
        except Gone as gone:
            on_note(f"{gone.detail}; it counts as not measured")
            return None

    noisy = stored(noise=True)
    without = stored(noise=False) if noisy is None else None
    if (found := noisy if with_noise else noisy or without) is not None:
        on_progress(subject.model, 0, 0)
        # The checkpoint may have been stored under another name.
        return msgspec.structs.replace(found, subject=subject), 0.0
    started = time.perf_counter()
    record = measure(
        suite,
        scans,
        with_noise=with_noise,
        known=without,
        advance=lambda done, total: on_progress(subject.model, done, total),
    )
    records.put(record)
    return record, time.perf_counter() - started


def diagnosed(
    suite: Suite,
    candidate: Scans,
    baseline: Scans | None,
    records: Records,
    *,
    profile: str | None = None,
    on_progress: Progress = silent,
    on_note: Note = warned,
) -> Diagnosis:
    """Measure what is not stored yet, compare, and say what was found.

    What cannot be compared is refused before anything is measured.
    """
    suite.gate(suite.measures[0], profile)
    seconds = {}
    there = None
    if baseline is not None:
        check_comparable(candidate.subject, baseline.subject)
        there, seconds["baseline"] = recorded(
            suite, baseline, records, with_noise=True, on_progress=on_progress, on_note=on_note
        )
    here, seconds["candidate"] = recorded(
        suite, candidate, records, with_noise=False, on_progress=on_progress, on_note=on_note
    )
    return diagnose(suite, here, there, profile=profile, seconds=seconds)
