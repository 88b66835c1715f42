"""Devices to test with where there are none: tensors on them keep their numbers on the CPU.

As on real devices, no operation takes tensors of two of them; only `to` goes from one to another. PyTorch
knows a device without numbers, `meta`; `meta:1`, `meta:2` and so on stand for what a machine would have.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ("PretendDevices", "device", "moved")

_COPY = torch.ops.aten._to_copy.default


def device(index: int) -> torch.device:
    """One of the devices."""
    return torch.device("meta", index)


class Elsewhere(Tensor):
    """A tensor on one of the devices."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way

    _numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, where: torch.device) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=where,
        )
        made._numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch calls it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class PretendDevices(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch says no types
    """While it is entered, tensors can be sent to the devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode operations arrive whole that elsewhere arrive in their parts.
        with self:
            parts = func.decompose(*args, **(kwargs or {})) if func._can_decompose() else None
        if parts is not None and parts is not NotImplemented:
            return parts
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    # Views of ordinary tensors that were made in inference mode could not be wrapped.
    with torch.inference_mode(mode=False), torch.no_grad():
        return _ran(func, args, kwargs)


def _ran(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    target = kwargs.get("device")
    if func is _COPY and target is not None:
        rest = {name: value for name, value in kwargs.items() if name != "device"}
        copied = func(_bare(args[0]), **rest)
        return _on(copied, torch.device(target))
    # A number is taken from anywhere, as everywhere.
    found = {tensor.device for tensor in given if tensor.dim() > 0}
    if len(found) > 1:
        raise RuntimeError(f"{func}: expected one device, found {sorted(map(str, found))}")
    where = next(iter(found), torch.device("cpu"))
    if where.type == "meta" and target is not None:
        kwargs = {**kwargs, "device": None}
    outcome = func(*tree_map(_bare, args), **tree_map(_bare, kwargs))
    same = {id(tensor._numbers): tensor for tensor in given if isinstance(tensor, Elsewhere)}
    return tree_map(
        lambda leaf: same.get(id(leaf), _on(leaf, where)) if isinstance(leaf, Tensor) else leaf,
        outcome,
    )


def _bare(leaf: Any) -> Any:
    return leaf._numbers if isinstance(leaf, Elsewhere) else leaf


def _on(tensor: Tensor, where: torch.device) -> Tensor:
    return Elsewhere(tensor, where) if where.type == "meta" else tensor


def moved(module: nn.Module, where: torch.device) -> None:
    """Put a module's weights on a device."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            there = Elsewhere(parameter.detach(), where)
            setattr(part, name, nn.Parameter(there, requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = Elsewhere(buffer, where)
