"""Activation patching on a tiny model of every family, against hooks written by hand, one run a cell."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.perturbations import Direction, PatchingScan, PatchSite
from neural_mri.contract.problems import Problem, Unprocessable
from neural_mri.contract.results import provenance_of
from neural_mri.contract.tokens import Tokens
from tests import models
from worker.scanner.hooks import tensor_out
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.patching import scan_patching

CLEAN, CORRUPT = models.prompt(7), models.prompt(7, seed=5)
ANSWER, FOIL = 7, 9
EVERYWHERE = tuple(PatchSite)


def patched(
    model: LoadedModel, tokens: Tokens = CLEAN, corrupt: Tokens = CORRUPT, **changes: Any
) -> dict[str, pa.Table]:
    request = PatchingScan(prompt="x", corrupt_prompt="y", sites=EVERYWHERE)
    request = msgspec.structs.replace(request, **changes)
    return scan_patching(
        model, request, tokens, corrupt, Silent(), answer_id=ANSWER, foil_id=FOIL
    ).tables


def values(table: pa.Table) -> dict[str, np.ndarray]:
    return {row["component"]: np.array(row["value"]) for row in table.to_pylist()}


@torch.inference_mode()
def metrics(model: LoadedModel, ids: Tensor, target: int = -1) -> list[float]:
    logits: Tensor = model.plain(input_ids=ids, use_cache=False).logits[:, target]
    found: list[float] = (logits[:, ANSWER] - logits[:, FOIL]).tolist()
    return found


def metric(model: LoadedModel, tokens: Tokens) -> float:
    return metrics(model, torch.tensor([tokens.ids]))[0]


class Place:
    """One component's value in the plain model: read in one run, put into another."""

    def __init__(self, model: LoadedModel, family: str, component: Component) -> None:
        names = models.NAMES[family]
        block = model.plain.get_submodule(f"{names.blocks}.{component.layer}")
        self.reads_input = component.kind in (Kind.RESID_PRE, Kind.HEAD)
        self.where = slice(None)
        match component.kind:
            case Kind.RESID_PRE:
                self.module: nn.Module = block
            case Kind.ATTN:
                self.module = block.get_submodule(names.attn_post_norm or names.w_o)
            case Kind.MLP:
                self.module = block.get_submodule(names.mlp_post_norm or names.w_out)
            case _:
                d_head, head = model.architecture.d_head, component.index or 0
                self.module = block.get_submodule(names.w_o)
                self.where = slice(head * d_head, (head + 1) * d_head)

    @contextmanager
    def changed(self, change: Any) -> Iterator[None]:
        def before(_module: Any, args: Any) -> Any:
            return (change(args[0]), *args[1:])

        def after(_module: Any, _args: Any, output: Any) -> Any:
            value = change(tensor_out(output))
            return (value, *output[1:]) if isinstance(output, tuple) else value

        register = self.module.register_forward_hook
        handle = (
            self.module.register_forward_pre_hook(before) if self.reads_input else register(after)
        )
        try:
            yield
        finally:
            handle.remove()

    def read(self, model: LoadedModel, tokens: Tokens) -> Tensor:
        seen: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            seen.append(value.clone())
            return value

        with self.changed(keep):
            metric(model, tokens)
        return seen[0]

    def put(
        self, model: LoadedModel, tokens: Tokens, value: Tensor, target: int = -1
    ) -> list[float]:
        """The metric of one run a position, each with the value there and nowhere else."""
        positions = range(len(tokens))

        def change(own: Tensor) -> Tensor:
            own = own.clone()
            for at in positions:
                own[at, at, self.where] = value[0, at, self.where]
            return own

        ids = torch.tensor([tokens.ids]).expand(len(tokens), -1)
        with self.changed(change):
            return metrics(model, ids, target)


