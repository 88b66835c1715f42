"""DTI as it is asked for, on a tiny model of every family: its tables against runs and hooks by hand."""

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM

from neural_mri.contract.circuits import CircuitScan
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.events import EffectsFrame
from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import Conflict, Unprocessable
from neural_mri.contract.results import provenance_of
from neural_mri.contract.tokens import Tokens
from tests import models
from tests.worker.scanner.by_hand import ByHand
from worker.scanner import loading
from worker.scanner.circuits import scan_circuits
from worker.scanner.listening import Cancelled, Listener, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.metrics import Metric
from worker.scanner.references import reference_means

TOKENS = models.prompt(8)
CORRUPT = models.prompt(8, seed=3)
ANSWER, FOIL = 5, 9
METRIC = Metric(ANSWER, FOIL)


def request(**changes: Any) -> CircuitScan:
    return msgspec.convert({"scan_mode": "DTI", "prompt": "x", **changes}, CircuitScan)


def scan(
    model: LoadedModel,
    *,
    tokens: Tokens = TOKENS,
    corrupt: Tokens | None = CORRUPT,
    answer: int | None = ANSWER,
    foil: int | None = FOIL,
    listener: Listener | None = None,
    means: Any = None,
    **changes: Any,
) -> dict[str, Any]:
    if corrupt is not None:
        changes["corrupt_prompt"] = "y"
    asked = request(**changes)
    heard = listener or Silent()
    return scan_circuits(model, asked, tokens, corrupt, answer, foil, heard, means).tables


def column(table: Any, name: str) -> np.ndarray:
    found: np.ndarray = table[name].to_numpy()
    return found


def addresses(table: Any) -> list[str]:
    found: list[str] = table["component"].to_pylist()
    return found


class _Hears(Silent):
    def __init__(self) -> None:
        self.told: list[EffectsFrame] = []
        self.order: list[str] = []

    def effects(self, frame: EffectsFrame) -> None:
        self.told.append(frame)
        self.order.append("measured" if frame.exact else "estimated")

    def progress(self, stage: str, done: int, total: int) -> None:
        assert 0 < done <= total
        if stage not in self.order[-1:]:
            self.order.append(stage)


@pytest.mark.parametrize("position", [-1, -3, 4])
def test_effects_are_the_metric_with_the_component_replaced_minus_clean(
    tiny_model: LoadedModel, family: str, position: int
) -> None:
    tables = scan(tiny_model, method="ablation", edges=0, target_token_idx=position)
    length = range(8)[position] + 1
    hand = ByHand(tiny_model, family)
    components = hand.components()
    clean, corrupt = (torch.tensor([tokens.ids[:length]]) for tokens in (TOKENS, CORRUPT))
    theirs = hand.values(corrupt, components)
    before = METRIC(hand.logits(clean))
    expected = [
        METRIC(hand.logits_without(clean, component, theirs[component][1:], start=1)) - before
        for component in components
    ]
    effects = tables["effects"]
    assert addresses(effects) == [*map(str, components), "unembed"]
    np.testing.assert_allclose(column(effects, "effect")[:-1], expected, rtol=0, atol=1e-4)
    assert column(effects, "exact").tolist() == [True] * len(components) + [False]
    assert np.isnan(column(effects, "effect")[-1])
    assert min(expected) < 0 < max(expected)
    (metric,) = tables["metric"].to_pylist()
    assert metric["position"] == length - 1
    assert (metric["answer_id"], metric["foil_id"]) == (ANSWER, FOIL)
    assert metric["clean"] == pytest.approx(before.item(), abs=1e-4)
    assert metric["corrupted"] == pytest.approx(METRIC(hand.logits(corrupt)).item(), abs=1e-4)
    probability = hand.logits(clean).softmax(-1)[ANSWER].item()
    assert metric["probability_clean"] == pytest.approx(probability, rel=1e-4)
    assert effects.num_rows == len(components) + 1
    assert provenance_of(effects).unit == "logits"


