"""Where SmolLM2-135M-Instruct recalls what it knows, and where it reads that out."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer

from neural_mri.contract.perturbations import TraceKind, TracingScan
from neural_mri.contract.tokens import Span, Tokens
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.tracing import scan_tracing

pytestmark = pytest.mark.smollm2


class Fact(NamedTuple):
    prompt: str
    subject: str
    answer: str


FACTS = (
    Fact("The capital of Roman Republic is", "Roman Republic", " Rome"),
    Fact("The capital city of Kingdom of Hungary is", "Kingdom of Hungary", " Budapest"),
    Fact("The official language of Peru is", "Peru", " Spanish"),
    Fact("The capital city of Kingdom of Afghanistan is", "Kingdom of Afghanistan", " Kabul"),
    Fact("The native language of Luc Besson is", "Luc Besson", " French"),
)
"""The model names each answer with p >= 0.3. Little follows a subject: traces are short."""


class Traced(NamedTuple):
    """One fact's trace, by layer."""

    answer: str
    probability_clean: float
    probability_corrupted: float
    mlp_at_subject: list[float]
    attention_at_last: list[float]


def tokenized(folder: Path, prompt: str) -> Tokens:
    found = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt)
    return Tokens(
        ids=tuple(found.ids),
        texts=tuple(prompt[start:end] for start, end in found.offsets),
        spans=tuple(Span(start, end) for start, end in found.offsets),
    )


@pytest.fixture(scope="module")
def traces(smollm2: LoadedModel, smollm2_folder: Path) -> list[Traced]:
    found = []
    for fact in FACTS:
        tokens = tokenized(smollm2_folder, fact.prompt)
        request = TracingScan(
            prompt=fact.prompt,
            subject=fact.subject,
            draws=2,
            kinds=(TraceKind.MLP, TraceKind.ATTENTION),
        )
        tables = scan_tracing(smollm2, request, tokens, Silent()).tables
        last_of_subject = request.subject_positions(tokens)[-1]
        effects = [r for r in tables["trace"].to_pylist() if r["quantity"] == "indirect_effect"]
        contrast = tables["contrast"].to_pylist()[0]
        found.append(
            Traced(
                answer=contrast["answer"],
                probability_clean=contrast["probability_clean"],
                probability_corrupted=contrast["probability_corrupted"],
                mlp_at_subject=[r["value"][last_of_subject] for r in effects if r["kind"] == "mlp"],
                attention_at_last=[r["value"][-1] for r in effects if r["kind"] == "attn"],
            )
        )
    return found


def test_it_knows_the_facts_and_noise_takes_them_away(traces: list[Traced]) -> None:
    assert [trace.answer for trace in traces] == [fact.answer for fact in FACTS]
    assert all(trace.probability_clean >= 0.3 for trace in traces)
    assert all(trace.probability_corrupted < 0.1 for trace in traces)


def test_early_mlps_at_the_subjects_last_token_recall_it(traces: list[Traced]) -> None:
    effect = np.mean([trace.mlp_at_subject for trace in traces], axis=0)
    assert len(effect) == 30
    assert effect.argmax() < 10
    assert effect.max() > 0.05
    assert np.abs(effect[15:]).max() < 0.1 * effect.max()


def test_late_attention_at_the_last_token_reads_it_out(traces: list[Traced]) -> None:
    effect = np.mean([trace.attention_at_last for trace in traces], axis=0)
    assert effect.argmax() >= 20
    assert effect.max() > 0.15
    assert np.abs(effect[:10]).max() < 0.1 * effect.max()
