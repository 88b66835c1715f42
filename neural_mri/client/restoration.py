"""Patching and tracing results as values: what each place restores at each position."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from neural_mri.client.activation_map import value_matrix
from neural_mri.client.colour import Values
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.results import has_foil, provenance_of

__all__ = ("Peak", "Restoration", "RestorationMap")


_NAMES = {
    Kind.RESID_PRE: "residual, before",
    Kind.RESID_POST: "residual, after",
    Kind.MLP: "MLP",
    Kind.ATTN: "attention",
    Kind.HEAD: "heads",
}
"""Of maps, in the order in which they are shown."""


class Peak(NamedTuple):
    """Where a map is largest."""

    component: Component
    position: int
    value: float

    @property
    def place(self) -> str:
        """`layer 3`, or of a head, its label."""
        if self.component.kind is Kind.HEAD:
            return self.component.label
        return f"layer {self.component.layer}"


class RestorationMap(NamedTuple):
    """One kind of place. `values[row position]`; NaN where there is nothing to restore."""

    name: str
    components: tuple[Component, ...]
    """Rows: one a layer, or of heads, one a head of each layer."""
    values: Values

    @property
    def peak(self) -> Peak | None:
        """The largest value; None where there is none."""
        if not np.isfinite(self.values).any():
            return None
        row, column = np.unravel_index(np.nanargmax(self.values), self.values.shape)
        return Peak(self.components[row], int(column), float(self.values[row, column]))


class Restoration(NamedTuple):
    """All maps of a scan, and the two runs that values were carried between."""

    maps: tuple[RestorationMap, ...]
    tokens: tuple[str, ...]
    """The prompt's tokens at the maps' positions."""
    sinks: tuple[bool, ...]
    unit: str
    """Of the maps' values."""
    position: int
    answer: str
    foil: str | None
    clean: float
    """The metric in the clean run."""
    corrupted: float
    metric_unit: str
    probability_clean: float
    probability_corrupted: float
    parameters: Mapping[str, Any]
    """How it was measured: direction, window, subject, draws."""

    @property
    def quantity(self) -> str:
        """What the maps' values are."""
        return "recovery" if "direction" in self.parameters else "indirect effect"

    @classmethod
    def of(cls, maps: pa.Table, contrast: pa.Table, tokens: pa.Table) -> "Restoration":
        """From the tables `recovery` or `trace`, `contrast` and `tokens`."""
        provenance = provenance_of(maps)
        if "quantity" in maps.column_names:
            wanted = [name == "indirect_effect" for name in maps["quantity"].to_pylist()]
            maps = maps.filter(pa.array(wanted))
        asked: dict[str, Any] = contrast.to_pylist()[0]
        positions = provenance.positions or ()
        components = tuple(map(Component.parse, maps["component"].to_pylist()))
        values = value_matrix(maps)
        present = {component.kind for component in components}
        texts, are_sinks = tokens["text"].to_pylist(), tokens["sink"].to_pylist()
        return cls(
            maps=tuple(_map(kind, components, values) for kind in _NAMES if kind in present),
            tokens=tuple(texts[position] for position in positions),
            sinks=tuple(are_sinks[position] for position in positions),
            unit=provenance.unit,
            position=asked["position"],
            answer=asked["answer"],
            foil=asked["foil"] if has_foil(contrast) else None,
            clean=asked["clean"],
            corrupted=asked["corrupted"],
            metric_unit=provenance_of(contrast).unit,
            probability_clean=asked["probability_clean"],
            probability_corrupted=asked["probability_corrupted"],
            parameters=provenance.parameters,
        )


def _map(kind: Kind, components: tuple[Component, ...], values: Values) -> RestorationMap:
    rows = [row for row, component in enumerate(components) if component.kind is kind]
    return RestorationMap(_NAMES[kind], tuple(components[row] for row in rows), values[rows])
