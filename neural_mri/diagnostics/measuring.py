"""From a suite to a record: which scans are asked for, and what is read off their tables.

Scans are asked for in the order in which they are cheapest: what reads the plain model stands beside what reads
it at as many tokens, so that whoever scans can do them in one forward, and nothing waits for the calibration
that could be done meanwhile.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import pyarrow as pa

from neural_mri.contract.anomalies import AnomalyScan, CalibrationScan, Lens, Sublayers
from neural_mri.contract.baselines import Subject
from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.scans import ActivationScan, AttentionScan, Scan, WeightScan
from neural_mri.contract.suites import Measure, Suite
from neural_mri.contract.tokens import Tokens
from neural_mri.diagnostics.asking import Aside, Asked, ask
from neural_mri.diagnostics.reading import (
    Numbers,
    activation_norms,
    attention_entropies,
    attributions,
    flair_channels,
    lens_curves,
    tensor_statistics,
    weight_statistics,
)
from neural_mri.diagnostics.records import Block, Quantity, Record

__all__ = ("Scanned", "Scans", "measure", "n_scans")

Advance = Callable[[int, int], None]
"""Called with scans done and scans in all."""

REFERENCE_TOKENS = 128
"""What a calibration takes at the least: two texts of 64 tokens."""


class Scanned(NamedTuple):
    """What a scan measured."""

    scan_key: str
    tables: Mapping[str, pa.Table]


class Scans(Protocol):
    """Whoever can scan one checkpoint: a service, or a process of our own."""

    @property
    def subject(self) -> Subject:
        """The checkpoint."""

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Texts as the checkpoint reads them."""

    def scan(self, scans: Sequence[Scan]) -> Iterator[Scanned]:
        """What each scan measured, in their order. Raises where one fails."""


class _Wanted(NamedTuple):
    """A scan, and where its numbers belong."""

    scan: Scan
    prompt: str
    modality: str
    replicate: int
    n_tokens: int = 0
    """Of the prompt itself."""
    n_read: int = 0
    """Of all that is read."""
    paired: int = -1
    """Of a noise pair of attributions, which of the two it is."""


def spread(names: Sequence[str], count: int) -> set[str]:
    """`count` of the names, evenly over all."""
    at = np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int))
    return {names[index] for index in at}


def n_scans(suite: Suite) -> int:
    """About how many scans a suite takes, noise left out."""
    per_prompt = sum(measure is not Measure.WEIGHTS for measure in suite.measures)
    return suite.n_items * min(per_prompt, 4)


def measure(
    suite: Suite,
    scans: Scans,
    *,
    with_noise: bool,
    known: Record | None = None,
    order: random.Random | None = None,
    advance: Advance = lambda _done, _total: None,
) -> Record:
    """Everything the suite measures of one checkpoint; with `with_noise`, numerical noise as well.

    What a record without noise holds is taken from there, and only what it lacks is measured. Scans are asked for
    in an `order` drawn where one is given, so that other prompts of the same length share their forwards.

    Raises `Unprocessable` where the tokenizer can be asked none of its prompts, or noise be measured on none.
    """
    started = time.perf_counter()
    everything = ask(suite, scans.tokenize)
    asked = [each for each in everything if isinstance(each, Asked)]
    if not asked:
        [first, *_] = (each for each in everything if isinstance(each, Aside))
        raise Unprocessable(
            f"suite {suite.name} has no prompt that {scans.subject.model} can be asked. "
            f"The first is {first.name}: {first.reason}"
        )
    if with_noise and not any(each.longer for each in asked) and set(suite.measures) - _NOISELESS:
        raise Unprocessable(
            f"noise cannot be measured with suite {suite.name}, and without it nothing can be told from rounding: "
            f"{scans.subject.model} reads every prompt as other tokens where text follows, or has no room for more. "
            "A prompt that ends with a whole word would do"
        )
    wanted = [
        each
        for each in _wanted(suite, asked, scans.subject, with_noise=with_noise)
        if known is None or each.replicate
    ]
    if order is not None:
        order.shuffle(wanted)
    gathered: tuple[Numbers, Numbers] = (Numbers(), Numbers())
    scan_keys: dict[str, str] = {} if known is None else dict(known.scan_keys)
    pairs: tuple[Numbers, Numbers] = (Numbers(), Numbers())
    calibration = _calibration(suite, [each.n_tokens for each in everything])
    for done, (each, result) in enumerate(_scanned(calibration, scans, wanted), 1):
        numbers = gathered[each.replicate] if each.paired < 0 else pairs[each.paired]
        _read(each, result, numbers, suite)
        if not each.replicate:
            scan_keys[f"{each.modality}:{each.prompt}"] = result.scan_key
        advance(done, len(wanted))
    prompts = ["", *(each.name for each in asked)]
    noise = gathered[1].blocks(prompts)
    noise.update(_attribution_noise(pairs, prompts))
    return Record(
        subject=scans.subject,
        suite=suite.name,
        suite_version=suite.version,
        suite_digest=suite.digest,
        blocks=gathered[0].blocks(prompts) if known is None else known.blocks,
        noise=noise,
        set_aside=tuple(each.name for each in everything if isinstance(each, Aside)),
        scan_keys=scan_keys,
        seconds=time.perf_counter() - started + (known.seconds if known is not None else 0.0),
    )


