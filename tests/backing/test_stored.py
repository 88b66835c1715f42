"""Results in the store: in one file or table by table, and never other bytes than those that were written."""

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.backing import keys, saving, stored
from neural_mri.backing.saving import SavedResult, Saving, Unsaved
from neural_mri.backing.storage import (
    MOST_OPEN,
    Damaged,
    FolderStore,
    Missing,
    NamedBytes,
    Store,
    StoreUnavailable,
    Writing,
)
from neural_mri.backing.stored import ALIGNMENT, open_result, pack
from neural_mri.contract.models import Numerics
from neural_mri.contract.results import Manifest, Provenance, TableRef, stamp, to_ipc
from neural_mri.contract.scans import ScanKind
from tests.backing.stores import fail_disk, files, overwrite, paths

JOB = UUID(int=7)  # names of tests do not change from run to run


def table(rows: int = 3) -> pa.Table:
    columns = pa.table({"position": pa.array(range(rows), pa.int32())})
    return stamp(
        columns, Provenance(table="tokens", version="1.0", unit="tokens", method="as encoded")
    )


TABLES = {"first": table(1), "second": table(20), "third": table(3)}


def manifest() -> Manifest:
    return Manifest(
        scan_key="a" * 64,
        kind=ScanKind.FMRI,
        model="tiny",
        revision="0" * 64,
        numerics=Numerics(),
        scanner_version="1",
        request={"scan_mode": "fMRI", "prompt": "two\nlines"},
        prompt_tokens=("two", "\n", "lines"),
        tables=(),
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        forward_seconds=0.1,
        compute_seconds=0.2,
        memory_bytes=3,
    )


def unsaved(
    tables: Mapping[str, pa.Table] = TABLES, *, attempt: int = 1, packs: bool = True, **more: Any
) -> Unsaved:
    packed = keys.packed_path(JOB, attempt) if packs else None
    return Unsaved(keys.pieces_path(JOB, attempt), manifest(), tables, packed=packed, **more)


def save(store: Store, result: Unsaved) -> SavedResult:
    return saving.save_result(
        store,
        result.path,
        result.manifest,
        result.tables,
        stored=result.stored,
        packed=result.packed,
    )


def folders(store: Store) -> set[str]:
    return {path.split("/")[0] for path in paths(store)}


@pytest.fixture(params=["one file", "table by table"])
def packs(request: pytest.FixtureRequest) -> bool:
    """Whether results are packed."""
    return bool(request.param == "one file")


def test_a_result_is_read_back_as_it_was_saved(store: Store, *, packs: bool) -> None:
    told: list[TableRef] = []
    saved = save(store, unsaved(packs=packs, stored=told.append))
    assert saved.path == (keys.packed_path if packs else keys.pieces_path)(JOB, 1)
    assert folders(store) == {"packed" if packs else "pieces"}
    assert stored.load_manifest(store, saved.path) == saved.manifest
    assert tuple(told) == saved.manifest.tables
    assert stored.is_whole(store, saved.path)
    for whole in (False, True):
        result = open_result(store, saved.path, whole=whole)
        assert result.manifest == saved.manifest
        for name, original in TABLES.items():
            found = result.table(name)
            assert found is not None
            assert (found.ref.table, found.ref.unit) == ("tokens", "tokens")
            assert found.ref.rows == original.num_rows
            assert result.read(found).equals(original, check_metadata=True)
            assert stored.read_table(store, found).equals(original, check_metadata=True)
            assert result.part(found, 5, 9) == result.bytes_of(found)[5:9]
        assert result.table("fourth") is None
    assert stored.read_tables(store, saved.path) == TABLES


def test_in_one_file_or_not_the_same_bytes_have_the_same_hashes(store: Store) -> None:
    packed, old = (
        open_result(store, save(store, unsaved(packs=packs)).path) for packs in (True, False)
    )
    assert packed.body == old.body == store.get(old.path)
    assert hashlib.sha256(packed.body).digest() == hashlib.sha256(store.get(old.path)).digest()
    for one, other in zip(packed.tables, old.tables, strict=True):
        assert one.ref == other.ref
        assert packed.bytes_of(one) == old.bytes_of(other) == store.get(other.path)


