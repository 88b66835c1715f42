"""Results in short, from tables that the scanner made: the same numbers, under the names people read."""

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest

from neural_mri.contract.anomalies import AnomalyScan, CalibrationScan, Lens, Sublayers
from neural_mri.contract.circuits import CircuitMethod, CircuitScan
from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture, Numerics
from neural_mri.contract.perturbations import (
    Direction,
    Noise,
    PatchingScan,
    PatchSite,
    Perturbation,
    PerturbationScan,
    TracingScan,
    ZeroAblation,
)
from neural_mri.contract.results import Manifest, TableRef, from_ipc, signed, to_ipc
from neural_mri.contract.scans import (
    ActivationScan,
    AttentionScan,
    PromptScan,
    Scan,
    StructuralScan,
    WeightScan,
    kind_of,
)
from neural_mri.contract.summaries import main_table, maps, summarise, tables_needed
from neural_mri.contract.tokens import Span, Tokens
from tests import models
from tests.tiny import save_tiny_model
from worker.scanner import loading
from worker.scanner.activations import scan_activations
from worker.scanner.anomalies import scan_anomalies
from worker.scanner.attention import scan_attention
from worker.scanner.calibrating import calibrate
from worker.scanner.calibration import Calibration
from worker.scanner.circuits import scan_circuits
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.patching import scan_patching
from worker.scanner.perturbation import scan_perturbation
from worker.scanner.topology import scan_topology
from worker.scanner.tracing import scan_tracing
from worker.scanner.weights import scan_weights

