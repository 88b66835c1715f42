"""Causal tracing on a tiny model of every family, against hooks written by hand, one run a cell."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.perturbations import TraceKind, TracingScan
from neural_mri.contract.problems import InvalidPositions, Unprocessable
from neural_mri.contract.results import provenance_of, to_ipc
from neural_mri.contract.tokens import Span
from tests import models
from worker.scanner.hooks import tensor_out
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.tracing import scan_tracing

TOKENS = models.prompt(7)
"""A token a character."""
REQUEST = TracingScan(prompt="abcdefg", subject="cd", draws=2, seed=3, window=3)
SUBJECT = (2, 3)
ANSWER = 7


def traced(model: LoadedModel, *, foil: int | None = None, **changes: Any) -> dict[str, pa.Table]:
    request = msgspec.structs.replace(REQUEST, **changes)
    return scan_tracing(model, request, TOKENS, Silent(), answer_id=ANSWER, foil_id=foil).tables


def values(table: pa.Table, quantity: str = "indirect_effect") -> dict[str, np.ndarray]:
    return {
        row["component"]: np.array(row["value"])
        for row in table.to_pylist()
        if row["quantity"] == quantity
    }


def parameters(tables: dict[str, pa.Table]) -> dict[str, Any]:
    return provenance_of(tables["trace"]).parameters


Change = Callable[[Tensor], Tensor]


@contextmanager
def changed(module: nn.Module, change: Change) -> Iterator[None]:
    def after(_module: Any, _args: Any, output: Any) -> Any:
        value = change(tensor_out(output))
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def module_of(model: LoadedModel, family: str, kind: Kind, layer: int) -> nn.Module:
    names = models.NAMES[family]
    block = model.plain.get_submodule(f"{names.blocks}.{layer}")
    match kind:
        case Kind.RESID_POST:
            return block
        case Kind.ATTN:
            return block.get_submodule(names.attn_post_norm or names.w_o)
        case _:
            return block.get_submodule(names.mlp_post_norm or names.w_out)


@torch.inference_mode()
def probabilities(model: LoadedModel, n_rows: int = 1) -> Tensor:
    ids = torch.tensor([TOKENS.ids]).expand(n_rows, -1)
    logits: Tensor = model.plain(input_ids=ids, use_cache=False).logits[:, -1]
    return logits.softmax(-1)[:, ANSWER]


def noise(model: LoadedModel, noise_sd: float, draw: int) -> Change:
    """What a draw adds to the embeddings of the subject."""
    generator = torch.Generator().manual_seed(REQUEST.seed * 1_000_003 + draw)
    drawn = noise_sd * torch.randn(len(SUBJECT), model.architecture.d_model, generator=generator)

    def add(embeddings: Tensor) -> Tensor:
        noised = embeddings.clone()
        noised[:, list(SUBJECT)] += drawn
        return noised

    return add


def outputs(model: LoadedModel, modules: Sequence[nn.Module]) -> list[Tensor]:
    """What the modules put out in the clean run."""
    seen: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        seen.append(value.clone())
        return value

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(changed(module, keep))
        probabilities(model)
    return seen


def restored(model: LoadedModel, modules: Sequence[nn.Module], corrupt: Change) -> Tensor:
    """The answer's probability in one run a position, the clean outputs of the modules put back there."""

    def putting_back(clean: Tensor) -> Change:
        def put_back(own: Tensor) -> Tensor:
            own = own.clone()
            for at in range(len(TOKENS)):
                own[at, at] = clean[0, at]
            return own

        return put_back

    clean = outputs(model, modules)
    with ExitStack() as hooks:
        hooks.enter_context(changed(model.plain.get_input_embeddings(), corrupt))
        for module, value in zip(modules, clean, strict=True):
            hooks.enter_context(changed(module, putting_back(value)))
        return probabilities(model, len(TOKENS))


def corrupted(model: LoadedModel, corrupt: Change) -> float:
    with changed(model.plain.get_input_embeddings(), corrupt):
        return float(probabilities(model))


