"""Many submissions at once are what they would be one by one; batches on both databases."""

from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from sqlalchemy import update

from neural_mri.backing import batches, jobs
from neural_mri.backing.batches import Line, NewBatch, Undone
from neural_mri.backing.database import Sessions
from neural_mri.backing.limits import Limits
from neural_mri.backing.rows import BATCHES
from neural_mri.contract.batches import BatchState
from neural_mri.contract.jobs import JobState, Lane
from neural_mri.contract.problems import TooMany
from tests.backing.making import ELSEWHERE, QUEUE, submission


def key(number: int) -> str:
    return f"{number:064x}"


def known(sessions: Sessions, scan_key: str) -> None:
    """A result of that key."""
    with sessions.writing() as session:
        job = jobs.submit(session, submission(scan_key=scan_key, owner="before"))
        jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=9)
        for state in (JobState.RUNNING, JobState.STORING):
            jobs.advance(session, job.id, state, attempt=1)
        jobs.advance(session, job.id, JobState.SUCCEEDED, attempt=1, manifest=f"m/{scan_key}")


WANTED = [
    submission(scan_key=key(1), forwards=3.0),
    submission(scan_key=key(2)),
    submission(scan_key=key(3), forwards=2.0),
    submission(scan_key=key(4), queue="cpu", tokens=None),
    submission(scan_key=key(5)),
]


def test_many_at_once_stand_where_they_would_have_stood_one_by_one(sessions: Sessions) -> None:
    known(sessions, key(2))
    sessions.write(jobs.submit, submission(scan_key=key(3), owner="bob"))
    with sessions.writing() as session:
        # Followers are told first, so here they come first one by one as well.
        order = (WANTED[2], WANTED[0], WANTED[1], WANTED[3], WANTED[4])
        apart = {each.scan_key: jobs.submit(session, each) for each in order}
        expected = {
            name: (job.state, job.cached, job.leader, job.virtual_start, job.manifest)
            for name, job in apart.items()
        }
        session.rollback()
    recorded = sessions.write(jobs.submit_many, WANTED)
    for wanted, made in zip(WANTED, recorded, strict=True):
        job = sessions.read(jobs.get, made.job_id)
        assert job is not None
        found = (job.state, job.cached, job.leader, job.virtual_start, job.manifest)
        assert found == expected[wanted.scan_key]
        assert made.cached == job.cached


def test_they_are_all_recorded_or_none_is(sessions: Sessions) -> None:
    with pytest.raises(TooMany, match="no room for 5 more"):
        sessions.write(jobs.submit_many, WANTED, max_queued=4)
    with pytest.raises(TooMany, match="no room for 5 more"):
        sessions.write(jobs.submit_many, WANTED, usual=Limits(max_jobs=4))
    assert sessions.read(jobs.recent, "ada") == []
    known(sessions, key(2))
    sessions.write(jobs.submit_many, WANTED, max_queued=4, usual=Limits(max_jobs=4))


def test_those_that_wait_are_cancelled_with_one_statement(sessions: Sessions) -> None:
    batch_id = begun(sessions, 3)
    some = [Line(number, submission(scan_key=key(number))) for number in (1, 2, 3)]
    made = sessions.write(batches.fill, batch_id, some, {}, max_queued=10)
    sessions.write(jobs.submit, submission(scan_key=key(2), owner="bob"))
    assert sessions.write(batches.stop, batch_id, by=batches.CALLER) == 2
    states = {number: state(sessions, job_id) for number, job_id in made.items()}
    assert states == {1: "cancelled", 2: "queued", 3: "cancelled"}, "bob waits for the second"
    (asked,) = sessions.write(batches.cancel_held, batch_id)
    assert (asked.job.id, asked.moved) == (made[2], True)
    (left,) = sessions.read(jobs.recent, "bob")
    assert (left.state, left.leader) == (JobState.QUEUED, None), "it takes a turn of its own"
    found = sessions.read(batches.find, batch_id)
    assert found is not None
    assert sessions.read(batches.view, found).state is BatchState.CANCELLED


REFUSED = {"type": "about:blank", "title": "No", "status": 422, "detail": "no"}


def test_a_batch_that_is_not_filled_has_not_ended(sessions: Sessions) -> None:
    batch_id = begun(sessions, 2, max_failures=1)
    sessions.write(batches.fill, batch_id, [Line(1, problem=REFUSED)], {}, max_queued=10)
    assert standing(sessions, batch_id) is BatchState.RUNNING
    assert sessions.write(batches.stop_failing) == []
    sessions.write(batches.fill, batch_id, [Line(2, problem=REFUSED)], {}, max_queued=10)
    assert standing(sessions, batch_id) is BatchState.ENDED