def test_no_bit_of_a_manifest_changes_unnoticed(folder: FolderStore, *, packs: bool) -> None:
    saved = save(folder, unsaved(packs=packs))
    body = folder.get(saved.path)
    for place in range(len(open_result(folder, saved.path).body)):
        spoilt = bytearray(body)
        spoilt[place] ^= 1 << place % 8
        overwrite(folder, saved.path, bytes(spoilt))
        with pytest.raises(Damaged, match=re.escape(saved.path)):
            open_result(folder, saved.path)
        assert not stored.is_whole(folder, saved.path)


def test_a_manifest_from_before_there_were_seals_is_read(store: Store) -> None:
    older = msgspec.structs.replace(manifest(), version=1)
    path = keys.pieces_path(JOB, 1)
    store.put(path, msgspec.json.encode(older))
    assert stored.load_manifest(store, path) == older
    # Whoever knows of no seals reads past one.
    assert msgspec.json.decode(stored.sealed(older), type=Manifest) == older


def test_a_file_is_one_line_and_then_the_tables_aligned_with_nothing_but_zeros_between(
    folder: FolderStore, root: Path
) -> None:
    saved = save(folder, unsaved())
    body = (root / saved.path).read_bytes()
    line, _, rest = body.partition(b"\n")
    assert msgspec.json.decode(line, type=Manifest) == saved.manifest
    at = len(body) - len(rest)
    for found in open_result(folder, saved.path).tables:
        assert found.start % ALIGNMENT == 0
        assert found.start - at < ALIGNMENT
        assert not any(body[at : found.start])
        assert body[found.start : found.end] == to_ipc(TABLES[found.ref.name])
        at = found.end
    assert at == len(body)


def test_a_packed_table_lies_aligned_in_a_memory_map(folder: FolderStore, root: Path) -> None:
    saved = save(folder, unsaved())
    with pa.memory_map(str(root / saved.path)) as mapped:
        for found in open_result(folder, saved.path).tables:
            mapped.seek(found.start)
            with pa.ipc.open_file(mapped.read_buffer(found.ref.bytes)) as reader:
                column = reader.read_all().column("position").chunk(0)
            values = column.buffers()[1]
            assert values.address % ALIGNMENT == 0
            assert column.equals(TABLES[found.ref.name].column("position").chunk(0))


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=6))
def test_whatever_tables_are_packed_each_is_found_again(bodies: list[bytes]) -> None:
    refs = tuple(
        TableRef(
            name=str(index),
            table="tokens",
            chunk=hashlib.sha256(body).hexdigest(),
            bytes=len(body),
            rows=0,
            unit="",
        )
        for index, body in enumerate(bodies)
    )
    line = stored.sealed(msgspec.structs.replace(manifest(), tables=refs))
    store = InMemory({"x.result": pack(line, bodies)})
    result = open_result(store, "x.result")  # type: ignore[arg-type]
    assert [result.bytes_of(each) for each in result.tables] == bodies
    assert result.is_whole()
    for cut in range(1, len(bodies[-1] if bodies else b"") + 2):
        store.files["x.result"] = pack(line, bodies)[:-cut]
        assert not stored.is_whole(store, "x.result")  # type: ignore[arg-type]


class InMemory:
    """The part of a store that reads."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def get(self, path: str) -> bytes:
        return self.files[path]

    def get_range(self, path: str, start: int, end: int) -> bytes:
        return self.files[path][start:end]

    def size(self, path: str) -> int:
        return len(self.files[path])


def test_a_manifest_longer_than_what_is_read_first_is_read_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save(store, unsaved())
    size = store.size(saved.path)
    line = len(open_result(store, saved.path).body)
    for first in (1, 100, line, line + 1, line + 70, size - 1, size, size + 1):
        monkeypatch.setattr(stored, "HEAD_BYTES", first)
        result = open_result(store, saved.path)
        assert result.manifest == saved.manifest
        assert result.is_whole()
        for found in result.tables:
            assert result.read(found).equals(TABLES[found.ref.name])


class Counting:
    """A store that says what is asked of it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self._store, name)


