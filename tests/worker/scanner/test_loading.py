import errno
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTBigCodeConfig,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PretrainedConfig,
)

from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import UnsupportedModel
from tests import models
from worker.scanner import bridging, loading, verification
from worker.scanner.loading import LoadedModel

# Its signature is written for readers, not for type checkers.
_AutoModel: Any = AutoModelForCausalLM


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.save("llama", tmp_path / "tiny-llama")


def weights(model: LoadedModel) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.plain.state_dict().items()}


def test_both_twins_stand_on_the_same_tensors(tiny_model: LoadedModel) -> None:
    bridged = {tensor.data_ptr() for tensor in tiny_model.bridge.original_model.parameters()}
    assert set(weights(tiny_model).values()) <= bridged


def test_both_twins_predict_the_same(tiny_model: LoadedModel) -> None:
    ids = torch.tensor([models.prompt(9).ids])
    with torch.inference_mode():
        plain, bridged = tiny_model.plain(input_ids=ids).logits, tiny_model.bridge(ids)
    torch.testing.assert_close(plain, bridged, rtol=1e-4, atol=1e-5)


def test_no_parameter_wants_a_gradient(tiny_model: LoadedModel) -> None:
    for parameter in (*tiny_model.plain.parameters(), *tiny_model.bridge.parameters()):
        assert not parameter.requires_grad


def test_a_loaded_model_is_the_saved_one(tiny_model: LoadedModel, family: str) -> None:
    expected = models.build(family).state_dict()
    found = tiny_model.plain.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_memory_is_counted_a_storage_once(folder: Path) -> None:
    model = loading.load(folder, Numerics())
    own = 4 * sum(parameter.numel() for parameter in model.plain.parameters())
    grams = 4 * model.architecture.n_layers * model.architecture.n_heads * 8 * 8
    assert own + grams <= model.memory_bytes < own + grams + 4096


def test_a_released_model_holds_no_weights(folder: Path) -> None:
    model = loading.load(folder, Numerics())
    plain = model.plain
    gone = weakref.ref(model.bridge)
    model.release()
    assert gone() is None
    assert all(parameter.numel() == 0 for parameter in plain.parameters())


def test_the_fastest_attention_a_family_allows_is_its_own(family: str, tmp_path: Path) -> None:
    models.configuration(family).save_pretrained(tmp_path)
    # Gemma-2 caps its attention scores, which the fused kernel cannot.
    expected = "eager" if family == "gemma2" else "sdpa"
    assert loading.published_numerics(tmp_path) == Numerics(attention=expected)


def test_attention_that_a_family_cannot_do_is_refused(tmp_path: Path) -> None:
    folder = models.save("gemma2", tmp_path)
    with pytest.raises(UnsupportedModel, match="attention 'sdpa': expected 'eager'"):
        loading.load(folder, Numerics(attention="sdpa"))


def test_missing_weights_are_refused_instead_of_made_up(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        UnsupportedModel, match=r"missing keys: model.layers.1.mlp.down_proj.weight"
    ):
        loading.load(folder, Numerics())


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all", b"\xff" * 64])
def test_damaged_weights_are_refused(folder: Path, damage: bytes) -> None:
    (folder / "model.safetensors").write_bytes(damage)
    with pytest.raises(UnsupportedModel, match="tiny-llama cannot be loaded"):
        loading.load(folder, Numerics())


def test_pickled_weights_are_never_opened(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="tiny-llama cannot be loaded"):
        loading.load(folder, Numerics())


def test_code_that_comes_with_a_model_is_never_run(folder: Path) -> None:
    (folder / "trap.py").write_text("raise SystemExit('the trap was sprung')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="no configuration that transformers can read"):
        loading.load(folder, Numerics())


@pytest.mark.parametrize(
    "tensor", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.v_proj.weight"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_checkpoint_whose_weights_are_no_numbers_is_refused_by_their_name(
    folder: Path, tensor: str, value: float
) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[tensor][2, 3] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=f"weights are infinite or NaN in {tensor}$"):
        loading.load(folder, Numerics())


def test_a_family_whose_parts_mean_something_else_is_refused(tmp_path: Path) -> None:
    # Granite scales what a sublayer writes on its way into the residual stream.
    shape: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    GraniteForCausalLM(GraniteConfig(**shape, residual_multiplier=0.5)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"GraniteForCausalLM: .* of block 0 is off by"):
        loading.load(tmp_path, Numerics())


_SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("configuration", "refusal"),
    [
        (PhiConfig(**_SHAPE, intermediate_size=40, qk_layernorm=True), "bridge PhiForCausalLM"),
        (
            FalconConfig(**_SHAPE, num_kv_heads=2, new_decoder_architecture=True),
            "bridge FalconForCausalLM",
        ),
        (
            GPTBigCodeConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, multi_query=False),
            "bridge GPTBigCodeForCausalLM",
        ),
        (
            BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4),
            r"word_embeddings_layernorm\.weight belongs to no component",
        ),
    ],
    ids=lambda given: getattr(given, "model_type", None),
)
def test_a_variant_that_cannot_be_scanned_is_refused_by_name(
    configuration: PretrainedConfig, refusal: str, tmp_path: Path
) -> None:
    model: Any = _AutoModel.from_config(configuration)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=refusal):
        loading.load(tmp_path, loading.published_numerics(tmp_path))


@pytest.mark.parametrize("reader", ["_AutoConfig", "_AutoModel"])
def test_what_there_is_no_memory_for_now_is_no_fault_of_the_models(
    folder: Path, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(getattr(bridging, reader), "from_pretrained", full)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        loading.load(folder, Numerics())


def test_what_transformer_lens_lacks_memory_for_is_no_variant() -> None:
    with pytest.raises(MemoryError), bridging.understood("AnyForCausalLM"):
        raise MemoryError
    with pytest.raises(torch.OutOfMemoryError), bridging.understood("AnyForCausalLM"):
        raise torch.OutOfMemoryError
    with pytest.raises(UnsupportedModel), bridging.understood("AnyForCausalLM"):
        raise RuntimeError("shapes do not fit")


def test_the_scale_of_logits_is_the_one_that_the_model_applies(
    other_models: Callable[[str], LoadedModel], tiny_models: dict[str, LoadedModel]
) -> None:
    assert other_models("cohere").logit_scale == other_models("granite").logit_scale == 0.25
    assert all(model.logit_scale == 1.0 for model in tiny_models.values())


def test_logits_that_are_scaled_by_what_no_configuration_says_are_refused(
    other_models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = other_models("cohere")
    for twin in (model.plain, model.bridge.original_model):
        monkeypatch.setattr(twin, "logit_scale", 0.5)
    with pytest.raises(
        UnsupportedModel, match="CohereForCausalLM: what its unembedding reads is off by"
    ):
        verification.verify(model.plain, model.bridge, model.modules, model.architecture)


def test_a_model_in_half_precision_is_verified_within_its_precision(folder: Path) -> None:
    model = loading.load(folder, Numerics(dtype="bfloat16"))
    assert {parameter.dtype for parameter in model.plain.parameters()} == {torch.bfloat16}


def test_loading_leaves_the_global_random_state_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    loading.load(folder, Numerics())
    assert torch.equal(torch.random.get_rng_state(), before)
