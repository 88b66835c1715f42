"""Two checkpoints side by side."""

from pathlib import Path

import numpy as np
import pytest
import torch

from neural_mri.contract.components import Component
from neural_mri.contract.problems import Unprocessable
from neural_mri.contract.weights import WeightScan
from tests import models
from tests.worker.scanner.weight_oracle import Oracle, exactly, map_of, rewritten, rows
from worker.scanner.listening import Silent
from worker.scanner.weights import scan_weights


def test_a_difference_is_where_the_weights_changed(family: str, tmp_path: Path) -> None:
    baseline = models.save(family, tmp_path / "before")
    folder, mapped = models.save(family, tmp_path / "after"), map_of(family)
    lines = mapped.attention(Component.head(1, 1))["W_Q"]

    def tuned(matrix: torch.Tensor) -> torch.Tensor:
        numbers = torch.from_numpy(lines.numbers)
        return matrix.index_add(lines.axis, numbers, matrix.index_select(lines.axis, numbers))

    rewritten(folder, lines.parameter, tuned)
    request = WeightScan(baseline="before")
    table = scan_weights(folder, request, Silent(), baseline).tables["difference"]
    before = Oracle(family).head(1, 1)
    changed = np.linalg.norm(before["W_Q"])
    for row in table.to_pylist():
        if row["component"] not in ("blocks.1.attn", "blocks.1.attn.head_1"):
            assert (row["frobenius"], row["relative"], row["max_abs"]) == (0, 0, 0)
            assert row["cosine"] == exactly(1)
    (head,) = rows(table, component="blocks.1.attn.head_1")
    whole = np.concatenate([part.ravel() for part in before.values()])
    after = np.concatenate(
        [(2 * part if role == "W_Q" else part).ravel() for role, part in before.items()]
    )
    assert head["frobenius"] == exactly(changed)
    assert head["relative"] == exactly(changed / np.linalg.norm(whole))
    assert head["max_abs"] == exactly(np.abs(before["W_Q"]).max())
    cosine = whole @ after / np.linalg.norm(whole) / np.linalg.norm(after)
    assert head["cosine"] == exactly(cosine)
    assert rows(table, component="blocks.1.attn")[0]["frobenius"] == exactly(changed)


def test_a_changed_norm_gain_is_a_difference_of_its_layer(tmp_path: Path) -> None:
    baseline = models.save("llama", tmp_path / "before")
    folder = models.save("llama", tmp_path / "after")
    rewritten(folder, "model.layers.2.input_layernorm.weight", lambda gains: gains + 0.5)
    request = WeightScan(baseline="before")
    table = scan_weights(folder, request, Silent(), baseline).tables["difference"]
    changed = [row["component"] for row in table.to_pylist() if row["frobenius"] > 0]
    assert changed == ["blocks.2.attn"]


def test_a_baseline_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder, other = models.save("llama", tmp_path / "a"), models.save("mistral", tmp_path / "b")
    with pytest.raises(Unprocessable, match=r"b: .* has shape"):
        scan_weights(folder, WeightScan(baseline="b"), Silent(), other)
