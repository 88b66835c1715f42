"""What is ordinary: values of a channel on reference text, and how far another value is from them."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ("Ordinary", "ordinary")


class Ordinary(NamedTuple):
    """One channel's values on reference text, at the same positions for every row (layer)."""

    mean: Float[Tensor, " row"]
    sd: Float[Tensor, " row"]
    ordered: Float[Tensor, "row position"]
    """The values themselves, smallest first: the k-th of n is the k / (n + 1) quantile."""

    def z(self, values: Float[Tensor, "row pos"]) -> Float[Tensor, "row pos"]:
        """Standard deviations above the ordinary mean; NaN where ordinary values do not vary."""
        sd = torch.where(self.sd > 0, self.sd, torch.nan)
        return (values - self.mean.unsqueeze(1)) / sd.unsqueeze(1)

    def above(self, rate: float) -> Float[Tensor, " row"]:
        """The bound that at most the share `rate` of ordinary values exceeds.

        A new value that is exchangeable with the n reference values exceeds it with a probability of at
        most `rate`, whatever their distribution (conformal prediction, Vovk et al. 2005). Infinite where
        n is less than 1 / rate - 1: so few values promise nothing.
        """
        n = self.ordered.shape[1]
        rank = math.ceil((n + 1) * (1 - rate))
        if rank > n:
            return torch.full_like(self.mean, math.inf)
        return self.ordered[:, rank - 1]

    def below(self, rate: float) -> Float[Tensor, " row"]:
        """The bound that at most the share `rate` of ordinary values falls short of."""
        rank = math.floor((self.ordered.shape[1] + 1) * rate)
        if rank < 1:
            return torch.full_like(self.mean, -math.inf)
        return self.ordered[:, rank - 1]


def ordinary(values: Float[Tensor, "row position"]) -> Ordinary:
    """The ordinary values of a channel."""
    exact = values.double()
    return Ordinary(
        exact.mean(1).float(), exact.std(1, correction=0).float(), values.float().sort(1).values
    )
