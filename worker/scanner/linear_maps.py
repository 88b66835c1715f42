"""A model's large linear maps on a CPU, computed by oneDNN.

PyTorch leaves float32 products on a CPU to MKL, which packs a matrix anew each time it is read. For the ten
or so rows of a prompt that takes longer than the product: two thirds of a small model's forward pass. oneDNN,
which PyTorch carries for other types, reads the weights as they lie. Both sum in float32, in another order.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from worker.scanner.hooks import Forward, computed_by, own_forward

__all__ = ("computing", "linear", "of", "take_over")

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_WORTHWHILE = 1 << 18
"""Weights of a map below which finding oneDNN's kernel costs what it saves."""


def of(model: nn.Module) -> list[nn.Linear | Conv1D]:
    """The linear maps of a model or a part of one."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]


def take_over(model: nn.Module) -> None:
    """Have the model's large maps computed by `linear`, where that makes a difference.

    On each module, where it hides the class's own `forward`: hooks, names and weights are as they were.
    Maps that are elsewhere than on a CPU, of another type or spread over devices are left alone.
    """
    for module in of(model):
        if _suits(module.weight) and own_forward(module) is None:
            vars(module)["forward"] = _forward_of(module)


def computing(
    maps: Sequence[nn.Linear | Conv1D], *, back_along: int | None = None, alike: bool = False
) -> AbstractContextManager[None]:
    """Have the maps computed by `linear`, with its options, meanwhile."""
    return computed_by(
        {module: _forward_of(module, back_along=back_along, alike=alike) for module in maps}
    )


def linear(
    read: Float[Tensor, "*rows d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
    *,
    back_along: int | None = None,
    alike: bool = False,
) -> Float[Tensor, "*rows d_out"]:
    """`read @ weight.T + bias`, as `torch.nn.functional.linear`; differentiable in `read` alone.

    Args:
        read: What the map reads.
        weight: The map.
        bias: Added to each row.
        back_along: Rows of the first dimension, from the first, that gradients are taken for; those of the
            others are 0. All where None.
        alike: Whether what is read is the same in the whole first dimension, and differs in its gradients
            alone. What is given then shares its memory along it, and may not be changed in place.
    """
    if torch.is_grad_enabled() and read.requires_grad:
        apply: Any = _Linear.apply
        differentiable: Tensor = apply(read, weight, bias, back_along, alike)
        return differentiable
    return _mapped(read, weight, bias, alike=alike)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        read: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: int | None,
        alike: bool,  # noqa: FBT001  autograd hands on no keywords
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.rows = rows
        return _mapped(read, weight, bias, alike=alike)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        (gradient,) = gradients
        found = _product(gradient[: ctx.rows], weight.T)
        if len(found) < len(gradient):
            nothing = found.new_zeros(len(gradient) - len(found), *found.shape[1:])
            found = torch.cat([found, nothing])
        return found, None, None, None, None


def _mapped(read: Tensor, weight: Tensor, bias: Tensor | None, *, alike: bool) -> Tensor:
    if alike:
        return _product(read[:1], weight, bias).expand(len(read), *read.shape[1:-1], -1)
    return _product(read, weight, bias)


def _product(read: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _suits(weight) and read.numel():
        # What `torch.compile` calls for the same purpose; eager mode has no other door to it.
        found: Tensor = torch.ops.mkldnn._linear_pointwise(read, weight, bias, "none", [], "")  # noqa: SLF001
        return found
    return functional.linear(read, weight, bias)


def _suits(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype is torch.float32
        and weight.numel() >= _WORTHWHILE
        and _HAS_ONEDNN
    )


def _forward_of(module: nn.Linear | Conv1D, **options: Any) -> Forward:
    transposed = isinstance(module, Conv1D)

    def forward(read: Tensor) -> Tensor:
        weight = module.weight
        there = read.to(weight.device)
        found = linear(there, weight.T if transposed else weight, module.bias, **options)
        return found.to(read.device)

    return forward
