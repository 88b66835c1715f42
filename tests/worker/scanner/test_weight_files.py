"""What is read from a model folder, and what is refused."""

import errno
import json
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neural_mri.contract.problems import UnsupportedModel
from tests import models
from worker.scanner import bridging, topology
from worker.scanner.weight_files import WeightFiles

Tensors = dict[str, Tensor]


def opened(folder: Path) -> WeightFiles:
    model = bridging.skeleton(bridging.read_configuration(folder))
    return WeightFiles.open(folder, model, topology.parameter_rows(model, topology.examine(model)))


def rewritten(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The folder with the tensors of its file changed."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)
    return folder


def values(files: WeightFiles, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    tensor = files.parameters[name]
    return tensor.read(slice(None), np.empty(tensor.numel, np.float32)).reshape(tensor.shape)


def test_every_parameter_is_found_once_as_the_model_names_it(family: str, tmp_path: Path) -> None:
    files = opened(models.save(family, tmp_path))
    parameters = dict(models.build(family).named_parameters())
    assert list(files.parameters) == list(parameters)
    assert not files.buffers
    for name, parameter in parameters.items():
        np.testing.assert_array_equal(values(files, name), parameter.detach().numpy())


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    model = models.build("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    files = opened(tmp_path)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(values(files, name), parameter.detach().numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_the_float32_it_stands_for(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def halved(tensors: Tensors) -> Tensors:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    files = opened(rewritten(models.save("llama", tmp_path), halved))
    for name, parameter in models.build("llama").named_parameters():
        exact = parameter.detach().to(dtype).float().numpy()
        np.testing.assert_array_equal(values(files, name), exact)
        tensor = files.parameters[name]
        if tensor.is_matrix:
            numbers = np.array([2, 0, 1])
            np.testing.assert_array_equal(tensor.lines(1, numbers), exact[:, numbers].T)
            np.testing.assert_array_equal(tensor.lines(0, numbers + 1), exact[numbers + 1])


def test_bare_names_and_masks_are_read_as_on_the_hub(tmp_path: Path) -> None:
    """GPT-2 is published without its model's name in front, and with its causal masks."""

    def published(tensors: Tensors) -> Tensors:
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        mask = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        return {**bare, "h.0.attn.bias": mask, "h.1.attn.bias": mask.clone()}

    files = opened(rewritten(models.save("gpt2", tmp_path), published))
    assert list(files.parameters) == [name for name, _ in models.build("gpt2").named_parameters()]
    assert len(files.buffers) == 2


@pytest.mark.parametrize("stored_as", ["both", "lm_head.weight"])
def test_a_tied_unembedding_is_one_tensor_whichever_way_it_is_stored(
    stored_as: str, tmp_path: Path
) -> None:
    def twice(tensors: Tensors) -> Tensors:
        embedding = tensors["model.embed_tokens.weight"]
        if stored_as != "both":
            del tensors["model.embed_tokens.weight"]
        return {**tensors, "lm_head.weight": embedding.clone()}

    files = opened(rewritten(models.save("llama", tmp_path), twice))
    assert "lm_head.weight" not in {**files.parameters, **files.buffers}
    exact = models.build("llama").get_parameter("model.embed_tokens.weight").detach().numpy()
    np.testing.assert_array_equal(values(files, "model.embed_tokens.weight"), exact)


def test_what_is_missing_misshapen_or_unreadable_is_refused_by_name(tmp_path: Path) -> None:
    name = "model.norm.weight"

    def refused(change: Callable[[Tensors], Tensors], message: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(UnsupportedModel, match=message):
            opened(rewritten(models.save("llama", folder), change))

    refused(
        lambda tensors: {k: v for k, v in tensors.items() if k != name}, f"no weights for {name}"
    )
    refused(lambda tensors: {**tensors, name: torch.ones(7)}, rf"{name} has shape \(7,\)")
    refused(
        lambda tensors: {**tensors, name: torch.ones(32, dtype=torch.int8)},
        f"{name} is stored as I8: expected F32, F16, BF16",
    )


def test_a_damaged_file_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    path = models.save("gpt2", tmp_path) / "model.safetensors"
    body = path.read_bytes()
    for length in (0, 4, 100, len(body) // 2, len(body) - 1):
        path.write_bytes(body[:length])
        with pytest.raises(UnsupportedModel, match=r"model\.safetensors is not a safetensors file"):
            opened(tmp_path)
    path.write_bytes((2**40).to_bytes(8, "little") + body[8:])
    with pytest.raises(UnsupportedModel, match="bytes long"):
        opened(tmp_path)


def test_a_file_that_there_is_no_memory_for_now_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    folder = models.save("gpt2", tmp_path)
    monkeypatch.setattr(mmap, "mmap", full)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        opened(folder)


def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    folder = models.save("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    with pytest.raises(UnsupportedModel, match=r"neither model\.safetensors nor"):
        opened(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(UnsupportedModel, match="which is not there"):
        opened(folder)
    index.write_text("[]")
    with pytest.raises(UnsupportedModel, match="not an index"):
        opened(folder)
