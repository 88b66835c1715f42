"""The lens on a tiny model of every family, against the model's own predictions and plain formulas."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import models
from worker.scanner import logit_lens
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.logit_lens import Readings
from worker.scanner.metrics import entropy, kl_divergence
from worker.scanner.residuals import ResidualReading, Residuals

TOKENS = models.prompt(9)
ASKED = (7, 11)


@torch.inference_mode()
def run(model: LoadedModel) -> tuple[Residuals, Tensor]:
    """Residuals at every position, and the model's own logits."""
    everywhere = torch.arange(len(TOKENS))
    reading = ResidualReading(model, everywhere, everywhere, Silent())
    with reading.listening():
        logits = model.plain(input_ids=torch.tensor([TOKENS.ids]), use_cache=False).logits[0]
    return reading.residuals, logits


def read(model: LoadedModel, residuals: Residuals) -> Readings:
    return logit_lens.read(model, residuals.outer, residuals.outer[-1], asked=ASKED)


def test_the_last_residual_through_the_lens_is_the_models_prediction(
    tiny_model: LoadedModel,
) -> None:
    residuals, logits = run(tiny_model)
    torch.testing.assert_close(
        logit_lens.unembed(tiny_model, residuals.outer[-1]), logits, rtol=0, atol=1e-4
    )
    found = read(tiny_model, residuals)
    assert float(found.lens.kl[-1].max()) < 1e-4
    assert float(found.lens.js[-1].max()) < 1e-4
    torch.testing.assert_close(found.lens.top[-1], logits.argmax(-1))
    torch.testing.assert_close(found.lens.entropy[-1], entropy(logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["cohere", "granite"])
def test_the_lens_scales_logits_as_the_model_does(
    other_models: Callable[[str], LoadedModel], name: str
) -> None:
    residuals, logits = run(other_models(name))
    found = read(other_models(name), residuals)
    torch.testing.assert_close(found.lens.entropy[-1], entropy(logits), rtol=0, atol=1e-4)
    assert float(found.lens.kl[-1].max()) < 1e-4


def test_a_soft_cap_bounds_the_lens_as_it_bounds_the_model(
    tiny_models: dict[str, LoadedModel],
) -> None:
    model = tiny_models["gemma2"]
    cap = model.architecture.final_softcap
    assert cap is not None
    residuals, _ = run(model)
    assert float(logit_lens.unembed(model, 1e4 * residuals.outer).abs().max()) <= cap


def test_each_quantity_is_its_plain_formula(tiny_model: LoadedModel) -> None:
    residuals, logits = run(tiny_model)
    found = read(tiny_model, residuals)
    for place, residual in enumerate(residuals.outer):
        lens = logit_lens.unembed(tiny_model, residual)
        log_p, log_q = logits.double().log_softmax(-1), lens.double().log_softmax(-1)
        middle = ((log_p.exp() + log_q.exp()) / 2).log()
        js = (
            (log_p.exp() * (log_p - middle)).sum(-1) + (log_q.exp() * (log_q - middle)).sum(-1)
        ) / 2
        expected = {
            "kl": kl_divergence(logits, lens),
            "js": js.float(),
            "entropy": entropy(lens),
            "own": log_q.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1).float(),
            "asked": log_q[:, list(ASKED)].float(),
        }
        for name, values in expected.items():
            torch.testing.assert_close(
                getattr(found.lens, name)[place], values, rtol=1e-4, atol=2e-5
            )
        torch.testing.assert_close(found.lens.top[place], lens.argmax(-1))
        likelier = (lens > lens[:, ASKED[:1]]).sum(-1)
        torch.testing.assert_close(found.lens.rank[place], likelier)


def test_divergences_and_entropies_stay_within_their_bounds(tiny_model: LoadedModel) -> None:
    found = read(tiny_model, run(tiny_model)[0]).lens
    assert float(found.kl.min()) >= 0
    assert 0 <= float(found.js.min()) <= float(found.js.max()) <= math.log(2)
    assert float(found.entropy.min()) >= 0
    assert float(found.entropy.max()) <= math.log(models.D_VOCAB) + 1e-5


