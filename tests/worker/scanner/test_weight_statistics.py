"""Every tensor's statistics against numpy on the whole tensor, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.worker.scanner.weight_oracle import Oracle, exactly, rewritten, rows, scan
from worker.scanner import weight_statistics

PERCENTILES = {"p0_1": 0.1, "p1": 1, "p25": 25, "p50": 50, "p75": 75, "p99": 99, "p99_9": 99.9}


def test_every_tensors_statistics_are_numpys(family: str, tmp_path: Path) -> None:
    tables = scan(models.save(family, tmp_path))
    found = {row["name"]: row for row in tables["tensors"].to_pylist()}
    oracle = Oracle(family)
    assert list(found) == list(oracle.parameters)
    for name, weights in oracle.parameters.items():
        row, far = found[name], np.abs(weights - weights.mean()) > 6 * weights.std()
        expected = {
            "mean": weights.mean(),
            "std": weights.std(),
            "minimum": weights.min(),
            "maximum": weights.max(),
            "max_abs": np.abs(weights).max(),
            "rms": np.sqrt(np.mean(weights**2)),
            "frobenius": np.linalg.norm(weights),
            "kurtosis": np.mean((weights - weights.mean()) ** 4) / weights.var() ** 2 - 3,
            "outlier_share": far.mean(),
        }
        for column, value in expected.items():
            assert row[column] == exactly(value), (name, column)
        for column, share in PERCENTILES.items():
            assert row[column] == np.float32(np.percentile(weights, share)), (name, column)
        assert (row["shape"], row["numel"]) == (list(weights.shape), weights.size)
        assert row["role"] == oracle.map.rows[name].owner.role


def test_histograms_count_every_weight_between_the_true_extremes(
    family: str, tmp_path: Path
) -> None:
    table = scan(models.save(family, tmp_path), histogram_bins=16)["histograms"]
    parameters = Oracle(family).parameters
    for row in table.to_pylist():
        counts, edges = np.histogram(parameters[row["name"]], 16)
        assert row["counts"] == counts.tolist()
        assert (row["minimum"], row["maximum"]) == (edges[0], edges[-1])


def test_outliers_are_the_farthest_weights_where_they_lie(family: str, tmp_path: Path) -> None:
    table = scan(models.save(family, tmp_path))["outliers"]
    for name, weights in Oracle(family).parameters.items():
        z = (weights - weights.mean()) / weights.std()
        found = rows(table, name=name)
        assert [row["rank"] for row in found] == list(range(8))
        farthest = np.sort(np.abs(z), axis=None)[::-1][:8]
        assert [abs(row["z"]) for row in found] == [exactly(size) for size in farthest]
        for row in found:
            at = (row["row"], row["column"]) if weights.ndim == 2 else (row["row"],)
            assert (row["z"], row["value"]) == (exactly(z[at]), np.float32(weights[at]))
            assert weights.ndim == 2 or row["column"] == -1


def test_more_values_than_are_kept_in_memory_give_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scan(models.save("qwen3", tmp_path))
    monkeypatch.setattr(weight_statistics, "_BLOCK", 100)
    monkeypatch.setattr(weight_statistics, "_KEPT", 150)
    in_pieces = scan(tmp_path)
    for name in ("p0_1", "p1", "p25", "p50", "p75", "p99", "p99_9", "minimum", "maximum"):
        assert in_pieces["tensors"][name].equals(whole["tensors"][name])
    assert in_pieces["histograms"].equals(whole["histograms"])
    assert in_pieces["outliers"]["value"].equals(whole["outliers"]["value"])


def test_a_mean_far_from_zero_costs_no_digits(tmp_path: Path) -> None:
    name = "model.norm.weight"

    def shifted(gains: torch.Tensor) -> torch.Tensor:
        return 1000 + 0.25 * torch.randn(gains.shape, generator=torch.Generator().manual_seed(0))

    weights = rewritten(models.save("llama", tmp_path), name, shifted)
    (row,) = rows(scan(tmp_path)["tensors"], name=name)
    assert row["std"] == exactly(weights.std())
    assert row["kurtosis"] == exactly(
        np.mean((weights - weights.mean()) ** 4) / weights.var() ** 2 - 3
    )


def test_equal_weights_have_no_spread_and_no_outliers(tmp_path: Path) -> None:
    name = "model.norm.weight"
    rewritten(models.save("llama", tmp_path), name, lambda gains: torch.full_like(gains, 0.1))
    tables = scan(tmp_path)
    (row,) = rows(tables["tensors"], name=name)
    assert (row["std"], row["outlier_share"], row["p50"]) == (0, 0, np.float32(0.1))
    assert np.isnan(row["kurtosis"])
    (histogram,) = rows(tables["histograms"], name=name)
    assert sum(histogram["counts"]) == histogram["counts"][-1] == 32


def test_weights_that_are_not_finite_are_counted_and_nothing_is_made_up(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"

    def broken(matrix: torch.Tensor) -> torch.Tensor:
        matrix[3, 4], matrix[5, 6] = torch.nan, torch.inf
        return matrix

    rewritten(models.save("llama", tmp_path), name, broken)
    tables = scan(tmp_path)
    (row,) = rows(tables["tensors"], name=name)
    assert row["nonfinite"] == 2
    assert np.isnan([row["mean"], row["rms"], row["max_abs"], row["p50"]]).all()
    assert not rows(tables["histograms"], name=name)
    for head in rows(tables["weights"], kind="head", layer=1):
        assert np.isnan(head["rms"])
        assert np.isnan(head["rms_q"])
        assert not np.isnan(head["rms_k"])
    assert all(np.isnan(row["spectral_norm"]) for row in rows(tables["circuits"], layer=1))
    assert not any(np.isnan(row["spectral_norm"]) for row in rows(tables["circuits"], layer=0))


def test_buffers_are_named_and_are_no_weights(tmp_path: Path) -> None:
    path = models.save("gpt2", tmp_path) / "model.safetensors"
    bare = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, path)
    tables = scan(tmp_path)
    (mask,) = rows(tables["tensors"], role="buffer")
    assert (mask["name"], mask["component"]) == ("transformer.h.0.attn.bias", "blocks.0.attn")
    assert np.isnan(mask["mean"])
    roles = {row["role"] for row in tables["tensors"].to_pylist()}
    assert {"W_QKV", "W_QKV.bias", "norm", "norm.bias"} < roles
