"""What one suite measured of one checkpoint, as blocks of numbers, and where such records are kept.

A record is one Arrow file, a row a number: what was measured, of which prompt and component, and in
which replicate. Replicate 0 is the measurement; replicate 1 is the same number asked for in another way
that rounds otherwise, on some of the prompts: the two differ by numerical noise and nothing else.

A checkpoint is gated against what a record says, so a record is held against its own digest before it is believed.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from neural_mri.contract.baselines import Subject, record_key
from neural_mri.contract.problems import Gone
from neural_mri.contract.suites import Measure

__all__ = ("Block", "Quantity", "Record", "Records", "Values", "default_folder")

Values = npt.NDArray[np.float32]

FOLDER_VARIABLE = "NMRI_BASELINES"
_METADATA = b"neural_mri_record"
_DIGEST = b"neural_mri_sha256"
"""Beside the header, of whose bytes it is a digest too. Records of earlier versions have none."""


class Quantity(NamedTuple):
    """What a block's numbers are."""

    measure: Measure
    name: str
    """`l2_norm`, `entropy`, `kl`, ..."""


class Block(NamedTuple):
    """Numbers by prompt and component; NaN where one was not measured."""

    prompts: tuple[str, ...]
    """`case/number`; one empty name for what belongs to no prompt."""
    components: tuple[str, ...]
    """Addresses, in the order in which the model computes them; names of tensors; or one empty name."""
    values: Values

    def rows(self, prompts: tuple[str, ...]) -> Values:
        """The values of some of its prompts, in that order."""
        at = {prompt: row for row, prompt in enumerate(self.prompts)}
        return self.values[[at[prompt] for prompt in prompts]]

    def of_case(self, case: str) -> "Block":
        """The rows of one case's prompts."""
        rows = [row for row, name in enumerate(self.prompts) if name.rpartition("/")[0] == case]
        return Block(tuple(self.prompts[row] for row in rows), self.components, self.values[rows])


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    """What a record says of itself, beside its numbers."""

    subject: Subject
    suite: str
    suite_version: str
    suite_digest: str
    with_noise: bool
    set_aside: tuple[str, ...] = ()
    scan_keys: dict[str, str] = {}
    seconds: float = 0.0