def test_the_grid_is_what_restoring_one_by_one_gives(tiny_model: LoadedModel, family: str) -> None:
    tables = traced(tiny_model)
    noise_sd = parameters(tables)["noise_sd"]
    found, spread = values(tables["trace"]), values(tables["trace"], "sd")
    n_layers = tiny_model.architecture.n_layers
    assert len(found) == 3 * n_layers
    for address, effects in found.items():
        component = Component.parse(address)
        layer = component.layer or 0
        # A window of three layers, cut off where the model ends.
        window = range(max(0, layer - 1), min(n_layers, layer + 2))
        layers = [layer] if component.kind is Kind.RESID_POST else window
        modules = [module_of(tiny_model, family, component.kind, each) for each in layers]
        draws = []
        for draw in range(REQUEST.draws):
            corrupt = noise(tiny_model, noise_sd, draw)
            before = corrupted(tiny_model, corrupt)
            draws.append((restored(tiny_model, modules, corrupt) - before).numpy())
        np.testing.assert_allclose(effects, np.mean(draws, axis=0), atol=1e-6, err_msg=address)
        np.testing.assert_allclose(spread[address], np.std(draws, axis=0, ddof=1), atol=1e-6)
    contrast = tables["contrast"].to_pylist()[0]
    assert contrast["probability_clean"] == pytest.approx(
        float(probabilities(tiny_model)), rel=1e-4
    )
    runs = [corrupted(tiny_model, noise(tiny_model, noise_sd, draw)) for draw in range(2)]
    assert contrast["probability_corrupted"] == pytest.approx(np.mean(runs), rel=1e-4)
    assert contrast["probability_corrupted_sd"] == pytest.approx(np.std(runs, ddof=1), rel=1e-3)


def test_noise_is_in_standard_deviations_of_what_the_model_reads(tiny_model: LoadedModel) -> None:
    found = parameters(traced(tiny_model, sigma=2.0))["noise_sd"]
    everything = torch.arange(models.D_VOCAB)
    with torch.inference_mode():
        read: Tensor = tiny_model.plain.get_input_embeddings()(everything)
    assert found == pytest.approx(2 * float(read.std(correction=0)), rel=1e-3)


def test_restoring_the_last_state_where_it_is_read_restores_the_answer(
    tiny_model: LoadedModel,
) -> None:
    tables = traced(tiny_model)
    contrast = tables["contrast"].to_pylist()[0]
    whole = contrast["probability_clean"] - contrast["probability_corrupted"]
    last = f"blocks.{tiny_model.architecture.n_layers - 1}.resid_post"
    states = values(tables["trace"])[last]
    assert states[-1] == pytest.approx(whole, abs=1e-6)
    # Nothing reads the last block's output anywhere else.
    assert not states[:-1].any()


def test_nothing_is_restored_before_the_subject(tiny_model: LoadedModel) -> None:
    for row in values(traced(tiny_model)["trace"]).values():
        assert not row[: SUBJECT[0]].any()


def test_a_window_of_all_layers_does_as_much_wherever_it_is_centred(
    tiny_model: LoadedModel,
) -> None:
    shown = values(traced(tiny_model, window=101, kinds=(TraceKind.MLP,))["trace"])
    first, *others = shown.values()
    assert first.any()
    for row in others:
        np.testing.assert_allclose(row, first, atol=1e-6)


def test_a_foil_makes_it_a_logit_difference(tiny_model: LoadedModel) -> None:
    tables = traced(tiny_model, foil=9)
    assert provenance_of(tables["trace"]).unit == "logits"
    contrast = tables["contrast"].to_pylist()[0]
    last = f"blocks.{tiny_model.architecture.n_layers - 1}.resid_post"
    whole = contrast["clean"] - contrast["corrupted"]
    assert values(tables["trace"])[last][-1] == pytest.approx(whole, abs=1e-4)


