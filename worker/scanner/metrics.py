"""What a next-token prediction is measured by. All from logits, all in float32.

Logits are compared by differences and probabilities by logarithms: neither depends on what softmax
ignores, and none needs a floor under a probability.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = (
    "SMALLEST_GAP",
    "Metric",
    "entropy",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "recovery",
)

SMALLEST_GAP = 0.1
"""Clean and corrupted runs that are closer than this, in the metric's unit, leave nothing to recover."""


def kl_divergence(
    reference: Float[Tensor, "*batch d_vocab"], perturbed: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """D_KL(reference ‖ perturbed) of next-token distributions, in nats, per position; from logits."""
    log_p, log_q = reference.float().log_softmax(-1), perturbed.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
    """Entropy of the next-token distribution, in nats, from 0 to log d_vocab."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def log_probability(
    logits: Float[Tensor, "*batch d_vocab"], token_id: int
) -> Float[Tensor, "*batch"]:
    """Log-probability of a next token, in nats, at most 0."""
    exact = logits.float()
    return exact[..., token_id] - exact.logsumexp(-1)


def logit_difference(
    logits: Float[Tensor, "*batch d_vocab"], answer_id: int, foil_id: int
) -> Float[Tensor, "*batch"]:
    """logit(answer) - logit(foil): the log of how much likelier the answer is (Wang et al. 2022)."""
    return logits[..., answer_id].float() - logits[..., foil_id].float()


def recovery(
    *,
    clean: Float[Tensor, "*batch"],
    corrupted: Float[Tensor, "*batch"],
    patched: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Share of the clean-corrupted gap that a patch restores: 0 none, 1 all; it may leave [0, 1].

    NaN where the two runs agree within `SMALLEST_GAP`: dividing would print rounding error as a
    finding. (Zhang & Nanda 2024.)
    """
    gap = clean - corrupted
    return torch.where(gap.abs() < SMALLEST_GAP, torch.nan, (patched - corrupted) / gap)


class Metric(NamedTuple):
    """What is asked of a prediction: by how much the answer beats the foil, or how likely it is."""

    answer_id: int
    foil_id: int | None = None

    @property
    def unit(self) -> str:
        """What the metric is counted in."""
        return "nats" if self.foil_id is None else "logits"

    @property
    def formula(self) -> str:
        """The metric in words."""
        if self.foil_id is None:
            return "log-probability of the answer"
        return "logit(answer) - logit(foil)"

    def __call__(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
        """The metric of each prediction."""
        if self.foil_id is None:
            return log_probability(logits, self.answer_id)
        return logit_difference(logits, self.answer_id, self.foil_id)
