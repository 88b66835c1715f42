"""Reading the layers of a plain model while it runs.

Hooks only take hold of tensors. They are summarised as soon as enough has gathered, so that no more than
`GATHERED_BYTES`, or one layer, is kept alive for it; where that happens depends on shapes alone, so that
equal scans give equal digits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.events import LayerFrame
from neural_mri.contract.scans import ActivationScan
from worker.scanner.hooks import Reader, hooked, tensor_in, tensor_out
from worker.scanner.layer_summaries import LayerTensors, Part, Summaries
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.measures import unit
from worker.scanner.shared_forward import RowsOf
from worker.scanner.sites import BlockModules

__all__ = ("GATHERED_BYTES", "Reading")

GATHERED_BYTES = 2 << 20
"""What is summarised together should still be in a processor's cache. To lay layers side by side is to copy
them: of a dozen prompts one layer is enough by itself."""


class Reading:
    """One scan's readings: use `listening` round one forward, then read `summaries`."""

    def __init__(
        self,
        model: LoadedModel,
        request: ActivationScan,
        components: tuple[Component, ...],
        positions: tuple[int, ...],
        *listeners: Listener,
        rows: RowsOf | None = None,
    ) -> None:
        """`positions` of all prompts, one prompt after another; a listener a prompt.

        The prompts are these rows of the batch, all of it where left out.
        """
        self._modules = model.modules
        self._n_layers = model.architecture.n_layers
        self._kinds = frozenset(component.kind for component in components)
        self._layers = frozenset(component.layer for component in components)
        self._reads_neurons = Kind.MLP in self._kinds and request.top_neurons > 0
        self._reads_residuals = any(kind.is_residual for kind in self._kinds)
        self._listeners = listeners
        self._rows = rows
        self._last_positions = positions[
            len(positions) // len(listeners) - 1 :: len(positions) // len(listeners)
        ]
        self._unit = unit(request.aggregation)
        self._kept = None
        if request.token_positions != "all":
            self._kept = torch.tensor(positions, device=model.device)
        self._running: dict[Part, Tensor] = {}
        self._gathered: list[LayerTensors] = []
        self._gathered_bytes = 0
        self.summaries = Summaries(
            request,
            components,
            model.architecture,
            model.output_maps,
            n_positions=len(positions),
            kept=self._kept,
            device=model.device,
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Read the model's next forward."""
        readers: list[tuple[nn.Module, Reader]] = []
        for layer, block in enumerate(self._modules.blocks):
            if layer in self._layers:
                readers += self._readers_inside(block)
            readers.append((block.block, partial(self._end_layer, layer)))
        if Kind.UNEMBED in self._kinds:
            readers.append((self._modules.final_norm, self._read_final_norm))
        with hooked(*readers):
            yield

    def _readers_inside(self, block: BlockModules) -> Iterator[tuple[nn.Module, Reader]]:
        """What must be seen inside a block for what is asked: one reader a module."""
        z = Part.Z if Kind.HEAD in self._kinds else None
        attn = Part.ATTN if self._kinds & {Kind.ATTN, Kind.HEAD, Kind.RESID_MID} else None
        hidden = Part.HIDDEN if self._reads_neurons else None
        mlp = Part.MLP if Kind.MLP in self._kinds else None
        if block.attn_write is block.w_o:
            yield block.w_o, self._holder(z, attn)
        else:
            yield block.w_o, self._holder(z, Part.PROJECTED if z else None)
            yield block.attn_write, self._holder(None, attn)
        if block.mlp_write is block.w_out:
            yield block.w_out, self._holder(hidden, mlp)
        else:
            yield block.w_out, self._holder(hidden, None)
            yield block.mlp_write, self._holder(None, mlp)

    def _holder(self, taken: Part | None, given: Part | None) -> Reader:
        """Keeps what a module took and gave, as the parts that they are."""
        running, at_positions = self._running, self._at_positions

        def hold(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if taken is not None:
                running[taken] = at_positions(tensor_in(args))
            if given is not None:
                running[given] = at_positions(tensor_out(output))

        return hold

    def _at_positions(self, value: Tensor) -> Tensor:
        """At reported positions: as it is, `[prompt pos width]`, where those are all."""
        own = self._own(value)
        return own if self._kept is None else own.flatten(0, 1).index_select(0, self._kept)

    def _own(self, value: Tensor) -> Tensor:
        return value if self._rows is None else self._rows(value)

    def _end_layer(self, layer: int, _m: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        parts = self._running.copy()
        self._running.clear()
        if layer == 0 and Kind.EMBED in self._kinds:
            self.summaries.add_embedding(self._at_positions(tensor_in(args)))
        if self._reads_residuals and layer in self._layers:
            parts[Part.BEFORE] = self._at_positions(tensor_in(args))
        parts[Part.AFTER] = self._own(tensor_out(output))
        if self._gathered and self._gathered[-1].parts.keys() != parts.keys():
            self._summarise()
        self._gathered.append(LayerTensors(layer, parts))
        self._gathered_bytes += sum(tensor.nbytes for tensor in parts.values())
        if self._gathered_bytes >= GATHERED_BYTES or layer == self._n_layers - 1:
            self._summarise()

    def _read_final_norm(self, _m: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self.summaries.add_unembedding(self._at_positions(tensor_out(output)))

    def _summarise(self) -> None:
        self.summaries.add_layers(self._gathered)
        for gathered in self._gathered:
            if gathered.layer in self._layers:
                self._tell(gathered.layer)
        self._gathered, self._gathered_bytes = [], 0

    def _tell(self, layer: int) -> None:
        of_prompts = self.summaries.layer_values(layer, each=len(self._listeners))
        told = zip(self._listeners, self._last_positions, strict=True)
        for number, (listener, last_position) in enumerate(told):
            made = partial(_frame, layer, last_position, self._unit, of_prompts, number)
            listener.layer(layer, made)


def _frame(
    layer: int,
    last_position: int,
    unit: str,
    of_prompts: Callable[[], Sequence[Mapping[Kind, list[float]]]],
    number: int,
) -> LayerFrame:
    """What one prompt's listener is told of a layer, if somebody is to see it."""
    values = of_prompts()[number]

    def one(kind: Kind) -> float | None:
        return values[kind][0] if kind in values else None

    return LayerFrame(
        layer=layer,
        token_idx=last_position,
        heads=tuple(values.get(Kind.HEAD, ())),
        mlp=one(Kind.MLP),
        attn=one(Kind.ATTN),
        resid_post=one(Kind.RESID_POST),
        unit=unit,
    )
