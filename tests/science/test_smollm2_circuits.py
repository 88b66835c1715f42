"""What is known of circuits holds in SmolLM2-135M-Instruct: exact, found again by estimates, and no sink."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan, Granularity
from neural_mri.contract.components import Component
from neural_mri.contract.tokens import Span, Tokens
from worker.scanner.circuits import scan_circuits
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric

pytestmark = pytest.mark.smollm2

CLEAN = "Then, Sean and Daniel had a long argument, and afterwards Sean said to"
CORRUPT = "Then, Sean and Daniel had a long argument, and afterwards Samantha said to"


class Question:
    """Who was spoken to: Daniel, not Sean."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.clean, self.corrupt = self._read(CLEAN), self._read(CORRUPT)
        self.metric = Metric(self._read(" Daniel").ids[0], self._read(" Sean").ids[0])

    def _read(self, text: str) -> Tokens:
        found = self._tokenizer.encode(text)
        spans = tuple(Span(start, end) for start, end in found.offsets)
        texts = tuple(text[start:end] for start, end in found.offsets)
        return Tokens(ids=tuple(found.ids), texts=texts, spans=spans)

    def effects(self, model: LoadedModel, **changes: Any) -> Any:
        asked = CircuitScan(prompt=CLEAN, corrupt_prompt=CORRUPT, **{"edges": 0, **changes})
        tables = scan_circuits(
            model, asked, self.clean, self.corrupt, *self.metric, Silent(), reference=None
        ).tables
        return tables["effects"].to_pandas().set_index("component")


@pytest.fixture(scope="module")
def question(smollm2_folder: Path) -> Question:
    return Question(smollm2_folder)


def test_the_strongest_components_are_measured_as_one_run_each_would(
    smollm2: LoadedModel, question: Question
) -> None:
    effects = question.effects(smollm2, ablation=Ablation.ZERO, exact=4)
    ids = torch.tensor([question.clean.ids])

    @torch.inference_mode()
    def metric() -> float:
        return question.metric(smollm2.plain(input_ids=ids, use_cache=False).logits[0, -1]).item()

    clean = metric()
    heads = effects[effects["exact"] & (effects["kind"] == "head")].index[:2]
    mlps = effects[effects["kind"] == "mlp"].index[[5, 29]]
    for address in (*heads, *mlps):
        component = Component.parse(address)
        block = smollm2.modules.blocks[component.layer or 0]

        def without(_module: Any, values: Any, *output: Any, head: Any = component.index) -> Any:
            value = (output or values)[0].clone()
            own = slice(None) if head is None else slice(64 * head, 64 * head + 64)
            value[:, 1:, own] = 0
            return value if output else (value,)

        if component.index is None:
            handle = block.mlp.register_forward_hook(without)
        else:
            handle = block.w_o.register_forward_pre_hook(without)
        try:
            expected = metric() - clean
        finally:
            handle.remove()
        assert effects["effect"][address] == pytest.approx(expected, abs=1e-4)


def test_the_estimates_find_what_exact_resampling_finds(
    smollm2: LoadedModel, question: Question
) -> None:
    effects = question.effects(smollm2, method=CircuitMethod.ABLATION, edges=1)
    estimate, exact = (np.abs(effects[name].to_numpy()[1:-1]) for name in ("estimate", "effect"))
    strongest = set(exact.argsort()[-10:].tolist())
    assert strongest <= set(estimate.argsort()[-30:].tolist())
    assert effects["effect"].min() < -0.3
    assert effects["effect"].max() > 0.1


def test_the_mlp_that_makes_the_sink_is_no_part_of_the_answer(
    smollm2: LoadedModel, question: Question
) -> None:
    asked = {"method": CircuitMethod.ABLATION, "granularity": Granularity.BLOCKS}
    without, included = (
        question.effects(smollm2, ablation=Ablation.ZERO, include_first_token=first, **asked)[
            "effect"
        ][1:-1].abs()
        for first in (False, True)
    )
    assert included["blocks.11.mlp"] > 2
    assert without["blocks.11.mlp"] < 0.3 * included["blocks.11.mlp"]
    assert question.effects(smollm2, **asked)["effect"]["blocks.11.mlp"] == pytest.approx(
        0, abs=0.5
    )
