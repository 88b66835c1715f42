import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from uuid import UUID, uuid4

import msgspec
import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from neural_mri.backing import (
    batches,
    deletion,
    jobs,
    keys,
    leftovers,
    limits,
    session_arrivals,
    session_revisions,
    stored,
)
from neural_mri.backing import sessions as saved
from neural_mri.backing.batches import Batch, Line, NewBatch
from neural_mri.backing.database import Sessions
from neural_mri.backing.deletion import JobDeleted, JobUnderWay
from neural_mri.backing.feeding import feed
from neural_mri.backing.jobs import Job, Submission
from neural_mri.backing.limits import Limits
from neural_mri.backing.rows import BATCH_LINES, BATCHES, DISCARDS, JOBS
from neural_mri.backing.session_arrivals import Waiting
from neural_mri.backing.sessions import Made
from neural_mri.backing.storage import FolderStore
from neural_mri.contract.batches import BatchState
from neural_mri.contract.jobs import JobState, Lane
from neural_mri.contract.problems import TooMany, UnknownJob
from neural_mri.contract.sessions import SessionDocument
from tests.backing.making import ELSEWHERE, QUEUE, submission

KEY = "a" * 64
DAY = 86_400.0


def finished(session: Session, wanted: Submission, to: JobState = JobState.SUCCEEDED) -> Job:
    """A job that was claimed and has ended."""
    job = jobs.submit(session, wanted)
    [held] = jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60.0)
    assert held.id == job.id
    manifest = keys.packed_path(job.id, 1) if to is JobState.SUCCEEDED else None
    for state in (JobState.RUNNING, to):
        at_end = manifest if state is to else None
        assert jobs.advance(session, job.id, state, attempt=1, manifest=at_end)
    ended = jobs.get(session, job.id)
    assert ended is not None
    return ended


def aged(session: Session, days: float, *job_ids: UUID) -> None:
    """Have jobs have ended so long ago."""
    earlier = JOBS.c.finished_at - days * DAY
    chosen = JOBS.c.id.in_(job_ids) if job_ids else JOBS.c.finished_at.is_not(None)
    session.connection().execute(update(JOBS).where(chosen).values(finished_at=earlier))


def taken_away(sessions: Sessions) -> set[str]:
    """What may be taken away by now, noted as taken."""

    def look(session: Session) -> deletion.Unneeded:
        return deletion.unneeded(session, deletion.discarded(session, older_seconds=-1.0))

    found = sessions.read(look)
    sessions.write(deletion.settle, found.discards)
    return set(found.results)


def test_a_job_that_has_ended_is_gone_and_its_result_may_be_taken_away(
    sessions: Sessions,
) -> None:
    job = sessions.write(finished, submission(scan_key=KEY))
    sessions.write(deletion.delete_job, job.id)
    assert sessions.read(jobs.get, job.id) is None
    assert sessions.read(deletion.discarded) == [], "somebody may still be reading it"
    assert taken_away(sessions) == {job.manifest}
    assert taken_away(sessions) == set()
    assert not sessions.write(jobs.submit, submission(scan_key=KEY)).cached


def test_what_was_deleted_by_a_clock_that_was_wrong_is_taken_away_all_the_same(
    sessions: Sessions,
) -> None:
    job = sessions.write(finished, submission())
    sessions.write(deletion.delete_job, job.id)
    assert sessions.read(deletion.discarded) == []
    with sessions.writing() as session:
        later = DISCARDS.c.deleted_at + 3650 * DAY
        session.connection().execute(update(DISCARDS).values(deleted_at=later))
    assert [each.id for each in sessions.read(deletion.discarded)] == [job.id]


def test_one_that_has_not_ended_is_not_deleted_nor_one_that_is_not_there(
    sessions: Sessions,
) -> None:
    job = sessions.write(jobs.submit, submission())
    with pytest.raises(JobUnderWay, match="is queued") as refused:
        sessions.write(deletion.delete_job, job.id)
    assert refused.value.document()["state"] == "queued"
    assert sessions.read(jobs.get, job.id) == job
    with pytest.raises(UnknownJob):
        sessions.write(deletion.delete_job, uuid4())


