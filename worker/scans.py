"""One scan, from the job's row to tables that say whose they are.

Sees to it that the numbers are those that the job's scan key promises, or of the same scan as this release and
these models compute it: then they have a key of their own. Knows neither queue nor store.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple, TypeAlias

import msgspec
import psutil
import pyarrow as pa
import torch

from neural_mri.backing.jobs import Job
from neural_mri.backing.models import RegisteredModel
from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import Conflict, Problem, Unavailable
from neural_mri.contract.results import Manifest, signed
from neural_mri.contract.scan_keys import ANSWERS, SCANNER_VERSION, scan_key
from neural_mri.contract.scans import (
    ActivationScan,
    AnomalyScan,
    AttentionScan,
    CalibrationScan,
    CircuitScan,
    Forward,
    PatchingScan,
    PerturbationScan,
    PromptScan,
    Scan,
    ScanKind,
    StructuralScan,
    TracingScan,
    WeightScan,
    decode_scan,
    kind_of,
)
from neural_mri.contract.tokens import Operands, Tokens
from worker.calibrations import Calibrations
from worker.resident import Resident
from worker.scanner.activations import scan_activations
from worker.scanner.anomalies import scan_anomalies
from worker.scanner.attention import scan_attention, scan_attention_together
from worker.scanner.calibrating import calibrate
from worker.scanner.calibration import Calibration
from worker.scanner.circuits import AskedCircuit, scan_circuits, scan_circuits_together
from worker.scanner.listening import Cancelled, Listener, Timed
from worker.scanner.loading import LoadedModel
from worker.scanner.mixed_scans import Asked, scan_together
from worker.scanner.patching import scan_patching
from worker.scanner.perturbation import (
    Perturbing,
    scan_perturbation,
    scan_perturbation_together,
)
from worker.scanner.prompts import ScanOutput
from worker.scanner.references import ReferenceMeans
from worker.scanner.shared_forward import AskedOf, Outcome
from worker.scanner.topology import scan_topology
from worker.scanner.tracing import scan_tracing

__all__ = ("ModelChanged", "Performed", "Scanned", "baseline_of", "perform", "rows_of")


class ModelChanged(Conflict):
    """The model is no longer the one that the job was made for."""


class Scanned(NamedTuple):
    """A result that is not stored yet."""

    manifest: Manifest
    """Everything but the tables' addresses."""
    tables: Mapping[str, pa.Table]


Performed: TypeAlias = Scanned | Problem | Cancelled
"""A result, or what kept one job from it where its mates have theirs."""


