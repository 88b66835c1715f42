import numpy as np
import pytest
import torch

from neural_mri.contract.problems import UnknownComponent
from neural_mri.contract.results import SCHEMAS, provenance_of
from neural_mri.contract.scans import AttentionScan
from tests import models
from worker.scanner.attention import scan_attention
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.loading import LoadedModel

TOKENS = models.prompt(7)


def patterns(model: LoadedModel, *layers: int) -> dict[int, np.ndarray]:
    tables = scan_attention(
        model, AttentionScan(prompt="x", layers=layers), TOKENS, Silent()
    ).tables
    n_heads, n_tokens = model.architecture.n_heads, len(TOKENS)
    return {
        int(name.removeprefix("attention.")): np.array(
            table["value"].to_pylist(), dtype=np.float32
        ).reshape(n_heads, n_tokens, n_tokens)
        for name, table in tables.items()
    }


def test_every_query_spends_its_attention_on_itself_and_what_came_before(
    tiny_model: LoadedModel,
) -> None:
    for pattern in patterns(tiny_model, 0, 1).values():
        np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-6)
        assert np.all(np.triu(pattern, k=1) == 0)


def test_patterns_are_hugging_faces_attentions(tiny_model: LoadedModel, family: str) -> None:
    eager = models.build(family)
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = eager(input_ids=torch.tensor([TOKENS.ids]), output_attentions=True).attentions
    for layer, pattern in patterns(tiny_model, 0, 1).items():
        np.testing.assert_allclose(pattern, expected[layer][0], atol=1e-6)


def test_a_sliding_window_shows_in_the_pattern(tiny_models: dict[str, LoadedModel]) -> None:
    model = tiny_models["gemma2"]
    sliding, full = patterns(model, 0, 1).values()
    assert model.architecture.sliding_windows == (4, None, 4)
    assert np.all(np.tril(sliding, k=-4) == 0)
    assert np.any(np.tril(full, k=-4) > 0)


def test_the_table_is_as_its_schema_says(tiny_model: LoadedModel) -> None:
    asked = AttentionScan(prompt="x", layers=(1, 1))
    tables = scan_attention(tiny_model, asked, TOKENS, Silent()).tables
    table = tables.pop("attention.1")
    assert not tables
    fields = SCHEMAS["attention"].fields
    assert tuple(table.schema)[: len(fields)] == fields
    assert table["component"].to_pylist() == [
        f"blocks.1.attn.head_{head}" for head in range(tiny_model.architecture.n_heads)
    ]
    assert provenance_of(table).parameters == {"n_tokens": len(TOKENS)}


def test_a_layer_that_is_not_there_is_refused(tiny_models: dict[str, LoadedModel]) -> None:
    with pytest.raises(UnknownComponent, match="layer 9 does not exist: the model has 2 layers"):
        patterns(tiny_models["gpt2"], 0, 9)


class Stop(Silent):
    def checkpoint(self) -> None:
        raise Cancelled


def test_a_cancelled_scan_leaves_no_hook_behind(tiny_model: LoadedModel) -> None:
    before = patterns(tiny_model, 0)[0]
    with pytest.raises(Cancelled):
        scan_attention(tiny_model, AttentionScan(prompt="x", layers=(0, 1)), TOKENS, Stop())
    np.testing.assert_array_equal(patterns(tiny_model, 0)[0], before)
