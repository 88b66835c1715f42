"""Results in short."""

import math
from datetime import UTC, datetime
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.models import Architecture, NormPlacement, Numerics
from neural_mri.contract.results import (
    SCHEMAS,
    Manifest,
    Provenance,
    TableRef,
    build,
    component_columns,
    positions_column,
    stamp,
)
from neural_mri.contract.scans import ScanKind, reporting_order
from neural_mri.contract.summaries import Summary, main_table, summarise, tables_needed
from neural_mri.contract.summaries.perturbation import _metric

TINY = Architecture(
    family="llama",
    n_layers=2,
    n_heads=3,
    n_kv_heads=1,
    d_model=8,
    d_head=4,
    d_mlp=16,
    d_vocab=20,
    n_ctx=32,
    activation="silu",
    gated_mlp=True,
    norm="rms",
    norm_placement=NormPlacement.PRE,
    parallel_blocks=False,
    tied_embeddings=True,
    positions="rotary",
)
TOKENS = ("The", " Eiff", "el")
JOB = "/api/jobs/1"


def stamped(name: str, columns: dict[str, pa.Array], value: Any = None) -> pa.Table:
    provenance = Provenance(
        table=name,
        version=str(SCHEMAS[name].version),
        unit="L2 norm",
        method="norm of what is written to the residual stream",
        positions=(0, 1, 2),
    )
    return stamp(build(name, columns, value), provenance)


def activations(components: tuple[Component, ...], values: list[list[float]]) -> pa.Table:
    flat = pa.array([value for row in values for value in row], pa.float32())
    return stamped(
        "activations", component_columns(components), positions_column(flat, len(values[0]))
    )


def neurons(rows: list[tuple[int, int, int, int, float]]) -> pa.Table:
    """From (layer, position, rank, neuron, value)."""
    layers, positions, ranks, numbers, values = zip(*rows, strict=True)
    return stamped(
        "neurons",
        {
            "component": pa.array([f"blocks.{layer}.mlp" for layer in layers]),
            "layer": pa.array(layers, pa.int16()),
            "position": pa.array(positions, pa.int32()),
            "rank": pa.array(ranks, pa.int16()),
            "neuron": pa.array(numbers, pa.int32()),
            "value": pa.array(values, pa.float32()),
        },
    )


PREDICTIONS = stamped(
    "predictions",
    {
        "position": pa.array([2, 2], pa.int32()),
        "rank": pa.array([0, 1], pa.int16()),
        "token_id": pa.array([7, 9], pa.int32()),
        "text": pa.array([" Tower", "fel"]),
        "logit": pa.array([4.0, 1.0], pa.float32()),
        "log_probability": pa.array([-0.5, -3.5], pa.float32()),
        "probability": pa.array([0.6, 0.03], pa.float32()),
    },
)


def manifest(kind: ScanKind, tables: tuple[str, ...], **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "scan_key": "c" * 64,
        "kind": kind,
        "model": "tiny",
        "revision": "a" * 64,
        "numerics": Numerics(),
        "scanner_version": "1",
        "request": {"top_neurons": 2},
        "prompt_tokens": TOKENS,
        "tables": tuple(
            TableRef(
                name=name, table=name.partition(".")[0], chunk="d" * 64, bytes=1, rows=1, unit=""
            )
            for name in tables
        ),
        "created_at": datetime(2026, 1, 2, tzinfo=UTC),
        "forward_seconds": 0.25,
        "compute_seconds": 0.5,
        "memory_bytes": 12_000_000,
    }
    return Manifest(**{**fields, **changes})


def scanned(components: tuple[Component, ...], values: list[list[float]]) -> dict[str, Any]:
    """The summary of an fMRI scan, as JSON has it."""
    tables = {
        "activations": activations(components, values),
        "neurons": neurons([(0, 0, 0, 5, -4.0), (0, 1, 0, 5, 3.0), (0, 1, 1, 2, 1.0)]),
        "predictions": PREDICTIONS,
    }
    return as_json(summarise(manifest(ScanKind.FMRI, tuple(tables)), tables, TINY, job_url=JOB))


def as_json(summary: Summary) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(summary))
    return document