def test_without_a_foil_effects_are_in_nats_of_the_likeliest_token(
    tiny_model: LoadedModel, family: str
) -> None:
    tables = scan(
        tiny_model,
        method="ablation",
        ablation="zero",
        granularity="blocks",
        corrupt=None,
        answer=None,
        foil=None,
        include_first_token=True,
    )
    hand, ids = ByHand(tiny_model, family), torch.tensor([TOKENS.ids])
    logits = hand.logits(ids)
    metric = Metric(int(logits.argmax()))
    components = hand.components(by_head=False)
    expected = [
        metric(hand.logits_without(ids, component, 0.0, start=0)) - metric(logits)
        for component in components
    ]
    found = column(tables["effects"], "effect")[:-1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    (asked,) = tables["metric"].to_pylist()
    assert (asked["answer_id"], asked["foil_id"], asked["foil"]) == (metric.answer_id, -1, "")
    assert math.isnan(asked["corrupted"])
    assert provenance_of(tables["effects"]).unit == "nats"
    # Log-odds lie above what a log-probability can gain: no estimate may promise more.
    assert (column(tables["effects"], "estimate")[:-1] <= -asked["clean"] + 1e-4).all()


def test_fast_measures_exactly_the_strongest_and_gives_the_exact_numbers(
    tiny_model: LoadedModel,
) -> None:
    exact = column(scan(tiny_model, method="ablation", edges=0)["effects"], "effect")
    listener = _Hears()
    effects = scan(tiny_model, method="fast", exact=5, listener=listener)["effects"]
    estimate, measured = column(effects, "estimate"), column(effects, "exact")
    inner = slice(1, -1)
    strongest = set((np.abs(estimate[inner]).argsort()[-5:] + 1).tolist())
    first_mlp = addresses(effects).index("blocks.0.mlp")
    assert set(np.flatnonzero(measured).tolist()) == strongest | {first_mlp}
    found = column(effects, "effect")
    np.testing.assert_allclose(found[measured], exact[measured], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found[~measured], estimate[~measured])
    assert listener.order == ["forward", "estimated", "sweep", "measured", "edges"]
    first, then = listener.told
    rows = dict(zip(addresses(effects), zip(estimate, found, strict=True), strict=True))
    assert first.components == tuple(addresses(effects)[:-1])
    assert [np.float32(value) for value in first.effects] == [rows[c][0] for c in first.components]
    assert len(then.components) == int(measured.sum())
    assert [np.float32(value) for value in then.effects] == [rows[c][1] for c in then.components]


def test_far_replacements_are_measured_for_every_mlp_as_well(tiny_model: LoadedModel) -> None:
    effects = scan(tiny_model, method="fast", ablation="zero", exact=1)["effects"]
    measured = column(effects, "exact")
    kinds = np.array(effects["kind"].to_pylist())
    assert measured[kinds == "mlp"].all()
    assert measured[kinds == "head"].sum() <= 1


def test_the_first_token_is_left_alone_unless_asked(tiny_model: LoadedModel, family: str) -> None:
    options: dict[str, Any] = {"method": "ablation", "ablation": "zero", "granularity": "blocks"}
    without, included = (
        column(scan(tiny_model, include_first_token=first, edges=0, **options)["effects"], "effect")
        for first in (False, True)
    )
    hand, ids = ByHand(tiny_model, family), torch.tensor([TOKENS.ids])
    before, mlp = METRIC(hand.logits(ids)), Component(Kind.MLP, 0)
    for found, start in ((without, 1), (included, 0)):
        expected = METRIC(hand.logits_without(ids, mlp, 0.0, start=start)) - before
        assert found[2] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("method", ["ablation", "fast", "integrated_gradients"])
def test_resampling_from_the_prompt_itself_changes_nothing(
    tiny_model: LoadedModel, method: str
) -> None:
    tables = scan(tiny_model, corrupt=TOKENS, method=method)
    assert np.abs(column(tables["effects"], "effect")[:-1]).max() < 1e-4
    assert np.abs(column(tables["edges"], "strength")).max() < 1e-3


def test_mean_ablation_needs_means_and_uses_them(tiny_model: LoadedModel, family: str) -> None:
    with pytest.raises(Conflict, match="mean ablation needs the model's calibration"):
        scan(tiny_model, corrupt=None)
    with torch.no_grad():
        means = reference_means(tiny_model, [torch.tensor([models.prompt(9, seed=8).ids])])
    tables = scan(tiny_model, corrupt=None, means=means, method="ablation", edges=0)
    hand, ids = ByHand(tiny_model, family), torch.tensor([TOKENS.ids])
    head = Component.head(1, 1)
    expected = METRIC(hand.logits_without(ids, head, means.of(head), start=1)) - METRIC(
        hand.logits(ids)
    )
    row = addresses(tables["effects"]).index(str(head))
    assert column(tables["effects"], "effect")[row] == pytest.approx(expected.item(), abs=1e-4)
    assert provenance_of(tables["effects"]).parameters["ablation"] == "mean"


def test_direct_terms_and_biases_sum_to_the_metric(tiny_model: LoadedModel) -> None:
    for granularity in ("heads", "blocks"):
        tables = scan(tiny_model, method="direct", granularity=granularity)
        direct = column(tables["effects"], "direct")[:-1]
        (metric,) = tables["metric"].to_pylist()
        cap = tiny_model.architecture.final_softcap
        if granularity == "heads" and cap is None:
            total = direct.sum() + metric["direct_biases"]
            assert total == pytest.approx(metric["clean"], abs=1e-3)
        assert np.isnan(column(tables["effects"], "effect")).all()
        assert "edges" not in tables


def test_edges_name_rows_of_the_effects(tiny_model: LoadedModel) -> None:
    tables = scan(tiny_model, method="attribution_patching", edges=7)
    names = addresses(tables["effects"])
    edges = tables["edges"].to_pylist()
    assert len(edges) == 7
    for edge in edges:
        assert names[edge["source_index"]] == edge["source"]
        assert names[edge["target_index"]] == edge["target"]
        assert edge["source_index"] < edge["target_index"]
    parameters = provenance_of(tables["edges"]).parameters
    assert 0 < parameters["share"] <= 1
    assert parameters["total"] >= 7


def test_prompts_that_do_not_correspond_are_refused(
    tiny_models: dict[str, LoadedModel],
) -> None:
    model = tiny_models["llama"]
    with pytest.raises(Unprocessable, match="the corrupt prompt has 6 tokens and the prompt 8"):
        scan(model, corrupt=models.prompt(6))
    with pytest.raises(Unprocessable, match="next token after position 0"):
        scan(model, target_token_idx=0)
    with pytest.raises(Unprocessable, match="answer and foil are both token 9"):
        scan(model, answer=9)
    with pytest.raises(Unprocessable, match="foil is token 61: expected 0 to 60"):
        scan(model, foil=models.D_VOCAB)
    with pytest.raises(Unprocessable, match="'resample' needs a corrupt_prompt"):
        scan(model, corrupt=None, ablation="resample")
    with pytest.raises(Unprocessable, match="'integrated_gradients' needs a corrupt_prompt"):
        scan(model, corrupt=None, method="integrated_gradients")


def test_only_the_last_position_of_one_token_can_be_asked_with_the_first_token_included(
    tiny_models: dict[str, LoadedModel],
) -> None:
    tables = scan(
        tiny_models["llama"],
        tokens=models.prompt(1),
        corrupt=models.prompt(1, seed=5),
        include_first_token=True,
        method="ablation",
    )
    effect = column(tables["effects"], "effect")
    (metric,) = tables["metric"].to_pylist()
    # The embedding is all that there is: replaced, the run is the corrupt one.
    assert effect[0] == pytest.approx(metric["corrupted"] - metric["clean"], abs=1e-4)


def hooks(model: LoadedModel) -> list[int]:
    return [
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.plain.modules()
    ]


@pytest.mark.parametrize("method", ["fast", "integrated_gradients"])
def test_a_scan_that_is_stopped_leaves_the_model_as_it_was(
    tiny_model: LoadedModel, method: str
) -> None:
    class Stops(Silent):
        def __init__(self, at: int) -> None:
            self.left = at

        def checkpoint(self) -> None:
            self.left -= 1
            if self.left == 0:
                raise Cancelled

    ids = torch.tensor([TOKENS.ids])

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = tiny_model.plain(input_ids=ids, use_cache=False).logits
        return found

    before, expected = hooks(tiny_model), logits()
    counted = Stops(0)
    scan(tiny_model, method=method, listener=counted)
    assert counted.left < -2 * tiny_model.architecture.n_layers
    in_the_backward_pass = tiny_model.architecture.n_layers + 2
    for at in (1, 3, in_the_backward_pass, -counted.left):
        with pytest.raises(Cancelled):
            scan(tiny_model, method=method, listener=Stops(at))
        assert hooks(tiny_model) == before
        assert torch.equal(logits(), expected)


_NEAR = {"float16": 0.02, "bfloat16": 0.15}
"""Largest error of an effect in half precision, as a share of the largest effect."""


@pytest.mark.parametrize("dtype", list(_NEAR))
def test_in_half_precision_effects_are_finite_and_near(
    tiny_model: LoadedModel, family: str, dtype: str, tmp_path: Path
) -> None:
    folder = models.save(family, tmp_path)
    half = loading.load(folder, loading.published_numerics(folder, dtype=dtype))
    for method in ("ablation", "fast"):
        found, expected = (scan(model, method=method)["effects"] for model in (half, tiny_model))
        for name in ("effect", "estimate", "direct"):
            values, wanted = column(found, name)[:-1], column(expected, name)[:-1]
            assert np.isfinite(values).all(), name
            worst = np.abs(values - wanted).max() / np.abs(wanted).max()
            if name == "effect" and method == "ablation":
                assert worst < _NEAR[dtype]
        assert "one pass" in provenance_of(found).parameters["sweep"]
    half.release()


def test_a_prompt_is_not_cut_where_positions_depend_on_its_length(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "partial_rotary_factor": 1.0}
    config = models.configuration("phi3")
    assert isinstance(config, Phi3Config)
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 16,
        **factors,
    }
    config.original_max_position_embeddings = 16
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    model = loading.load(tmp_path, Numerics())

    def asked(position: int, n_tokens: int) -> float:
        tokens, corrupt = models.prompt(n_tokens), models.prompt(n_tokens, seed=5)
        wanted: dict[str, Any] = {"target_token_idx": position, "exact": 0, "edges": 0}
        found = scan(model, tokens=tokens, corrupt=corrupt, answer=7, foil=None, **wanted)
        clean: float = found["metric"].to_pylist()[0]["clean"]
        return clean

    def whole(position: int, n_tokens: int) -> float:
        with torch.inference_mode():
            logits = model.plain(torch.tensor([models.prompt(n_tokens).ids])).logits[0, position]
        return float(logits.log_softmax(-1)[7])

    for position, n_tokens in ((11, 16), (19, 24), (11, 12), (23, 24)):
        assert asked(position, n_tokens) == pytest.approx(whole(position, n_tokens), abs=1e-5)
    with pytest.raises(Unprocessable, match=r"position 11 of 24 is asked for, and beyond 16"):
        asked(11, 24)
