import errno
import itertools
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neural_mri.backing import keys, storage
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import (
    MOST_OPEN,
    FolderStore,
    InvalidPath,
    Missing,
    NamedBytes,
    Store,
    StoreFull,
    StoreUnavailable,
    put_together,
)
from tests.backing.stores import fail_disk, files, overwrite, paths

CHUNK = keys.chunk_path("ab" * 32)


def test_bytes_are_read_back_as_they_were_put(store: Store) -> None:
    store.put(CHUNK, b"arrow")
    assert store.get(CHUNK) == b"arrow"
    assert store.size(CHUNK) == 5
    assert store.exists(CHUNK)
    assert paths(store) == [CHUNK]


@pytest.mark.parametrize(
    ("start", "end"), [(0, 5), (1, 3), (4, 5), (0, 1), (3, 99), (5, 9), (7, 10**12), (2, 2), (3, 1)]
)
def test_a_part_is_read_without_the_rest(store: Store, start: int, end: int) -> None:
    store.put(CHUNK, b"arrow")
    assert store.get_range(CHUNK, start, end) == b"arrow"[start:end]


def test_what_is_large_is_as_whole_as_what_is_small(store: Store) -> None:
    body = os.urandom(1 << 20) * 12  # an upload in three parts
    store.put(CHUNK, body)
    assert store.get(CHUNK) == body
    assert store.get_range(CHUNK, 6 << 20, (6 << 20) + 100) == body[:100]
    assert paths(store) == [CHUNK]


def test_a_file_can_be_opened_where_it_is(folder: FolderStore, root: Path) -> None:
    folder.put(CHUNK, b"arrow")
    assert folder.local_path(CHUNK) == root / CHUNK


def test_what_is_stored_is_for_its_owner_only(folder: FolderStore, root: Path) -> None:
    folder.put(CHUNK, b"private")
    assert stat.S_IMODE((root / CHUNK).stat().st_mode) == 0o600


def test_what_is_not_there_is_missing(store: Store) -> None:
    assert not store.exists(CHUNK)
    for read in (store.get, store.size, lambda path: store.get_range(path, 0, 1)):
        with pytest.raises(Missing, match=CHUNK):
            read(CHUNK)
    store.put(CHUNK, b"")
    store.delete(CHUNK)
    assert not store.exists(CHUNK)
    store.delete(CHUNK)


def test_what_stands_in_a_folder_is_listed_by_age(store: Store) -> None:
    packed = {keys.packed_path(uuid4(), number) for number in range(5)}
    for path in (*packed, CHUNK, "packed.txt", "packed/deeper/still"):
        store.put(path, b"result")
    assert list(store.aged("packed", 3600.0)) == []
    assert set(store.aged("packed", -3600.0)) >= packed
    assert not {CHUNK, "packed.txt"} & set(store.aged("packed", -3600.0))
    assert list(store.aged("manifests", -3600.0)) == []
    listing = store.aged("packed", -3600.0)
    seen = {next(listing)}
    for path in packed - seen:
        store.delete(path)
    assert packed & (seen | set(listing)) >= seen


def test_what_is_half_written_is_not_listed(folder: FolderStore, root: Path) -> None:
    halves = folder.begin([NamedBytes("packed/a.result", b"result")])
    assert len(files(root)) == 1
    assert list(folder.aged("packed", -3600.0)) == []
    halves.drop()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "chunks/../../x",
        "chunks//x",
        ".hidden",
        "a/.b",
        "a/",
        "a\0b",
        "a\n",
    ],
)
def test_no_path_leads_out_of_the_store(store: Store, path: str) -> None:
    calls = (store.get, store.size, store.exists, store.local_path, store.delete)
    for call in (*calls, lambda path: store.get_range(path, 0, 1)):
        with pytest.raises(InvalidPath):
            call(path)
    with pytest.raises(InvalidPath):
        store.put(path, b"x")


