"""What a head's weights do together: its query-key and output-value circuits (Elhage et al. 2021).

Both are products A^T B of two d_head x d_model matrices, d_model square and of rank d_head at most. They
are never formed: with A A^T = R R^T, the singular values of A^T B are the roots of the eigenvalues of
R^T (B B^T) R, and the eigenvalues of A^T B that are not 0 are those of B A^T. Everything is d_head square.
"""

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ("Circuit", "LayerCircuits", "joined", "not_measured", "output_value", "query_key")


class Circuit(NamedTuple):
    """One circuit of some heads, float64."""

    singular_values: Float[Tensor, "head d_head"]
    """Largest first. Those below 1e-7 of the largest are rounding."""
    copying: Float[Tensor, " head"]
    """Sum of the eigenvalues' real parts over the sum of their sizes; NaN where it was not asked for."""


class LayerCircuits(NamedTuple):
    """Both circuits of all heads of a layer."""

    query_key: Circuit
    output_value: Circuit


def joined(parts: Sequence[Circuit]) -> Circuit:
    """The heads of all parts, in order."""
    return Circuit(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def not_measured(n_heads: int, d_head: int) -> LayerCircuits:
    """Of a layer with weights that are not finite."""
    unknown = Circuit(torch.full((n_heads, d_head), nan), torch.full((n_heads,), nan))
    return LayerCircuits(unknown, unknown)


def query_key(
    W_Q: Float[Tensor, "head d_head d_model"], W_K: Float[Tensor, "d_head d_model"]
) -> Circuit:
    """W_Q W_K^T, by which a query finds a key: as between equal positions where those are rotary."""
    return Circuit(_singular_values(W_K, W_Q), torch.full((len(W_Q),), nan))


def output_value(
    W_O: Float[Tensor, "head d_head d_model"], W_V: Float[Tensor, "d_head d_model"]
) -> Circuit:
    """W_V W_O, what a head writes of what it reads. Copying is 1 where it writes all of it back."""
    eigenvalues = torch.linalg.eigvals(W_O @ W_V.mT)
    copying = eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)
    return Circuit(_singular_values(W_V, W_O), copying)


def _singular_values(
    shared: Float[Tensor, "d_head d_model"], others: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "head d_head"]:
    """Of each `shared^T others[h]`, largest first."""
    gram = shared @ shared.mT
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed:  # rows that depend on each other: a head that was pruned, or wider than the model
        values, vectors = torch.linalg.eigh(gram)
        root = vectors * values.clamp(min=0).sqrt()
    squares: Tensor = torch.linalg.eigvalsh(root.mT @ (others @ others.mT) @ root)
    return squares.clamp(min=0).sqrt().flip(-1)
