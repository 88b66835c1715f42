"""Candidate against baseline: what changed by more than rounding, component by component.

Each measure has a distance between two readings of one prompt. Its noise is the same distance between two
readings of one checkpoint that differ in nothing but the order of additions, as the baseline's record holds
them. A component's statistic is its distance over its own noise; how large noise alone makes it is read off
the tail of all noise (`statistics.Tail`); and all components of all measures are judged together (Holm), so
that `alpha` is the chance of any false alarm in a whole comparison.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from neural_mri.contract.baselines import check_comparable
from neural_mri.contract.components import Component
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.suites import Measure, Suite, Verdict
from neural_mri.diagnostics.outcomes import rightly
from neural_mri.diagnostics.reading import causal_place
from neural_mri.diagnostics.records import Block, Quantity, Record
from neural_mri.diagnostics.statistics import Tail, holm, mcnemar, rank_correlation

__all__ = ("Comparison", "ScoreChange", "Tested", "compare")

Doubles = npt.NDArray[np.float64]

RESOLUTION = 2.0**-22
"""Two units in the last place of float32: below it nothing can be told apart, whatever the noise run says."""

UNBOUNDED = 1e30
"""The distance of a number from what is none: JSON has no word for infinity."""

_COMPARED = (
    Quantity(Measure.NORMS, "l2_norm"),
    Quantity(Measure.ATTENTION, "entropy"),
    Quantity(Measure.LENS, "kl"),
    Quantity(Measure.LENS, "answer_log_probability"),
    Quantity(Measure.ATTRIBUTION, "ranks"),
    Quantity(Measure.ATTRIBUTION, "estimate"),
    Quantity(Measure.RISK, "entropy"),
    Quantity(Measure.RISK, "gain"),
    Quantity(Measure.SCORES, "margin"),
    Quantity(Measure.SCORES, "answer_log_probability"),
)

UNITS: Mapping[Quantity, str] = {
    Quantity(Measure.NORMS, "l2_norm"): "relative",
    Quantity(Measure.ATTENTION, "entropy"): "share of log keys",
    Quantity(Measure.LENS, "kl"): "nats",
    Quantity(Measure.LENS, "answer_log_probability"): "nats",
    Quantity(Measure.ATTRIBUTION, "ranks"): "1 - rank correlation",
    Quantity(Measure.ATTRIBUTION, "estimate"): "of the prompt's RMS",
    Quantity(Measure.RISK, "entropy"): "nats",
    Quantity(Measure.RISK, "gain"): "nats",
    Quantity(Measure.SCORES, "margin"): "nats",
    Quantity(Measure.SCORES, "answer_log_probability"): "nats",
}


class Tested(NamedTuple):
    """One quantity, its components judged."""

    quantity: Quantity
    unit: str
    components: tuple[str, ...]
    prompts: tuple[str, ...]
    distances: Doubles
    """Signed, `[prompt, component]`, candidate minus baseline in the quantity's unit."""
    effect: Doubles
    """RMS over prompts, by component."""
    noise: Doubles
    """What noise alone makes of it, the margin included."""
    raw: Doubles
    """p-values by component, not adjusted."""
    adjusted: Doubles
    tolerance: float
    alpha: float

    @property
    def changed(self) -> npt.NDArray[np.intp]:
        """Components that changed by more than noise and tolerance allow, in order of computation."""
        beyond = (self.adjusted < self.alpha) & (self.effect > self.tolerance)
        return np.flatnonzero(beyond)

    @property
    def beyond_noise(self) -> npt.NDArray[np.intp]:
        """Components that changed by more than noise allows, tolerated or not: a change may begin small."""
        return np.flatnonzero(self.adjusted < self.alpha)

    @property
    def origin(self) -> int | None:
        """The first place beyond noise; of several computed at once, the one that changed most.

        None where nothing changed by more than is tolerated.
        """
        if not len(self.changed):
            return None
        steps = {int(index): self.step(int(index)) for index in self.beyond_noise}
        first = min(steps.values())
        return max(
            (index for index, step in steps.items() if step == first),
            key=lambda index: self.effect[index],
        )

    def step(self, index: int) -> tuple[int, int]:
        """When a component is computed: heads of one layer have the same step."""
        return causal_place(Component.parse(self.components[index]))[:2]


class ScoreChange(NamedTuple):
    """One case's prompts, answered rightly before and after."""

    case: str
    before: npt.NDArray[np.bool_]
    after: npt.NDArray[np.bool_]
    p_value: float
    """McNemar's, adjusted over cases."""


class WeightChange(NamedTuple):
    """A component or tensor whose statistics differ. Weights have no noise: equal files give equal numbers."""

    name: str
    relative: float
    """The largest relative difference of its statistics."""
    statistic: str