def perform(
    jobs: Sequence[Job],
    registered: RegisteredModel | None,
    resident: Resident | None,
    *,
    baseline: RegisteredModel | None = None,
    calibrations: Calibrations,
    models_dir: Path,
    listeners: Sequence[Listener],
    ready: Callable[[Mapping[int, Performed]], None] = lambda _early: None,
    lent_seconds: Callable[[], float] = lambda: 0.0,
) -> list[Performed]:
    """Run the scans of jobs that share a pass, one alone most often.

    Args:
        jobs: Of one model. Several are of equal batch key: their prompts are rows of one forward.
        registered: Their model as it is registered now.
        resident: The model with the jobs' weights, where it is held.
        baseline: The model that the scan compares with, where it names one.
        calibrations: What scans are read against.
        models_dir: The model store.
        listeners: One a job.
        ready: Given what became of some, by index, as soon as it stands while others are still measured; the
            time that it takes is nobody's.
        lent_seconds: How long the pass has stood still for others until now; that is nobody's either.

    Gives what became of each: of several, one may be refused or stop while the others go on.

    A result's key is that of its numbers: another than the job's where it was made under another version of the
    scanner, or for other numerics, of which a caller chooses neither.

    Raises `ModelChanged` when a job was made for other weights or another tokenizer, `Cancelled` when the
    listeners stop it, and what the scanner refuses.
    """
    started = time.perf_counter()
    job, scan = jobs[0], decode_scan(jobs[0].request)
    if registered is None or registered.revision != job.revision:
        raise ModelChanged(
            f"{job.model} no longer has the weights {job.revision[:16]}: send the request again",
            model=job.model,
        )
    numerics = registered.numerics if resident is None else resident.model.numerics
    asked = [scan, *(decode_scan(job.request) for job in jobs[1:])]
    keys = [
        _true_key(one, of_it, registered, numerics, baseline)
        for one, of_it in zip(jobs, asked, strict=True)
    ]
    shares = _Shares(started, len(jobs), lent_seconds)

    def finished(index: int, outcome: Outcome, seconds: float) -> Performed:
        if not isinstance(outcome, ScanOutput):
            return outcome
        held_bytes = _memory_bytes(numerics.device)
        return _finished(
            jobs[index], keys[index], numerics, outcome, seconds, held_bytes, calibrations
        )

    early: dict[int, Performed] = {}

    def stand(some: Mapping[int, Outcome]) -> None:
        share = shares.of_early(len(some))
        these = {}
        for index, outcome in some.items():
            seconds = share
            if isinstance(outcome, ScanOutput) and outcome.forward_seconds > share:
                # Measured for itself, while others stood by.
                seconds = outcome.forward_seconds
                shares.add(seconds - share)
            these[index] = finished(index, outcome, seconds)
        early.update(these)
        with shares.set_aside():
            ready(these)

    with torch.inference_mode():  # this thread's alone, so it is entered here
        outcomes: Sequence[Outcome]
        if len(jobs) > 1:
            outcomes = _rows_of_one_forward(jobs, asked, resident, calibrations, listeners, stand)
        else:
            folder = models_dir / registered.folder
            compared = None if baseline is None else models_dir / baseline.folder
            [listener] = listeners
            outcomes = [_output(job, scan, folder, resident, compared, calibrations, listener)]
    seconds = shares.of_last()
    return [
        early[index] if index in early else finished(index, outcome, seconds)
        for index, outcome in enumerate(outcomes)
    ]


class _Shares:
    """How the seconds of a pass are shared among its jobs: they sum to what was computed."""

    def __init__(self, started: float, n_jobs: int, lent_seconds: Callable[[], float]) -> None:
        self._from = started
        """Since when it was computed, moved on by what was set aside."""
        self._n_jobs = n_jobs
        self._lent_seconds = lent_seconds
        self._n_left = n_jobs
        self._given = 0.0

    def of_early(self, count: int) -> float:
        """Of each of so many that others go on without: its share of what has been computed for all."""
        seconds = self._computed() / self._n_jobs
        self._given += count * seconds
        self._n_left -= count
        return seconds

    def add(self, seconds: float) -> None:
        """More was one's own than its share."""
        self._given += seconds

    def of_last(self) -> float:
        """Of each of the others."""
        return max(0.0, self._computed() - self._given) / self._n_left

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Nothing is computed for the pass meanwhile."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._from += time.perf_counter() - began

    def _computed(self) -> float:
        return time.perf_counter() - self._from - self._lent_seconds()


def rows_of(job: Job) -> int:
    """Rows of a forward that a job's prompt and what it is compared with take."""
    return decode_scan(job.request).n_rows


def _rows_of_one_forward(
    jobs: Sequence[Job],
    asked: Sequence[Scan],
    resident: Resident | None,
    calibrations: Calibrations,
    listeners: Sequence[Listener],
    ready: Callable[[Mapping[int, Outcome]], None],
) -> Sequence[Outcome]:
    if resident is None:
        raise Unavailable(f"{jobs[0].model} is not in this worker's memory: load it first")
    model = resident.model
    together = list(zip(jobs, asked, listeners, strict=True))
    match asked[0].shared_forward:
        case Forward.READ:
            return scan_together(
                model, [_reading(*one, resident, calibrations) for one in together], ready
            )
        case Forward.PATTERNS:
            return scan_attention_together(
                model,
                [scan for scan in asked if isinstance(scan, AttentionScan)],
                [_tokens(job) for job in jobs],
                listeners,
            )
        case Forward.EDITED:
            return scan_perturbation_together(
                model, [_perturbing(*one, resident, calibrations) for one in together]
            )
        case Forward.DIFFERENTIATED:
            return scan_circuits_together(
                model, [_circuit(*one, resident, calibrations) for one in together], ready
            )
        case None:
            raise TypeError(f"{type(asked[0]).__name__} shares no forward with others")


