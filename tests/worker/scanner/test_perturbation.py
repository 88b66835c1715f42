"""Stimulation on a tiny model of every family, against weights severed by hand and Hugging Face's hooks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.perturbations import (
    Amplify,
    Inject,
    InjectMode,
    Invert,
    MeanAblation,
    Noise,
    Patch,
    Perturbation,
    PerturbationScan,
    ZeroAblation,
)
from neural_mri.contract.problems import Conflict, Problem, UnknownComponent, Unprocessable
from neural_mri.contract.scans import reporting_order
from tests import models
from worker.scanner import interventions
from worker.scanner.hooks import hooked, tensor_out
from worker.scanner.interventions import Edit, Joining, Rows, forward, width
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.perturbation import scan_perturbation
from worker.scanner.references import reference_means

TOKENS = models.prompt(7)
IDS = torch.tensor([TOKENS.ids])


def perturbed(model: LoadedModel, *perturbations: Perturbation, **more: Any) -> dict[str, pa.Table]:
    request = PerturbationScan(prompt="x", perturbations=perturbations)
    return scan_perturbation(
        model, request, TOKENS, Silent(), sources=more.pop("sources", {}), **more
    ).tables


@torch.inference_mode()
def edited_logits(model: LoadedModel, *edits: Edit) -> Tensor:
    """Logits of the clean row and of one perturbed row."""
    return forward(model, Rows(IDS, copies=1), edits)


@torch.inference_mode()
def plain_logits(model: LoadedModel, ids: Tensor = IDS) -> Tensor:
    logits: Tensor = model.plain(input_ids=ids, use_cache=False).logits[0]
    return logits


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@contextmanager
def severed(model: LoadedModel, layer: int, head: int) -> Iterator[None]:
    """One head's rows of W_O set to zero, in the weights themselves."""
    w_o = model.output_maps.w_o[layer]
    kept = w_o[head].clone()
    w_o[head] = 0
    try:
        yield
    finally:
        w_o[head] = kept


def every_position(component: Component, **operation: Any) -> Edit:
    return Edit(1, component, tuple(range(len(TOKENS))), **operation)


def test_ablating_a_head_is_severing_it_from_the_residual_stream(tiny_model: LoadedModel) -> None:
    ablated = edited_logits(tiny_model, every_position(Component.head(1, 2), scale=0.0))
    with torch.inference_mode(), severed(tiny_model, layer=1, head=2):
        expected = plain_logits(tiny_model)
    close(ablated[1], expected)
    close(ablated[0], plain_logits(tiny_model))


def test_rows_are_there_from_the_start_where_none_can_join(
    other_models: Callable[[str], LoadedModel],
) -> None:
    model = other_models("gpt_bigcode")
    other = torch.tensor([models.prompt(7, seed=4).ids])
    rows = Rows(torch.cat([IDS, other]), copies=2, joining=(Joining(1, 1), Joining(0, 2)))
    places = Component.head(1, 2), Component(Kind.MLP, 2)
    edits = [
        every_position(place, scale=0.0)._replace(row=row) for row, place in enumerate(places, 2)
    ]
    with torch.inference_mode():
        found = forward(model, rows, edits)
    close(found[0], plain_logits(model))
    close(found[1], plain_logits(model, other))
    for row, ids, place in zip((2, 3), (other, IDS), places, strict=True):
        with edited_by_hand(model, place, torch.zeros_like):
            close(found[row], plain_logits(model, ids))
    done = (ZeroAblation(component="embed"), ZeroAblation(component="blocks.1.attn.head_2"))
    (row,) = perturbed(model, *done)["comparison"].to_pylist()
    with ExitStack() as stack:
        for address in ("embed", "blocks.1.attn.head_2"):
            component = Component.parse(address)
            stack.enter_context(edited_by_hand(model, component, torch.zeros_like))
        after = plain_logits(model)[-1]
    assert row["logit_after"] == pytest.approx(after[row["answer_id"]].item(), abs=1e-4)


