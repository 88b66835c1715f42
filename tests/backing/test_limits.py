"""What one user may have under way, and compute in a day."""

from functools import partial
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from neural_mri.backing import jobs, limits
from neural_mri.backing.database import Sessions
from neural_mri.backing.limits import Limits, NotBrief
from neural_mri.backing.rows import JOBS
from neural_mri.contract.auth import UserLimits
from neural_mri.contract.jobs import JobState
from neural_mri.contract.problems import TooMany
from tests.backing.making import ELSEWHERE, QUEUE, submission

THREE = Limits(max_jobs=3)
HUNDRED_SECONDS = Limits(daily_seconds=100.0)


def submit(session: Session, /, usual: Limits, owner: str = "ada", **changes: Any) -> jobs.Job:
    return jobs.submit(session, submission(owner=owner, **changes), usual=usual)


def ran(sessions: Sessions, seconds: float, *, ago: float = 0.0, owner: str = "ada") -> None:
    """A job that held a worker for so long, and ended so long ago."""
    with sessions.writing() as session:
        jobs.submit(session, submission(owner=owner))
        [held] = jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60)
        jobs.advance(session, held.id, JobState.FAILED, attempt=1)
        end = JOBS.c.finished_at - ago
        session.execute(
            update(JOBS)
            .where(JOBS.c.id == held.id)
            .values(finished_at=end, started_at=end - seconds)
        )


def test_a_user_has_so_many_jobs_under_way_and_others_theirs(sessions: Sessions) -> None:
    made = [sessions.write(submit, THREE) for _ in range(3)]
    with pytest.raises(TooMany, match="3 of your jobs are under way, 3 are allowed") as refused:
        sessions.write(submit, THREE)
    assert refused.value.members["retry_after_seconds"] == 1
    sessions.write(submit, THREE, "bob")
    sessions.write(jobs.request_cancel, made[0].id)
    sessions.write(submit, THREE)


def test_who_has_enough_under_way_comes_again_after_as_long_as_their_latest_jobs_take(
    sessions: Sessions,
) -> None:
    ran(sessions, 50.0, ago=1000.0)
    for ago in range(16):
        ran(sessions, 7.0, ago=ago)
    sessions.write(submit, Limits(max_jobs=1))
    with pytest.raises(TooMany) as refused:
        sessions.write(submit, Limits(max_jobs=1))
    assert refused.value.members["retry_after_seconds"] == pytest.approx(7, abs=1)


def test_who_follows_has_a_job_under_way_as_well(sessions: Sessions) -> None:
    for _ in range(3):
        sessions.write(submit, THREE, scan_key="a" * 64)
    with pytest.raises(TooMany):
        sessions.write(submit, THREE, scan_key="a" * 64)


def test_a_known_result_is_given_beyond_every_limit(sessions: Sessions) -> None:
    sessions.write(submit, THREE, scan_key="a" * 64)
    with sessions.writing() as session:
        [held] = jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60)
        for state in (JobState.RUNNING, JobState.STORING):
            jobs.advance(session, held.id, state, attempt=1)
        jobs.advance(session, held.id, JobState.SUCCEEDED, attempt=1, manifest="m")
    ran(sessions, 200.0)
    for usual in (HUNDRED_SECONDS, Limits(max_jobs=1)):
        assert sessions.write(submit, usual, scan_key="a" * 64).cached


def test_a_day_of_computing_passes_with_time(sessions: Sessions) -> None:
    ran(sessions, 60.0, ago=80_000.0)
    ran(sessions, 30.0, ago=100.0)
    sessions.write(submit, HUNDRED_SECONDS)
    ran(sessions, 20.0)
    with pytest.raises(TooMany, match="computed for 110 s within the last 24 hours") as refused:
        sessions.write(submit, HUNDRED_SECONDS)
    # The minute leaves the day 6,400 s from now, and with it the sum is below the limit.
    assert refused.value.members["retry_after_seconds"] == pytest.approx(6_400, abs=5)
    sessions.write(submit, HUNDRED_SECONDS, "bob")


def test_whoever_asks_briefly_is_told_before_anything_is_done_or_summed_up(
    sessions: Sessions,
) -> None:
    wanted = submission(idempotency_key="word")
    brief = partial(jobs.submit_once, briefly=True)
    with pytest.raises(NotBrief):
        sessions.write(brief, wanted, usual=HUNDRED_SECONDS)
    assert sessions.read(jobs.recent, "ada") == []
    made = sessions.write(brief, wanted, usual=THREE)
    assert made.is_new, "the key was not used up"
    assert sessions.write(brief, wanted, usual=HUNDRED_SECONDS).job.id == made.job.id


def test_what_was_computed_yesterday_does_not_count(sessions: Sessions) -> None:
    ran(sessions, 500.0, ago=86_500.0)
    sessions.write(submit, HUNDRED_SECONDS)


