"""An fMRI scan's main table as an array, with the names of its rows and columns."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from neural_mri.client.colour import Scale, Values
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.results import provenance_of

__all__ = ("ActivationMap", "Grid", "Reading", "place_of", "value_matrix")


class Reading(NamedTuple):
    """One component's value at one token."""

    component: Component
    value: float


class Grid(NamedTuple):
    """Layer by component, the picture every modality shares."""

    rows: tuple[str, ...]
    """`H0`, `H1`, ... and last `MLP`."""
    layers: tuple[int, ...]
    values: Values
    """`[row layer]`; NaN where nothing was measured."""


class ActivationMap(NamedTuple):
    """`values[component position]`, in `unit`."""

    components: tuple[Component, ...]
    positions: tuple[int, ...]
    """Token positions of the columns, counted from 0."""
    tokens: tuple[str, ...]
    """Text of the token at each of `positions`."""
    sinks: npt.NDArray[np.bool_]
    """Which of `positions` are attention sinks, left out of colour scales."""
    values: Values
    unit: str

    @classmethod
    def of(cls, activations: pa.Table, tokens: pa.Table) -> "ActivationMap":
        """From an fMRI result's tables `activations` and `tokens`."""
        provenance = provenance_of(activations)
        texts = tokens["text"].to_pylist()
        sinks = tokens["sink"].to_pylist()
        row_of = {position: row for row, position in enumerate(tokens["position"].to_pylist())}
        positions = provenance.positions or ()
        return cls(
            components=tuple(map(Component.parse, activations["component"].to_pylist())),
            positions=positions,
            tokens=tuple(texts[row_of[position]] for position in positions),
            sinks=np.array([sinks[row_of[position]] for position in positions], dtype=bool),
            values=value_matrix(activations),
            unit=provenance.unit,
        )

    def column(self, position: int) -> int:
        """Column of a token position; a negative one counts from the last reported.

        Raises `ValueError` when the scan did not report it.
        """
        return place_of(position, self.positions)

    def hottest(self, kind: Kind, count: int, *, position: int = -1) -> tuple[Reading, ...]:
        """The `count` components of a kind with the largest values at a token, largest first."""
        at = self.values[:, self.column(position)]
        rows = [row for row, component in enumerate(self.components) if component.kind is kind]
        rows = [row for row in rows if np.isfinite(at[row])]
        rows.sort(key=lambda row: -at[row])
        return tuple(Reading(self.components[row], float(at[row])) for row in rows[:count])

    def grid(self, position: int = -1) -> Grid:
        """Heads and MLPs of every layer at one token."""
        return heads_and_mlps(self.components, self.values[:, self.column(position)])

    def by_token(self, kind: Kind) -> Grid:
        """One row a layer for components of which a layer has one (`mlp`, `attn`): `[layer position]`.

        Rows are named by layer, columns by token position.
        """
        rows = [row for row, component in enumerate(self.components) if component.kind is kind]
        names = tuple(f"L{self.components[row].layer}" for row in rows)
        return Grid(names, self.positions, self.values[rows])

    def scale(self, *, logarithmic: bool = True) -> Scale:
        """Colour limits for heads and MLPs over all tokens that are no sinks."""
        counted = self.values if self.sinks.all() else self.values[:, ~self.sinks]
        of_kind = (
            counted[
                [row for row, component in enumerate(self.components) if component.kind is kind]
            ]
            for kind in (Kind.HEAD, Kind.ATTN, Kind.MLP)
        )
        return Scale.of(*of_kind, logarithmic=logarithmic)


def place_of(position: int, reported: Sequence[int]) -> int:
    """Where a token position stands among the reported ones; a negative one counts from the last of them.

    Raises `ValueError` when the scan did not report it.
    """
    if -len(reported) <= position < 0:
        return len(reported) + position
    if position in reported:
        return reported.index(position)
    raise ValueError(
        f"position {position} was not reported: expected one of {list(reported)}, or "
        f"{-len(reported)} to -1"
    )


def heads_and_mlps(components: tuple[Component, ...], values: Values) -> Grid:
    """One value a component, laid out by layer; other kinds of component are passed over."""
    return by_layer(components, values, (Kind.HEAD, Kind.MLP))


def by_layer(components: tuple[Component, ...], values: Values, kinds: tuple[Kind, ...]) -> Grid:
    """One value a component of these kinds, laid out by layer: a row a head, then one a kind."""
    shown = [
        (component, float(value))
        for component, value in zip(components, values, strict=True)
        if component.kind in kinds
    ]
    layers = sorted({component.layer for component, _ in shown if component.layer is not None})
    n_heads = 1 + max(
        (component.index for component, _ in shown if component.index is not None), default=-1
    )
    present = {component.kind for component, _ in shown}
    others: list[Kind] = [kind for kind in kinds if kind in present and kind is not Kind.HEAD]
    rows = (
        *(f"H{head}" for head in range(n_heads)),
        *("MLP" if kind is Kind.MLP else kind.value for kind in others),
    )
    column = {layer: at for at, layer in enumerate(layers)}
    grid = np.full((len(rows), len(layers)), np.nan, dtype=np.float32)
    for component, value in shown:
        row = (
            component.index
            if component.index is not None
            else n_heads + others.index(component.kind)
        )
        grid[row, column[component.layer or 0]] = value
    return Grid(rows, tuple(layers), grid)


def value_matrix(table: pa.Table) -> Values:
    """The `value` column of a table, one row a row: `[row value]`, float32."""
    column = table["value"].combine_chunks()
    width = column.type.list_size
    flat: Values = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(table), width)
