"""Many submissions at once are what they would be one by one; batches on both databases."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import pytest
from sqlalchemy import update

from neural_mri.backing import batches, feeding, jobs
from neural_mri.backing.batches import Line, NewBatch, Undone
from neural_mri.backing.database import Sessions, epoch
from neural_mri.backing.limits import NO_LIMITS, Limits
from neural_mri.backing.rows import BATCH_LINES, BATCHES, JOBS
from neural_mri.contract.batches import BatchState, BatchView
from neural_mri.contract.jobs import JobState, Lane
from neural_mri.contract.problems import TooMany
from tests.backing.making import ELSEWHERE, QUEUE, on_postgresql, submission


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
    batch_id = filled(sessions, THREE)
    made = fed(sessions, batch_id)
    sessions.write(jobs.submit, submission(scan_key=key(2), owner="bob"))
    assert sessions.write(batches.stop, batch_id, by=batches.CALLER) == 2
    states = {number: state(sessions, job_id) for number, job_id in made.items()}
    assert states == {1: "cancelled", 2: "queued", 3: "cancelled"}, "bob waits for the second"
    (asked,) = sessions.write(batches.cancel_held, batch_id)
    assert (asked.job.id, asked.moved) == (made[2], True)
    (left,) = sessions.read(jobs.recent, "bob")
    assert (left.state, left.leader) == (JobState.QUEUED, None), "it takes a turn of its own"
    assert standing(sessions, batch_id).state is BatchState.CANCELLED


@on_postgresql
def test_who_follows_just_then_is_not_left_behind(sessions: Sessions) -> None:
    """Their submission has locked the job that is being cancelled, and is not committed yet."""
    batch_id = filled(sessions, THREE)
    fed(sessions, batch_id)
    with ThreadPoolExecutor(1) as pool, sessions.writing() as session:
        follower = jobs.submit(session, submission(scan_key=key(2), owner="bob"))
        assert follower.leader is not None
        stopping = pool.submit(sessions.write, batches.stop, batch_id, by=batches.CALLER)
        with pytest.raises(TimeoutError):
            stopping.result(0.5)
        session.commit()
        assert stopping.result(10) == 2
    sessions.write(batches.cancel_held, batch_id)
    (left,) = sessions.read(jobs.recent, "bob")
    assert (left.state, left.leader) == (JobState.QUEUED, None), "it takes a turn of its own"


REFUSED = {"type": "about:blank", "title": "No", "status": 422, "detail": "no"}
THREE = [Line(number, submission(scan_key=key(number))) for number in (1, 2, 3)]


def test_a_bounded_batch_is_written_to_once_it_ends_or_too_many_fail(sessions: Sessions) -> None:
    boundless = filled(sessions, [Line(1, submission(scan_key=key(9)))])
    lines = [*THREE, Line(4, submission(scan_key=key(1))), Line(5, problem=REFUSED)]
    failing, ending = (begun(sessions, 5, max_failures=2) for _ in range(2))
    for batch_id in (failing, ending):
        sessions.write(batches.fill, batch_id, lines[:2])
        assert sessions.read(batches.to_settle) == [], "not all lines are there"
        sessions.write(batches.fill, batch_id, lines[2:])
    made = fed(sessions, failing)
    fed(sessions, boundless)

    def ended(number: int, to: JobState) -> None:
        with sessions.writing() as session:
            where = JOBS.c.id == made[number]
            session.execute(update(JOBS).where(where).values(state=to, finished_at=epoch()))

    ended(1, JobState.FAILED)
    assert sessions.read(batches.to_settle) == []
    ended(2, JobState.CANCELLED)
    ended(3, JobState.EXPIRED)
    assert sessions.read(batches.to_settle) == [failing], "the other's follow, and wait again"
    assert sessions.write(batches.stop_failing, [ending, failing]) == []
    assert sessions.read(batches.to_settle) == []
    assert standing(sessions, failing).counts.failed == 2
    with sessions.writing() as session:
        session.execute(update(JOBS).values(state=JobState.CANCELLED, finished_at=epoch()))
    assert sessions.read(batches.to_settle) == [ending]
    sessions.write(batches.stop_failing, [ending])
    assert sessions.read(batches.to_settle) == []
    assert standing(sessions, ending).state is BatchState.ENDED


def test_a_batch_that_is_not_filled_has_not_ended_and_nothing_of_it_runs(
    sessions: Sessions,
) -> None:
    batch_id = begun(sessions, 2, max_failures=1)
    sessions.write(batches.fill, batch_id, [Line(1, problem=REFUSED)])
    assert standing(sessions, batch_id).state is BatchState.RUNNING
    assert sessions.write(batches.stop_failing) == []
    sessions.write(batches.fill, batch_id, [Line(2, problem=REFUSED)])
    assert standing(sessions, batch_id).state is BatchState.ENDED
    half = begun(sessions, 2)
    sessions.write(batches.fill, half, THREE[:1])
    assert sessions.read(feeding.owners_waiting) == ["ada"], "the other is not seen to be fed yet"
    assert sessions.write(feeding.feed, "ada", max_queued=9) == (0, {})
    assert sessions.read(feeding.owners_waiting) == []
    assert sessions.read(jobs.recent, "ada") == []
    sessions.write(batches.fill, half, THREE[1:2])
    assert sessions.read(feeding.owners_waiting) == ["ada"]
    assert len(fed(sessions, half)) == 2


def test_what_nobody_goes_on_to_fill_is_undone_in_the_end(sessions: Sessions) -> None:
    half = begun(sessions, 4)
    sessions.write(batches.fill, half, THREE)
    whole, unnoted = filled(sessions, THREE), filled(sessions, [Line(1, problem=REFUSED)])
    assert sessions.write(batches.undo_unfilled) == 0, "whoever fills it has time"
    with sessions.writing() as session:
        late = BATCHES.c.created_at - batches.LONGEST_FILLING.total_seconds()
        session.execute(update(BATCHES).values(created_at=late))
        # As a process leaves it that is older than the column.
        session.execute(update(BATCHES).where(BATCHES.c.id == unnoted).values(filled_at=None))
    assert sessions.write(batches.undo_unfilled) == 1
    assert sessions.read(batches.find, half) is None
    assert sessions.read(batches.lines, half, after=0, limit=9) == []
    assert standing(sessions, whole).state is BatchState.RUNNING
    assert standing(sessions, unnoted).state is BatchState.ENDED
    with pytest.raises(Undone):
        sessions.write(batches.fill, half, THREE)


def test_lines_that_are_recorded_are_not_recorded_again(sessions: Sessions) -> None:
    batch_id = begun(sessions, 5)
    repeat, refused = Line(4, repeats=2), Line(5, problem=REFUSED)
    for some in (THREE[:2], [*THREE, repeat, refused], [*THREE, repeat, refused]):
        sessions.write(batches.fill, batch_id, some)
    made = fed(sessions, batch_id)
    sessions.write(batches.fill, batch_id, [*THREE, repeat, refused])
    assert fed(sessions, batch_id) == made
    rows = sessions.read(batches.lines, batch_id, after=0, limit=9)
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert (rows[3].repeats, rows[3].job) == (2, made[2])
    assert rows[4].problem == REFUSED
    assert len(sessions.read(jobs.recent, "ada")) == 3


def test_several_who_fill_a_batch_at_once_double_nothing(sessions: Sessions) -> None:
    """Requests that were sent again while the first was still being recorded."""
    wanted = NewBatch("ada", "", Lane.BATCH, 40, "0" * 64, word="nightly")
    some = [Line(number, submission(scan_key=key(number))) for number in range(1, 41)]

    def fill(_: int) -> UUID:
        batch = sessions.write(batches.begin, wanted)
        for start in range(0, 40, 5):
            sessions.write(batches.fill, batch.id, some[start : start + 5])
        sessions.write(feeding.feed, "ada", max_queued=99)
        return batch.id

    with ThreadPoolExecutor(4) as pool:
        (batch_id,) = set(pool.map(fill, range(4)))
    rows = sessions.read(batches.lines, batch_id, after=0, limit=99)
    assert [row.line for row in rows] == list(range(1, 41))
    recorded = sessions.read(jobs.recent, "ada")
    assert {row.job for row in rows} == {job.id for job in recorded}
    assert len(recorded) == 40


def test_a_batch_that_another_has_filled_is_not_given_up(sessions: Sessions) -> None:
    batch_id = filled(sessions, THREE)
    assert not sessions.write(batches.abandon, batch_id)
    assert standing(sessions, batch_id).state is BatchState.RUNNING
    half = begun(sessions, 4)
    sessions.write(batches.fill, half, THREE)
    assert sessions.write(batches.abandon, half)
    assert not sessions.write(batches.abandon, half)


def test_lines_become_jobs_as_there_is_room(sessions: Sessions) -> None:
    usual = Limits(max_jobs=8)
    some = [Line(number, submission(scan_key=key(number))) for number in range(1, 11)]
    batch_id = filled(sessions, [*some, Line(11, repeats=10)])
    made = fed(sessions, batch_id, usual=usual)
    assert sorted(made) == [1, 2, 3, 4, 5, 6], "in order, and a quarter of the limit is left"
    seen = standing(sessions, batch_id)
    assert (seen.state, seen.counts.queued, seen.refused) == (BatchState.RUNNING, 10, 0)
    waiting = sessions.read(batches.lines, batch_id, after=6, limit=99)
    assert {(row.job, row.state) for row in waiting} == {(None, JobState.QUEUED)}
    assert sessions.read(batches.lines, batch_id, after=6, limit=9, only=(JobState.FAILED,)) == []
    queued = (JobState.QUEUED,)
    assert len(sessions.read(batches.lines, batch_id, after=0, limit=99, only=queued)) == 11
    sessions.write(jobs.submit, submission(scan_key=key(90)), usual=usual)
    for _ in range(2):
        (held,) = sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=9)
        sessions.write(jobs.advance, held.id, JobState.FAILED, attempt=1, problem=REFUSED)
    assert sorted(fed(sessions, batch_id, usual=usual)) == list(range(1, 8)), "all jobs count"
    known(sessions, key(9))
    assert sessions.write(feeding.feed_known, batch_id, 0, max_queued=99, usual=usual) == 10
    made = named(sessions, batch_id)
    assert sorted(made) == [1, 2, 3, 4, 5, 6, 7, 9], "a result that is known takes no room"
    assert state(sessions, made[9]) == "succeeded"
    made = fed(sessions, batch_id)
    assert sorted(made) == list(range(1, 12))
    assert made[11] == made[10]
    assert len(set(made.values())) == 10
    assert sessions.read(feeding.owners_waiting) == []


def test_the_queues_own_bound_and_a_days_work_hold_back_lines_too(sessions: Sessions) -> None:
    batch_id = filled(sessions, THREE)
    sessions.write(jobs.submit, submission(scan_key=key(90), owner="bob"))
    assert fed(sessions, batch_id, max_queued=1) == {}
    assert sorted(fed(sessions, batch_id, max_queued=4)) == [1, 2]
    (held,) = sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=9)
    sessions.write(jobs.advance, held.id, JobState.FAILED, attempt=1, problem=REFUSED)
    day = Limits(daily_seconds=1e-9)
    with sessions.writing() as session:
        session.execute(update(JOBS).where(JOBS.c.id == held.id).values(owner="ada"))
        session.execute(update(JOBS).where(JOBS.c.id == held.id).values(started_at=1.0))
    assert sorted(fed(sessions, batch_id, usual=day)) == [1, 2]


def test_what_somebody_waits_for_is_fed_first(sessions: Sessions) -> None:
    filled(sessions, THREE[:1])
    wanted = NewBatch("ada", "", Lane.INTERACTIVE, 1, "0" * 64)
    urgent = sessions.write(batches.begin, wanted).id
    sessions.write(batches.fill, urgent, [Line(1, submission(scan_key=key(7)))])
    sessions.write(feeding.feed, "ada", max_queued=1)
    assert sorted(named(sessions, urgent)) == [1]


def test_what_is_known_waits_for_nothing_that_is_not(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "_WAITING", feeding._WAITING.limit(2))
    none = Limits(max_jobs=1)
    for number in (8, 9):
        known(sessions, key(number))
    sessions.write(jobs.submit, submission(scan_key=key(90)))
    filled(sessions, THREE)
    some = [Line(at, submission(scan_key=key(at))) for at in (4, 5, 6, 7, 8, 9)]
    batch_id = begun(sessions, 6)
    sessions.write(batches.fill, batch_id, some)
    assert fed(sessions, batch_id, usual=none) == {}
    after: int | None = 0
    while after is not None:
        after = sessions.write(feeding.feed_known, batch_id, after, max_queued=1, usual=none)
    made = named(sessions, batch_id)
    assert sorted(made) == [8, 9]
    assert {state(sessions, job_id) for job_id in made.values()} == {"succeeded"}
    sessions.write(batches.stop, batch_id, by=batches.CALLER)
    assert sessions.write(feeding.feed_known, batch_id, 0, max_queued=9) is None


def test_a_line_that_this_release_cannot_read_is_refused_and_holds_up_nobody(
    sessions: Sessions,
) -> None:
    batch_id = filled(sessions, [*THREE, Line(4, repeats=1), Line(5, repeats=3)])
    strange = {1: '{"owner": 7}', 2: feeding.kept(submission(request=b'{"scan_mode":"PET"}'))}
    with sessions.writing() as session:
        for line, wanted in strange.items():
            session.execute(
                update(BATCH_LINES).where(BATCH_LINES.c.line == line).values(wanted=wanted)
            )
    assert sorted(fed(sessions, batch_id)) == [3, 5]
    rows = sessions.read(batches.lines, batch_id, after=0, limit=9)
    refused = {row.line: row.problem for row in rows if row.problem is not None}
    assert sorted(refused) == [1, 2, 4]
    assert {problem["status"] for problem in refused.values()} == {422}
    assert "PET" in refused[2]["detail"]
    assert sessions.read(feeding.owners_waiting) == []
    seen = standing(sessions, batch_id)
    assert (seen.refused, seen.counts.queued) == (3, 1)


def test_who_has_least_under_way_gets_room_first(sessions: Sessions) -> None:
    filled(sessions, THREE)
    wanted = NewBatch("bob", "", Lane.BATCH, 1, "0" * 64)
    sessions.write(batches.fill, sessions.write(batches.begin, wanted).id, THREE[:1])
    assert sessions.read(feeding.owners_waiting) == ["ada", "bob"]
    sessions.write(jobs.submit, submission(scan_key=key(90)))
    assert sessions.read(feeding.owners_waiting) == ["bob", "ada"]


DEAD = "scan.dead"
"""A queue that nobody serves."""


def scans(*numbers: int, queue: str = QUEUE) -> list[Line]:
    return [
        Line(line, submission(scan_key=key(number), queue=queue))
        for line, number in enumerate(numbers, 1)
    ]


def served(sessions: Sessions, queue: str = QUEUE) -> None:
    """A worker takes a job and ends it."""
    (held,) = sessions.write(jobs.claim, queue=queue, owner=ELSEWHERE, limit=1, lease_seconds=9)
    sessions.write(jobs.advance, held.id, JobState.FAILED, attempt=1, problem=REFUSED)


def test_what_waits_for_a_model_that_nobody_serves_holds_up_nothing_else(
    sessions: Sessions,
) -> None:
    usual = Limits(max_jobs=8)
    dead = filled(sessions, scans(*range(10, 30), queue=DEAD))
    assert len(fed(sessions, dead, usual=usual)) == 6, "as many as of any"
    live = filled(sessions, scans(1, 2, 3))
    for count in (1, 2, 3):
        assert len(fed(sessions, live, usual=usual)) == count
        served(sessions)
    assert len(fed(sessions, dead, usual=usual)) == 6
    assert standing(sessions, live).state is BatchState.ENDED
    # Once somebody serves it, it has its turn again.
    served(sessions, DEAD)
    assert len(fed(sessions, dead, usual=usual)) == 7


def test_lines_of_one_batch_for_several_models_do_not_wait_for_one_another(
    sessions: Sessions,
) -> None:
    first = scans(*range(1, 9), queue=DEAD)
    last = [Line(9, submission(scan_key=key(9))), Line(10, submission(scan_key=key(10)))]
    batch = filled(sessions, [*first, *last])
    made = fed(sessions, batch, max_queued=8)
    assert sorted(made) == [1, 2, 3, 4, 9, 10]
    for _ in range(2):
        served(sessions)
    assert sorted(fed(sessions, batch, max_queued=8)) == [1, 2, 3, 4, 5, 6, 9, 10]


def test_models_that_are_served_share_the_room_though_one_batch_came_first(
    sessions: Sessions,
) -> None:
    usual, other = Limits(max_jobs=8), "scan.other"
    long, short = (
        filled(sessions, scans(*range(10, 30))),
        filled(sessions, scans(*range(1, 9), queue=other)),
    )
    fed(sessions, long, usual=usual)
    for _ in range(3):
        served(sessions)
        fed(sessions, long, usual=usual)
    assert (len(named(sessions, long)), len(named(sessions, short))) == (6, 3)


def test_lines_that_an_older_release_recorded_are_fed_like_others(sessions: Sessions) -> None:
    batch = filled(sessions, THREE)
    with sessions.writing() as session:
        session.execute(update(BATCH_LINES).values(queue=None))
    assert sorted(fed(sessions, batch)) == [1, 2, 3]
    assert sessions.read(feeding.owners_waiting) == []


def test_one_may_not_have_lines_waiting_without_end(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "MOST_WAITING", 4)
    batch_id = filled(sessions, THREE)
    with pytest.raises(TooMany, match="3 lines of your batches wait for room, 4 may"):
        begun(sessions, 2)
    begun(sessions, 1)
    fed(sessions, batch_id)
    begun(sessions, 3)


def test_lines_that_are_still_to_be_recorded_count_as_well_however_many_begin_at_once(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "MOST_WAITING", 4)
    begun(sessions, 3)
    with pytest.raises(TooMany, match="3 lines of your batches wait for room, 4 may"):
        begun(sessions, 2)

    def begins(_: int) -> bool:
        try:
            sessions.write(batches.begin, NewBatch("bob", "b", Lane.BATCH, 2, "d" * 64))
        except TooMany:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(begins, range(8))) == 2


def test_a_batch_that_is_stopped_just_as_it_is_fed_runs_nothing(sessions: Sessions) -> None:
    with sessions.writing() as session:
        batch = batches.begin(session, NewBatch("ada", "b", Lane.BATCH, 2, "d" * 64))
        batches.fill(session, batch.id, [Line(n, submission()) for n in (1, 2)])
    with ThreadPoolExecutor(1) as pool:
        with sessions.writing() as session:
            batches.stop(session, batch.id, by=batches.CALLER)
            fed = pool.submit(sessions.write, feeding.feed, "ada", max_queued=100)
            threading.Event().wait(0.3)
            assert not fed.done(), "it waits to hear"
        fed.result(10)
    while sessions.write(feeding.feed, "ada", max_queued=100).lines:
        pass
    assert {job.state for job in sessions.read(jobs.recent, "ada")} == {JobState.CANCELLED}


def test_a_batch_that_has_ended_is_not_stopped_any_more(sessions: Sessions) -> None:
    batch_id = filled(sessions, THREE[:2])
    made = fed(sessions, batch_id)
    sessions.write(jobs.request_cancel, made[1])
    with sessions.writing() as session:
        where = JOBS.c.id == made[2]
        session.execute(
            update(JOBS).where(where).values(state=JobState.FAILED, finished_at=epoch())
        )
    before = standing(sessions, batch_id)
    assert before.state is BatchState.ENDED
    assert sessions.write(batches.stop, batch_id, by=batches.CALLER) == 0
    assert standing(sessions, batch_id) == before


def test_however_many_batches_were_stopped_at_once_all_are_seen_to(sessions: Sessions) -> None:
    with sessions.writing() as session:
        for number in range(400):
            batch = batches.begin(session, NewBatch("ada", f"b{number}", Lane.BATCH, 1, "d" * 64))
            batches.fill(session, batch.id, [Line(1, submission(scan_key=key(1)))])
            batches.stop(session, batch.id, by=batches.CALLER)
        # Of all but the last the line has become a job, as one whose result is known does without any room.
        fed = BATCH_LINES.c.batch_id != batch.id
        session.execute(update(BATCH_LINES).where(fed).values(wanted=None))
    assert [sessions.write(feeding.feed, "ada", max_queued=1).lines for _ in range(2)] == [1, 0]
    assert sessions.read(feeding.owners_waiting) == []


def test_lines_of_a_stopped_batch_do_not_run_whether_they_came_before_or_after(
    sessions: Sessions,
) -> None:
    batch_id = begun(sessions, 5)
    sessions.write(batches.fill, batch_id, [THREE[0], Line(2, repeats=1)])
    sessions.write(batches.stop, batch_id, by=batches.CALLER)
    rest = [Line(number, submission(scan_key=key(number))) for number in (3, 4, 5)]
    sessions.write(batches.fill, batch_id, rest)
    other = filled(sessions, [Line(1, submission(scan_key=key(9)))])
    made = fed(sessions, batch_id, max_queued=1)
    assert sorted(made) == [1, 2, 3, 4, 5], "no room is needed to cancel"
    assert made[2] == made[1]
    assert {state(sessions, job_id) for job_id in made.values()} == {"cancelled"}
    seen = standing(sessions, batch_id)
    assert (seen.state, seen.counts.cancelled) == (BatchState.CANCELLED, 4)
    ended = sessions.read(batches.ended_since, batch_id, 0.0, 9)
    assert {each.line.line for each in ended} == {1, 2, 3, 4, 5}, "who follows hears of each"
    assert sorted(named(sessions, other)) == [1], "and the next has its turn"


def begun(sessions: Sessions, lines: int, max_failures: int | None = None) -> UUID:
    wanted = NewBatch("ada", "", Lane.BATCH, lines, "0" * 64, max_failures)
    return sessions.write(batches.begin, wanted).id


def filled(sessions: Sessions, lines: Sequence[Line]) -> UUID:
    """A batch that is recorded whole."""
    batch_id = begun(sessions, len(lines))
    sessions.write(batches.fill, batch_id, lines)
    return batch_id


def fed(
    sessions: Sessions, batch_id: UUID, *, max_queued: int = 99, usual: Limits = NO_LIMITS
) -> dict[int, UUID]:
    """Feed what there is room for; the job of each line that has one."""
    sessions.write(feeding.feed, "ada", max_queued=max_queued, usual=usual)
    sessions.write(feeding.feed, "ada", max_queued=max_queued, usual=usual)
    return named(sessions, batch_id)


def named(sessions: Sessions, batch_id: UUID) -> dict[int, UUID]:
    rows = sessions.read(batches.lines, batch_id, after=0, limit=99)
    return {row.line: row.job for row in rows if row.job is not None}


def standing(sessions: Sessions, batch_id: UUID) -> BatchView:
    found = sessions.read(batches.find, batch_id)
    assert found is not None
    return sessions.read(batches.view, found)


def state(sessions: Sessions, job_id: UUID) -> str:
    job = sessions.read(jobs.get, job_id)
    assert job is not None
    return job.state.value
