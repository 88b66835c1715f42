"""A circuit scan's numbers as Arrow tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
from jaxtyping import Bool, Float
from torch import Tensor

from neural_mri.contract.components import Component
from neural_mri.contract.results import build, component_columns
from worker.scanner.edges import Edges
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.prompts import finished

__all__ = ("Effects", "Measured", "edges_table", "effects_table", "metric_table")


class Effects(NamedTuple):
    """What is known of every component, in the order of the picture's nodes. NaN: not known."""

    components: tuple[Component, ...]
    effect: Float[Tensor, " component"]
    exact: Bool[Tensor, " component"]
    estimate: Float[Tensor, " component"]
    direct: Float[Tensor, " component"]


class Measured(NamedTuple):
    """The metric and the answer's probability in the two runs; NaN where there is no corrupted one."""

    position: int
    clean: float
    corrupted: float
    probability_clean: float
    probability_corrupted: float
    direct_biases: float


def _floats(values: Tensor) -> pa.Array:
    return pa.array(values.float().cpu().numpy(), pa.float32())


def metric_table(model: LoadedModel, metric: Metric, measured: Measured) -> pa.Table:
    """What is asked, and what the runs answer."""
    foil = metric.foil_id
    columns = {
        "position": pa.array([measured.position], pa.int32()),
        "answer_id": pa.array([metric.answer_id], pa.int32()),
        "answer": pa.array([model.text(metric.answer_id)], pa.string()),
        "foil_id": pa.array([-1 if foil is None else foil], pa.int32()),
        "foil": pa.array(["" if foil is None else model.text(foil)], pa.string()),
    }
    for name in measured._fields[1:]:
        columns[name] = pa.array([getattr(measured, name)], pa.float32())
    return finished(
        build("metric", columns),
        "metric",
        unit=metric.unit,
        method=f"{metric.formula}, of the next token after the position",
    )


def effects_table(metric: Metric, effects: Effects, *, method: str, **parameters: Any) -> pa.Table:
    """A row a component; the embedding first, the unembedding last."""
    columns = {
        **component_columns(effects.components),
        "effect": _floats(effects.effect),
        "exact": pa.array(effects.exact.numpy(), pa.bool_()),
        "estimate": _floats(effects.estimate),
        "direct": _floats(effects.direct),
    }
    return finished(
        build("effects", columns),
        "effects",
        unit=metric.unit,
        method=f"{metric.formula}: with the component replaced, minus clean; {method}",
        direct="logit(answer) - "
        + ("mean logit" if metric.foil_id is None else "logit(foil)")
        + ", the component's own term, the final norm's scale frozen, before any soft-cap; in logits",
        **parameters,
    )


def edges_table(
    metric: Metric,
    components: Sequence[Component],
    edges: Edges,
    *,
    method: str,
    **parameters: Any,
) -> pa.Table:
    """The strongest edges, strongest first, and the share of all that they carry."""
    rows = {component: row for row, component in enumerate(components)}
    columns = {
        "source": pa.array([str(edge.source) for edge in edges.strongest], pa.string()),
        "target": pa.array([str(edge.target) for edge in edges.strongest], pa.string()),
        "source_index": pa.array([rows[edge.source] for edge in edges.strongest], pa.int32()),
        "target_index": pa.array([rows[edge.target] for edge in edges.strongest], pa.int32()),
        "strength": pa.array([edge.strength for edge in edges.strongest], pa.float32()),
    }
    differentiated = "log-odds of the answer" if metric.foil_id is None else metric.formula
    return finished(
        build("edges", columns),
        "edges",
        unit="logits",
        method=f"{differentiated}: what replacing the source changes of its write, times the gradient "
        f"where the target reads; {method}",
        share=edges.share,
        total=edges.total,
        **parameters,
    )
