"""fMRI on a tiny model of every family: each number against Hugging Face's own, or against an identity."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from neural_mri.contract.anomalies import CalibrationScan
from neural_mri.contract.components import Component
from neural_mri.contract.events import ActivationFrame, LayerFrame
from neural_mri.contract.problems import PromptTooLong, Unprocessable
from neural_mri.contract.results import SCHEMAS, provenance_of
from neural_mri.contract.scans import ActivationScan, Aggregation, reporting_order
from neural_mri.contract.tokens import Span, Tokens
from tests import models
from worker.scanner import layer_reading
from worker.scanner.activations import scan_activations
from worker.scanner.calibrating import calibrate
from worker.scanner.listening import Cancelled, Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.sampling import sampled_text
from worker.scanner.sites import site

TOKENS = models.prompt(7)


def request(**changes: Any) -> ActivationScan:
    return msgspec.convert({"scan_mode": "fMRI", "prompt": "x", **changes}, ActivationScan)


def scan(model: LoadedModel, asked: ActivationScan | None = None) -> dict[str, pa.Table]:
    return scan_activations(model, asked or request(), TOKENS, Silent()).tables


def values(table: pa.Table) -> dict[str, np.ndarray]:
    """Address -> values over positions."""
    rows = np.array(table["value"].to_pylist(), dtype=np.float32)
    return dict(zip(table["component"].to_pylist(), rows, strict=True))


def vectors(tables: dict[str, pa.Table]) -> dict[str, np.ndarray]:
    """Address -> `[pos d_model]`."""
    found: dict[str, list[Any]] = {}
    for name, table in tables.items():
        if name.startswith("vectors."):
            for address, value in zip(
                table["component"].to_pylist(), table["value"].to_pylist(), strict=True
            ):
                found.setdefault(address, []).append(value)
    return {address: np.array(rows, dtype=np.float32) for address, rows in found.items()}


def close(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        np.asarray(found), expected, rtol=rtol, atol=rtol * np.abs(expected).max()
    )


@contextmanager
def seen(module: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """What a module is given and gives."""
    found: dict[str, Tensor] = {}

    def keep(_module: object, args: tuple[Any, ...], output: Any) -> None:
        found["in"], found["out"] = args[0][0], output[0]

    handle = module.register_forward_hook(keep)
    yield found
    handle.remove()


@torch.inference_mode()
def plain_run(model: LoadedModel, **options: Any) -> Any:
    return model.plain(input_ids=torch.tensor([TOKENS.ids]), use_cache=False, **options)


def test_the_residual_stream_is_hugging_faces_hidden_states(tiny_model: LoadedModel) -> None:
    hidden = plain_run(tiny_model, output_hidden_states=True).hidden_states
    lengths = [state[0].norm(dim=-1).numpy() for state in hidden]
    found = values(scan(tiny_model)["activations"])
    close(found["embed"], lengths[0])
    for layer in range(tiny_model.architecture.n_layers):
        close(found[f"blocks.{layer}.resid_pre"], lengths[layer])
        if layer:
            np.testing.assert_array_equal(
                found[f"blocks.{layer}.resid_pre"], found[f"blocks.{layer - 1}.resid_post"]
            )
    # Hugging Face's last hidden state has been through the final norm.
    close(found["unembed"], lengths[-1])


def test_attention_and_mlp_are_what_their_modules_write(
    tiny_model: LoadedModel, family: str
) -> None:
    names = models.NAMES[family]
    found = values(scan(tiny_model)["activations"])
    for layer in range(tiny_model.architecture.n_layers):
        block = tiny_model.plain.get_submodule(f"{names.blocks}.{layer}")
        with (
            seen(block.get_submodule(names.attn_post_norm or names.w_o)) as attn,
            seen(block.get_submodule(names.mlp_post_norm or names.w_out)) as mlp,
        ):
            plain_run(tiny_model)
        close(found[f"blocks.{layer}.attn"], attn["out"].norm(dim=-1))
        close(found[f"blocks.{layer}.mlp"], mlp["out"].norm(dim=-1))


def test_a_heads_vectors_and_the_bias_add_up_to_what_attention_writes(
    tiny_model: LoadedModel, family: str
) -> None:
    names = models.NAMES[family]
    found = vectors(scan(tiny_model, request(aggregation="raw")))
    for layer in range(tiny_model.architecture.n_layers):
        heads = [
            found[str(Component.head(layer, h))] for h in range(tiny_model.architecture.n_heads)
        ]
        w_o = tiny_model.plain.get_submodule(f"{names.blocks}.{layer}.{names.w_o}")
        bias = dict(w_o.named_parameters()).get("bias", torch.zeros(1)).numpy()
        close(sum(heads) + bias, found[f"blocks.{layer}.attn"])


def test_what_is_written_adds_up_along_the_residual_stream(tiny_model: LoadedModel) -> None:
    found = vectors(scan(tiny_model, request(aggregation="raw")))
    for layer in range(tiny_model.architecture.n_layers):
        block = f"blocks.{layer}"
        before, attn, mlp, after = (
            found[f"{block}.{part}"] for part in ("resid_pre", "attn", "mlp", "resid_post")
        )
        close(before + attn + mlp, after)
        if not tiny_model.architecture.parallel_blocks:
            close(found[f"{block}.resid_mid"], before + attn)


def test_the_length_of_a_head_by_its_gram_matrix_is_the_length_of_its_vector(
    tiny_model: LoadedModel,
) -> None:
    found, naive = (
        values(scan(tiny_model)["activations"]),
        vectors(scan(tiny_model, request(aggregation="raw"))),
    )
    for address, rows in naive.items():
        close(found[address], np.linalg.norm(rows.astype(np.float64), axis=-1))


@pytest.mark.parametrize(
    ("aggregation", "measure"),
    [("max", lambda x: np.abs(x).max(-1)), ("mean", lambda x: np.abs(x).mean(-1))],
)
def test_max_and_mean_are_over_absolute_coordinates(
    tiny_model: LoadedModel, aggregation: str, measure: Any
) -> None:
    found = values(scan(tiny_model, request(aggregation=aggregation))["activations"])
    for address, rows in vectors(scan(tiny_model, request(aggregation="raw"))).items():
        close(found[address], measure(rows))


def test_every_tokens_frame_is_the_run_of_the_prompt_up_to_it(tiny_model: LoadedModel) -> None:
    whole = values(scan(tiny_model)["activations"])
    for length in range(1, len(TOKENS)):
        prefix = models.prompt(len(TOKENS))
        shorter = type(prefix)(
            ids=prefix.ids[:length], texts=prefix.texts[:length], spans=prefix.spans[:length]
        )
        part = values(
            scan_activations(tiny_model, request(), shorter, Silent()).tables["activations"]
        )
        for address, row in whole.items():
            close(part[address], row[:length], rtol=1e-4)


def test_predictions_are_the_softmax_of_the_plain_models_logits(tiny_model: LoadedModel) -> None:
    table = scan(tiny_model, request(top_predictions=5))["predictions"]
    expected = plain_run(tiny_model).logits[0].softmax(-1).topk(5)
    assert table["position"].to_pylist() == [p for p in range(len(TOKENS)) for _ in range(5)]
    assert table["rank"].to_pylist() == list(range(5)) * len(TOKENS)
    assert table["token_id"].to_pylist() == expected.indices.flatten().tolist()
    close(table["probability"], expected.values.flatten())
    close(np.log(table["probability"]), table["log_probability"])


def test_neurons_are_the_strongest_inputs_of_the_mlps_output_matrix(
    tiny_model: LoadedModel, family: str
) -> None:
    names = models.NAMES[family]
    table = scan(tiny_model, request(top_neurons=3))["neurons"].to_pylist()
    for layer in range(tiny_model.architecture.n_layers):
        with seen(tiny_model.plain.get_submodule(f"{names.blocks}.{layer}.{names.w_out}")) as mlp:
            plain_run(tiny_model)
        rows = [row for row in table if row["component"] == f"blocks.{layer}.mlp"]
        best = mlp["in"].abs().topk(3).indices
        assert [row["neuron"] for row in rows] == best.flatten().tolist()
        assert [row["position"] for row in rows] == [
            p for p in range(len(TOKENS)) for _ in range(3)
        ]
        close([row["value"] for row in rows], mlp["in"].gather(-1, best).flatten())


def test_a_selection_gives_the_rows_and_columns_of_the_whole(tiny_model: LoadedModel) -> None:
    whole = values(scan(tiny_model)["activations"])
    asked = request(
        layers=("blocks.1.attn", "blocks.0.attn.head_2", "blocks.1.mlp", "unembed"),
        token_positions=(2, -1),
    )
    tables = scan(tiny_model, asked)
    part = values(tables["activations"])
    assert list(part) == [str(c) for c in asked.selected(tiny_model.architecture)]
    for address, row in part.items():
        close(row, whole[address][[2, len(TOKENS) - 1]])
    assert provenance_of(tables["activations"]).positions == (2, len(TOKENS) - 1)
    assert set(tables["predictions"]["position"].to_pylist()) == {2, len(TOKENS) - 1}
    assert set(tables["neurons"]["component"].to_pylist()) == {"blocks.1.mlp"}
    assert len(tables["tokens"]) == len(TOKENS)


def test_raw_keeps_the_vectors_of_what_was_selected_alone(tiny_model: LoadedModel) -> None:
    everything = vectors(scan(tiny_model, request(aggregation="raw")))
    asked = request(
        aggregation="raw", layers=("embed", "blocks.1.attn.head_1"), token_positions=(3,)
    )
    tables = scan(tiny_model, asked)
    assert {name for name in tables if name.startswith("vectors")} == {"vectors.embed", "vectors.1"}
    for address, rows in vectors(tables).items():
        close(rows, everything[address][[3]])


def test_without_the_residual_stream_no_residual_is_reported(tiny_model: LoadedModel) -> None:
    kinds = set(
        scan(tiny_model, request(include_residual=False))["activations"]["kind"].to_pylist()
    )
    assert kinds == {"embed", "attn", "head", "mlp", "unembed"}


@torch.inference_mode()
def test_percentiles_are_shares_of_the_calibrations_own_text(tiny_model: LoadedModel) -> None:
    asked = CalibrationScan(n_tokens=512, n_ordinary=32)
    calibration = calibrate(tiny_model, asked, Silent())
    ids = sampled_text(tiny_model, 512, seed=asked.seed, prefix=(), listener=Silent()).tolist()

    def of_text(text: list[int]) -> dict[str, pa.Table]:
        tokens = Tokens(
            ids=tuple(text), texts=("x",) * len(text), spans=tuple(Span(0, 0) for _ in text)
        )
        return scan_activations(
            tiny_model, request(), tokens, Silent(), calibration=calibration
        ).tables

    scanned = [of_text(text) for text in ids]
    norms = np.stack([list(values(t["activations"]).values()) for t in scanned], 1)[:, :, 1:]
    found = np.stack([list(values(t["percentile"]).values()) for t in scanned], 1)
    sinks = np.array([t["tokens"]["sink"].to_pylist() for t in scanned])
    assert np.isnan(found[:, sinks]).all()
    assert sinks[:, 0].all()
    assert not np.isnan(found[:, ~sinks]).any()
    for row in range(len(norms)):
        ordinary = np.sort(norms[row].ravel())
        below = np.searchsorted(ordinary, norms[row]) / len(ordinary)
        off = np.abs(found[row][:, 1:] - below)[~sinks[:, 1:]]
        assert off.max() <= 0.01 + 2 / len(ordinary)


def test_there_is_no_percentile_of_what_was_not_calibrated(tiny_model: LoadedModel) -> None:
    assert "percentile" not in scan(tiny_model)
    calibration = calibrate(tiny_model, CalibrationScan(n_tokens=256, n_ordinary=32), Silent())
    for aggregation in ("max", "mean", "raw"):
        asked = request(aggregation=aggregation)
        tables = scan_activations(
            tiny_model, asked, TOKENS, Silent(), calibration=calibration
        ).tables
        assert "percentile" not in tables
    asked = request(layers=("blocks.1.mlp", "blocks.0.attn.head_1"), token_positions=(0, 3))
    part = scan_activations(tiny_model, asked, TOKENS, Silent(), calibration=calibration).tables
    whole = scan_activations(
        tiny_model, request(), TOKENS, Silent(), calibration=calibration
    ).tables
    expected = values(whole["percentile"])
    for address, row in values(part["percentile"]).items():
        np.testing.assert_array_equal(row, expected[address][[0, 3]])
    assert provenance_of(part["percentile"]).table == "percentile"


def test_gathering_more_or_fewer_layers_changes_no_value(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = values(scan(tiny_model)["activations"])
    monkeypatch.setattr(layer_reading, "GATHERED_BYTES", 1)
    for address, row in values(scan(tiny_model)["activations"]).items():
        close(row, together[address])


def test_the_tables_are_as_their_schemas_say(tiny_model: LoadedModel) -> None:
    for name, table in scan(tiny_model, request(aggregation="raw")).items():
        schema = name.partition(".")[0]
        fields = SCHEMAS[schema].fields
        assert tuple(table.schema)[: len(fields)] == fields
        assert not any(field.nullable for field in table.schema)
        assert provenance_of(table).table == schema
        table.validate(full=True)


class Recorder(Silent):
    """Remembers what it heard; stops the scan after `stop_after` layers."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.told: list[ActivationFrame] = []
        self.layers: list[LayerFrame] = []
        self.steps: list[tuple[str, int, int]] = []
        self._stop_after = stop_after

    def progress(self, stage: str, done: int, total: int) -> None:
        self.steps.append((stage, done, total))

    def layer(self, layer: int, make: Callable[[], LayerFrame]) -> None:
        self.layers.append(make())

    def frames(self, make: Callable[[], Sequence[ActivationFrame]]) -> None:
        self.told += make()

    def checkpoint(self) -> None:
        if self._stop_after is not None and len(self.steps) >= self._stop_after:
            raise Cancelled


