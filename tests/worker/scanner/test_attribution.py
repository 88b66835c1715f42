"""Estimates from gradients: exact where the model is linear, and the slope of the exact effect elsewhere."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import models
from tests.worker.scanner.by_hand import ByHand
from worker.scanner import attribution, loading
from worker.scanner.attribution import (
    Differentiated,
    StraightPath,
    differentiate,
    estimates,
    in_metric,
    slope,
)
from worker.scanner.halving import halved
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.replacements import Replacements
from worker.scanner.runs import Run, embedded, record
from worker.scanner.sweep import sweep

IDS = torch.tensor([models.prompt(7).ids])
OTHER = torch.tensor([models.prompt(7, seed=4).ids])
METRIC = Metric(5, 9)


def at(model: LoadedModel, metric: Metric = METRIC, ids: Tensor = IDS) -> Differentiated:
    return differentiate(model, ids, lambda logits: slope(metric, logits).sum())


def towards(clean: Run, other: Run, share: float, model: LoadedModel) -> Replacements:
    """A share of the way from each component's own value to another run's."""

    def mixed(own: Tensor, theirs: Tensor) -> Tensor:
        return torch.lerp(own[0, 1:], theirs[0, 1:], share)

    def layers(own: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(map(mixed, own, theirs))

    return Replacements(
        z=layers(clean.z, other.z),
        attn=layers(clean.attn, other.attn),
        mlp=layers(clean.mlp, other.mlp),
        embed=mixed(clean.resid_pre[0], other.resid_pre[0]),
        start=1,
        d_head=model.architecture.d_head,
    )


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedModel]:
    """A GPT-2 whose logits are an affine function of what its components write.

    No norm, no non-linearity, and no queries: every head looks at all earlier positions alike.
    """
    folder = models.save("gpt2", tmp_path_factory.mktemp("linear"), seed=2)
    model = loading.load(folder, loading.published_numerics(folder))
    plain: Any = model.plain
    norms: list[Any] = [m for m in plain.modules() if isinstance(m, nn.LayerNorm)]
    for norm in norms:
        norm.forward = lambda value: value
    with torch.no_grad():
        for layer in plain.transformer.h:
            layer.mlp.act = nn.Identity()
            width = layer.attn.embed_dim
            layer.attn.c_attn.weight[:, :width] = 0
            layer.attn.c_attn.bias[:width] = 0
    yield model
    model.release()


def test_in_a_linear_model_an_estimate_is_the_exact_effect(linear: LoadedModel) -> None:
    hand = ByHand(linear, "gpt2")
    components = [*hand.components(), *hand.components(by_head=False)]
    clean = at(linear)
    with torch.no_grad():
        other = record(linear, OTHER)
    new = Replacements.resample(other, clean.run, linear.architecture, start=1)
    exact = sweep(linear, clean.run, components, new, METRIC, Silent()).effects
    found = estimates(components, clean.run, new, [clean])
    assert exact.abs().min() > 1e-3
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
    path = StraightPath(linear, IDS, OTHER, METRIC, steps=3)
    torch.testing.assert_close(
        estimates(components, clean.run, new, path), exact, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("metric", [METRIC, Metric(5)])
def test_an_estimate_is_the_slope_of_the_exact_effect(
    tiny_model: LoadedModel, family: str, metric: Metric
) -> None:
    hand = ByHand(tiny_model, family)
    components = [*hand.components(), *hand.components(by_head=False)]
    clean = at(tiny_model, metric)
    with torch.no_grad():
        other = record(tiny_model, OTHER)
    share = 5e-3
    ways = [towards(clean.run, other, sign * share, tiny_model) for sign in (1, -1)]

    def asked(logits: Tensor) -> Tensor:
        return slope(metric, logits)

    forth, back = (
        sweep(tiny_model, clean.run, components, way, asked, Silent()).effects for way in ways
    )
    whole = towards(clean.run, other, 1.0, tiny_model)
    found = estimates(components, clean.run, whole, [clean])
    expected = (forth - back) / (2 * share)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01 * expected.abs().max().item())


def test_a_path_averages_gradients_between_the_two_prompts(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = tiny_model.architecture
    components = [node for node in shape.nodes() if str(node) != "unembed"]
    clean = at(tiny_model)
    with torch.no_grad():
        other = record(tiny_model, OTHER)
        ends = embedded(tiny_model, OTHER), embedded(tiny_model, IDS)
    new = Replacements.resample(other, clean.run, shape, start=1)
    expected = torch.zeros(len(components))
    for step in range(4):
        point = torch.lerp(*ends, (step + 0.5) / 4)
        there = differentiate(
            tiny_model, IDS, lambda logits: slope(METRIC, logits).sum(), embeddings=point
        )
        expected += estimates(components, clean.run, new, [there]) / 4
    at_once = StraightPath(tiny_model, IDS, OTHER, METRIC, steps=4)
    monkeypatch.setattr(attribution, "_PATH_TOKENS", 20)
    in_parts = StraightPath(tiny_model, IDS, OTHER, METRIC, steps=4)
    assert (len(at_once), len(in_parts)) == (1, 2)
    for path in (at_once, in_parts):
        found = estimates(components, clean.run, new, path)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_path_is_differentiated_in_smaller_parts_where_memory_ran_out(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = [node for node in tiny_model.architecture.nodes() if str(node) != "unembed"]
    with torch.no_grad():
        other = record(tiny_model, OTHER)
    clean = at(tiny_model)
    new = Replacements.resample(other, clean.run, tiny_model.architecture, start=1)
    monkeypatch.setattr(attribution, "_PATH_TOKENS", 4 * IDS.shape[1])
    found, parts = [], []
    for times in range(4):
        with halved(times) as batches:
            path = StraightPath(tiny_model, IDS, OTHER, METRIC, steps=4)
            found.append(estimates(components, clean.run, new, path))
            parts.append(len(path))
        assert batches.has_batches
    assert parts == [1, 2, 4, 4]
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-4, atol=1e-4)


def test_gradients_leave_the_model_frozen_and_as_it_was(tiny_model: LoadedModel) -> None:
    before = tiny_model.plain(input_ids=IDS, use_cache=False).logits
    with torch.inference_mode():
        found = at(tiny_model)
    assert not found.run.logits.requires_grad
    assert all(parameter.grad is None for parameter in tiny_model.plain.parameters())
    assert torch.equal(tiny_model.plain(input_ids=IDS, use_cache=False).logits, before)


def test_a_batch_is_differentiated_row_by_row(tiny_model: LoadedModel) -> None:
    both = at(tiny_model, ids=torch.cat([IDS, OTHER]))
    for row, ids in enumerate((IDS, OTHER)):
        alone, found = at(tiny_model, ids=ids).gradients, both.row(row).gradients
        torch.testing.assert_close(found.z, alone.z, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.embed, alone.embed, rtol=1e-3, atol=1e-4)


def test_a_backward_pass_can_be_stopped_after_each_block(tiny_model: LoadedModel) -> None:
    n_layers, asked = tiny_model.architecture.n_layers, 0

    def stop_at(number: int) -> Differentiated:
        def after_a_block() -> None:
            nonlocal asked
            asked += 1
            if asked == number:
                raise Cancelled

        return differentiate(
            tiny_model, IDS, lambda logits: slope(METRIC, logits).sum(), on_layer_back=after_a_block
        )

    expected = at(tiny_model).gradients
    found = stop_at(0).gradients
    assert asked == n_layers
    assert all(map(torch.equal, found.z, expected.z))
    asked = 0
    with pytest.raises(Cancelled):
        stop_at(1)
    assert asked == 1, "nothing goes further back"


def test_changes_of_log_odds_become_changes_of_a_log_probability() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5])
    metric = Metric(0)
    changed = logits + torch.tensor([1.5, 0.0, 0.0])
    change = slope(metric, changed) - slope(metric, logits)
    torch.testing.assert_close(in_metric(metric, logits, change), metric(changed) - metric(logits))
    assert in_metric(metric, logits, torch.tensor(1e6)) <= -metric(logits) + 1e-6
    with_foil = Metric(0, 1)
    torch.testing.assert_close(in_metric(with_foil, logits, change), change)


def test_going_back_along_some_rows_finds_their_gradients_and_leaves_the_model_as_it_was(
    tiny_model: LoadedModel,
) -> None:
    ids = torch.tensor([models.prompt(6).ids, models.prompt(6, seed=1).ids])
    before = {name: vars(module).keys() for name, module in tiny_model.plain.named_modules()}

    def first(logits: Tensor) -> Tensor:
        return logits[0, 7] - logits[0, 9]

    whole = differentiate(tiny_model, ids, first)
    some = differentiate(tiny_model, ids, first, rows=1)
    for expected, found in zip(whole.row(0).gradients, some.row(0).gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for layer in some.row(1).gradients.z:
        assert not layer.any()
    torch.testing.assert_close(some.run.logits, whole.run.logits, rtol=0, atol=0)
    after = {name: vars(module).keys() for name, module in tiny_model.plain.named_modules()}
    assert after == before
