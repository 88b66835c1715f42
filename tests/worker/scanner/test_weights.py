"""T2 against numpy on the whole matrices, in float64."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from neural_mri.contract.components import Component, Kind
from neural_mri.contract.problems import InvalidAddress, UnknownComponent, Unprocessable
from neural_mri.contract.results import from_ipc, provenance_of, to_ipc
from neural_mri.contract.weights import WeightScan
from tests import models
from worker.scanner import bridging, topology, weight_statistics
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.weight_slices import WeightMap, weight_map
from worker.scanner.weights import scan_weights

Tables = dict[str, pa.Table]
Rows = list[dict[str, Any]]
Matrix = npt.NDArray[np.float64]

PERCENTILES = {"p0_1": 0.1, "p1": 1, "p25": 25, "p50": 50, "p75": 75, "p99": 99, "p99_9": 99.9}


def scan(folder: Path, **asked: Any) -> Tables:
    return scan_weights(folder, WeightScan(**asked), Silent()).tables


def rows(table: pa.Table, **wanted: Any) -> Rows:
    found: Rows = table.to_pylist()
    return [row for row in found if all(row[name] == value for name, value in wanted.items())]


def map_of(family: str) -> WeightMap:
    skeleton = bridging.skeleton(models.FAMILIES[family])
    anatomy = topology.examine(skeleton)
    return weight_map(skeleton, anatomy, topology.parameter_rows(skeleton, anatomy))


class Oracle:
    """A family's weights as whole float64 matrices, from the model itself."""

    def __init__(self, family: str) -> None:
        self.map = map_of(family)
        self.parameters = {
            name: parameter.detach().double().numpy()
            for name, parameter in models.build(family).named_parameters()
        }

    def head(self, layer: int, head: int) -> dict[str, Matrix]:
        """W_Q, W_K, W_V, W_O of one head, each `[d_head, d_model]`."""
        return {
            role: np.moveaxis(self.parameters[lines.parameter], lines.axis, 0)[lines.numbers]
            for role, lines in self.map.attention(Component.head(layer, head)).items()
        }

    def reads(self, component: Component) -> Matrix:
        """All entries of the matrices that a component reads."""
        if component.kind is Kind.HEAD:
            parts = list(self.head(component.layer or 0, component.index or 0).values())
        else:
            parts = [self.parameters[name] for name in self.map.parameters_of(component)]
        return np.concatenate([part.ravel() for part in parts if part.ndim == 2])


