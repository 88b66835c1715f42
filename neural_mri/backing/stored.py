"""What a result is in the store: one file, or a manifest whose tables stand beside it or under their own hash.

A packed result is its manifest, one line of JSON, and then its tables, Arrow IPC files, in the manifest's
order, each from the next multiple of `ALIGNMENT` bytes on: where each lies follows from the manifest, which
`head -1` shows. A manifest alone is what a large result has, a calibration, and a result that a session keeps.
The path says which of them stands there (`keys.table_path`). Tables of an attempt are its own: what is
deleted with it is needed by nobody else. Knows nothing of jobs' states.

No byte is believed that is not the one that was written: tables are named by their hash, and a manifest ends
with its own, its seal.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec
import pyarrow as pa

from neural_mri.backing import keys
from neural_mri.backing.storage import Damaged, Missing, Store
from neural_mri.contract.problems import Gone
from neural_mri.contract.results import Manifest, TableRef, from_ipc

__all__ = (
    "ALIGNMENT",
    "HEAD_BYTES",
    "StoredResult",
    "StoredTable",
    "by_itself",
    "discard",
    "files_of",
    "is_whole",
    "load_manifest",
    "open_result",
    "pack",
    "read_bytes",
    "read_part",
    "read_table",
    "read_tables",
    "sealed",
)

ALIGNMENT = 64
"""As Arrow aligns buffers in a file: in a memory map those of a packed table lie as well as those of any."""
HEAD_BYTES = 64 << 10
"""What is read of a packed result first where not all of it is wanted: its manifest, and often all there is."""

_END = b"\n"
"""Of the manifest: in the JSON itself there is none."""

_SEAL = re.compile(rb',"seal":"([0-9a-f]{64})"\}\Z')
"""SHA-256 of all that stands before it."""
_FIRST_SEALED = 2
"""The version of manifests from which on each has a seal."""

_manifest = msgspec.json.Decoder(Manifest)


class StoredTable(NamedTuple):
    """A table, and where its bytes are."""

    ref: TableRef
    path: str
    start: int
    """Its first byte's number in the file."""

    @property
    def end(self) -> int:
        """The number of the byte after its last."""
        return self.start + self.ref.bytes


def by_itself(manifest: str, ref: TableRef) -> StoredTable:
    """A table that is a file, by where the manifest that names it stands."""
    return StoredTable(ref, keys.table_path(manifest, ref.chunk), 0)


def sealed(manifest: Manifest) -> bytes:
    """A manifest as it is stored: its JSON, with its seal as the last member.

    Whoever knows of no seals reads past it.
    """
    body = msgspec.json.encode(manifest)[:-1]
    return b'%b,"seal":"%b"}' % (body, hashlib.sha256(body).hexdigest().encode())


def pack(manifest: bytes, tables: Iterable[bytes]) -> bytes:
    """A result as one file."""
    parts, at = [manifest, _END], len(manifest) + len(_END)
    for body in tables:
        gap = -at % ALIGNMENT
        parts += [bytes(gap), body]
        at += gap + len(body)
    return b"".join(parts)


def _packed(path: str, at: int, refs: Sequence[TableRef]) -> Iterator[StoredTable]:
    """Where tables lie in a file whose manifest ends at a byte."""
    for ref in refs:
        table = StoredTable(ref, path, at + -at % ALIGNMENT)
        yield table
        at = table.end


class _Read(NamedTuple):
    """A file's first bytes."""

    body: bytes
    is_all: bool


class StoredResult:
    """A result that has been opened: its manifest is in memory, and what else was read with it."""

    def __init__(self, store: Store, path: str, read: _Read) -> None:
        """Raises `Damaged` where that is no manifest."""
        self.path = path
        self._store = store
        self._read = read
        is_packed = keys.is_packed(path)
        self.body = _first_line(path, read.body) if is_packed else read.body
        """The manifest's own bytes."""
        self.manifest = _decoded(path, self.body)
        self._first = len(self.body) + len(_END)
        refs = self.manifest.tables
        self.tables = tuple(
            _packed(path, self._first, refs)
            if is_packed
            else (by_itself(path, ref) for ref in refs)
        )
        """In the manifest's order."""

    def table(self, name: str) -> StoredTable | None:
        """The table of that name, if the result has it."""
        return next((table for table in self.tables if table.ref.name == name), None)

    def part(self, table: StoredTable, start: int, end: int) -> bytes:
        """A table's bytes `start` up to `end`, as they are; fewer where the file ends. Raises `Missing`."""
        first, last = table.start + start, table.start + end
        is_read = self._read.is_all or last <= len(self._read.body)
        if table.path == self.path and is_read:
            return self._read.body[first:last]
        return read_part(self._store, table, start, end)

    def bytes_of(self, table: StoredTable) -> bytes:
        """A table's bytes, seen to be the ones it was named for. Raises `Missing`, `Damaged`."""
        return _checked(table, self.part(table, 0, table.ref.bytes))

    def read(self, table: StoredTable) -> pa.Table:
        """A table. Raises as `bytes_of` does."""
        return from_ipc(self.bytes_of(table))

    def is_whole(self) -> bool:
        """Whether every byte is there, by size and not by hash."""
        try:
            if not keys.is_packed(self.path):
                return all(self._store.size(each.path) == each.ref.bytes for each in self.tables)
            end = self.tables[-1].end if self.tables else self._first
            read = self._read
            return end == (len(read.body) if read.is_all else self._store.size(self.path))
        except Missing:
            return False


