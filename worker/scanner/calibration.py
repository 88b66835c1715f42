"""What scans of a model are read against: a value that is measured once and stored with the model.

`calibrating` measures it. Its tables stand for it exactly: what is read back gives the same digits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.anomalies import Lens
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import Conflict
from neural_mri.contract.results import (
    build,
    component_columns,
    positions_column,
    provenance_of,
)
from neural_mri.contract.scans import reporting_order
from worker.scanner.channels import LensSet
from worker.scanner.lens_maps import Affine, support_layers
from worker.scanner.ordinary import Ordinary
from worker.scanner.prompts import finished
from worker.scanner.references import ReferenceMeans
from worker.scanner.residuals import inner_places, outer_places

__all__ = ("QUANTILE_LEVELS", "Calibration")

QUANTILE_LEVELS = tuple(level / 100 for level in range(101))
"""Levels of `activation_quantiles`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """A model's calibration. On the CPU, float32."""

    architecture: Architecture
    """Whose it is."""
    source: str
    """`sampled` from the model, or given `texts`."""
    seed: int
    n_tokens: int
    bias: Affine
    """At `outer_places`, the last excepted, then at `inner_places`."""
    support: Affine
    """Ridge maps after each of `support_layers`."""
    ridge: Affine | None
    """As `bias`, where it was asked for."""
    means: ReferenceMeans
    activation_quantiles: Float[Tensor, "component level"]
    """Quantiles over positions 1 and later of the L2 norm of what each component writes, in reporting
    order."""
    ordinary: Mapping[Lens, Mapping[str, Ordinary]]
    """Channels of FLAIR by lens."""

    def lenses(self, lens: Lens) -> LensSet:
        """The maps of a scan with that lens. Raises `Conflict` for one that was not fitted."""
        if lens is Lens.RAW:
            return LensSet(None, None, self.support)
        affine = self.bias if lens is Lens.BIAS else self.ridge
        if affine is None:
            raise Conflict(
                "the ridge lens of this model is not fitted: calibrate it with lens 'ridge'"
            )
        n_layers = len(affine.bias) // 2
        return LensSet(
            _rows(affine, slice(n_layers)), _rows(affine, slice(n_layers, None)), self.support
        )

    def percentile(
        self, values: Float[Tensor, "component pos"], components: Sequence[Component]
    ) -> Float[Tensor, "component pos"]:
        """Share of reference positions at which each of the components was less active, to the hundredth."""
        known = self.activation_quantiles
        # All of them, in order, is what is asked most: there is nothing to look up.
        if len(components) < len(known):
            rows = _row_of(self.architecture)
            known = known[[rows[component] for component in components]]
        below = torch.searchsorted(known, values.contiguous())
        return (below - 1).clamp_min_(0).float() / (len(QUANTILE_LEVELS) - 1)

    def to_tables(self) -> dict[str, pa.Table]:
        """Arrow tables by name, saying what they are."""
        shape = self.architecture
        lenses = {"bias": self.bias, "support": self.support}
        if self.ridge is not None:
            lenses["ridge"] = self.ridge
        return {
            "calibration_lens": self._finished(
                _biases(lenses, shape), "calibration_lens", "residual"
            ),
            "calibration_matrix": self._finished(
                _matrices(lenses, shape), "calibration_matrix", "residual"
            ),
            "calibration_means": self._finished(
                _means(self.means), "calibration_means", "activation"
            ),
            "calibration_activity": self._finished(
                build(
                    "calibration_activity",
                    component_columns(reporting_order(shape)),
                    _value(self.activation_quantiles),
                ),
                "calibration_activity",
                "L2 norm",
            ),
            "calibration_ordinary": self._finished(
                _ordinary(self.ordinary), "calibration_ordinary", "nats"
            ),
        }

    def _finished(self, table: pa.Table, schema: str, unit: str) -> pa.Table:
        return finished(
            table,
            schema,
            unit=unit,
            method="one pass over reference text, positions 1 and later",
            source=self.source,
            seed=self.seed,
            n_tokens=self.n_tokens,
            n_positions=self.means.n_positions,
        )

    @classmethod
    def from_tables(
        cls, tables: Mapping[str, pa.Table], architecture: Architecture
    ) -> "Calibration":
        """The value that `to_tables` wrote. Raises `ValueError` for tables of a newer major version."""
        facts: Mapping[str, Any] = {}
        for table in tables.values():
            facts = provenance_of(table).parameters
        lenses = _read_lenses(tables["calibration_lens"], tables["calibration_matrix"])
        return cls(
            architecture=architecture,
            source=facts["source"],
            seed=facts["seed"],
            n_tokens=facts["n_tokens"],
            bias=lenses["bias"],
            support=lenses["support"],
            ridge=lenses.get("ridge"),
            means=_read_means(tables["calibration_means"], architecture, facts["n_positions"]),
            activation_quantiles=_values(tables["calibration_activity"]),
            ordinary=_read_ordinary(tables["calibration_ordinary"]),
        )


@lru_cache(maxsize=32)
def _row_of(shape: Architecture) -> Mapping[Component, int]:
    return {component: row for row, component in enumerate(reporting_order(shape))}


def _rows(affine: Affine, rows: slice) -> Affine:
    return Affine(affine.bias[rows], None if affine.matrix is None else affine.matrix[rows])


def _value(rows: Float[Tensor, "row width"]) -> tuple[pa.Field, pa.Array]:
    return positions_column(pa.array(rows.reshape(-1).numpy()), rows.shape[1])


