"""The maps a lens sends a residual through before it is unembedded, and how they are fitted.

Both carry a residual to where the last one lies on reference text: a bias, the mean difference between the
two; and an affine map, by ridge regression of that difference on the residual. Closed forms, accumulated in
float64. (The tuned lens of Belrose et al. 2023 minimises the divergence of predictions instead.)
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ("PENALTY", "Affine", "apply", "fit_bias", "fit_ridge", "support_layers")

PENALTY = 0.03
"""Ridge penalty, as a share of the mean variance of a residual's coordinates."""

_SUPPORT_DEPTHS = (0.4, 0.5, 0.6, 0.7)
"""Share of the blocks behind each of the lenses that say what could be predicted without the answer:
after the prompt has been understood, before recalled answers arrive. Chosen on a training split."""


class Affine(NamedTuple):
    """x -> x + x matrix + bias, for each of some places."""

    bias: Float[Tensor, "place d_model"]
    matrix: Float[Tensor, "place d_model d_model"] | None = None
    """None for the identity alone."""


def support_layers(n_layers: int) -> tuple[int, ...]:
    """The layers after which the support lenses stand; fewer than four in a shallow model."""
    layers = {min(max(round(n_layers * depth) - 1, 0), n_layers - 1) for depth in _SUPPORT_DEPTHS}
    return tuple(sorted(layers))


def apply(
    lens: Affine | None, residuals: Float[Tensor, "place pos d_model"]
) -> Float[Tensor, "place pos d_model"]:
    """Residuals as the lens has them; as they are where there is none. float32, or the model's type."""
    if lens is None:
        return residuals
    mapped = residuals + lens.bias.unsqueeze(1).to(residuals)
    if lens.matrix is None:
        return mapped
    return mapped.baddbmm_(residuals, lens.matrix.to(residuals))


def fit_bias(
    residuals: Float[Tensor, "place pos d_model"], final: Float[Tensor, "pos d_model"]
) -> Affine:
    """The mean difference to the last residual at each place."""
    mean = final.mean(0, dtype=torch.float64)
    biases = [mean - place.mean(0, dtype=torch.float64) for place in residuals]
    return Affine(torch.stack(biases).float())


def fit_ridge(
    residuals: Float[Tensor, "place pos d_model"], final: Float[Tensor, "pos d_model"]
) -> Affine:
    """The affine map to the last residual at each place, shrunk towards the bias alone."""
    fitted = [_ridge(place.double(), final.double()) for place in residuals]
    return Affine(
        torch.stack([bias.float() for bias, _ in fitted]),
        torch.stack([matrix.float() for _, matrix in fitted]),
    )


def _ridge(
    residuals: Float[Tensor, "pos d_model"], final: Float[Tensor, "pos d_model"]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "d_model d_model"]]:
    mean, difference = residuals.mean(0), final - residuals
    centred = residuals - mean
    gram = centred.T @ centred
    # A residual that never varies is mapped by the bias alone, whatever the penalty.
    penalty = PENALTY * gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    gram.diagonal().add_(penalty)
    matrix = torch.linalg.solve(gram, centred.T @ (difference - difference.mean(0)))
    return difference.mean(0) - mean @ matrix, matrix