@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize(("scale", "added"), [(0.0, 0.0), (3.0, 0.0), (-1.0, 0.0), (1.0, 0.5)])
def test_a_sublayer_is_edited_as_a_hook_on_its_output_would(
    tiny_model: LoadedModel, part: str, scale: float, added: float
) -> None:
    block = tiny_model.modules.blocks[1]
    module: nn.Module = block.attn_write if part == "attn" else block.mlp_write
    positions = (2, 5)

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        value = tensor_out(output).clone()
        value[:, positions] = value[:, positions] * scale + added
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = module.register_forward_hook(hook)
    try:
        expected = plain_logits(tiny_model)
    finally:
        handle.remove()
    offset = torch.full((tiny_model.architecture.d_model,), added)
    component = Component(Kind(part), 1)
    close(edited_logits(tiny_model, Edit(1, component, positions, scale, offset))[1], expected)


Change = Callable[[Tensor], Tensor]


@contextmanager
def edited_by_hand(model: LoadedModel, component: Component, change: Change) -> Iterator[None]:
    """A hook of our own on the module that a component is written by, or enters; whole prompts."""
    block = model.modules.blocks[component.layer or 0]
    d_head, index = model.architecture.d_head, component.index or 0
    own = slice(None)

    def before(_module: Any, args: Any) -> Any:
        value = args[0].clone()
        value[..., own] = change(value[..., own])
        return (value, *args[1:])

    def after(_module: Any, _args: Any, output: Any) -> Any:
        value = change(tensor_out(output))
        return (value, *output[1:]) if isinstance(output, tuple) else value

    match component.kind:
        case Kind.HEAD:
            own = slice(index * d_head, (index + 1) * d_head)
            handle = block.w_o.register_forward_pre_hook(before)
        case Kind.NEURON:
            own = slice(index, index + 1)
            handle = block.w_out.register_forward_pre_hook(before)
        case Kind.EMBED | Kind.RESID_PRE:
            handle = block.block.register_forward_pre_hook(before)
        case Kind.ATTN:
            handle = block.attn_write.register_forward_hook(after)
        case Kind.MLP:
            handle = block.mlp_write.register_forward_hook(after)
        case _:
            handle = block.block.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def at(positions: tuple[int, ...], scale: float, added: float | Tensor = 0.0) -> Change:
    def change(value: Tensor) -> Tensor:
        changed = value.clone()
        changed[:, positions] = value[:, positions] * scale + added
        return changed

    return change


EDITED = (
    Component(Kind.EMBED),
    Component(Kind.RESID_PRE, 1),
    Component(Kind.ATTN, 1),
    Component.head(1, 1),
    Component(Kind.MLP, 1),
    Component.neuron(1, 3),
    Component(Kind.RESID_POST, 0),
)


@pytest.mark.parametrize("component", EDITED, ids=str)
def test_every_operation_is_what_a_hook_by_hand_would_do(
    tiny_model: LoadedModel, component: Component
) -> None:
    address, n = str(component), width(component.kind, tiny_model.architecture)
    positions = (2, 5)
    operations: list[tuple[Perturbation, Change]] = [
        (ZeroAblation(component=address, token_positions=positions), at(positions, 0)),
        (Amplify(component=address, factor=2.5, token_positions=positions), at(positions, 2.5)),
        (Invert(component=address, token_positions=positions), at(positions, -1)),
        (
            Inject(
                component=address,
                values=(0.5,) * n,
                mode=InjectMode.REPLACE,
                token_positions=positions,
            ),
            at(positions, 0, 0.5),
        ),
    ]
    for operation, change in operations:
        found = perturbed(tiny_model, operation, answer_id=7, foil_id=9)["comparison"].to_pylist()
        with edited_by_hand(tiny_model, component, change):
            expected = plain_logits(tiny_model)[-1]
        assert found[0]["logit_after"] == pytest.approx(expected[7].item(), rel=1e-4, abs=1e-4)
        assert found[0]["metric_after"] == pytest.approx(
            (expected[7] - expected[9]).item(), rel=1e-4, abs=1e-4
        )