def _values(table: pa.Table) -> Float[Tensor, "row width"]:
    """The `value` column, copied: what is read lives in memory that belongs to somebody else."""
    column = table["value"].combine_chunks()
    width: int = column.type.list_size
    return torch.tensor(column.flatten().to_numpy()).view(-1, width)


def _places(lens: str, shape: Architecture) -> tuple[Component, ...]:
    if lens == "support":
        return tuple(Component(Kind.RESID_POST, layer) for layer in support_layers(shape.n_layers))
    return (*outer_places(shape.n_layers)[:-1], *inner_places(shape.n_layers))


def _lens_columns(lenses: Mapping[str, Affine], shape: Architecture) -> dict[str, pa.Array]:
    places = [(lens, place) for lens in lenses for place in _places(lens, shape)]
    return {
        "lens": pa.array([lens for lens, _ in places], pa.string()),
        **component_columns([place for _, place in places]),
    }


def _biases(lenses: Mapping[str, Affine], shape: Architecture) -> pa.Table:
    rows = torch.cat([affine.bias for affine in lenses.values()])
    return build("calibration_lens", _lens_columns(lenses, shape), _value(rows))


def _matrices(lenses: Mapping[str, Affine], shape: Architecture) -> pa.Table:
    fitted = {lens: a.matrix for lens, a in lenses.items() if a.matrix is not None}
    rows = torch.cat([matrix.flatten(1) for matrix in fitted.values()])
    columns = _lens_columns({lens: lenses[lens] for lens in fitted}, shape)
    return build("calibration_matrix", columns, _value(rows))


def _read_lenses(biases: pa.Table, matrices: pa.Table) -> dict[str, Affine]:
    bias_rows, matrix_rows = _values(biases), _values(matrices)
    d_model = bias_rows.shape[1]
    found = {}
    for lens in dict.fromkeys(biases["lens"].to_pylist()):
        bias = bias_rows[_where(biases, lens=lens)]
        matrix = matrix_rows[_where(matrices, lens=lens)]
        found[lens] = Affine(bias, matrix.view(-1, d_model, d_model) if len(matrix) else None)
    return found


def _where(table: pa.Table, **values: str) -> list[int]:
    """The rows in which the columns have those values."""
    columns = [table[name].to_pylist() for name in values]
    wanted = tuple(values.values())
    return [row for row, found in enumerate(zip(*columns, strict=True)) if found == wanted]


_PARTS = {
    "z": Kind.HEAD,
    "hidden": Kind.MLP,
    "attn": Kind.ATTN,
    "mlp": Kind.MLP,
    "resid_pre": Kind.RESID_PRE,
    "resid_post": Kind.RESID_POST,
}
"""Fields of `ReferenceMeans`, and the components that they are of."""


def _means(means: ReferenceMeans) -> pa.Table:
    components, parts, rows = [], [], []
    for part, kind in _PARTS.items():
        for layer, value in enumerate(getattr(means, part)):
            vectors = value if kind is Kind.HEAD else value.unsqueeze(0)
            for index, vector in enumerate(vectors):
                components.append(Component(kind, layer, index if kind is Kind.HEAD else None))
                parts.append(part)
                rows.append(vector.numpy())
    columns = component_columns(components)
    columns["part"] = pa.array(parts, pa.string())
    item = pa.field("item", pa.float32(), nullable=False)
    columns["mean"] = pa.array(rows, pa.list_(item))
    return build("calibration_means", columns)


def _read_means(table: pa.Table, shape: Architecture, n_positions: int) -> ReferenceMeans:
    flat, offsets = table["mean"].combine_chunks().flatten().to_numpy(), [0]
    for length in pc.list_value_length(table["mean"]).to_pylist():
        offsets.append(offsets[-1] + length)
    found = {}
    for part in _PARTS:
        rows = _where(table, part=part)
        block = torch.tensor(flat[offsets[rows[0]] : offsets[rows[-1] + 1]])
        found[part] = block.view(shape.n_layers, -1)
    z = found.pop("z").view(shape.n_layers, shape.n_heads, shape.d_head)
    return ReferenceMeans(z=z, **found, n_positions=n_positions)


def _ordinary(known: Mapping[Lens, Mapping[str, Ordinary]]) -> pa.Table:
    channels = [(lens, name, o) for lens, of_lens in known.items() for name, o in of_lens.items()]
    rows = [(lens, name, row) for lens, name, o in channels for row in range(len(o.mean))]
    columns = {
        "lens": pa.array([lens.value for lens, _, _ in rows], pa.string()),
        "channel": pa.array([name for _, name, _ in rows], pa.string()),
        "row": pa.array([row for _, _, row in rows], pa.int16()),
        "mean": pa.array(torch.cat([o.mean for _, _, o in channels]).numpy()),
        "sd": pa.array(torch.cat([o.sd for _, _, o in channels]).numpy()),
    }
    ordered = torch.cat([o.ordered for _, _, o in channels])
    return build("calibration_ordinary", columns, _value(ordered))


def _read_ordinary(table: pa.Table) -> dict[Lens, dict[str, Ordinary]]:
    mean, sd = (torch.tensor(table[name].to_numpy()) for name in ("mean", "sd"))
    ordered = _values(table)
    found: dict[Lens, dict[str, Ordinary]] = {}
    named = zip(table["lens"].to_pylist(), table["channel"].to_pylist(), strict=True)
    for lens, channel in dict.fromkeys(named):
        rows = _where(table, lens=lens, channel=channel)
        found.setdefault(Lens(lens), {})[channel] = Ordinary(mean[rows], sd[rows], ordered[rows])
    return found