def test_frames_carry_exactly_the_stored_floats(tiny_model: LoadedModel) -> None:
    heard = Recorder()
    table = scan_activations(tiny_model, request(), TOKENS, heard).tables["activations"]
    stored = values(table)
    shape = tiny_model.architecture
    assert [frame.token_idx for frame in heard.told] == list(range(len(TOKENS)))
    for frame in heard.told:
        assert frame.token == TOKENS.texts[frame.token_idx]
        assert frame.unit == "L2 norm"
        expected: dict[str, tuple[str, ...]] = {"embed": ("embed",)}
        for layer in range(shape.n_layers):
            expected[f"blocks.{layer}.attn"] = tuple(
                str(Component.head(layer, head)) for head in range(shape.n_heads)
            )
            expected[f"blocks.{layer}.mlp"] = (f"blocks.{layer}.mlp",)
        assert {part.layer_id: part.activations for part in frame.layers} == {
            layer_id: tuple(float(stored[address][frame.token_idx]) for address in addresses)
            for layer_id, addresses in expected.items()
        }


def test_a_layer_is_told_as_it_is_computed(tiny_model: LoadedModel) -> None:
    heard = Recorder()
    table = scan_activations(tiny_model, request(), TOKENS, heard).tables["activations"]
    stored = values(table)
    n_layers = tiny_model.architecture.n_layers
    assert heard.steps == [("forward", done, n_layers) for done in range(1, n_layers + 1)]
    assert [frame.layer for frame in heard.layers] == list(range(n_layers))
    for frame in heard.layers:
        assert frame.token_idx == len(TOKENS) - 1
        assert frame.mlp == stored[f"blocks.{frame.layer}.mlp"][-1]
        assert frame.attn == stored[f"blocks.{frame.layer}.attn"][-1]
        assert frame.heads[1] == stored[f"blocks.{frame.layer}.attn.head_1"][-1]
        assert frame.resid_post == stored[f"blocks.{frame.layer}.resid_post"][-1]


