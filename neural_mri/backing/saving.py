"""Results on their way into the store: tables, and last the manifest that names them.

Several at once, so that their files share the disk's commits. Knows nothing of jobs' states.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, Self

import msgspec
import pyarrow as pa

from neural_mri.backing import keys
from neural_mri.backing.faults import crash_point
from neural_mri.backing.storage import MOST_OPEN, NamedBytes, Store, Writing
from neural_mri.contract.results import Manifest, TableRef, provenance_of, to_ipc

__all__ = ("SavedResult", "Saving", "Unsaved", "save_result")


class SavedResult(NamedTuple):
    """A result that is whole."""

    path: str
    """Of the manifest; what the job's row names."""
    manifest: Manifest


class Unsaved(NamedTuple):
    """A result that is in memory only."""

    path: str
    """Where its manifest will stand."""
    manifest: Manifest
    """Everything but the tables."""
    tables: Mapping[str, pa.Table]
    """Each bears its provenance."""
    stored: Callable[[TableRef], None] = lambda _ref: None
    """Told of each table as it is written; may raise to stop."""


def save_result(
    store: Store,
    path: str,
    manifest: Manifest,
    tables: Mapping[str, pa.Table],
    *,
    stored: Callable[[TableRef], None] = lambda _ref: None,
) -> SavedResult:
    """Write a result's tables, then, under the path, the manifest that names them."""
    with Saving(store, [Unsaved(path, manifest, tables, stored)]) as saving:
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
        self._begin_some()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for begun in self._begun:
            begun.drop()

    def finish(self, paths: Collection[str]) -> dict[str, SavedResult | Exception]:
        """What became of the results whose manifests were to stand under these paths."""
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
        n_files = sum(len(begun.result.tables) + 1 for begun in self._begun)
        while self._later and (not n_files or n_files < MOST_OPEN):
            begun = _Begun(self._later.popleft())
            begun.attempt(partial(_Begun.begin, store=self._store))
            self._begun.append(begun)
            n_files += len(begun.result.tables) + 1


class _Begun:
    """One result on its way."""

    def __init__(self, result: Unsaved) -> None:
        self.result = result
        self._refs: list[TableRef] = []
        self._whole = result.manifest
        self._writing: Writing | None = None
        self._error: Exception | None = None

    @property
    def outcome(self) -> SavedResult | Exception:
        """How it ended."""
        return self._error or SavedResult(self.result.path, self._whole)

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

    def place(self) -> None:
        """Let the tables be found, and then the manifest."""
        if self._writing is not None:
            self._writing.place(self._tell)

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
        """One after another, so that they are in memory one at a time."""
        for name, table in self.result.tables.items():
            body = to_ipc(table)
            ref = _ref_of(name, table, body)
            self._refs.append(ref)
            yield NamedBytes(keys.chunk_path(ref.chunk), body)
        self._whole = msgspec.structs.replace(self.result.manifest, tables=tuple(self._refs))
        yield NamedBytes(self.result.path, msgspec.json.encode(self._whole))

    def _tell(self, index: int) -> None:
        self.result.stored(self._refs[index])
        if index == len(self._refs) - 1:
            crash_point("worker.stored")


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
