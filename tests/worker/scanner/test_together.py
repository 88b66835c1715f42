"""Scans as rows of one forward, on a tiny model of every family: each is what it would be alone."""

from collections.abc import Sequence

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.timing import prompt
from neural_mri.contract.anomalies import AnomalyScan, Lens, Sublayers
from neural_mri.contract.circuits import Ablation, CircuitMethod, CircuitScan, Granularity
from neural_mri.contract.events import EffectsFrame
from neural_mri.contract.perturbations import (
    Amplify,
    Noise,
    Patch,
    Perturbation,
    PerturbationScan,
    ZeroAblation,
)
from neural_mri.contract.problems import Conflict, Unprocessable
from neural_mri.contract.results import Provenance, provenance_of
from neural_mri.contract.scans import ActivationScan
from neural_mri.contract.tokens import Tokens
from worker.scanner import shared_forward
from worker.scanner.activations import scan_activations, scan_activations_together
from worker.scanner.anomalies import scan_anomalies
from worker.scanner.circuits import AskedCircuit, scan_circuits, scan_circuits_together
from worker.scanner.listening import Cancelled, Listener, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.mixed_scans import Asked, scan_together
from worker.scanner.perturbation import Perturbing, scan_perturbation, scan_perturbation_together
from worker.scanner.prompts import ScanOutput
from worker.scanner.shared_forward import AskedOf, Company, RowsOf, settled

N_TOKENS = 9
MEASURED = frozenset({"share", "total"})
"""Of edges, in what their table says of itself."""


def prompts(model: LoadedModel, count: int) -> list[Tokens]:
    return [prompt(model, N_TOKENS, seed=seed) for seed in range(count)]


def agree(found: ScanOutput, alone: ScanOutput) -> None:
    assert found.tables.keys() == alone.tables.keys()
    for name, table in alone.tables.items():
        assert table.schema.equals(found.tables[name].schema)
        (said, measured), (of_mate, mates) = _said(table), _said(found.tables[name])
        assert said == of_mate
        assert measured == pytest.approx(mates, rel=1e-4)
        for column, mate in zip(table.columns, found.tables[name].columns, strict=True):
            if pa.types.is_floating(column.type) or pa.types.is_fixed_size_list(column.type):
                expected, close = np.array(column.to_pylist()), np.array(mate.to_pylist())
                np.testing.assert_allclose(close, expected, rtol=1e-4, atol=5e-5, err_msg=name)
            else:
                assert column.equals(mate), name


def _said(table: pa.Table) -> tuple[Provenance, dict[str, float]]:
    """What a table says of itself, and numbers in it that were measured."""
    said = provenance_of(table)
    measured = {name: said.parameters[name] for name in MEASURED & said.parameters.keys()}
    others = {name: said.parameters[name] for name in said.parameters.keys() - MEASURED}
    return msgspec.structs.replace(said, parameters=others), measured


FMRI = ActivationScan(prompt="x")
FLAIR = AnomalyScan(prompt="x", lens=Lens.RAW)


def test_what_different_questions_read_of_one_forward_is_what_each_reads_alone(
    tiny_model: LoadedModel,
) -> None:
    """Rows that lie side by side, rows that do not, and rows that two questions have in common."""
    a, b, c, d = prompts(tiny_model, 4)
    grid = AnomalyScan(prompt="x", lens=Lens.RAW, sublayers=Sublayers.ALL, target_token_idx=2)
    few = ActivationScan(prompt="x", top_neurons=1, include_residual=False)
    questions: list[tuple[ActivationScan | AnomalyScan, Tokens]] = [
        *((FMRI, tokens) for tokens in (d, a, b)),
        *((grid, tokens) for tokens in (c, b)),
        *((few, tokens) for tokens in (c, d)),
        (AnomalyScan(prompt="x", lens=Lens.RAW, token_positions="target"), a),
        (AnomalyScan(prompt="x", lens=Lens.RAW, target_token_idx=0), b),
    ]
    asked = [Asked(question, tokens, Silent(), answer_id=7) for question, tokens in questions]
    for outcome, (question, tokens) in zip(
        scan_together(tiny_model, asked), questions, strict=True
    ):
        if isinstance(question, ActivationScan):
            alone = scan_activations(tiny_model, question, tokens, Silent())
        else:
            alone = scan_anomalies(
                tiny_model, question, tokens, Silent(), calibration=None, answer_id=7
            )
        agree(settled(outcome), alone)


