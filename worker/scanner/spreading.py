"""Models too large for one device: their weights spread over several.

Weights are loaded to their places and modules run there by `accelerate`. Only weights are spread: a module
that owns some runs where they are, and gives what it made back to where its input came from. So whatever hooks see, TransformerLens's
or ours, is on one device, the first, where activations are, and no scan knows of any other. It costs a
transfer of activations for each of a block's large maps, which is little beside the maps themselves.

What scans read as a matrix, the embeddings and the unembedding, stays on the first device, with everything
else that is in no block, and what is small wherever it is: norms, masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import find_device, send_to_device
from torch import nn
from transformers import PreTrainedModel

from neural_mri.contract.problems import UnsupportedModel

__all__ = ("Places", "follow_weights", "gather", "places")

Places = Mapping[str, int]
"""The device of each module, by dotted name, of those whose parents have none: accelerate's `device_map`."""


def places(
    skeleton: PreTrainedModel,
    free_bytes: Sequence[int],
    total_bytes: Sequence[int],
    dtype: torch.dtype,
) -> Places | None:
    """Where each part of a model should stand on devices with so much memory; None where it fits on the first.

    Blocks stand in their order, and every device is as full as the others, as far as that goes. Raises
    `MemoryError` where it would fit if nothing else were there, `UnsupportedModel` where it would not.
    """
    weights = _bytes(skeleton, dtype)
    if weights <= free_bytes[0]:
        return None
    blocks = _blocks(skeleton)
    sizes = [_bytes(skeleton.get_submodule(name), dtype) for name in blocks]
    found = _spread(sizes, weights - sum(sizes), free_bytes)
    if found is not None:
        on_blocks = dict(zip(blocks, found, strict=True))
        return dict.fromkeys(_beside(skeleton, blocks), 0) | on_blocks
    says = f"{type(skeleton).__name__} has {weights / 2**30:.1f} GiB of weights: they do not fit "
    if weights <= total_bytes[0] or _spread(sizes, weights - sum(sizes), total_bytes) is not None:
        raise MemoryError(f"{says}beside what is there: devices have {_shown(free_bytes)} free")
    if not blocks:
        raise UnsupportedModel(
            f"{type(skeleton).__name__} does not say what its blocks are: it cannot be spread"
        )
    raise UnsupportedModel(
        f"{says}block by block on devices with {_shown(total_bytes)} for them, its embeddings on the first"
    )


def _shown(n_bytes: Sequence[int]) -> str:
    return " and ".join(f"{each / 2**30:.1f} GiB" for each in n_bytes)


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Of its weights, each once, whoever shares it."""
    return sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize


def _spread(sizes: Sequence[int], ends: int, room: Sequence[int]) -> list[int] | None:
    """A device for each block, the ends on the first; None where they do not fit, or there are no blocks."""
    if not sizes or room[0] < ends:
        return None
    room = [room[0] - ends, *room[1:]]
    # Each device as full as it must be for all to be as full: tried in percents of the room.
    tried = (_packed(sizes, [each * percent // 100 for each in room]) for percent in range(1, 101))
    return next((found for found in tried if found is not None), None)


def _packed(sizes: Sequence[int], room: Sequence[int]) -> list[int] | None:
    """A device for each block, in order; None where they do not fit."""
    found, device, left = list[int](), 0, room[0]
    for size in sizes:
        while size > left:
            device += 1
            if device == len(room):
                return None
            left = room[device]
        left -= size
        found.append(device)
    return found


def _blocks(skeleton: PreTrainedModel) -> list[str]:
    """The blocks, which stay whole, in the order in which they run; none where the family does not say."""
    whole = frozenset(getattr(skeleton, "_no_split_modules", None) or ())
    return [name for name, module in skeleton.named_modules() if type(module).__name__ in whole]


def _beside(skeleton: PreTrainedModel, blocks: Sequence[str]) -> list[str]:
    """The largest parts of the model in which there is no block."""
    around = {name.rsplit(".", count)[0] for name in blocks for count in range(1, 9)} | {""}
    inside = frozenset(blocks)
    return [
        name
        for name, _ in skeleton.named_modules()
        if name not in around and name not in inside and name.rpartition(".")[0] in around
    ]


class _WhereItsWeightsAre(ModelHook):  # type: ignore[misc]  # accelerate says no types
    """Runs a module on its weights' device; what comes and goes is where it was."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._from: torch.device | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG002
        self._from = find_device([args, kwargs])
        return send_to_device(args, self._device), send_to_device(kwargs, self._device)

    def post_forward(self, module: nn.Module, output: Any) -> Any:  # noqa: ARG002
        return output if self._from is None else send_to_device(output, self._from)


def gather(model: nn.Module, main: torch.device) -> None:
    """Put what is small (norms, masks, rotary frequencies) on `main`, where activations are.

    Takes accelerate's own hooks away, which would leave activations where the weights are.
    """
    if all(parameter.device == main for parameter in model.parameters()):
        return
    remove_hook_from_submodules(model)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(main))
        own = dict(module.named_parameters(recurse=False))
        if all(parameter.dim() == 1 for parameter in own.values()):
            for name, parameter in own.items():
                there = nn.Parameter(parameter.detach().to(main), requires_grad=False)
                setattr(module, name, there)


def follow_weights(model: nn.Module, main: torch.device) -> None:
    """Have every module that owns weights elsewhere than on `main` run there."""
    for module in model.modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None and own.device != main:
            add_hook_to_module(module, _WhereItsWeightsAre(own.device))
