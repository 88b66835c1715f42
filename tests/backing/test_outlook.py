"""Places in a queue, and how long they will take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import update
from sqlalchemy.orm import Session

from neural_mri.backing import jobs, keys, outlook
from neural_mri.backing.database import Sessions
from neural_mri.backing.outlook import Pace
from neural_mri.backing.rows import JOBS
from neural_mri.contract.jobs import JobKind, JobState, QueuePlace
from tests.backing.making import ELSEWHERE, QUEUE, submission, tokens

S = JobState


def submit(session: Session, owner: str, length: int = 8) -> jobs.Job:
    return jobs.submit(session, submission(owner=owner, tokens=tokens(length)))


def measured(session: Session, length: int, seconds: float, *, together: int = 1) -> None:
    """Jobs of one claim that took so long."""
    for _ in range(together):
        submit(session, "past", length)
    held = jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=together, lease_seconds=60)
    assert len(held) == together
    for job in held:
        for state in (S.RUNNING, S.STORING):
            jobs.advance(session, job.id, state, attempt=1)
        jobs.advance(session, job.id, S.SUCCEEDED, attempt=1, manifest="m")
    ids = [job.id for job in held]
    first = held[0].started_at
    assert first is not None
    session.execute(
        update(JOBS)
        .where(JOBS.c.id.in_(ids))
        .values(started_at=first.timestamp(), finished_at=first.timestamp() + seconds)
    )


def place(session: Session, job: jobs.Job, workers: int = 1) -> QueuePlace:
    return outlook.line(session, QUEUE).place(job, workers=workers, ready_in=0.0)


@given(
    st.floats(0, 2), st.floats(0.001, 0.1), st.lists(st.integers(1, 2000), min_size=2, unique=True)
)
def test_a_pace_that_is_there_is_found(
    seconds_a_job: float, seconds_a_unit: float, costs: list[int]
) -> None:
    pace = Pace.of([(cost, seconds_a_job + cost * seconds_a_unit) for cost in costs])
    assert pace is not None
    for cost in costs:
        expected = seconds_a_job + cost * seconds_a_unit
        assert pace.seconds(cost) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@given(st.lists(st.tuples(st.floats(1, 1e4), st.floats(0, 1e3)), min_size=1))
def test_nothing_ever_takes_less_than_no_time(lasted: list[tuple[float, float]]) -> None:
    pace = Pace.of(lasted)
    assert pace is not None
    assert pace.seconds_a_job >= 0
    assert pace.seconds_a_unit >= 0


def test_places_are_the_order_of_claims(sessions: Sessions) -> None:
    made = [sessions.write(submit, who) for who in ("ada", "ada", "ada", "bob")]
    places = {job.id: sessions.read(place, job).position for job in made}
    claimed = []
    with sessions.writing() as session:
        for _ in made:
            claimed += jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60)
    assert [places[job.id] for job in claimed] == [1, 2, 3, 4]


def test_a_wait_is_what_stands_before_at_the_pace_that_was_measured(sessions: Sessions) -> None:
    for length, seconds in ((10, 1.1), (100, 2.0), (200, 3.0)):
        sessions.write(measured, length, seconds)
    made = [sessions.write(submit, f"u{n}", 100) for n in range(4)]
    starts = [sessions.read(place, job).estimated_start_seconds for job in made]
    assert starts == pytest.approx([0.0, 2.0, 4.0, 6.0], abs=0.01)
    assert sessions.read(place, made[3], 2).estimated_start_seconds == pytest.approx(3.0, abs=0.01)
    with sessions.writing() as session:
        jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60)
        session.execute(
            update(JOBS)
            .where(JOBS.c.lease_owner.is_not(None))
            .values(started_at=JOBS.c.started_at - 1.5)
        )
    # Half a second is left of the one that runs.
    now = sessions.read(place, made[3])
    assert now.position == 3
    assert now.estimated_start_seconds == pytest.approx(4.5, abs=0.05)


def test_jobs_that_ran_together_share_the_time(sessions: Sessions) -> None:
    sessions.write(measured, 50, 4.0, together=4)
    sessions.write(submit, "ada", 50)
    last = sessions.write(submit, "bob", 50)
    assert sessions.read(place, last).estimated_start_seconds == pytest.approx(1.0, abs=0.01)


def test_what_was_never_measured_is_not_guessed(sessions: Sessions) -> None:
    first, second = (sessions.write(submit, who) for who in ("ada", "bob"))
    assert sessions.read(place, first).estimated_start_seconds == 0.0
    assert sessions.read(place, second) == QueuePlace(position=2)


def test_who_follows_stands_where_its_leader_stands(sessions: Sessions) -> None:
    for _ in range(3):
        sessions.write(submit, "ada")
    lead = sessions.write(jobs.submit, submission(owner="bob", scan_key="a" * 64))
    for _ in range(5):
        sessions.write(submit, "cyd")
    follower = sessions.write(jobs.submit, submission(owner="cyd", scan_key="a" * 64))
    assert follower.leader == lead.id
    assert sessions.read(place, follower) == sessions.read(place, lead)


def test_loading_takes_as_long_as_it_took(sessions: Sessions) -> None:
    revision = "f" * 64
    assert sessions.read(outlook.loading_seconds, revision) is None

    def load(session: Session, *, end: bool) -> None:
        jobs.submit(
            session,
            submission(
                kind=JobKind.LOAD,
                revision=revision,
                queue=keys.CONTROL_QUEUE,
                tokens=None,
                request=b"{}",
            ),
        )
        [job] = jobs.claim(
            session, queue=keys.CONTROL_QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60
        )
        jobs.advance(session, job.id, S.LOADING, attempt=1)
        started = JOBS.c.started_at - 4.0
        if end:
            for state in (S.RUNNING, S.STORING, S.SUCCEEDED):
                jobs.advance(session, job.id, state, attempt=1)
            started = JOBS.c.finished_at - 10.0
        session.execute(update(JOBS).where(JOBS.c.id == job.id).values(started_at=started))

    sessions.write(load, end=True)
    assert sessions.read(outlook.loading_seconds, revision) == pytest.approx(10.0, abs=0.1)
    sessions.write(load, end=False)
    assert sessions.read(outlook.loading_seconds, revision) == pytest.approx(6.0, abs=0.1)
