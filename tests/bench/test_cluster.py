"""What measures a cluster is held to what it claims; the figures themselves take real services."""

from pathlib import Path

import pytest

from bench import page
from bench.cluster import sameness
from bench.cluster.fairness import jain
from bench.cluster.figures import at_least, at_most, percentile, table
from bench.cluster.kinds import KINDS
from bench.cluster.service import Spent
from bench.cluster.throughput import LENGTHS, prompts
from tests import models
from worker.scanner.loading import LoadedModel


def test_jains_index_is_1_for_equal_shares_and_one_nth_where_one_has_all() -> None:
    assert jain([3, 3, 3, 3]) == pytest.approx(1)
    assert jain([5, 0, 0, 0]) == pytest.approx(1 / 4)
    assert jain([2, 1, 1]) == pytest.approx(16 / 18)


def test_a_figure_says_whether_its_bar_was_met() -> None:
    assert at_most("wait", 2.0, 2.0, " ms").bar == "≤ 2 ms: met"
    assert at_most("wait", 2.1, 2.0, " ms").bar == "≤ 2 ms: missed"
    assert at_least("gain", 1.9, 1.9, " x").bar == "≥ 1.9 x: met"
    assert at_least("gain", 1.8, 1.9, " x").bar == "≥ 1.9 x: missed"
    assert "| gain | 1.80 x | ≥ 1.9 x: missed |" in table([at_least("gain", 1.8, 1.9, " x")])


def test_a_share_of_the_values_lies_below_a_percentile() -> None:
    assert percentile([1, 2, 3, 4], 0.5) == 2.5
    assert percentile(range(100), 0.95) == 95


def test_what_was_spent_between_two_looks_is_their_difference_by_process() -> None:
    spent = Spent({"api": 3.0, "worker": 9.0}).since(Spent({"api": 1.0, "worker": 4.0}))
    assert spent.total == 7
    assert spent.each(1000) == "worker 5.0, api 2.0"


def test_prompts_are_of_all_lengths_and_differ() -> None:
    made = prompts(200, seed=1)
    assert {len(text.split()) for text in made} == set(LENGTHS)
    assert len(set(made)) == 200
    assert made == prompts(200, seed=1) != prompts(200, seed=2)


def test_a_section_is_written_anew_where_it_stands_and_the_others_are_left(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("# Benchmarks\n\n## One\n\nfirst\n\n## Two\n\nsecond\n")
    page.replace_section(path, "Three", "third")
    page.replace_section(path, "One", "changed\n\n### Within\n\nmore")
    assert path.read_text() == (
        "# Benchmarks\n\n## One\n\nchanged\n\n### Within\n\nmore\n\n## Two\n\nsecond\n\n## Three\n\nthird\n"
    )
    assert page.section(path.read_text(), "Two") == "## Two\n\nsecond\n\n"
    assert page.section(path.read_text(), "Four") is None


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_canonical_scan_of_any_kind_is_identical_among_a_hundred_companies(
    tiny_models: dict[str, LoadedModel], family: str
) -> None:
    companies = 100 if family == "llama" else 3
    found = sameness.figures(tiny_models[family], n_companies=companies)
    identical, agreeing = found[::2], found[1::2]
    assert len(identical) == len(KINDS)
    assert {(figure.found, figure.bar) for figure in identical} == {
        (str(companies), f"{companies}: met")
    }
    assert max(float(figure.found.split()[0]) for figure in agreeing) < 1e-4