class Comparison(NamedTuple):
    """Everything that was tested."""

    tested: tuple[Tested, ...]
    scores: tuple[ScoreChange, ...]
    weights: tuple[WeightChange, ...]
    """Changed ones alone, most changed first."""
    n_weights: int
    n_tests: int


def compare(
    suite: Suite, candidate: Record, baseline: Record, *, profile: str | None = None
) -> Comparison:
    """Judge everything that both records hold.

    Raises `NotComparable` where something beside the weights differs, `Unprocessable` where the records
    are not of this suite or the baseline has no noise measured of what a gate asks for.
    """
    check_comparable(candidate.subject, baseline.subject)
    for record in (candidate, baseline):
        if record.suite_digest != suite.digest:
            raise Unprocessable(
                f"the record of {record.subject.model} is of suite {record.suite} "
                f"{record.suite_version} ({record.suite_digest[:12]}), not of {suite.name} "
                f"{suite.version} ({suite.digest[:12]})"
            )
    if not baseline.with_noise and set(suite.measures) != {Measure.WEIGHTS}:
        raise Unprocessable(
            f"the record of {baseline.subject.model} has no noise measured, so nothing can be told from "
            "rounding: measure it as a baseline"
        )
    tested = list(_tests(suite, candidate, baseline, profile))
    adjusted = holm(np.concatenate([np.empty(0), *(each.raw for each in tested)]))
    ends = np.cumsum([len(each.raw) for each in tested], dtype=np.intp)
    judged = tuple(
        each._replace(adjusted=adjusted[end - len(each.raw) : end])
        for each, end in zip(tested, ends, strict=True)
    )
    weights, n_weights = _weights(
        candidate, baseline, suite.gate(Measure.WEIGHTS, profile).tolerance
    )
    return Comparison(
        judged, _scores(suite, candidate, baseline), weights, n_weights, len(adjusted)
    )


def _tests(
    suite: Suite, candidate: Record, baseline: Record, profile: str | None
) -> Iterator[Tested]:
    for quantity in _COMPARED:
        if quantity.measure not in suite.measures:
            continue  # one scan may measure more than was asked for
        here, there = _block(candidate, quantity), _block(baseline, quantity)
        if here is None and there is None:
            continue  # nothing to measure, as where no prompt has a corrupt one
        if (
            here is None
            or there is None
            or here.components != there.components
            or set(here.prompts) != set(there.prompts)
        ):
            raise Unprocessable(
                f"{quantity.measure.value} of the two records are not of the same components and prompts"
            )
        gate = suite.gate(quantity.measure, profile)
        again = _noise_pair(baseline, quantity)
        if again is None:
            if gate.verdict is Verdict.IGNORE:
                continue
            raise Unprocessable(_without_noise(quantity, baseline))
        measured = _distances(quantity, here.rows(there.prompts), there.values)
        noise = np.abs(_distances(quantity, again.second, again.first))
        floor = _floor(quantity, there.values, baseline.subject.n_layers)
        scale = _scale(noise, floor) * suite.noise_margin
        # Each prompt's noise is judged by the others': a scale that knew it would call it small.
        known = np.concatenate([_left_out(noise, row, floor) for row in range(len(noise))])
        effect = np.sqrt((measured * measured).mean(0))
        tail = Tail.of(known)
        yield Tested(
            quantity=quantity,
            unit=UNITS[quantity],
            components=_names(quantity, there.components),
            prompts=there.prompts,
            distances=measured,
            effect=effect,
            noise=scale,
            raw=tail.p_values(effect / scale),
            adjusted=np.empty(0),
            tolerance=gate.tolerance,
            alpha=suite.alpha,
        )


def _without_noise(quantity: Quantity, baseline: Record) -> str:
    measure = quantity.measure.value
    return (
        f"the record of {baseline.subject.model} has no noise of {measure}, so that its gate cannot be judged: none "
        f"of the prompts read for {measure} keeps its tokens where text follows, or the record is of an earlier "
        f"version. Delete {baseline.key}.arrow and measure it again, raise `attention_prompts`, or have the verdict "
        "of that gate be `ignore`"
    )


class _Pair(NamedTuple):
    first: npt.NDArray[np.float32]
    second: npt.NDArray[np.float32]


def _block(record: Record, quantity: Quantity) -> Block | None:
    if quantity.name == "ranks":
        return record.block(Measure.ATTRIBUTION, "estimate")
    return record.blocks.get(quantity)


def _noise_pair(record: Record, quantity: Quantity) -> _Pair | None:
    """The same numbers twice, of the prompts on which noise was measured."""
    if quantity.measure is Measure.ATTRIBUTION:
        alone = record.noise.get(Quantity(Measure.ATTRIBUTION, "alone"))
        accompanied = record.noise.get(Quantity(Measure.ATTRIBUTION, "accompanied"))
        if alone is None or accompanied is None:
            return None
        return _Pair(alone.values, accompanied.rows(alone.prompts))
    again, block = record.noise.get(quantity), record.blocks.get(quantity)
    if again is None or block is None:
        return None
    shared = tuple(prompt for prompt in again.prompts if prompt in set(block.prompts))
    if not shared:
        return None
    return _Pair(block.rows(shared), again.rows(shared))