class _Remembered(Subject, frozen=True, kw_only=True):
    """What was learnt of a checkpoint, as a file."""

    sha256: str | None = None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Everything measured of one checkpoint."""

    subject: Subject
    suite: str
    suite_version: str
    suite_digest: str
    blocks: Mapping[Quantity, Block]
    noise: Mapping[Quantity, Block] = {}
    """Replicate 1, of those prompts on which it was measured; empty where it was not asked for."""
    set_aside: tuple[str, ...] = ()
    """Prompts that this tokenizer cannot be asked."""
    scan_keys: Mapping[str, str] = {}
    """Scan key by `MODALITY:case/number`."""
    seconds: float = 0.0
    """What measuring it took."""

    @property
    def with_noise(self) -> bool:
        """Whether noise was measured too."""
        return bool(self.noise)

    @property
    def key(self) -> str:
        """Its address."""
        return record_key(self.subject, self.suite_digest, with_noise=self.with_noise)

    def block(self, measure: Measure, name: str) -> Block | None:
        """A block, where that was measured."""
        return self.blocks.get(Quantity(measure, name))

    def scan_key(self, modality: str, prompt: str) -> tuple[str, ...]:
        """The key of the scan that measured a prompt, if there is one."""
        key = self.scan_keys.get(f"{modality}:{prompt}")
        return () if key is None else (key,)

    def to_bytes(self) -> bytes:
        """The record as an Arrow file, compressed."""
        parts = [
            _long(quantity, block, replicate)
            for replicate, blocks in enumerate((self.blocks, self.noise))
            for quantity, block in blocks.items()
        ]
        table = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
        header = _Header(
            subject=self.subject,
            suite=self.suite,
            suite_version=self.suite_version,
            suite_digest=self.suite_digest,
            with_noise=self.with_noise,
            set_aside=self.set_aside,
            scan_keys=dict(self.scan_keys),
            seconds=self.seconds,
        )
        told = msgspec.json.encode(header)
        metadata = {_METADATA: told, _DIGEST: _digest(told, table)}
        table = table.replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    @classmethod
    def from_bytes(cls, body: bytes) -> "Record":
        """A record as it was stored. Raises `ValueError` for anything else."""
        try:
            with pa.ipc.open_file(pa.py_buffer(body)) as reader:
                table = reader.read_all()
            table.validate(full=True)
            metadata = table.schema.metadata or {}
            if not table.schema.equals(_SCHEMA):
                raise ValueError("their columns are others")
            if metadata.get(_DIGEST) not in (None, _digest(metadata[_METADATA], table)):
                raise ValueError("they have another digest than was written with them")
            header = msgspec.json.decode(metadata[_METADATA], type=_Header)
            replicates = _blocks(table)
        except (pa.ArrowException, msgspec.MsgspecError, OSError, LookupError, ValueError) as error:
            raise ValueError(f"these bytes are no record of a diagnosis: {error}") from error
        return cls(
            subject=header.subject,
            suite=header.suite,
            suite_version=header.suite_version,
            suite_digest=header.suite_digest,
            blocks=replicates.get(0, {}),
            noise=replicates.get(1, {}),
            set_aside=header.set_aside,
            scan_keys=header.scan_keys,
            seconds=header.seconds,
        )


_NAMES = ("measure", "quantity", "prompt", "component")
_SCHEMA = pa.schema(
    [
        *((name, pa.dictionary(pa.int32(), pa.string())) for name in _NAMES),
        ("replicate", pa.int8()),
        ("value", pa.float32()),
    ]
)


def _digest(header: bytes, table: pa.Table) -> bytes:
    """SHA-256 over what a record says of itself, its names and its numbers; hexadecimal digits."""
    digest = hashlib.sha256(header)
    for name in _NAMES:
        column = table[name].combine_chunks()
        digest.update(msgspec.json.encode(column.dictionary.to_pylist()))
        digest.update(column.indices.to_numpy())
    for name in ("replicate", "value"):
        digest.update(table[name].to_numpy())
    return digest.hexdigest().encode()


def _long(quantity: Quantity, block: Block, replicate: int) -> pa.Table:
    n_prompts, n_components = block.values.shape
    rows = n_prompts * n_components

    def repeated(names: tuple[str, ...], indices: npt.NDArray[np.int32]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(names, pa.string()))

    nothing = np.zeros(rows, np.int32)
    columns = {
        "measure": repeated((quantity.measure.value,), nothing),
        "quantity": repeated((quantity.name,), nothing),
        "prompt": repeated(
            block.prompts, np.repeat(np.arange(n_prompts, dtype=np.int32), n_components)
        ),
        "component": repeated(
            block.components, np.tile(np.arange(n_components, dtype=np.int32), n_prompts)
        ),
        "replicate": pa.array(np.full(rows, replicate, np.int8)),
        "value": pa.array(block.values.reshape(-1)),
    }
    return pa.table(columns)


def _blocks(table: pa.Table) -> dict[int, dict[Quantity, Block]]:
    """The blocks, by replicate. Rows of a block stand together, in the order they were written."""
    names = {name: table[name].combine_chunks() for name in _NAMES}
    indices = {name: column.indices.to_numpy() for name, column in names.items()}
    words = {name: column.dictionary.to_pylist() for name, column in names.items()}
    replicate = table["replicate"].to_numpy()
    values = table["value"].to_numpy()
    found: dict[int, dict[Quantity, Block]] = {}
    keys = np.stack([replicate, indices["measure"], indices["quantity"]])
    begins = np.r_[True, (np.diff(keys) != 0).any(0)][: len(values)]
    starts: list[int] = np.flatnonzero(begins).tolist()
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        prompts = list(dict.fromkeys(indices["prompt"][start:end].tolist()))
        width = (end - start) // len(prompts)
        components = indices["component"][start : start + width]
        quantity = Quantity(
            Measure(words["measure"][indices["measure"][start]]),
            words["quantity"][indices["quantity"][start]],
        )
        found.setdefault(int(replicate[start]), {})[quantity] = Block(
            tuple(words["prompt"][index] for index in prompts),
            tuple(words["component"][index] for index in components),
            values[start:end].reshape(len(prompts), width),
        )
    return found


class Records:
    """A folder of records under their keys. Safe to share between processes, and to cache between jobs."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or default_folder()

    def path(self, key: str) -> Path:
        """Where the record of that key is, or would be."""
        return self._folder / f"{key}.arrow"

    def get(self, key: str) -> Record | None:
        """The record of that key, if it is there. Raises `Gone` where its bytes are damaged: `put` replaces it."""
        try:
            body = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        try:
            record = Record.from_bytes(body)
        except ValueError as error:
            raise Gone(f"{self.path(key)} is damaged: {error}", key=key) from error
        if record.key != key:
            raise Gone(f"{self.path(key)} holds another record than its name says", key=key)
        return record

    def put(self, record: Record) -> str:
        """Keep a record, whole or not at all; its key."""
        self._write(self.path(record.key), record.to_bytes())
        return record.key

    def subject(self, contents: str) -> Subject | None:
        """What was learnt of a checkpoint whose files have these contents; None where nothing was, or it is damaged."""
        try:
            body = self._subject_path(contents).read_bytes()
            found = msgspec.json.decode(body, type=_Remembered)
        except (FileNotFoundError, UnicodeDecodeError, msgspec.MsgspecError):
            return None
        subject = msgspec.convert(found, Subject, from_attributes=True)
        return subject if found.sha256 in (None, _subject_digest(subject)) else None

    def remember(self, contents: str, subject: Subject) -> None:
        """Keep what was learnt of a checkpoint: it need not be opened to be recognised."""
        known = msgspec.structs.asdict(subject)
        body = msgspec.json.encode(_Remembered(**known, sha256=_subject_digest(subject)))
        self._write(self._subject_path(contents), body)

    def _subject_path(self, contents: str) -> Path:
        return self._folder / f"{contents}.subject.json"

    def _write(self, target: Path, body: bytes) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = target.with_suffix(f".{secrets.token_hex(4)}.part")
        try:
            workshop.write_bytes(body)
            workshop.replace(target)
        finally:
            workshop.unlink(missing_ok=True)


def _subject_digest(subject: Subject) -> str:
    return hashlib.sha256(msgspec.json.encode(subject)).hexdigest()


def default_folder() -> Path:
    """`NMRI_BASELINES`, or else a folder of the user's cache."""
    if wished := os.environ.get(FOLDER_VARIABLE):
        return Path(wished).expanduser()
    cache: Any = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "neural-mri" / "baselines"
