"""Activation patching and causal tracing in short: where each map peaks."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec
import pyarrow as pa

from neural_mri.contract.components import Kind
from neural_mri.contract.perturbations import Direction
from neural_mri.contract.results import has_foil, provenance_of
from neural_mri.contract.summaries.base import (
    Measured,
    NamedToken,
    Stored,
    SummaryBase,
    Values,
    only,
    records,
    rows,
)

__all__ = (
    "CELLS_INLINE",
    "PATCHING_TABLES",
    "TRACING_TABLES",
    "PatchingSummary",
    "TracingSummary",
    "patching_summary",
    "tracing_summary",
)

PATCHING_TABLES = ("recovery", "contrast")
TRACING_TABLES = ("trace", "contrast")

CELLS_INLINE = 10_000
"""Maps of more cells than this, all together, are fetched by URL."""


class Contrast(msgspec.Struct, frozen=True, kw_only=True):
    """The two runs that values are carried between."""

    position: int
    """Whose next token is asked about; maps end there."""
    answer: NamedToken
    foil: NamedToken | None
    unit: str
    """`logits` with a foil: logit(answer) - logit(foil). `nats` without: log p(answer)."""
    clean: Measured
    corrupted: Measured
    corrupted_sd: Measured
    """Spread over draws of noise; null for a single corrupted run."""
    prob_clean: Measured
    """Of the answer."""
    prob_corrupted: Measured
    prob_corrupted_sd: Measured


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One place at one token."""

    component: str
    position: int
    token: str
    value: Measured
    sd: Measured
    """Spread over draws of noise; null for a single one."""


class PlaceMap(msgspec.Struct, frozen=True, kw_only=True):
    """A layer x position map of one sort of place."""

    peak: Cell | None
    """Where the patched run is farthest from the run that was patched, towards the other one; null where
    nothing is defined."""
    values: dict[str, Values] | None
    """A value a token, by component; null where the maps are large: the table has them."""


class PatchingSummary(SummaryBase, frozen=True, kw_only=True, tag="patching"):
    """Activation patching: (patched - corrupted) / (clean - corrupted) of the metric."""

    direction: Direction
    contrast: Contrast
    maps: dict[Kind, PlaceMap]
    """By what was patched. 0 is the corrupted run, 1 the clean one."""


class TracingSummary(SummaryBase, frozen=True, kw_only=True, tag="tracing"):
    """Causal tracing: what putting clean values back into the noised run restores."""

    subject_positions: tuple[int, ...]
    """Tokens whose embeddings were noised."""
    noise_sd: float
    """Standard deviation of the noise, as the model reads embeddings."""
    draws: int
    contrast: Contrast
    maps: dict[Kind, PlaceMap]
    """By what was restored: `resid_post` is a layer's state; `attn` and `mlp` are windows of layers.
    Values are indirect effects, means over draws."""


def patching_summary(stored: Stored) -> PatchingSummary:
    """From `recovery` and `contrast`."""
    table = stored.tables["recovery"]
    direction = Direction(stored.manifest.request["direction"])
    # Corrupted values in the clean run take the answer away: that peak is the lowest recovery.
    sign = 1.0 if direction is Direction.DENOISING else -1.0
    return PatchingSummary(
        **stored.shared(table),
        direction=direction,
        contrast=_contrast(stored.tables["contrast"]),
        maps=_maps(stored, table, sign, {}),
    )


def tracing_summary(stored: Stored) -> TracingSummary:
    """From `trace` and `contrast`."""
    table = stored.tables["trace"]
    facts = provenance_of(table).parameters
    spread = dict(rows(only(table, "quantity", "sd"), "component", "value"))
    return TracingSummary(
        **stored.shared(table),
        subject_positions=tuple(facts["subject"]),
        noise_sd=facts["noise_sd"],
        draws=facts["draws"],
        contrast=_contrast(stored.tables["contrast"]),
        maps=_maps(stored, only(table, "quantity", "indirect_effect"), 1.0, spread),
    )


def _contrast(table: pa.Table) -> Contrast:
    (row,) = records(table)
    return Contrast(
        position=row["position"],
        answer=NamedToken(token=row["answer"], token_id=row["answer_id"]),
        foil=NamedToken(token=row["foil"], token_id=row["foil_id"]) if has_foil(table) else None,
        unit=provenance_of(table).unit,
        clean=row["clean"],
        corrupted=row["corrupted"],
        corrupted_sd=row["corrupted_sd"],
        prob_clean=row["probability_clean"],
        prob_corrupted=row["probability_corrupted"],
        prob_corrupted_sd=row["probability_corrupted_sd"],
    )


class _Found(NamedTuple):
    """A cell's value, and where it stands."""

    value: float
    component: str
    position: int


def _maps(
    stored: Stored, table: pa.Table, sign: float, spread: Mapping[str, list[float]]
) -> dict[Kind, PlaceMap]:
    values: defaultdict[Kind, dict[str, Values]] = defaultdict(dict)
    for component, kind, of_tokens in rows(table, "component", "kind", "value"):
        values[Kind(kind)][component] = tuple(of_tokens)
    n_cells = sum(len(row) for places in values.values() for row in places.values())
    return {
        kind: PlaceMap(
            peak=_peak(stored, places, sign, spread),
            values=places if n_cells <= CELLS_INLINE else None,
        )
        for kind, places in values.items()
    }


def _peak(
    stored: Stored,
    places: Mapping[str, Values],
    sign: float,
    spread: Mapping[str, list[float]],
) -> Cell | None:
    found = max(_defined(places), key=lambda cell: sign * cell.value, default=None)
    if found is None:
        return None
    of_draws = spread.get(found.component)
    return Cell(
        component=found.component,
        position=found.position,
        token=stored.manifest.prompt_tokens[found.position],
        value=found.value,
        sd=None if of_draws is None else of_draws[found.position],
    )


def _defined(places: Mapping[str, Values]) -> Iterator[_Found]:
    for component, values in places.items():
        for position, value in enumerate(values):
            if value is not None and not math.isnan(value):
                yield _Found(value, component, position)