def open_result(store: Store, path: str, *, whole: bool = False) -> StoredResult:
    """A result, by what its job's row names. Raises `Missing`, `Damaged`.

    A packed one is read at once where the whole is wanted; else no more than it takes to read its manifest.
    """
    if whole or not keys.is_packed(path):
        return StoredResult(store, path, _Read(store.get(path), is_all=True))
    return StoredResult(store, path, _head(store, path))


def _head(store: Store, path: str) -> _Read:
    body, wanted = b"", HEAD_BYTES
    while True:
        body += store.get_range(path, len(body), wanted)
        is_all = len(body) < wanted
        if is_all or _END in body:
            return _Read(body, is_all)
        wanted *= 4


def load_manifest(store: Store, path: str) -> Manifest:
    """A result's manifest. Raises `Missing`, and `Damaged` where it cannot be read."""
    return open_result(store, path).manifest


def is_whole(store: Store, path: str) -> bool:
    """Whether every byte of a result is still there; by size, not by hash."""
    try:
        return open_result(store, path).is_whole()
    except Gone:
        return False


def discard(store: Store, path: str) -> None:
    """Take away a result that no row names, with what is its alone; nothing happens where there is none."""
    if keys.has_pieces(path):
        # The manifest last: it says what else there is.
        with suppress(Gone):
            for table in open_result(store, path).tables:
                store.delete(table.path)
    store.delete(path)


def files_of(store: Store, results: Iterable[str]) -> Iterator[str]:
    """All that there may be of results that no row names, whether or not a manifest ever came to say what there is.

    For many at once: where they have tables beside them, that folder is looked through.
    """
    starts: dict[str, set[str]] = {}
    for path in results:
        if keys.has_pieces(path):
            folder, name = keys.beside(path)
            starts.setdefault(folder, set()).add(name)
        else:
            yield path
    for folder, names in starts.items():
        yield from store.beginning(folder, names)


def read_part(store: Store, table: StoredTable, start: int, end: int) -> bytes:
    """A table's bytes `start` up to `end`, as they are; fewer where the file ends. Raises `Missing`."""
    return store.get_range(table.path, table.start + start, table.start + end)


def read_bytes(store: Store, table: StoredTable) -> bytes:
    """A table's bytes, seen to be the ones it was named for. Raises `Missing`, `Damaged`."""
    return _checked(table, read_part(store, table, 0, table.ref.bytes))


def read_table(store: Store, table: StoredTable) -> pa.Table:
    """A table. Raises as `read_bytes` does."""
    return from_ipc(read_bytes(store, table))


def read_tables(store: Store, path: str) -> dict[str, pa.Table]:
    """Every table of a result, by its name. Raises `Missing`, `Damaged`."""
    result = open_result(store, path, whole=True)
    return {table.ref.name: result.read(table) for table in result.tables}


def _checked(table: StoredTable, body: bytes) -> bytes:
    found = hashlib.sha256(body).hexdigest()
    if found != table.ref.chunk:
        raise Damaged(
            f"table {table.ref.name}: {table.path} holds bytes whose hash is {found}",
            path=table.path,
        )
    return body


def _first_line(path: str, body: bytes) -> bytes:
    end = body.find(_END)
    if end < 0:
        raise Damaged(f"{path} is not a result: it ends within its manifest", path=path)
    return body[:end]


def _decoded(path: str, body: bytes) -> Manifest:
    try:
        manifest = _manifest.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(f"{path} is not a manifest: {error}", path=path) from error
    seal = _SEAL.search(body)
    if seal is None:
        if manifest.version >= _FIRST_SEALED:
            raise Damaged(f"{path} is a manifest whose seal is broken", path=path)
        return manifest
    found = hashlib.sha256(body[: seal.start()]).hexdigest()
    if found != seal[1].decode():
        raise Damaged(f"{path} is a manifest whose hash is {found}, not its seal's", path=path)
    return manifest
