"""A perturbation scan's tables as values: the answer before and after, and what moved inside."""

from collections.abc import Mapping
from math import nan
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from neural_mri.client.activation_map import ActivationMap
from neural_mri.contract.results import has_foil, provenance_of

__all__ = ("BeforeAfter", "Comparison", "Guess")


class BeforeAfter(NamedTuple):
    """One number in the clean and in the perturbed run."""

    before: float
    after: float


class Guess(NamedTuple):
    """A next token's probability in the two runs; NaN where it is not among a run's likeliest."""

    text: str
    probability: BeforeAfter


class Comparison(NamedTuple):
    """What a perturbation did to the next token after `position`."""

    position: int
    answer: str
    has_foil: bool
    metric: BeforeAfter
    metric_sd: float
    """Spread over draws of noise; NaN where there is one draw."""
    unit: str
    """Of the metric."""
    probability: BeforeAfter
    """Of the answer."""
    kl: float
    """D_KL(clean ‖ perturbed) of the next token after `position`, in nats."""
    kl_by_position: tuple[float, ...]
    entropy: BeforeAfter
    """nats"""
    guesses: tuple[Guess, ...]
    """The likeliest tokens of either run after `position`, by the larger of the two probabilities."""
    change: ActivationMap | None
    """Length of what each component writes differently; None where it was not asked for."""
    draws: int

    @classmethod
    def of(cls, tables: Mapping[str, pa.Table]) -> "Comparison":
        """From a perturbation result's tables; `change` and `tokens` may be missing."""
        asked: dict[str, Any] = tables["comparison"].to_pylist()[0]
        provenance = provenance_of(tables["comparison"])
        shift = tables["shift"].to_pylist()
        here = next(row for row in shift if row["position"] == asked["position"])
        change = None
        if "change" in tables:
            change = ActivationMap.of(tables["change"], tables["tokens"])
        return cls(
            position=asked["position"],
            answer=asked["answer"],
            has_foil=has_foil(tables["comparison"]),
            metric=BeforeAfter(asked["metric_before"], asked["metric_after"]),
            metric_sd=asked["metric_sd"],
            unit=provenance.unit,
            probability=BeforeAfter(asked["probability_before"], asked["probability_after"]),
            kl=here["kl"],
            kl_by_position=tuple(row["kl"] for row in shift),
            entropy=BeforeAfter(here["entropy_before"], here["entropy_after"]),
            guesses=_guesses(tables, asked["position"]),
            change=change,
            draws=provenance.parameters.get("draws", 1),
        )

    @property
    def metric_name(self) -> str:
        """The metric in words."""
        return "logit(answer) - logit(foil)" if self.has_foil else "log p(answer)"

    def likeliest(self, run: Literal["before", "after"], count: int) -> tuple[Guess, ...]:
        """The likeliest tokens of one run, likeliest first."""
        known = [guess for guess in self.guesses if getattr(guess.probability, run) >= 0]
        known.sort(key=lambda guess: -getattr(guess.probability, run))
        return tuple(known[:count])


def _guesses(tables: Mapping[str, pa.Table], position: int) -> tuple[Guess, ...]:
    before, after = (
        {_key(name, row): row for row in tables[name].to_pylist() if row["position"] == position}
        for name in ("predictions", "predictions_after")
    )
    found = [
        Guess(
            (before.get(token) or after[token])["text"],
            BeforeAfter(
                before[token]["probability"] if token in before else nan,
                after[token]["probability"] if token in after else nan,
            ),
        )
        for token in dict.fromkeys((*before, *after))
    ]
    found.sort(key=lambda guess: -max(p for p in guess.probability if p >= 0))
    return tuple(found)


def _key(name: str, row: dict[str, Any]) -> int | tuple[str, int]:
    """What a token of both runs has in common; one whose id a redacted link leaves out is its run's alone."""
    return row["token_id"] if row["token_id"] >= 0 else (name, row["rank"])