def test_an_fmri_summary_has_the_fields_and_nesting_of_the_specification() -> None:
    components = reporting_order(TINY)
    values = [[float(row), row + 0.25, row + 0.5] for row in range(len(components))]
    document = scanned(components, values)
    by_address = {str(component): row for component, row in zip(components, values, strict=True)}

    assert document["model"] == "tiny"
    assert document["scan_mode"] == "fMRI"
    assert document["prompt_tokens"] == list(TOKENS)
    data = document["data"]
    assert data["embed"] == {
        "type": "embedding",
        "shape": [3, 8],
        "activations_summary": by_address["embed"],
    }
    assert data["blocks.1.attn"] == {
        "type": "attention",
        "num_heads": 3,
        "activations_summary": by_address["blocks.1.attn"],
        "per_head_activation": [by_address[f"blocks.1.attn.head_{head}"] for head in range(3)],
        "attention_patterns": {"shape": [3, 3, 3], "data_url": f"{JOB}/attention/1"},
    }
    assert data["blocks.1.mlp"]["activation_summary"] == by_address["blocks.1.mlp"]
    assert data["blocks.0.resid_mid"] == {
        "type": "residual",
        "activations_summary": by_address["blocks.0.resid_mid"],
    }
    assert data["unembed"]["type"] == "unembedding"
    assert "blocks.1.attn.head_0" not in data
    assert document["predictions"][0] == {
        "position": 2,
        "rank": 0,
        "token": " Tower",
        "token_id": 7,
        "logit": 4.0,
        "log_probability": -0.5,
        "prob": pytest.approx(0.6),
    }
    assert document["metadata"]["compute_time_ms"] == 500
    assert document["metadata"]["forward_time_ms"] == 250
    assert document["metadata"]["gpu_memory_mb"] is None
    assert document["metadata"]["memory_bytes"] == 12_000_000
    assert document["metadata"]["unit"] == "L2 norm"


def test_memory_is_called_gpu_memory_only_on_a_gpu() -> None:
    tables = {"activations": activations((Component(Kind.EMBED),), [[1.0, 2.0, 3.0]])}
    on_gpu = manifest(ScanKind.FMRI, tuple(tables), numerics=Numerics(device="cuda"))
    summary = summarise(on_gpu, tables, TINY, job_url=JOB)
    assert summary.metadata.gpu_memory_mb == 12.0


def test_a_neuron_is_named_once_where_it_is_strongest_by_magnitude() -> None:
    (mlp,) = scanned((Component(Kind.MLP, 0),), [[1.0, 2.0, 3.0]])["data"].values()
    assert mlp["top_neurons"] == [
        {"idx": 5, "activation": -4.0, "position": 0, "label": None},
        {"idx": 2, "activation": 1.0, "position": 1, "label": None},
    ]


def test_no_more_neurons_are_named_than_were_asked_for() -> None:
    tables = {
        "activations": activations((Component(Kind.MLP, 0),), [[1.0, 2.0, 3.0]]),
        "neurons": neurons([(0, at, 0, at, 1.0 + at) for at in range(3)]),
    }
    one = manifest(ScanKind.FMRI, tuple(tables), request={"top_neurons": 1})
    document = as_json(summarise(one, tables, TINY, job_url=JOB))
    assert [neuron["idx"] for neuron in document["data"]["blocks.0.mlp"]["top_neurons"]] == [2]
    assert document["predictions"] == []


def test_a_head_asked_for_alone_stands_alone() -> None:
    document = scanned((Component.head(1, 2),), [[1.0, 2.0, 3.0]])
    assert document["data"] == {
        "blocks.1.attn.head_2": {"type": "head", "activations_summary": [1.0, 2.0, 3.0]}
    }


def test_what_was_not_measured_is_null() -> None:
    document = scanned((Component(Kind.EMBED),), [[math.nan, 1.0, 2.0]])
    assert document["data"]["embed"]["activations_summary"] == [None, 1.0, 2.0]


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_json_carries_exactly_the_tables_floats(row: list[float]) -> None:
    document = scanned((Component(Kind.EMBED),), [row])
    assert document["data"]["embed"]["activations_summary"] == row


