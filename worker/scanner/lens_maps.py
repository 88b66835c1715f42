"""The maps a lens sends a residual through before it is unembedded, and how they are fitted.

Both carry a residual to where the last one lies on reference text: a bias, the mean difference between the
two; and an affine map, by ridge regression of that difference on the residual. Closed forms, accumulated in
float64. (The tuned lens of Belrose et al. 2023 minimises the divergence of predictions instead.)
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ("PENALTY", "Affine", "Moments", "applied", "support_layers")

PENALTY = 0.01
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


def applied(
    lens: Affine | None, residuals: Float[Tensor, "place pos d_model"]
) -> Float[Tensor, "place pos d_model"]:
    """Residuals as the lens has them, as they are where there is none; in their own type."""
    if lens is None:
        return residuals
    mapped = residuals + lens.bias.unsqueeze(1).to(residuals)
    if lens.matrix is None:
        return mapped
    return mapped.baddbmm_(residuals, lens.matrix.to(residuals))


class Moments:
    """What both maps are made from, gathered batch by batch: sums, and where wanted sums of products."""

    def __init__(
        self, n_places: int, d_model: int, *, products: bool, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._count = 0
        self._sum = zeros(n_places, d_model)
        self._difference = zeros(n_places, d_model)
        self._gram = zeros(n_places, d_model, d_model) if products else None
        self._cross = zeros(n_places, d_model, d_model) if products else None

    def add(
        self, residuals: Float[Tensor, "place pos d_model"], final: Float[Tensor, "pos d_model"]
    ) -> None:
        """Residuals at each place, and the last one at the same positions."""
        last = final.double()
        self._count += len(last)
        # Place by place: all of them in float64 would be twice the residuals again.
        for place, residual in enumerate(residuals):
            x = residual.double()
            difference = last - x
            self._sum[place] += x.sum(0)
            self._difference[place] += difference.sum(0)
            if self._gram is not None and self._cross is not None:
                self._gram[place].addmm_(x.T, x)
                self._cross[place].addmm_(x.T, difference)

    def bias(self) -> Affine:
        """The mean difference to the last residual."""
        return Affine((self._difference / self._count).float().cpu())

    def ridge(self) -> Affine:
        """The affine map to the last residual, shrunk towards the bias alone."""
        if self._gram is None or self._cross is None:
            raise ValueError("a ridge lens needs sums of products: none were gathered")
        mean, difference = self._sum / self._count, self._difference / self._count
        biases, matrices = [], []
        for place, (gram, cross) in enumerate(zip(self._gram, self._cross, strict=True)):
            centre, shift = mean[place], difference[place]
            covariance = gram / self._count - torch.outer(centre, centre)
            # A residual that never varies is mapped by the bias alone, whatever the penalty.
            tiny = torch.finfo(torch.float64).tiny
            covariance.diagonal().add_(PENALTY * covariance.diagonal().mean().clamp_min(tiny))
            matrix = torch.linalg.solve(
                covariance, cross / self._count - torch.outer(centre, shift)
            )
            biases.append((shift - centre @ matrix).float().cpu())
            matrices.append(matrix.float().cpu())
        return Affine(torch.stack(biases), torch.stack(matrices))
