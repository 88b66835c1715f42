"""Replacing one component in one run, with nothing but Hugging Face's model and hooks written by hand.

What sweeps, estimates and edges are held against. It takes module names from `tests.models`, and no code
from the scanner but the model's shape.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neural_mri.contract.components import EMBED, Component, Kind
from neural_mri.contract.models import Architecture
from tests import models
from worker.scanner.loading import LoadedModel

__all__ = ("ByHand",)


class ByHand:
    """A family's model, its parts found by the names that are written down for tests."""

    def __init__(self, model: LoadedModel, family: str) -> None:
        self.plain: Any = model.plain
        self.shape: Architecture = model.architecture
        self._names = models.NAMES[family]

    def components(self, *, by_head: bool = True) -> list[Component]:
        """The embedding, and every layer's heads or attention, and MLP."""
        found = [EMBED]
        for layer in range(self.shape.n_layers):
            heads = [Component.head(layer, head) for head in range(self.shape.n_heads)]
            found += heads if by_head else [Component(Kind.ATTN, layer)]
            found.append(Component(Kind.MLP, layer))
        return found

    def block(self, layer: int) -> nn.Module:
        found: nn.Module = self.plain.get_submodule(f"{self._names.blocks}.{layer}")
        return found

    def logits(self, ids: Tensor) -> Tensor:
        """After the last position."""
        with torch.no_grad():
            found: Tensor = self.plain(input_ids=ids, use_cache=False).logits[0, -1]
        return found.float()

    def values(self, ids: Tensor, components: Sequence[Component]) -> dict[Component, Tensor]:
        """What each component gives in one run, where it would be replaced: `[pos width]`."""
        found: dict[Component, Tensor] = {}

        def keep(component: Component) -> Any:
            def read(value: Tensor) -> Tensor:
                found[component] = value[0, :, self._own(component)].clone()
                return value

            return read

        with ExitStack() as stack:
            for component in components:
                stack.enter_context(self._changed(component, keep(component)))
            self.logits(ids)
        return found

    @contextmanager
    def replaced(self, component: Component, by: Tensor | float, *, start: int) -> Iterator[None]:
        """The component has another value from position `start` on."""

        def change(value: Tensor) -> Tensor:
            edited = value.clone()
            edited[:, start:, self._own(component)] = by
            return edited

        with self._changed(component, change):
            yield

    def logits_without(
        self, ids: Tensor, component: Component, by: Tensor | float, *, start: int
    ) -> Tensor:
        """Logits when the component has another value from position `start` on."""
        with self.replaced(component, by, start=start):
            return self.logits(ids)

    def _own(self, component: Component) -> slice:
        if component.kind is not Kind.HEAD:
            return slice(None)
        head, d_head = component.index or 0, self.shape.d_head
        return slice(head * d_head, (head + 1) * d_head)

    @contextmanager
    def _changed(self, component: Component, change: Any) -> Iterator[None]:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (change(args[0]), *args[1:])

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            changed: Tensor = change(output)
            return changed

        names, block = self._names, self.block(component.layer or 0)
        match component.kind:
            case Kind.EMBED:
                handle = block.register_forward_pre_hook(before)
            case Kind.HEAD:
                handle = block.get_submodule(names.w_o).register_forward_pre_hook(before)
            case Kind.ATTN:
                name = names.attn_post_norm or names.w_o
                handle = block.get_submodule(name).register_forward_hook(after)
            case _:
                name = names.mlp_post_norm or names.w_out
                handle = block.get_submodule(name).register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()
