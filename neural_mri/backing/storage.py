"""The object store: results under their own hash, manifests under their attempt.

A folder of this machine's, or a bucket (`s3`). In the folder a file is seen whole or not at all: it is written beside its place, flushed, and renamed into it. Paths
come from `keys.py` and are checked all the same; no symbolic link is followed, on no step of a path.
Knows bytes, tables and manifests; nothing of jobs' states.
"""

import errno
import hashlib
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import msgspec
import pyarrow as pa

from neural_mri.backing import keys
from neural_mri.backing.faults import crash_point
from neural_mri.backing.settings import InvalidSettings, Settings
from neural_mri.contract.problems import Gone, Unavailable
from neural_mri.contract.results import Manifest, TableRef, from_ipc, provenance_of, to_ipc

__all__ = (
    "Damaged",
    "FolderStore",
    "InvalidPath",
    "Missing",
    "NamedBytes",
    "SavedResult",
    "Saving",
    "Store",
    "StoreFull",
    "StoreUnavailable",
    "Unsaved",
    "Writing",
    "checked",
    "load_manifest",
    "open_store",
    "read_table",
    "save_result",
)

_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9][A-Za-z0-9._-]{0,199}){0,7}")
_HALF_WRITTEN = re.compile(r"\..+\.\d+\.[0-9a-f]{8}")

FLUSHERS = 8
"""Files flushed at once: flushes that meet share one commit of the file system's journal."""
_FLUSHERS = ThreadPoolExecutor(FLUSHERS, thread_name_prefix="store-flusher")
"""They wait for the disk and do nothing else: of threads that compute only one goes on at a time. Kept: to
start as many takes longer than a scan's tables do. None starts before it is needed."""
MOST_OPEN = 64
"""Files beside their places at once, of a result and of results that are begun together."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class InvalidPath(ValueError):
    """No path of the store: a name begins with a letter or digit, and there is no way up or out."""


class Missing(Gone):
    """The store does not have these bytes."""


class Damaged(Gone):
    """The stored bytes are not the ones that were written."""


class StoreUnavailable(Unavailable):
    """The result store does not answer."""


class StoreFull(StoreUnavailable):
    """The result store has no room."""


class NamedBytes(NamedTuple):
    """A file to be."""

    path: str
    body: bytes


class Writing(Protocol):
    """Files on their way into a store, together: placed, then settled, or else dropped."""

    def place(self, placed: Callable[[int], None]) -> None:
        """Let all be found under their paths, the last only once all others are.

        Says of each but the last, by its index, that it stands; what that raises stops it there. Raises
        `StoreUnavailable`.
        """

    def settle(self) -> None:
        """Wait until no power cut would take them away again. Raises `StoreUnavailable`."""

    def drop(self) -> None:
        """Go no further: nothing is left half written. Does nothing where all is settled."""


class Store(Protocol):
    """Bytes under paths. Every call raises `StoreUnavailable` when the store does not answer."""

    def put(self, path: str, body: bytes) -> None:
        """Keep the bytes under the path, all of them or none. Raises `StoreFull`."""

    def begin(self, files: Iterable[NamedBytes]) -> Writing:
        """Begin to write files, without waiting for the disk. Raises `StoreFull`."""

    def get(self, path: str) -> bytes:
        """The bytes under the path. Raises `Missing`."""

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` up to `end`, without reading the others. Raises `Missing`."""

    def exists(self, path: str) -> bool:
        """Whether there are bytes under the path."""

    def size(self, path: str) -> int:
        """How many bytes there are. Raises `Missing`."""

    def local_path(self, path: str) -> Path | None:
        """Where this machine can open the bytes, if it can. Raises `Missing`."""

    def delete(self, path: str) -> None:
        """Forget the bytes; nothing happens where there are none."""

    def sweep(self, older_seconds: float) -> int:
        """Take away what somebody began to write, so long ago, and died; how many files that were."""


def checked(path: str) -> str:
    """The path. Raises `InvalidPath`."""
    if not _PATH.fullmatch(path):
        raise InvalidPath(
            f"{path!r} is not a path of the store: expected names of letters, digits, . _ - "
            "between slashes, none beginning with a dot"
        )
    return path


