"""What the reaper takes away: old jobs, and results that nobody names."""

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID, uuid4

import msgspec
import pytest
import structlog
from sqlalchemy import update

from neural_mri.backing import deletion, jobs, kept_results, keys, storage
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.rows import DISCARDS, JOBS, KEPT_RESULTS
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import FolderStore, Store, StoreUnavailable
from neural_mri.backing.stored import sealed
from neural_mri.contract.jobs import JobState
from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.results import Manifest
from neural_mri.contract.scans import ScanKind
from tests.backing.stores import paths
from tests.servers import folder_only
from tests.worker.reaping import AT_ONCE, claim, state, submit
from worker.reaper import ABANDONED_SECONDS, Reaper


@pytest.mark.parametrize("path_of", [keys.packed_path, keys.pieces_path, keys.manifest_path])
def test_a_lost_attempts_result_that_no_job_names_is_taken_away(
    reaper: Reaper,
    settings: Settings,
    sessions: Sessions,
    path_of: Callable[[UUID, int], str],
) -> None:
    submit(sessions)
    lost = claim(sessions)
    store = storage.open_store(settings)
    store.put(path_of(lost.id, lost.attempt), b"{}")
    store.put(path_of(lost.id, lost.attempt + 1), b"{}")
    reaper.round()
    assert not store.exists(path_of(lost.id, lost.attempt))
    assert store.exists(path_of(lost.id, lost.attempt + 1))


def finish(sessions: Sessions, store: Store, days_ago: float) -> Job:
    """A job that ended some days ago, and its result."""
    [job] = submit(sessions)
    held = claim(sessions)
    path = keys.packed_path(job.id, 1)
    store.put(path, b"{}\n")
    for to, manifest in ((JobState.RUNNING, None), (JobState.SUCCEEDED, path)):
        sessions.write(jobs.advance, held.id, to, attempt=1, manifest=manifest)
    earlier = JOBS.c.finished_at - days_ago * 86_400.0
    with sessions.writing() as session:
        session.execute(update(JOBS).where(JOBS.c.id == job.id).values(finished_at=earlier))
    ended = sessions.read(jobs.get, job.id)
    assert ended is not None
    return ended


class AwayStore(FolderStore):
    """One from which nothing can be taken away."""

    def delete(self, path: str) -> None:
        raise StoreUnavailable(f"{path}: away")


def everything_lingered(sessions: Sessions) -> None:
    """Have ten minutes pass for what deleted jobs have left."""
    with sessions.writing() as session:
        session.execute(update(DISCARDS).values(deleted_at=0.0))


def test_jobs_older_than_they_are_kept_are_deleted_and_their_results_taken_away_later(
    settings: Settings, sessions: Sessions, redis: SyncRedis
) -> None:
    store = storage.open_store(settings)
    old, young = (finish(sessions, store, days_ago) for days_ago in (8, 6))
    assert old.manifest is not None
    assert young.manifest is not None
    keeping = msgspec.structs.replace(settings, keep_days=7)
    Reaper(keeping, sessions, redis, store).round()
    assert sessions.read(jobs.recent, "ada") == [young]
    assert store.exists(old.manifest), "somebody may be reading it"
    everything_lingered(sessions)
    Reaper(keeping, sessions, redis, store).round()
    assert not store.exists(old.manifest)
    assert store.exists(young.manifest)
    assert redis.hgetall(keys.DELETED) == {b"job:age": b"1", b"result:unneeded": b"1"}


