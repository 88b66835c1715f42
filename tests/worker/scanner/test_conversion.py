import errno
import hashlib
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open

from neural_mri.contract.problems import UnsupportedModel
from tests import models
from worker.scanner import conversion


@pytest.mark.smollm2
def test_the_bundled_model_becomes_a_folder_that_says_what_it_was(smollm2_folder: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in smollm2_folder.iterdir()
    }
    assert conversion.origin(smollm2_folder) == conversion.Origin(
        source="SmolLM2-135M-Instruct.Q4_1.gguf", quantization="Q4_1"
    )


@pytest.mark.smollm2
def test_converted_weights_are_the_files_own_values(smollm2_folder: Path) -> None:
    tensors = {tensor.name: tensor for tensor in GGUFReader(conversion.bundled_smollm2()).tensors}
    with safe_open(smollm2_folder / "model.safetensors", framework="pt") as weights:
        for theirs, ours in (
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
            ("blk.29.attn_output.weight", "model.layers.29.self_attn.o_proj.weight"),
        ):
            values = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
            assert torch.equal(weights.get_tensor(ours), values)


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF? No." * 100)
    with pytest.raises(UnsupportedModel, match=r"model.gguf is not a GGUF file"):
        conversion.convert_gguf(source, tmp_path / "store" / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_gguf_file_that_there_is_no_memory_for_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(conversion, "GGUFReader", full)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        conversion.convert_gguf(tmp_path / "model.gguf", tmp_path / "store" / "model")


def test_a_conversion_that_fails_midway_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_the_disk(_source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion, "_contents", lambda _source: ("Q4_1", 1))
    monkeypatch.setattr(conversion, "_write_model", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        conversion.convert_gguf(tmp_path / "model.gguf", tmp_path / "store" / "model")
    assert not list((tmp_path / "store").iterdir())


def test_a_folder_that_is_already_there_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, finished = tmp_path / "store" / "model", []
    monkeypatch.setattr(conversion, "_contents", lambda _source: (None, 1))
    for content in ("first", "second"):

        def write(_source: Path, folder: Path, content: str = content) -> None:
            (folder / "model.safetensors").write_text(content)

        monkeypatch.setattr(conversion, "_write_model", write)
        conversion.convert_gguf(
            tmp_path / "m.gguf", first, lambda done, total: finished.append((done, total))
        )
    assert (first / "model.safetensors").read_text() == "first"
    assert [path.name for path in first.parent.iterdir()] == ["model"]
    assert finished == [(0, 1), (1, 1)] * 2


def test_the_weights_digest_is_of_all_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, content in (("b", b"second"), ("a", b"first")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    assert conversion.weights_digest(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()
    (tmp_path / "c.safetensors").write_bytes(b"!")
    assert conversion.weights_digest(tmp_path) == hashlib.sha256(b"firstsecond!").hexdigest()


def test_saving_a_model_twice_gives_one_digest(tmp_path: Path) -> None:
    digests = {
        conversion.weights_digest(models.save("llama", tmp_path / name, seed=seed))
        for name, seed in (("one", 0), ("two", 0))
    }
    assert len(digests) == 1
    other = models.save("llama", tmp_path / "other", seed=1)
    assert conversion.weights_digest(other) not in digests


def test_a_folder_without_what_a_digest_is_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedModel, match=r"holds no .*safetensors"):
        conversion.weights_digest(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"holds no tokenizer.json"):
        conversion.tokenizer_digest(tmp_path)
    assert conversion.origin(tmp_path) is None