def test_a_shared_result_goes_with_the_last_job_that_names_it(sessions: Sessions) -> None:
    first = sessions.write(finished, submission(scan_key=KEY))
    others = [sessions.write(jobs.submit, submission(owner=owner, scan_key=KEY)) for owner in "bc"]
    assert {other.manifest for other in others} == {first.manifest}
    assert first.manifest is not None
    for job in (first, *others):
        assert taken_away(sessions) == set()
        assert sessions.read(leftovers.left_over, [first.manifest]) == []
        sessions.write(deletion.delete_job, job.id)
    assert taken_away(sessions) == {first.manifest}


def test_a_result_that_an_heir_finished_stays_when_who_asked_first_is_deleted(
    sessions: Sessions,
) -> None:
    first, heir = (
        sessions.write(jobs.submit, submission(owner=owner, scan_key=KEY)) for owner in "ab"
    )
    [known] = sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60.0)
    assert sessions.write(jobs.request_cancel, first.id).moved
    sessions.write(deletion.delete_job, first.id)
    path = keys.packed_path(first.id, 1)
    assert taken_away(sessions) == set(), "its worker goes on, for the heir"
    for to, result in ((JobState.RUNNING, None), (JobState.SUCCEEDED, path)):
        assert sessions.write(jobs.advance, known.id, to, attempt=1, manifest=result)
    late = sessions.write(jobs.submit, submission(owner="c", scan_key=KEY))
    assert taken_away(sessions) & {path} == set()
    sessions.write(deletion.delete_job, heir.id)
    assert taken_away(sessions) & {path} == set()
    sessions.write(deletion.delete_job, late.id)
    assert taken_away(sessions) & {path} == {path}


def test_what_lost_attempts_of_a_deleted_job_left_is_taken_away_as_well(
    sessions: Sessions,
) -> None:
    job = sessions.write(jobs.submit, submission())
    for attempt in (1, 2):
        sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60.0)
        sessions.write(jobs.advance, job.id, JobState.QUEUED, attempt=attempt)
    sessions.write(jobs.request_cancel, job.id)
    sessions.write(deletion.delete_job, job.id)
    assert taken_away(sessions) == {
        path for attempt in (1, 2) for path in keys.Attempt(job.id, attempt).results
    }


def test_what_was_computed_counts_for_the_day_though_its_job_is_deleted(
    sessions: Sessions,
) -> None:
    job = sessions.write(finished, submission())
    with sessions.writing() as session:
        began = JOBS.c.finished_at - 30.0
        session.connection().execute(update(JOBS).values(started_at=began))
    before = sessions.read(limits.usage, "ada", Limits(0, 20.0))
    assert before.seconds_today == pytest.approx(30.0)
    with pytest.raises(TooMany) as refused:
        sessions.write(jobs.submit, submission(), usual=Limits(0, 20.0))
    sessions.write(deletion.delete_job, job.id)
    assert sessions.read(limits.usage, "ada", Limits(0, 20.0)) == before
    with pytest.raises(TooMany) as again:
        sessions.write(jobs.submit, submission(), usual=Limits(0, 20.0))
    told, before_it = (each.value.members["retry_after_seconds"] for each in (again, refused))
    assert told == pytest.approx(before_it, abs=2)
    assert sessions.read(limits.usage, "bob", Limits(0, 20.0)).seconds_today == 0.0


def test_a_request_sent_again_after_its_job_was_deleted_makes_one_job(sessions: Sessions) -> None:
    wanted = submission(idempotency_key="word")
    with sessions.writing() as session:
        job = jobs.submit_once(session, wanted).job
    sessions.write(jobs.request_cancel, job.id)
    sessions.write(deletion.delete_job, job.id)
    made = [sessions.write(jobs.submit_once, wanted) for _ in range(2)]
    assert [each.is_new for each in made] == [True, False]
    assert made[0].job.id == made[1].job.id != job.id


# Batches


def batch_of(session: Session, *submissions: Submission) -> Batch:
    wanted = NewBatch("ada", "b", Lane.BATCH, len(submissions), "d" * 64)
    batch = batches.begin(session, wanted)
    batches.fill(session, batch.id, [Line(n, each) for n, each in enumerate(submissions, 1)])
    feed(session, "ada", max_queued=1000)
    feed(session, "ada", max_queued=1000)  # sees that all are fed
    found = batches.find(session, batch.id)
    assert found is not None
    return found


def cancelled_batch(session: Session) -> Batch:
    batch = batch_of(session, submission(), submission(scan_key=KEY))
    batches.stop(session, batch.id, by=batches.CALLER)
    stopped = batches.find(session, batch.id)
    assert stopped is not None
    return stopped


