import errno
import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore
import psutil
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neural_mri.backing import keys, storage
from neural_mri.backing.s3 import S3Store
from neural_mri.backing.saving import SavedResult, Saving, Unsaved, save_result
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import (
    MOST_OPEN,
    Damaged,
    FolderStore,
    InvalidPath,
    Missing,
    NamedBytes,
    Store,
    StoreFull,
    StoreUnavailable,
)
from neural_mri.contract.models import Numerics
from neural_mri.contract.results import Manifest, Provenance, TableRef, stamp
from neural_mri.contract.scans import ScanKind
from tests.servers import Bucket

CHUNK = keys.chunk_path("ab" * 32)
JOB = uuid4()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def folder(root: Path) -> FolderStore:
    return FolderStore(root)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, root: Path) -> Store:
    """A store of either kind, empty."""
    if request.param == "folder":
        return FolderStore(root)
    shared: Bucket = request.getfixturevalue("shared_bucket")
    url = shared.url(f"{uuid4()}/deeper")
    return storage.open_store(Settings(store_url=url, store_endpoint=shared.endpoint))


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


def paths(store: Store) -> list[str]:
    """Everything that a store holds."""
    if isinstance(store, FolderStore):
        return sorted(files(store._root))
    assert isinstance(store, S3Store)
    return sorted(entry["path"] for entry in obstore.list(store._store).collect())


def overwrite(store: Store, path: str, body: bytes) -> None:
    """Damage what stands there, behind the store's back."""
    if isinstance(store, FolderStore):
        (store._root / path).write_bytes(body)
    else:
        store.put(path, body)


def test_bytes_are_read_back_as_they_were_put(store: Store) -> None:
    store.put(CHUNK, b"arrow")
    assert store.get(CHUNK) == b"arrow"
    assert store.size(CHUNK) == 5
    assert store.exists(CHUNK)
    assert paths(store) == [CHUNK]


@pytest.mark.parametrize(("start", "end"), [(0, 5), (1, 3), (4, 5), (0, 1)])
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
    real = getattr(os, step)

    def fail(*arguments: Any, **options: Any) -> Any:
        if step == "open" and not arguments[1] & os.O_CREAT:
            return real(*arguments, **options)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, step, fail)
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

    def write() -> None:
        writing = folder.begin(TOGETHER)
        try:
            writing.place(lambda _index: None)
            writing.settle()
        finally:
            writing.drop()

    with pytest.raises(StoreUnavailable, match="Input/output error"):
        write()
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


# Results


def table(rows: int = 3) -> pa.Table:
    columns = pa.table({"position": pa.array(range(rows), pa.int32())})
    return stamp(
        columns, Provenance(table="tokens", version="1.0", unit="tokens", method="as encoded")
    )


def manifest() -> Manifest:
    return Manifest(
        scan_key="a" * 64,
        kind=ScanKind.FMRI,
        model="tiny",
        revision="0" * 64,
        numerics=Numerics(),
        scanner_version="1",
        request={"scan_mode": "fMRI"},
        tables=(),
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        forward_seconds=0.1,
        compute_seconds=0.2,
        memory_bytes=3,
    )


def test_a_result_is_read_back_as_it_was_saved(store: Store) -> None:
    told: list[TableRef] = []
    tables = {"tokens": table(), "vectors.1": table(5)}
    saved = save_result(store, keys.manifest_path(JOB, 2), manifest(), tables, stored=told.append)
    assert saved.path == keys.manifest_path(JOB, 2)
    assert storage.load_manifest(store, saved.path) == saved.manifest
    assert tuple(told) == saved.manifest.tables
    for name, original in tables.items():
        ref = saved.manifest.table(name)
        assert ref is not None
        assert (ref.table, ref.unit, ref.rows) == ("tokens", "tokens", original.num_rows)
        assert ref.bytes == store.size(keys.chunk_path(ref.chunk))
        found = storage.read_table(store, ref)
        assert found.equals(original, check_metadata=True)