def _reading(
    job: Job, scan: Scan, listener: Listener, resident: Resident, calibrations: Calibrations
) -> Asked:
    if not isinstance(scan, ActivationScan | AnomalyScan):
        raise TypeError(f"{type(scan).__name__} is not read from the plain model's forward")
    calibration = None
    if scan.needs_calibration:
        calibration = calibrations.of(resident, scan.calibration, listener)
    answer_id, foil_id = (job.operands.token_ids.get(name) for name in ANSWERS)
    return Asked(scan, _tokens(job), listener, calibration, answer_id, foil_id)


def _perturbing(
    job: Job, scan: Scan, listener: Listener, resident: Resident, calibrations: Calibrations
) -> Perturbing:
    if not isinstance(scan, PerturbationScan):
        raise TypeError(f"{type(scan).__name__} perturbs nothing")
    means = _means(scan, listener, resident, calibrations)
    asked = _asked_of(job, listener)
    return Perturbing(scan, asked, sources=job.operands.prompts, means=means)


def _circuit(
    job: Job, scan: Scan, listener: Listener, resident: Resident, calibrations: Calibrations
) -> AskedCircuit:
    if not isinstance(scan, CircuitScan):
        raise TypeError(f"{type(scan).__name__} takes no gradient of an answer")
    means = _means(scan, listener, resident, calibrations)
    corrupt = job.operands.prompts.get(scan.corrupt_prompt or "")
    return AskedCircuit(scan, _asked_of(job, listener), corrupt, means)


def _asked_of(job: Job, listener: Listener) -> AskedOf:
    answer_id, foil_id = (job.operands.token_ids.get(name) for name in ANSWERS)
    return AskedOf(_tokens(job), listener, answer_id, foil_id)


def _means(
    scan: PerturbationScan | CircuitScan,
    listener: Listener,
    resident: Resident,
    calibrations: Calibrations,
) -> ReferenceMeans | None:
    if not scan.needs_calibration:
        return None
    return calibrations.of(resident, scan.calibration, listener).means


def _finished(
    job: Job,
    key: str,
    numerics: Numerics,
    output: ScanOutput,
    seconds: float,
    held_bytes: int,
    calibrations: Calibrations,
) -> Scanned:
    manifest = Manifest(
        scan_key=key,
        kind=kind_of(decode_scan(job.request)),
        model=job.model,
        revision=job.revision,
        numerics=numerics,
        scanner_version=SCANNER_VERSION,
        request=msgspec.json.decode(job.request),
        prompt_tokens=job.tokens.texts if job.tokens else (),
        tables=(),
        created_at=datetime.now(UTC),
        forward_seconds=output.forward_seconds,
        compute_seconds=seconds,
        memory_bytes=held_bytes,
    )
    tables = signed(output.tables, manifest)
    if manifest.kind is ScanKind.CALIBRATION:
        calibrations.measured(manifest, tables)
    return Scanned(manifest, tables)


def baseline_of(job: Job) -> str | None:
    """Name of the model that a job's scan compares with, where it does."""
    scan = decode_scan(job.request)
    return scan.baseline if isinstance(scan, WeightScan) else None


VERSIONS = tuple(map(str, range(int(SCANNER_VERSION) + 1, 0, -1)))
"""Of the scanner, under which a job may have been made: those until now, and the next, of a release that is taken back."""
NUMERICS = tuple(
    Numerics(dtype=dtype, device=device, attention=attention)
    for dtype, device, attention in product(
        ("float32", "bfloat16", "float16"), ("cpu", "cuda"), ("sdpa", "eager")
    )
)
"""All that a model can be registered with."""