DONE: Sequence[tuple[Perturbation, ...]] = (
    (ZeroAblation(component="blocks.1.attn.head_1"),),
    (),
    (Noise(component="blocks.0.mlp", draws=2), Amplify(component="blocks.1.mlp", factor=-2.0)),
    (Noise(component="blocks.1.attn.head_0", draws=3, sigma=0.3),),
    (Patch(component="blocks.1.resid_pre", source_prompt="other", token_positions=(2, 3)),),
    (ZeroAblation(component="embed", token_positions=(4,)),),
)


def test_what_is_done_to_some_rows_is_heard_of_by_no_other(tiny_model: LoadedModel) -> None:
    """Rows that join at different blocks, with and without noise, sources and a picture."""
    own = prompts(tiny_model, len(DONE) - 1)
    own.append(own[0])  # two questions about one prompt
    sources = {"other": prompt(tiny_model, N_TOKENS, seed=99)}
    perturbing = [
        Perturbing(
            PerturbationScan(prompt="x", perturbations=done, perturbed_scan=index != 3),
            AskedOf(tokens, Silent(), answer_id=index),
            sources=sources,
        )
        for index, (done, tokens) in enumerate(zip(DONE, own, strict=True))
    ]
    together = scan_perturbation_together(tiny_model, perturbing)
    for found, one in zip(together, perturbing, strict=True):
        alone = scan_perturbation(
            tiny_model,
            one.request,
            one.asked.tokens,
            Silent(),
            sources=sources,
            answer_id=one.asked.answer_id,
        )
        agree(found, alone)


def circuits(model: LoadedModel, listeners: Sequence[Listener] = ()) -> list[AskedCircuit]:
    """By every way of asking that takes one gradient; some with a corrupt prompt."""
    own, other = prompts(model, 4), prompt(model, N_TOKENS, seed=99)
    fast = CircuitScan(prompt="x", ablation=Ablation.ZERO, exact=3, edges=6)
    beside = CircuitScan(prompt="x", corrupt_prompt="y", include_first_token=True, exact=4)
    estimate = CircuitMethod.ATTRIBUTION_PATCHING
    blocks = CircuitScan(
        prompt="x", corrupt_prompt="y", method=estimate, granularity=Granularity.BLOCKS
    )
    heard = [*listeners, *[Silent()] * (4 - len(listeners))]
    return [
        AskedCircuit(beside, AskedOf(own[0], heard[0], answer_id=7, foil_id=9), other),
        AskedCircuit(fast, AskedOf(own[1], heard[1])),
        AskedCircuit(blocks, AskedOf(own[2], heard[2], answer_id=3), own[3]),
        AskedCircuit(fast, AskedOf(own[1], heard[3], answer_id=11, foil_id=2)),
    ]


def circuit_alone(model: LoadedModel, one: AskedCircuit) -> ScanOutput:
    asked = one.asked
    return scan_circuits(
        model,
        one.request,
        asked.tokens,
        one.corrupt,
        asked.answer_id,
        asked.foil_id,
        Silent(),
        None,
    )


def test_gradients_that_are_taken_together_are_what_each_takes_alone(
    tiny_model: LoadedModel,
) -> None:
    """With and without corrupt prompts, differences and log-odds, and twice of one prompt."""
    told: list[int] = []
    asked = circuits(tiny_model)
    found = scan_circuits_together(tiny_model, asked, told.extend)
    for outcome, one in zip(found, asked, strict=True):
        agree(settled(outcome), circuit_alone(tiny_model, one))
    assert told == [2, 1, 3], "who has least to measure has it first, and the last is not early"


class Hears(Silent):
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def effects(self, frame: EffectsFrame) -> None:
        self._log.append("measured" if frame.exact else "estimated")


