"""Reading a plain model's modules while it runs, and leaving it as it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = (
    "Before",
    "Forward",
    "Reader",
    "awake",
    "computed_by",
    "hooked",
    "own_forward",
    "set_aside",
    "tensor_in",
    "tensor_out",
)

Reader = Callable[[nn.Module, tuple[Any, ...], Any], None]
"""Called with a module, its positional arguments and its output."""
Before = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]
"""Called with a module and its positional arguments, before it runs; may give it others."""

Forward = Callable[[Tensor], Tensor]
"""What a module computes."""


class _Awake:
    """Whose readers are called now. Models run on one thread alone."""

    now: object = None


@contextmanager
def set_aside() -> Iterator[None]:
    """While the block runs no reader that is in place is called: another's forward may run on its model."""
    before, _Awake.now = _Awake.now, object()
    try:
        yield
    finally:
        _Awake.now = before


def awake() -> Callable[[], bool]:
    """Says later whether the forward that is being prepared now runs, and not another's in its pause."""
    mine = _Awake.now
    return lambda: _Awake.now is mine


@contextmanager
def hooked(
    *readers: tuple[nn.Module, Reader], before: Sequence[tuple[nn.Module, Before]] = ()
) -> Iterator[None]:
    """Call each reader whenever its module has run, and each of `before` when its module is about to.

    All are gone afterwards, whatever happened.
    """
    is_awake, handles = awake(), []

    def call(reader: Reader, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if is_awake():
            reader(module, args, output)

    def prepare(what: Before, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return what(module, args) if is_awake() else None

    try:
        for module, what in before:
            handles.append(module.register_forward_pre_hook(partial(prepare, what)))
        for module, reader in readers:
            handles.append(module.register_forward_hook(partial(call, reader)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_forward(module: nn.Module) -> Forward | None:
    """What a module alone computes in place of its class's `forward`: ours, or what takes it to its weights."""
    return vars(module).get("forward")


@contextmanager
def computed_by(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Have modules computed by other functions meanwhile, afterwards by whatever it was before.

    On the instance, where it hides the class's own: hooks, names and weights are as they were.
    """
    hidden = {module: own_forward(module) for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in hidden.items():
            vars(module).pop("forward", None)
            if own is not None:
                vars(module)["forward"] = own


def tensor_in(args: tuple[Any, ...]) -> Tensor:
    """What a module was given: its first positional argument."""
    value: Tensor = args[0]
    return value


def tensor_out(output: Any) -> Tensor:
    """What a module gave: its output, or the first of several."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value
