"""The exact sweep on a tiny model of every family, against one run a component with hooks by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from neural_mri.contract.components import Component, Kind
from tests import models
from tests.worker.scanner.by_hand import ByHand
from worker.scanner import blocks
from worker.scanner import sweep as sweeping
from worker.scanner.hooks import tensor_out
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.references import ReferenceMeans, reference_means
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run, record
from worker.scanner.sweep import Swept, sweep

IDS = torch.tensor([models.prompt(7).ids])
LONG = torch.tensor([models.prompt(20).ids])
METRIC = Metric(5, 9)
WHOLE = "rows run whole"


def corrupted(ids: Tensor, first: int) -> Tensor:
    """Other tokens from a position on."""
    other = torch.tensor([models.prompt(ids.shape[1], seed=3).ids])
    return torch.cat([ids[:, :first], other[:, first:]], dim=1)


@torch.no_grad()
def means_of(model: LoadedModel) -> ReferenceMeans:
    return reference_means(model, [torch.tensor([models.prompt(12, seed=7).ids])])


@torch.no_grad()
def replacements(model: LoadedModel, clean: Run, ablation: str, *, start: int) -> Replacements:
    shape = model.architecture
    if ablation == "zero":
        return Replacements.zero(clean, shape, start=start)
    if ablation == "mean":
        return Replacements.mean(means_of(model), clean, shape, start=start)
    corrupt = record(model, corrupted(clean.ids, 2))
    return Replacements.resample(corrupt, clean, shape, start=start)


def swept(
    model: LoadedModel,
    ids: Tensor,
    ablation: str,
    components: Sequence[Component],
    *,
    start: int,
    metric: Metric = METRIC,
) -> Swept:
    with torch.no_grad():
        clean = record(model, ids)
    new = replacements(model, clean, ablation, start=start)
    return sweep(model, clean, components, new, metric, Silent())


def one_by_one(
    model: LoadedModel,
    family: str,
    ids: Tensor,
    ablation: str,
    components: Sequence[Component],
    *,
    start: int,
    metric: Metric = METRIC,
) -> Tensor:
    """The same effects: one run a component."""
    hand = ByHand(model, family)
    means = means_of(model) if ablation == "mean" else None
    theirs = hand.values(corrupted(ids, 2), components) if ablation == "resample" else {}
    clean = metric(hand.logits(ids))
    effects = []
    for component in components:
        by: Tensor | float = 0.0
        if means is not None:
            by = means.of(component)
        elif theirs:
            by = theirs[component][start:]
        effects.append(metric(hand.logits_without(ids, component, by, start=start)) - clean)
    return torch.stack(effects)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("granularity", ["heads", "blocks"])
@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_it_measures_what_one_run_a_component_measures(
    tiny_model: LoadedModel, family: str, ablation: str, granularity: str, start: int
) -> None:
    components = ByHand(tiny_model, family).components(by_head=granularity == "heads")
    found = swept(tiny_model, IDS, ablation, components, start=start)
    expected = one_by_one(tiny_model, family, IDS, ablation, components, start=start)
    assert found.method != WHOLE
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found.effects, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["phi", "gptj", "stablelm", "cohere", "olmo", "mpt"])
def test_blocks_are_swept_in_one_pass_whatever_is_peculiar_to_the_family(
    other_models: Callable[[str], LoadedModel], name: str
) -> None:
    model = other_models(name)
    components = ByHand(model, name).components()
    found = swept(model, IDS, "resample", components, start=1)
    expected = one_by_one(model, name, IDS, "resample", components, start=1)
    assert found.method != WHOLE
    torch.testing.assert_close(found.effects, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("ablation", "metric"), [("zero", METRIC), ("resample", Metric(5))])
def test_a_long_prompt_is_swept_where_its_beginning_is_shared_and_where_it_is_not(
    tiny_model: LoadedModel, family: str, ablation: str, metric: Metric
) -> None:
    # 20 tokens reach beyond every sliding window. From position 1 on sharing is not worth its mask.
    components = ByHand(tiny_model, family).components()
    found = swept(tiny_model, LONG, ablation, components, start=1, metric=metric)
    expected = one_by_one(tiny_model, family, LONG, ablation, components, start=1, metric=metric)
    assert found.method != WHOLE
    torch.testing.assert_close(found.effects, expected, rtol=0, atol=1e-4)


def test_components_may_be_few_and_in_any_order(tiny_model: LoadedModel, family: str) -> None:
    last = tiny_model.architecture.n_layers - 1
    some = [Component(Kind.MLP, last), Component.head(1, 2), Component(Kind.ATTN, 0)]
    some += [Component.head(1, 0), Component(Kind.MLP, 1)]
    found = swept(tiny_model, IDS, "mean", some, start=1)
    expected = one_by_one(tiny_model, family, IDS, "mean", some, start=1)
    torch.testing.assert_close(found.effects, expected, rtol=0, atol=1e-4)
    assert not swept(tiny_model, IDS, "mean", [], start=1).effects.numel()


def test_many_passes_of_a_few_rows_each_give_the_same_numbers(
    tiny_model: LoadedModel, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = ByHand(tiny_model, family).components()
    at_once = swept(tiny_model, IDS, "resample", components, start=1)
    d_model = tiny_model.architecture.d_model
    monkeypatch.setattr(sweeping, "_ROWS_BYTES", 4 * 4 * 5 * d_model)
    monkeypatch.setitem(blocks.ACTIVATION_BYTES, "cpu", 4 * 2 * 5 * 40)
    in_parts = swept(tiny_model, IDS, "resample", components, start=1)
    assert in_parts.method == at_once.method
    torch.testing.assert_close(in_parts.effects, at_once.effects, rtol=0, atol=1e-5)


def test_ablating_a_head_with_nothing_is_severing_it_from_the_residual_stream(
    tiny_model: LoadedModel, family: str
) -> None:
    head = Component.head(1, 2)
    found = swept(tiny_model, IDS, "zero", [head], start=0).effects
    hand = ByHand(tiny_model, family)
    clean = METRIC(hand.logits(IDS))
    rows = tiny_model.output_maps.w_o[1][2]
    with torch.inference_mode():
        kept = rows.clone()
        rows.zero_()
        severed = METRIC(hand.logits(IDS))
        rows.copy_(kept)
    torch.testing.assert_close(found, (severed - clean).unsqueeze(0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", [0, 1, 4])
def test_replacing_components_by_their_own_values_changes_nothing(
    tiny_model: LoadedModel, family: str, start: int
) -> None:
    with torch.no_grad():
        clean = record(tiny_model, IDS)
    own = Replacements(
        z=tuple(layer[0, start:] for layer in clean.z),
        attn=tuple(layer[0, start:] for layer in clean.attn),
        mlp=tuple(layer[0, start:] for layer in clean.mlp),
        embed=clean.resid_pre[0][0, start:],
        start=start,
        d_head=tiny_model.architecture.d_head,
    )
    hand = ByHand(tiny_model, family)
    components = [*hand.components(), *hand.components(by_head=False)]
    found = sweep(tiny_model, clean, components, own, METRIC, Silent())
    assert found.method != WHOLE
    assert found.effects.abs().max() < 1e-4


def test_a_prompt_that_begins_alike_is_resampled_from_where_it_differs(
    tiny_model: LoadedModel,
) -> None:
    with torch.no_grad():
        clean = record(tiny_model, IDS)
    for first in (1, 4, 6):
        corrupt = record(tiny_model, corrupted(IDS, first))
        new = Replacements.resample(corrupt, clean, tiny_model.architecture, start=1)
        assert new.start == first
        assert len(new.of(Component.head(0, 1))) == 7 - first


@pytest.mark.parametrize("ablation", ["zero", "resample"])
def test_blocks_that_compute_something_else_are_run_whole_with_the_same_numbers(
    tiny_model: LoadedModel, family: str, ablation: str
) -> None:
    hand = ByHand(tiny_model, family)
    components = [*hand.components(), *hand.components(by_head=False)]

    def shrink(_module: Any, _args: Any, output: Any) -> Any:
        less = 0.8 * tensor_out(output)
        return (less, *output[1:]) if isinstance(output, tuple) else less

    handle = hand.block(0).register_forward_hook(shrink)
    try:
        found = swept(tiny_model, IDS, ablation, components, start=1)
        expected = one_by_one(tiny_model, family, IDS, ablation, components, start=1)
    finally:
        handle.remove()
    assert found.method == WHOLE
    torch.testing.assert_close(found.effects, expected, rtol=0, atol=1e-4)


class _Stops(Silent):
    """Stops at one checkpoint; counts how many there are."""

    def __init__(self, at: int | None = None) -> None:
        self.seen = 0
        self.told: list[tuple[int, int]] = []
        self._at = at

    def checkpoint(self) -> None:
        self.seen += 1
        if self.seen == self._at:
            raise Cancelled

    def progress(self, stage: str, done: int, total: int) -> None:
        assert stage == "sweep"
        self.told.append((done, total))


def test_it_can_be_stopped_and_tells_how_far_it_is(tiny_model: LoadedModel, family: str) -> None:
    hand = ByHand(tiny_model, family)
    with torch.no_grad():
        clean = record(tiny_model, IDS)
    new = Replacements.zero(clean, tiny_model.architecture, start=1)
    listener = _Stops()
    sweep(tiny_model, clean, hand.components(), new, METRIC, listener)
    assert listener.told[-1][0] == listener.told[-1][1]
    assert listener.told == sorted(listener.told)
    for at in (1, listener.seen // 2, listener.seen):
        with pytest.raises(Cancelled):
            sweep(tiny_model, clean, hand.components(), new, METRIC, _Stops(at))