@pytest.mark.parametrize("direction", Direction)
def test_the_grid_is_what_patching_one_by_one_gives(
    tiny_model: LoadedModel, family: str, direction: Direction
) -> None:
    base, source = CORRUPT, CLEAN
    if direction is Direction.NOISING:
        base, source = source, base
    tables = patched(tiny_model, direction=direction)
    found = values(tables["patched"])
    shape = tiny_model.architecture
    assert len(found) == shape.n_layers * (3 + shape.n_heads)
    for address, row in found.items():
        place = Place(tiny_model, family, Component.parse(address))
        expected = place.put(tiny_model, base, place.read(tiny_model, source))
        np.testing.assert_allclose(row, expected, atol=1e-4, err_msg=address)
    clean, corrupted = metric(tiny_model, CLEAN), metric(tiny_model, CORRUPT)
    contrast = tables["contrast"].to_pylist()[0]
    assert contrast["clean"] == pytest.approx(clean, abs=1e-4)
    assert contrast["corrupted"] == pytest.approx(corrupted, abs=1e-4)
    assert abs(clean - corrupted) > 0.1
    for address, row in values(tables["recovery"]).items():
        np.testing.assert_allclose(
            row, (found[address] - corrupted) / (clean - corrupted), rtol=1e-3, atol=1e-3
        )


def test_a_target_in_the_middle_reads_no_further(tiny_model: LoadedModel, family: str) -> None:
    tables = patched(tiny_model, target_token_idx=3, sites=(PatchSite.MLP,))
    assert provenance_of(tables["patched"]).positions == (0, 1, 2, 3)
    assert len(tables["tokens"]) == len(CLEAN)
    place = Place(tiny_model, family, Component(Kind.MLP, 0))
    expected = place.put(tiny_model, CORRUPT, place.read(tiny_model, CLEAN), target=3)[:4]
    np.testing.assert_allclose(values(tables["patched"])["blocks.0.mlp"], expected, atol=1e-4)


def test_patching_a_run_with_itself_changes_nothing(tiny_model: LoadedModel) -> None:
    clean = metric(tiny_model, CLEAN)
    tables = patched(tiny_model, CLEAN, CLEAN)
    for row in values(tables["patched"]).values():
        np.testing.assert_allclose(row, clean, atol=1e-5)


def test_runs_too_close_leave_nothing_to_recover(tiny_model: LoadedModel) -> None:
    tables = patched(tiny_model, CLEAN, CLEAN)
    assert all(np.isnan(row).all() for row in values(tables["recovery"]).values())
    contrast = tables["contrast"].to_pylist()[0]
    assert contrast["clean"] == pytest.approx(contrast["corrupted"], abs=1e-5)


def with_last(tokens: Tokens, token_id: int) -> Tokens:
    return msgspec.structs.replace(tokens, ids=(*tokens.ids[:-1], token_id))


def test_restoring_all_that_differs_recovers_all(tiny_model: LoadedModel) -> None:
    # Where prompts differ in the last token alone, its residual is all that differs in any layer.
    other = next(
        corrupt
        for corrupt in (with_last(CLEAN, token_id) for token_id in range(3, models.D_VOCAB))
        if abs(metric(tiny_model, corrupt) - metric(tiny_model, CLEAN)) > 0.5
    )
    for address, row in values(patched(tiny_model, CLEAN, other)["recovery"]).items():
        np.testing.assert_array_equal(row[:-1], 0, err_msg=address)
        if Component.parse(address).kind is Kind.RESID_PRE:
            np.testing.assert_allclose(row[-1], 1, atol=1e-4, err_msg=address)


def test_nothing_flows_from_where_the_prompts_are_still_alike(tiny_model: LoadedModel) -> None:
    alike = msgspec.structs.replace(CORRUPT, ids=(*CLEAN.ids[:3], *CORRUPT.ids[3:]))
    tables = patched(tiny_model, CLEAN, alike)
    corrupted = tables["contrast"]["corrupted"][0].as_py()
    for row in values(tables["patched"]).values():
        np.testing.assert_array_equal(row[:3], np.float32(corrupted))