def test_a_line_of_a_batch_says_that_its_job_was_deleted(sessions: Sessions) -> None:
    batch = sessions.write(cancelled_batch)
    first, second = sessions.read(batches.lines, batch.id, after=0, limit=10)
    assert first.job is not None
    sessions.write(deletion.delete_job, first.job)
    told, other = sessions.read(batches.lines, batch.id, after=0, limit=10)
    assert other == second
    assert (told.job, told.state) == (None, None)
    assert told.problem is not None
    assert told.problem["type"] == JobDeleted("").document()["type"]
    view = sessions.read(batches.view, batch)
    assert (view.refused, view.deleted, view.counts.total) == (0, 1, 1)
    assert view.state is BatchState.CANCELLED


def test_a_batch_and_its_jobs_grow_old_together(sessions: Sessions) -> None:
    batch = sessions.write(cancelled_batch)
    lines = sessions.read(batches.lines, batch.id, after=0, limit=10)
    ids = [line.job for line in lines if line.job is not None]
    with sessions.writing() as session:
        session.connection().execute(update(BATCHES).values(created_at=0.0))
        aged(session, 40, ids[0])
    assert sessions.write(deletion.by_age, older_seconds=30 * DAY) == 0
    assert sessions.write(deletion.batches_by_age, older_seconds=30 * DAY) == 0
    sessions.write(aged, 40, ids[1])
    assert sessions.write(deletion.batches_by_age, older_seconds=30 * DAY) == 1
    assert sessions.read(batches.find, batch.id) is None
    with sessions.reading() as session:
        left = session.execute(select(func.count()).select_from(BATCH_LINES)).scalar_one()
    assert left == 0
    assert sessions.write(deletion.by_age, older_seconds=30 * DAY) == 2


def test_jobs_that_were_cancelled_before_there_was_room_for_any_grow_old_too(
    sessions: Sessions,
) -> None:
    with sessions.writing() as session:
        batch = batches.begin(session, NewBatch("ada", "b", Lane.BATCH, 2, "d" * 64))
        lines = [
            Line(1, submission()),
            Line(2, msgspec.structs.replace(submission(), queue="scan.fedcba9876543210")),
        ]
        batches.fill(session, batch.id, lines)
        batches.stop(session, batch.id, by=batches.CALLER)
        for _ in range(2):
            feed(session, "ada", max_queued=1000)  # to cancel them, and to see that it is done
        session.connection().execute(update(BATCHES).values(created_at=0.0))
        aged(session, 40)
    assert sessions.write(deletion.batches_by_age, older_seconds=30 * DAY) == 1
    assert sessions.write(deletion.by_age, older_seconds=30 * DAY) == 2


def test_a_batch_that_waits_for_room_is_not_old(sessions: Sessions) -> None:
    with sessions.writing() as session:
        wanted = NewBatch("ada", "b", Lane.BATCH, 1, "d" * 64)
        batch = batches.begin(session, wanted)
        batches.fill(session, batch.id, [Line(1, submission())])
        session.connection().execute(update(BATCHES).values(created_at=0.0))
    assert sessions.write(deletion.batches_by_age, older_seconds=DAY) == 0


# By age


def test_jobs_that_ended_long_ago_are_deleted_some_at_a_time(sessions: Sessions) -> None:
    for number in range(5):
        to = JobState.FAILED if number % 2 else JobState.SUCCEEDED
        sessions.write(finished, submission(), to)
    sessions.write(aged, 10)
    young = sessions.write(finished, submission())
    waiting = sessions.write(jobs.submit, submission())
    counts = [sessions.write(deletion.by_age, older_seconds=7 * DAY, most=2) for _ in range(4)]
    assert counts == [2, 2, 1, 0]
    left = sessions.read(jobs.recent, "ada")
    assert {job.id for job in left} == {young.id, waiting.id}


def test_one_that_a_session_waits_for_is_not_deleted_before_it_is_there(
    sessions: Sessions,
) -> None:
    job = sessions.write(finished, submission())
    sessions.write(aged, 10)
    document = session_revisions.encode_document(SessionDocument())
    view = sessions.write(saved.create, Made("ada", "s", document, "ada"))
    sessions.write(session_arrivals.add, Waiting(view.id, job.id, "ada", ""))
    assert sessions.write(deletion.by_age, older_seconds=7 * DAY) == 0
    [waiting] = sessions.read(session_arrivals.of_session, view.id)
    sessions.write(session_arrivals.settle, waiting, None)
    assert sessions.write(deletion.by_age, older_seconds=7 * DAY) == 1


