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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

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
    "SavedResult",
    "Store",
    "StoreFull",
    "StoreUnavailable",
    "Unsaved",
    "checked",
    "load_manifest",
    "open_store",
    "read_table",
    "save_result",
    "save_results",
)

_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9][A-Za-z0-9._-]{0,199}){0,7}")
_HALF_WRITTEN = re.compile(r"\..+\.\d+\.[0-9a-f]{8}")

T = TypeVar("T")

WRITERS = 8
"""Tables written at once: flushes that meet share one commit of the file system's journal."""
_WRITERS = ThreadPoolExecutor(WRITERS, thread_name_prefix="store-writer")
"""Kept: to start as many threads takes longer than a scan's tables do. None starts before it is needed."""

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


class Store(Protocol):
    """Bytes under paths. Every call raises `StoreUnavailable` when the store does not answer."""

    def put(self, path: str, body: bytes) -> None:
        """Keep the bytes under the path, all of them or none. Raises `StoreFull`."""

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
        with self._folder(path, create=True) as (folder, name):
            if _reads_as(folder, name, body):
                return
            # A leading dot is no path of ours: a half-written file cannot be asked for.
            partial = f".{name}.{os.getpid()}.{secrets.token_hex(4)}"
            try:
                _write(folder, partial, body)
                crash_point("worker.written")
                os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
                os.fsync(folder)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(partial, dir_fd=folder)
                raise

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
            if create:
                self._root.mkdir(parents=True, exist_ok=True)
            folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for parent in parents:
                    if create:
                        _ensure_folder(folder, parent)
                    inner = os.open(
                        parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder
                    )
                    os.close(folder)
                    folder = inner
                yield _Place(folder, name)
            finally:
                os.close(folder)


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


def _ensure_folder(folder: int, name: str) -> None:
    try:
        os.mkdir(name, dir_fd=folder)
    except FileExistsError:
        return
    os.fsync(folder)


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


def _write(folder: int, name: str, body: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=folder), "wb") as writer:
        writer.write(body)
        writer.flush()
        os.fsync(writer.fileno())


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
    [saved] = save_results(store, [Unsaved(path, manifest, tables, stored)])
    if isinstance(saved, Exception):
        raise saved
    return saved


def save_results(store: Store, results: Sequence[Unsaved]) -> list[SavedResult | Exception]:
    """Write several results at once, each as `save_result` does; what one of them raises is its own."""
    writing = [
        [_WRITERS.submit(_save_table, store, name, table) for name, table in result.tables.items()]
        for result in results
    ]
    naming = [
        _tried(partial(_name_tables, store, result, tables))
        for result, tables in zip(results, writing, strict=True)
    ]
    return [named if isinstance(named, Exception) else _tried(named.result) for named in naming]


def _name_tables(
    store: Store, result: Unsaved, tables: Sequence[Future[TableRef]]
) -> Future[SavedResult]:
    """Begin to write the manifest, once all that it names is there."""
    refs = []
    for table in tables:
        ref = table.result()
        refs.append(ref)
        result.stored(ref)
    crash_point("worker.stored")
    whole = msgspec.structs.replace(result.manifest, tables=tuple(refs))
    return _WRITERS.submit(_save_manifest, store, result.path, whole)


def _save_manifest(store: Store, path: str, manifest: Manifest) -> SavedResult:
    store.put(path, msgspec.json.encode(manifest))
    return SavedResult(path, manifest)


def _tried(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:  # noqa: BLE001 (handed to whose result it is)
        return error


def _save_table(store: Store, name: str, table: pa.Table) -> TableRef:
    body = to_ipc(table)
    provenance = provenance_of(table)
    ref = TableRef(
        name=name,
        table=provenance.table,
        chunk=hashlib.sha256(body).hexdigest(),
        bytes=len(body),
        rows=table.num_rows,
        unit=provenance.unit,
    )
    store.put(keys.chunk_path(ref.chunk), body)
    return ref


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
