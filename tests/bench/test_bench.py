"""What measures is held to what it claims, on models that take no time."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench import devices, gates, growth, memory, page, placement, stimulation, weights
from bench.timing import Row, median_seconds, prompt
from neural_mri.diagnostics import load_suite
from tests import models
from worker.scanner.loading import LoadedModel


def test_a_row_is_a_ratio_to_the_plain_forward_of_its_own_rounds() -> None:
    assert Row("fMRI", 10, seconds=0.3, plain_seconds=0.2, goal=1.6).ratio == pytest.approx(1.5)


def test_candidates_take_turns_and_warm_up_uncounted() -> None:
    ran: list[str] = []
    found = median_seconds(
        {"one": lambda: ran.append("one"), "other": lambda: ran.append("other")},
        rounds=2,
        warm_up=1,
    )
    assert ran == ["one", "other"] * 3
    assert set(found) == {"one", "other"}


def test_equal_seeds_make_equal_prompts_of_the_models_own_tokens(
    tiny_models: dict[str, LoadedModel],
) -> None:
    model = tiny_models["llama"]
    tokens = prompt(model, 9)
    assert tokens == prompt(model, 9) != prompt(model, 9, seed=1)
    assert len(tokens) == 9
    assert max(tokens.ids) < model.architecture.d_vocab


def test_stimulation_and_weights_are_measured(
    tiny_models: dict[str, LoadedModel], tmp_path: Path
) -> None:
    model = tiny_models["llama"]
    rows = [
        *stimulation.rows(model, rounds=1),
        *weights.rows(models.save("llama", tmp_path), model, rounds=1),
    ]
    assert all(row.seconds > 0 and row.plain_seconds > 0 for row in rows)
    named = [row.what for row in rows]
    for scan in ("perturb and compare", "patching", "tracing", "T2"):
        assert any(what.startswith(scan) for what in named), scan


def test_cost_is_measured_over_tokens_components_and_rows(
    tiny_models: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "_LENGTHS", (4, 8))
    grown = list(growth.growths(tiny_models["llama"], rounds=1))
    assert [table.size for table in grown] == ["tokens", "components", "rows"]
    for table in grown:
        for seconds in table.seconds.values():
            assert {"plain", *table.candidates} == seconds.keys()


def test_every_mode_is_timed_on_a_shape_built_in_code() -> None:
    shape = devices.Shape(models.configuration("llama"), "bfloat16")
    timed = list(devices.every_mode("tiny", shape, device="cpu"))
    assert {one.what for one in timed} >= {"T1", "T2", "plain forward", "perturb and compare"}
    assert {one.what.partition(",")[0] for one in timed} >= {"fMRI", "DTI", "FLAIR"}
    assert all(one.seconds > 0 for one in timed)
    assert all(one.dtype == "bfloat16" for one in timed)


def test_a_peak_is_a_rise_above_what_was_resident(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path)
    found = memory.peak(folder)
    assert found.model > 0
    assert min(found.plain, found.scan) >= 0


TAKE_FOR_A_MOMENT = """
import torch
from bench.memory import rise
print(rise(lambda: torch.ones(16 << 20).cumsum(0)))
"""


def test_memory_that_is_taken_for_a_moment_is_seen() -> None:
    asked = [sys.executable, "-c", TAKE_FOR_A_MOMENT]
    said = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    assert int(said) > 64 << 20


def test_the_page_holds_what_the_placement_simulation_finds() -> None:
    """On a virtual clock a figure is the same everywhere: what is published is what the code does."""
    written = page.section(Path("docs/benchmarks.md").read_text(), placement.TITLE)
    assert written is not None
    tables = list(placement.figures(rates=(0.3, 0.7)))
    assert len(tables) == len(placement.KINDS)
    for table in tables:
        assert set(table.splitlines()) <= set(written.splitlines())


def test_runs_that_were_written_down_are_not_run_again_unless_their_numbers_were_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, log = load_suite("quick"), tmp_path / "runs.jsonl"
    assert gates.Runs(log, suite).outcome("whole run", 3, lambda: "false alarm") == "false alarm"

    def again() -> str:
        raise AssertionError("it was written down")

    assert gates.Runs(log, suite).outcome("whole run", 3, again) == "false alarm"
    assert gates.Runs(log, suite).outcome("whole run", 4, lambda: "quiet") == "quiet"
    assert len(log.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="name a new file"):
        gates.Runs(log, load_suite("standard"))
    monkeypatch.setattr(gates, "MEASURES_VERSION", "of tomorrow")
    with pytest.raises(ValueError, match="of tomorrow"):
        gates.Runs(log, suite)