def test_an_attempt_that_is_handed_over_is_charged_once(sessions: Sessions) -> None:
    with sessions.writing() as session:
        [first, _] = [
            jobs.submit(session, submission(owner=owner, scan_key="a" * 64))
            for owner in ("ada", "bob")
        ]
        jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60)
        session.execute(update(JOBS).values(started_at=JOBS.c.started_at - 30.0))
    assert sessions.write(jobs.request_cancel, first.id).moved
    charged = [sessions.read(limits.usage, owner, THREE).seconds_today for owner in ("ada", "bob")]
    assert charged == [0.0, pytest.approx(30.0, abs=1.0)]


def test_to_wait_again_after_a_lost_worker_costs_nothing(sessions: Sessions) -> None:
    with sessions.writing() as session:
        made = jobs.submit(session, submission(owner="ada"))
        jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=-1)
    [back] = sessions.write(jobs.reap, max_attempts=3)
    assert (back.id, back.state) == (made.id, JobState.QUEUED)
    with sessions.writing() as session:
        session.execute(update(JOBS).values(started_at=JOBS.c.started_at - 500.0))
    assert sessions.write(jobs.request_cancel, made.id).moved
    assert sessions.read(limits.usage, "ada", THREE).seconds_today == 0.0
    sessions.write(submit, HUNDRED_SECONDS)


def test_what_still_runs_counts_as_far_as_it_has_come(sessions: Sessions) -> None:
    with sessions.writing() as session:
        jobs.submit(session, submission(owner="ada"))
        jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60)
        session.execute(update(JOBS).values(started_at=JOBS.c.started_at - 150.0))
    with pytest.raises(TooMany, match="computed for 150 s"):
        sessions.write(submit, HUNDRED_SECONDS)


def claimed_together(session: Session, count: int) -> None:
    """One claim, the last of them half a minute ago."""
    assert (
        len(jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=16, lease_seconds=60)) == count
    )
    session.execute(update(JOBS).values(started_at=JOBS.c.started_at - 30.0))


def test_scans_that_share_a_pass_share_what_it_took(sessions: Sessions) -> None:
    whose = ("ada", "ada", "ada", "bob")
    with sessions.writing() as session:
        made = [jobs.submit(session, submission(owner=owner)) for owner in whose]
        claimed_together(session, 4)
    charged = {owner: sessions.read(limits.usage, owner, THREE).seconds_today for owner in whose}
    assert charged["ada"] == pytest.approx(22.5, abs=0.5)
    assert charged["bob"] == pytest.approx(7.5, abs=0.5)
    for job in made:
        sessions.write(jobs.advance, job.id, JobState.FAILED, attempt=1)
    charged = {owner: sessions.read(limits.usage, owner, THREE).seconds_today for owner in whose}
    assert charged["ada"] + charged["bob"] == pytest.approx(30.0, abs=0.5)
    assert charged["ada"] == pytest.approx(3 * charged["bob"], abs=0.5)


def test_who_is_handed_a_part_of_a_pass_is_charged_that_part(sessions: Sessions) -> None:
    with sessions.writing() as session:
        made = jobs.submit(session, submission(owner="ada", scan_key="a" * 64))
        jobs.submit(session, submission(owner="bob", scan_key="a" * 64))
        jobs.submit(session, submission(owner="eve"))
        claimed_together(session, 2)
    sessions.write(jobs.request_cancel, made.id)
    assert sessions.read(limits.usage, "bob", THREE).seconds_today == pytest.approx(15.0, abs=0.5)


def test_a_claim_of_the_release_before_is_charged_whole(sessions: Sessions) -> None:
    with sessions.writing() as session:
        for owner in ("ada", "bob"):
            jobs.submit(session, submission(owner=owner))
        claimed_together(session, 2)
        session.execute(update(JOBS).values(claim_share=None))
    assert sessions.read(limits.usage, "ada", THREE).seconds_today == pytest.approx(30.0, abs=0.5)


def test_a_users_own_limits_go_before_everybodys(sessions: Sessions) -> None:
    sessions.write(limits.set_limits, "ada", UserLimits(max_jobs=1))
    sessions.write(submit, THREE)
    with pytest.raises(TooMany, match="1 are allowed"):
        sessions.write(submit, THREE)
    sessions.write(limits.set_limits, "ada", UserLimits(max_jobs=0))
    for _ in range(5):
        sessions.write(submit, THREE)
    sessions.write(limits.set_limits, "ada", UserLimits())
    with pytest.raises(TooMany, match="3 are allowed"):
        sessions.write(submit, THREE)
    assert sessions.read(limits.users) == ["ada"]


def test_usage_says_what_counts(sessions: Sessions) -> None:
    ran(sessions, 12.5)
    ran(sessions, 99.0, owner="bob")
    sessions.write(submit, THREE)
    found = sessions.read(limits.usage, "ada", THREE)
    assert (found.user, found.in_flight, found.max_jobs) == ("ada", 1, 3)
    assert found.seconds_today == pytest.approx(12.5, abs=0.01)
    assert found.daily_seconds is None
