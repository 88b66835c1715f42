"""Reading a plain model's modules while it runs, and leaving it as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ("Reader", "hooked", "tensor_in", "tensor_out")

Reader = Callable[[nn.Module, tuple[Any, ...], Any], None]
"""Called with a module, its positional arguments and its output."""


@contextmanager
def hooked(*readers: tuple[nn.Module, Reader]) -> Iterator[None]:
    """Call each reader whenever its module has run. All are gone afterwards, whatever happened."""
    handles = []
    try:
        for module, reader in readers:
            handles.append(module.register_forward_hook(reader))
        yield
    finally:
        for handle in handles:
            handle.remove()


def tensor_in(args: tuple[Any, ...]) -> Tensor:
    """What a module was given: its first positional argument."""
    value: Tensor = args[0]
    return value


def tensor_out(output: Any) -> Tensor:
    """What a module gave: its output, or the first of several."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value