def test_several_places_are_changed_in_one_run(tiny_model: LoadedModel) -> None:
    edits = [
        Edit(1, Component(Kind.EMBED), (1,), scale=-1.0),
        Edit(1, Component.head(0, 1), (2, 3), scale=3.0),
        Edit(1, Component.head(1, 0), (0, 4), scale=0.0),
        Edit(1, Component.neuron(1, 3), (6,), scale=2.0),
        Edit(1, Component(Kind.MLP, 1), (3, 6), scale=-1.0),
        Edit(1, Component(Kind.RESID_POST, 0), (5,), scale=1.5),
    ]
    with ExitStack() as hooks:
        for edit in edits:
            change = at(edit.positions, edit.scale)
            hooks.enter_context(edited_by_hand(tiny_model, edit.component, change))
        expected = plain_logits(tiny_model)
    close(edited_logits(tiny_model, *edits)[1], expected)
    close(edited_logits(tiny_model, *reversed(edits))[1], expected)


def test_a_head_is_changed_alone_among_those_that_share_its_keys_and_values(
    tiny_model: LoadedModel,
) -> None:
    shape = tiny_model.architecture
    tables = perturbed(tiny_model, ZeroAblation(component=str(Component.head(0, 1))))
    change = {row["component"]: np.array(row["value"]) for row in tables["change"].to_pylist()}
    before = {row["component"]: np.array(row["value"]) for row in tables["activations"].to_pylist()}
    after = {
        row["component"]: np.array(row["value"]) for row in tables["activations_after"].to_pylist()
    }
    for head in range(shape.n_heads):
        address = str(Component.head(0, head))
        if head == 1:
            assert not after[address].any()
        elif tiny_model.output_maps.gain is None:
            np.testing.assert_allclose(after[address], before[address], rtol=1e-5)
            assert change[address].max() < 1e-5 * before[address].max()
    assert max(change[str(Component.head(1, head))].max() for head in range(shape.n_heads)) > 0
    for upstream in ("embed", "blocks.0.resid_pre"):
        assert change[upstream].max() < 1e-5 * before[upstream].max()


def test_noises_mean_and_spread_are_over_its_draws(tiny_model: LoadedModel) -> None:
    def after(draws: int) -> dict[str, float]:
        noise = Noise(component="blocks.0.mlp", sigma=0.5, seed=3, draws=draws)
        tables = perturbed(tiny_model, noise, answer_id=7, foil_id=9)
        row: dict[str, float] = tables["comparison"].to_pylist()[0]
        return row

    # A seed's draws come in one order: more of them begin with the same.
    one, two, three = (after(draws) for draws in (1, 2, 3))
    first = one["metric_after"]
    second = 2 * two["metric_after"] - first
    third = 3 * three["metric_after"] - first - second
    assert np.isnan(one["metric_sd"])
    assert two["metric_sd"] == pytest.approx(np.std([first, second], ddof=1), rel=1e-3)
    assert three["metric_sd"] == pytest.approx(np.std([first, second, third], ddof=1), rel=1e-3)


def residual_kinds(model: LoadedModel) -> list[Kind]:
    kinds = [Kind.RESID_PRE, Kind.RESID_POST]
    return kinds if model.architecture.parallel_blocks else [*kinds, Kind.RESID_MID]


def test_the_residual_after_one_place_is_the_residual_before_the_next(
    tiny_model: LoadedModel,
) -> None:
    noise = torch.randn(len(TOKENS), tiny_model.architecture.d_model)
    after = every_position(Component(Kind.RESID_POST, 0), offset=noise)
    before = every_position(Component(Kind.RESID_PRE, 1), offset=noise)
    close(edited_logits(tiny_model, after)[1], edited_logits(tiny_model, before)[1])


def test_adding_to_the_residual_between_the_sublayers_is_adding_to_what_attention_writes(
    tiny_model: LoadedModel,
) -> None:
    if tiny_model.architecture.parallel_blocks:
        with pytest.raises(UnknownComponent, match="parallel"):
            perturbed(tiny_model, ZeroAblation(component="blocks.1.resid_mid"))
        return
    noise = torch.randn(len(TOKENS), tiny_model.architecture.d_model)
    middle = every_position(Component(Kind.RESID_MID, 1), offset=noise)
    attn = every_position(Component(Kind.ATTN, 1), offset=noise)
    close(edited_logits(tiny_model, middle)[1], edited_logits(tiny_model, attn)[1])


