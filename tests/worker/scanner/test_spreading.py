"""A model whose weights are spread over devices is the same model.

On devices that are pretended: an operation on tensors of two of them is refused as on real ones, and the
arithmetic is the CPU's, so that numbers differ by no more than the order of a sum.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig

from neural_mri.contract.anomalies import Lens
from neural_mri.contract.circuits import CircuitScan
from neural_mri.contract.models import Numerics
from neural_mri.contract.perturbations import (
    Amplify,
    Noise,
    PatchingScan,
    PerturbationScan,
    TracingScan,
    ZeroAblation,
)
from neural_mri.contract.problems import UnsupportedModel
from neural_mri.contract.scans import ActivationScan, Aggregation, AnomalyScan, AttentionScan
from tests import models
from tests.models import prompt
from tests.worker.scanner.devices import PretendDevices, device, moved
from worker.scanner import bridging, verification
from worker.scanner.activations import scan_activations
from worker.scanner.anomalies import scan_anomalies
from worker.scanner.attention import scan_attention
from worker.scanner.circuits import scan_circuits
from worker.scanner.listening import Silent
from worker.scanner.loading import LoadedModel
from worker.scanner.patching import scan_patching
from worker.scanner.perturbation import scan_perturbation
from worker.scanner.prompts import ScanOutput
from worker.scanner.spreading import places
from worker.scanner.tracing import scan_tracing

MIB = 1 << 20
CLEAN, CORRUPT = prompt(7), prompt(7, seed=1)
SILENT = Silent()


@pytest.fixture
def spread(family: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadedModel]:
    """A model whose blocks stand on two devices, its ends on a third, and those devices."""
    for module in ("generalized_components.joint_qkv_attention", "supported_architectures.phi3"):
        # It takes a pretended device for the one that has no numbers.
        monkeypatch.setattr(
            f"transformer_lens.model_bridge.{module}.require_readable_weight",
            lambda weight, *_, **__: weight,
        )
    plain = models.build(family).requires_grad_(False)
    with PretendDevices():  # type: ignore[no-untyped-call]  # torch says no types
        blocks = plain.get_submodule(models.NAMES[family].blocks)
        for layer, block in enumerate(blocks.children()):
            moved(block, device(1 + layer % 2))
        yield LoadedModel(plain, Numerics(), ())


def numbers(output: ScanOutput) -> dict[str, Any]:
    """Of every table, in order of size: what is nearly equally strong may change places."""
    found = {}
    for name, table in output.tables.items():
        for field in table.schema:
            kind = getattr(field.type, "value_type", field.type)
            if pa.types.is_floating(kind):
                values = np.asarray(table[field.name].to_pylist(), dtype=np.float64)
                found[f"{name}: {field.name}"] = np.sort(values.ravel())
    return found


def test_the_parts_of_a_spread_model_mean_what_they_say(spread: LoadedModel) -> None:
    on = {str(parameter.device) for parameter in spread.plain.parameters()}
    assert on >= {"cpu", "meta:1"}
    assert spread.device.type == "cpu"
    assert 0 < spread.main_bytes < spread.memory_bytes
    verification.verify(spread.plain, spread.bridge, spread.modules, spread.architecture)


Scan = Callable[[LoadedModel], ScanOutput]


def patching(model: LoadedModel) -> ScanOutput:
    scan = PatchingScan(prompt="x", corrupt_prompt="y")
    return scan_patching(model, scan, CLEAN, CORRUPT, SILENT, answer_id=5, foil_id=6)


def circuits(model: LoadedModel) -> ScanOutput:
    scan = CircuitScan(prompt="x", corrupt_prompt="y", answer=5, foil=6)
    return scan_circuits(model, scan, CLEAN, CORRUPT, 5, 6, SILENT, None)


def perturbation(model: LoadedModel) -> ScanOutput:
    done = (
        ZeroAblation(component="blocks.0.attn.h1"),
        Amplify(component="blocks.1.mlp", factor=2.0),
        Noise(component="blocks.0.mlp", draws=2),
    )
    scan = PerturbationScan(prompt="x", perturbations=done)
    return scan_perturbation(model, scan, CLEAN, SILENT, sources={})


def tracing(model: LoadedModel) -> ScanOutput:
    scan = TracingScan(prompt="abcdefg", subject="bc", draws=2)
    return scan_tracing(model, scan, CLEAN, SILENT, answer_id=5)


SCANS: dict[str, Scan] = {
    "activations": lambda model: scan_activations(model, ActivationScan(prompt="x"), CLEAN, SILENT),
    "vectors": lambda model: scan_activations(
        model, ActivationScan(prompt="x", aggregation=Aggregation.RAW), CLEAN, SILENT
    ),
    "attention": lambda model: scan_attention(
        model, AttentionScan(prompt="x", layers=(0, 1)), CLEAN, SILENT
    ),
    "anomalies": lambda model: scan_anomalies(
        model, AnomalyScan(prompt="x", lens=Lens.RAW), CLEAN, SILENT, calibration=None
    ),
    "circuits": circuits,
    "perturbation": perturbation,
    "patching": patching,
    "tracing": tracing,
}


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"], indirect=True)
def test_a_spread_model_gives_the_same_numbers(
    spread: LoadedModel, tiny_model: LoadedModel
) -> None:
    for name, scan in SCANS.items():
        found, expected = numbers(scan(spread)), numbers(scan(tiny_model))
        assert found.keys() == expected.keys()
        assert found
        for column, values in expected.items():
            np.testing.assert_allclose(
                found[column], values, rtol=1e-4, atol=1e-5, err_msg=f"{name}, {column}"
            )


def skeleton(**changes: Any) -> Any:
    """A model of eight equal blocks."""
    shape = {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    }
    return bridging.skeleton(LlamaConfig(**{**shape, **changes}))


def size(part: Any) -> int:
    return sum(parameter.numel() * 4 for parameter in part.parameters())


def test_what_fits_on_one_device_is_not_spread() -> None:
    model = skeleton()
    assert places(model, [size(model), MIB], [0, 0], torch.float32) is None
    assert places(model, [size(model) // 2, MIB], [0, 0], torch.float16) is None


def test_blocks_stand_whole_and_in_order_and_every_device_is_as_full_as_the_others() -> None:
    model = skeleton()
    block, ends = size(model.model.layers[0]), size(model) - 8 * size(model.model.layers[0])
    free = [6 * block + ends, 6 * block, 6 * block]
    found = places(model, free, free, torch.float32)
    assert found is not None
    on = [found[f"model.layers.{layer}"] for layer in range(8)]
    assert on == sorted(on)
    assert sorted(on.count(index) for index in range(3)) == [2, 3, 3]
    assert {name: found[name] for name in ("model.embed_tokens", "model.norm", "lm_head")} == {
        "model.embed_tokens": 0,
        "model.norm": 0,
        "lm_head": 0,
    }


def test_no_device_holds_more_than_it_has() -> None:
    model = skeleton()
    block, ends = size(model.model.layers[0]), size(model) - 8 * size(model.model.layers[0])
    free = [ends + block, 5 * block + 7, 2 * block]
    found = places(model, free, free, torch.float32)
    assert found is not None
    on = [found[f"model.layers.{layer}"] for layer in range(8)]
    assert [on.count(index) for index in range(3)] == [1, 5, 2]


def test_what_fits_on_no_devices_is_refused_with_what_they_have() -> None:
    model = skeleton()
    block, ends = size(model.model.layers[0]), size(model) - 8 * size(model.model.layers[0])
    for free in ([size(model) // 3] * 2, [ends - 1, 9 * block]):
        with pytest.raises(
            UnsupportedModel, match=r"do not fit block by block .* and 0\.0 GiB for"
        ):
            places(model, free, free, torch.float32)


@pytest.mark.parametrize("has_blocks", [True, False])
def test_what_fits_on_devices_without_others_lacks_memory_for_now(*, has_blocks: bool) -> None:
    model = skeleton()
    block, ends = size(model.model.layers[0]), size(model) - 8 * size(model.model.layers[0])
    crowded, first = [ends - 1, 9 * block], [size(model), 0]
    alone = [4 * block + ends] * 2
    if not has_blocks:
        model._no_split_modules = None
    with pytest.raises(MemoryError, match=r"beside what is there: .* and 0\.0 GiB free"):
        places(model, crowded, alone if has_blocks else first, torch.float32)
    with pytest.raises(MemoryError):
        places(model, crowded, first, torch.float32)
    with pytest.raises(UnsupportedModel):
        places(model, crowded, crowded, torch.float32)


def test_every_weight_has_a_place(family: str) -> None:
    model = bridging.skeleton(models.configuration(family))
    half = size(model) * 2 // 3
    found = places(model, [half] * 3, [half] * 3, torch.float32)
    assert found is not None
    for name, _ in model.named_parameters():
        assert any(name.startswith(f"{place}.") for place in found), name