class FolderStore:
    """A store in a folder of this machine's file system."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, path: str, body: bytes) -> None:
        """Keep the bytes under the path, all of them or none. Raises `StoreFull`."""
        writing = _Halves(self, [NamedBytes(path, body)])
        try:
            writing.place(lambda _index: None)
            writing.settle()
        finally:
            writing.drop()

    def begin(self, files: Iterable[NamedBytes]) -> Writing:
        """Begin to write files. Raises `StoreFull`."""
        return _Halves(self, files)

    def half(self, path: str, body: bytes) -> "_Half | None":
        """The bytes beside their place; None where they stand in it already."""
        with self._folder(path, create=True) as (folder, name):
            if _reads_as(folder, name, body):
                return None
            return _Half(path, os.dup(folder), name, body)

    def get(self, path: str) -> bytes:
        """The bytes under the path. Raises `Missing`."""
        with self._folder(path) as (folder, name):
            return _read(folder, name)

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` up to `end`. Raises `Missing`."""
        with self._folder(path) as (folder, name), _opened(folder, name) as file:
            return os.pread(file, end - start, start)

    def exists(self, path: str) -> bool:
        """Whether there are bytes under the path."""
        try:
            self.size(path)
        except Missing:
            return False
        return True

    def size(self, path: str) -> int:
        """How many bytes there are. Raises `Missing`."""
        with self._folder(path) as (folder, name), _opened(folder, name) as file:
            return os.fstat(file).st_size

    def local_path(self, path: str) -> Path:
        """Where to open the bytes. Raises `Missing`."""
        self.size(path)
        return self._root / path

    def delete(self, path: str) -> None:
        """Forget the bytes; nothing happens where there are none."""
        with suppress(Missing), self._folder(path) as (folder, name):
            os.unlink(name, dir_fd=folder)

    def sweep(self, older_seconds: float) -> int:
        """Take away what somebody began to write, so long ago, and died; how many files that were."""
        if not self._root.is_dir():
            return 0
        before, count = time.time() - older_seconds, 0
        with _explained("half-written files"):
            for _, _, names, folder in os.fwalk(self._root):
                for name in names:
                    if not _HALF_WRITTEN.fullmatch(name):
                        continue
                    with suppress(FileNotFoundError):
                        if os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime < before:
                            os.unlink(name, dir_fd=folder)
                            count += 1
        return count

    @contextmanager
    def _folder(self, path: str, *, create: bool = False) -> Iterator["_Place"]:
        """The folder of a path, opened step by step, and the file's name in it."""
        *parents, name = checked(path).split("/")
        with _explained(path):
            folder = self._opened_root(create=create)
            try:
                for parent in parents:
                    inner = _entered(folder, parent, create=create)
                    os.close(folder)
                    folder = inner
                yield _Place(folder, name)
            finally:
                os.close(folder)

    def _opened_root(self, *, create: bool) -> int:
        try:
            return os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            if not create:
                raise
        self._root.mkdir(parents=True, exist_ok=True)
        return os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)


class _Halves:
    """Files beside their places, which the disk is writing."""

    def __init__(self, store: FolderStore, files: Iterable[NamedBytes]) -> None:
        self._halves: list[_Half | None] = []
        try:
            for file in files:
                # Flushing begins when all have been written: whose threads wake up stop this one.
                if self._halves and len(self._halves) % MOST_OPEN == 0:
                    self._flush(self._halves[-MOST_OPEN:])
                    for half in self._halves[-MOST_OPEN:]:
                        _place(half)
                    self.settle()
                self._halves.append(store.half(file.path, file.body))
            self._flush(self._halves[-MOST_OPEN:])
        except BaseException:
            self.drop()
            raise

    def place(self, placed: Callable[[int], None]) -> None:
        """Let all be found under their paths, the last only once all others are."""
        for index, half in enumerate(self._halves):
            _place(half)
            if index < len(self._halves) - 1:
                placed(index)

    def settle(self) -> None:
        """Wait until no power cut would take them away again."""
        for half in self._halves:
            if half is not None:
                half.settle()

    def drop(self) -> None:
        """Leave nothing half written."""
        for half in self._halves:
            if half is not None:
                half.drop()

    def _flush(self, halves: Iterable["_Half | None"]) -> None:
        for half in halves:
            if half is not None:
                half.flush()


def _place(half: "_Half | None") -> None:
    if half is not None:
        half.place()


