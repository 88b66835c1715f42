"""What is known of SmolLM2-135M-Instruct shows in its scans."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from neural_mri.contract.scans import ActivationScan, AttentionScan
from neural_mri.contract.tokens import Span, Tokens
from worker.scanner.activations import scan_activations
from worker.scanner.attention import scan_attention
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.topology import scan_topology

pytestmark = pytest.mark.smollm2

PROMPT = "The Eiffel Tower is located in the city of"


@pytest.fixture(scope="session")
def tokens(smollm2_folder: Path) -> Tokens:
    found = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json")).encode(PROMPT)
    return Tokens(
        ids=tuple(found.ids),
        texts=tuple(PROMPT[start:end] for start, end in found.offsets),
        spans=tuple(Span(start, end) for start, end in found.offsets),
    )


def test_it_knows_where_the_eiffel_tower_is(smollm2: LoadedModel, tokens: Tokens) -> None:
    table = scan_activations(smollm2, ActivationScan(prompt=PROMPT), tokens, Silent()).tables[
        "predictions"
    ]
    last = [row for row in table.to_pylist() if row["position"] == len(tokens) - 1]
    assert last[0]["text"] == " Paris"
    assert last[0]["probability"] == pytest.approx(0.70, abs=0.005)


def test_the_first_token_alone_is_a_sink_and_mlp_11_makes_it_one(
    smollm2: LoadedModel, tokens: Tokens
) -> None:
    tables = scan_activations(smollm2, ActivationScan(prompt=PROMPT), tokens, Silent()).tables
    assert tables["tokens"]["sink"].to_pylist() == [True] + [False] * (len(tokens) - 1)
    written = {
        row["component"]: row["value"][0]
        for row in tables["activations"].to_pylist()
        if row["kind"] in ("mlp", "attn")
    }
    assert max(written, key=lambda address: written[address]) == "blocks.11.mlp"
    assert written["blocks.11.mlp"] > 20_000


def test_its_default_scan_shows_270_heads_and_30_mlps(smollm2: LoadedModel, tokens: Tokens) -> None:
    table = scan_activations(smollm2, ActivationScan(prompt=PROMPT), tokens, Silent()).tables[
        "activations"
    ]
    kinds = table["kind"].to_pylist()
    assert (kinds.count("head"), kinds.count("mlp")) == (270, 30)
    assert np.isfinite(np.array(table["value"].to_pylist())).all()


def test_its_attention_rows_sum_to_1(smollm2: LoadedModel, tokens: Tokens) -> None:
    asked = AttentionScan(prompt=PROMPT, layers=(0, 29))
    for table in scan_attention(smollm2, asked, tokens, Silent()).tables.values():
        pattern = np.array(table["value"].to_pylist()).reshape(9, len(tokens), len(tokens))
        np.testing.assert_allclose(pattern.sum(-1), 1, rtol=1e-5)


def test_its_134_515_008_parameters_count_the_tied_embedding_once(smollm2_folder: Path) -> None:
    tables = scan_topology(smollm2_folder)
    assert sum(tables["topology"]["parameters"].to_pylist()) == 134_515_008
    assert tables["topology"].to_pylist()[-1]["shared_parameters"] == 49_152 * 576
