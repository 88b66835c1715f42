"""FLAIR in short: the three channels at each token, and what is out of the ordinary."""

from collections import defaultdict
from typing import Any

import msgspec
import pyarrow as pa

from neural_mri.contract.anomalies import Lens
from neural_mri.contract.results import provenance_of
from neural_mri.contract.summaries.base import (
    Measured,
    NamedToken,
    Stored,
    SummaryBase,
    absent,
    only,
    records,
    rows,
)
from neural_mri.contract.summaries.predictions import Prediction, predictions

__all__ = ("TABLES", "AnomalySummary", "anomaly_summary")

TABLES = ("lens", "nodes", "uncertainty", "support", "depth", "predictions")


class Uncertainty(msgspec.Struct, frozen=True, kw_only=True):
    """How sure the model is of its next token."""

    entropy: Measured
    """In nats."""
    entropy_z: Measured
    """In ordinary standard deviations."""
    max_probability: Measured
    margin: Measured
    """Over the next likely token, in logits."""
    anomalous: bool
    """More entropy than the bound."""


class Appearance(msgspec.Struct, frozen=True, kw_only=True):
    """Where in the layers the model's next token appears. Neutral: right answers are often late."""

    layer: int | None
    """After it the lens's likeliest token is the model's, and stays it."""
    depth: Measured
    """The same as a share of the layers."""
    anomalous: tuple[str, ...]
    """Places whose divergence from the prediction is out of the ordinary, either way."""


class Support(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a next token is supported by more than habit: low is suspicious."""

    token: str
    token_id: int
    log_probability: Measured
    """In nats."""
    lens_log_probability: Measured
    """Mean over lenses half-way up, in nats."""
    gain: Measured
    """log_probability - lens_log_probability."""
    gain_z: Measured
    support: Measured
    """Mean of z(gain) and z(margin), in ordinary standard deviations."""
    anomalous: bool
    """Less support than the bound."""


class TokenAnomalies(msgspec.Struct, frozen=True, kw_only=True):
    """What was found at one token. All null at position 0, which is not measured."""

    position: int
    token: str
    next: NamedToken | None
    """The model's likeliest next token."""
    uncertainty: Uncertainty
    appearance: Appearance
    support: Support | None
    """Of the likeliest next token."""
    seed_score: Measured
    """kl_weight * KL + entropy_weight * H of the lens, mean over layers. Not an error detector."""


class NodeAnomaly(msgspec.Struct, frozen=True, kw_only=True):
    """A sublayer that moved the prediction unlike it ordinarily does."""

    component: str
    position: int
    kl_change: Measured
    """Nats by which its write changed D_KL(model ‖ lens); negative: towards the prediction."""
    z: Measured


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Beyond which values are called anomalous; null where there is nothing to judge by.

    Null as well where so few ordinary values are known that none would be promised: nothing is then
    called anomalous.
    """

    lens_z: Measured
    """|kl_z| of a place."""
    node_z: Measured
    """|z| of a sublayer."""
    entropy: Measured
    """In nats."""
    support: Measured
    """Less is anomalous."""


class AnomalySummary(SummaryBase, frozen=True, kw_only=True, tag="FLAIR"):
    """FLAIR: uncertainty, where the answer appears, whether it is supported."""

    lens: Lens
    calibration: str
    """`sampled`, `texts`, or `none`: then nothing is judged."""
    false_alarm_rate: float
    """Share of ordinary positions at which a channel may call anything anomalous."""
    bounds: Bounds
    data: tuple[TokenAnomalies, ...]
    """In order of position."""
    nodes: tuple[NodeAnomaly, ...]
    """Anomalous attention layers and MLPs, largest |z| first."""
    target_position: int
    answer: Support | None
    """Of the token asked about, at the target; null where that is position 0."""
    foil: Support | None
    predictions: tuple[Prediction, ...]
    """Likeliest next tokens after the target, likeliest first."""


def anomaly_summary(stored: Stored) -> AnomalySummary:
    """From every table but what the lens says in full."""
    tables, request = stored.tables, stored.manifest.request
    lens, support = tables["lens"], tables["support"]
    likeliest = predictions(tables["predictions"])
    asked = {row["role"]: _support(row) for row in records(support) if row["role"] != "own"}
    return AnomalySummary(
        **stored.shared(lens),
        lens=Lens(request["lens"]),
        calibration=provenance_of(lens).parameters["calibration"],
        false_alarm_rate=request["false_alarm_rate"],
        bounds=Bounds(
            lens_z=_bound(lens),
            node_z=_bound(tables.get("nodes")),
            entropy=_bound(tables["uncertainty"]),
            support=_bound(support),
        ),
        data=_by_token(stored),
        nodes=_anomalous_nodes(tables.get("nodes")),
        target_position=likeliest[0].position,
        answer=asked.get("answer"),
        foil=asked.get("foil"),
        predictions=likeliest,
    )


def _bound(table: pa.Table | None) -> Measured:
    return None if table is None else provenance_of(table).parameters.get("bound")


def _by_token(stored: Stored) -> tuple[TokenAnomalies, ...]:
    tables, texts = stored.tables, stored.manifest.prompt_tokens
    depth = {row["position"]: row for row in records(tables["depth"])}
    own = {
        row["position"]: _support(row) for row in records(only(tables["support"], "role", "own"))
    }
    places = _anomalous_places(tables["lens"])
    return tuple(
        TokenAnomalies(
            position=position,
            token=texts[position],
            next=None
            if row["token_id"] < 0
            else NamedToken(token=row["text"], token_id=row["token_id"]),
            uncertainty=Uncertainty(
                **{name: row[name] for name in Uncertainty.__struct_fields__},
            ),
            appearance=Appearance(
                layer=absent(depth[position]["layer"]),
                depth=depth[position]["depth"],
                anomalous=tuple(places[position]),
            ),
            support=own.get(position),
            seed_score=row["seed_score"],
        )
        for row in records(tables["uncertainty"])
        for position in (row["position"],)
    )


def _support(row: dict[str, Any]) -> Support:
    named = {name: row[name] for name in Support.__struct_fields__ if name != "token"}
    return Support(token=row["text"], **named)


def _anomalous_places(lens: pa.Table) -> defaultdict[int, list[str]]:
    positions = provenance_of(lens).positions or ()
    found: defaultdict[int, list[str]] = defaultdict(list)
    for component, flags in rows(only(lens, "quantity", "anomalous"), "component", "value"):
        for position, flag in zip(positions, flags, strict=True):
            if flag == 1:
                found[position].append(component)
    return found


def _anomalous_nodes(nodes: pa.Table | None) -> tuple[NodeAnomaly, ...]:
    if nodes is None:
        return ()
    positions = provenance_of(nodes).positions or ()
    values = {
        (component, quantity): value
        for component, quantity, value in rows(nodes, "component", "quantity", "value")
    }
    found = [
        NodeAnomaly(
            component=component,
            position=position,
            kl_change=values[component, "kl_change"][index],
            z=values[component, "z"][index],
        )
        for (component, quantity), flags in values.items()
        if quantity == "anomalous"
        for index, position in enumerate(positions)
        if flags[index] == 1
    ]
    return tuple(sorted(found, key=lambda node: -abs(node.z or 0.0)))