def test_a_model_whose_blocks_are_not_as_described_is_run_whole(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = patched(tiny_model)
    assert "one pass" in provenance_of(expected["patched"]).parameters["runs"]
    shape = tiny_model.architecture
    wrong = msgspec.structs.replace(shape, parallel_blocks=not shape.parallel_blocks)
    monkeypatch.setattr(tiny_model, "architecture", wrong)
    found = patched(tiny_model)
    assert provenance_of(found["patched"]).parameters["runs"] == "runs made whole"
    for address, row in values(found["patched"]).items():
        np.testing.assert_allclose(
            row, values(expected["patched"])[address], atol=1e-4, err_msg=address
        )


def test_what_does_not_fit_into_memory_takes_another_pass(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = values(patched(tiny_model)["patched"])
    monkeypatch.setattr("worker.scanner.patched_runs._ROWS_BYTES", 5000)
    for address, row in values(patched(tiny_model)["patched"]).items():
        np.testing.assert_allclose(row, expected[address], atol=1e-5)


def test_prompts_of_different_length_are_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(Unprocessable, match="6 tokens and the prompt 7") as refused:
        patched(tiny_model, CLEAN, models.prompt(6))
    assert refused.value.members == {"n_tokens": 7, "n_corrupt_tokens": 6}


def test_a_prompt_that_is_its_own_corruption_is_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(Unprocessable, match="the prompt itself, 'x'"):
        patched(tiny_model, corrupt_prompt="x")


def test_an_answer_that_the_model_does_not_have_is_refused(tiny_model: LoadedModel) -> None:
    request = PatchingScan(prompt="x", corrupt_prompt="y")
    with pytest.raises(Problem, match="answer is token 61: expected 0 to 60"):
        scan_patching(tiny_model, request, CLEAN, CORRUPT, Silent(), answer_id=61)


class Stops(Silent):
    """Stops once so many checkpoints have been passed, and hears the stages until then."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.stages: list[str] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        assert 0 < done <= total
        self.stages.append(stage)

    def checkpoint(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cancelled


def test_a_scan_that_stops_leaves_the_model_as_it_was(tiny_model: LoadedModel) -> None:
    before = [hooks(tiny_model), metric(tiny_model, CLEAN)]
    request = PatchingScan(prompt="x", corrupt_prompt="y")
    for after in (0, tiny_model.architecture.n_layers + 3):
        listener = Stops(after)
        with pytest.raises(Cancelled):
            scan_patching(tiny_model, request, CLEAN, CORRUPT, listener)
        assert [hooks(tiny_model), metric(tiny_model, CLEAN)] == before
    assert listener.stages[-1] == "patching"


def hooks(model: LoadedModel) -> list[tuple[int, int]]:
    """How many hooks each module of the plain model has."""
    return [
        (len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in model.plain.modules()
    ]


def test_it_says_how_far_it_is_to_the_end(tiny_model: LoadedModel) -> None:
    heard: list[tuple[str, int, int]] = []

    class Hears(Silent):
        def progress(self, stage: str, done: int, total: int) -> None:
            heard.append((stage, done, total))

    request = PatchingScan(prompt="x", corrupt_prompt="y")
    scan_patching(tiny_model, request, CLEAN, CORRUPT, Hears())
    for stage in ("forward", "patching"):
        done = [done for name, done, _ in heard if name == stage]
        assert done == sorted(done)
        assert done[-1] == next(total for name, _, total in heard if name == stage)


def test_the_places_stand_in_the_order_in_which_a_model_comes_to_them(
    tiny_model: LoadedModel,
) -> None:
    shape: Architecture = tiny_model.architecture
    found = patched(tiny_model)["recovery"]["component"].to_pylist()
    heads = [f"blocks.0.attn.head_{head}" for head in range(shape.n_heads)]
    first = ["blocks.0.resid_pre", "blocks.0.attn", *heads, "blocks.0.mlp"]
    assert found[: len(first)] == first
    twice = patched(tiny_model, sites=(PatchSite.MLP, PatchSite.MLP))["recovery"]
    assert len(twice) == shape.n_layers
