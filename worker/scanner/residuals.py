"""The residual stream at every place a lens can be held to.

The places, in the order the stream comes to them: what enters the first block (`embed`), then of each
block the stream after attention has written (`resid_mid`) and after the MLP has (`resid_post`). Where both
sublayers read the same residual, `resid_mid` is what the stream would be had attention alone written: no
module reads it, but what the two write still adds up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from neural_mri.contract.components import EMBED, Component, Kind
from worker.scanner.hooks import Reader, hooked, tensor_in, tensor_out
from worker.scanner.layer_summaries import SINK_RATIO
from worker.scanner.listening import Listener
from worker.scanner.loading import LoadedModel
from worker.scanner.measures import norm

__all__ = ("ResidualReading", "Residuals", "inner_places", "outer_places")


def outer_places(n_layers: int) -> tuple[Component, ...]:
    """The stream between blocks: before the first, and after each."""
    return (EMBED, *(Component(Kind.RESID_POST, layer) for layer in range(n_layers)))


def inner_places(n_layers: int) -> tuple[Component, ...]:
    """The stream inside each block, between its sublayers."""
    return tuple(Component(Kind.RESID_MID, layer) for layer in range(n_layers))


class Residuals(NamedTuple):
    """The residual stream at some positions, in the model's type, on its device."""

    outer: Float[Tensor, "outer pos d_model"]
    """At each of `outer_places`; the last is what the final norm reads."""
    inner: Float[Tensor, "layer inner_pos d_model"]
    """At each of `inner_places`."""


class ResidualReading:
    """One forward's residuals: use `listening` round it, then read them.

    Positions of a batch count on from one text to the next: `text * length + position`.
    """

    residuals: Residuals

    def __init__(
        self,
        model: LoadedModel,
        positions: Int[Tensor, " pos"],
        inner_positions: Int[Tensor, " inner_pos"],
        listener: Listener,
    ) -> None:
        shape = model.architecture
        self._modules = model.modules
        self._n_layers = shape.n_layers
        self._positions = positions.to(model.device)
        self._inner_positions = inner_positions.to(model.device)
        self._listener = listener
        self._before = torch.empty(0)
        self._lengths: list[Float[Tensor, " all_pos"]] = []
        kind: dict[str, Any] = {"device": model.device, "dtype": model.plain.dtype}
        self.residuals = Residuals(
            torch.empty(shape.n_layers + 1, len(positions), shape.d_model, **kind),
            torch.empty(shape.n_layers, len(inner_positions), shape.d_model, **kind),
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Read the model's next forward."""
        readers: list[tuple[nn.Module, Reader]] = []
        for layer, block in enumerate(self._modules.blocks):
            if len(self._inner_positions):
                readers.append((block.attn_write, partial(self._after_attention, layer)))
            readers.append((block.block, partial(self._after_block, layer)))
        with hooked(*readers, before=[(self._modules.blocks[0].block, self._before_blocks)]):
            yield

    def sinks(self, text: slice = slice(None)) -> Bool[Tensor, " pos"]:
        """Whether each token of a text, at these positions of the batch, is a sink in any layer."""
        lengths = torch.stack(self._lengths).cpu()[:, text]
        sinks = torch.zeros(lengths.shape[1], dtype=torch.bool)
        sinks[0] = True
        if len(sinks) > 1:
            typical = lengths[:, 1:].median(dim=1, keepdim=True).values
            sinks |= (lengths > SINK_RATIO * typical).any(dim=0)
        return sinks

    def _before_blocks(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        entering = tensor_in(args).flatten(0, 1)
        self._take(entering, self._positions, self.residuals.outer[0])
        self._go_on_from(entering)

    def _after_attention(
        self, layer: int, _module: nn.Module, _args: tuple[Any, ...], output: Any
    ) -> None:
        written = tensor_out(output).flatten(0, 1).index_select(0, self._inner_positions)
        torch.add(self._before, written, out=self.residuals.inner[layer])

    def _after_block(
        self, layer: int, _module: nn.Module, _args: tuple[Any, ...], output: Any
    ) -> None:
        leaving = tensor_out(output).flatten(0, 1)
        self._take(leaving, self._positions, self.residuals.outer[layer + 1])
        self._go_on_from(leaving)
        self._lengths.append(norm(leaving))
        self._listener.progress("forward", layer + 1, self._n_layers)
        self._listener.checkpoint()

    def _go_on_from(self, stream: Float[Tensor, "all_pos d_model"]) -> None:
        if len(self._inner_positions):
            self._before = stream.index_select(0, self._inner_positions)

    @staticmethod
    def _take(
        stream: Float[Tensor, "all_pos d_model"], at: Int[Tensor, " pos"], into: Tensor
    ) -> None:
        torch.index_select(stream, 0, at, out=into)
