"""Edges between components: what one writes, as another reads it (EAP; Syed et al. 2023).

The residual stream is a sum, so whatever a component writes reaches every later one as it was written. The
strength of the edge u -> v is the difference that replacing u makes to its write, times the metric's gradient
where v reads: to first order, the effect of replacing u for v alone. A head reads through its queries, keys
and values at once. The edges that leave a component sum to its estimate by attribution patching.
Where a norm stands behind attention (Gemma-2, OLMo-2), what a head writes is that norm's derivative in the
clean run, so along a path of several runs the sum is only near the estimate.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from neural_mri.contract.circuits import Granularity
from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from worker.scanner import linear_maps
from worker.scanner.attribution import Differentiated, StraightPath
from worker.scanner.blocks import Block, causal_mask, rows_at_once
from worker.scanner.halving import portion
from worker.scanner.hooks import tensor_in
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run

__all__ = ("Edge", "Edges", "strongest_edges")

_TARGETS_BYTES = 1 << 30
"""Gradients that are held together; more targets than that take another pass over the sources."""
_CLIPPING = "clip_qkv"
"""The setting of families whose attention clips what its maps give, in place (OLMo)."""


class Edge(NamedTuple):
    """A path from one component straight to another."""

    source: Component
    target: Component
    strength: float
    """In the unit of what was differentiated; signed as effects are."""


class Edges(NamedTuple):
    """The strongest edges of a circuit."""

    strongest: tuple[Edge, ...]
    """By absolute strength, strongest first."""
    share: float
    """Part of the summed absolute strength of all edges that these carry; NaN where it is 0."""
    total: int
    """Edges that there are."""


class _Targets(NamedTuple):
    """Some targets, and the metric's gradient where each reads the residual stream."""

    components: tuple[Component, ...]
    reads: Float[Tensor, "target pos d_model"]


@torch.inference_mode(mode=False)
@torch.no_grad()
def strongest_edges(
    model: LoadedModel,
    clean: Run,
    path: Sequence[Differentiated] | StraightPath,
    replacements: Replacements,
    granularity: Granularity,
    count: int,
    listener: Listener,
) -> Edges:
    """The `count` strongest edges from the embedding, through components, to the unembedding.

    Args:
        model: The model.
        clean: The clean run.
        path: Where gradients are taken, averaged over its rows: the clean run alone (EAP), or the way
            there from corrupt embeddings (EAP-IG).
        replacements: What takes a source's place.
        granularity: Whether heads or attention layers are components.
        count: How many edges to report.
        listener: Hears stage `edges`, in layers, and may stop it.
    """
    finder = _Finder(model, clean, path, replacements, granularity)
    sources = finder.sources()
    rows = {source: row for row, source in enumerate(sources)}
    targets: list[Component] = []
    columns = []
    for some in finder.target_groups(listener):
        strengths = torch.full((len(sources), len(some.components)), torch.nan)
        for layer in range(-1, model.architecture.n_layers):
            writers = finder.at_layer(layer)
            found = finder.writes(layer).flatten(1) @ some.reads.flatten(1).T
            strengths[rows[writers[0]] : rows[writers[0]] + len(writers)] = found.cpu()
        columns.append(strengths)
        targets += some.components
    depths = [torch.tensor([finder.depth(one) for one in ends]) for ends in (sources, targets)]
    exists = depths[0].unsqueeze(1) < depths[1]
    return _strongest(sources, targets, torch.cat(columns, dim=1), exists, count)


