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

_ALIKE = 0.1
"""A norm that centres gives the same of a vector and of that vector moved by 1 everywhere; one that does not is
off by its whole gain."""


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
    """The final norm, its scale frozen, and the unembedding as the model scales it: a direction and an offset."""

    direction: Float[Tensor, " d_model"]
    offset: Float[Tensor, ""]


@torch.inference_mode()
def direct_attribution(model: LoadedModel, clean: Run, metric: Metric) -> DirectAttribution:
    """What each component adds to logit(answer) - logit(foil), scaled as the model scales logits, before any soft-cap.

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
    known = _affine(norm, read[0])
    direction = known.gain * along
    if known.bias is not None:
        offset = offset + known.bias @ along
        normed = normed - known.bias
    if known.centres:
        residual, direction = residual - residual.mean(), direction - direction.mean()
    scale = torch.linalg.vector_norm(normed) / torch.linalg.vector_norm(known.gain * residual)
    by = model.logit_scale
    return _Reader(direction * (scale * by), offset * by)


class _Affine(NamedTuple):
    """What a norm does beside dividing by the size of what it reads."""

    gain: Float[Tensor, " d_model"]
    """Up to a factor that all coordinates share."""
    bias: Float[Tensor, " d_model"] | None
    centres: bool
    """Whether it takes the mean away first."""


def _affine(norm: nn.Module, like: Float[Tensor, " d_model"]) -> _Affine:
    """Found by asking the norm: families write the same down as w or 1 + w, with a class of their own or PyTorch's."""
    if type(norm) is nn.LayerNorm and norm.elementwise_affine:
        own: Tensor | None = getattr(norm, "bias", None)
        bias = None if own is None else own.float()
        return _Affine(norm.weight.float(), bias, centres=True)
    # Signs that alternate: of mean 0, so that centring leaves it, and of the same size everywhere.
    probe = torch.ones_like(like)
    probe[1::2] = -1
    probe -= probe.mean()
    there, back, moved = (norm(read).float() for read in (probe, -probe, probe + 1))
    odd = (there - back) / 2
    centres = (moved - there).abs().max() < _ALIKE * odd.abs().max()
    return _Affine(odd / probe.float(), (there + back) / 2, bool(centres))


def _contrast(unembedding: Tensor, metric: Metric) -> Tensor:
    """What the answer's row of the unembedding has over the foil's, or over the mean row."""
    answer = unembedding[metric.answer_id].float()
    if metric.foil_id is not None:
        return answer - unembedding[metric.foil_id].float()
    return answer - unembedding.mean(0, dtype=torch.float32)
