"""T2 as a whole: components, what is asked for, progress, and what stands in the tables."""

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.problems import InvalidAddress, UnknownComponent, Unprocessable
from neural_mri.contract.results import from_ipc, provenance_of, to_ipc
from neural_mri.contract.weights import WeightScan
from tests import models
from tests.worker.scanner.weight_oracle import (
    Matrix,
    Oracle,
    exactly,
    map_of,
    rows,
    scan,
)
from worker.scanner import topology
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.weight_slices import WeightMap
from worker.scanner.weights import scan_weights


def test_a_component_is_the_matrices_that_it_reads(family: str, tmp_path: Path) -> None:
    tables, oracle = scan(models.save(family, tmp_path)), Oracle(family)
    topology_table = topology.scan_topology(models.configuration(family))["topology"]
    found = tables["weights"].to_pylist()
    assert [row["component"] for row in found] == topology_table["component"].to_pylist()
    for row in found:
        component = Component.parse(row["component"])
        weights = oracle.reads(component)
        assert row["mean"] == exactly(weights.mean()), component
        assert row["std"] == exactly(weights.std())
        assert row["rms"] == exactly(np.sqrt(np.mean(weights**2)))
        assert row["frobenius"] == exactly(np.linalg.norm(weights))
        assert row["max_abs"] == exactly(np.abs(weights).max())
        if component.kind is Kind.HEAD:
            for role, part in oracle.head(component.layer or 0, component.index or 0).items():
                assert row[f"rms_{role[-1].lower()}"] == exactly(np.sqrt(np.mean(part**2)))


def test_outliers_are_counted_where_they_lie(family: str, tmp_path: Path) -> None:
    """One weight of one head is made enormous: its head and layer have it, others do not."""
    folder, mapped = models.save(family, tmp_path), map_of(family)
    lines = mapped.attention(Component.head(1, 1))["W_O"]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    number = int(lines.numbers[0])
    tensors[lines.parameter][(number, 3) if lines.axis == 0 else (3, number)] = 1e3
    save_file(tensors, path)
    having = {
        row["component"]: row["outlier_share"] * mapped_size(mapped, row["component"])
        for row in rows(scan(folder)["weights"])
        if row["outlier_share"] > 0
    }
    assert having == {"blocks.1.attn": exactly(1), "blocks.1.attn.head_1": exactly(1)}


def mapped_size(mapped: WeightMap, address: str) -> int:
    component, shape = Component.parse(address), mapped.architecture
    width = 4 * shape.d_head * shape.d_model
    if component.kind is Kind.HEAD:
        return width
    return width // 2 * (shape.n_heads + shape.n_kv_heads)


def test_the_strongest_neurons_have_the_largest_products_of_norms(
    family: str, tmp_path: Path
) -> None:
    tables, oracle = scan(models.save(family, tmp_path)), Oracle(family)

    def norms(layer: int, role: str) -> Matrix:
        lines = oracle.map.projections[layer, role]
        matrix = np.moveaxis(oracle.parameters[lines.parameter], lines.axis, 0)[lines.numbers]
        squares: Matrix = (matrix**2).sum(1)
        return np.sqrt(squares)

    for layer in range(oracle.map.architecture.n_layers):
        products = norms(layer, "W_in") * norms(layer, "W_out")
        found = rows(tables["neuron_weights"], layer=layer)
        assert [row["neuron"] for row in found] == np.argsort(-products)[:10].tolist()
        for row in found:
            neuron = row["neuron"]
            assert row["product"] == exactly(products[neuron])
            assert row["in_norm"] == exactly(norms(layer, "W_in")[neuron])
            assert row["out_norm"] == exactly(norms(layer, "W_out")[neuron])
            if oracle.map.architecture.gated_mlp:
                assert row["gate_norm"] == exactly(norms(layer, "W_gate")[neuron])
            else:
                assert np.isnan(row["gate_norm"])


def test_dimensions_are_those_that_a_matrix_writes_most(family: str, tmp_path: Path) -> None:
    table = scan(models.save(family, tmp_path))["dimensions"]
    oracle = Oracle(family)
    for name in dict.fromkeys(table["name"].to_pylist()):
        axis = oracle.map.written_axis(name)
        assert axis is not None
        norms = np.linalg.norm(oracle.parameters[name], axis=1 - axis)
        found = rows(table, name=name)
        assert [row["dimension"] for row in found] == np.argsort(-norms)[:8].tolist()
        assert [row["norm"] for row in found] == [exactly(norms[row["dimension"]]) for row in found]
        assert found[0]["ratio"] == exactly(norms.max() / np.median(norms))


def test_a_tied_unembedding_shows_the_embedding_and_is_one_tensor(tmp_path: Path) -> None:
    tables = scan(models.save("gemma2", tmp_path))
    matrices = [row for row in tables["tensors"].to_pylist() if row["shape"][0] == models.D_VOCAB]
    assert len(matrices) == 1
    (embed,), (unembed,) = (
        rows(tables["weights"], component=name) for name in ("embed", "unembed")
    )
    assert unembed["rms"] == embed["rms"] == matrices[0]["rms"]


