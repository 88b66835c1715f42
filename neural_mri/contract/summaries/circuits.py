"""DTI in short: the effect of every component, and the strongest paths."""

import msgspec

from neural_mri.contract.circuits import Ablation, CircuitMethod, Granularity
from neural_mri.contract.components import Kind
from neural_mri.contract.results import has_foil, provenance_of
from neural_mri.contract.summaries.base import (
    Measured,
    NamedToken,
    Stored,
    SummaryBase,
    absent,
    records,
    rows,
)

__all__ = ("EDGES_SHOWN", "TABLES", "CircuitSummary", "circuit_summary")

TABLES = ("effects", "metric", "edges")

EDGES_SHOWN = 100
"""The strongest; the table `edges` has all that were asked for."""


class CircuitMetric(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked, and what the two runs answer."""

    position: int
    """Whose next token is asked about."""
    answer: NamedToken
    foil: NamedToken | None
    unit: str
    """`logits` with a foil: logit(answer) - logit(foil). `nats` without: log p(answer)."""
    method: str
    clean: Measured
    corrupted: Measured
    """Of the corrupt prompt; null where there is none."""
    prob_clean: Measured
    """Of the answer."""
    prob_corrupted: Measured
    direct_biases: Measured
    """The part of the direct attribution that no component writes."""


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """What replacing a component does to the metric: below 0 where the component helps."""

    type: Kind
    layer: int | None
    head: int | None
    effect: Measured
    """Measured where `exact`, else the `estimate`."""
    exact: bool
    estimate: Measured
    """First-order, from gradients."""
    direct: Measured
    """The component's own term of the logits."""


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """A path from what one component writes straight to what another reads."""

    source: str
    target: str
    strength: float
    """First-order effect of replacing the source for that target alone, in logits."""


class CircuitSummary(SummaryBase, frozen=True, kw_only=True, tag="DTI"):
    """DTI: which components carry an answer, and along which paths."""

    method: CircuitMethod
    ablation: Ablation | None
    """What components were replaced by; null where nothing was replaced."""
    granularity: Granularity
    first_position: int | None
    """The first position at which anything was replaced."""
    metric: CircuitMetric
    data: dict[str, Effect]
    edges: tuple[Edge, ...]
    """The strongest 100, strongest first."""
    edges_share: Measured
    """Share of all edges' absolute strength that those in the table `edges` carry."""


def circuit_summary(stored: Stored) -> CircuitSummary:
    """From `effects`, `metric`, and `edges` where they were asked for."""
    effects, edges = stored.tables["effects"], stored.tables.get("edges")
    request, parameters = stored.manifest.request, provenance_of(effects).parameters
    ablation = parameters.get("ablation")
    return CircuitSummary(
        **stored.shared(effects),
        method=CircuitMethod(request["method"]),
        ablation=None if ablation is None else Ablation(ablation),
        granularity=Granularity(request["granularity"]),
        first_position=parameters.get("first_position"),
        metric=_metric(stored),
        data={
            row["component"]: Effect(
                type=Kind(row["kind"]),
                layer=absent(row["layer"]),
                head=absent(row["head"]),
                effect=row["effect"],
                exact=row["exact"],
                estimate=row["estimate"],
                direct=row["direct"],
            )
            for row in records(effects)
        },
        edges=()
        if edges is None
        else tuple(
            Edge(source=source, target=target, strength=strength)
            for source, target, strength in rows(
                edges.slice(0, EDGES_SHOWN), "source", "target", "strength"
            )
        ),
        edges_share=None if edges is None else provenance_of(edges).parameters["share"],
    )


def _metric(stored: Stored) -> CircuitMetric:
    table = stored.tables["metric"]
    provenance, (row,) = provenance_of(table), records(table)
    return CircuitMetric(
        position=row["position"],
        answer=NamedToken(token=row["answer"], token_id=row["answer_id"]),
        foil=NamedToken(token=row["foil"], token_id=row["foil_id"]) if has_foil(table) else None,
        unit=provenance.unit,
        method=provenance.method,
        clean=row["clean"],
        corrupted=row["corrupted"],
        prob_clean=row["probability_clean"],
        prob_corrupted=row["probability_corrupted"],
        direct_biases=row["direct_biases"],
    )
