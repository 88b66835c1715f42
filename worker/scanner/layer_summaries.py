"""What an fMRI scan keeps of each layer: numbers instead of tensors.

The arithmetic is done for several layers at once: small operations between the model's own are what a
scan would otherwise spend its time on, on any device.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.scans import ActivationScan, Aggregation, reporting_order
from worker.scanner.measures import measure, norm
from worker.scanner.output_maps import OutputMaps

__all__ = ("SINK_RATIO", "LayerTensors", "Neurons", "Part", "Summaries", "Vectors", "sinks")

SINK_RATIO = 10.0
"""A token is a sink when its residual norm is this often the median over the tokens after the first."""


class Part(StrEnum):
    """What the modules of a block show."""

    BEFORE = "before"
    """The residual stream entering the block."""
    Z = "z"
    """Every head's mix, side by side."""
    PROJECTED = "projected"
    """W_O's output, where a norm follows it."""
    ATTN = "attn"
    """What attention writes to the residual stream."""
    HIDDEN = "hidden"
    """The MLP's hidden activation."""
    MLP = "mlp"
    """What the MLP writes to the residual stream."""
    AFTER = "after"
    """The residual stream leaving the block, at every position: sinks are looked for in all of it."""


class LayerTensors(NamedTuple):
    """One block's tensors, `[prompt pos width]` each or `[pos width]`: what was asked for."""

    layer: int
    parts: Mapping[Part, Tensor]


class Neurons(NamedTuple):
    """The strongest neurons of some MLPs at each reported position, strongest first."""

    layers: tuple[int, ...]
    indices: Int[Tensor, "layer pos rank"]
    values: Float[Tensor, "layer pos rank"]


class Vectors(NamedTuple):
    """The vectors behind the values of one layer, or of the embedding or unembedding."""

    components: tuple[Component, ...]
    values: Float[Tensor, "component pos d_model"]


