import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
import pytest
import redis
import structlog
from sqlalchemy import update

from neural_mri.backing import (
    batches,
    broker,
    database,
    deletion,
    feeding,
    jobs,
    kept_results,
    keys,
    queue,
    storage,
)
from neural_mri.backing.batches import Line, NewBatch
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import parse_entries
from neural_mri.backing.jobs import Job, LeaseOwner, Submission
from neural_mri.backing.rows import BATCHES, DISCARDS, JOBS, KEPT_RESULTS
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import FolderStore, Store, StoreUnavailable
from neural_mri.contract.events import Ended, Event, StateChanged, decode_event
from neural_mri.contract.jobs import JobKind, JobState, Lane
from neural_mri.contract.models import Numerics
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.results import Manifest
from neural_mri.contract.scans import ScanKind
from tests.backing.stores import paths
from tests.chaos.clock import Clock, may_step
from tests.servers import (
    Template,
    Valkey,
    database_copy,
    folder_only,
    migrated_database,
    sqlite_only,
    valkey,
)
from worker.reaper import ABANDONED_SECONDS, MOST_TICKETS, SWEEP_TIMES, Ending, Reaper

QUEUE = "scan.0123456789abcdef"
DEAD = LeaseOwner.here()._replace(start_ticks=1)
QUICK = "from worker import reaper; reaper.EXPIRE_EVERY_SECONDS = 0.1; reaper.main()"
"""A reaper that looks for what has waited too long at every turn."""
AT_ONCE = -60.0
"""For `ABANDONED_SECONDS`: what has just been written has stood for long enough."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return migrated_database(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with valkey() as running:
        yield running


@pytest.fixture
def settings(template: Template, server: Valkey, tmp_path: Path) -> Settings:
    own = database_copy(template, tmp_path / "data")
    return msgspec.structs.replace(own, redis_url=server.url, reaper_interval_seconds=0.05)


@pytest.fixture
def sessions(settings: Settings) -> Iterator[Sessions]:
    opened = database.sessions(settings)
    yield opened
    opened.close()


@pytest.fixture
def client(settings: Settings) -> Iterator[SyncRedis]:
    connection = broker.connect(settings)
    connection.flushall()
    yield connection
    connection.close()


@pytest.fixture
def reaper(settings: Settings, sessions: Sessions, client: SyncRedis) -> Reaper:
    return Reaper(settings, sessions, client, storage.open_store(settings))


def submit(sessions: Sessions, count: int = 1, scan_key: str | None = None) -> list[Job]:
    asked = Submission(
        owner="ada",
        kind=JobKind.SCAN,
        model="tiny",
        revision="0123456789abcdef" * 4,
        queue=QUEUE,
        request=b"{}",
        scan_key=scan_key,
    )
    return [sessions.write(jobs.submit, asked) for _ in range(count)]


def claim(sessions: Sessions, owner: LeaseOwner = DEAD) -> Job:
    [job] = sessions.write(jobs.claim, queue=QUEUE, owner=owner, limit=1, lease_seconds=60.0)
    return job


def told(client: SyncRedis, job_id: UUID) -> list[Event]:
    rows = client.xrange(keys.event_stream(job_id))
    return [decode_event(entry.data) for entry in parse_entries(rows)]


def state(sessions: Sessions, job_id: UUID) -> JobState:
    job = sessions.read(jobs.get, job_id)
    assert job is not None
    return job.state


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_what_a_dead_worker_held_is_queued_again_and_said(
    sessions: Sessions, client: SyncRedis, reaper: Reaper
) -> None:
    [job] = submit(sessions)
    claim(sessions)
    reaper.round()
    assert state(sessions, job.id) is JobState.QUEUED
    assert told(client, job.id) == [StateChanged(state=JobState.QUEUED, attempt=1)]


def test_what_a_dead_worker_held_can_be_taken_at_once_and_is_offered_no_more_than_once(
    sessions: Sessions, client: SyncRedis, reaper: Reaper
) -> None:
    submit(sessions, 2)
    queue.send_tickets(client, QUEUE, 1)
    claim(sessions)
    reaper.round()
    assert queue.waiting_tickets(client, QUEUE) == 2
    for _ in range(3):
        reaper.round()
    assert queue.waiting_tickets(client, QUEUE) == 2


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
    settings: Settings, sessions: Sessions, client: SyncRedis
) -> None:
    store = storage.open_store(settings)
    old, young = (finish(sessions, store, days_ago) for days_ago in (8, 6))
    assert old.manifest is not None
    assert young.manifest is not None
    keeping = msgspec.structs.replace(settings, keep_days=7)
    Reaper(keeping, sessions, client, store).round()
    assert sessions.read(jobs.recent, "ada") == [young]
    assert store.exists(old.manifest), "somebody may be reading it"
    everything_lingered(sessions)
    Reaper(keeping, sessions, client, store).round()
    assert not store.exists(old.manifest)
    assert store.exists(young.manifest)
    assert client.hgetall(keys.DELETED) == {b"job:age": b"1", b"result:unneeded": b"1"}


def test_what_is_taken_away_for_too_long_is_left_to_another(
    settings: Settings,
    sessions: Sessions,
    client: SyncRedis,
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
            Reaper(settings, sessions, client, store).round()
    assert "taken too long" in str(logged)
    assert all(map(store.exists, files))
    with pytest.raises(Unavailable, match="being taken away"):
        sessions.write(kept_results.expect, digests)
    pass_by(taken_at=0.0)
    Reaper(settings, sessions, client, store).round()
    assert not any(map(store.exists, files))
    assert client.hgetall(keys.DELETED) == {b"result:unkept": b"3"}
    sessions.write(kept_results.expect, digests)


def test_a_clock_that_is_put_forward_makes_no_job_old(
    settings: Settings, sessions: Sessions, client: SyncRedis
) -> None:
    store = storage.open_store(settings)
    job = finish(sessions, store, days_ago=8)
    reaper = Reaper(msgspec.structs.replace(settings, keep_days=7), sessions, client, store)
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
    settings: Settings, sessions: Sessions, client: SyncRedis
) -> None:
    store = storage.open_store(settings)
    job = finish(sessions, store, days_ago=0)
    sessions.write(deletion.delete_job, job.id)
    everything_lingered(sessions)
    Reaper(settings, sessions, client, AwayStore(settings.store_dir)).round()
    assert job.manifest is not None
    assert store.exists(job.manifest)
    Reaper(settings, sessions, client, store).round()
    assert not store.exists(job.manifest)
    assert sessions.read(deletion.discarded, older_seconds=-1.0) == []


def test_tables_of_a_deleted_job_go_though_no_manifest_ever_named_them(
    settings: Settings, sessions: Sessions, client: SyncRedis
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
    Reaper(settings, sessions, client, store).round()
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
        store.put(path, msgspec.json.encode(calibration(texts)))
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


def test_what_a_living_worker_holds_is_left_alone(
    sessions: Sessions, client: SyncRedis, reaper: Reaper
) -> None:
    [job] = submit(sessions)
    claim(sessions, owner=LeaseOwner.here())
    reaper.round()
    assert state(sessions, job.id) is JobState.CLAIMED
    assert told(client, job.id) == []


def test_the_last_lost_attempt_ends_the_stream_with_the_reason(
    sessions: Sessions, client: SyncRedis, reaper: Reaper
) -> None:
    [job] = submit(sessions)
    for _ in range(3):
        claim(sessions)
        reaper.round()
    *_, end = told(client, job.id)
    assert isinstance(end, Ended)
    assert end.state is JobState.QUARANTINED
    assert end.problem is not None
    assert "3 workers were lost" in end.problem["detail"]


def test_tickets_missing_for_two_rounds_are_sent(
    sessions: Sessions, client: SyncRedis, reaper: Reaper
) -> None:
    submit(sessions, 3)
    queue.send_tickets(client, QUEUE, 1)
    reaper.round()
    assert queue.waiting_tickets(client, QUEUE) == 1, "once is no proof"
    reaper.round()
    assert queue.waiting_tickets(client, QUEUE) == 3
    for _ in range(3):
        reaper.round()
    assert queue.waiting_tickets(client, QUEUE) == 3


def test_a_ticket_on_its_way_to_a_claim_is_not_sent_again(
    sessions: Sessions, client: SyncRedis, reaper: Reaper
) -> None:
    submit(sessions, 2)
    reaper.round()
    reaper.round()
    client.rpop(QUEUE)
    reaper.round()
    claim(sessions, owner=LeaseOwner.here())
    reaper.round()
    assert queue.waiting_tickets(client, QUEUE) == 1


def test_an_emptied_broker_gets_its_tickets_back_a_few_at_a_time(
    sessions: Sessions, client: SyncRedis, reaper: Reaper
) -> None:
    waiting = MOST_TICKETS + 10
    submit(sessions, waiting)
    for _ in range(2):
        client.flushall()
        counts = []
        for _ in range(5):
            reaper.round()
            counts.append(queue.waiting_tickets(client, QUEUE))
        assert counts == sorted(counts)
        assert counts[-1] == waiting
        assert max(b - a for a, b in pairwise(counts)) <= MOST_TICKETS


def test_a_job_that_waited_too_long_is_given_up(
    settings: Settings, sessions: Sessions, client: SyncRedis
) -> None:
    [job] = submit(sessions)
    time.sleep(0.02)
    impatient = msgspec.structs.replace(settings, queued_seconds=0.01)
    Reaper(impatient, sessions, client, storage.open_store(settings)).round()
    assert state(sessions, job.id) is JobState.EXPIRED
    [end] = told(client, job.id)
    assert isinstance(end, Ended)


def test_a_clock_that_is_put_forward_makes_no_attempt_late_and_one_that_is_late_ends(
    sessions: Sessions, reaper: Reaper
) -> None:
    [job] = submit(sessions)
    claim(sessions, LeaseOwner.here())
    reaper.round()
    with sessions.writing() as session:
        session.execute(update(JOBS).values(started_at=JOBS.c.started_at - 6000.0))
    reaper.round()
    assert state(sessions, job.id) is JobState.CLAIMED
    with sessions.writing() as session:
        session.execute(update(JOBS).values(deadline_seconds=0.01))

    def is_expired() -> bool:
        reaper.round()
        return state(sessions, job.id) is JobState.EXPIRED

    assert eventually(is_expired)


def test_a_clock_that_is_put_forward_makes_nobody_wait_too_long_and_half_no_batch(
    settings: Settings, sessions: Sessions, client: SyncRedis
) -> None:
    waits, fills = settings.queued_seconds, batches.LONGEST_FILLING.total_seconds()
    reaper = Reaper(settings, sessions, client, storage.open_store(settings))

    def round_anew() -> None:
        reaper._expire_at = 0.0
        reaper.round()

    [job] = submit(sessions)
    half = sessions.write(batches.begin, NewBatch("ada", "", Lane.BATCH, 2, "0" * 64))
    forward = waits + 60.0
    for clock in (reaper._waits, reaper._fillings):
        assert clock.goes_on(sessions.read(deletion.clock) - forward)
    with sessions.writing() as session:
        for table in (JOBS, BATCHES):
            session.execute(update(table).values(created_at=table.c.created_at - forward))
    round_anew()
    assert state(sessions, job.id) is JobState.QUEUED
    assert sessions.read(batches.find, half.id) is not None
    assert reaper._fillings._set_at is not None
    reaper._fillings._set_at -= fills
    round_anew()
    assert state(sessions, job.id) is JobState.QUEUED
    assert sessions.read(batches.find, half.id) is None, "it has waited by every clock"
    assert reaper._waits._set_at is not None
    reaper._waits._set_at -= waits
    round_anew()
    assert state(sessions, job.id) is JobState.EXPIRED


@sqlite_only
@pytest.mark.skipif(not may_step(), reason="no C compiler, or no Linux")
def test_the_process_gives_no_job_up_for_a_clock_that_is_put_forward(
    settings: Settings, sessions: Sessions, client: SyncRedis, tmp_path: Path
) -> None:
    clock = Clock(tmp_path / "clock")
    [job] = submit(sessions)
    environment = {**os.environ, **settings.environment(), **clock.environment}
    with subprocess.Popen(
        [sys.executable, "-c", QUICK], env=environment, stderr=subprocess.PIPE, text=True
    ) as running:
        assert eventually(lambda: queue.waiting_tickets(client, QUEUE) == 1)
        clock.set(settings.queued_seconds + 60.0)
        [late] = submit(sessions)
        assert eventually(lambda: queue.waiting_tickets(client, QUEUE) == 2)
        time.sleep(0.5)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=10)
    assert "clock_was_set" in said
    assert state(sessions, job.id) is state(sessions, late.id) is JobState.QUEUED


def test_however_many_waited_too_long_a_transaction_ends_some_of_them(
    settings: Settings, sessions: Sessions, client: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MOST_EXPIRED", 2)
    made = submit(sessions, 5)
    time.sleep(0.02)
    impatient = msgspec.structs.replace(settings, queued_seconds=0.01)
    reaper = Reaper(impatient, sessions, client, storage.open_store(settings))
    ended = []
    for _ in range(3):
        reaper.round()
        ended.append(sum(state(sessions, job.id) is JobState.EXPIRED for job in made))
    assert ended == [2, 4, 5]


def test_without_redis_jobs_are_still_taken_back_and_the_outage_said_once(
    settings: Settings, sessions: Sessions, tmp_path: Path
) -> None:
    away = msgspec.structs.replace(settings, redis_url=f"unix://{tmp_path}/nobody.sock")
    reaper = Reaper(away, sessions, broker.connect(away), storage.open_store(settings))
    [job] = submit(sessions)
    claim(sessions)
    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            reaper.round()
    assert state(sessions, job.id) is JobState.QUEUED
    assert [line["event"] for line in logged].count("round_failed") == 1


@sqlite_only
def test_a_database_that_is_away_is_tried_again(
    settings: Settings, client: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.01)
    sessions = database.sessions(settings)
    [job] = submit(sessions)
    claim(sessions)
    reaper = Reaper(settings, sessions, client, storage.open_store(settings))
    other = database.sessions(settings)
    with structlog.testing.capture_logs() as logged:
        with other.writing():
            for _ in range(3):
                reaper.round()
        reaper.round()
    other.close()
    said = [line["event"] for line in logged if line.get("on") == "database"]
    assert said == ["round_failed", "round_succeeded_again"]
    assert state(sessions, job.id) is JobState.QUEUED
    sessions.close()


def test_it_stops_when_told_to(settings: Settings, sessions: Sessions, client: SyncRedis) -> None:
    stop = threading.Event()
    reaper = Reaper(settings, sessions, client, storage.open_store(settings))
    running = threading.Thread(target=reaper.run, args=(stop.wait,))
    running.start()
    stop.set()
    running.join(5)
    assert not running.is_alive()


@pytest.fixture
def process(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """The reaper as it is really run."""
    environment = {**os.environ, **settings.environment()}
    with subprocess.Popen(
        [sys.executable, "-m", "worker.reaper"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        yield running
        running.kill()


def test_the_process_repairs_what_two_crashes_left_and_ends_on_sigterm(
    process: subprocess.Popen[str], sessions: Sessions, client: SyncRedis
) -> None:
    [job] = submit(sessions)
    claim(sessions)
    assert eventually(lambda: state(sessions, job.id) is JobState.QUEUED)
    assert eventually(lambda: queue.waiting_tickets(client, QUEUE) == 1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "reaper_stopped" in said


def test_one_that_hangs_ends_and_says_where(settings: Settings, sessions: Sessions) -> None:
    submit(sessions)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes what is sent, and never answers
        port = silent.getsockname()[1]
        hung = msgspec.structs.replace(
            settings, redis_url=f"redis://127.0.0.1:{port}/0", reaper_hung_seconds=0.5
        )
        ended = subprocess.run(
            [sys.executable, "-m", "worker.reaper"],
            env={**os.environ, **hung.environment()},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert "Timeout (0:00:00.5" in ended.stderr
    assert "in _top_up" in ended.stderr


def test_a_pause_is_no_hanging(
    settings: Settings, sessions: Sessions, client: SyncRedis, tmp_path: Path
) -> None:
    slow = msgspec.structs.replace(settings, reaper_interval_seconds=60.0, reaper_hung_seconds=1.0)
    beats: list[float] = []
    reaper = Reaper(slow, sessions, client, storage.open_store(settings), beats.append)
    reaper.run(lambda seconds: seconds == 60.0)
    assert beats[-1] == 61.0
    assert set(beats[:-1]) == {1.0, SWEEP_TIMES}


def test_a_slow_store_is_no_hanging(
    settings: Settings, sessions: Sessions, client: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.reaper.ABANDONED_SECONDS", AT_ONCE)
    store = storage.open_store(settings)
    for job in submit(sessions, 3):
        lost = claim(sessions)
        sessions.write(jobs.advance, lost.id, JobState.FAILED, attempt=1, problem={"detail": "no"})
        store.put(keys.packed_path(job.id, 1), b"{}")
    files: list[int] = []
    """How many there were at each beat."""
    beat = lambda _seconds: files.append(len(paths(store)))  # noqa: E731
    Reaper(settings, sessions, client, store, beat).round()
    assert files[-3:] == [3, 2, 1]
    assert not paths(store)


def test_an_end_is_heard_at_any_moment_and_remembered() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)
        with Ending() as ending:
            assert not ending.comes_within(0)
            signal.raise_signal(number)
            assert ending.comes_within(0)
            assert ending.comes_within(60)
        assert signal.getsignal(number) is before


def test_the_process_refuses_settings_it_does_not_know() -> None:
    environment = {**os.environ, "NEURAL_MRI_LEESE_SECONDS": "5"}
    ended = subprocess.run(
        [sys.executable, "-m", "worker.reaper"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "NEURAL_MRI_LEESE_SECONDS is not a setting" in ended.stderr


def test_the_process_never_loads_torch() -> None:
    script = "import sys, worker.reaper; print('torch' in sys.modules, 'celery' in sys.modules)"
    said = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert said.split() == ["False", "False"]


def test_redis_errors_are_what_the_reaper_expects() -> None:
    assert issubclass(redis.ConnectionError, broker.AWAY)
    assert issubclass(redis.TimeoutError, broker.AWAY)


def scan_of(owner: str, number: int) -> Submission:
    return Submission(
        owner=owner,
        kind=JobKind.SCAN,
        model="tiny",
        revision="0123456789abcdef" * 4,
        queue=QUEUE,
        request=b"{}",
        scan_key=f"{number:064x}",
    )


def test_a_batch_of_which_too_many_scans_fail_is_stopped_with_nobody_watching(
    sessions: Sessions, client: SyncRedis, reaper: Reaper
) -> None:
    keyed = [scan_of("ada", number) for number in range(4)]
    wanted = NewBatch("ada", "", Lane.BATCH, 4, "0" * 64, max_failures=1)
    batch = sessions.write(batches.begin, wanted)
    lines = [Line(number, scan) for number, scan in enumerate(keyed, 1)]
    sessions.write(batches.fill, batch.id, lines)
    sessions.write(feeding.feed, "ada", max_queued=9)
    made = {row.line: row.job for row in sessions.read(batches.lines, batch.id, after=0, limit=9)}
    failing, held = (claim(sessions, LeaseOwner.here()) for _ in range(2))
    sessions.write(jobs.advance, failing.id, JobState.FAILED, attempt=1, problem={"detail": "no"})
    reaper.round()
    states = [state(sessions, job).value for job in made.values() if job is not None]
    assert states == ["failed", "claimed", "cancelled", "cancelled"]
    assert client.exists(keys.cancel_flag(held.id)), "what runs is asked to stop"


@sqlite_only
def test_nobody_waits_for_the_reaper_to_look_at_batches_that_go_on(
    settings: Settings, client: SyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_SECONDS", 0.01)
    with (
        closing(database.sessions(settings)) as sessions,
        closing(database.sessions(settings)) as w,
    ):
        wanted = NewBatch("ada", "", Lane.BATCH, 2, "0" * 64, max_failures=1)
        batch = sessions.write(batches.begin, wanted)
        lines = [Line(number, scan_of("ada", number)) for number in (1, 2)]
        sessions.write(batches.fill, batch.id, lines)
        sessions.write(feeding.feed, "ada", max_queued=9)
        reaper = Reaper(settings, sessions, client, storage.open_store(settings))
        with w.writing():
            reaper._settle_batches()
        failing = claim(sessions, LeaseOwner.here())
        sessions.write(jobs.advance, failing.id, JobState.FAILED, attempt=1, problem={"detail": ""})
        with w.writing(), pytest.raises(Unavailable):
            reaper._settle_batches()
        reaper._settle_batches()
        found = sessions.read(batches.find, batch.id)
        assert found is not None
        assert found.stopped_by == batches.FAILED


def test_half_a_batch_is_forgotten_in_the_end(sessions: Sessions, reaper: Reaper) -> None:
    half = sessions.write(batches.begin, NewBatch("ada", "", Lane.BATCH, 2, "0" * 64))
    sessions.write(batches.fill, half.id, [Line(1, scan_of("ada", 1))])
    with sessions.writing() as session:
        late = BATCHES.c.created_at - batches.LONGEST_FILLING.total_seconds()
        session.execute(update(BATCHES).values(created_at=late))
    reaper.round()
    assert sessions.read(batches.find, half.id) is None


def test_lines_of_a_batch_become_jobs_and_tickets_as_others_end(
    settings: Settings, sessions: Sessions, client: SyncRedis
) -> None:
    keyed = msgspec.structs.replace(settings, auth="keys", user_max_jobs=4)
    reaper = Reaper(keyed, sessions, client, storage.open_store(keyed))
    lines = [Line(number, scan_of("ada", number)) for number in range(1, 6)]
    batch = sessions.write(batches.begin, NewBatch("ada", "", Lane.BATCH, 5, "0" * 64))
    sessions.write(batches.fill, batch.id, lines)
    reaper.round()
    assert client.llen(QUEUE) == 3
    assert len(sessions.read(jobs.recent, "ada")) == 3
    done = claim(sessions, LeaseOwner.here())
    sessions.write(jobs.advance, done.id, JobState.FAILED, attempt=1, problem={"detail": "no"})
    until = time.monotonic() + 10
    while len(sessions.read(jobs.recent, "ada")) < 4 and time.monotonic() < until:
        reaper.round()
        time.sleep(0.05)
    assert len(sessions.read(jobs.recent, "ada")) == 4


def test_one_persons_many_lines_keep_nobody_elses_from_the_room_there_is(
    settings: Settings, sessions: Sessions, client: SyncRedis
) -> None:
    """All the room that comes is little: were it given out by name, the first would get all of it for hours."""
    small = msgspec.structs.replace(settings, max_queued_jobs=4)
    reaper = Reaper(small, sessions, client, storage.open_store(small))
    for at, owner in enumerate(("ada", "bob")):
        lines = [Line(number, scan_of(owner, 100 * at + number)) for number in range(1, 11)]
        batch = sessions.write(batches.begin, NewBatch(owner, "", Lane.BATCH, 10, "0" * 64))
        sessions.write(batches.fill, batch.id, lines)
    reaper.round()
    assert len(sessions.read(jobs.recent, "ada")) == 3
    for _ in range(2):
        done = claim(sessions, LeaseOwner.here())
        sessions.write(jobs.advance, done.id, JobState.FAILED, attempt=1, problem={"detail": "no"})
        reaper.round()
        reaper.round()
    assert len(sessions.read(jobs.recent, "bob")) >= 1