def test_a_packed_result_that_is_wanted_whole_is_read_once(folder: FolderStore) -> None:
    saved = save(folder, unsaved())
    store: Any = Counting(folder)
    assert stored.read_tables(store, saved.path) == TABLES
    assert stored.is_whole(store, saved.path)
    assert store.asked == ["get", "get_range"]


def test_what_is_large_is_stored_table_by_table(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(to_ipc(each)) for each in TABLES.values())
    monkeypatch.setattr(saving, "PACKED_BYTES", size)
    assert save(store, unsaved(attempt=1)).path == keys.packed_path(JOB, 1)
    monkeypatch.setattr(saving, "PACKED_BYTES", size - 1)
    told: list[TableRef] = []
    large = save(store, unsaved(attempt=2, stored=told.append))
    assert large.path == keys.pieces_path(JOB, 2)
    assert tuple(told) == large.manifest.tables
    assert stored.read_tables(store, large.path) == TABLES
    assert not store.exists(keys.packed_path(JOB, 2))


def test_of_a_large_result_no_more_is_in_memory_than_is_small_and_one_table(
    folder: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {f"tokens.{number}": table(100 + number) for number in range(6)}
    sizes = [len(to_ipc(each)) for each in tables.values()]
    monkeypatch.setattr(saving, "PACKED_BYTES", sum(sizes[:2]) - 1)
    encoded: list[int] = []

    def counting(each: pa.Table) -> bytes:
        encoded.append(each.num_rows)
        return to_ipc(each)

    monkeypatch.setattr(saving, "to_ipc", counting)
    written: list[int] = []

    class Looking:
        def begin(self, files: Iterable[NamedBytes]) -> Writing:
            def looked() -> Iterable[NamedBytes]:
                for file in files:
                    written.append(len(encoded))
                    yield file

            return folder.begin(looked())

    looking: Any = Looking()
    assert save(looking, unsaved(tables)).path == keys.pieces_path(JOB, 1)
    assert written == [2, 2, 3, 4, 5, 6, 6]


def test_a_result_without_tables_is_a_result(store: Store, *, packs: bool) -> None:
    saved = save(store, unsaved({}, packs=packs))
    assert stored.is_whole(store, saved.path)
    assert stored.read_tables(store, saved.path) == {}


def test_what_is_discarded_is_gone_and_nothing_of_another_attempts(
    store: Store, *, packs: bool
) -> None:
    one, other = (save(store, unsaved(attempt=attempt, packs=packs)) for attempt in (1, 2))
    stored.discard(store, one.path)
    assert {keys.result_of(path) for path in paths(store)} == {other.path}
    assert {keys.attempt_of(path) for path in paths(store)} == {(JOB, 2)}
    assert stored.read_tables(store, other.path) == TABLES
    for path in (one.path, keys.packed_path(JOB, 3), keys.pieces_path(JOB, 3)):
        stored.discard(store, path)
    assert stored.is_whole(store, other.path)


def test_a_result_whose_tables_stand_under_their_hashes_is_read_and_keeps_them(
    store: Store,
) -> None:
    """As earlier releases stored them, and as calibrations are: others may need the same tables."""
    saved = saving.save_result(store, keys.manifest_path(JOB, 1), manifest(), TABLES)
    assert folders(store) == {"chunks", "manifests"}
    assert stored.read_tables(store, saved.path) == TABLES
    stored.discard(store, saved.path)
    assert folders(store) == {"chunks"}


# Interrupted


@pytest.mark.parametrize("name", TABLES)
def test_who_stops_at_a_table_leaves_no_result(store: Store, *, packs: bool, name: str) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(ref: TableRef) -> None:
        assert not any(
            store.exists(path_of(JOB, 1)) for path_of in (keys.packed_path, keys.pieces_path)
        )
        if ref.name == name:
            raise Interrupted

    with pytest.raises(Interrupted):
        save(store, unsaved(packs=packs, stored=interrupt))
    assert folders(store) == (set() if packs else {"pieces"})


@pytest.mark.parametrize("step", ["fsync", "replace", "open", "write"])
def test_a_disk_error_at_any_step_leaves_nothing_of_a_packed_result(
    folder: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    (root / "packed").mkdir(parents=True)
    fail_disk(monkeypatch, step)
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        save(folder, unsaved())
    monkeypatch.undo()
    assert files(root) == set()


def test_a_packed_result_and_its_name_are_flushed_together_before_it_is_saved(
    folder: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "packed").mkdir(parents=True)
    real, seen = os.fsync, list[tuple[str, bool]]()

    def look(file: int) -> None:
        flushed = Path(f"/proc/self/fd/{file}").readlink()
        whole = (root / keys.packed_path(JOB, 1)).stat().st_size > 0
        real(file)
        seen.append(("folder" if flushed.is_dir() else "file", whole))

    monkeypatch.setattr(os, "fsync", look)
    save(folder, unsaved())
    assert sorted(seen) == [("file", True), ("folder", True)]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_packed_result_that_is_not_flushed_is_taken_away_and_written_anew(
    folder: FolderStore, root: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (root / "packed").mkdir(parents=True)
    real, flushed = os.fsync, list[str]()

    def fail(file: int) -> None:
        is_folder = Path(f"/proc/self/fd/{file}").readlink().is_dir()
        if is_folder is (what == "folder"):
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    def look(file: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{file}").readlink().name)
        real(file)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreUnavailable, match="Input/output error"):
        save(folder, unsaved())
    assert files(root) == set()

    # What a killed worker has left there may be in nobody's memory but the kernel's.
    name = Path(keys.packed_path(JOB, 1)).name
    monkeypatch.setattr(os, "fsync", real)
    saved = save(folder, unsaved())
    monkeypatch.setattr(os, "fsync", look)
    assert save(folder, unsaved()) == saved
    assert sorted(flushed) == sorted([name, "packed"])


def test_of_results_that_are_begun_those_alone_are_found_that_are_finished(
    store: Store, *, packs: bool
) -> None:
    results = [
        unsaved({"tokens": table(attempt + 1)}, attempt=attempt, packs=packs)
        for attempt in range(1, 40)
    ]
    wanted = [each.path for each in results[::2]]
    stands = {each.path: each.packed or each.path for each in results}
    with Saving(store, results) as going:
        assert not any(store.exists(path) for path in stands.values())
        saved = going.finish(wanted)
    assert list(saved) == wanted
    found = [path for path in paths(store) if not path.endswith(".arrow")]
    assert found == sorted(stands[path] for path in wanted)
    for path, one in saved.items():
        assert isinstance(one, SavedResult)
        assert one.path == stands[path]
        assert stored.load_manifest(store, one.path) == one.manifest
        [ref] = one.manifest.tables
        assert stored.read_tables(store, one.path)["tokens"].num_rows == ref.rows


def test_as_many_small_results_as_files_may_be_open_are_all_begun_at_once(
    folder: FolderStore,
) -> None:
    results = [unsaved(attempt=attempt) for attempt in range(1, MOST_OPEN + 2)]
    with Saving(folder, results[:-1]) as going:
        assert going.is_quick
    with Saving(folder, results) as going:
        assert not going.is_quick


def test_a_result_that_cannot_be_encoded_costs_the_others_nothing(
    store: Store, *, packs: bool
) -> None:
    unsigned = pa.table({"position": pa.array([1], pa.int32())})
    bad = unsaved({"tokens": table(), "unsigned": unsigned}, attempt=1, packs=packs)
    good = unsaved({"tokens": table()}, attempt=2, packs=packs)
    with Saving(store, [bad, good]) as going:
        saved = going.finish([good.path, bad.path])
    assert isinstance(saved[good.path], SavedResult)
    assert isinstance(saved[bad.path], ValueError)
    found = [path for path in paths(store) if not path.endswith(".arrow")]
    assert found == [good.packed or good.path]


# Damaged


def harmed(body: bytes, start: int, end: int, change: str) -> bytes:
    match change:
        case "flip":
            middle = (start + end) // 2
            return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        case "truncate":
            return body[: end - 1]
        case _:
            return body[:start]


@pytest.mark.parametrize("change", ["flip", "truncate", "empty"])
def test_a_damaged_table_is_refused_and_named(store: Store, *, packs: bool, change: str) -> None:
    saved = save(store, unsaved({"tokens": table()}, packs=packs))
    [found] = open_result(store, saved.path).tables
    overwrite(store, found.path, harmed(store.get(found.path), found.start, found.end, change))
    for whole in (False, True):
        result = open_result(store, saved.path, whole=whole)
        assert result.is_whole() == (change == "flip")
        with pytest.raises(Damaged, match="table tokens"):
            result.read(found)
    with pytest.raises(Damaged, match="table tokens"):
        stored.read_table(store, found)


@pytest.mark.parametrize("head", [1, stored.HEAD_BYTES])
@pytest.mark.parametrize("change", ["flip", "truncate", "empty"])
def test_damage_leaves_what_lies_before_it_readable(
    store: Store, monkeypatch: pytest.MonkeyPatch, change: str, head: int
) -> None:
    monkeypatch.setattr(stored, "HEAD_BYTES", head)
    saved = save(store, unsaved())
    first, second, third = open_result(store, saved.path).tables
    body = store.get(saved.path)
    overwrite(store, saved.path, harmed(body, second.start, second.end, change))
    result = open_result(store, saved.path)
    assert result.is_whole() == (change == "flip")
    assert result.read(first).equals(TABLES["first"])
    with pytest.raises(Damaged, match="table second"):
        result.read(second)
    if change == "flip":
        assert result.read(third).equals(TABLES["third"])
    else:
        with pytest.raises(Damaged, match="table third"):
            result.read(third)


def test_what_is_longer_than_it_was_is_not_whole(store: Store, *, packs: bool) -> None:
    saved = save(store, unsaved({"tokens": table()}, packs=packs))
    [found] = open_result(store, saved.path).tables
    overwrite(store, found.path, store.get(found.path) + b"x")
    assert not stored.is_whole(store, saved.path)


def test_a_lost_table_is_missing(store: Store, *, packs: bool) -> None:
    saved = save(store, unsaved({"tokens": table()}, packs=packs))
    result = open_result(store, saved.path)
    [found] = result.tables
    store.delete(found.path)
    with pytest.raises(Missing):
        stored.read_table(store, found)
    assert not stored.is_whole(store, saved.path)


@pytest.mark.parametrize("path", [keys.packed_path(JOB, 1), keys.pieces_path(JOB, 1)])
@pytest.mark.parametrize("body", [b"", b"{}", b"\xff\xfe", b'{"scan_key": 1}', b"{}\n", b"\n"])
def test_what_is_no_manifest_is_damaged(store: Store, path: str, body: bytes) -> None:
    store.put(path, body)
    with pytest.raises(Damaged, match=r"is not a manifest|ends within its manifest"):
        stored.load_manifest(store, path)
    assert not stored.is_whole(store, path)
    assert Damaged.status == 410


@pytest.mark.parametrize("size", [-1, 10**15])
def test_a_manifest_that_says_nonsense_of_its_tables_is_found_out(
    folder: FolderStore, size: int
) -> None:
    saved = save(folder, unsaved())
    refs = tuple(msgspec.structs.replace(ref, bytes=size) for ref in saved.manifest.tables)
    line = stored.sealed(msgspec.structs.replace(saved.manifest, tables=refs))
    folder.put(saved.path, pack(line, map(to_ipc, TABLES.values())))
    result = open_result(folder, saved.path)
    assert not result.is_whole()
    for found in result.tables:
        for read in (result.read, lambda each: stored.read_table(folder, each)):
            with pytest.raises(Damaged):
                read(found)


def test_a_paths_suffix_says_how_a_result_is_stored() -> None:
    job = UUID(int=1)
    assert keys.is_packed(keys.packed_path(job, 1))
    others = (
        keys.manifest_path(job, 1),
        keys.kept_result_path("a" * 64),
        keys.calibration_path("b"),
    )
    assert not any(map(keys.is_packed, others))
