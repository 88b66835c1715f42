"""A T2 scan's tables as values: how large each component's weights are, and which lie far out."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from neural_mri.client.activation_map import Grid, heads_and_mlps
from neural_mri.client.colour import Values
from neural_mri.contract.components import Component
from neural_mri.contract.results import provenance_of

__all__ = ("Outlier", "WeightMap")


class Outlier(NamedTuple):
    """One weight that lies far from the mean of its tensor."""

    component: str
    role: str
    row: int
    column: int
    """-1 in a vector."""
    value: float
    z: float
    """Standard deviations from the tensor's mean."""

    @property
    def place(self) -> str:
        """`blocks.1.mlp W_out[507, 12]`."""
        at = f"{self.row}" if self.column < 0 else f"{self.row}, {self.column}"
        return f"{self.component} {self.role}[{at}]"


class WeightMap(NamedTuple):
    """One value a component; NaN where it has no such weights."""

    components: tuple[Component, ...]
    rms: Values
    outlier_share: Values
    """Share of weights beyond `outlier_sigma` standard deviations from their tensor's mean."""
    outlier_sigma: float
    copying: Values
    """Of each head's OV circuit: -1 to 1."""
    outliers: tuple[Outlier, ...]
    """The farthest first."""
    relative_change: Values | None
    """Norm of the difference over the baseline's norm, where there is a baseline."""
    baseline: str | None

    @classmethod
    def of(
        cls,
        weights: pa.Table,
        circuits: pa.Table,
        outliers: pa.Table,
        difference: pa.Table | None,
    ) -> "WeightMap":
        """From a T2 result's tables."""
        addresses = weights["component"].to_pylist()
        provenance = provenance_of(weights)
        copying = {
            row["component"]: row["copying"]
            for row in circuits.select(["component", "circuit", "copying"]).to_pylist()
            if row["circuit"] == "OV"
        }
        farthest = [
            Outlier(*(row[name] for name in Outlier._fields)) for row in outliers.to_pylist()
        ]
        farthest.sort(key=lambda outlier: -abs(outlier.z))
        change = None
        if difference is not None:
            relative = dict(
                zip(
                    difference["component"].to_pylist(),
                    difference["relative"].to_pylist(),
                    strict=True,
                )
            )
            change = _column([relative.get(address, np.nan) for address in addresses])
        return cls(
            components=tuple(map(Component.parse, addresses)),
            rms=_column(weights["rms"].to_pylist()),
            outlier_share=_column(weights["outlier_share"].to_pylist()),
            outlier_sigma=provenance.parameters["outlier_sigma"],
            copying=_column([copying.get(address, np.nan) for address in addresses]),
            outliers=tuple(farthest),
            relative_change=change,
            baseline=provenance.parameters.get("baseline"),
        )

    def grid(self, values: Values) -> Grid:
        """One of the columns by layer: a row a head, and last the MLPs."""
        return heads_and_mlps(self.components, values)


def _column(values: list[float]) -> Values:
    column: Values = np.array(values, dtype=np.float32)
    return column