class _Half:
    """A file's bytes beside its place."""

    def __init__(self, path: str, folder: int, name: str, body: bytes) -> None:
        """Takes over the folder's descriptor."""
        self._path = path
        self._folder: int | None = folder
        self._name = name
        # A leading dot is no path of ours: a half-written file cannot be asked for.
        self._beside = f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
        self._file: int | None = None
        self._flushing: Future[None] | None = None
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._file = os.open(self._beside, flags, 0o600, dir_fd=folder)
            with os.fdopen(self._file, "wb", closefd=False) as writer:
                writer.write(body)
        except BaseException:
            self.drop()
            raise

    def flush(self) -> None:
        """Have the disk write its bytes."""
        if self._file is not None and self._flushing is None:
            self._flushing = _FLUSHERS.submit(os.fsync, self._file)

    def place(self) -> None:
        """Rename it into its place, once its bytes are on the disk, and have the disk write its name."""
        if self._file is None or self._folder is None or self._flushing is None:
            return
        with _explained(self._path):
            self._flushing.result()
            crash_point("worker.written")
            os.replace(self._beside, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            os.close(self._file)
            self._file = None
            self._flushing = _FLUSHERS.submit(os.fsync, self._folder)

    def settle(self) -> None:
        """Wait until its name is on the disk too."""
        if self._folder is None or self._flushing is None:
            return
        with _explained(self._path):
            self._flushing.result()
            os.close(self._folder)
            self._folder = None

    def drop(self) -> None:
        """Close what is open, and take away what is not in its place."""
        if self._flushing is not None:
            wait([self._flushing])
        if self._file is not None and self._folder is not None:
            os.close(self._file)
            with suppress(FileNotFoundError):
                os.unlink(self._beside, dir_fd=self._folder)
            self._file = None
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None


class _Place(NamedTuple):
    folder: int
    """File descriptor."""
    name: str


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns the operating system's errors into ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise Missing(f"the store has no {path}", path=path) from error
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(f"{path} was not stored: {error.strerror}", path=path) from error
        raise StoreUnavailable(f"{path}: {error.strerror}", path=path) from error


def _entered(folder: int, name: str, *, create: bool) -> int:
    """A folder in a folder, opened, and made where there is none."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=folder)
        os.fsync(folder)
    return os.open(name, flags, dir_fd=folder)


@contextmanager
def _opened(folder: int, name: str) -> Iterator[int]:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        yield file
    finally:
        os.close(file)


def _read(folder: int, name: str) -> bytes:
    with _opened(folder, name) as file, os.fdopen(file, "rb", closefd=False) as reader:
        return reader.read()


def _reads_as(folder: int, name: str, body: bytes) -> bool:
    """Whether exactly these bytes stand there; damaged ones are written anew."""
    try:
        with _opened(folder, name) as file:
            if os.fstat(file).st_size != len(body):
                return False
        return _read(folder, name) == body
    except FileNotFoundError:
        return False


def open_store(settings: Settings) -> Store:
    """The settings' store. Raises `InvalidSettings` where what a bucket needs is not installed."""
    if settings.store_url:
        try:
            from neural_mri.backing.s3 import open_s3
        except ModuleNotFoundError as error:
            raise InvalidSettings(
                f"NEURAL_MRI_STORE_URL is {settings.store_url!r}: that needs {error.name}, which comes "
                "with neural-mri[s3]"
            ) from error
        return open_s3(settings)
    return FolderStore(settings.store_dir)


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


_manifest = msgspec.json.Decoder(Manifest)


def load_manifest(store: Store, path: str) -> Manifest:
    """The manifest under a path. Raises `Missing`, and `Damaged` when it cannot be read."""
    body = store.get(path)
    try:
        return _manifest.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(f"{path} is not a manifest: {error}", path=path) from error


def read_table(store: Store, ref: TableRef) -> pa.Table:
    """A table, once its bytes are seen to be the ones it was named for. Raises `Missing`, `Damaged`."""
    path = keys.chunk_path(ref.chunk)
    body = store.get(path)
    found = hashlib.sha256(body).hexdigest()
    if found != ref.chunk:
        raise Damaged(f"table {ref.name}: {path} holds bytes whose hash is {found}", path=path)
    return from_ipc(body)
