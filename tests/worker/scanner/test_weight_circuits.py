"""Circuits against the explicit d_model x d_model products."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.worker.scanner.weight_oracle import Oracle, exactly, rows, scan


def test_circuits_are_those_of_the_explicit_products(family: str, tmp_path: Path) -> None:
    tables, oracle = scan(models.save(family, tmp_path)), Oracle(family)
    shape = oracle.map.architecture
    table = tables["circuits"]
    assert table.num_rows == 2 * shape.n_layers * shape.n_heads
    for row in table.to_pylist():
        head = oracle.head(row["layer"], row["head"])
        left, right = ("W_Q", "W_K") if row["circuit"] == "QK" else ("W_V", "W_O")
        product = torch.from_numpy(head[left].T @ head[right])
        values = torch.linalg.svdvals(product).numpy()
        np.testing.assert_allclose(row["value"], values[:8], rtol=1e-4)
        assert row["spectral_norm"] == exactly(values[0])
        assert row["frobenius"] == exactly(np.sqrt((values**2).sum()))
        assert row["stable_rank"] == exactly((values**2).sum() / values[0] ** 2)
        if row["circuit"] == "OV":
            eigenvalues = torch.linalg.eigvals(product)
            copying = eigenvalues.real.sum() / eigenvalues.abs().sum()
            assert row["copying"] == pytest.approx(copying.item(), abs=1e-6)
        else:
            assert np.isnan(row["copying"])


def test_a_head_that_copies_scores_1_and_one_that_was_pruned_is_0(tmp_path: Path) -> None:
    path = models.save("llama", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    value, output = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "vo")
    tensors[value][:8] = torch.eye(8, 32)
    tensors[output][:, :8] = torch.eye(32, 8)
    tensors["model.layers.2.self_attn.k_proj.weight"][:8] = 0
    save_file(tensors, path)
    table = scan(tmp_path)["circuits"]
    (copier,) = rows(table, component="blocks.1.attn.head_0", circuit="OV")
    assert (copier["copying"], copier["stable_rank"]) == (1, 8)
    assert copier["value"] == [1] * 8
    (pruned,) = rows(table, component="blocks.2.attn.head_1", circuit="QK")
    assert (pruned["spectral_norm"], pruned["frobenius"]) == (0, 0)
    assert np.isnan(pruned["stable_rank"])
