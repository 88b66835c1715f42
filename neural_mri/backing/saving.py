"""Results on their way into the store: one file each, or tables, and last the manifest that names them.

Several at once, so that their files share the disk's commits. Knows nothing of jobs' states.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, Self

import msgspec
import pyarrow as pa

from neural_mri.backing import keys
from neural_mri.backing.faults import crash_point
from neural_mri.backing.storage import MOST_OPEN, NamedBytes, Store, Writing
from neural_mri.backing.stored import pack, sealed
from neural_mri.contract.results import Manifest, TableRef, provenance_of, to_ipc

__all__ = ("PACKED_BYTES", "SavedResult", "Saving", "Unsaved", "save_result")

PACKED_BYTES = 4 << 20
"""Tables of so many bytes together become one file. Of a larger result the bytes themselves take longer than
its files' names, and they are in memory once more while they are joined."""


class SavedResult(NamedTuple):
    """A result that is whole."""

    path: str
    """Of the one file, or of the manifest; what the job's row names."""
    manifest: Manifest


class Unsaved(NamedTuple):
    """A result that is in memory only."""

    path: str
    """Where its manifest will stand, unless it is packed."""
    manifest: Manifest
    """Everything but the tables."""
    tables: Mapping[str, pa.Table]
    """Each bears its provenance."""
    stored: Callable[[TableRef], None] = lambda _ref: None
    """Told of each table as it is written, before the result can be found; may raise to stop."""
    packed: str | None = None
    """Where all of it will stand as one file if it is small; None where it must have a manifest of its own."""


def save_result(
    store: Store,
    path: str,
    manifest: Manifest,
    tables: Mapping[str, pa.Table],
    *,
    stored: Callable[[TableRef], None] = lambda _ref: None,
    packed: str | None = None,
) -> SavedResult:
    """Write a result's tables, then, under the path, the manifest that names them.

    A small one is one file, where `packed` says under which path.
    """
    with Saving(store, [Unsaved(path, manifest, tables, stored, packed)]) as saving:
        [saved] = saving.finish([path]).values()
    if isinstance(saved, Exception):
        raise saved
    return saved


class Saving:
    """Several results being written at once, each as `save_result` does; what one raises is its own.

    Whoever begins has time for something else while the disk works, and may then finish some of them only:
    of the others nothing is named. Use as a context manager, from one thread.
    """

    def __init__(self, store: Store, results: Iterable[Unsaved]) -> None:
        self._store = store
        self._later = deque(results)
        """Beyond what may be open at once."""
        self._begun: list[_Begun] = []
        self._is_alone = len(self._later) == 1
        self._begin_some()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for begun in self._begun:
            begun.drop()

    @property
    def is_quick(self) -> bool:
        """Whether each result is one small file, and on its way to the disk already."""
        return not self._later and all(
            begun.is_packed and not begun.has_failed for begun in self._begun
        )

    def place(self) -> dict[str, SavedResult] | None:
        """Let quick results be found, and the disk write them; None where it cannot, and `finish` will say why.

        They are not there to stay before it has: see `settles`.
        """
        for begun in self._begun:
            begun.attempt(_Begun.place)
            begun.attempt(_Begun.flush)
        outcomes = {begun.result.path: begun.outcome for begun in self._begun}
        placed = {at: saved for at, saved in outcomes.items() if isinstance(saved, SavedResult)}
        return placed if len(placed) == len(outcomes) else None

    def settles(self, within: float) -> bool:
        """Whether what is placed is there to stay, or is within so many seconds.

        Where it is not, or cannot be, `finish` waits for it.
        """
        give_up_at = time.monotonic() + within
        for begun in self._begun:
            if not begun.settles(max(0.0, give_up_at - time.monotonic())):
                return False
        for begun in self._begun:
            begun.attempt(_Begun.settle)
        return not any(begun.has_failed for begun in self._begun)

    def finish(self, paths: Collection[str]) -> dict[str, SavedResult | Exception]:
        """What became of the results whose manifests were to stand under these paths, packed or not."""
        finished: dict[str, SavedResult | Exception] = {}
        self._later = deque(result for result in self._later if result.path in paths)
        while self._begun or self._later:
            self._begin_some()
            wanted = [begun for begun in self._begun if begun.result.path in paths]
            # All at once: flushes that meet share one commit of the file system's journal.
            for step in (_Begun.place, _Begun.settle):
                for begun in wanted:
                    begun.attempt(step)
            finished |= {begun.result.path: begun.outcome for begun in wanted}
            for begun in self._begun:
                begun.drop()
            self._begun.clear()
        return finished

    def _begin_some(self) -> None:
        n_files = sum(begun.n_files for begun in self._begun)
        while self._later and n_files < MOST_OPEN:
            begun = _Begun(self._later.popleft())
            begun.attempt(partial(_Begun.begin, store=self._store))
            if not self._is_alone:
                begun.attempt(_Begun.flush)
            self._begun.append(begun)
            n_files += begun.n_files