TOKENS = models.prompt(7)
CORRUPT = models.prompt(7, seed=1)
ANSWER, FOIL = 5, 9
JOB = "/api/jobs/1"
KEY = "c" * 64
CALIBRATION = CalibrationScan(texts=("x",), n_tokens=400, n_ordinary=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("summarised"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return loading.load(folder, loading.published_numerics(folder))


@pytest.fixture(scope="module")
def calibration(model: LoadedModel) -> Calibration:
    texts = [models.prompt(40, seed=seed) for seed in range(10)]
    return calibrate(model, CALIBRATION, Silent(), texts=texts)


def summary(
    scan: Scan, tables: Mapping[str, pa.Table], shape: Architecture, tokens: Tokens = TOKENS
) -> dict[str, Any]:
    """As JSON has it, from stored bytes, of no more tables than it says it needs."""
    texts = tokens.texts if isinstance(scan, PromptScan) else ()
    bare = Manifest(
        scan_key=KEY,
        kind=kind_of(scan),
        model="tiny",
        revision="a" * 64,
        numerics=Numerics(),
        scanner_version="1",
        request=msgspec.to_builtins(scan),
        prompt_tokens=texts,
        tables=(),
        created_at="2026-01-02T00:00:00Z",  # type: ignore[arg-type]  # never looked at
        forward_seconds=0.25,
        compute_seconds=0.5,
        memory_bytes=12_000_000,
    )
    bodies = {name: to_ipc(table) for name, table in signed(tables, bare).items()}
    refs = tuple(
        TableRef(
            name=name,
            table=name.partition(".")[0],
            chunk="d" * 64,
            bytes=len(body),
            rows=tables[name].num_rows,
            unit="",
        )
        for name, body in bodies.items()
    )
    whole = msgspec.structs.replace(bare, tables=refs)
    needed = {name: from_ipc(bodies[name]) for name in tables_needed(whole)}
    assert main_table(whole).name in needed
    document: dict[str, Any] = msgspec.json.decode(
        msgspec.json.encode(summarise(whole, needed, shape, job_url=JOB))
    )
    assert document["scan_mode"] == kind_of(scan)
    assert set(document["tables"]) == set(tables)
    for name, link in document["tables"].items():
        assert link["data_url"] == f"{JOB}/result/{name}"
        assert link["rows"] == tables[name].num_rows
    return document


def plain(value: Any) -> Any:
    """A table's value as JSON has it."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows(table: pa.Table) -> list[dict[str, Any]]:
    return [{name: plain(value) for name, value in row.items()} for row in table.to_pylist()]


def test_structure_activations_and_attention(model: LoadedModel, folder: Path) -> None:
    shape = model.architecture
    topology = scan_topology(folder)
    document = summary(StructuralScan(), topology, shape)
    assert document["total_parameters"] == sum(topology["topology"]["parameters"].to_pylist())
    activation = ActivationScan(prompt="x", top_neurons=2, token_positions=(0, -1))
    made = scan_activations(model, activation, TOKENS, Silent()).tables
    document = summary(activation, made, shape)
    for row in rows(made["activations"]):
        if row["kind"] == Kind.MLP:
            mlp = document["data"][row["component"]]
            assert mlp["activation_summary"] == row["value"]
            assert len(mlp["top_neurons"]) == 2
    assert document["metadata"]["token_positions"] == [0, 6]
    attention = AttentionScan(prompt="x", layers=(1,))
    document = summary(attention, scan_attention(model, attention, TOKENS, Silent()).tables, shape)
    assert document["data"]["blocks.1.attn"]["attention_patterns"]["shape"] == [4, 7, 7]


def test_an_mlps_strongest_neurons_are_named_once_each_where_they_are_strongest(
    model: LoadedModel,
) -> None:
    asked = ActivationScan(prompt="x", top_neurons=3)
    made = scan_activations(model, asked, TOKENS, Silent()).tables
    document = summary(asked, made, model.architecture)
    by_strength = sorted(rows(made["neurons"]), key=lambda row: -abs(row["value"]))
    for layer in range(model.architecture.n_layers):
        mlp = str(Component(Kind.MLP, layer))
        best: dict[int, dict[str, Any]] = {}
        for row in by_strength:
            if row["component"] == mlp:
                best.setdefault(row["neuron"], row)
        assert [
            (named["idx"], named["activation"], named["position"])
            for named in document["data"][mlp]["top_neurons"]
        ] == [(row["neuron"], row["value"], row["position"]) for row in best.values()][:3]


def test_weights(model: LoadedModel, folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path, seed=1)
    scan = WeightScan(baseline="other", outlier_sigma=3.0)
    made = scan_weights(folder, scan, Silent(), other).tables
    document = summary(scan, made, model.architecture)
    assert document["outlier_sigma"] == 3.0
    assert document["baseline"] == "other"
    assert document["quantization"] is None
    assert list(document["data"]) == made["weights"]["component"].to_pylist()
    for row in rows(made["weights"]):
        data = document["data"][row["component"]]
        assert data["type"] == row["kind"]
        for name in ("rms", "frobenius", "outlier_share", "rms_q", "rms_o"):
            assert data[name] == row[name]
        assert set(data["circuits"]) == ({"QK", "OV"} if row["kind"] == Kind.HEAD else set())
    assert document["data"]["blocks.0.mlp"]["rms_q"] is None
    for row in rows(made["circuits"]):
        circuit = document["data"][row["component"]]["circuits"][row["circuit"]]
        assert circuit == {name: row[name] for name in circuit}
        assert (circuit["copying"] is None) == (row["circuit"] == "QK")
        assert 1 <= circuit["stable_rank"] <= model.architecture.d_head
    for row in rows(made["difference"]):
        difference = document["data"][row["component"]]["difference"]
        assert difference == {name: row[name] for name in difference}
        assert difference["relative"] > 0
    assert document["tables"]["histograms"]["data_url"] == f"{JOB}/result/histograms"


def test_weights_without_a_baseline_differ_from_nothing(model: LoadedModel, folder: Path) -> None:
    scan = WeightScan(layers=("blocks.1.attn",))
    document = summary(scan, scan_weights(folder, scan, Silent()).tables, model.architecture)
    assert len(document["data"]) == 1 + model.architecture.n_heads
    assert {part["difference"] for part in document["data"].values()} == {None}


def circuits(
    model: LoadedModel, scan: CircuitScan, corrupt: Tokens | None, foil: int | None = FOIL
) -> tuple[dict[str, Any], Mapping[str, pa.Table]]:
    made = scan_circuits(model, scan, TOKENS, corrupt, ANSWER, foil, Silent(), None).tables
    return summary(scan, made, model.architecture), made


def test_circuits(model: LoadedModel) -> None:
    scan = CircuitScan(prompt="x", corrupt_prompt="y", exact=4, edges=110)
    document, made = circuits(model, scan, CORRUPT)
    assert document["method"] == "fast"
    assert document["ablation"] == "resample"
    assert document["granularity"] == "heads"
    assert document["first_position"] == 1
    for row in rows(made["effects"]):
        effect = document["data"][row["component"]]
        for name in ("effect", "exact", "estimate", "direct"):
            assert effect[name] == row[name]
    assert sum(effect["exact"] for effect in document["data"].values()) == 4
    assert document["data"]["blocks.2.attn.head_3"]["head"] == 3
    (metric,) = rows(made["metric"])
    assert document["metric"]["answer"] == {"token": metric["answer"], "token_id": ANSWER}
    assert document["metric"]["foil"]["token_id"] == FOIL
    assert document["metric"]["unit"] == "logits"
    assert document["metric"]["clean"] == metric["clean"]
    assert document["metric"]["corrupted"] == metric["corrupted"]
    strengths = [abs(edge["strength"]) for edge in document["edges"]]
    assert strengths == sorted(strengths, reverse=True)
    assert len(strengths) == 100
    assert made["edges"].num_rows == 110
    assert 0 < document["edges_share"] <= 1


def test_the_direct_terms_of_a_summary_add_up_to_its_metric(model: LoadedModel) -> None:
    scan = CircuitScan(prompt="x", method=CircuitMethod.DIRECT)
    document, _ = circuits(model, scan, None)
    terms = [effect["direct"] for effect in document["data"].values()]
    assert terms[-1] is None
    total = sum(terms[:-1]) + document["metric"]["direct_biases"]
    assert total == pytest.approx(document["metric"]["clean"], abs=1e-4)
    assert document["metric"]["corrupted"] is None
    assert document["ablation"] is None
    assert document["first_position"] is None
    assert document["edges"] == []
    assert document["edges_share"] is None


def anomalies(
    model: LoadedModel, calibration: Calibration | None, scan: AnomalyScan
) -> tuple[dict[str, Any], Mapping[str, pa.Table]]:
    made = scan_anomalies(
        model,
        scan,
        TOKENS,
        Silent(),
        calibration=calibration,
        answer_id=ANSWER,
        foil_id=FOIL,
    ).tables
    return summary(scan, made, model.architecture), made


@pytest.fixture(scope="module")
def judged(
    model: LoadedModel, calibration: Calibration
) -> tuple[dict[str, Any], Mapping[str, pa.Table]]:
    """A FLAIR scan that calls much of what is ordinary anomalous, and its tables."""
    scan = AnomalyScan(prompt="x", sublayers=Sublayers.ALL, false_alarm_rate=0.4)
    return anomalies(model, calibration, scan)


Judged = tuple[dict[str, Any], Mapping[str, pa.Table]]


def test_what_anomalies_are_judged_by(judged: Judged) -> None:
    document, made = judged
    assert document["lens"] == "bias"
    assert document["calibration"] == "texts"
    assert document["false_alarm_rate"] == 0.4
    assert document["target_position"] == document["predictions"][0]["position"] == 6
    bounds = document["bounds"]
    tokens = document["data"]
    assert [token["position"] for token in tokens] == list(range(7))
    for row in rows(made["uncertainty"])[1:]:
        found = tokens[row["position"]]
        assert found["token"] == TOKENS.texts[row["position"]]
        assert found["next"] == {"token": row["text"], "token_id": row["token_id"]}
        assert found["uncertainty"] == {name: row[name] for name in found["uncertainty"]}
        assert found["uncertainty"]["anomalous"] == (row["entropy"] > bounds["entropy"])
        assert found["seed_score"] == row["seed_score"]
    for row in rows(made["support"]):
        own = row["role"] == "own"
        found = tokens[row["position"]]["support"] if own else document[row["role"]]
        assert found["token"] == row["text"]
        assert found == {
            "token": row["text"],
            **{name: row[name] for name in found if name != "token"},
        }
        assert found["anomalous"] == (row["support"] < bounds["support"])


def test_where_a_prediction_appears(judged: Judged) -> None:
    document, made = judged
    z = {row["component"]: row["value"] for row in rows(made["lens"]) if row["quantity"] == "kl_z"}
    for row in rows(made["depth"])[1:]:
        appearance = document["data"][row["position"]]["appearance"]
        assert appearance["layer"] == row["layer"]
        assert appearance["depth"] == row["depth"]
        assert appearance["anomalous"] == [
            component
            for component, values in z.items()
            if abs(values[row["position"]] or 0) > document["bounds"]["lens_z"]
        ]


def test_anomalous_nodes(judged: Judged) -> None:
    document, made = judged
    nodes = {(row["component"], row["quantity"]): row["value"] for row in rows(made["nodes"])}
    expected = [
        {
            "component": component,
            "position": position,
            "kl_change": nodes[component, "kl_change"][position - 1],
            "z": z,
        }
        for (component, quantity), values in nodes.items()
        if quantity == "z"
        for position, z in enumerate(values, start=1)
        if abs(z or 0) > document["bounds"]["node_z"]
    ]
    assert expected, "at 40 % false alarms something is out of the ordinary"
    assert document["nodes"] == sorted(expected, key=lambda node: -abs(node["z"]))


def test_the_first_token_is_not_measured(model: LoadedModel, calibration: Calibration) -> None:
    scan = AnomalyScan(prompt="x", target_token_idx=0, token_positions="target")
    document, _ = anomalies(model, calibration, scan)
    (token,) = document["data"]
    assert token["next"] is None
    assert token["support"] is None
    assert token["uncertainty"]["entropy"] is None
    assert token["appearance"] == {"layer": None, "depth": None, "anomalous": []}
    assert document["answer"] is None
    assert document["nodes"] == []
    assert document["target_position"] == 0


def test_without_a_calibration_nothing_is_judged(model: LoadedModel) -> None:
    document, _ = anomalies(model, None, AnomalyScan(prompt="x", lens=Lens.RAW))
    assert document["calibration"] == "none"
    assert set(document["bounds"].values()) == {None}
    assert document["answer"]["gain"] is not None
    assert document["answer"]["support"] is None
    assert not any(token["uncertainty"]["anomalous"] for token in document["data"])


def perturbed(
    model: LoadedModel, *perturbations: Perturbation, **changes: Any
) -> tuple[dict[str, Any], Mapping[str, pa.Table]]:
    scan = PerturbationScan(prompt="x", perturbations=perturbations, **changes)
    made = scan_perturbation(model, scan, TOKENS, Silent(), sources={}, answer_id=ANSWER).tables
    return summary(scan, made, model.architecture), made


def test_a_perturbation_has_the_fields_of_the_specification(model: LoadedModel) -> None:
    head = Component.head(1, 2)
    document, made = perturbed(model, ZeroAblation(component=str(head)), top_predictions=3)
    first = [row for row in rows(made["predictions"]) if row["position"] == 6]
    after = [row for row in rows(made["predictions_after"]) if row["position"] == 6]
    original, changed = document["original_prediction"], document["perturbed_prediction"]
    assert original == {
        "token": first[0]["text"],
        "token_id": first[0]["token_id"],
        "logit": first[0]["logit"],
        "prob": first[0]["probability"],
    }
    assert changed["logit"] == after[0]["logit"]
    assert document["logit_diff"] == changed["logit"] - original["logit"]
    assert [p["token_id"] for p in document["predictions"]] == [row["token_id"] for row in first]
    assert len(document["predictions_after"]) == 3
    (compared,) = rows(made["comparison"])
    assert document["metric"]["before"] == compared["metric_before"]
    assert document["metric"]["after"] == compared["metric_after"]
    assert document["metric"]["after_sd"] is None
    assert document["metric"]["foil_id"] is None
    assert document["metric"]["answer"]["token_id"] == ANSWER
    assert document["shift"]["kl"] == [row["kl"] for row in rows(made["shift"])]
    assert document["draws"] == 1


def test_an_impact_is_how_much_otherwise_a_component_writes(model: LoadedModel) -> None:
    head = Component.head(1, 2)
    document, made = perturbed(model, ZeroAblation(component=str(head)))
    impacts = {found["id"]: found["impact_score"] for found in document["affected_components"]}
    assert impacts[str(head)] == pytest.approx(1.0)
    for component in map(Component.parse, impacts):
        assert (
            component == head or (component.layer or 0) > 1 or component == Component(Kind.MLP, 1)
        )
        assert component.kind in {Kind.HEAD, Kind.MLP}
    assert set(impacts) > {"blocks.1.mlp", "blocks.2.mlp", "blocks.2.attn.head_0"}
    assert list(impacts.values()) == sorted(impacts.values(), reverse=True)
    sinks = made["tokens"]["sink"].to_pylist()
    values = {
        name: dict(
            zip(made[name]["component"].to_pylist(), made[name]["value"].to_pylist(), strict=True)
        )
        for name in ("activations", "change")
    }
    squares = [
        sum(
            value**2
            for value, sink in zip(values[name]["blocks.2.mlp"], sinks, strict=True)
            if not sink
        )
        for name in ("change", "activations")
    ]
    assert impacts["blocks.2.mlp"] == pytest.approx(math.sqrt(squares[0] / squares[1]))
    assert "|perturbed - clean| / |clean|" in document["impact_formula"]


def test_doing_nothing_affects_nothing(model: LoadedModel) -> None:
    document, _ = perturbed(model)
    assert document["affected_components"] == []
    assert document["logit_diff"] == pytest.approx(0, abs=1e-5)
    original, perturbed_one = document["original_prediction"], document["perturbed_prediction"]
    assert original["token_id"] == perturbed_one["token_id"]
    assert document["shift"]["kl"] == pytest.approx([0.0] * 7, abs=1e-6)


def test_several_draws_have_a_spread_and_no_logit(model: LoadedModel) -> None:
    noise = Noise(component="blocks.0.mlp", draws=3)
    document, made = perturbed(model, noise, perturbed_scan=False)
    assert document["draws"] == 3
    assert document["perturbed_prediction"]["logit"] is None
    assert document["original_prediction"]["logit"] is not None
    assert document["logit_diff"] is None
    (compared,) = rows(made["comparison"])
    assert document["metric"]["after_sd"] == compared["metric_sd"] > 0
    assert document["affected_components"] == []
    assert "change" not in document["tables"]


def patched(model: LoadedModel, **changes: Any) -> tuple[dict[str, Any], Mapping[str, pa.Table]]:
    scan = PatchingScan(prompt="x", corrupt_prompt="y", **changes)
    made = scan_patching(
        model, scan, TOKENS, CORRUPT, Silent(), answer_id=ANSWER, foil_id=FOIL
    ).tables
    return summary(scan, made, model.architecture), made


def check_contrast(document: dict[str, Any], made: Mapping[str, pa.Table]) -> None:
    (contrast,) = rows(made["contrast"])
    assert document["contrast"]["position"] == 6
    assert document["contrast"]["answer"]["token_id"] == ANSWER
    for name in ("clean", "corrupted", "corrupted_sd"):
        assert document["contrast"][name] == contrast[name]
    assert document["contrast"]["prob_clean"] == contrast["probability_clean"]


@pytest.mark.parametrize(
    ("direction", "peak"), [(Direction.DENOISING, max), (Direction.NOISING, min)]
)
def test_a_patching_map_peaks_where_the_other_run_shows_most(
    model: LoadedModel, direction: Direction, peak: Any
) -> None:
    document, made = patched(model, direction=direction, sites=(PatchSite.RESIDUAL, PatchSite.HEAD))
    assert document["direction"] == direction
    assert set(document["maps"]) == {"resid_pre", "head"}
    check_contrast(document, made)
    for kind, found in document["maps"].items():
        cells = {
            row["component"]: row["value"] for row in rows(made["recovery"]) if row["kind"] == kind
        }
        assert found["values"] == cells
        best = found["peak"]
        assert best["value"] == peak(value for values in cells.values() for value in values)
        assert cells[best["component"]][best["position"]] == best["value"]
        assert best["token"] == TOKENS.texts[best["position"]]
        assert best["sd"] is None


def test_large_maps_are_left_to_their_table(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "CELLS_INLINE", 20)
    document, _ = patched(model, sites=(PatchSite.MLP,))
    assert document["maps"]["mlp"]["values"] is None
    assert document["maps"]["mlp"]["peak"] is not None
    assert document["tables"]["recovery"]["data_url"] == f"{JOB}/result/recovery"


def test_tracing(model: LoadedModel) -> None:
    text = "".join(TOKENS.texts)
    ends = list(accumulate(map(len, TOKENS.texts)))
    spans = [Span(start, end) for start, end in pairwise((0, *ends))]
    tokens = msgspec.structs.replace(TOKENS, spans=tuple(spans))
    scan = TracingScan(prompt=text, subject=TOKENS.texts[2] + TOKENS.texts[3], draws=2)
    made = scan_tracing(model, scan, tokens, Silent(), answer_id=ANSWER).tables
    document = summary(scan, made, model.architecture, tokens)
    assert document["subject_positions"] == [2, 3]
    assert document["draws"] == 2
    assert document["noise_sd"] > 0
    check_contrast(document, made)
    trace = {(row["component"], row["quantity"]): row["value"] for row in rows(made["trace"])}
    assert set(document["maps"]) == {"resid_post", "mlp", "attn"}
    for kind, found in document["maps"].items():
        assert len(found["values"]) == model.architecture.n_layers
        for component, values in found["values"].items():
            assert Component.parse(component).kind == kind
            assert values == trace[component, "indirect_effect"]
        best = found["peak"]
        assert best["value"] == max(v for values in found["values"].values() for v in values)
        assert best["sd"] == trace[best["component"], "sd"][best["position"]]


def test_a_calibration(model: LoadedModel, calibration: Calibration) -> None:
    document = summary(CALIBRATION, calibration.to_tables(), model.architecture)
    assert document["key"] == document["metadata"]["scan_key"] == KEY
    assert document["source"] == "texts"
    assert document["n_tokens"] == calibration.n_tokens
    assert document["n_positions"] == calibration.means.n_positions
    assert document["lenses"] == ["bias"]