_NOISELESS = frozenset({Measure.WEIGHTS})


def _scanned(
    calibration: CalibrationScan, scans: Scans, wanted: Sequence[_Wanted]
) -> Iterator[tuple[_Wanted, Scanned]]:
    """Everything that is wanted, with what was measured; what can be done together stands together.

    While one process calibrates, the others do what needs no calibration. Circuits come last, the shortest of
    them at the very end: most of each is its own, so that they keep all processes busy until then.
    """
    early = [each for each in wanted if each.modality in _UNCALIBRATED]
    late = [each for each in wanted if each.modality not in _UNCALIBRATED]
    early.sort(key=lambda each: (each.modality != "T2", each.n_read))
    # Of circuits, those first that are alone: between others they would keep these from sharing a forward.
    late.sort(key=lambda each: (each.modality == "DTI", each.paired != 0, -each.n_read))
    calibrating = [calibration] if any(map(_is_calibrated, late)) else []
    results = scans.scan([*calibrating, *(each.scan for each in early)])
    keys = [next(results).scan_key for _ in calibrating]
    yield from zip(early, results, strict=True)
    asked = [_against(each.scan, *keys) if _is_calibrated(each) else each.scan for each in late]
    yield from zip(late, scans.scan(asked), strict=True)


_UNCALIBRATED = frozenset({"T2", "attention"})


def _is_calibrated(each: _Wanted) -> bool:
    return each.modality in ("fMRI", "FLAIR")


def _against(scan: Scan, calibration: str) -> Scan:
    """The same, read against the calibration of that scan key."""
    return msgspec.structs.replace(scan, calibration=calibration)


def _calibration(suite: Suite, n_tokens: Sequence[int]) -> CalibrationScan:
    """A calibration on the suite's own prompts, of so many tokens each: the same text for every checkpoint.

    Where they are too short together they are read again until there is enough.
    """
    prompts = (item.prompt for case in suite.cases for item in case.items)
    lengths = dict(zip(prompts, n_tokens, strict=True))
    texts, again = list(lengths), cycle(lengths)
    total = sum(lengths.values())
    while total < REFERENCE_TOKENS:
        texts.append(next(again))
        total += lengths[texts[-1]]
    return CalibrationScan(
        texts=tuple(texts),
        n_tokens=suite.reference.n_tokens,
        n_ordinary=suite.reference.n_ordinary,
        lenses=(Lens.RAW,),
    )


def _wanted(
    suite: Suite, asked: Sequence[Asked], subject: Subject, *, with_noise: bool
) -> Iterator[_Wanted]:
    names = [each.name for each in asked]
    attended = spread(names, suite.attention_prompts)
    longer = [each.name for each in asked if each.longer]
    n_noisy = suite.noise_prompts if with_noise else 0
    noisy = spread(longer, n_noisy)
    # Where attention is read on few prompts, none of them may be noisy: then some are, for attention alone.
    looking = attended & noisy or spread([name for name in longer if name in attended], n_noisy)
    reading = _Reading(suite, attended, tuple(range(subject.n_layers)))
    if Measure.WEIGHTS in suite.measures:
        yield _Wanted(WeightScan(), "", "T2", 0)
    for each in asked:
        yield from reading.of(each, 0)
        if Measure.ATTRIBUTION in suite.measures and each.corrupt is not None:
            yield _Wanted(_circuit(suite, each), each.name, "DTI", 0, n_read=each.n_tokens)
        if each.name in noisy:
            yield from reading.of(each, 1)
            if Measure.ATTRIBUTION in suite.measures:
                yield from _attribution_pair(each)
        elif each.name in looking:
            yield from reading.attention(each, 1)