def test_everybody_has_a_first_picture_before_anything_is_measured(
    tiny_models: dict[str, LoadedModel],
) -> None:
    log: list[str] = []
    asked = circuits(tiny_models["llama"], [Hears(log)] * 4)
    scan_circuits_together(tiny_models["llama"], asked)
    assert log == ["estimated"] * 4 + ["measured"] * 3


def test_another_method_is_not_taken_for_one_gradient(tiny_models: dict[str, LoadedModel]) -> None:
    [one, *_] = circuits(tiny_models["llama"])
    path = msgspec.structs.replace(one.request, method=CircuitMethod.INTEGRATED_GRADIENTS)
    with pytest.raises(ValueError, match="another method"):
        scan_circuits_together(tiny_models["llama"], [one._replace(request=path)])


def test_a_circuit_that_cannot_be_asked_or_is_stopped_costs_its_mates_nothing(
    tiny_models: dict[str, LoadedModel],
) -> None:
    model = tiny_models["llama"]
    asked = circuits(model, [Silent(), StopsAfterTheForward()])
    same = asked[3].asked._replace(answer_id=11, foil_id=11)
    short = prompt(model, N_TOKENS - 1, seed=5)
    found = scan_circuits_together(
        model,
        [
            *asked[:3],
            asked[3]._replace(asked=same),
            asked[0]._replace(corrupt=short),
            asked[3]._replace(asked=same._replace(foil_id=10**6)),
        ],
    )
    agree(settled(found[0]), circuit_alone(model, asked[0]))
    agree(settled(found[2]), circuit_alone(model, asked[2]))
    assert isinstance(found[1], Cancelled)
    for outcome, said in zip(found[3:], ("both token", "as many", "1000000"), strict=True):
        assert isinstance(outcome, Unprocessable)
        assert said in outcome.detail
    for token in (11, 12):
        same = same._replace(answer_id=token, foil_id=token)
        [none, too] = scan_circuits_together(
            model,
            [asked[3]._replace(asked=same), asked[3]._replace(asked=same._replace(foil_id=10**6))],
        )
        assert isinstance(none, Unprocessable)
        assert f"both token {token}" in none.detail
        assert isinstance(too, Unprocessable)
    with pytest.raises(Cancelled):
        scan_circuits_together(model, circuits(model, [Stops()] * 4))


def test_no_hook_is_left_behind(tiny_models: dict[str, LoadedModel]) -> None:
    model = tiny_models["llama"]

    def hooks() -> list[tuple[int, int]]:
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.plain.modules()]

    before = hooks()
    a, b = prompts(model, 2)
    with pytest.raises(Cancelled):
        scan_together(model, [Asked(FMRI, a, Stops()), Asked(FLAIR, b, Stops())])
    perturbing = [
        Perturbing(PerturbationScan(prompt="x", perturbations=done), AskedOf(a, Stops()), {})
        for done in DONE[:3]
    ]
    with pytest.raises(Cancelled):
        scan_perturbation_together(model, perturbing)
    assert hooks() == before


class Stops(Silent):
    def checkpoint(self) -> None:
        raise Cancelled


class StopsAfterTheForward(Silent):
    def __init__(self) -> None:
        self._n_told = 0

    def progress(self, stage: str, done: int, total: int) -> None:
        self._n_told = total - done

    def checkpoint(self) -> None:
        if self._n_told == 0:
            raise Cancelled


class StopsAtTheLens(Silent):
    def __init__(self) -> None:
        self._stage = ""

    def progress(self, stage: str, done: int, total: int) -> None:
        self._stage = stage

    def checkpoint(self) -> None:
        if self._stage == "lens":
            raise Cancelled


def test_one_that_stops_or_is_refused_after_the_forward_is_alone_in_it(
    tiny_models: dict[str, LoadedModel],
) -> None:
    model = tiny_models["llama"]
    a, b = prompts(model, 2)
    fmri, stopped, flair = scan_together(
        model,
        [Asked(FMRI, a, Stops()), Asked(FLAIR, a, StopsAtTheLens()), Asked(FLAIR, b, Silent())],
    )
    assert isinstance(stopped, Cancelled)
    agree(settled(fmri), scan_activations(model, FMRI, a, Silent()))
    agree(settled(flair), scan_anomalies(model, FLAIR, b, Silent(), calibration=None))
    with pytest.raises(Cancelled):
        settled(stopped)


