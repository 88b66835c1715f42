"""Weight files as they lie on disk: which tensors there are, and their values a stretch at a time.

Files are mapped, never loaded. What has been looked at is dropped from memory again, so that a model of
any size is read in the space of its largest tensor. The layout is that of safetensors: eight bytes for
the length of a JSON header, the header, the tensors' bytes.
"""

import mmap
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from neural_mri.contract.problems import UnsupportedModel
from worker.scanner.refusing import refused
from worker.scanner.topology import ParameterRow

__all__ = ("FloatArray", "StoredTensor", "WeightFiles", "shards")

FloatArray = npt.NDArray[np.float32]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000
"""Bytes; the bound of the safetensors library."""

# numpy has no bfloat16: its values are the upper halves of float32 values.
_STORED_AS: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
}


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in a safetensors header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class StoredTensor:
    """One tensor on disk. Seen as a matrix: a vector is one row. Values are given as float32."""

    def __init__(self, stored_name: str, entry: _Entry, mapped: mmap.mmap, start: int) -> None:
        self.stored_name = stored_name
        self.dtype = entry.dtype
        """As the file names it: `F32`, `F16`, `BF16`."""
        self.shape = entry.shape
        self.numel = prod(entry.shape)
        self.n_bytes = entry.data_offsets[1] - entry.data_offsets[0]
        self.n_columns = entry.shape[-1] if entry.shape else 1
        self.n_rows = self.numel // self.n_columns if self.n_columns else 0
        self._mapped = mapped
        self._start = start + entry.data_offsets[0]

    @property
    def is_matrix(self) -> bool:
        """Whether this is a matrix, and not a vector of biases or gains."""
        return len(self.shape) > 1

    def read(self, rows: slice | npt.NDArray[np.intp], into: FloatArray) -> FloatArray:
        """The values of some rows, `[rows, columns]`.

        A stretch of what is stored as float32 is given as it lies in the file, not to be written to; all else
        is put into the first elements of `into`.
        """
        stored = self._stored()[rows]
        if self.dtype == "F32" and isinstance(rows, slice):
            return stored.view(np.float32)
        return self._decoded(stored, into[: stored.size].reshape(stored.shape))

    def lines(self, axis: int, numbers: npt.NDArray[np.intp]) -> FloatArray:
        """The values of some rows (`axis` 0) or columns (1), a line after the other."""
        in_a_row = bool((np.diff(numbers) == 1).all())
        which = slice(int(numbers[0]), int(numbers[-1]) + 1) if in_a_row else numbers
        stored = self._stored()[:, which].T if axis else self._stored()[which]
        if self.dtype == "F32":
            return stored.view(np.float32)
        return self._decoded(stored, np.empty(stored.shape, np.float32))

    def _stored(self) -> npt.NDArray[np.generic]:
        return np.frombuffer(self._mapped, _STORED_AS[self.dtype], self.numel, self._start).reshape(
            self.n_rows, self.n_columns
        )

    def _decoded(self, stored: npt.NDArray[np.generic], into: FloatArray) -> FloatArray:
        if self.dtype == "BF16":
            halves = into.view(np.uint32)
            np.copyto(halves, stored)
            np.left_shift(halves, 16, out=halves)
        else:
            np.copyto(into, stored)
        return into

    def forget(self) -> None:
        """Let the operating system drop the tensor's pages from this process."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = -(-self._start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (self._start + self.n_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                self._mapped.madvise(mmap.MADV_DONTNEED, first, length)


class WeightFiles(NamedTuple):
    """The tensors of a model folder."""

    parameters: dict[str, StoredTensor]
    """By the name that the parameter has in the model, in the model's order, each storage once."""
    buffers: dict[str, StoredTensor]
    """What else is in the files: causal masks, rotary frequencies. No weights."""

    @classmethod
    def open(
        cls, folder: Path, model: PreTrainedModel, rows: Sequence[ParameterRow]
    ) -> "WeightFiles":
        """The files of `folder`, which holds the model whose skeleton and parameters are given.

        Names and layout are matched as transformers matches them when it loads the model. Raises
        `UnsupportedModel` when a parameter is missing, has another shape, or is stored in a form that
        cannot be read as it is.
        """
        expected = {row.name: row for row in rows}
        found: dict[str, StoredTensor] = {}
        buffers: dict[str, StoredTensor] = {}
        rename = _Renaming(model)
        for tensor in _stored(shards(folder), folder.name):
            name = rename(tensor.stored_name)
            row = expected.get(name)
            if row is None:
                buffers[name] = tensor
                continue
            if tensor.dtype not in _STORED_AS:
                raise UnsupportedModel(
                    f"{folder.name}: {tensor.stored_name} is stored as {tensor.dtype}: expected "
                    f"{', '.join(_STORED_AS)}"
                )
            if tensor.shape != row.shape:
                raise UnsupportedModel(
                    f"{folder.name}: {tensor.stored_name} has shape {tensor.shape}: expected "
                    f"{row.shape}"
                )
            # Tied weights may be stored under either name, or under both.
            found.setdefault(row.tied_to or name, tensor)
        own = [row.name for row in rows if not row.tied_to]
        missing = [name for name in own if name not in found]
        if missing:
            raise UnsupportedModel(f"{folder.name} holds no weights for {missing[0]}")
        return cls({name: found[name] for name in own}, buffers)


