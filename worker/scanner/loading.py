"""From a model folder to a model that can be scanned, and back out of memory.

A model is held as a *plain twin*, which runs as Hugging Face wrote it and is read by hooks of our own,
and as a *bridge* with TransformerLens's hook points for everything that needs attention patterns or
intervenes. Both stand on the same tensors.
"""

import ctypes
import gc
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from neural_mri.contract.models import Architecture, Numerics
from neural_mri.contract.problems import UnsupportedModel
from worker.scanner import bridging, linear_maps, sites, spreading, topology, verification
from worker.scanner.conversion import TOKENIZER_FILE
from worker.scanner.output_maps import OutputMaps, output_maps

__all__ = ("LoadedModel", "load", "published_numerics")


class LoadedModel:
    """A model on its device. One thread at a time: hooks are global to a module."""

    plain: PreTrainedModel
    """As Hugging Face runs it; costs what a plain forward costs."""
    bridge: TransformerBridge
    """With TransformerLens's hook points, on the same tensors."""
    modules: sites.PlainModules
    output_maps: OutputMaps
    logit_scale: float = 1.0
    """What the model multiplies by what its unembedding reads, before a soft-cap; verified."""

    def __init__(
        self,
        plain: PreTrainedModel,
        numerics: Numerics,
        vocabulary: tuple[str, ...],
        prefix: tuple[int, ...] = (),
    ) -> None:
        spreading.gather(plain, plain.device)
        anatomy = topology.examine(plain)
        # A part that belongs to no component is in no picture, and in nothing that is computed here.
        topology.parameter_rows(plain, anatomy)
        self.architecture: Architecture = anatomy.architecture
        self.numerics = numerics
        self.vocabulary = vocabulary
        """Text of each token id, as it reads after another token; empty without a tokenizer."""
        self.prefix = prefix
        """What the tokenizer puts before every prompt: a BOS, mostly, or nothing."""
        self.plain = plain
        self.modules = sites.modules(
            plain, anatomy.paths, parallel_blocks=self.architecture.parallel_blocks
        )
        self.output_maps = output_maps(self.modules, self.architecture, self.device)
        self.bridge = bridging.bridge(plain)
        for twin in (self.plain, self.bridge):
            spreading.follow_weights(twin, self.device)
            linear_maps.take_over(twin)

    @property
    def device(self) -> torch.device:
        """Where activations are; the weights too, unless they are spread over several devices."""
        device: torch.device = self.plain.device
        return device

    def text(self, token_id: int) -> str:
        """A token's text; empty where the model came without a tokenizer, or has ids beyond it."""
        return self.vocabulary[token_id] if token_id < len(self.vocabulary) else ""

    @property
    def memory_bytes(self) -> int:
        """Memory the model takes on its devices: each storage once, whoever shares it."""
        return _bytes_of(self._all_tensors())

    @property
    def main_bytes(self) -> int:
        """Of them, those on the device where activations are: all, unless the weights are spread."""
        return _bytes_of(each for each in self._all_tensors() if each.device == self.device)

    def _all_tensors(self) -> Iterator[Tensor]:
        yield from _tensors(self.plain)
        yield from _tensors(self.bridge)
        yield from self.output_maps.tensors()

    def release(self) -> None:
        """Give the memory back, to the device and to the operating system. Good for nothing after."""
        for tensor in (*_tensors(self.plain), *_tensors(self.bridge)):
            # Whoever still holds a module holds no weights.
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        del self.plain, self.bridge, self.modules, self.output_maps
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if sys.platform == "linux":
            # glibc keeps freed memory for itself until it is told to give it back.
            ctypes.CDLL(None).malloc_trim(0)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Each storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def load(
    folder: Path,
    numerics: Numerics,
    free_bytes: Sequence[int] = (),
    total_bytes: Sequence[int] = (),
) -> LoadedModel:
    """Load a model folder: `config.json`, safetensors, and `tokenizer.json` for the texts.

    On GPUs with so many bytes free, of so many in all, it is spread where the first is too small for it.

    Nothing else is read, nothing is downloaded, no code of the model's is run. The model is verified
    before it is handed out. Raises `UnsupportedModel`, naming what is missing or does not hold, and
    `MemoryError` where only what is free now is too small for it.
    """
    possible = published_numerics(folder).attention
    if numerics.attention not in (possible, "eager"):
        raise UnsupportedModel(
            f"{folder.name} cannot run with attention {numerics.attention!r}: expected {possible!r} "
            "or 'eager'"
        )
    tokenizer = _tokenizer(folder / TOKENIZER_FILE)
    places = None
    if len(free_bytes) > 1:
        skeleton = bridging.skeleton(bridging.read_configuration(folder))
        dtype = getattr(torch, numerics.dtype)
        places = spreading.places(skeleton, free_bytes, total_bytes, dtype)
    model = LoadedModel(
        bridging.plain_model(folder, numerics, places),
        numerics,
        () if tokenizer is None else _vocabulary(tokenizer),
        () if tokenizer is None else _prefix(tokenizer),
    )
    try:
        model.logit_scale = verification.verify(
            model.plain, model.bridge, model.modules, model.architecture
        )
    except UnsupportedModel:
        model.release()
        raise
    return model


def published_numerics(folder: Path, *, dtype: str = "float32", device: str = "cpu") -> Numerics:
    """The numerics a model runs with unless told otherwise: the fastest attention that it allows."""
    skeleton = bridging.skeleton(bridging.read_configuration(folder))
    attention: str = skeleton.config._attn_implementation  # noqa: SLF001  transformers has no other way
    return Numerics(dtype=dtype, device=device, attention=attention)


def _tokenizer(path: Path) -> Tokenizer | None:
    return Tokenizer.from_file(str(path)) if path.exists() else None


def _prefix(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens before a text."""
    encoding = tokenizer.encode("a")
    added = itertools.takewhile(
        lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    )
    return tuple(token_id for token_id, _ in added)


def _vocabulary(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Every token's text. A token alone may lose its leading space, so each is read after another."""
    before = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    prefix = tokenizer.decode(before, skip_special_tokens=False)
    texts = tokenizer.decode_batch(
        [[*before, token_id] for token_id in range(tokenizer.get_vocab_size())],
        skip_special_tokens=False,
    )
    return tuple(text.removeprefix(prefix) for text in texts)