class _Begun:
    """One result on its way."""

    def __init__(self, result: Unsaved) -> None:
        self.result = result
        self._refs: list[TableRef] = []
        self._path = result.path
        self._whole = result.manifest
        self._writing: Writing | None = None
        self._is_placed = False
        self._error: Exception | None = None

    @property
    def outcome(self) -> SavedResult | Exception:
        """How it ended."""
        return self._error or SavedResult(self._path, self._whole)

    @property
    def is_packed(self) -> bool:
        """Whether all of it is one file."""
        return self._path == self.result.packed

    @property
    def n_files(self) -> int:
        """How many files that is."""
        return 1 if self.is_packed else len(self.result.tables) + 1

    @property
    def has_failed(self) -> bool:
        """Whether a step has failed."""
        return self._error is not None

    def attempt(self, step: Callable[["_Begun"], None]) -> None:
        """Take a step, unless an earlier one has failed."""
        if self._error is not None:
            return
        try:
            step(self)
        except Exception as error:  # noqa: BLE001 (handed to whose result it is)
            self._error = error

    def begin(self, store: Store) -> None:
        """Begin to write all of its files."""
        self._writing = store.begin(self._files())

    def flush(self) -> None:
        """Let the disk work while others are begun."""
        if self._writing is not None:
            self._writing.flush()

    def place(self) -> None:
        """Let the tables be found, and then the manifest; or all at once. Once is enough."""
        if self._writing is None or self._is_placed:
            return
        if self.is_packed:
            self._writing.place(lambda _index: None, last=self._tell_all)
        else:
            self._writing.place(self._tell)
        self._is_placed = True

    def settles(self, within: float) -> bool:
        """Whether `settle` has not to wait, or for so many seconds, which have passed then."""
        return self._writing is None or self._writing.settles(within)

    def settle(self) -> None:
        """Wait until it is there to stay."""
        if self._writing is not None:
            self._writing.settle()
            self._writing = None

    def drop(self) -> None:
        """Leave nothing half written."""
        if self._writing is not None:
            self._writing.drop()
            self._writing = None

    def _files(self) -> Iterator[NamedBytes]:
        """The one file of a small result; else one after another, so that one table is in memory at a time."""
        chunks = self._chunks()
        if self.result.packed is not None:
            first = list(_beyond(PACKED_BYTES, chunks))
            if sum(len(chunk.body) for chunk in first) <= PACKED_BYTES:
                self._path = self.result.packed
                body = pack(self._named(), [chunk.body for chunk in first])
                yield NamedBytes(self._path, body, is_awaited=True)
                return
            while first:
                yield first.pop(0)
        yield from chunks
        yield NamedBytes(self._path, self._named())

    def _chunks(self) -> Iterator[NamedBytes]:
        """The tables, encoded as they are asked for."""
        for name, table in self.result.tables.items():
            body = to_ipc(table)
            ref = _ref_of(name, table, body)
            self._refs.append(ref)
            yield NamedBytes(keys.table_path(self.result.path, ref.chunk), body)

    def _named(self) -> bytes:
        """The manifest, once all tables have been encoded."""
        self._whole = msgspec.structs.replace(self.result.manifest, tables=tuple(self._refs))
        return sealed(self._whole)

    def _tell_all(self) -> None:
        """Where all are one file each is told of when it only lacks its name."""
        for index in range(len(self._refs)):
            self._tell(index)

    def _tell(self, index: int) -> None:
        self.result.stored(self._refs[index])
        if index == len(self._refs) - 1:
            crash_point("worker.stored")


def _beyond(limit: int, files: Iterator[NamedBytes]) -> Iterator[NamedBytes]:
    """The first files, up to the one with which they have more bytes than the limit."""
    size = 0
    while size <= limit and (file := next(files, None)) is not None:
        size += len(file.body)
        yield file


def _ref_of(name: str, table: pa.Table, body: bytes) -> TableRef:
    provenance = provenance_of(table)
    return TableRef(
        name=name,
        table=provenance.table,
        chunk=hashlib.sha256(body).hexdigest(),
        bytes=len(body),
        rows=table.num_rows,
        unit=provenance.unit,
    )