def test_ablating_every_neuron_leaves_the_bias_that_the_mlp_adds(tiny_model: LoadedModel) -> None:
    block = tiny_model.modules.blocks[1]
    handle = block.w_out.register_forward_pre_hook(lambda _m, args: (args[0] * 0,))
    try:
        expected = plain_logits(tiny_model)
    finally:
        handle.remove()
    neurons = [
        every_position(Component.neuron(1, neuron), scale=0.0)
        for neuron in range(tiny_model.architecture.d_mlp)
    ]
    close(edited_logits(tiny_model, *neurons)[1], expected)


def test_patching_a_run_with_itself_changes_nothing(tiny_model: LoadedModel) -> None:
    places = [c for c in reporting_order(tiny_model.architecture) if c.kind is not Kind.UNEMBED]
    tables = perturbed(
        tiny_model,
        *(Patch(component=str(place), source_prompt="y") for place in places),
        sources={"y": TOKENS},
    )
    assert np.abs(tables["shift"]["kl"].to_numpy()).max() < 1e-6
    change = np.array(tables["change"]["value"].to_pylist())
    scale = np.array(tables["activations"]["value"].to_pylist()).max()
    assert np.abs(change).max() < 1e-5 * scale


def test_patching_the_last_residual_gives_the_other_prompts_predictions(
    tiny_model: LoadedModel,
) -> None:
    other = models.prompt(7, seed=5)
    last = str(Component(Kind.RESID_POST, tiny_model.architecture.n_layers - 1))
    tables = perturbed(tiny_model, Patch(component=last, source_prompt="y"), sources={"y": other})
    expected = plain_logits(tiny_model, torch.tensor([other.ids])).softmax(-1)
    top = tables["predictions_after"].to_pandas().query("rank == 0")
    np.testing.assert_array_equal(top["token_id"], expected.argmax(-1).numpy())
    np.testing.assert_allclose(top["probability"], expected.amax(-1).numpy(), rtol=1e-4)


def test_edits_that_meet_are_applied_in_their_order(tiny_model: LoadedModel) -> None:
    place = Component(Kind.MLP, 0)
    ones = torch.ones(tiny_model.architecture.d_model)
    add, double = every_position(place, offset=ones), every_position(place, scale=2.0)
    together = every_position(place, scale=2.0, offset=2 * ones)
    close(edited_logits(tiny_model, add, double)[1], edited_logits(tiny_model, together)[1])
    other_way = every_position(place, scale=2.0, offset=ones)
    close(edited_logits(tiny_model, double, add)[1], edited_logits(tiny_model, other_way)[1])


def ramp(n: int) -> Tensor:
    """A vector that no norm takes away."""
    return torch.linspace(-1, 1, n)


def metric_after(model: LoadedModel, *perturbations: Perturbation) -> float:
    comparison = perturbed(model, *perturbations, answer_id=7, foil_id=9)["comparison"]
    value: float = comparison["metric_after"][0].as_py()
    return value


def metric_by_hand(model: LoadedModel, *changes: tuple[Component, Change]) -> float:
    with ExitStack() as hooks:
        for component, change in changes:
            hooks.enter_context(edited_by_hand(model, component, change))
        logits = plain_logits(model)[-1]
    return (logits[7] - logits[9]).item()


ONE_TENSOR = (
    (Component(Kind.EMBED), Component(Kind.RESID_PRE, 0)),
    (Component(Kind.RESID_POST, 0), Component(Kind.RESID_PRE, 1)),
)


@pytest.mark.parametrize("places", ONE_TENSOR, ids=str)
def test_two_names_of_one_tensor_are_changed_in_their_order(
    tiny_model: LoadedModel, places: tuple[Component, Component]
) -> None:
    vector, positions = ramp(tiny_model.architecture.d_model), (2, 5)
    values = tuple(vector.tolist())
    for first, second in (places, places[::-1]):
        add = Inject(component=str(first), values=values, token_positions=positions)
        scaled = Amplify(component=str(second), factor=-2.0, token_positions=(1, 5))

        def added_then_scaled(value: Tensor) -> Tensor:
            return at((1, 5), -2.0)(at(positions, 1.0, vector)(value))

        found = metric_after(tiny_model, add, scaled)
        expected = metric_by_hand(tiny_model, (places[0], added_then_scaled))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.5])