def test_a_question_that_none_can_answer_is_refused(tiny_models: dict[str, LoadedModel]) -> None:
    model = tiny_models["llama"]
    a, b = prompts(model, 2)
    with pytest.raises(Conflict, match="needs a calibration"):
        scan_together(
            model, [Asked(FMRI, a, Silent()), Asked(AnomalyScan(prompt="x"), b, Silent())]
        )


@pytest.mark.parametrize(
    "canonical", [FMRI, FLAIR, PerturbationScan(prompt="x"), CircuitScan(prompt="x")]
)
def test_who_is_canonical_is_in_nobodys_company(
    tiny_models: dict[str, LoadedModel],
    canonical: ActivationScan | AnomalyScan | PerturbationScan | CircuitScan,
) -> None:
    model = tiny_models["llama"]
    a, b = prompts(model, 2)
    own = msgspec.structs.replace(canonical, canonical=True)

    def run() -> None:
        if isinstance(own, PerturbationScan):
            scan_perturbation_together(
                model, [Perturbing(own, AskedOf(tokens, Silent()), {}) for tokens in (a, b)]
            )
        elif isinstance(own, CircuitScan):
            scan_circuits_together(
                model, [AskedCircuit(own, AskedOf(tokens, Silent())) for tokens in (a, b)]
            )
        else:
            scan_together(model, [Asked(own, tokens, Silent()) for tokens in (a, b)])

    with pytest.raises(ValueError, match="forward"):
        run()


def test_a_company_goes_on_while_anybody_waits() -> None:
    Company([Stops(), Silent(), Stops()]).pause()
    Company([Stops(), Silent()]).checkpoint()
    with pytest.raises(Cancelled):
        Company([Stops(), Stops()]).pause()


def test_of_a_company_one_that_waits_lets_others_in() -> None:
    class Counted(Silent):
        paused = 0

        def pause(self) -> None:
            self.paused += 1

    first, last = Counted(), Counted()
    Company([Stops(), first, last]).pause()
    assert (first.paused, last.paused) == (1, 0)


class StopsAmongLogits(Silent):
    """Once the blocks are behind it and some of the logits are computed."""

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self.asked = 0

    def progress(self, stage: str, done: int, total: int) -> None:
        self._n_layers -= stage == "forward"

    def checkpoint(self) -> None:
        self.asked += self._n_layers == 0
        if self.asked > 2:
            raise Cancelled


@pytest.mark.smollm2
def test_a_long_prompts_logits_can_be_stopped_and_are_the_same_to_the_last_bit(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, tokens = ActivationScan(prompt="x"), prompt(smollm2, 200)
    in_portions = scan_activations(smollm2, request, tokens, Silent())
    stopped = StopsAmongLogits(smollm2.architecture.n_layers)
    with pytest.raises(Cancelled):
        scan_activations(smollm2, request, tokens, stopped)
    assert stopped.asked == 3
    monkeypatch.setattr(shared_forward, "_ROWS_AT_ONCE", 200)
    whole = scan_activations(smollm2, request, tokens, Silent())
    assert in_portions.tables == whole.tables


@pytest.mark.smollm2
def test_the_logits_of_several_are_the_same_to_the_last_bit_in_portions_of_any_size(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ActivationScan(prompt="x")
    texts = prompts(smollm2, 12)

    def tables() -> list[dict[str, pa.Table]]:
        listeners = [Silent()] * len(texts)
        found = scan_activations_together(smollm2, request, texts, listeners)
        return [output.tables for output in found]

    whole = tables()
    monkeypatch.setattr(shared_forward, "_ROWS_AT_ONCE_OF_SEVERAL", 50)
    assert tables() == whole


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_rows_are_taken_in_their_order(rows: list[int]) -> None:
    batch = torch.arange(6).unsqueeze(-1).expand(6, 3).float()
    assert torch.equal(RowsOf(rows, 6)(batch), batch[rows])
    assert RowsOf(range(6), 6)(batch) is batch
