"""What each component writes into a logit by itself: direct logit attribution (Elhage et al. 2021).

No estimate but a sum: the final norm's scale frozen, a logit is linear in what every component wrote at the
last position. It is blind to what components do to each other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neural_mri.contract.components import Component, Kind
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.runs import Run

__all__ = ("DirectAttribution", "direct_attribution")


class DirectAttribution(NamedTuple):
    """The terms of a logit, or logit difference, in float32. They sum to it."""

    embed: Float[Tensor, ""]
    heads: Float[Tensor, "layer head"]
    attn: Float[Tensor, " layer"]
    """Its heads and its output bias."""
    mlp: Float[Tensor, " layer"]
    biases: Float[Tensor, ""]
    """Of attention outputs, the final norm and the unembedding: no component's."""

    def of(self, components: Sequence[Component]) -> Float[Tensor, " component"]:
        """The terms of some components."""
        n_layers, n_heads = self.heads.shape
        begins = {
            Kind.EMBED: 0,
            Kind.HEAD: 1,
            Kind.ATTN: 1 + n_layers * n_heads,
            Kind.MLP: 1 + n_layers * n_heads + n_layers,
        }

        def place(component: Component) -> int:
            if component.kind not in begins:
                raise ValueError(f"{component} is no component that a circuit is made of")
            layer, index = component.layer or 0, component.index or 0
            by_head = component.kind is Kind.HEAD
            return begins[component.kind] + (layer * n_heads + index if by_head else layer)

        # All terms side by side: hundreds of small tensors would take longer than what they hold.
        terms = torch.cat([self.embed.view(1), self.heads.flatten(), self.attn, self.mlp])
        return terms[[place(component) for component in components]]


class _Reader(NamedTuple):
    """The final norm, its scale frozen, and the unembedding, as one direction and an offset."""

    direction: Float[Tensor, " d_model"]
    offset: Float[Tensor, ""]


@torch.inference_mode()
def direct_attribution(model: LoadedModel, clean: Run, metric: Metric) -> DirectAttribution:
    """What each component adds to logit(answer) - logit(foil), before any soft-cap.

    Without a foil, to logit(answer) - mean logit: what all logits share changes no probability.
    """
    direction, offset = _reader(model, clean, metric)
    last = clean.n_positions - 1
    z, attn, mlp = (
        torch.stack([layer[0, last] for layer in layers]).float()
        for layers in (clean.z, clean.attn, clean.mlp)
    )
    shape, maps = model.architecture, model.output_maps
    everything = slice(0, shape.n_layers)
    by_head = z.view(shape.n_layers, 1, shape.n_heads, shape.d_head).to(maps.w_o[0].dtype)
    vectors = maps.vectors(everything, by_head)[:, :, 0]
    if maps.gain is not None:
        projected = torch.stack(
            [
                block.w_o(layer[:, last:])[0]
                for block, layer in zip(model.modules.blocks, clean.z, strict=True)
            ]
        )
        vectors *= maps.scale(everything, projected, attn.unsqueeze(1)).unsqueeze(-1)
    heads, layers = vectors @ direction, attn @ direction
    return DirectAttribution(
        embed=clean.resid_pre[0][0, last].float() @ direction,
        heads=heads,
        attn=layers,
        mlp=mlp @ direction,
        biases=offset + layers.sum() - heads.sum(),
    )


def _reader(model: LoadedModel, clean: Run, metric: Metric) -> _Reader:
    norm, unembed = model.modules.final_norm, model.modules.unembed
    bias: Tensor | None = getattr(unembed, "bias", None)
    along = _contrast(unembed.get_parameter("weight"), metric)
    offset = along.new_zeros(()) if bias is None else _contrast(bias, metric)
    read = clean.final[0, -1:]
    normed, residual = norm(read)[0].float(), read[0].float()
    if isinstance(norm, nn.LayerNorm):
        gain = norm.weight.float()
        if norm.bias is not None:
            offset = offset + norm.bias.float() @ along
            normed = normed - norm.bias.float()
        residual = residual - residual.mean()
        direction = gain * along
        direction = direction - direction.mean()
    else:
        # An RMS norm of ones gives its gain back, however the family writes it down (w, or 1 + w).
        gain = norm(torch.ones_like(read[0])).float()
        direction = gain * along
    scale = torch.linalg.vector_norm(normed) / torch.linalg.vector_norm(gain * residual)
    return _Reader(direction * scale, offset)


def _contrast(unembedding: Tensor, metric: Metric) -> Tensor:
    """What the answer's row of the unembedding has over the foil's, or over the mean row."""
    answer = unembedding[metric.answer_id].float()
    if metric.foil_id is not None:
        return answer - unembedding[metric.foil_id].float()
    return answer - unembedding.mean(0, dtype=torch.float32)