def test_what_is_added_to_a_head_is_changed_by_what_is_done_to_the_head_later(
    tiny_model: LoadedModel, scale: float
) -> None:
    head, attn = Component.head(1, 2), Component(Kind.ATTN, 1)
    vector = ramp(tiny_model.architecture.d_model)
    add = Inject(component=str(head), values=tuple(vector.tolist()), token_positions=(2, 4, 5))
    change = Amplify(component=str(head), factor=scale, token_positions=(1, 4, 5))
    other = Amplify(component=str(Component.head(1, 1)), factor=3.0)
    again = Amplify(component=str(head), factor=3.0, token_positions=(5,))

    def by_hand(*added: Change) -> float:
        by_head = [(head, at((1, 4, 5), scale)), (head, at((5,), 3.0))]
        everywhere = (Component.head(1, 1), at(tuple(range(len(TOKENS))), 3.0))
        changes = [(attn, change) for change in added]
        return metric_by_hand(tiny_model, everywhere, *by_head, *changes)

    expected: dict[tuple[Perturbation, ...], float] = {
        (add, change, again): by_hand(
            at((2,), 1, vector), at((4,), 1, scale * vector), at((5,), 1, 3 * scale * vector)
        ),
        (change, add, again): by_hand(at((2, 4), 1, vector), at((5,), 1, 3 * vector)),
        (change, again, add): by_hand(at((2, 4, 5), 1, vector)),
    }
    for order, value in expected.items():
        found = metric_after(tiny_model, other, *order)
        assert found == pytest.approx(value, rel=1e-4, abs=1e-4)


def test_a_head_that_is_replaced_or_ablated_keeps_nothing_that_was_added_before(
    tiny_model: LoadedModel,
) -> None:
    head, shape = str(Component.head(0, 1)), tiny_model.architecture
    add = Inject(component=head, values=tuple(ramp(shape.d_model).tolist()))
    replace = Inject(component=head, values=(0.25,) * shape.d_head, mode=InjectMode.REPLACE)
    for change in (replace, ZeroAblation(component=head)):
        alone = metric_after(tiny_model, change)
        assert metric_after(tiny_model, add, change) == pytest.approx(alone, rel=1e-5)
        assert abs(metric_after(tiny_model, change, add) - alone) > 1e-3


@given(
    st.lists(
        st.tuples(
            st.integers(2, 4),
            st.integers(0, 1),
            st.lists(st.integers(0, 3), unique=True).map(tuple),
            st.none() | st.integers(0, 4),
        ),
        max_size=12,
    )
)
def test_an_edit_joins_the_first_round_after_those_it_meets(
    drawn: list[tuple[int, int, tuple[int, ...], int | None]],
) -> None:
    edits = [
        Edit(row, Component.head(0, head), positions, source_row=source)
        for row, head, positions, source in drawn
    ]

    def meets(edit: Edit, earlier: Edit) -> bool:
        return (
            earlier.row in (edit.row, edit.source_row)
            and earlier.component.index == edit.component.index
            and bool(set(edit.positions) & set(earlier.positions))
        )

    round_of: list[int] = []
    for number, edit in enumerate(edits):
        met = [round_of[at] for at in range(number) if meets(edit, edits[at])]
        round_of.append(max(met, default=-1) + 1)
    expected = [
        [edit for edit, at in zip(edits, round_of, strict=True) if at == number]
        for number in range(max(round_of, default=-1) + 1)
    ]
    assert interventions._groups(edits) == expected


def test_a_perturbation_can_be_stopped_before_the_model_runs(tiny_model: LoadedModel) -> None:
    doubled = [Amplify(component="blocks.0.mlp", factor=2.0)] * 5

    class Stopping(Silent):
        asked = 0

        def progress(self, stage: str, done: int, total: int) -> None:
            raise AssertionError("a block was computed")

        def checkpoint(self) -> None:
            self.asked += 1
            if self.asked == stop_at:
                raise Cancelled

    request = PerturbationScan(prompt="x", perturbations=tuple(doubled))
    # As they are read one by one, and as what each leaves is put behind the one before.
    for stop_at in (1, 5, 6, 10):
        listener = Stopping()
        with pytest.raises(Cancelled):
            scan_perturbation(tiny_model, request, TOKENS, listener, sources={})
        assert listener.asked == stop_at