def test_what_is_taken_away_for_too_long_is_left_to_another(
    settings: Settings,
    sessions: Sessions,
    redis: SyncRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It might be there anew by then."""
    store, digests = storage.open_store(settings), [f"{number:064x}" for number in range(3)]
    files = [keys.kept_result_path(digest) for digest in digests]
    files += [keys.table_path(path, "ab" * 32) for path in files]
    for path in files:
        store.put(path, b"kept")
    sessions.write(kept_results.expect, digests)

    def pass_by(**columns: float) -> None:
        with sessions.writing() as session:
            session.execute(update(KEPT_RESULTS).values(**columns))

    pass_by(due=0.0)
    with monkeypatch.context() as slow:
        slow.setattr(kept_results, "TAKEN_SECONDS", 0.0)
        with structlog.testing.capture_logs() as logged:
            Reaper(settings, sessions, redis, store).round()
    assert "taken too long" in str(logged)
    assert all(map(store.exists, files))
    with pytest.raises(Unavailable, match="being taken away"):
        sessions.write(kept_results.expect, digests)
    pass_by(taken_at=0.0)
    Reaper(settings, sessions, redis, store).round()
    assert not any(map(store.exists, files))
    assert redis.hgetall(keys.DELETED) == {b"result:unkept": b"3"}
    sessions.write(kept_results.expect, digests)


def test_a_clock_that_is_put_forward_makes_no_job_old(
    settings: Settings, sessions: Sessions, redis: SyncRedis
) -> None:
    store = storage.open_store(settings)
    job = finish(sessions, store, days_ago=8)
    reaper = Reaper(msgspec.structs.replace(settings, keep_days=7), sessions, redis, store)
    right = sessions.read(deletion.clock) - 3650 * 86_400.0
    assert reaper._clock.goes_on(right)
    reaper.round()
    assert sessions.read(jobs.recent, "ada") == [job]
    assert reaper._clock.goes_on(right + 1.0), "it is set right again"
    reaper._delete_at = 0.0
    reaper.round()
    assert reaper._clock._set_at is not None
    reaper._clock._set_at -= 86_400.0
    reaper._delete_at = 0.0
    reaper.round()
    assert sessions.read(jobs.recent, "ada") == [], "after a day that is what the time is"


def test_a_job_is_kept_for_ever_where_nothing_is_said(
    reaper: Reaper, settings: Settings, sessions: Sessions
) -> None:
    job = finish(sessions, storage.open_store(settings), days_ago=10_000)
    reaper.round()
    assert sessions.read(jobs.recent, "ada") == [job]


def test_while_the_store_is_away_what_deleted_jobs_left_is_not_forgotten(
    settings: Settings, sessions: Sessions, redis: SyncRedis
) -> None:
    store = storage.open_store(settings)
    job = finish(sessions, store, days_ago=0)
    sessions.write(deletion.delete_job, job.id)
    everything_lingered(sessions)
    Reaper(settings, sessions, redis, AwayStore(settings.store_dir)).round()
    assert job.manifest is not None
    assert store.exists(job.manifest)
    Reaper(settings, sessions, redis, store).round()
    assert not store.exists(job.manifest)
    assert sessions.read(deletion.discarded, older_seconds=-1.0) == []


def test_tables_of_a_deleted_job_go_though_no_manifest_ever_named_them(
    settings: Settings, sessions: Sessions, redis: SyncRedis
) -> None:
    store = storage.open_store(settings)
    submit(sessions)
    lost = claim(sessions)
    others = keys.pieces_path(uuid4(), 1)
    tables = {
        keys.table_path(manifest, digit * 64)
        for manifest in (keys.pieces_path(lost.id, 1), others)
        for digit in "ab"
    }
    for path in (others, *tables):
        store.put(path, b"{}")
    assert sessions.write(jobs.advance, lost.id, JobState.QUEUED, attempt=1)
    assert sessions.write(jobs.request_cancel, lost.id).moved
    sessions.write(deletion.delete_job, lost.id)
    everything_lingered(sessions)
    Reaper(settings, sessions, redis, store).round()
    assert {path for path in (others, *tables) if store.exists(path)} == {
        path for path in (others, *tables) if str(lost.id) not in path
    }


@folder_only
def test_files_that_nobody_finishes_are_taken_away_in_the_end(
    reaper: Reaper, settings: Settings
) -> None:
    folder = settings.store_dir / "chunks" / "ab"
    folder.mkdir(parents=True)
    abandoned, growing, whole = (
        folder / name
        for name in (".abc.arrow.4242.0123abcd", ".def.arrow.4243.0123abcd", "abc.arrow")
    )
    for file in (abandoned, growing, whole):
        file.write_bytes(b"half")
    long_ago = time.time() - 2 * ABANDONED_SECONDS
    for file in (abandoned, whole):
        os.utime(file, (long_ago, long_ago))
    reaper.round()
    assert sorted(folder.iterdir()) == sorted([growing, whole])


@pytest.mark.parametrize("path_of", [keys.packed_path, keys.pieces_path, keys.manifest_path])
def test_results_of_attempts_that_came_to_nothing_are_taken_away_in_the_end(
    reaper: Reaper,
    settings: Settings,
    sessions: Sessions,
    path_of: Callable[[UUID, int], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [first, _] = submit(sessions, 2, scan_key="a" * 64)
    handed_over = claim(sessions)
    assert sessions.write(jobs.request_cancel, first.id).moved
    store = storage.open_store(settings)
    reaper.round()
    late = path_of(handed_over.id, handed_over.attempt)
    store.put(late, b"{}")
    again = claim(sessions, owner=LeaseOwner.here())
    running = path_of(again.id, again.attempt)
    store.put(running, b"{}")

    def looked_through() -> bool:
        reaper._look_through_at = 0.0
        reaper.round()
        return not store.exists(late)

    assert not looked_through(), "somebody may have it in hand"
    monkeypatch.setattr("worker.reaper.ABANDONED_SECONDS", AT_ONCE)
    assert looked_through()
    assert store.exists(running)
    for to, named in ((JobState.RUNNING, None), (JobState.SUCCEEDED, running)):
        sessions.write(jobs.advance, again.id, to, attempt=again.attempt, manifest=named)
    assert looked_through()
    assert store.exists(running)


def test_however_many_results_there_are_a_round_looks_at_some(
    reaper: Reaper, settings: Settings, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.reaper.MOST_RESULTS", 2)
    monkeypatch.setattr("worker.reaper.ABANDONED_SECONDS", AT_ONCE)
    store = storage.open_store(settings)
    for job in submit(sessions, 5):
        lost = claim(sessions)
        sessions.write(jobs.advance, lost.id, JobState.FAILED, attempt=1, problem={"detail": "no"})
        store.put(keys.packed_path(job.id, 1), b"{}")
    left = []
    for _ in range(4):
        reaper.round()
        left.append(len(paths(store)))
    assert left == [3, 1, 0, 0]


def calibration(texts: list[str]) -> Manifest:
    """What a calibration's file says."""
    return Manifest(
        scan_key="a" * 64,
        kind=ScanKind.CALIBRATION,
        model="tiny",
        revision="b" * 64,
        numerics=Numerics(),
        scanner_version="1",
        request={"texts": texts},
        tables=(),
        created_at=datetime.now(UTC),
        forward_seconds=0.0,
        compute_seconds=0.0,
        memory_bytes=0,
    )


def test_copies_of_calibrations_on_somebodys_texts_are_taken_away_and_models_own_stay(
    reaper: Reaper, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.reaper.ABANDONED_SECONDS", AT_ONCE)
    monkeypatch.setattr(keys, "CALIBRATIONS", ("calibrations/0a", "calibrations/0b"))
    store = storage.open_store(settings)
    own, theirs, damaged = (
        keys.calibration_path(f"{begins}{'0' * 62}") for begins in ("0a", "0b", "0a0b")
    )
    for path, texts in ((own, []), (theirs, ["a secret"])):
        store.put(path, sealed(calibration(texts)))
    store.put(damaged, b"{")
    reaper.round()
    assert paths(store) == [own, theirs], "a folder a round"
    reaper.round()
    assert paths(store) == [own]


@folder_only
def test_results_that_cannot_be_looked_through_are_with_the_next_sweep(
    reaper: Reaper, settings: Settings, sessions: Sessions
) -> None:
    settings.store_dir.mkdir(parents=True)
    in_the_way = settings.store_dir / "packed"
    in_the_way.touch()
    submit(sessions)
    lost = claim(sessions)
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            reaper.round()
    said = [line["event"] for line in logged if line.get("on") == "leftovers"]
    assert said == ["round_failed", "round_succeeded_again"]
    assert state(sessions, lost.id) is JobState.QUEUED
    in_the_way.unlink()
    path = keys.packed_path(lost.id, lost.attempt)
    storage.open_store(settings).put(path, b"{}")
    os.utime(settings.store_dir / path, (0, 0))
    reaper.round()
    assert (settings.store_dir / path).exists()
    assert reaper._look_through_at == reaper._sweep_at
    reaper._sweep_at = reaper._look_through_at = 0.0
    reaper.round()
    assert not (settings.store_dir / path).exists()