class _Finder:
    """One circuit's sources and targets."""

    def __init__(
        self,
        model: LoadedModel,
        clean: Run,
        path: Sequence[Differentiated] | StraightPath,
        replacements: Replacements,
        granularity: Granularity,
    ) -> None:
        self._model = model
        self._shape = model.architecture
        self._clean = clean
        self._path = path
        self._replacements = replacements
        self._by_head = granularity is Granularity.HEADS
        self._kept = slice(replacements.start, clean.n_positions)
        self._width = clean.n_positions - replacements.start

    def at_layer(self, layer: int) -> tuple[Component, ...]:
        """Components of a layer in the order in which they write; the embedding is layer -1."""
        if layer < 0:
            return (EMBED,)
        mlp = Component(Kind.MLP, layer)
        if not self._by_head:
            return (Component(Kind.ATTN, layer), mlp)
        return (*(Component.head(layer, head) for head in range(self._shape.n_heads)), mlp)

    def sources(self) -> list[Component]:
        """Everything that writes to the residual stream."""
        return [c for layer in range(-1, self._shape.n_layers) for c in self.at_layer(layer)]

    def depth(self, component: Component) -> float:
        """A component reads what all shallower ones have written."""
        if component.layer is None:
            return -1.0 if component.kind is Kind.EMBED else torch.inf
        after_attention = component.kind is Kind.MLP and not self._shape.parallel_blocks
        return component.layer + 0.5 * after_attention

    def writes(self, layer: int) -> Float[Tensor, "source pos d_model"]:
        """The difference that each component's replacement makes to what it writes. float32."""
        new, old, kept = self._replacements, self._clean, self._kept
        if layer < 0:
            return (new.embed.float() - old.resid_pre[0][0, kept].float()).unsqueeze(0)
        mlp = new.mlp[layer].float() - old.mlp[layer][0, kept].float()
        if self._by_head:
            by_attention = self._head_writes(layer)
        else:
            by_attention = (new.attn[layer].float() - old.attn[layer][0, kept].float()).unsqueeze(0)
        return torch.cat([by_attention, mlp.unsqueeze(0)])

    def _head_writes(self, layer: int) -> Float[Tensor, "head pos d_model"]:
        z = self._clean.z[layer][0, self._kept]
        difference = (self._replacements.z[layer] - z).view(len(z), self._shape.n_heads, -1)
        block = self._model.modules.blocks[layer]
        w_o = self._model.output_maps.w_o[layer].to(difference.device)
        projected = torch.bmm(difference.transpose(0, 1), w_o)
        if isinstance(block.attn_post_norm, nn.Identity):
            return projected.float()
        # What a norm makes of a small difference; to first order, like the strengths themselves.
        return _directional(block.attn_post_norm, block.w_o(z), projected).float()

    def target_groups(self, listener: Listener) -> Iterator[_Targets]:
        """The targets, as many layers of them at a time as may be held."""
        row_bytes = 4 * self._width * self._shape.d_model
        at_once = max(1, portion(_TARGETS_BYTES) // (row_bytes * len(self.at_layer(0))))
        n_layers = self._shape.n_layers
        for layers in torch.split(torch.arange(n_layers), at_once):
            summed: list[Tensor] = []
            n_rows = 0
            for number, part in enumerate(self._path):
                for row in range(len(part.gradients.embed)):
                    n_rows += 1
                    reads = self._reads(layers.tolist(), part.row(row), listener)
                    summed = (
                        [a + b for a, b in zip(summed, reads, strict=True)] if summed else reads
                    )
                done = number * n_layers + int(layers[-1]) + 1
                listener.progress("edges", done, len(self._path) * n_layers)
            components = [c for layer in layers.tolist() for c in self.at_layer(layer)]
            if layers[-1] == n_layers - 1:
                components.append(UNEMBED)
            yield _Targets(tuple(components), torch.cat(summed) / n_rows)

    def _reads(
        self, layers: Sequence[int], at: Differentiated, listener: Listener
    ) -> list[Float[Tensor, "target pos d_model"]]:
        """One row's gradients where components read, float32: a tensor a layer, the unembedding last."""
        found = []
        for layer in layers:
            listener.pause()
            attn = self._head_reads(layer, at) if self._by_head else at.gradients.attn_reads[layer]
            mlp = at.gradients.mlp_reads[layer]
            found.append(torch.cat([attn[:, -self._width :], mlp[:, -self._width :]]).float())
        if layers[-1] == self._shape.n_layers - 1:
            found.append(at.gradients.final[:, -self._width :].float())
        return found

    def _head_reads(self, layer: int, at: Differentiated) -> Float[Tensor, "head pos d_model"]:
        """The part of the gradient at attention's input that comes through each head.

        One row a head: the layer's attention again, and back through it with the gradient at all other
        heads' z left out.
        """
        call = at.run.calls[layer]
        start = 0 if call.keys is None else self._kept.start
        block = Block.of(
            self._model.modules.blocks[layer],
            call,
            parallel=self._shape.parallel_blocks,
            start=start,
            causal=causal_mask(at.run.n_positions, at.run.final),
        )
        residual = at.run.resid_pre[layer][0, start:]
        gradient = at.gradients.z[layer][0, start:]
        heads = torch.arange(self._shape.n_heads, device=residual.device)
        # What is clipped in place must lie apart row by row, and be computed so.
        alike = getattr(self._model.plain.config, _CLIPPING, None) is None
        found = [
            _through_heads(block, residual, gradient, some, self._shape.d_head, alike=alike)
            for some in torch.split(heads, rows_at_once(self._model, len(residual)))
        ]
        return torch.cat(found)


def _directional(
    norm: nn.Module,
    at: Float[Tensor, "pos d_model"],
    directions: Float[Tensor, "row pos d_model"],
) -> Float[Tensor, "row pos d_model"]:
    """The norm's derivative along each of the directions.

    By two backward passes, of which the second goes through the first: forward differentiation compiles
    code, at its first call, and by what PyTorch has deprecated.
    """
    with torch.enable_grad():
        point = at.detach().repeat(len(directions), 1, 1).requires_grad_()
        normed = norm(point)
        weights = torch.zeros_like(normed, requires_grad=True)
        (pulled_back,) = torch.autograd.grad(normed, point, weights, create_graph=True)
        return torch.autograd.grad(pulled_back, weights, directions)[0]


def _through_heads(
    block: Block,
    residual: Float[Tensor, "pos d_model"],
    gradient: Float[Tensor, "pos heads_by_d_head"],
    heads: Tensor,
    d_head: int,
    *,
    alike: bool,
) -> Float[Tensor, "head pos d_model"]:
    with torch.enable_grad():
        reads = residual.repeat(len(heads), 1, 1).requires_grad_()
        with linear_maps.computing(linear_maps.of(block.modules.attn), alike=alike):
            z = _mixed(block, reads)
        only = torch.zeros_like(z).view(*z.shape[:2], -1, d_head)
        own = torch.arange(len(heads), device=heads.device)
        only[own, :, heads] = gradient.view(len(gradient), -1, d_head)[:, heads].transpose(0, 1)
        return torch.autograd.grad(z, reads, only.flatten(-2))[0]


class _Found(Exception):
    """What was wanted of a module is there: the rest need not be computed."""


def _mixed(
    block: Block, reads: Float[Tensor, "row pos d_model"]
) -> Float[Tensor, "row pos heads_by_d_head"]:
    """Every head's z, before W_O."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(tensor_in(args))
        raise _Found

    handle = block.modules.w_o.register_forward_pre_hook(keep)
    try:
        block.attn(reads)
    except _Found:
        pass
    finally:
        handle.remove()
    return seen[0]


def _strongest(
    sources: Sequence[Component],
    targets: Sequence[Component],
    strengths: Float[Tensor, "source target"],
    exists: Bool[Tensor, "source target"],
    count: int,
) -> Edges:
    candidates = torch.where(exists, strengths, 0.0).flatten()
    total = int(exists.sum())
    # Of edges of strength 0, those that do not exist are not to be had either.
    order = torch.where(exists.flatten(), candidates.abs(), -1.0).topk(min(count, total)).indices
    values = candidates[order]
    edges = tuple(
        Edge(sources[index // len(targets)], targets[index % len(targets)], value)
        for index, value in zip(order.tolist(), values.tolist(), strict=True)
    )
    summed, carried = (some.abs().double().sum().item() for some in (candidates, values))
    return Edges(edges, carried / summed if summed > 0 else math.nan, total)