@torch.inference_mode()
def test_rows_of_one_batch_do_not_hear_of_each_other(tiny_model: LoadedModel) -> None:
    edits = [
        Edit(row, component, (1, 3), scale=factor)
        for row, (component, factor) in enumerate(
            [
                (Component.head(0, 1), 0.0),
                (Component(Kind.MLP, 1), -1.0),
                (Component(Kind.RESID_PRE, 1), 1.5),
            ],
            start=1,
        )
    ]
    together = forward(tiny_model, Rows(IDS, copies=3), edits)
    for edit in edits:
        close(together[edit.row], edited_logits(tiny_model, edit._replace(row=1))[1])


def test_what_was_changed_is_reported_there_and_only_downstream(tiny_model: LoadedModel) -> None:
    tables = perturbed(tiny_model, ZeroAblation(component="blocks.1.mlp", token_positions=(4,)))
    change = {row["component"]: np.array(row["value"]) for row in tables["change"].to_pylist()}
    before = {row["component"]: np.array(row["value"]) for row in tables["activations"].to_pylist()}
    np.testing.assert_allclose(change["blocks.1.mlp"][4], before["blocks.1.mlp"][4], rtol=1e-5)
    assert not change["blocks.1.mlp"][:4].any()
    assert not change["blocks.1.attn"].any()
    assert not change["blocks.0.resid_post"].any()
    assert change["unembed"][4] > 0


def test_heads_changes_add_up_to_no_more_than_their_layers(tiny_model: LoadedModel) -> None:
    tables = perturbed(tiny_model, Amplify(component="blocks.0.resid_pre", factor=1.3))
    change = tables["change"].to_pandas().set_index("component")["value"]
    layer = np.array(change["blocks.1.attn"])
    heads = sum(
        np.array(change[str(Component.head(1, head))])
        for head in range(tiny_model.architecture.n_heads)
    )
    assert (heads >= layer * (1 - 1e-4)).all()


def test_noise_is_drawn_again_from_its_seed_and_has_a_spread(tiny_model: LoadedModel) -> None:
    noise = Noise(component="blocks.0.mlp", sigma=0.5, seed=3, draws=4)
    first, again = perturbed(tiny_model, noise), perturbed(tiny_model, noise)
    other = perturbed(tiny_model, msgspec.structs.replace(noise, seed=4))
    assert first["comparison"].equals(again["comparison"])
    assert not first["comparison"].equals(other["comparison"])
    assert first["comparison"]["metric_sd"][0].as_py() > 0


def test_noise_is_as_large_as_asked_in_the_components_own_size(tiny_model: LoadedModel) -> None:
    tables = perturbed(tiny_model, Noise(component="blocks.0.mlp", sigma=0.5, draws=64))
    change = tables["change"].to_pandas().set_index("component")["value"]["blocks.0.mlp"]
    size = tables["activations"].to_pandas().set_index("component")["value"]["blocks.0.mlp"]
    rms = np.sqrt(np.mean(np.square(size[1:])))
    np.testing.assert_allclose(np.mean(change), 0.5 * rms, rtol=0.05)


def test_mean_ablation_puts_the_reference_mean_there(tiny_model: LoadedModel) -> None:
    texts = [torch.tensor([models.prompt(9, seed=seed).ids for seed in range(3)])]
    means = reference_means(tiny_model, texts)
    assert means.n_positions == 24
    for component in (Component.head(1, 0), Component(Kind.MLP, 1), Component.neuron(0, 3)):
        expected = every_position(component, scale=0.0, offset=means.of(component))
        tables = perturbed(tiny_model, MeanAblation(component=str(component)), means=means)
        logits = edited_logits(tiny_model, expected)[1]
        top = tables["predictions_after"].to_pandas().query("rank == 0")["logit"]
        np.testing.assert_allclose(top, logits.amax(-1).numpy(), rtol=1e-4, atol=1e-5)
    with pytest.raises(Conflict, match="calibration"):
        perturbed(tiny_model, MeanAblation(component="blocks.0.mlp"))