@given(st.text(max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_for_nothing_outside_is_read(folder: FolderStore, path: str) -> None:
    with pytest.raises((InvalidPath, Missing)):
        folder.get(path)


def test_a_link_is_not_followed(folder: FolderStore, root: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (root / "chunks/ab").mkdir(parents=True)
    (root / CHUNK).symlink_to(secret)
    for call in (folder.get, folder.size, folder.local_path):
        with pytest.raises(StoreUnavailable):
            call(CHUNK)


def test_a_linked_folder_is_not_entered(folder: FolderStore, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "ab").mkdir(parents=True)
    (outside / "ab" / Path(CHUNK).name).write_bytes(b"secret")
    root.mkdir()
    (root / "chunks").symlink_to(outside)
    with pytest.raises(StoreUnavailable):
        folder.get(CHUNK)
    with pytest.raises(StoreUnavailable):
        folder.put(CHUNK, b"x")


def test_the_same_bytes_are_written_once(folder: FolderStore, root: Path) -> None:
    folder.put(CHUNK, b"arrow")
    before = (root / CHUNK).stat().st_ino
    folder.put(CHUNK, b"arrow")
    assert (root / CHUNK).stat().st_ino == before


def test_damaged_bytes_are_written_anew(store: Store) -> None:
    store.put(CHUNK, b"arrow")
    overwrite(store, CHUNK, b"arroW")
    store.put(CHUNK, b"arrow")
    assert store.get(CHUNK) == b"arrow"


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_disk_error_at_any_step_leaves_no_torn_file(
    folder: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    folder.put("chunks/ab/other.arrow", b"x")
    fail_disk(monkeypatch, step)
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        folder.put(CHUNK, b"arrow")
    monkeypatch.undo()
    assert files(root) == {"chunks/ab/other.arrow"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(
    folder: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(_file: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    root.mkdir()
    (root / "chunks").mkdir()
    (root / "chunks/ab").mkdir()
    with pytest.raises(StoreFull, match=os.strerror(number)) as caught:
        folder.put(CHUNK, b"arrow")
    assert caught.value.document()["status"] == 503
    assert files(root) == set()


FILL = """
import resource, sys
from pathlib import Path
from neural_mri.backing.storage import FolderStore, StoreFull
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    FolderStore(Path(sys.argv[1])).put("manifests/big.json", b"x" * 100_000)
except StoreFull as error:
    print("refused:", error)
"""


def test_a_file_that_really_does_not_fit_is_not_there_at_all(root: Path) -> None:
    said = subprocess.check_output([sys.executable, "-c", FILL, str(root)], text=True)
    assert said.startswith("refused: manifests/big.json was not stored")
    assert files(root) == set()


def test_a_half_written_file_cannot_be_asked_for(
    folder: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()

    def look(_file: int) -> None:
        seen.update(files(root))

    monkeypatch.setattr(os, "fsync", look)
    folder.put(CHUNK, b"arrow")
    partial = min(seen - {CHUNK}, key=len)
    with pytest.raises(InvalidPath):
        folder.get(partial)


# Several at once

TOGETHER = [
    NamedBytes(keys.chunk_path("aa" * 32), b"first"),
    NamedBytes(keys.chunk_path("bb" * 32), b"second"),
    NamedBytes("manifests/last.json", b"last"),
]


def test_of_files_that_are_written_together_the_last_is_found_last(store: Store) -> None:
    found: list[list[bool]] = []

    def look(_index: int) -> None:
        found.append([store.exists(file.path) for file in TOGETHER])

    writing = store.begin(TOGETHER)
    assert not store.exists(TOGETHER[-1].path)
    writing.place(look)
    writing.settle()
    writing.drop()  # does nothing any more
    assert [each[0] for each in found] == [True, True]
    assert found[1] == [True, True, False]
    assert [store.get(file.path) for file in TOGETHER] == [file.body for file in TOGETHER]


def test_files_that_are_dropped_leave_nothing_half_written(store: Store) -> None:
    writing = store.begin(TOGETHER)
    writing.drop()
    assert not store.exists(TOGETHER[-1].path)
    if isinstance(store, FolderStore):
        assert paths(store) == []


def test_who_stops_between_two_files_leaves_the_last_unnamed(store: Store) -> None:
    class Stopped(Exception):
        pass

    def stop(index: int) -> None:
        if index == 1:
            raise Stopped

    writing = store.begin(TOGETHER)
    with pytest.raises(Stopped):
        writing.place(stop)
    writing.drop()
    assert paths(store) == [file.path for file in TOGETHER[:2]]


@pytest.mark.parametrize("n_files", [1, 3])
def test_of_the_last_it_is_said_that_it_comes_next(store: Store, n_files: int) -> None:
    class Stopped(Exception):
        pass

    some = TOGETHER[-n_files:]

    def stop() -> None:
        assert [store.exists(file.path) for file in some] == [True] * (n_files - 1) + [False]
        raise Stopped

    writing = store.begin(some)
    with pytest.raises(Stopped):
        writing.place(lambda _index: None, stop)
    writing.drop()
    assert paths(store) == sorted(file.path for file in some[:-1])


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_disk_error_at_any_step_tears_none_of_several_files(
    folder: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    for name in ("chunks/aa", "chunks/bb", "manifests"):
        (root / name).mkdir(parents=True)
    open_before = psutil.Process().num_fds()
    real, calls = getattr(os, step), itertools.count()

    def fail(*arguments: Any, **options: Any) -> Any:
        if (step == "open" and not arguments[1] & os.O_CREAT) or next(calls) < 1:
            return real(*arguments, **options)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, step, fail)

    with pytest.raises(StoreUnavailable, match="Input/output error"):
        put_together(folder, TOGETHER)
    monkeypatch.undo()
    whole = {file.path for file in TOGETHER[:-1]}
    assert files(root) <= whole
    assert psutil.Process().num_fds() == open_before


def test_what_files_lie_in_is_flushed_once_for_all_of_them_before_they_are_settled(
    folder: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("chunks/aa", "chunks/bb", "manifests"):
        (root / name).mkdir(parents=True)
    real, flushed = os.fsync, list[str]()

    def look(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").readlink()
        if path.is_dir():
            flushed.append(str(path.relative_to(root)))
            assert not list(path.glob(".*")), "named first"
        real(file)

    monkeypatch.setattr(os, "fsync", look)
    names = ("chunks/aa/1", "chunks/bb/1", "chunks/aa/2", "chunks/aa/3", "manifests/1.json")
    writing = folder.begin(NamedBytes(name, name.encode()) for name in names)
    assert flushed == []
    writing.place(lambda _index: None)
    writing.settle()
    assert sorted(flushed) == ["chunks/aa", "chunks/bb", "manifests"]
    assert files(root) == set(names)


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_file_alone_is_flushed_by_who_waits_for_it_and_by_others_where_there_is_more_to_do(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch, *, meanwhile: bool
) -> None:
    folder.put("packed/before", b"so that the folder is there")
    real, flushed = os.fsync, list[tuple[str, bool]]()

    def look(file: int) -> None:
        name = Path(f"/proc/self/fd/{file}").readlink().name
        flushed.append((name, threading.current_thread() is threading.main_thread()))
        real(file)

    monkeypatch.setattr(os, "fsync", look)
    writing = folder.begin([NamedBytes("packed/1", b"arrow")])
    if meanwhile:
        writing.flush()
    writing.place(lambda _index: None)
    assert folder.get("packed/1") == b"arrow"
    writing.settle()
    (file, by_us), (place, last_by_us) = flushed
    assert file.startswith(".1.")
    assert by_us is not meanwhile
    assert (place, last_by_us) == ("packed", True)


def test_what_stands_there_already_is_not_taken_for_flushed(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put(CHUNK, b"arrow")
    real, flushed = os.fsync, list[str]()

    def look(file: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{file}").readlink().name)
        real(file)

    monkeypatch.setattr(os, "fsync", look)
    folder.put(CHUNK, b"arrow")
    assert flushed == [Path(CHUNK).parent.name], "whoever named it may not have come so far"


def test_a_folder_that_somebody_else_makes_first_is_not_taken_for_flushed(
    folder: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, flush, flushed = os.mkdir, os.fsync, list[str]()

    def make_second(name: str, *, dir_fd: int) -> None:
        make(name, dir_fd=dir_fd)
        make(name, dir_fd=dir_fd)

    def look(file: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        flush(file)

    root.mkdir()
    monkeypatch.setattr(os, "mkdir", make_second)
    monkeypatch.setattr(os, "fsync", look)
    folder.put("manifests/1.json", b"{}")
    assert str(root) in flushed


def test_any_number_of_files_is_written_with_few_of_them_open(
    folder: FolderStore, root: Path
) -> None:
    most = 0

    def many() -> Iterator[NamedBytes]:
        nonlocal most
        for number in range(3 * MOST_OPEN + 5):
            most = max(most, psutil.Process().num_fds())
            yield NamedBytes(keys.chunk_path(f"{number:064x}"), b"%d" % number)

    before = psutil.Process().num_fds()
    writing = folder.begin(many())
    writing.place(lambda _index: None)
    writing.settle()
    assert most - before <= 2 * MOST_OPEN + 2
    assert psutil.Process().num_fds() == before
    assert len(files(root)) == 3 * MOST_OPEN + 5


def test_results_are_kept_in_the_data_folder(tmp_path: Path) -> None:
    store = storage.open_store(Settings(data_dir=tmp_path))
    store.put(CHUNK, b"x")
    assert (tmp_path / "results" / CHUNK).read_bytes() == b"x"


def test_bytes_can_be_kept_under_another_path_as_well(store: Store) -> None:
    store.put("pieces/one.arrow", b"abc")
    store.copy("pieces/one.arrow", CHUNK)
    store.copy("pieces/one.arrow", CHUNK)
    assert store.get(CHUNK) == b"abc"
    store.delete("pieces/one.arrow")
    assert store.get(CHUNK) == b"abc"
    with pytest.raises(Missing):
        store.copy("pieces/one.arrow", "pieces/two.arrow")
    assert not store.exists("pieces/two.arrow")


def test_what_is_kept_under_another_path_replaces_what_was_cut_short_there(store: Store) -> None:
    store.put("pieces/one.arrow", b"abc")
    store.put(CHUNK, b"ab")
    store.copy("pieces/one.arrow", CHUNK)
    assert store.get(CHUNK) == b"abc"


def test_files_are_found_by_how_their_names_begin(store: Store) -> None:
    assert list(store.beginning("pieces", ["a.1."])) == []
    names = ["a.1.json", "a.1.x.arrow", "a.11.json", "a.2.json", "b.1.y.arrow", "c.1.json"]
    for folder in ("pieces", "packed"):
        for name in names:
            store.put(f"{folder}/{name}", b"x")
    found = sorted(store.beginning("pieces", ["a.1.", "b.1.", "b.22."]))
    assert found == ["pieces/a.1.json", "pieces/a.1.x.arrow", "pieces/b.1.y.arrow"]
    assert list(store.beginning("pieces", [])) == []


def test_where_a_file_system_has_no_links_bytes_are_written_again(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    folder.put("pieces/one.arrow", b"abc")
    folder.copy("pieces/one.arrow", CHUNK)
    assert folder.get(CHUNK) == b"abc"
