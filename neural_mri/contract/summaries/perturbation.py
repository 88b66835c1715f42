"""A stimulation in short, with the fields of the seed specification's section 4.3."""

import math
from collections.abc import Iterator
from types import MappingProxyType

import msgspec
import pyarrow as pa

from neural_mri.contract.components import Kind
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
from neural_mri.contract.summaries.predictions import Prediction, predictions

__all__ = ("AFFECTED_SHOWN", "IMPACT", "TABLES", "PerturbationSummary", "perturbation_summary")

TABLES = (
    "comparison",
    "shift",
    "predictions",
    "predictions_after",
    "tokens",
    "activations",
    "change",
)

AFFECTED_SHOWN = 100
"""The most affected; the table `change` has all, token by token."""

ROUNDING = MappingProxyType({"float64": 1e-12, "float32": 1e-6, "float16": 1e-2, "bfloat16": 1e-1})
"""Impacts that two rows of one batch may show though nothing was done to either, by data type."""

IMPACT = (
    "|perturbed - clean| / |clean| of what the component writes to the residual stream, each the root of "
    "the sum of squares over tokens that are not attention sinks (over all where there are no others); "
    "with several draws of noise, the mean over draws of |perturbed - clean|"
)


class ComparedPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """The likeliest next token of one run."""

    token: str
    token_id: int
    logit: Measured
    """Null for several draws of noise: the mean of their distributions has no logits."""
    prob: float


class AffectedComponent(msgspec.Struct, frozen=True, kw_only=True):
    """A component that writes otherwise than in the clean run."""

    id: str
    impact_score: float
    """By the formula in `impact_formula`: 0 nothing changed, 1 as much as it wrote."""


class ComparedMetric(msgspec.Struct, frozen=True, kw_only=True):
    """The answer before and after."""

    position: int
    answer: NamedToken
    foil_id: int | None
    """null without a foil; -1 where there is one of which no id is shown."""
    unit: str
    """`logits` with a foil: logit(answer) - logit(foil). `nats` without: log p(answer)."""
    before: Measured
    after: Measured
    """Mean over draws of noise."""
    after_sd: Measured
    """Spread over draws; null where there is one."""
    logit_before: Measured
    """Of the answer."""
    logit_after: Measured
    prob_before: Measured
    prob_after: Measured


class Shift(msgspec.Struct, frozen=True, kw_only=True):
    """How far next-token distributions moved: one value a token of the prompt, in nats."""

    kl: Values
    """D_KL(clean ‖ perturbed)."""
    kl_sd: Values
    entropy_before: Values
    entropy_after: Values


class PerturbationSummary(SummaryBase, frozen=True, kw_only=True, tag="perturbation"):
    """A prompt read clean and perturbed, and what that changed."""

    original_prediction: ComparedPrediction
    """After the target position, as all predictions here."""
    perturbed_prediction: ComparedPrediction
    logit_diff: Measured
    """perturbed_prediction.logit - original_prediction.logit: of two tokens where the prediction changed.
    `metric` compares one token with itself."""
    metric: ComparedMetric
    draws: int
    """Perturbed runs: more than one where noise was drawn."""
    shift: Shift
    impact_formula: str
    affected_components: tuple[AffectedComponent, ...]
    """Embedding, heads and MLPs that changed by more than rounding, the most affected 100, most affected
    first. Empty where the scan was made without `perturbed_scan`."""
    predictions: tuple[Prediction, ...]
    """Likeliest next tokens of the clean run, likeliest first."""
    predictions_after: tuple[Prediction, ...]
    """And of the perturbed one. With several draws of noise, `logit` there is the log-probability."""


def perturbation_summary(stored: Stored) -> PerturbationSummary:
    """From the comparison of both runs, and what changed inside where that was measured."""
    tables = stored.tables
    comparison = tables["comparison"]
    draws = provenance_of(comparison).parameters["draws"]
    metric = _metric(comparison)
    before, after = (
        predictions(only(tables[name], "position", metric.position))
        for name in ("predictions", "predictions_after")
    )
    original = _likeliest(before, has_logits=True)
    perturbed = _likeliest(after, has_logits=draws == 1)
    known = original.logit is not None and perturbed.logit is not None
    return PerturbationSummary(
        **stored.shared(comparison),
        original_prediction=original,
        perturbed_prediction=perturbed,
        logit_diff=(perturbed.logit or 0.0) - (original.logit or 0.0) if known else None,
        metric=metric,
        draws=draws,
        shift=Shift(
            **{
                name: tuple(tables["shift"].column(name).to_pylist())
                for name in Shift.__struct_fields__
            }
        ),
        impact_formula=IMPACT,
        affected_components=tuple(_affected(stored)) if "change" in tables else (),
        predictions=before,
        predictions_after=after,
    )


def _metric(comparison: pa.Table) -> ComparedMetric:
    (row,) = records(comparison)
    return ComparedMetric(
        position=row["position"],
        answer=NamedToken(token=row["answer"], token_id=row["answer_id"]),
        foil_id=row["foil_id"] if has_foil(comparison) else None,
        unit=provenance_of(comparison).unit,
        before=row["metric_before"],
        after=row["metric_after"],
        after_sd=row["metric_sd"],
        logit_before=row["logit_before"],
        logit_after=row["logit_after"],
        prob_before=row["probability_before"],
        prob_after=row["probability_after"],
    )


def _likeliest(ranked: tuple[Prediction, ...], *, has_logits: bool) -> ComparedPrediction:
    first = ranked[0]
    return ComparedPrediction(
        token=first.token,
        token_id=first.token_id,
        logit=first.logit if has_logits else None,
        prob=first.prob,
    )


_WRITERS = {Kind.EMBED, Kind.HEAD, Kind.MLP}
"""What writes to the residual stream, each part of it once: a layer's attention is its heads."""


def _affected(stored: Stored) -> Iterator[AffectedComponent]:
    sinks = stored.tables["tokens"].column("sink").to_pylist()
    kept = [position for position, sink in enumerate(sinks) if not sink] or range(len(sinks))
    smallest = ROUNDING[stored.manifest.numerics.dtype]
    found = []
    both = zip(
        rows(stored.tables["change"], "component", "kind", "value"),
        rows(stored.tables["activations"], "value"),
        strict=True,
    )
    for (component, kind, change), (clean,) in both:
        length = math.hypot(*(clean[position] for position in kept))
        if kind in _WRITERS and length > 0:
            score = math.hypot(*(change[position] for position in kept)) / length
            if score > smallest:
                found.append(AffectedComponent(id=component, impact_score=score))
    found.sort(key=lambda affected: -affected.impact_score)
    yield from found[:AFFECTED_SHOWN]