@torch.inference_mode()
def test_reference_means_are_means_over_all_but_the_first_position(
    tiny_model: LoadedModel,
) -> None:
    means = reference_means(tiny_model, [IDS])
    seen: list[Tensor] = []
    with hooked(
        (tiny_model.modules.blocks[1].mlp_write, lambda _m, _a, out: seen.append(tensor_out(out)))
    ):
        plain_logits(tiny_model)
    close(means.mlp[1], seen[0][0, 1:].mean(0))


def test_injected_values_must_have_the_places_width(tiny_model: LoadedModel) -> None:
    shape = tiny_model.architecture
    head = Component.head(0, 1)
    for component, mode, expected in (
        (head, InjectMode.REPLACE, shape.d_head),
        (head, InjectMode.ADD, shape.d_model),
        (Component.neuron(0, 2), InjectMode.ADD, 1),
        (Component(Kind.RESID_PRE, 1), InjectMode.REPLACE, shape.d_model),
    ):
        with pytest.raises(Unprocessable, match=f"expected {expected}"):
            perturbed(
                tiny_model,
                Inject(component=str(component), values=(0.5,) * (expected + 1), mode=mode),
            )
        tables = perturbed(
            tiny_model, Inject(component=str(component), values=(0.5,) * expected, mode=mode)
        )
        assert tables["shift"]["kl"].to_numpy().max() > 0


def test_the_answer_and_foil_are_measured_on_both_runs(tiny_model: LoadedModel) -> None:
    tables = perturbed(tiny_model, Invert(component="blocks.0.attn"), answer_id=7, foil_id=9)
    row = tables["comparison"].to_pylist()[0]
    clean = plain_logits(tiny_model)[-1]
    assert row["metric_before"] == pytest.approx((clean[7] - clean[9]).item(), rel=1e-4, abs=1e-5)
    changed = edited_logits(tiny_model, every_position(Component(Kind.ATTN, 0), scale=-1.0))[1, -1]
    assert row["metric_after"] == pytest.approx(
        (changed[7] - changed[9]).item(), rel=1e-4, abs=1e-5
    )


def test_without_perturbations_nothing_changes(tiny_model: LoadedModel) -> None:
    tables = perturbed(tiny_model)
    assert np.abs(tables["shift"]["kl"].to_numpy()).max() < 1e-6
    # Equal rows of one batch may differ in their last digits.
    scale = np.array(tables["activations"]["value"].to_pylist()).max()
    assert np.array(tables["change"]["value"].to_pylist()).max() < 1e-5 * scale


class StopsAtOnce(Silent):
    def checkpoint(self) -> None:
        raise Cancelled


def test_a_scan_that_stops_leaves_the_model_as_it_was(tiny_model: LoadedModel) -> None:
    before = plain_logits(tiny_model)
    request = PerturbationScan(prompt="x", perturbations=(Invert(component="blocks.0.mlp"),))
    with pytest.raises(Cancelled):
        scan_perturbation(tiny_model, request, TOKENS, StopsAtOnce(), sources={})
    assert torch.equal(plain_logits(tiny_model), before)


def test_a_source_of_another_length_is_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(Problem, match="6 tokens and the prompt 7"):
        perturbed(
            tiny_model,
            Patch(component="blocks.0.mlp", source_prompt="y"),
            sources={"y": models.prompt(6)},
        )


def test_the_clean_row_cannot_be_edited(tiny_model: LoadedModel) -> None:
    with pytest.raises(ValueError, match="outside 1 to 1"):
        edited_logits(tiny_model, Edit(0, Component(Kind.MLP, 0), (0,), scale=0.0))


def test_every_place_has_the_width_that_its_values_have(tiny_model: LoadedModel) -> None:
    shape = tiny_model.architecture
    assert width(Kind.HEAD, shape) == shape.d_head
    assert width(Kind.NEURON, shape) == 1
    assert {width(kind, shape) for kind in residual_kinds(tiny_model)} == {shape.d_model}
