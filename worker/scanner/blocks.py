"""A block's arithmetic on the plain model's own modules, for many residuals at once.

Rows are residuals of one prompt from some position on. What lies before it is the same in all of them, so
it is not computed again: attention finds its keys and values in the recorded run.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor

from neural_mri.contract.components import Kind
from worker.scanner.halving import portion
from worker.scanner.hooks import tensor_out
from worker.scanner.loading import LoadedModel
from worker.scanner.runs import AttentionCall
from worker.scanner.sites import BlockModules

__all__ = ("ACTIVATION_BYTES", "Block", "Rewrite", "causal_mask", "rows_at_once")

Rewrite = Callable[[Kind, Tensor], None]
"""Changes in place what the attention layer, or the MLP, writes in some rows."""

ACTIVATION_BYTES = {"cpu": 4 << 20, "cuda": 1 << 28}
"""Hidden activations that are computed together: what fits into a cache, or keeps a GPU busy."""


class _Prefix(NamedTuple):
    """Stands where a cache would: keys and values of the positions before the rows' first."""

    keys: Float[Tensor, "1 kv_head prefix d_head"]
    values: Float[Tensor, "1 kv_head prefix d_head"]

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        n_rows = len(keys)
        return (
            torch.cat([self.keys.expand(n_rows, -1, -1, -1), keys], dim=2),
            torch.cat([self.values.expand(n_rows, -1, -1, -1), values], dim=2),
        )

    def get_seq_length(self, *_: Any) -> int:
        return self.keys.shape[2]


class Block(NamedTuple):
    """One block, ready to be run on rows."""

    modules: BlockModules
    parallel: bool
    """Whether the MLP reads what attention reads."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    """Attention's, beside the hidden states."""

    @classmethod
    def of(
        cls,
        modules: BlockModules,
        call: AttentionCall,
        *,
        parallel: bool,
        start: int,
        causal: Float[Tensor, "1 1 query key"] | None = None,
    ) -> Self:
        """The block for rows that begin at position `start`.

        Args:
            modules: The block's modules.
            call: How its attention was called for the whole prompt.
            parallel: Whether the MLP reads what attention reads.
            start: The rows' first position. 0 where `call` kept no keys and values.
            causal: Masks scores where the model left masking to its kernel. Not needed from 0 on.
        """
        if start == 0:
            return cls(modules, parallel, call.args, call.kwargs)
        if call.cache_argument is None or call.keys is None or call.values is None:
            raise ValueError("rows can begin after position 0 only where keys and values were kept")
        kwargs: dict[str, Any] = {**call.kwargs}
        kwargs[call.cache_argument] = _Prefix(call.keys[:, :, :start], call.values[:, :, :start])
        mask = kwargs.get("attention_mask")
        mask = causal if mask is None else mask
        kwargs["attention_mask"] = None if mask is None else mask[..., start:, :]
        for name in ("position_embeddings", "position_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = _after(kwargs[name], start)
        return cls(modules, parallel, call.args, kwargs)

    def attn(self, resid_pre: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """What attention writes."""
        normed = self.modules.attn_norm(resid_pre)
        return self.post_norm(tensor_out(self.modules.attn(normed, *self.args, **self.kwargs)))

    def post_norm(
        self, projected: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row pos d_model"]:
        """What attention writes when W_O gives `projected`."""
        written: Tensor = self.modules.attn_post_norm(projected)
        return written

    def mlp(self, read: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """What the MLP writes when it reads the residual `read`."""
        modules, normed = self.modules, self.modules.mlp_norm(read)
        added_to = (torch.zeros_like(normed),) if modules.mlp_adds_residual else ()
        written: Tensor = modules.mlp_post_norm(modules.mlp(normed, *added_to))
        return written

    def advance(
        self, rows: Float[Tensor, "row pos d_model"], *, last: bool, rewrite: Rewrite | None = None
    ) -> None:
        """Run rows through the block, in place.

        Args:
            rows: Residuals that enter the block, and then those that leave it.
            last: Whether nothing is read of the rows but their last position: no other goes through
                the MLP, and the others' residuals are good for nothing afterwards.
            rewrite: Changes what a sublayer writes before it is added.
        """
        by_attn = self.attn(rows)
        if rewrite is not None:
            rewrite(Kind.ATTN, by_attn)
        after = rows[:, -1:] if last else rows
        if self.parallel:
            by_mlp = self.mlp(after)
            rows += by_attn
        else:
            rows += by_attn
            by_mlp = self.mlp(after)
        if rewrite is not None:
            rewrite(Kind.MLP, by_mlp)
        after += by_mlp


def _after(value: Any, start: int) -> Any:
    """What was given for each position of `[batch pos ...]`, from `start` on."""
    if isinstance(value, tuple):
        return tuple(_after(one, start) for one in value)
    return value[:, start:]


def causal_mask(n_positions: int, like: Tensor) -> Float[Tensor, "1 1 query key"]:
    """Added to attention scores: 0 where a position may look, -inf where it may not."""
    ones = torch.full((n_positions, n_positions), -torch.inf, dtype=like.dtype, device=like.device)
    return ones.triu(1)[None, None]


def rows_at_once(model: LoadedModel, n_positions: int) -> int:
    """Rows of that many positions that should run through a sublayer together."""
    shape = model.architecture
    numbers = n_positions * max(shape.d_mlp, shape.n_heads * shape.d_head)
    together = portion(ACTIVATION_BYTES[model.device.type])
    return max(1, together // (numbers * model.plain.dtype.itemsize))
