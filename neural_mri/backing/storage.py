"""The object store: bytes under paths, all of them or none.

A folder of this machine's, or a bucket (`s3`). In the folder a file is seen whole or not at all: it is
written beside its place, flushed, and renamed into it; one that nobody looks for before they are told of it
is renamed first, so that the disk writes it and its name together. Paths come from `keys.py` and are checked all the
same; no symbolic link is followed, on no step of a path. Knows bytes; what results are made of says `stored`.
"""

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from neural_mri.backing.faults import crash_point
from neural_mri.backing.settings import InvalidSettings, Settings
from neural_mri.contract.problems import Gone, Unavailable

__all__ = (
    "Damaged",
    "FolderStore",
    "InvalidPath",
    "Missing",
    "NamedBytes",
    "Store",
    "StoreFull",
    "StoreUnavailable",
    "Writing",
    "checked",
    "open_store",
    "put_together",
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

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Of a path where other bytes stand already the file itself is not the other name: they are replaced.
_NO_LINKS = frozenset(
    {errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV, errno.EEXIST}
)


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
    is_awaited: bool = False
    """Whether nobody looks there before they are told of it, which they are when it is settled."""


class Writing(Protocol):
    """Files on their way into a store, together: placed, then settled, or else dropped."""

    def flush(self) -> None:
        """Let them be written meanwhile: there is something else to do before they are placed, or settled."""

    def place(self, placed: Callable[[int], None], last: Callable[[], None] = lambda: None) -> None:
        """Let all be found under their paths, the last only once all others are.

        Says of each but the last, by its index, that it stands, and of the last that it comes next; what
        either raises stops it there. Raises `StoreUnavailable`.
        """

    def settles(self, within: float) -> bool:
        """Whether `settle` will not have to wait: for so many seconds it is waited for here."""

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

    def copy(self, path: str, to: str) -> None:
        """Keep the bytes under another path as well. Raises `Missing`, `StoreFull`."""

    def get(self, path: str) -> bytes:
        """The bytes under the path. Raises `Missing`."""

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` up to `end`, without reading the others; fewer at the end. Raises `Missing`."""

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

    def aged(self, folder: str, older_seconds: float) -> Iterator[str]:
        """Paths in a folder under which bytes have stood for so long, in no order.

        Looked for as they are asked for, and left out where they are taken away meanwhile.
        """

    def beginning(self, folder: str, names: Collection[str]) -> Iterator[str]:
        """Paths in a folder whose last name begins as one of these does, in no order; as they are asked for."""


def put_together(store: Store, files: Iterable[NamedBytes]) -> None:
    """Keep files, the last of which is found only once all others are. Raises `StoreFull`."""
    writing = store.begin(files)
    try:
        writing.place(lambda _index: None)
        writing.settle()
    finally:
        writing.drop()


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
        put_together(self, [NamedBytes(path, body)])

    def begin(self, files: Iterable[NamedBytes]) -> Writing:
        """Begin to write files. Raises `StoreFull`."""
        return _Halves(self._root, files)

    def copy(self, path: str, to: str) -> None:
        """Let the file have another name as well, where the file system can. Raises `Missing`, `StoreFull`.

        What is as long there already is taken to be the same.
        """
        with suppress(Missing):
            if self.size(to) == self.size(path):
                return
        folders = _Folders(self._root)
        try:
            with self._folder(path) as (folder, name):
                place = folders.place(to)
                try:
                    os.link(
                        name,
                        place.name,
                        src_dir_fd=folder,
                        dst_dir_fd=place.folder,
                        follow_symlinks=False,
                    )
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                else:
                    folders.note(place, to)
                    folders.settle()
                    return
        finally:
            folders.close()
        self.put(to, self.get(path))

    def get(self, path: str) -> bytes:
        """The bytes under the path. Raises `Missing`."""
        with self._folder(path) as (folder, name):
            return _read(folder, name)

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes `start` up to `end`. Raises `Missing`."""
        with self._folder(path) as (folder, name), _opened(folder, name) as file:
            return _part(file, start, end)

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

    def aged(self, folder: str, older_seconds: float) -> Iterator[str]:
        """Paths in a folder under which bytes have stood for so long, in no order."""
        before = time.time() - older_seconds
        for path, entry in self._listed(folder):
            if _is_older(entry, before):
                yield path

    def beginning(self, folder: str, names: Collection[str]) -> Iterator[str]:
        """Paths in a folder whose last name begins as one of these does, in no order: the folder is read once."""
        wanted, lengths = frozenset(names), {len(name) for name in names}
        for path, entry in self._listed(folder):
            if any(entry.name[:length] in wanted for length in lengths):
                yield path

    def _listed(self, folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """What stands in a folder under a name that may be asked for, in no order."""
        with (
            suppress(Missing),
            self._folder(f"{folder}/any") as (opened, _),
            os.scandir(opened) as entries,
        ):
            for entry in entries:
                if _PATH.fullmatch(path := f"{folder}/{entry.name}"):
                    yield path, entry

    @contextmanager
    def _folder(self, path: str) -> Iterator["_Place"]:
        """The folder of a path, opened step by step, and the file's name in it."""
        *parents, name = checked(path).split("/")
        with _explained(path):
            folder = os.open(self._root, _FOLDER)
            try:
                for parent in parents:
                    inner = _entered(folder, parent, create=False)
                    os.close(folder)
                    folder = inner
                yield _Place(folder, name)
            finally:
                os.close(folder)


class _Folders:
    """Folders that files are written in, opened step by step, once each, and made where they are not."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._opened: dict[tuple[str, ...], int] = {}
        """File descriptors, by the names that lead there."""
        self._changed: dict[int, str] = {}
        """Folders in which names are not on the disk yet, and one of the paths."""
        self._flushing: list[_Flushing] = []

    def place(self, path: str) -> "_Place":
        """Where a file is to stand."""
        *parents, name = checked(path).split("/")
        return _Place(self._folder(tuple(parents)), name)

    def _folder(self, parents: tuple[str, ...]) -> int:
        known = self._opened.get(parents)
        if known is not None:
            return known
        if parents:
            folder = _entered(self._folder(parents[:-1]), parents[-1], create=True)
        else:
            folder = self._opened_root()
        self._opened[parents] = folder
        return folder

    def _opened_root(self) -> int:
        with suppress(FileNotFoundError):
            return os.open(self._root, _FOLDER)
        self._root.mkdir(parents=True, exist_ok=True)
        return os.open(self._root, _FOLDER)

    def name(self, beside: str, place: "_Place", path: str) -> None:
        """Rename a file in its folder."""
        os.replace(beside, place.name, src_dir_fd=place.folder, dst_dir_fd=place.folder)
        self.note(place, path)

    def note(self, place: "_Place", path: str) -> None:
        """A name in a folder may not be on the disk yet."""
        self._changed[place.folder] = path

    def flush(self, *, meanwhile: bool = False) -> None:
        """Have the disk write the names, of each folder once.

        Those of one folder alone are left to `settle`: who would wait for a thread can wait for the disk, unless
        there is something else that it may write `meanwhile`.
        """
        if len(self._changed) == 1 and not meanwhile:
            return
        for folder, path in self._changed.items():
            self._flushing.append(_Flushing(path, _FLUSHERS.submit(os.fsync, folder)))
        self._changed.clear()

    def settle(self) -> None:
        """Wait until all names are on the disk."""
        for folder, path in self._changed.items():
            with _explained(path):
                os.fsync(folder)
        self._changed.clear()
        for path, flushing in self._flushing:
            with _explained(path):
                flushing.result()
        self._flushing.clear()

    def under_way(self) -> list[Future[None]]:
        """What the disk writes now."""
        return [flushing for _, flushing in self._flushing]

    def close(self) -> None:
        """Close them, when nobody flushes them any more."""
        wait([flushing for _, flushing in self._flushing])
        self._flushing.clear()
        self._changed.clear()
        for folder in self._opened.values():
            os.close(folder)
        self._opened.clear()


class _Flushing(NamedTuple):
    path: str
    done: Future[None]


class _Halves:
    """Files beside their places, which the disk is writing."""

    def __init__(self, root: Path, files: Iterable[NamedBytes]) -> None:
        self._folders = _Folders(root)
        self._halves: list[_Half | None] = []
        """None where the bytes stand in their place already."""
        self._is_placed = False
        try:
            for file in files:
                # Flushing begins when all have been written: whose threads wake up stop this one.
                if self._halves and len(self._halves) % MOST_OPEN == 0:
                    self._flush(self._halves[-MOST_OPEN:])
                    for half in self._halves[-MOST_OPEN:]:
                        _place(half)
                    self.settle()
                self._halves.append(self._half(file))
            if len(self._halves) > 1:
                self.flush()
        except BaseException:
            self.drop()
            raise

    def flush(self) -> None:
        """Have the disk write what it does not yet: a file that is begun alone is left to who waits for it."""
        self._flush(self._halves[-MOST_OPEN:])
        if self._is_placed:
            self._folders.flush(meanwhile=True)

    def place(self, placed: Callable[[int], None], last: Callable[[], None] = lambda: None) -> None:
        """Let all be found under their paths, the last only once all others are."""
        for index, half in enumerate(self._halves):
            is_last = index == len(self._halves) - 1
            if is_last:
                if half is not None and not half.is_named_first:
                    half.await_flush()
                last()
            _place(half)
            if not is_last:
                placed(index)
        self._is_placed = True
        self._folders.flush()

    def settles(self, within: float) -> bool:
        """Whether `settle` will not have to wait: for so many seconds it is waited for here."""
        self.flush()
        flushing = [half.flushing for half in self._halves if half is not None and half.flushing]
        return not wait([*flushing, *self._folders.under_way()], within).not_done

    def settle(self) -> None:
        """Wait until no power cut would take them away again."""
        named_first = [half for half in self._halves if half is not None and half.is_named_first]
        # A file and its name in one commit of the file system's journal.
        self._folders.flush(meanwhile=any(half.has_to_flush for half in named_first))
        for half in named_first:
            half.await_flush()
        self._folders.settle()
        for half in named_first:
            half.close()
        self._folders.close()

    def drop(self) -> None:
        """Leave nothing half written."""
        for half in self._halves:
            if half is not None:
                half.drop()
        self._folders.close()

    def _half(self, file: NamedBytes) -> "_Half | None":
        with _explained(file.path):
            place = self._folders.place(file.path)
            # What stands there with a name of its own is flushed, unless it was named first.
            if file.is_awaited or not _reads_as(*place, file.body):
                return _Half(self._folders, place, file)
            # Whoever wrote them may have been cut short before the name was on the disk.
            self._folders.note(place, file.path)
            return None

    def _flush(self, halves: Iterable["_Half | None"]) -> None:
        for half in halves:
            if half is not None:
                half.flush()


def _place(half: "_Half | None") -> None:
    if half is not None:
        half.place()


class _Half:
    """A file's bytes beside its place, or in it and not flushed."""

    def __init__(self, folders: _Folders, place: "_Place", file: NamedBytes) -> None:
        self._folders = folders
        self._place = place
        self._path = file.path
        self.is_named_first = file.is_awaited
        # A leading dot is no path of ours: a half-written file cannot be asked for.
        self._name = f".{place.name}.{os.getpid()}.{secrets.token_hex(4)}"
        self.flushing: Future[None] | None = None
        """While the disk writes its bytes, and after."""
        self._is_flushed = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self._file: int | None = os.open(self._name, flags, 0o600, dir_fd=place.folder)
        try:
            _write(self._file, file.body)
        except BaseException:
            self.drop()
            raise

    @property
    def has_to_flush(self) -> bool:
        """Whether it is left to who waits for it to have the disk write its bytes."""
        return self._file is not None and not self._is_flushed and self.flushing is None

    def flush(self) -> None:
        """Have the disk write its bytes."""
        if self._file is not None and self.flushing is None:
            self.flushing = _FLUSHERS.submit(os.fsync, self._file)

    def await_flush(self) -> None:
        """Wait until its bytes are on the disk."""
        if self._file is None or self._is_flushed:
            return
        with _explained(self._path):
            if self.flushing is None:
                # Who would wait for a thread can wait for the disk.
                os.fsync(self._file)
            else:
                self.flushing.result()
        self._is_flushed = True

    def place(self) -> None:
        """Rename it into its place, once its bytes are on the disk; or now, where it is named first."""
        if not self.is_named_first:
            self.await_flush()
        if self._file is None:
            return
        with _explained(self._path):
            crash_point("worker.written")
            self._folders.name(self._name, self._place, self._path)
            self._name = self._place.name
        if not self.is_named_first:
            self.close()

    def close(self) -> None:
        """Nothing more is to be done to it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def drop(self) -> None:
        """Take it away where it is not in its place, or is there and may not be on the disk."""
        if self._file is None:
            return
        if self.flushing is not None:
            wait([self.flushing])
        self.close()
        with suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._place.folder)


def _write(file: int, body: bytes) -> None:
    left = memoryview(body)
    while left:
        left = left[os.write(file, left) :]


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
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=folder)
    # Whoever was quicker may not have come so far.
    os.fsync(folder)
    return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)


@contextmanager
def _opened(folder: int, name: str) -> Iterator[int]:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        yield file
    finally:
        os.close(file)


def _is_older(entry: os.DirEntry[str], before: float) -> bool:
    """Whether it is a file, last written before then, and still there."""
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_mtime < before


def _read(folder: int, name: str) -> bytes:
    with _opened(folder, name) as file, os.fdopen(file, "rb", closefd=False) as reader:
        return reader.read()


def _part(file: int, start: int, end: int) -> bytes:
    """As many bytes as there are: one call gives two gigabytes at most."""
    parts, end = [], min(end, os.fstat(file).st_size)
    while start < end and (part := os.pread(file, end - start, start)):
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


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