def rewritten(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Matrix:
    """One stored tensor changed; its values after that."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path)
    after: Matrix = tensors[name].double().numpy()
    return after


def exactly(value: float) -> Any:
    """As exact as promised; the tables' own float32 is finer."""
    return pytest.approx(value, rel=1e-6, abs=1e-12)


def test_every_tensors_statistics_are_numpys(family: str, tmp_path: Path) -> None:
    tables = scan(models.save(family, tmp_path))
    found = {row["name"]: row for row in tables["tensors"].to_pylist()}
    oracle = Oracle(family)
    assert list(found) == list(oracle.parameters)
    for name, weights in oracle.parameters.items():
        row, far = found[name], np.abs(weights - weights.mean()) > 6 * weights.std()
        expected = {
            "mean": weights.mean(),
            "std": weights.std(),
            "minimum": weights.min(),
            "maximum": weights.max(),
            "max_abs": np.abs(weights).max(),
            "rms": np.sqrt(np.mean(weights**2)),
            "frobenius": np.linalg.norm(weights),
            "kurtosis": np.mean((weights - weights.mean()) ** 4) / weights.var() ** 2 - 3,
            "outlier_share": far.mean(),
        }
        for column, value in expected.items():
            assert row[column] == exactly(value), (name, column)
        for column, share in PERCENTILES.items():
            assert row[column] == np.float32(np.percentile(weights, share)), (name, column)
        assert (row["shape"], row["numel"]) == (list(weights.shape), weights.size)
        assert row["role"] == oracle.map.rows[name].owner.role


def test_histograms_count_every_weight_between_the_true_extremes(
    family: str, tmp_path: Path
) -> None:
    table = scan(models.save(family, tmp_path), histogram_bins=16)["histograms"]
    parameters = Oracle(family).parameters
    for row in table.to_pylist():
        counts, edges = np.histogram(parameters[row["name"]], 16)
        assert row["counts"] == counts.tolist()
        assert (row["minimum"], row["maximum"]) == (edges[0], edges[-1])


def test_outliers_are_the_farthest_weights_where_they_lie(family: str, tmp_path: Path) -> None:
    table = scan(models.save(family, tmp_path))["outliers"]
    for name, weights in Oracle(family).parameters.items():
        z = (weights - weights.mean()) / weights.std()
        found = rows(table, name=name)
        assert [row["rank"] for row in found] == list(range(8))
        farthest = np.sort(np.abs(z), axis=None)[::-1][:8]
        assert [abs(row["z"]) for row in found] == [exactly(size) for size in farthest]
        for row in found:
            at = (row["row"], row["column"]) if weights.ndim == 2 else (row["row"],)
            assert (row["z"], row["value"]) == (exactly(z[at]), np.float32(weights[at]))
            assert weights.ndim == 2 or row["column"] == -1


def test_a_component_is_the_matrices_that_it_reads(family: str, tmp_path: Path) -> None:
    tables, oracle = scan(models.save(family, tmp_path)), Oracle(family)
    topology_table = topology.scan_topology(models.FAMILIES[family])["topology"]
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


def test_circuits_are_those_of_the_explicit_products(family: str, tmp_path: Path) -> None:
    tables, oracle = scan(models.save(family, tmp_path)), Oracle(family)
    shape = oracle.map.architecture
    table = tables["circuits"]
    assert table.num_rows == 2 * shape.n_layers * shape.n_heads
    for row in table.to_pylist():
        head = oracle.head(row["layer"], row["head"])
        left, right = ("W_Q", "W_K") if row["circuit"] == "QK" else ("W_V", "W_O")
        product = torch.from_numpy(head[left].T @ head[right])
        values = torch.linalg.svdvals(product).numpy()
        np.testing.assert_allclose(row["value"], values[:8], rtol=1e-4)
        assert row["spectral_norm"] == exactly(values[0])
        assert row["frobenius"] == exactly(np.sqrt((values**2).sum()))
        assert row["stable_rank"] == exactly((values**2).sum() / values[0] ** 2)
        if row["circuit"] == "OV":
            eigenvalues = torch.linalg.eigvals(product)
            copying = eigenvalues.real.sum() / eigenvalues.abs().sum()
            assert row["copying"] == pytest.approx(copying.item(), abs=1e-6)
        else:
            assert np.isnan(row["copying"])


def test_a_head_that_copies_scores_1_and_one_that_was_pruned_is_0(tmp_path: Path) -> None:
    path = models.save("llama", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    value, output = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "vo")
    tensors[value][:8] = torch.eye(8, 32)
    tensors[output][:, :8] = torch.eye(32, 8)
    tensors["model.layers.2.self_attn.k_proj.weight"][:8] = 0
    save_file(tensors, path)
    table = scan(tmp_path)["circuits"]
    (copier,) = rows(table, component="blocks.1.attn.head_0", circuit="OV")
    assert (copier["copying"], copier["stable_rank"]) == (1, 8)
    assert copier["value"] == [1] * 8
    (pruned,) = rows(table, component="blocks.2.attn.head_1", circuit="QK")
    assert (pruned["spectral_norm"], pruned["frobenius"]) == (0, 0)
    assert np.isnan(pruned["stable_rank"])


def test_the_strongest_neurons_have_the_largest_products_of_norms(
    family: str, tmp_path: Path
) -> None:
    tables, oracle = scan(models.save(family, tmp_path)), Oracle(family)

    def norms(layer: int, role: str) -> Matrix:
        lines = oracle.map.projections[layer, role]
        matrix = np.moveaxis(oracle.parameters[lines.parameter], lines.axis, 0)[lines.numbers]
        return np.linalg.norm(matrix, axis=1)

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


def test_more_values_than_are_kept_in_memory_give_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scan(models.save("qwen3", tmp_path))
    monkeypatch.setattr(weight_statistics, "_BLOCK", 100)
    monkeypatch.setattr(weight_statistics, "_KEPT", 150)
    in_pieces = scan(tmp_path)
    for name in ("p0_1", "p1", "p25", "p50", "p75", "p99", "p99_9", "minimum", "maximum"):
        assert in_pieces["tensors"][name].equals(whole["tensors"][name])
    assert in_pieces["histograms"].equals(whole["histograms"])
    assert in_pieces["outliers"]["value"].equals(whole["outliers"]["value"])


def test_a_mean_far_from_zero_costs_no_digits(tmp_path: Path) -> None:
    name = "model.norm.weight"

    def shifted(gains: torch.Tensor) -> torch.Tensor:
        return 1000 + 0.25 * torch.randn(gains.shape, generator=torch.Generator().manual_seed(0))

    weights = rewritten(models.save("llama", tmp_path), name, shifted)
    (row,) = rows(scan(tmp_path)["tensors"], name=name)
    assert row["std"] == exactly(weights.std())
    assert row["kurtosis"] == exactly(
        np.mean((weights - weights.mean()) ** 4) / weights.var() ** 2 - 3
    )


def test_equal_weights_have_no_spread_and_no_outliers(tmp_path: Path) -> None:
    name = "model.norm.weight"
    rewritten(models.save("llama", tmp_path), name, lambda gains: torch.full_like(gains, 0.1))
    tables = scan(tmp_path)
    (row,) = rows(tables["tensors"], name=name)
    assert (row["std"], row["outlier_share"], row["p50"]) == (0, 0, np.float32(0.1))
    assert np.isnan(row["kurtosis"])
    (histogram,) = rows(tables["histograms"], name=name)
    assert sum(histogram["counts"]) == histogram["counts"][-1] == 32


def test_weights_that_are_not_finite_are_counted_and_nothing_is_made_up(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"

    def broken(matrix: torch.Tensor) -> torch.Tensor:
        matrix[3, 4], matrix[5, 6] = torch.nan, torch.inf
        return matrix

    rewritten(models.save("llama", tmp_path), name, broken)
    tables = scan(tmp_path)
    (row,) = rows(tables["tensors"], name=name)
    assert row["nonfinite"] == 2
    assert np.isnan([row["mean"], row["rms"], row["max_abs"], row["p50"]]).all()
    assert not rows(tables["histograms"], name=name)
    for head in rows(tables["weights"], kind="head", layer=1):
        assert np.isnan(head["rms"])
        assert np.isnan(head["rms_q"])
        assert not np.isnan(head["rms_k"])
    assert all(np.isnan(row["spectral_norm"]) for row in rows(tables["circuits"], layer=1))
    assert not any(np.isnan(row["spectral_norm"]) for row in rows(tables["circuits"], layer=0))


def test_buffers_are_named_and_are_no_weights(tmp_path: Path) -> None:
    path = models.save("gpt2", tmp_path) / "model.safetensors"
    bare = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, path)
    tables = scan(tmp_path)
    (mask,) = rows(tables["tensors"], role="buffer")
    assert (mask["name"], mask["component"]) == ("transformer.h.0.attn.bias", "blocks.0.attn")
    assert np.isnan(mask["mean"])
    roles = {row["role"] for row in tables["tensors"].to_pylist()}
    assert {"W_QKV", "W_QKV.bias", "norm", "norm.bias"} < roles


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
    tables = scan(tmp_path, layers=("blocks.1.attn", "blocks.0.h2", "unembed"))
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
        assert stored.equals(table)
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