class _Renaming:
    """From a stored name to the model's own, by transformers' table for the family."""

    def __init__(self, model: PreTrainedModel) -> None:
        steps = get_model_conversion_mapping(model)
        self._renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self._converters = [step for step in steps if isinstance(step, WeightConverter)]
        self._prefix: str = model.base_model_prefix
        self._known: dict[str, Any] = model.state_dict()
        self._modules = {name for name, _ in model.named_modules()}

    def __call__(self, stored_name: str) -> str:
        name: str
        name, converter = rename_source_key(
            stored_name, self._renamings, self._converters, self._prefix, self._known
        )
        if converter is not None:
            raise UnsupportedModel(
                f"{stored_name} is stored in another layout than the model uses ({converter}): "
                "expected weights that need no conversion"
            )
        if name not in self._known and self._prefixed(name).rpartition(".")[0] in self._modules:
            return self._prefixed(name)  # a buffer of a file that leaves the model's name out
        return name

    def _prefixed(self, name: str) -> str:
        return f"{self._prefix}.{name}"


def shards(folder: Path) -> tuple[Path, ...]:
    """The files that a load of the folder would read: one, or those that its index names.

    Raises `UnsupportedModel` when there are none.
    """
    single = folder / _SINGLE
    if single.exists():
        return (single,)
    try:
        index = msgspec.json.decode((folder / _INDEX).read_bytes())
        names: Iterable[str] = sorted(set(index["weight_map"].values()))
    except FileNotFoundError as error:
        raise UnsupportedModel(f"{folder.name} holds neither {_SINGLE} nor {_INDEX}") from error
    except (msgspec.DecodeError, TypeError, KeyError, AttributeError) as error:
        raise UnsupportedModel(f"{folder.name}: {_INDEX} is not an index of weights") from error
    paths = tuple(folder / name for name in names)
    for path in paths:
        if path.parent != folder or not path.exists():
            raise UnsupportedModel(f"{folder.name}: {_INDEX} names {path.name}, which is not there")
    return paths


def _stored(paths: Sequence[Path], folder: str) -> Iterable[StoredTensor]:
    for path in paths:
        says = f"{folder}: {path.name} is not a safetensors file"
        with refused(says, OSError, ValueError, msgspec.MsgspecError):
            yield from _tensors(path)


def _tensors(path: Path) -> Iterable[StoredTensor]:
    """The tensors of one file. Raises `ValueError` when header and contents do not fit."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(mapped[:8], "little")
    start = 8 + length
    if not 0 < length <= _LONGEST_HEADER or start > len(mapped):
        raise ValueError(f"its header would be {length} bytes long")
    header: dict[str, Any] = msgspec.json.decode(mapped[8:start], type=dict[str, Any])
    header.pop("__metadata__", None)
    for name, fields in header.items():
        entry = msgspec.convert(fields, _Entry)
        first, last = entry.data_offsets
        if not 0 <= first <= last <= len(mapped) - start:
            raise ValueError(f"{name} lies outside the file")
        stored_as = _STORED_AS.get(entry.dtype)
        if (
            stored_as is not None
            and last - first != prod(entry.shape) * np.dtype(stored_as).itemsize
        ):
            raise ValueError(
                f"{name} has {last - first} bytes, which is not {entry.shape} {entry.dtype}"
            )
        yield StoredTensor(name, entry, mapped, start)