class _Reading(NamedTuple):
    """What is measured of every prompt."""

    suite: Suite
    attended: set[str]
    layers: tuple[int, ...]

    def of(self, each: Asked, replicate: int) -> Iterator[_Wanted]:
        """Scans of a prompt, or as replicate 1 of the longer text that begins with it."""
        measures = set(self.suite.measures)
        text, n_read = _read_as(each, replicate)
        if Measure.NORMS in measures:
            scan: Scan = ActivationScan(
                prompt=text,
                include_residual=False,
                top_neurons=0,
                top_predictions=1,
            )
            yield _Wanted(scan, each.name, "fMRI", replicate, each.n_tokens, n_read)
        if measures & {Measure.LENS, Measure.RISK, Measure.SCORES}:
            scan = AnomalyScan(
                prompt=text,
                answer=each.answer_id,
                foil=each.foil_id,
                target_token_idx=each.n_tokens - 1,
                lens=Lens.RAW,
                token_positions="target",
                sublayers=Sublayers.NONE,
            )
            yield _Wanted(scan, each.name, "FLAIR", replicate, each.n_tokens, n_read)
        yield from self.attention(each, replicate)

    def attention(self, each: Asked, replicate: int) -> Iterator[_Wanted]:
        """Of these the scan of attention, where it is read on that prompt."""
        if Measure.ATTENTION in self.suite.measures and each.name in self.attended:
            text, n_read = _read_as(each, replicate)
            scan = AttentionScan(prompt=text, layers=self.layers)
            yield _Wanted(scan, each.name, "attention", replicate, each.n_tokens, n_read)


def _read_as(each: Asked, replicate: int) -> tuple[str, int]:
    """A prompt's text and tokens, or those of the longer text."""
    return (each.longer or "", each.n_longer) if replicate else (each.item.prompt, each.n_tokens)


def _circuit(suite: Suite, each: Asked) -> CircuitScan:
    return CircuitScan(
        prompt=each.item.prompt,
        corrupt_prompt=each.corrupt,
        answer=each.answer_id,
        foil=each.foil_id,
        method=CircuitMethod.FAST if suite.exact else CircuitMethod.ATTRIBUTION_PATCHING,
        exact=suite.exact,
        edges=0,
    )


def _attribution_pair(each: Asked) -> Iterator[_Wanted]:
    """Alone, and in company, a companion of its own among it: one question, added up in two orders."""
    for which, companion in enumerate((None, each.item.prompt)):
        circuit = CircuitScan(
            prompt=each.item.prompt,
            corrupt_prompt=companion,
            answer=each.answer_id,
            foil=each.foil_id,
            method=CircuitMethod.ATTRIBUTION_PATCHING,
            ablation=Ablation.ZERO,
            edges=0,
            canonical=companion is None,
        )
        yield _Wanted(circuit, each.name, "DTI", 1, n_read=each.n_tokens, paired=which)


def _read(each: _Wanted, result: Scanned, numbers: Numbers, suite: Suite) -> None:
    tables = result.tables
    match each.modality:
        case "T2":
            weight_statistics(tables, numbers)
            tensor_statistics(tables, numbers)
        case "fMRI":
            activation_norms(tables, each.prompt, each.n_tokens, numbers)
        case "attention":
            attention_entropies(tables, each.prompt, each.n_tokens, numbers)
        case "FLAIR":
            if Measure.LENS in suite.measures:
                lens_curves(tables, each.prompt, numbers)
            flair_channels(tables, each.prompt, numbers)
        case _:
            attributions(tables, each.prompt, numbers)


def _attribution_noise(
    pairs: Sequence[Numbers], prompts: Sequence[str]
) -> Iterator[tuple[Quantity, Block]]:
    """Both halves of each pair of attributions, as two quantities of the noise."""
    for name, half in zip(("alone", "accompanied"), pairs, strict=True):
        for block in half.blocks(prompts).values():
            yield Quantity(Measure.ATTRIBUTION, name), block
