"""How each head's mix z becomes its vector in the residual stream, and how long that vector is.

A head writes r = z W_O[head]. Its length needs no r: |r|² = z G zᵀ with G = W_O W_Oᵀ, d_head wide, once
for all. Where a norm stands between attention and the residual stream (Gemma-2, OLMo-2), that norm is
frozen: a gain for each coordinate, which goes into W_O and G, and a scale for each position, which is
applied afterwards. So scaled, the heads of a layer still sum to what it writes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import UnsupportedModel
from worker.scanner.measures import norm
from worker.scanner.sites import BlockModules, PlainModules

__all__ = ("OutputMaps", "output_maps")


class OutputMaps(NamedTuple):
    """The heads of every layer."""

    w_o: tuple[Float[Tensor, "head d_head d_model"], ...]
    """Views of the model's own weights, a layer each."""
    gram: Float[Tensor, "layer head d_head d_head"]
    """W_O W_Oᵀ of each head, the post-norm's gain included. float32."""
    gain: Float[Tensor, "layer d_model"] | None
    """The post-norms' gains; None where attention writes to the residual stream directly."""

    def tensors(self) -> Iterator[Tensor]:
        """What is kept in memory beside the weights."""
        yield self.gram
        if self.gain is not None:
            yield self.gain

    def norms(
        self, layers: slice, z: Float[Tensor, "layer pos head d_head"]
    ) -> Float[Tensor, "layer head pos"]:
        """|r| of each head at each position, before the post-norm's scale. Relative error about 1e-6."""
        n_layers, n_positions, n_heads, d_head = z.shape
        by_head = z.float().transpose(1, 2).reshape(n_layers * n_heads, n_positions, d_head)
        gram = self.gram[layers].view(n_layers * n_heads, d_head, d_head)
        squared: Tensor = torch.linalg.vecdot(torch.bmm(by_head, gram), by_head)
        # Rounding may leave a head that writes nothing a hair below zero.
        return squared.clamp_min_(0).sqrt_().view(n_layers, n_heads, n_positions)

    def vectors(
        self, layers: slice, z: Float[Tensor, "layer pos head d_head"]
    ) -> Float[Tensor, "layer head pos d_model"]:
        """The r of each head at each position, before the post-norm's scale. float32."""
        written = torch.stack(
            [
                torch.bmm(z_l.transpose(0, 1), w.to(z.device))
                for z_l, w in zip(z, self.w_o[layers], strict=True)
            ]
        ).float()
        return written if self.gain is None else written * self.gain[layers, None, None]

    def scale(
        self,
        layers: slice,
        projected: Float[Tensor, "layer pos d_model"],
        written: Float[Tensor, "layer pos d_model"],
    ) -> Float[Tensor, "layer pos"]:
        """The post-norm's scale: what it gave, over its gain times what it was given."""
        if self.gain is None:
            return written.new_ones(written.shape[:-1])
        gained = projected.float() * self.gain[layers].unsqueeze(1)
        return norm(written) / norm(gained).clamp_min_(torch.finfo(torch.float32).tiny)


def output_maps(
    modules: PlainModules, architecture: Architecture, device: torch.device
) -> OutputMaps:
    """The output maps of a loaded model whose activations are on that device.

    Raises `UnsupportedModel` where heads are not as wide as the family says.
    """
    with torch.inference_mode():
        w_o = tuple(_w_o(block, architecture) for block in modules.blocks)
        gains = [_gain(block) for block in modules.blocks]
        grams = [_gram(weight, gain).to(device) for weight, gain in zip(w_o, gains, strict=True)]
        known = [gain.to(device) for gain in gains if gain is not None]
        return OutputMaps(w_o, torch.stack(grams), torch.stack(known) if known else None)


def _w_o(block: BlockModules, shape: Architecture) -> Float[Tensor, "head d_head d_model"]:
    weight = block.w_o.get_parameter("weight")
    if weight.numel() != shape.n_heads * shape.d_head * shape.d_model:
        raise UnsupportedModel(
            f"W_O of {shape.family} has {weight.numel()} weights: {shape.n_heads} heads of width "
            f"{shape.d_head} would have {shape.n_heads * shape.d_head * shape.d_model}"
        )
    # A Linear keeps [d_model, head x d_head]; GPT-2's Conv1D keeps the transpose.
    rows = weight.T if isinstance(block.w_o, nn.Linear) else weight
    return rows.view(shape.n_heads, shape.d_head, shape.d_model)


def _gain(block: BlockModules) -> Float[Tensor, " d_model"] | None:
    if block.attn_write is block.w_o:
        return None
    weight = block.attn_write.get_parameter("weight")
    # An RMS norm of ones gives its gain back, however the family writes it down (w, or 1 + w).
    gain: Tensor = block.attn_write(torch.ones_like(weight))
    return gain.float()


def _gram(
    w_o: Float[Tensor, "head d_head d_model"], gain: Float[Tensor, " d_model"] | None
) -> Float[Tensor, "head d_head d_head"]:
    # float64: the length of a head that nearly cancels is a difference of large numbers.
    exact = w_o.double() if gain is None else w_o.double() * gain.to(w_o.device).double()
    return torch.bmm(exact, exact.mT).float()