def test_equal_tables_are_stored_once(store: Store) -> None:
    for attempt in (1, 2):
        save_result(store, keys.manifest_path(JOB, attempt), manifest(), {"tokens": table()})
    assert sorted(path.split("/")[0] for path in paths(store)) == [
        "chunks",
        "manifests",
        "manifests",
    ]


def test_the_manifest_comes_last(store: Store) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(ref: TableRef) -> None:
        if ref.name == "second":
            raise Interrupted

    tables = {"first": table(1), "second": table(2), "third": table(3)}
    with pytest.raises(Interrupted):
        save_result(store, keys.manifest_path(JOB, 1), manifest(), tables, stored=interrupt)
    assert {path.split("/")[0] for path in paths(store)} == {"chunks"}


def test_of_results_that_are_begun_those_alone_are_named_that_are_finished(store: Store) -> None:
    def result(attempt: int) -> Unsaved:
        return Unsaved(keys.manifest_path(JOB, attempt), manifest(), {"tokens": table(attempt + 1)})

    results = [result(attempt) for attempt in range(1, 40)]
    wanted = [each.path for each in results[::2]]
    with Saving(store, results) as saving:
        assert not any(store.exists(each.path) for each in results)
        saved = saving.finish(wanted)
    assert list(saved) == wanted
    assert [path for path in paths(store) if path.startswith("manifests")] == sorted(wanted)
    for path, one in saved.items():
        assert isinstance(one, SavedResult)
        assert storage.load_manifest(store, path) == one.manifest
        [ref] = one.manifest.tables
        assert storage.read_table(store, ref).num_rows == ref.rows


def test_a_result_that_cannot_be_encoded_costs_the_others_nothing(store: Store) -> None:
    good, bad = (keys.manifest_path(JOB, attempt) for attempt in (1, 2))
    unsigned = pa.table({"position": pa.array([1], pa.int32())})
    results = [
        Unsaved(bad, manifest(), {"tokens": unsigned}),
        Unsaved(good, manifest(), {"tokens": table()}),
    ]
    with Saving(store, results) as saving:
        saved = saving.finish([good, bad])
    assert isinstance(saved[good], SavedResult)
    assert isinstance(saved[bad], ValueError)
    assert [path for path in paths(store) if path.startswith("manifests")] == [good]


@pytest.mark.parametrize("change", ["flip", "truncate", "empty"])
def test_a_damaged_chunk_is_refused(store: Store, change: str) -> None:
    saved = save_result(store, keys.manifest_path(JOB, 1), manifest(), {"tokens": table()})
    [ref] = saved.manifest.tables
    path = keys.chunk_path(ref.chunk)
    body = store.get(path)
    middle = len(body) // 2
    damaged = {
        "flip": body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :],
        "truncate": body[:-1],
        "empty": b"",
    }
    overwrite(store, path, damaged[change])
    with pytest.raises(Damaged, match="table tokens"):
        storage.read_table(store, ref)


def test_a_lost_chunk_is_missing(store: Store) -> None:
    saved = save_result(store, keys.manifest_path(JOB, 1), manifest(), {"tokens": table()})
    [ref] = saved.manifest.tables
    store.delete(keys.chunk_path(ref.chunk))
    with pytest.raises(Missing):
        storage.read_table(store, ref)


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff\xfe", b'{"scan_key": 1}'])
def test_what_is_no_manifest_is_damaged(store: Store, body: bytes) -> None:
    path = keys.manifest_path(JOB, 1)
    store.put(path, body)
    with pytest.raises(Damaged, match="is not a manifest"):
        storage.load_manifest(store, path)
    assert Damaged.status == 410


def test_results_are_kept_in_the_data_folder(tmp_path: Path) -> None:
    store = storage.open_store(Settings(data_dir=tmp_path))
    store.put(CHUNK, b"x")
    assert (tmp_path / "results" / CHUNK).read_bytes() == b"x"