def test_equal_seeds_give_equal_bytes(tiny_model: LoadedModel) -> None:
    first, again = (to_ipc(traced(tiny_model)["trace"]) for _ in range(2))
    assert first == again
    assert to_ipc(traced(tiny_model, seed=4)["trace"]) != first


def test_a_draw_is_the_same_however_many_there_are(tiny_model: LoadedModel) -> None:
    one, two = traced(tiny_model, draws=1), traced(tiny_model, draws=2)
    more = traced(tiny_model, draws=3)
    for address, row in values(one["trace"]).items():
        mean, sd = values(two["trace"])[address], values(two["trace"], "sd")[address]
        # Of two draws the mean lies sd / sqrt(2) from each.
        np.testing.assert_allclose(np.abs(row - mean), sd / np.sqrt(2), atol=1e-6)
        assert np.isnan(values(one["trace"], "sd")[address]).all()
        assert np.isfinite(values(more["trace"], "sd")[address]).all()


def test_a_model_whose_blocks_are_not_as_described_is_run_whole(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(traced(tiny_model)["trace"])
    shape = tiny_model.architecture
    wrong = msgspec.structs.replace(shape, parallel_blocks=not shape.parallel_blocks)
    monkeypatch.setattr(tiny_model, "architecture", wrong)
    tables = traced(tiny_model)
    assert parameters(tables)["runs"] == "runs made whole"
    for address, row in values(tables["trace"]).items():
        np.testing.assert_allclose(row, expected[address], atol=1e-6, err_msg=address)


def test_the_subject_is_the_last_place_where_its_text_stands() -> None:
    request = TracingScan(prompt="Paris, Paris!", subject="Paris")
    spans = tuple(Span(*edges) for edges in ((0, 0), (0, 5), (5, 6), (6, 9), (9, 12), (12, 13)))
    tokens = msgspec.structs.replace(models.prompt(6), spans=spans)
    assert request.subject_positions(tokens) == (3, 4)


def test_a_token_that_holds_part_of_the_subject_is_the_subjects() -> None:
    request = TracingScan(prompt="abcdef", subject="bcd")
    spans = tuple(Span(*edges) for edges in ((0, 2), (2, 3), (3, 5), (5, 6)))
    tokens = msgspec.structs.replace(models.prompt(4), spans=spans)
    assert request.subject_positions(tokens) == (0, 1, 2)


def test_a_subject_that_is_not_in_the_prompt_is_refused_by_name(tiny_model: LoadedModel) -> None:
    with pytest.raises(Unprocessable, match="'Paris' does not stand in the prompt 'abcdefg'"):
        traced(tiny_model, subject="Paris")


def test_a_subject_that_the_model_has_not_read_yet_is_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(Unprocessable, match="'cd' ends at token 3, and the next token after 2"):
        traced(tiny_model, target_token_idx=2)
    with pytest.raises(InvalidPositions, match="has 9"):
        traced(tiny_model, target_token_idx=9)


def test_windows_are_centred_and_cut_off_at_the_ends() -> None:
    request = TracingScan(prompt="x", subject="x", window=6)
    assert request.layers(15, 30) == range(12, 18)
    assert request.layers(1, 30) == range(4)
    assert request.layers(29, 30) == range(26, 30)
    assert msgspec.structs.replace(request, window=1).layers(7, 30) == range(7, 8)


class Stops(Silent):
    """Stops once so many checkpoints have been passed."""

    def __init__(self, after: int) -> None:
        self.left = after

    def checkpoint(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cancelled


def test_a_scan_that_stops_leaves_the_model_as_it_was(tiny_model: LoadedModel) -> None:
    def state() -> list[tuple[int, int] | float]:
        hooks: list[tuple[int, int] | float] = [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for module in tiny_model.plain.modules()
        ]
        return [*hooks, float(probabilities(tiny_model))]

    before = state()
    for after in (0, tiny_model.architecture.n_layers + 3):
        with pytest.raises(Cancelled):
            scan_tracing(tiny_model, REQUEST, TOKENS, Stops(after))
        assert state() == before