def test_a_cancelled_scan_leaves_the_model_as_it_was(tiny_model: LoadedModel) -> None:
    before = scan(tiny_model)
    hooks = [len(module._forward_hooks) for module in tiny_model.plain.modules()]
    weights = {name: tensor.clone() for name, tensor in tiny_model.plain.state_dict().items()}
    with pytest.raises(Cancelled):
        scan_activations(tiny_model, request(), TOKENS, Recorder(stop_after=1))
    assert [len(module._forward_hooks) for module in tiny_model.plain.modules()] == hooks
    for name, tensor in tiny_model.plain.state_dict().items():
        assert torch.equal(tensor, weights[name])
    after = scan(tiny_model)
    assert all(after[name].equals(before[name]) for name in before)


def test_the_first_token_and_a_much_longer_one_are_sinks(
    tiny_models: dict[str, LoadedModel],
) -> None:
    # GPT-2 adds the embedding to the residual stream as it is, so a long one stays long.
    model = tiny_models["gpt2"]
    token = TOKENS.ids[4]
    assert TOKENS.ids.count(token) == 1
    assert scan(model)["tokens"]["sink"].to_pylist() == [True] + [False] * (len(TOKENS) - 1)
    embedding = model.plain.get_parameter("transformer.wte.weight")
    row = embedding[token].clone()
    try:
        embedding[token] = row * 1000
        assert scan(model)["tokens"]["sink"].to_pylist() == [
            position in (0, 4) for position in range(len(TOKENS))
        ]
    finally:
        embedding[token] = row