def test_what_nobody_goes_on_to_fill_is_undone_in_the_end(sessions: Sessions) -> None:
    half, whole = begun(sessions, 3), begun(sessions, 1)
    made = sessions.write(
        batches.fill, half, [Line(1, submission(scan_key=key(1)))], {}, max_queued=10
    )
    sessions.write(batches.fill, whole, [Line(1, submission(scan_key=key(2)))], {}, max_queued=10)
    unnoted = begun(sessions, 1)
    sessions.write(batches.fill, unnoted, [Line(1, problem=REFUSED)], {}, max_queued=10)
    assert sessions.write(batches.undo_unfilled) == 0, "whoever fills it has time"
    with sessions.writing() as session:
        late = BATCHES.c.created_at - batches.LONGEST_FILLING.total_seconds()
        session.execute(update(BATCHES).values(created_at=late))
        # As a process leaves it that is older than the column.
        session.execute(update(BATCHES).where(BATCHES.c.id == unnoted).values(filled_at=None))
    assert sessions.write(batches.undo_unfilled) == 1
    assert sessions.read(batches.find, half) is None
    assert sessions.read(batches.lines, half, after=0, limit=9) == []
    assert state(sessions, made[1]) == "cancelled"
    assert standing(sessions, whole) is BatchState.RUNNING
    assert standing(sessions, unnoted) is BatchState.ENDED
    with pytest.raises(Undone):
        sessions.write(batches.fill, half, [Line(2, problem=REFUSED)], made, max_queued=10)


THREE = [Line(number, submission(scan_key=key(number))) for number in (1, 2, 3)]


def test_lines_that_are_recorded_are_not_recorded_again(sessions: Sessions) -> None:
    batch_id = begun(sessions, 5)
    repeat, refused = Line(4, repeats=2), Line(5, problem=REFUSED)
    first = sessions.write(batches.fill, batch_id, THREE[:2], {}, max_queued=9)
    made = sessions.write(batches.fill, batch_id, [*THREE, repeat, refused], {}, max_queued=9)
    assert made.items() >= first.items()
    again = sessions.write(batches.fill, batch_id, [*THREE, repeat, refused], {}, max_queued=9)
    assert again.items() >= made.items()
    rows = sessions.read(batches.lines, batch_id, after=0, limit=9)
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert (rows[3].repeats, rows[3].job) == (2, first[2])
    assert rows[4].problem == REFUSED
    assert len(sessions.read(jobs.recent, "ada")) == 3


def test_several_who_fill_a_batch_at_once_double_nothing(sessions: Sessions) -> None:
    """Requests that were sent again while the first was still being recorded."""
    wanted = NewBatch("ada", "", Lane.BATCH, 40, "0" * 64, word="nightly")
    some = [Line(number, submission(scan_key=key(number))) for number in range(1, 41)]

    def fill(_: int) -> UUID:
        batch = sessions.write(batches.begin, wanted)
        known: dict[int, UUID] = {}
        for start in range(0, 40, 5):
            known = sessions.write(
                batches.fill, batch.id, some[start : start + 5], known, max_queued=99
            )
        return batch.id

    with ThreadPoolExecutor(4) as pool:
        (batch_id,) = set(pool.map(fill, range(4)))
    rows = sessions.read(batches.lines, batch_id, after=0, limit=99)
    assert [row.line for row in rows] == list(range(1, 41))
    recorded = sessions.read(jobs.recent, "ada")
    assert {row.job for row in rows} == {job.id for job in recorded}
    assert len(recorded) == 40


def test_a_batch_that_another_has_filled_is_not_given_up(sessions: Sessions) -> None:
    batch_id = begun(sessions, 3)
    sessions.write(batches.fill, batch_id, THREE, {}, max_queued=9)
    assert not sessions.write(batches.abandon, batch_id)
    assert standing(sessions, batch_id) is BatchState.RUNNING
    half = begun(sessions, 4)
    sessions.write(batches.fill, half, THREE, {}, max_queued=9)
    assert sessions.write(batches.abandon, half)
    assert not sessions.write(batches.abandon, half)


def test_lines_that_come_to_a_stopped_batch_do_not_run(sessions: Sessions) -> None:
    batch_id = begun(sessions, 3)
    made = sessions.write(batches.fill, batch_id, THREE[:1], {}, max_queued=9)
    sessions.write(batches.stop, batch_id, by=batches.CALLER)
    made = sessions.write(batches.fill, batch_id, THREE[1:], made, max_queued=9)
    assert {state(sessions, job_id) for job_id in made.values()} == {"cancelled"}
    assert standing(sessions, batch_id) is BatchState.CANCELLED


def standing(sessions: Sessions, batch_id: UUID) -> BatchState:
    found = sessions.read(batches.find, batch_id)
    assert found is not None
    return sessions.read(batches.view, found).state


def begun(sessions: Sessions, lines: int, max_failures: int | None = None) -> UUID:
    wanted = NewBatch("ada", "", Lane.BATCH, lines, "0" * 64, max_failures)
    return sessions.write(batches.begin, wanted).id


def state(sessions: Sessions, job_id: UUID) -> str:
    job = sessions.read(jobs.get, job_id)
    assert job is not None
    return job.state.value
