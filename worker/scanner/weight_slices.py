"""Which stored tensors are a component's, and which of their rows or columns are a head's or a neuron's.

Families store the same projection transposed (GPT-2), fused with others (GPT-2, Phi-3) or interleaved
head by head (Pythia). Nothing of that is tabled here: TransformerLens knows how to take a fused projection
apart, so it is handed one whose outputs bear their own numbers, and where the numbers end up is the
answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neural_mri.contract.components import EMBED, UNEMBED, Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.problems import UnsupportedModel
from worker.scanner import bridging
from worker.scanner.sites import Owner
from worker.scanner.topology import Anatomy, ParameterRow

__all__ = ("HEAD_ROLES", "Indices", "Lines", "WeightMap", "weight_map")

Indices = npt.NDArray[np.intp]

HEAD_ROLES = ("W_Q", "W_K", "W_V", "W_O")
_NEURON_ROLES = ("W_gate", "W_in", "W_out")
_READ_FROM_INSIDE = ("W_O", "W_out")
"""Matrices whose heads or neurons are their inputs; of the others they are the outputs."""


class Lines(NamedTuple):
    """Some rows (`axis` 0) or columns (1) of a stored matrix, in an order of their own."""

    parameter: str
    axis: int
    numbers: Indices

    def part(self, index: int, n_parts: int) -> "Lines":
        """The `index`-th of `n_parts` equal runs of the lines."""
        return self._replace(numbers=self.numbers.reshape(n_parts, -1)[index])


class WeightMap(NamedTuple):
    """A model's weights as its components see them."""

    architecture: Architecture
    rows: dict[str, ParameterRow]
    """Every parameter, each storage once, in the model's order."""
    owners: Mapping[str, Owner]
    """Of modules, by name."""
    projections: dict[tuple[int, str], Lines]
    """By layer and role (`W_Q`, ..., `W_gate`, `W_in`, `W_out`): head after head, or neuron by neuron."""

    def parameters_of(self, component: Component) -> tuple[str, ...]:
        """The tensors that a component reads; of a head, those that it has its lines in.

        A tied unembedding reads the embedding.
        """
        if component.kind is Kind.HEAD:
            return tuple(
                dict.fromkeys(lines.parameter for lines in self.attention(component).values())
            )
        own = tuple(name for name, row in self.rows.items() if row.owner.component == component)
        if component == UNEMBED and self.architecture.tied_embeddings:
            return (*own, *self._token_embedding())
        return own

    def attention(self, component: Component) -> dict[str, Lines]:
        """By role, the lines of one head, or of all heads of an attention layer.

        A head's W_K and W_V are its key-value head's, which it may share with others.
        """
        shape, layer = self.architecture, component.layer or 0
        whole = {role: self.projections[layer, role] for role in HEAD_ROLES}
        if component.index is None:
            return whole
        key_value = shape.kv_head(component.index)
        return {
            "W_Q": whole["W_Q"].part(component.index, shape.n_heads),
            "W_K": whole["W_K"].part(key_value, shape.n_kv_heads),
            "W_V": whole["W_V"].part(key_value, shape.n_kv_heads),
            "W_O": whole["W_O"].part(component.index, shape.n_heads),
        }

    def component_of_buffer(self, name: str) -> Component | None:
        """Whose a tensor is that is no parameter; None for one that is nobody's."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            if path in self.owners:
                return self.owners[path].component
        return None

    def written_axis(self, parameter: str) -> int | None:
        """The axis along which a matrix's lines are dimensions of the residual stream it writes to.

        None for what writes nothing there.
        """
        row = self.rows[parameter]
        if row.owner.component == EMBED and len(row.shape) == 2:
            return 1
        layer, role = row.owner.component.layer, row.owner.role
        if layer is None or role not in _READ_FROM_INSIDE:
            return None
        return 1 - self.projections[layer, role].axis

    def head_axis(self, parameter: str) -> int | None:
        """The axis along which an attention matrix's lines belong to heads; None for another tensor."""
        return next((lines.axis for lines in self._within(parameter, HEAD_ROLES)), None)

    def column_sums_wanted(self, parameter: str) -> bool:
        """Whether anything is reported about single columns of the tensor."""
        lines = self._within(parameter, (*HEAD_ROLES, *_NEURON_ROLES))
        return self.written_axis(parameter) == 1 or any(part.axis == 1 for part in lines)

    def _within(self, parameter: str, roles: Sequence[str]) -> list[Lines]:
        """The projections that stand in a tensor."""
        layer = self.rows[parameter].owner.component.layer
        found = [] if layer is None else [self.projections.get((layer, role)) for role in roles]
        return [lines for lines in found if lines is not None and lines.parameter == parameter]

    def _token_embedding(self) -> tuple[str, ...]:
        return tuple(
            name
            for name, row in self.rows.items()
            if row.owner.component == EMBED and row.owner.role == "W_E"
        )


