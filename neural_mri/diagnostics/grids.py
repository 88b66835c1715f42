"""The numbers behind a report's pictures."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.findings import Grid, Trajectory
from neural_mri.contract.suites import Measure, Suite
from neural_mri.diagnostics.comparison import Comparison
from neural_mri.diagnostics.outcomes import oriented
from neural_mri.diagnostics.records import Quantity, Record

__all__ = ("grids", "trajectories")

MOST_NOISE = 1e6
"""Beyond it, more is only more of the same."""


def grids(suite: Suite, record: Record, comparison: Comparison | None) -> Iterator[Grid]:
    """Where answers are carried; and where the candidate left the noise, and how far."""
    for tested in () if comparison is None else comparison.tested:
        if tested.quantity not in (
            Quantity(Measure.NORMS, "l2_norm"),
            Quantity(Measure.ATTENTION, "entropy"),
        ):
            continue
        ratio = np.clip(tested.effect / tested.noise, 1e-3, MOST_NOISE)
        name = f"{tested.quantity.measure.value} change"
        marked = () if tested.origin is None else (tested.components[tested.origin],)
        yield _grid(name, "times noise", record, tested.components, ratio, marked)
    block = record.block(Measure.ATTRIBUTION, "effect")
    if block is not None:
        effects = [
            oriented(case, mine) / _size(mine.values)
            for case in suite.cases
            if (mine := block.of_case(case.id)).prompts
        ]
        with np.errstate(invalid="ignore"):  # infinity less infinity: a cell that is not known
            mean = np.concatenate(effects).mean(0)
        yield _grid(
            "attribution", "of the prompt's largest effect", record, block.components, mean, ()
        )


def _size(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Each prompt's largest finite effect, so that every prompt counts alike."""
    known = np.where(np.isfinite(values), values, 0.0)
    largest = np.abs(known.astype(np.float64)).max(1, keepdims=True)
    found: npt.NDArray[np.float64] = np.where(largest > 0, largest, 1.0)
    return found


def _grid(
    name: str,
    unit: str,
    record: Record,
    components: tuple[str, ...],
    values: npt.NDArray[np.float64],
    marked: tuple[str, ...],
) -> Grid:
    subject = record.subject
    with_mlp = any(name.endswith(".mlp") for name in components)
    columns = [f"H{head}" for head in range(subject.n_heads)] + (["MLP"] if with_mlp else [])
    cells: list[list[float | None]] = [[None] * len(columns) for _ in range(subject.n_layers)]
    points = []
    for address, value in zip(components, values, strict=True):
        place = Component.parse(address)
        if place.layer is None:
            continue
        if place.kind is Kind.HEAD:
            column = place.index or 0
        elif place.kind is Kind.MLP:
            column = subject.n_heads
        else:
            continue
        cells[place.layer][column] = float(value) if np.isfinite(value) else None
        if address in marked:
            points.append((place.layer, column))
    return Grid(
        name=name,
        unit=unit,
        columns=tuple(columns),
        rows=tuple(map(tuple, cells)),
        marked=tuple(points),
    )


def trajectories(candidate: Record, baseline: Record | None) -> Iterator[Trajectory]:
    """The lens's way to the answer, of each record: median and quartiles over prompts."""
    for who, record in (("candidate", candidate), ("baseline", baseline)):
        if record is None:
            continue
        for name in ("kl", "answer_log_probability"):
            block = record.block(Measure.LENS, name)
            if block is None:
                continue
            quartiles = np.nanpercentile(block.values.astype(np.float64), (25, 50, 75), axis=0)
            low, median, high = (tuple(map(_known, line)) for line in quartiles)
            yield Trajectory(name=f"{who} {name}", unit="nats", median=median, low=low, high=high)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