def _true_key(
    job: Job,
    scan: Scan,
    registered: RegisteredModel,
    numerics: Numerics,
    baseline: RegisteredModel | None,
) -> str:
    """The key of the numbers that the job comes to. Raises `ModelChanged` where it was made for another scan."""
    keyed = partial(
        scan_key,
        scan,
        token_ids=job.tokens.ids if job.tokens else None,
        revision=registered.revision,
        tokenizer_digest=registered.tokenizer_digest,
        operands=job.operands,
        baseline_revision=None if baseline is None else baseline.revision,
    )
    key = keyed(numerics=numerics)
    if job.scan_key in (None, key):
        return key
    # A key tells nothing of what it was made of, but that it was made of these.
    made_as = product(VERSIONS, (numerics, *NUMERICS))
    if not any(job.scan_key == keyed(numerics=by, scanner_version=of) for of, by in made_as):
        raise ModelChanged(
            f"{job.model} is another since the request was made (its tokenizer, or what it is compared with): "
            "send the request again",
            model=job.model,
        )
    return key


def _output(
    job: Job,
    scan: Scan,
    folder: Path,
    resident: Resident | None,
    baseline: Path | None,
    calibrations: Calibrations,
    listener: Listener,
) -> ScanOutput:
    match scan:
        case StructuralScan():
            return ScanOutput(scan_topology(folder), forward_seconds=0.0)
        case WeightScan():
            # What compiles its loops takes 100 MB: only workers that read weights need it.
            from worker.scanner.weights import scan_weights

            return scan_weights(folder, scan, listener, baseline)
    if resident is None:
        raise Unavailable(f"{job.model} is not in this worker's memory: load it, then scan again")
    model = resident.model
    if isinstance(scan, CalibrationScan):
        texts = [job.operands.prompts[text] for text in scan.texts]
        return _calibration(model, scan, texts, listener)
    calibration = None
    if scan.needs_calibration:
        calibration = calibrations.of(resident, getattr(scan, "calibration", None), listener)
    return _prompt_scan(model, scan, _tokens(job), job.operands, calibration, listener)


def _prompt_scan(
    model: LoadedModel,
    scan: PromptScan,
    tokens: Tokens,
    operands: Operands,
    calibration: Calibration | None,
    listener: Listener,
) -> ScanOutput:
    answer_id, foil_id = (operands.token_ids.get(name) for name in ANSWERS)
    means = None if calibration is None else calibration.means
    match scan:
        case ActivationScan():
            return scan_activations(model, scan, tokens, listener, calibration=calibration)
        case AttentionScan():
            return scan_attention(model, scan, tokens, listener)
        case CircuitScan():
            corrupt = operands.prompts.get(scan.corrupt_prompt or "")
            return scan_circuits(model, scan, tokens, corrupt, answer_id, foil_id, listener, means)
        case AnomalyScan():
            return scan_anomalies(
                model,
                scan,
                tokens,
                listener,
                calibration=calibration,
                answer_id=answer_id,
                foil_id=foil_id,
            )
        case PerturbationScan():
            return scan_perturbation(
                model,
                scan,
                tokens,
                listener,
                sources=operands.prompts,
                answer_id=answer_id,
                foil_id=foil_id,
                means=means,
            )
        case PatchingScan():
            return scan_patching(
                model,
                scan,
                tokens,
                operands.prompts[scan.corrupt_prompt],
                listener,
                answer_id=answer_id,
                foil_id=foil_id,
            )
        case TracingScan():
            return scan_tracing(model, scan, tokens, listener, answer_id=answer_id, foil_id=foil_id)
        case _:
            raise TypeError(f"no scanner for {type(scan).__name__}")


def _calibration(
    model: LoadedModel, scan: CalibrationScan, texts: Sequence[Tokens], listener: Listener
) -> ScanOutput:
    timed = Timed(listener)
    measured = calibrate(model, scan, timed, texts=texts, prefix=model.prefix)
    return ScanOutput(measured.to_tables(), forward_seconds=timed.own_seconds)


def _tokens(job: Job) -> Tokens:
    if job.tokens is None:
        raise ValueError(f"job {job.id} is a scan of a prompt, but its row has no tokens")
    return job.tokens


def _memory_bytes(device: str) -> int:
    """Memory that this process holds on the model's device."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    resident: int = _this_process().memory_info().rss
    return resident


@cache
def _this_process() -> psutil.Process:
    """Looked up once: that takes longer than to ask it."""
    return psutil.Process()