def test_a_prompt_beyond_the_context_is_refused(tiny_models: dict[str, LoadedModel]) -> None:
    with pytest.raises(PromptTooLong, match="65 tokens: expected 1 to 64"):
        scan_activations(tiny_models["gpt2"], request(), models.prompt(65), Silent())


def test_a_token_id_beyond_the_vocabulary_is_refused(tiny_models: dict[str, LoadedModel]) -> None:
    beyond = type(TOKENS)(ids=(models.D_VOCAB,), texts=("x",), spans=TOKENS.spans[:1])
    with pytest.raises(Unprocessable, match=f"expected 0 to {models.D_VOCAB - 1}"):
        scan_activations(tiny_models["gpt2"], request(), beyond, Silent())


def test_vectors_beyond_what_a_result_may_hold_are_refused(
    tiny_models: dict[str, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.scanner.activations.LARGEST_VECTORS_BYTES", 1000)
    with pytest.raises(Unprocessable, match="of at most 1000"):
        scan(tiny_models["gpt2"], request(aggregation=Aggregation.RAW))


def test_transformer_lens_shows_the_same_vectors_at_our_sites(tiny_model: LoadedModel) -> None:
    found = vectors(scan(tiny_model, request(aggregation="raw")))
    shape = tiny_model.architecture
    components = [c for c in reporting_order(shape) if c.kind != "head"]
    values_at: dict[Component, Tensor] = {}

    def keep(component: Component) -> Callable[..., None]:
        def read(value: Tensor, hook: object) -> None:
            values_at[component] = value[site(component).where][0]

        return read

    hooks: list[Any] = [(site(component).hook, keep(component)) for component in components]
    with torch.inference_mode():
        tiny_model.bridge.run_with_hooks(torch.tensor([TOKENS.ids]), fwd_hooks=hooks)
    for component in components:
        close(found[str(component)], values_at[component], rtol=1e-4)