# Races


def beside(work: Callable[[], Job | None]) -> "Future[Job | None]":
    """Begin something in a thread of its own, and give it time to come to where it must wait."""
    pool = ThreadPoolExecutor(1)
    done = pool.submit(work)
    pool.shutdown(wait=False)
    threading.Event().wait(0.3)
    return done


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_who_asks_while_the_last_job_is_being_deleted_has_the_scan_run_again(
    sessions: Sessions, *, many: bool
) -> None:
    first = sessions.write(finished, submission(scan_key=KEY))

    def ask() -> Job | None:
        if not many:
            return sessions.write(jobs.submit, submission(scan_key=KEY))
        [made] = sessions.write(jobs.submit_many, [submission(scan_key=KEY)])
        return sessions.read(jobs.get, made.job_id)

    with sessions.writing() as session:
        deletion.delete_job(session, first.id)
        asked = beside(ask)
        assert not asked.done(), "it waits to hear"
    job = asked.result(10)
    assert job is not None
    assert (job.cached, job.manifest, job.state) == (False, None, JobState.QUEUED)
    assert taken_away(sessions) == {first.manifest}


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
def test_who_was_answered_while_the_last_job_is_deleted_keeps_the_result(
    sessions: Sessions, *, many: bool
) -> None:
    first = sessions.write(finished, submission(scan_key=KEY))

    def delete() -> None:
        sessions.write(deletion.delete_job, first.id)

    with sessions.writing() as session:
        if many:
            [made] = jobs.submit_many(session, [submission(scan_key=KEY)])
            assert made.cached
        else:
            assert jobs.submit(session, submission(scan_key=KEY)).manifest == first.manifest
        deleting = beside(delete)
        assert not deleting.done(), "it waits for whom it would have taken the result from"
    deleting.result(10)
    assert sessions.read(jobs.get, first.id) is None
    assert taken_away(sessions) == set()
    assert sessions.write(jobs.submit, submission(scan_key=KEY)).manifest == first.manifest


class Crowd:
    """People who ask for the same few scans, workers that run them, and a reaper that deletes all that ended."""

    def __init__(self, sessions: Sessions, folder: FolderStore) -> None:
        self.sessions = sessions
        self.folder = folder
        self.ending = threading.Event()

    def ask(self, owner: str) -> int:
        """How many scans were known."""
        known = 0
        for number in range(25):
            wanted = submission(owner=owner, scan_key=f"{number % 3}" * 64)
            known += self.sessions.write(jobs.submit, wanted).cached
            self.work()
        return known

    def work(self) -> None:
        for held in self.sessions.write(
            jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=4, lease_seconds=60.0
        ):
            path = keys.packed_path(held.id, held.attempt)
            self.folder.put(path, b"{}\n")
            for to, result in ((JobState.RUNNING, None), (JobState.SUCCEEDED, path)):
                self.sessions.write(
                    jobs.advance, held.id, to, attempt=held.attempt, manifest=result
                )

    def delete(self) -> None:
        while not self.ending.is_set():
            self.sessions.write(deletion.by_age, older_seconds=-1.0, most=3)
            self.take_away()

    def take_away(self) -> None:
        for path in taken_away(self.sessions):
            stored.discard(self.folder, path)

    def named(self) -> set[str]:
        with self.sessions.reading() as session:
            found = session.execute(select(JOBS.c.manifest).where(JOBS.c.manifest.is_not(None)))
            return set(found.scalars())


def test_many_ask_and_delete_at_once_and_what_is_named_is_there(
    sessions: Sessions, folder: FolderStore
) -> None:
    crowd = Crowd(sessions, folder)
    with ThreadPoolExecutor(4) as pool:
        deleting = pool.submit(crowd.delete)
        asking = [pool.submit(crowd.ask, owner) for owner in "abc"]
        known = [each.result(60) for each in asking]
        crowd.ending.set()
        deleting.result(30)
    assert sum(known), "some were answered with a known result"
    assert all(folder.exists(path) for path in crowd.named())
    crowd.work()
    sessions.write(deletion.by_age, older_seconds=-1.0)
    crowd.take_away()
    assert crowd.named() == set()
    assert set(folder.aged("packed", -1.0)) == set()
