"""Estimates of every component's effect from one backward pass, and what each writes by itself.

*Attribution patching* (Nanda 2023; Syed et al. 2023): the effect of replacing a component is, to first
order, the difference it makes to the component's value times the metric's gradient there. *Integrated
gradients* (EAP-IG, inputs; Hanna et al. 2024) average that gradient over prompts on the straight line from
the corrupt embeddings to the clean ones, where a single gradient may have saturated.

*Direct logit attribution* (Elhage et al. 2021) is no estimate but a sum: the final norm's scale frozen, a
logit is linear in what every component wrote at the last position.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from neural_mri.contract.components import Component, Kind
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run, embedded, record

__all__ = (
    "Differentiated",
    "DirectAttribution",
    "differentiate",
    "direct_attribution",
    "estimates",
)


class Gradients(NamedTuple):
    """Of a metric, at what components write and read. Tuples have an entry a layer."""

    z: tuple[Float[Tensor, "batch pos heads_by_d_head"], ...]
    attn: tuple[Float[Tensor, "batch pos d_model"], ...]
    mlp: tuple[Float[Tensor, "batch pos d_model"], ...]
    attn_reads: tuple[Float[Tensor, "batch pos d_model"], ...]
    mlp_reads: tuple[Float[Tensor, "batch pos d_model"], ...]
    embed: Float[Tensor, "batch pos d_model"]
    final: Float[Tensor, "batch pos d_model"]


class Differentiated(NamedTuple):
    """A run and the metric's gradients in it."""

    run: Run
    gradients: Gradients


def slope(metric: Metric, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
    """What is differentiated: the metric, or where it is a log-probability, the answer's log-odds.

    A log-probability near 0 has no slope left. The log-odds go on, in the same direction.
    """
    if metric.foil_id is not None:
        return metric(logits)
    exact = logits.float()
    answer = exact[:, metric.answer_id]
    others = torch.ones_like(exact, dtype=torch.bool)
    others[:, metric.answer_id] = False
    return answer - exact.masked_fill(~others, -torch.inf).logsumexp(-1)


def differentiate(
    model: LoadedModel,
    ids: Int[Tensor, "1 pos"],
    metric: Metric,
    *,
    embeddings: Float[Tensor, "batch pos d_model"] | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> Differentiated:
    """Run the plain twin forward and back once.

    Args:
        model: The model: frozen, so that only activations get gradients.
        ids: The prompt.
        metric: What is differentiated, at the last position.
        embeddings: Token embeddings to read instead of the prompt's own, any number of rows.
        on_layer: Called after each block of the forward pass; may raise to stop.
    """
    # The caller's thread may be in inference mode, where nothing can be differentiated.
    with torch.inference_mode(mode=False), torch.enable_grad():
        given = embedded(model, ids) if embeddings is None else embeddings
        leaf = given.clone().requires_grad_()
        run = record(model, ids.expand(len(leaf), -1), embeddings=leaf, on_layer=on_layer)
        places = (run.z, run.attn, run.mlp, run.attn_reads, run.mlp_reads)
        wanted = [tensor for layers in places for tensor in layers]
        found = torch.autograd.grad(
            slope(metric, run.logits).sum(), [*wanted, run.resid_pre[0], run.final]
        )
    n_layers = len(run.z)
    z, attn, mlp, attn_reads, mlp_reads = (
        found[at : at + n_layers] for at in range(0, len(wanted), n_layers)
    )
    gradients = Gradients(z, attn, mlp, attn_reads, mlp_reads, embed=found[-2], final=found[-1])
    return Differentiated(run.detached(), gradients)


def estimates(
    components: Sequence[Component],
    clean: Run,
    replacements: Replacements,
    gradients: Gradients,
) -> Float[Tensor, " component"]:
    """First-order effect of replacing each component: difference x gradient, summed over positions."""
    by_place: dict[tuple[Kind, int], Tensor] = {}
    found = []
    for component in components:
        place = (component.kind, component.layer or 0)
        if place not in by_place:
            by_place[place] = _at(place, clean, replacements, gradients)
        found.append(by_place[place][component.index or 0])
    return torch.stack(found).float()


def _at(
    place: tuple[Kind, int], clean: Run, replacements: Replacements, gradients: Gradients
) -> Float[Tensor, " index"]:
    """The estimates of one layer's heads, or of the one component there is."""
    kind, layer = place
    d_head = None
    match kind:
        case Kind.HEAD:
            old, new, slope_there = clean.z[layer], replacements.z[layer], gradients.z[layer]
            d_head = replacements.d_head
        case Kind.ATTN:
            old, new, slope_there = (
                clean.attn[layer],
                replacements.attn[layer],
                gradients.attn[layer],
            )
        case Kind.MLP:
            old, new, slope_there = clean.mlp[layer], replacements.mlp[layer], gradients.mlp[layer]
        case Kind.EMBED:
            old, new, slope_there = clean.resid_pre[0], replacements.embed, gradients.embed
        case _:
            raise ValueError(f"{kind} is no component that a circuit is made of")
    kept = slice(replacements.start, None)
    difference = new.float() - old[0, kept].float()
    product = (difference * slope_there[:, kept].float().mean(0)).sum(0)
    return product.view(-1, d_head or len(product)).sum(-1)


class DirectAttribution(NamedTuple):
    """The terms of a logit, or logit difference, in float32. They sum to it."""

    embed: Float[Tensor, ""]
    heads: Float[Tensor, "layer head"]
    attn: Float[Tensor, " layer"]
    """Its heads and its output bias."""
    mlp: Float[Tensor, " layer"]
    biases: Float[Tensor, ""]
    """Of attention outputs, the final norm and the unembedding: no component's."""

    def of(self, component: Component) -> Float[Tensor, ""]:
        """A component's term."""
        layer, index = component.layer or 0, component.index or 0
        match component.kind:
            case Kind.EMBED:
                return self.embed
            case Kind.HEAD:
                return self.heads[layer, index]
            case Kind.ATTN:
                return self.attn[layer]
            case Kind.MLP:
                return self.mlp[layer]
            case _:
                raise ValueError(f"{component} is no component that a circuit is made of")


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
