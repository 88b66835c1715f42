"""That the lines called a head's or a neuron's are its: without them the real model lacks exactly it."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from neural_mri.contract.components import Component
from tests import models
from worker.scanner import bridging, sites, topology
from worker.scanner.weight_slices import Lines, WeightMap, weight_map

LAYER, HEAD, NEURON = 1, 1, 17


class Inside(NamedTuple):
    """What layer `LAYER` did with a prompt."""

    patterns: Tensor
    """`[head query key]`"""
    z: Tensor
    """`[pos head d_head]`"""
    hidden: Tensor
    """`[pos neuron]`"""
    logits: Tensor


def map_of(family: str) -> WeightMap:
    skeleton = bridging.skeleton(models.configuration(family))
    anatomy = topology.examine(skeleton)
    return weight_map(skeleton, anatomy, topology.parameter_rows(skeleton, anatomy))


def eager(family: str) -> PreTrainedModel:
    model = models.build(family)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def look_inside(
    model: PreTrainedModel, *, without_head: int | None = None, without_neuron: int | None = None
) -> Inside:
    """Run the model; optionally with one head's z, or one neuron's activation, set to 0."""
    anatomy = topology.examine(model)
    block = sites.modules(model, anatomy.paths, parallel_blocks=False).blocks[LAYER]
    seen: dict[str, Tensor] = {}

    def at_z(_module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
        z = inputs[0].reshape(*inputs[0].shape[:2], anatomy.architecture.n_heads, -1).clone()
        if without_head is not None:
            z[:, :, without_head] = 0
        seen["z"] = z[0]
        return (z.flatten(-2),)

    def at_hidden(_module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
        hidden = inputs[0].clone()
        if without_neuron is not None:
            hidden[..., without_neuron] = 0
        seen["hidden"] = hidden.reshape(-1, hidden.shape[-1])
        return (hidden,)

    handles = [
        block.w_o.register_forward_pre_hook(at_z),
        block.w_out.register_forward_pre_hook(at_hidden),
    ]
    try:
        ids = torch.tensor([models.prompt(7).ids])
        output = model(input_ids=ids, use_cache=False, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    return Inside(output.attentions[LAYER][0], seen["z"], seen["hidden"], output.logits)


def scale(model: PreTrainedModel, lines: Lines, factor: float) -> None:
    """Multiply those rows or columns, and the biases of the same outputs."""
    with torch.no_grad():
        numbers = torch.from_numpy(lines.numbers)
        weight = model.get_parameter(lines.parameter)
        weight[(numbers,) if lines.axis == 0 else (slice(None), numbers)] *= factor
        bias = dict(model.named_parameters()).get(lines.parameter.removesuffix("weight") + "bias")
        if bias is not None and len(bias) == weight.shape[lines.axis]:
            bias[numbers] *= factor


def group_of(mapped: WeightMap, head: int) -> list[int]:
    """The heads that read the same key-value head."""
    shape = mapped.architecture
    return [other for other in range(shape.n_heads) if shape.kv_head(other) == shape.kv_head(head)]


def lines_of_head(mapped: WeightMap, role: str) -> Lines:
    return mapped.attention(Component.head(LAYER, HEAD))[role]


def line_of_neuron(mapped: WeightMap, role: str) -> Lines:
    lines = mapped.projections[LAYER, role]
    return lines.part(NEURON, len(lines.numbers))


def test_without_its_lines_of_w_o_a_head_is_ablated(family: str) -> None:
    mapped, model = map_of(family), eager(family)
    ablated = look_inside(model, without_head=HEAD).logits
    lines = lines_of_head(mapped, "W_O")
    weight = model.get_parameter(lines.parameter)
    with torch.no_grad():  # and not its bias, which no head has for itself
        weight.index_fill_(lines.axis, torch.from_numpy(lines.numbers), 0)
    torch.testing.assert_close(look_inside(model).logits, ablated, rtol=0, atol=1e-6)


def test_without_its_lines_of_w_v_a_group_of_heads_moves_nothing(family: str) -> None:
    mapped, model = map_of(family), eager(family)
    before = look_inside(model).z
    scale(model, lines_of_head(mapped, "W_V"), 0)
    after = look_inside(model).z
    group = group_of(mapped, HEAD)
    others = [head for head in range(mapped.architecture.n_heads) if head not in group]
    assert before[:, group].abs().max() > 0
    assert after[:, group].abs().max() == 0
    torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mpt", "codegen"])
def test_a_projection_that_is_taken_apart_without_biases_is_understood(name: str) -> None:
    mapped, model = map_of(name), eager(name)
    parts = [lines_of_head(mapped, role) for role in ("W_Q", "W_K", "W_V")]
    assert len({lines.parameter for lines in parts}) == 1
    assert len({number for lines in parts for number in lines.numbers}) == 3 * 8
    before = look_inside(model)
    scale(model, parts[2], 0)
    after = look_inside(model)
    others = [head for head in range(mapped.architecture.n_heads) if head != HEAD]
    assert after.z[:, HEAD].abs().max() == 0
    torch.testing.assert_close(after.z[:, others], before.z[:, others], rtol=0, atol=1e-6)
    scale(model, parts[0], 0)
    assert not torch.allclose(look_inside(model).patterns[HEAD], before.patterns[HEAD], atol=1e-3)


@pytest.mark.parametrize("role", ["W_Q", "W_K"])
def test_without_its_lines_of_w_q_or_w_k_a_head_attends_to_all_tokens_alike(
    family: str, role: str
) -> None:
    mapped, model = map_of(family), eager(family)
    touched = [HEAD] if role == "W_Q" else group_of(mapped, HEAD)
    before = look_inside(model).patterns
    scale(model, lines_of_head(mapped, role), 0)
    after = look_inside(model).patterns
    for head in range(mapped.architecture.n_heads):
        if head in touched:
            seen = before[head] > 0
            alike = seen / seen.sum(-1, keepdim=True)
            assert (before[head] - alike).abs().max() > 1e-3
            torch.testing.assert_close(after[head], alike, rtol=0, atol=1e-6)
        elif family != "olmo2":  # which norms the queries of all heads together, and the keys
            torch.testing.assert_close(after[head], before[head], rtol=0, atol=1e-6)


def test_without_its_line_of_w_out_a_neuron_is_ablated(family: str) -> None:
    mapped, model = map_of(family), eager(family)
    ablated = look_inside(model, without_neuron=NEURON).logits
    scale(model, line_of_neuron(mapped, "W_out"), 0)
    torch.testing.assert_close(look_inside(model).logits, ablated, rtol=0, atol=1e-6)


def test_its_line_of_w_in_is_what_a_neuron_reads_by(family: str) -> None:
    """Behind a gate a neuron is linear in it; without one, it is silent when it reads nothing."""
    mapped, model = map_of(family), eager(family)
    factor = 2 if mapped.architecture.gated_mlp else 0
    expected = look_inside(model).hidden
    expected[:, NEURON] *= factor
    scale(model, line_of_neuron(mapped, "W_in"), factor)
    torch.testing.assert_close(look_inside(model).hidden, expected, rtol=1e-5, atol=1e-6)


def test_its_line_of_w_gate_is_what_opens_a_neuron(family: str) -> None:
    mapped, model = map_of(family), eager(family)
    if not mapped.architecture.gated_mlp:
        assert (LAYER, "W_gate") not in mapped.projections
        return
    expected = look_inside(model).hidden
    expected[:, NEURON] = 0
    scale(model, line_of_neuron(mapped, "W_gate"), 0)
    torch.testing.assert_close(look_inside(model).hidden, expected, rtol=0, atol=1e-6)


def test_every_line_of_a_fused_projection_belongs_to_one_role(family: str) -> None:
    mapped = map_of(family)
    for layer in range(mapped.architecture.n_layers):
        claimed: dict[tuple[str, int], list[int]] = {}
        for (of, _), lines in mapped.projections.items():
            if of == layer:
                claimed.setdefault((lines.parameter, lines.axis), []).extend(lines.numbers.tolist())
        for (parameter, axis), numbers in claimed.items():
            assert sorted(numbers) == list(range(mapped.rows[parameter].shape[axis]))


def test_written_dimensions_lie_across_a_writing_matrix(family: str) -> None:
    mapped = map_of(family)
    shape = mapped.architecture
    written = {
        name: row.shape[axis]
        for name, row in mapped.rows.items()
        if (axis := mapped.written_axis(name)) is not None
    }
    assert set(written.values()) == {shape.d_model}
    positions = shape.positions == "learned"
    assert len(written) == 1 + positions + 2 * shape.n_layers