def weight_map(model: PreTrainedModel, anatomy: Anatomy, rows: Sequence[ParameterRow]) -> WeightMap:
    """The map of the model whose skeleton is given. The skeleton is spoilt for any other use.

    Raises `UnsupportedModel` for a family that keeps its projections in a way that is not understood.
    """
    own = {row.name: row for row in rows if not row.tied_to}
    fused = _fused(model, anatomy)
    projections: dict[tuple[int, str], Lines] = {}
    for name, row in own.items():
        component = row.owner.component
        if component.layer is None or len(row.shape) != 2:
            continue
        role = row.owner.role
        if role in HEAD_ROLES or role in _NEURON_ROLES:
            outputs = _output_axis(model, name)
            axis = 1 - outputs if role in _READ_FROM_INSIDE else outputs
            projections[component.layer, role] = Lines(name, axis, np.arange(row.shape[axis]))
        else:
            for part, numbers in fused.get(component.kind, {}).items():
                lines = Lines(name, _output_axis(model, name), numbers)
                projections[component.layer, part] = lines
    mapped = WeightMap(anatomy.architecture, own, anatomy.owners, projections)
    _refuse_unmapped(mapped)
    return mapped


def _output_axis(model: PreTrainedModel, parameter: str) -> int:
    """The axis of a matrix that its outputs lie along: 0, and 1 as GPT-2 keeps it."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    return 1 if isinstance(module, Conv1D) else 0


def _fused(model: PreTrainedModel, anatomy: Anatomy) -> dict[Kind, dict[str, Indices]]:
    """By sublayer, the outputs of its fused projection that belong to each role; empty where none is."""
    parts: Any = bridging.adapter(model).component_mapping["blocks"].submodules
    block, family = anatomy.paths.blocks[0], type(model).__name__
    fused: dict[Kind, dict[str, Indices]] = {}
    if hasattr(parts["attn"], "split_qkv_matrix"):
        attention = model.get_submodule(block.attn)
        _number_outputs(attention.get_submodule(parts["attn"].submodules["qkv"].name))
        fused[Kind.ATTN] = _take_apart(
            parts["attn"].split_qkv_matrix, attention, ("W_Q", "W_K", "W_V"), family
        )
    if hasattr(parts["mlp"], "split_gate_up_matrix"):
        mlp = model.get_submodule(block.mlp)
        _number_outputs(mlp.get_submodule(parts["mlp"].fused_attr))
        fused[Kind.MLP] = _take_apart(
            parts["mlp"].split_gate_up_matrix, mlp, ("W_gate", "W_in"), family
        )
    return fused


def _number_outputs(projection: nn.Module) -> None:
    """Give a projection biases that count its outputs, and weights that do, in next to no memory."""
    shape = projection.get_parameter("weight").shape
    transposed = isinstance(projection, Conv1D)
    n_outputs = shape[1 if transposed else 0]
    # float32, exact up to 2^24: where a family takes weights apart it makes them whole.
    numbers = torch.arange(n_outputs, dtype=torch.float32).unsqueeze(0 if transposed else 1)
    projection.weight = nn.Parameter(numbers.expand(shape), requires_grad=False)
    projection.bias = nn.Parameter(
        torch.arange(n_outputs, dtype=torch.float64), requires_grad=False
    )


def _take_apart(
    split: Any, module: nn.Module, roles: Sequence[str], family: str
) -> dict[str, Indices]:
    # The parts are wanted for the numbers that they are given: make no weights for them.
    with bridging.understood(family), torch.device("meta"):
        parts = split(module)
    return {
        role: _numbers(part).numpy().astype(np.intp)
        for role, part in zip(roles, parts, strict=True)
    }


def _numbers(part: nn.Linear) -> Float[Tensor, " output"]:
    """The numbers of a part's outputs. Some families' parts have no biases (MPT, CodeGen)."""
    bias: Tensor | None = getattr(part, "bias", None)
    return part.weight.detach()[:, 0] if bias is None else bias.detach()


def _refuse_unmapped(mapped: WeightMap) -> None:
    shape = mapped.architecture
    n_lines = {
        "W_Q": shape.n_heads * shape.d_head,
        "W_K": shape.n_kv_heads * shape.d_head,
        "W_V": shape.n_kv_heads * shape.d_head,
        "W_O": shape.n_heads * shape.d_head,
        "W_in": shape.d_mlp,
        "W_out": shape.d_mlp,
    }
    if shape.gated_mlp:
        n_lines["W_gate"] = shape.d_mlp
    for layer in range(shape.n_layers):
        for role, expected in n_lines.items():
            lines = mapped.projections.get((layer, role))
            if lines is None or len(lines.numbers) != expected:
                raise UnsupportedModel(
                    f"block {layer} of {shape.family} has "
                    f"{0 if lines is None else len(lines.numbers)} lines of {role}: expected "
                    f"{expected}"
                )