def test_only_what_was_asked_for_is_read_and_reported(family: str, tmp_path: Path) -> None:
    everything = scan(models.save(family, tmp_path))
    tables = scan(tmp_path, layers=("blocks.1.attn", "blocks.0.attn.h2", "unembed"))
    shape = map_of(family).architecture
    addresses = ["blocks.0.attn.head_2", "blocks.1.attn"]
    addresses += [f"blocks.1.attn.head_{head}" for head in range(shape.n_heads)]
    assert tables["weights"]["component"].to_pylist() == [*addresses, "unembed"]
    for name in ("weights", "circuits"):
        for row in tables[name].to_pylist():
            (same,) = [
                other
                for other in rows(everything[name], component=row["component"])
                if other.get("circuit") == row.get("circuit")
            ]
            np.testing.assert_equal(row, same)
    read = set(tables["tensors"]["component"].to_pylist())
    assert read == {"blocks.0.attn", "blocks.1.attn", "unembed"} | (
        {"embed"} if shape.tied_embeddings else set()
    )
    assert tables["neuron_weights"].num_rows == 0


@pytest.mark.parametrize(
    ("address", "refusal"),
    [
        ("blocks.9.mlp", UnknownComponent),
        ("blocks.0.attn.h9", UnknownComponent),
        ("blocks.0.mlp.n3", Unprocessable),
        ("blocks.0.resid_pre", Unprocessable),
        ("layer3", InvalidAddress),
    ],
)
def test_a_place_without_weights_is_refused(
    address: str, refusal: type[Exception], tmp_path: Path
) -> None:
    models.save("llama", tmp_path)
    with pytest.raises(
        refusal, match=address.replace(".h9", ".head_9").replace(".n3", ".neuron_3")
    ):
        scan(tmp_path, layers=(address,))


class Recorder(Silent):
    """Notes progress; asks to stop after some checkpoints."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self._left = stop_after

    def progress(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage, done, total))

    def checkpoint(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Cancelled


def test_progress_counts_the_bytes_of_all_weights(tmp_path: Path) -> None:
    listener = Recorder()
    scan_weights(models.save("llama", tmp_path), WeightScan(), listener)
    n_bytes = 4 * sum(parameter.numel() for parameter in models.build("llama").parameters())
    done = [done for _, done, _ in listener.seen]
    assert {(stage, total) for stage, _, total in listener.seen} == {("weights", n_bytes)}
    assert done == sorted(done)
    assert done[-1] == n_bytes


def test_a_cancelled_scan_stops_and_leaves_no_thread_behind(tmp_path: Path) -> None:
    listener = Recorder(stop_after=1)
    before = threading.active_count()
    with pytest.raises(Cancelled):
        scan_weights(models.save("llama", tmp_path), WeightScan(), listener)
    assert threading.active_count() == before
    assert listener.seen[-1][1] < listener.seen[-1][2]


def test_tables_say_what_they_are_and_survive_being_stored(tmp_path: Path) -> None:
    models.save("llama", tmp_path)
    (tmp_path / "neural_mri.json").write_text('{"source": "a.gguf", "quantization": "Q4_1"}')
    output = scan_weights(tmp_path, WeightScan(), Silent())
    assert output.forward_seconds == 0
    for name, table in output.tables.items():
        stored = from_ipc(to_ipc(table))
        np.testing.assert_equal(stored.to_pylist(), table.to_pylist())
        provenance = provenance_of(stored)
        assert provenance.table == name
        assert provenance.parameters["quantization"] == "Q4_1"
        assert "grid of their Q4_1 file" in provenance.method


@pytest.mark.smollm2
def test_smollm2_writes_its_attention_sink_into_dimension_507(smollm2_folder: Path) -> None:
    tables = scan(smollm2_folder, layers=("blocks.11.mlp",))
    (strongest, *_) = rows(tables["dimensions"], component="blocks.11.mlp")
    assert (strongest["dimension"], strongest["rank"]) == (507, 0)
    assert strongest["ratio"] > 2.5


@pytest.mark.smollm2
def test_smollm2s_numbers_are_numpys_and_lie_on_a_grid(smollm2_folder: Path) -> None:
    tables = scan(smollm2_folder)
    stored = load_file(smollm2_folder / "model.safetensors")
    for name in ("model.layers.11.mlp.down_proj.weight", "model.norm.weight"):
        weights = stored[name].double().numpy()
        (row,) = rows(tables["tensors"], name=name)
        assert row["std"] == exactly(weights.std())
        assert row["kurtosis"] == exactly(
            np.mean((weights - weights.mean()) ** 4) / weights.var() ** 2 - 3
        )
        assert row["p99_9"] == np.float32(np.percentile(weights, 99.9))
    assert sum(tables["tensors"]["numel"].to_pylist()) == 134_515_008
    assert provenance_of(tables["tensors"]).parameters["quantization"] == "Q4_1"
