"""What components write on ordinary text: the values that mean ablation puts in their place."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from worker.scanner.hooks import Reader, hooked, tensor_in, tensor_out
from worker.scanner.loading import LoadedModel

__all__ = ("ReferenceMeans", "reference_means")


class ReferenceMeans(NamedTuple):
    """Means over positions 1 and later of reference text; position 0 holds the attention sink."""

    z: Float[Tensor, "layer head d_head"]
    hidden: Float[Tensor, "layer d_mlp"]
    attn: Float[Tensor, "layer d_model"]
    mlp: Float[Tensor, "layer d_model"]
    resid_pre: Float[Tensor, "layer d_model"]
    resid_post: Float[Tensor, "layer d_model"]
    n_positions: int

    def of(self, component: Component) -> Float[Tensor, " width"]:
        """A component's mean, where it is edited: before W_O for a head, one number for a neuron."""
        layer, index = component.layer or 0, component.index or 0
        match component.kind:
            case Kind.HEAD:
                return self.z[layer, index]
            case Kind.NEURON:
                return self.hidden[layer, index : index + 1]
            case Kind.ATTN:
                return self.attn[layer]
            case Kind.MLP:
                return self.mlp[layer]
            case Kind.EMBED | Kind.RESID_PRE:
                return self.resid_pre[layer]
            case Kind.RESID_MID:
                return self.resid_pre[layer] + self.attn[layer]
            case Kind.RESID_POST:
                return self.resid_post[layer]
            case Kind.UNEMBED:
                raise ValueError("unembed writes nothing that could be replaced")


@torch.inference_mode()
def reference_means(
    model: LoadedModel, texts: Iterable[Int[Tensor, "batch pos"]]
) -> ReferenceMeans:
    """Means over texts of at least two tokens, given as batches of equal length. float32.

    Raises `ValueError` when there are none.
    """
    shape = model.architecture
    sums: dict[str, Tensor] = {}
    count = 0

    def add(name: str, layer: int, value: Float[Tensor, "batch pos width"]) -> None:
        total = sums.setdefault(
            name,
            torch.zeros(shape.n_layers, value.shape[-1], dtype=torch.float64, device=value.device),
        )
        total[layer] += value[:, 1:].double().sum((0, 1))

    def at_output(name: str, layer: int) -> Reader:
        return lambda _module, _args, output: add(name, layer, tensor_out(output))

    def at_input(name: str, layer: int) -> Reader:
        return lambda _module, args, _output: add(name, layer, tensor_in(args))

    readers = [
        reader
        for layer, block in enumerate(model.modules.blocks)
        for reader in (
            (block.w_o, at_input("z", layer)),
            (block.w_out, at_input("hidden", layer)),
            (block.attn_write, at_output("attn", layer)),
            (block.mlp_write, at_output("mlp", layer)),
            (block.block, at_input("resid_pre", layer)),
            (block.block, at_output("resid_post", layer)),
        )
    ]
    for ids in texts:
        if ids.shape[1] < 2:
            raise ValueError("reference text needs at least two tokens: position 0 is left out")
        # Between two batches the model is anybody's.
        with hooked(*readers):
            model.plain(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
        count += ids.shape[0] * (ids.shape[1] - 1)
    if not count:
        raise ValueError("there is no reference text")
    means = {name: (total / count).float() for name, total in sums.items()}
    return ReferenceMeans(
        z=means["z"].view(shape.n_layers, shape.n_heads, shape.d_head),
        hidden=means["hidden"],
        attn=means["attn"],
        mlp=means["mlp"],
        resid_pre=means["resid_pre"],
        resid_post=means["resid_post"],
        n_positions=count,
    )