def _distances(
    quantity: Quantity, here: npt.NDArray[np.float32], there: npt.NDArray[np.float32]
) -> Doubles:
    """What lies between two readings, `[prompt, component]`, signed where that means something.

    Two that are no number are the same; from a number to what is none there is no bound.
    """
    a, b = here.astype(np.float64), there.astype(np.float64)
    apart = (np.isnan(a) != np.isnan(b)) | (np.isinf(a) != np.isinf(b))
    if quantity.name == "ranks":
        apart = apart.any(1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinity less infinity
        found = _differences(quantity, a, b)
    finite = np.nan_to_num(found, nan=0.0, posinf=UNBOUNDED, neginf=-UNBOUNDED)
    return np.where(apart, UNBOUNDED, finite)


def _differences(quantity: Quantity, a: Doubles, b: Doubles) -> Doubles:
    if quantity.measure is Measure.NORMS:
        larger = np.maximum(np.abs(a), np.abs(b))
        found: Doubles = np.where(larger > 0, (a - b) / np.where(larger > 0, larger, 1.0), 0.0)
        return found
    if quantity.name == "ranks":
        ranked: Doubles = 1 - rank_correlation(a, b)[:, None]
        return ranked
    if quantity.measure is Measure.ATTRIBUTION:
        size = np.sqrt(np.nan_to_num(b * b).mean(1, keepdims=True))
        scaled: Doubles = (a - b) / np.where(size > 0, size, 1.0)
        return scaled
    plain: Doubles = a - b
    return plain


def _floor(quantity: Quantity, values: npt.NDArray[np.float32], n_layers: int) -> float:
    """What rounding may do at the least, whatever a noise run of a few prompts has seen."""
    if quantity.name == "estimate":
        # A gradient is added up through every layer, and back.
        return RESOLUTION * n_layers
    if quantity.measure in (Measure.NORMS, Measure.ATTRIBUTION):
        return RESOLUTION
    finite = np.abs(values[np.isfinite(values)])
    return RESOLUTION * (max(1.0, float(np.median(finite))) if len(finite) else 1.0)


def _scale(noise: Doubles, floor: float) -> Doubles:
    """RMS of each component's noise, and never less than that of a component in the middle."""
    own = np.sqrt((noise * noise).mean(0))
    scale: Doubles = np.maximum(np.maximum(own, np.median(own)), floor)
    return scale


def _left_out(noise: Doubles, row: int, floor: float) -> Doubles:
    """A prompt's noise over the scale of the others'."""
    others = np.delete(noise, row, axis=0)
    found: Doubles = np.maximum(noise[row], floor) / _scale(others if len(others) else noise, floor)
    return found


def _names(quantity: Quantity, components: tuple[str, ...]) -> tuple[str, ...]:
    return ("",) if quantity.name == "ranks" else components


def _scores(suite: Suite, candidate: Record, baseline: Record) -> tuple[ScoreChange, ...]:
    found = []
    for case in suite.cases if Measure.SCORES in suite.measures else ():
        after, before = rightly(case, candidate), rightly(case, baseline)
        if after is None or before is None:
            continue
        found.append(ScoreChange(case.id, before, after, mcnemar(before, after)))
    adjusted = holm([each.p_value for each in found]) if found else ()
    return tuple(each._replace(p_value=float(p)) for each, p in zip(found, adjusted, strict=True))


def _weights(
    candidate: Record, baseline: Record, tolerance: float
) -> tuple[tuple[WeightChange, ...], int]:
    """Components and tensors with any statistic that differs by more than is tolerated; of all, how many."""
    changes: dict[str, WeightChange] = {}
    names: set[str] = set()
    for quantity, block in baseline.blocks.items():
        other = candidate.blocks.get(quantity)
        if quantity.measure is not Measure.WEIGHTS or other is None:
            continue
        if other.components != block.components:
            raise Unprocessable("the two checkpoints have other tensors: they cannot be compared")
        names.update(block.components)
        a, b = other.values[0].astype(np.float64), block.values[0].astype(np.float64)
        differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
        for index in np.flatnonzero(differs):
            size = max(abs(a[index]), abs(b[index]))
            relative = abs(a[index] - b[index]) / size if np.isfinite(size) and size else 1.0
            relative = float(relative) if np.isfinite(relative) else 1.0
            if relative <= tolerance:
                continue
            name = block.components[index]
            if name not in changes or relative > changes[name].relative:
                changes[name] = WeightChange(name, relative, quantity.name)
    ordered = sorted(changes.values(), key=lambda change: -change.relative)
    return tuple(ordered), len(names)