class Summaries:
    """One scan's values, filled as layers come in."""

    def __init__(
        self,
        request: ActivationScan,
        components: Sequence[Component],
        shape: Architecture,
        maps: OutputMaps,
        *,
        n_positions: int,
        kept: Int[Tensor, " kept"] | None,
        device: torch.device,
    ) -> None:
        self._shape = shape
        self._maps = maps
        self._kept = kept
        self._aggregation = request.aggregation
        self._n_neurons = min(request.top_neurons, shape.d_mlp)
        self._of_layer: defaultdict[int | None, list[Component]] = defaultdict(list)
        for component in components:
            self._of_layer[component.layer].append(component)

        order = reporting_order(shape)
        rows = {component: row for row, component in enumerate(order)}
        self._rows = [rows[component] for component in components]
        self._values = torch.full((len(order), n_positions), torch.nan, device=device)
        # Between the first row, the embedding, and the last: the same rows for each layer.
        self._blocks = self._values[1:-1].view(shape.n_layers, -1, n_positions)
        self._row_of_kind = {
            c.kind: row - 1 for c, row in rows.items() if c.layer == 0 and c.index in (None, 0)
        }
        self._vectors_of_kind: dict[Kind, Tensor] = {}
        self._residual_norms: list[Float[Tensor, "layer pos"]] = []
        self._neurons: list[Neurons] = []
        self.vectors: dict[str, Vectors] = {}
        """By what they are of (`embed`, a layer's number); filled by `raw` alone."""

    def add_embedding(self, value: Float[Tensor, "*pos d_model"]) -> None:
        """The residual stream entering the first block, at reported positions."""
        self._add_end(0, value)

    def add_unembedding(self, value: Float[Tensor, "*pos d_model"]) -> None:
        """The final norm's output, at reported positions."""
        self._add_end(-1, value)

    def _add_end(self, row: int, vectors: Float[Tensor, "*pos d_model"]) -> None:
        value = vectors.flatten(0, -2)
        self._values[row] = measure(value, self._aggregation)
        if self._aggregation is Aggregation.RAW:
            component = self._of_layer[None][row]
            self.vectors[str(component)] = Vectors((component,), value.float().unsqueeze(0).cpu())

    def add_layers(self, layers: Sequence[LayerTensors]) -> None:
        """Consecutive layers that show the same parts."""
        span = slice(layers[0].layer, layers[-1].layer + 1)
        seen = {
            # All prompts one after another. To flatten them once a layer would cost as much as to measure them.
            part: _side_by_side([layer.parts[part] for layer in layers]).flatten(1, -2)
            for part in layers[0].parts
        }
        self._residual_norms.append(norm(seen[Part.AFTER]))
        if not self._of_layer[span.start]:
            return
        self._vectors_of_kind.clear()
        if Part.BEFORE in seen:
            self._put(span, Kind.RESID_PRE, seen[Part.BEFORE])
            self._put(span, Kind.RESID_POST, self._kept_of_each(seen[Part.AFTER]))
        if Part.ATTN in seen:
            self._put(span, Kind.ATTN, seen[Part.ATTN])
        if Part.BEFORE in seen and Kind.RESID_MID in self._row_of_kind:
            self._put(span, Kind.RESID_MID, seen[Part.BEFORE] + seen[Part.ATTN])
        if Part.Z in seen:
            self._put_heads(span, seen)
        if Part.MLP in seen:
            self._put(span, Kind.MLP, seen[Part.MLP])
        if Part.HIDDEN in seen:
            self._add_neurons(span, seen[Part.HIDDEN])
        if self._aggregation is Aggregation.RAW:
            self._keep_vectors(span)

    def values(self) -> Float[Tensor, "component pos"]:
        """The reported values, in reporting order, on the CPU."""
        return self._values.cpu()[self._rows]

    def layer_values(
        self, layer: int, *, each: int = 1
    ) -> Callable[[], list[dict[Kind, list[float]]]]:
        """A layer's reported values at the last position of each of `each` prompts, when they are asked for.

        They then wait for the device, and keep nothing but the values themselves.
        """
        of_layer, components = self._blocks[layer], self._of_layer[layer]
        row_of_kind = self._row_of_kind

        @cache
        def values() -> list[dict[Kind, list[float]]]:
            step = of_layer.shape[1] // each
            rows: defaultdict[Kind, list[int]] = defaultdict(list)
            for component in components:
                rows[component.kind].append(row_of_kind[component.kind] + (component.index or 0))
            return [
                {kind: [last[row] for row in of_kind] for kind, of_kind in rows.items()}
                for last in of_layer[:, step - 1 :: step].T.tolist()
            ]

        return values

    def neurons(self) -> Neurons | None:
        """The strongest neurons, on the CPU; None where none were asked for."""
        if not self._neurons:
            return None
        return Neurons(
            tuple(layer for part in self._neurons for layer in part.layers),
            torch.cat([part.indices for part in self._neurons]).cpu(),
            torch.cat([part.values for part in self._neurons]).cpu(),
        )

    def sinks(self, *, each: int = 1) -> Bool[Tensor, "prompt pos"]:
        """Whether each token of each of `each` prompts is a sink in any layer."""
        norms = torch.cat(self._residual_norms).cpu()
        return sinks(norms.view(len(norms), each, -1))

    def _kept_of_each(self, values: Float[Tensor, "layer pos width"]) -> Tensor:
        return values if self._kept is None else values.index_select(1, self._kept)

    def _put(self, span: slice, kind: Kind, vectors: Float[Tensor, "layer pos d_model"]) -> None:
        self._blocks[span, self._row_of_kind[kind]] = measure(vectors, self._aggregation)
        if self._aggregation is Aggregation.RAW:
            self._vectors_of_kind[kind] = vectors.unsqueeze(1)

    def _put_heads(self, span: slice, seen: Mapping[Part, Tensor]) -> None:
        n_heads, d_head = self._shape.n_heads, self._shape.d_head
        z = seen[Part.Z].view(*seen[Part.Z].shape[:-1], n_heads, d_head)
        first = self._row_of_kind[Kind.HEAD]
        scale = None
        if Part.PROJECTED in seen:
            scale = self._maps.scale(span, seen[Part.PROJECTED], seen[Part.ATTN]).unsqueeze(1)
        if self._aggregation is Aggregation.L2_NORM:
            values = self._maps.norms(span, z)
            if scale is not None:
                values *= scale
        else:
            vectors = self._maps.vectors(span, z)
            if scale is not None:
                vectors *= scale.unsqueeze(-1)
            values = measure(vectors, self._aggregation)
            if self._aggregation is Aggregation.RAW:
                self._vectors_of_kind[Kind.HEAD] = vectors
        self._blocks[span, first : first + n_heads] = values

    def _keep_vectors(self, span: slice) -> None:
        for offset, layer in enumerate(range(span.start, span.stop)):
            components = tuple(self._of_layer[layer])
            vectors = [self._vectors_of_kind[c.kind][offset, c.index or 0] for c in components]
            self.vectors[str(layer)] = Vectors(components, torch.stack(vectors).float().cpu())

    def _add_neurons(self, span: slice, hidden: Float[Tensor, "layer pos d_mlp"]) -> None:
        indices = hidden.abs().topk(self._n_neurons).indices
        layers = [
            layer
            for layer in range(span.start, span.stop)
            if Component(Kind.MLP, layer) in self._of_layer[layer]
        ]
        chosen = [layer - span.start for layer in layers]
        self._neurons.append(
            Neurons(tuple(layers), indices[chosen], hidden.gather(-1, indices).float()[chosen])
        )


def _side_by_side(values: Sequence[Tensor]) -> Float[Tensor, "layer *rest"]:
    """Of several layers; a single one's is not copied for it."""
    return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(list(values))


def sinks(norms: Float[Tensor, "layer *prompt pos"]) -> Bool[Tensor, "*prompt pos"]:
    """Whether each token is a sink in any layer, from the norms of what leaves the blocks."""
    found = torch.zeros(norms.shape[1:], dtype=torch.bool)
    found[..., 0] = True
    if norms.shape[-1] > 1:
        typical = norms[..., 1:].median(dim=-1, keepdim=True).values
        found |= (norms > SINK_RATIO * typical).any(dim=0)
    return found
