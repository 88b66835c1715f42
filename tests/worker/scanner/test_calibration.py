"""Calibration on tiny models: fitted maps against their own definition, and what survives being stored."""

from typing import Any

import pytest
import torch
from torch import Tensor

from neural_mri.contract.anomalies import CalibrationScan, Lens
from neural_mri.contract.problems import Conflict, Unprocessable
from neural_mri.contract.results import SCHEMAS, from_ipc, provenance_of, to_ipc
from neural_mri.contract.scans import reporting_order
from tests import models
from worker.scanner.calibrating import calibrate, held_out
from worker.scanner.calibration import QUANTILE_LEVELS, Calibration
from worker.scanner.lens_maps import Moments, applied, support_layers
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.ordinary import ordinary
from worker.scanner.references import reference_means
from worker.scanner.residuals import ResidualReading
from worker.scanner.sampling import given_text, sampled_text


def request(**changes: Any) -> CalibrationScan:
    return CalibrationScan(**{"n_tokens": 512, "n_ordinary": 64, **changes})


def fitted(model: LoadedModel, **changes: Any) -> Calibration:
    return calibrate(model, request(**changes), Silent())


def tensors(value: Any) -> list[Tensor]:
    """Every tensor inside, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for key in sorted(value) for t in tensors(value[key])]
    if isinstance(value, tuple):
        return [t for item in value for t in tensors(item)]
    return []


def same(one: Calibration, other: Calibration) -> None:
    for name, value in vars(one).items():
        pairs = zip(tensors(value), tensors(getattr(other, name)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_one_seed_gives_one_calibration_and_another_seed_another(
    tiny_models: dict[str, LoadedModel],
) -> None:
    model = tiny_models["llama"]
    first = fitted(model)
    same(first, fitted(model))
    assert not torch.equal(first.bias.bias, fitted(model, seed=1).bias.bias)


def test_it_reads_back_from_its_tables_to_the_last_digit(tiny_model: LoadedModel) -> None:
    found = fitted(tiny_model, lenses=(Lens.BIAS, Lens.RIDGE))
    stored = {name: to_ipc(table) for name, table in found.to_tables().items()}
    tables = {name: from_ipc(body) for name, body in stored.items()}
    for name, table in tables.items():
        provenance = provenance_of(table)
        assert provenance.version == str(SCHEMAS[name].version)
        assert provenance.parameters["seed"] == 0
        assert provenance.parameters["n_tokens"] == 512
    back = Calibration.from_tables(tables, tiny_model.architecture)
    same(found, back)
    assert (back.source, back.seed, back.n_tokens) == ("sampled", 0, 512)
    assert back.means.n_positions == found.means.n_positions


@torch.inference_mode()
def residuals(model: LoadedModel, ids: Tensor) -> Any:
    n_texts, length = ids.shape
    positions = torch.arange(n_texts * length).view(n_texts, length)[:, 1:].flatten()
    reading = ResidualReading(model, positions, positions, Silent())
    with reading.listening():
        model.plain(input_ids=ids, use_cache=False)
    return reading.residuals


def test_the_bias_carries_every_mean_to_the_last_residuals(tiny_model: LoadedModel) -> None:
    found = fitted(tiny_model)
    ids = sampled_text(tiny_model, 512, seed=0, prefix=(), listener=Silent())
    read = residuals(tiny_model, ids[~held_out(len(ids))])
    final = read.outer[-1].mean(0)
    lenses = found.lenses(Lens.BIAS)
    for lens, places in ((lenses.outer, read.outer[:-1]), (lenses.inner, read.inner)):
        mapped = applied(lens, places).mean(1)
        torch.testing.assert_close(mapped, final.expand_as(mapped), rtol=1e-3, atol=1e-3)


def test_ridge_finds_an_affine_map_where_there_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4000, 6, generator=generator)
    matrix = 0.3 * torch.randn(6, 6, generator=generator)
    final = x[0] + x[0] @ matrix + torch.arange(6.0)
    moments = Moments(1, 6, products=True, device=torch.device("cpu"))
    for first in range(0, 4000, 1000):
        at = slice(first, first + 1000)
        moments.add(x[:, at], final[at])
    found = moments.ridge()
    assert found.matrix is not None
    torch.testing.assert_close(found.matrix[0], matrix, rtol=0.05, atol=0.02)
    torch.testing.assert_close(found.bias[0], torch.arange(6.0), rtol=0, atol=0.02)


def test_ridge_comes_nearer_to_the_last_residual_than_the_bias(tiny_model: LoadedModel) -> None:
    found = fitted(tiny_model, n_tokens=2048, lenses=(Lens.RIDGE,))
    ids = sampled_text(tiny_model, 512, seed=5, prefix=(), listener=Silent())
    read = residuals(tiny_model, ids)

    def distance(lens: Lens) -> float:
        mapped = applied(found.lenses(lens).outer, read.outer[:-1])
        return float((mapped - read.outer[-1]).square().mean())

    assert distance(Lens.RIDGE) < distance(Lens.BIAS) < distance(Lens.RAW)


def test_its_means_are_the_reference_means_of_the_same_text(tiny_model: LoadedModel) -> None:
    found = fitted(tiny_model)
    ids = sampled_text(tiny_model, 512, seed=0, prefix=(), listener=Silent())
    expected = reference_means(tiny_model, [ids])
    for mine, theirs in zip(found.means[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_percentiles_rank_a_scan_among_reference_text(tiny_model: LoadedModel) -> None:
    found = fitted(tiny_model)
    components = reporting_order(tiny_model.architecture)
    assert found.activation_quantiles.shape == (len(components), len(QUANTILE_LEVELS))
    assert bool((found.activation_quantiles.diff(dim=1) >= 0).all())
    levels = torch.tensor(QUANTILE_LEVELS)
    above = found.activation_quantiles + 1e-4 * found.activation_quantiles.abs()
    assert bool((found.percentile(above, components) >= levels - 1e-6).all())
    below = found.activation_quantiles - 1e-4 * found.activation_quantiles.abs()
    assert bool((found.percentile(below, components) <= levels + 1e-6).all())
    chosen = components[3:5]
    torch.testing.assert_close(
        found.percentile(above[3:5], chosen), found.percentile(above, components)[3:5]
    )


def test_no_more_than_the_stated_share_of_exchangeable_values_exceeds_a_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    rate, exceeded, repeats = 0.1, 0, 400
    for _ in range(repeats):
        known = ordinary(torch.rand(1, 39, generator=generator) ** 3)
        exceeded += int((torch.rand(1, 1, generator=generator) ** 3 > known.above(rate)).sum())
    assert exceeded / repeats < rate + 0.03
    assert float(ordinary(torch.rand(1, 39)).above(0.01)) == float("inf")
    assert float(ordinary(torch.rand(1, 39)).below(0.01)) == float("-inf")


def test_sampled_text_begins_with_what_the_tokenizer_puts_first(tiny_model: LoadedModel) -> None:
    bare = sampled_text(tiny_model, 512, seed=0, prefix=(), listener=Silent())
    begun = sampled_text(tiny_model, 512, seed=0, prefix=(1,), listener=Silent())
    assert bare.shape == begun.shape
    assert bool((begun[:, 0] == 1).all())
    assert not bool((bare[:, 0] == 1).all())
    assert len({tuple(text) for text in bare.tolist()}) == len(bare)


@pytest.mark.parametrize(
    ("named", "begins"),
    [((5, 6), 5), ((models.D_VOCAB, 6), 6), ((None, -1), 0), ((models.D_VOCAB, 1 << 20), 0)],
)
def test_sampling_begins_with_a_token_that_the_model_has(
    tiny_models: dict[str, LoadedModel],
    monkeypatch: pytest.MonkeyPatch,
    named: tuple[int | None, int],
    begins: int,
) -> None:
    model = tiny_models["llama"]
    for name, token in zip(("bos_token_id", "eos_token_id"), named, strict=True):
        monkeypatch.setattr(model.plain.config, name, token)
    found = sampled_text(model, 512, seed=0, prefix=(), listener=Silent())
    given = sampled_text(model, 512, seed=0, prefix=(begins,), listener=Silent())
    length = min(found.shape[1], given.shape[1] - 1)
    assert torch.equal(found[:, :length], given[:, 1 : 1 + length])


def test_sampling_follows_the_models_own_probabilities(tiny_models: dict[str, LoadedModel]) -> None:
    model = tiny_models["llama"]
    texts = sampled_text(model, 64 * 500, seed=0, prefix=(1,), listener=Silent())
    with torch.inference_mode():
        expected = model.plain(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(-1)
    found = torch.bincount(texts[:, 1], minlength=models.D_VOCAB) / len(texts)
    assert float((found - expected).abs().max()) < 0.08


def test_a_prefix_that_the_model_does_not_have_is_refused(
    tiny_models: dict[str, LoadedModel],
) -> None:
    for token in (models.D_VOCAB, -1):
        with pytest.raises(Unprocessable, match="begins prompts"):
            sampled_text(tiny_models["llama"], 512, seed=0, prefix=(1, token), listener=Silent())


def test_given_texts_are_cut_to_one_length(tiny_model: LoadedModel) -> None:
    texts = [models.prompt(90, seed=1), models.prompt(45, seed=2)]
    ids = given_text(tiny_model, texts, 1000)
    assert ids.flatten().tolist() == [*texts[0].ids, *texts[1].ids][:128]
    found = calibrate(tiny_model, request(), Silent(), texts=texts)
    assert (found.source, found.n_tokens) == ("texts", 128)


def test_too_little_text_is_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(Unprocessable, match="expected at least 128"):
        calibrate(tiny_model, request(), Silent(), texts=[models.prompt(20)])


def test_a_lens_that_was_not_fitted_is_refused(tiny_models: dict[str, LoadedModel]) -> None:
    with pytest.raises(Conflict, match="ridge"):
        fitted(tiny_models["llama"]).lenses(Lens.RIDGE)


def test_support_lenses_stand_in_the_middle_and_never_on_the_last_layer() -> None:
    assert support_layers(30) == (11, 14, 17, 20)
    for n_layers in range(2, 100):
        layers = support_layers(n_layers)
        assert 1 <= len(layers) <= 4
        assert layers == tuple(sorted(set(layers)))
        assert layers[-1] < n_layers - 1 or n_layers < 3


class Stopping(Silent):
    """Stops once a stage has been heard."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.heard = False

    def progress(self, stage: str, done: int, total: int) -> None:
        self.heard |= stage == self.stage

    def checkpoint(self) -> None:
        if self.heard:
            raise Cancelled


@pytest.mark.parametrize("stage", ["sampling", "reading", "ordinary"])
def test_it_stops_when_asked_and_leaves_no_hook(
    stage: str, tiny_models: dict[str, LoadedModel]
) -> None:
    model = tiny_models["gemma2"]

    def hooks() -> list[tuple[int, int]]:
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.plain.modules()]

    before = hooks()
    with pytest.raises(Cancelled):
        calibrate(model, request(), Stopping(stage))
    assert hooks() == before