def test_a_topology_summary_adds_up() -> None:
    components = tuple(TINY.nodes())
    table = stamped(
        "topology",
        {
            **component_columns(components),
            "kv_head": pa.array([0 if c.kind is Kind.HEAD else -1 for c in components], pa.int16()),
            "parameters": pa.array(range(len(components)), pa.uint32()),
            "shared_parameters": pa.array([0] * len(components), pa.uint32()),
        },
    )
    whole = manifest(ScanKind.T1, ("topology", "parameters"), prompt_tokens=())
    assert tables_needed(whole) == ("topology",)
    document = as_json(summarise(whole, {"topology": table}, TINY, job_url=JOB))
    assert document["scan_mode"] == "T1"
    assert document["total_parameters"] == sum(range(len(components)))
    assert document["data"]["blocks.1.attn.head_2"] == {
        "type": "head",
        "layer": 1,
        "head": 2,
        "kv_head": 0,
        "parameters": components.index(Component.head(1, 2)),
        "shared_parameters": 0,
    }
    assert document["data"]["embed"]["layer"] is None
    assert document["architecture"]["n_layers"] == 2


def test_an_attention_summary_names_patterns_by_url_and_reads_one_table() -> None:
    columns = {
        "component": pa.array(["blocks.1.attn.head_0"]),
        "layer": pa.array([1], pa.int16()),
        "head": pa.array([0], pa.int16()),
    }
    patterns = pa.array([1.0] * 9, pa.float32())
    table = stamped("attention", columns, positions_column(patterns, 9))
    whole = manifest(
        ScanKind.ATTENTION, ("attention.0", "attention.1"), request={"layers": [1, 0, 1]}
    )
    assert tables_needed(whole) == ("attention.0",)
    document = as_json(summarise(whole, {"attention.0": table}, TINY, job_url=JOB))
    assert document["data"] == {
        f"blocks.{layer}.attn": {
            "type": "attention",
            "num_heads": 3,
            "attention_patterns": {"shape": [3, 3, 3], "data_url": f"{JOB}/attention/{layer}"},
        }
        for layer in (0, 1)
    }


def test_only_the_small_tables_are_needed() -> None:
    raw = manifest(ScanKind.FMRI, ("tokens", "activations", "vectors.0", "neurons", "predictions"))
    assert tables_needed(raw) == ("activations", "neurons", "predictions")


@pytest.mark.parametrize(("unit", "foil_id"), [("logits", -1), ("nats", None)])
def test_a_foil_is_known_by_the_unit_where_no_id_is_shown(unit: str, foil_id: int | None) -> None:
    numbers = {
        field.name: pa.array([-1 if field.name == "foil_id" else 1], field.type)
        for field in SCHEMAS["comparison"].fields
        if field.type != pa.string()
    }
    table = build("comparison", {**numbers, "answer": pa.array([" Paris"])})
    provenance = Provenance(
        table="comparison", version=str(SCHEMAS["comparison"].version), unit=unit, method=""
    )
    assert _metric(stamp(table, provenance)).foil_id == foil_id


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ScanKind.T1, "topology"),
        (ScanKind.T2, "weights"),
        (ScanKind.FMRI, "activations"),
        (ScanKind.ATTENTION, "attention.3"),
        (ScanKind.DTI, "effects"),
        (ScanKind.FLAIR, "lens"),
        (ScanKind.PERTURBATION, "comparison"),
        (ScanKind.PATCHING, "recovery"),
        (ScanKind.TRACING, "trace"),
        (ScanKind.CALIBRATION, "calibration_ordinary"),
    ],
)
def test_each_kind_of_result_has_a_main_table(kind: ScanKind, name: str) -> None:
    others = ("attention.4",) if kind is ScanKind.ATTENTION else ("tokens",)
    tables = (name, *others) if kind is ScanKind.ATTENTION else (*others, name)
    whole = manifest(kind, tables)
    assert main_table(whole).name == name
    assert name in tables_needed(whole)


def test_a_summary_says_where_every_table_is() -> None:
    tables = {"activations": activations((Component(Kind.EMBED),), [[1.0, 2.0, 3.0]])}
    whole = manifest(ScanKind.FMRI, ("activations", "vectors.0"))
    document = as_json(summarise(whole, tables, TINY, job_url=JOB))
    assert document["tables"]["vectors.0"] == {
        "table": "vectors",
        "unit": "",
        "rows": 1,
        "bytes": 1,
        "data_url": f"{JOB}/result/vectors.0",
    }