def test_confident_opposites_are_as_far_apart_as_they_are(
    tiny_models: dict[str, LoadedModel],
) -> None:
    model = tiny_models["qwen3"]
    residuals, _ = run(model)
    final = residuals.outer[-1]
    found = logit_lens.read(model, -final.unsqueeze(0), final).lens
    lens, logits = logit_lens.unembed(model, -final), logit_lens.unembed(model, final)
    torch.testing.assert_close(found.kl[0], kl_divergence(logits, lens), rtol=1e-4, atol=1e-4)


def test_how_it_is_cut_into_chunks_changes_no_digit(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    residuals, _ = run(tiny_model)
    whole = read(tiny_model, residuals)
    monkeypatch.setitem(logit_lens._CACHED_BYTES, "cpu", 1)
    for_each = read(tiny_model, residuals)
    for name, values in whole.lens._asdict().items():
        torch.testing.assert_close(getattr(for_each.lens, name), values, rtol=1e-6, atol=1e-6)
    monkeypatch.setitem(logit_lens._PRODUCT_BYTES, "cpu", 1)
    one_by_one = read(tiny_model, residuals)
    for name, values in whole.lens._asdict().items():
        torch.testing.assert_close(getattr(one_by_one.lens, name), values, rtol=1e-5, atol=1e-5)


def test_a_position_read_alone_is_the_position_in_the_whole_grid(tiny_model: LoadedModel) -> None:
    residuals, _ = run(tiny_model)
    whole = read(tiny_model, residuals)
    for position in range(len(TOKENS)):
        at = slice(position, position + 1)
        alone = read(tiny_model, Residuals(residuals.outer[:, at], residuals.inner[:, at]))
        torch.testing.assert_close(alone.lens.kl, whole.lens.kl[:, at], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.lens.top, whole.lens.top[:, at])


def test_a_model_whose_blocks_write_nothing_predicts_the_same_at_every_place(
    tiny_models: dict[str, LoadedModel],
) -> None:
    model = tiny_models["llama"]
    weights = [
        module.get_parameter("weight")
        for block in model.modules.blocks
        for module in (block.w_o, block.w_out)
    ]
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.zero_()
        found = read(model, run(model)[0])
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    assert float(found.lens.kl.max()) < 1e-5
    assert bool((found.lens.top == found.final.top).all())


def test_what_lies_between_blocks_is_hugging_faces_hidden_states(tiny_model: LoadedModel) -> None:
    residuals, _ = run(tiny_model)
    with torch.inference_mode():
        hidden = tiny_model.plain(
            input_ids=torch.tensor([TOKENS.ids]), use_cache=False, output_hidden_states=True
        ).hidden_states
    for place, state in enumerate(hidden[:-1]):
        torch.testing.assert_close(residuals.outer[place], state[0])


def hooks(model: LoadedModel) -> list[tuple[int, int]]:
    """How many hooks each module has: Hugging Face leaves its own once hidden states were asked for."""
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.plain.modules()]


def test_no_hook_is_left_behind(tiny_model: LoadedModel) -> None:
    before = hooks(tiny_model)
    run(tiny_model)
    assert hooks(tiny_model) == before


def test_each_of_several_prompts_targets_is_what_it_is_by_itself(tiny_model: LoadedModel) -> None:
    """However many tokens are asked about, known or still to be seen."""
    residuals, _ = run(tiny_model)
    asked: list[tuple[int | None, ...]] = [(7,), (None,), (None, 3), (5, 9), (1,)]
    own = residuals.outer[:, 1 : 1 + len(asked)]
    together = logit_lens.read_each(tiny_model, own, own[-1], asked=asked)
    for index, (tokens, found) in enumerate(zip(asked, together, strict=True)):
        one = own[:, index : index + 1]
        alone = logit_lens.read(tiny_model, one, one[-1], asked=tokens, target=0)
        assert found.asked == alone.asked
        for value, expected in zip(
            (*found.final, *found.lens, found.logits),
            (*alone.final, *alone.lens, alone.logits),
            strict=True,
        ):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
