"""Equal scans under way: one runs, and none is lost whatever becomes of it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import update
from sqlalchemy.orm import Session

from neural_mri.backing import following, jobs
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.rows import JOBS
from neural_mri.contract.jobs import TERMINAL, JobState, Lane
from tests.backing.making import ELSEWHERE, QUEUE, submission

S = JobState
KEY = "a" * 64
MANIFEST = "manifests/x.1.json"
PROBLEM = {"type": "about:blank", "title": "no luck", "status": 500}


def submit(session: Session, owner: str = "ada", key: str = KEY, lane: Lane = Lane.BATCH) -> Job:
    return jobs.submit(session, submission(owner=owner, scan_key=key, lane=lane))


def equal(session: Session, *owners: str) -> list[Job]:
    """Equal scans of these owners, in this order."""
    return [submit(session, owner) for owner in owners]


def claim(session: Session, *, seconds: float = 60.0, queue: str = QUEUE) -> list[Job]:
    return jobs.claim(session, queue=queue, owner=ELSEWHERE, limit=8, lease_seconds=seconds)


def run(session: Session, known: Job, scan_key: str | None = None) -> Job:
    """Bring an attempt to its success, as the worker that knows it by this id."""
    for state in (S.RUNNING, S.STORING):
        jobs.advance(session, known.id, state, attempt=known.attempt)
    done = jobs.advance(
        session,
        known.id,
        S.SUCCEEDED,
        attempt=known.attempt,
        manifest=MANIFEST,
        scan_key=scan_key,
    )
    assert done is not None
    return done


def now(sessions: Sessions, *found: Job) -> list[Job]:
    read = [sessions.read(jobs.get, job.id) for job in found]
    return [job for job in read if job is not None]


def states(sessions: Sessions, found: Sequence[Job]) -> list[JobState]:
    return [job.state for job in now(sessions, *found)]


def test_of_equal_scans_one_runs_and_all_have_its_result(sessions: Sessions) -> None:
    made = sessions.write(equal, "ada", "bob", "cyd", "ada")
    assert [job.view().coalesced for job in made] == [False, True, True, True]
    assert sessions.read(jobs.queued_by_queue) == {QUEUE: 1}
    [claimed] = sessions.write(claim)
    late = sessions.write(submit, "dan")
    assert late.leader == claimed.id == made[0].id
    assert sessions.write(claim) == []
    sessions.write(run, claimed)
    for job in now(sessions, *made, late):
        assert (job.state, job.manifest, job.cached) == (S.SUCCEEDED, MANIFEST, False)
        assert job.finished_at is not None
    assert [job.attempt for job in now(sessions, *made, late)] == [1, 0, 0, 0, 0]
    assert sessions.write(submit, "eve").cached


def test_a_result_of_another_key_than_was_asked_for_is_everybodys_under_its_own(
    sessions: Sessions,
) -> None:
    """Who asks by the old key meanwhile follows; nobody is answered under it with these numbers."""
    true_key = "c" * 64
    made = sessions.write(equal, "ada", "bob")
    [claimed] = sessions.write(claim)
    late = sessions.write(submit, "dan")
    sessions.write(run, claimed, scan_key=true_key)
    for job in now(sessions, *made, late):
        assert (job.state, job.manifest, job.scan_key) == (S.SUCCEEDED, MANIFEST, true_key)
    assert sessions.read(jobs.known_results, [KEY, true_key]) == {true_key: MANIFEST}


def test_other_scans_and_jobs_without_a_key_follow_nobody(sessions: Sessions) -> None:
    sessions.write(submit)
    assert sessions.write(submit, key="b" * 64).leader is None
    assert sessions.write(jobs.submit, submission()).leader is None


def test_when_the_first_fails_the_next_tries_and_the_others_follow_that_one(
    sessions: Sessions,
) -> None:
    first, second, third = sessions.write(equal, "ada", "bob", "cyd")
    [claimed] = sessions.write(claim)
    sessions.write(jobs.advance, claimed.id, S.FAILED, attempt=1, problem=PROBLEM)
    assert states(sessions, (first, second, third)) == [S.FAILED, S.QUEUED, S.QUEUED]
    [again] = sessions.write(claim)
    assert again.id == second.id
    assert again.leader is None
    [third] = now(sessions, third)
    assert third.leader == second.id
    sessions.write(run, again)
    assert states(sessions, (second, third)) == [S.SUCCEEDED, S.SUCCEEDED]


def test_a_waiting_job_that_is_cancelled_leaves_its_place_to_who_follows(
    sessions: Sessions,
) -> None:
    first, second = sessions.write(equal, "ada", "bob")
    assert sessions.write(jobs.request_cancel, first.id).moved
    [claimed] = sessions.write(claim)
    assert claimed.id == second.id
    sessions.write(run, claimed)
    assert states(sessions, (first, second)) == [S.CANCELLED, S.SUCCEEDED]


def test_who_follows_and_is_cancelled_takes_nobody_along(sessions: Sessions) -> None:
    made = sessions.write(equal, "ada", "bob", "cyd")
    assert sessions.write(jobs.request_cancel, made[1].id).moved
    [claimed] = sessions.write(claim)
    sessions.write(run, claimed)
    assert states(sessions, made) == [S.SUCCEEDED, S.CANCELLED, S.SUCCEEDED]


def test_cancelling_the_one_that_runs_takes_the_work_from_nobody_else(sessions: Sessions) -> None:
    first, second, third = sessions.write(equal, "ada", "bob", "cyd")
    [known] = sessions.write(claim)
    sessions.write(jobs.advance, known.id, S.RUNNING, attempt=1)
    cancelled, moved = sessions.write(jobs.request_cancel, first.id)
    assert (cancelled.id, cancelled.state, moved) == (first.id, S.CANCELLED, True)
    [heir] = now(sessions, second)
    assert (heir.state, heir.attempt, heir.lease_owner) == (S.RUNNING, 1, ELSEWHERE)
    # The worker goes on under the id it knows, hears of no cancel, and keeps its lease.
    renewal = sessions.write(jobs.renew, ELSEWHERE, {known.id: 1}, 60.0)
    assert renewal == (frozenset(), frozenset())
    late = sessions.write(submit, "dan")
    assert late.leader == known.id
    storing = sessions.write(jobs.advance, known.id, S.STORING, attempt=1)
    assert storing is not None
    assert (storing.id, storing.state) == (known.id, S.STORING)
    done = sessions.write(jobs.advance, known.id, S.SUCCEEDED, attempt=1, manifest=MANIFEST)
    assert done is not None
    assert (done.id, done.manifest) == (known.id, MANIFEST)
    ended = (first, second, third, late)
    assert states(sessions, ended) == [S.CANCELLED, S.SUCCEEDED, S.SUCCEEDED, S.SUCCEEDED]
    assert now(sessions, first)[0].manifest is None


def test_the_work_stops_when_the_last_who_wanted_it_does_not(sessions: Sessions) -> None:
    first, second = sessions.write(equal, "ada", "bob")
    [known] = sessions.write(claim)
    sessions.write(jobs.request_cancel, first.id)
    asked, moved = sessions.write(jobs.request_cancel, second.id)
    assert (asked.cancel_requested, moved, asked.source) == (True, False, known.id)
    assert sessions.write(jobs.renew, ELSEWHERE, {known.id: 1}, 60.0).cancelled == {known.id}
    # Who comes now is not made to wait for what is about to stop.
    assert sessions.write(submit, "cyd").leader is None
    assert sessions.write(jobs.advance, known.id, S.CANCELLED, attempt=1) is not None
    assert states(sessions, (first, second)) == [S.CANCELLED, S.CANCELLED]


def test_a_stranger_and_an_old_attempt_move_no_heir(sessions: Sessions) -> None:
    first, second = sessions.write(equal, "ada", "bob")
    [known] = sessions.write(claim)
    sessions.write(jobs.request_cancel, first.id)
    stranger = ELSEWHERE._replace(pid=1)
    assert sessions.write(jobs.renew, stranger, {known.id: 1}, 60.0).lost == {known.id}
    assert sessions.write(jobs.advance, known.id, S.FAILED, attempt=2) is None
    assert states(sessions, (second,)) == [S.CLAIMED]


def test_an_heir_whose_worker_is_lost_is_led_by_nobody(sessions: Sessions) -> None:
    first, second, third = sessions.write(equal, "ada", "bob", "cyd")
    [known] = sessions.write(claim, seconds=-1.0)
    sessions.write(jobs.request_cancel, first.id)
    [back] = sessions.write(jobs.reap, max_attempts=3)
    assert (back.id, back.state, back.leader) == (second.id, S.QUEUED, None)
    # The worker that was thought lost finds that it holds nothing.
    assert sessions.write(jobs.advance, known.id, S.RUNNING, attempt=1) is None
    assert sessions.write(jobs.renew, ELSEWHERE, {known.id: 1}, 60.0).lost == {known.id}
    [again] = sessions.write(claim)
    assert (again.id, again.attempt) == (second.id, 2)
    sessions.write(run, again)
    assert states(sessions, (second, third)) == [S.SUCCEEDED, S.SUCCEEDED]


def test_what_ends_workers_is_set_aside_for_all_who_asked_for_it(sessions: Sessions) -> None:
    made = sessions.write(equal, "ada", "bob")
    for _ in range(3):
        sessions.write(claim, seconds=-1.0)
        sessions.write(jobs.reap, max_attempts=3)
    first, second = now(sessions, *made)
    assert (first.state, second.state) == (S.QUARANTINED, S.QUARANTINED)
    assert first.problem == second.problem
    assert first.problem is not None


def test_a_job_past_its_deadline_leaves_a_turn_to_who_follows(sessions: Sessions) -> None:
    late = sessions.write(jobs.submit, submission(scan_key=KEY, deadline_seconds=-1.0))
    follower = sessions.write(submit, "bob")
    sessions.write(claim)
    sessions.write(jobs.reap, max_attempts=3)
    assert states(sessions, (late, follower)) == [S.EXPIRED, S.QUEUED]
    assert [job.id for job in sessions.write(claim)] == [follower.id]


def test_following_is_not_given_up_before_what_is_followed(sessions: Sessions) -> None:
    made = sessions.write(equal, "ada", "bob")
    assert [job.id for job in sessions.write(jobs.expire, waiting_seconds=-1.0)] == [made[0].id]
    assert states(sessions, made) == [S.EXPIRED, S.QUEUED]
    assert sessions.read(jobs.queued_by_queue) == {QUEUE: 1}


# Fairness


def made_earlier(session: Session, seconds: float) -> None:
    earlier = {name: JOBS.c[name] - seconds for name in ("created_at", "waiting_since")}
    session.connection().execute(update(JOBS).values(earlier))


def test_who_leads_after_one_that_failed_waits_from_then_on(sessions: Sessions) -> None:
    first, second = sessions.write(equal, "ada", "bob")
    sessions.write(made_earlier, 55.0)
    sessions.write(claim)
    sessions.write(made_earlier, 55.0)
    sessions.write(jobs.advance, first.id, S.FAILED, attempt=1, problem=PROBLEM)
    assert sessions.write(jobs.expire, waiting_seconds=60.0) == []
    sessions.write(made_earlier, 65.0)
    assert [job.id for job in sessions.write(jobs.expire, waiting_seconds=60.0)] == [second.id]


def test_who_leads_after_one_that_nobody_took_has_waited_as_long(sessions: Sessions) -> None:
    """Else many who asked for the same would be told one after another."""
    [first] = sessions.write(equal, "ada")
    sessions.write(claim, seconds=-1.0)
    sessions.write(jobs.reap, max_attempts=3)
    sessions.write(made_earlier, 55.0)
    second, third = sessions.write(equal, "bob", "cyd")
    sessions.write(made_earlier, 10.0)
    assert [job.id for job in sessions.write(jobs.expire, waiting_seconds=60.0)] == [first.id]
    assert sessions.write(jobs.expire, waiting_seconds=60.0) == [], "they came later"
    sessions.write(made_earlier, 55.0)
    for late in (second, third):
        assert [job.id for job in sessions.write(jobs.expire, waiting_seconds=60.0)] == [late.id]


def owners(session: Session, count: int) -> list[str]:
    return [
        job.owner
        for _ in range(count)
        for job in jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60)
    ]


def test_following_costs_nobody_a_turn(sessions: Sessions) -> None:
    sessions.write(submit, "ada")
    for _ in range(20):
        sessions.write(submit, "bob")
    for _ in range(3):
        sessions.write(jobs.submit, submission(owner="ada", lane=Lane.BATCH))
    sessions.write(jobs.submit, submission(owner="bob", lane=Lane.BATCH))
    # ada led, and so has had her first turn: bob's own scan is next.
    assert sessions.write(owners, 2) == ["ada", "bob"]


def test_who_takes_over_a_place_is_charged_for_it(sessions: Sessions) -> None:
    [lead, _] = sessions.write(equal, "ada", "bob")
    sessions.write(jobs.request_cancel, lead.id)
    for who in ("bob", "ada"):
        sessions.write(jobs.submit, submission(owner=who, lane=Lane.BATCH))
    assert sessions.write(owners, 3) == ["bob", "ada", "bob"]


def test_nobody_waits_longer_for_following_a_job_that_is_in_no_hurry(sessions: Sessions) -> None:
    for _ in range(5):
        sessions.write(jobs.submit, submission(owner="ada", lane=Lane.BACKGROUND))
    behind = sessions.write(submit, "ada", lane=Lane.BACKGROUND)
    follower = sessions.write(submit, "bob", lane=Lane.INTERACTIVE)
    assert follower.leader == behind.id
    served = [sessions.write(claim_one) for _ in range(2)]
    assert behind.id in {job.id for job in served}


def claim_one(session: Session) -> Job:
    [job] = jobs.claim(session, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60)
    return job


def test_a_follower_is_seen_where_its_work_stands(sessions: Sessions) -> None:
    first, second, third = sessions.write(equal, "ada", "bob", "cyd")
    [known] = sessions.write(claim)
    sessions.write(jobs.advance, known.id, S.RUNNING, attempt=1)
    for cancelled, holder in ((None, first), (first, second)):
        if cancelled is not None:
            sessions.write(jobs.request_cancel, cancelled.id)
        runner = sessions.read(following.runner, now(sessions, third)[0])
        assert runner is not None
        assert (runner.id, runner.state) == (holder.id, S.RUNNING)
    assert sessions.read(following.runner, now(sessions, first)[0]) is None


# Whatever happens

OWNERS = ("a", "b", "c")
WORKER = LeaseOwner("another-host", 1, 1)


class Clinic:
    """Jobs of two scan keys, workers that do as they are told, and what became of it all."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.queue = f"scan.{uuid4().hex}"
        self.keys = (uuid4().hex * 2, uuid4().hex * 2)
        self.made: list[Job] = []
        self.known: list[Job] = []
        self.wanted: set[UUID] = set()
        self.manifests = 0

    def act(self, what: str, which: int) -> None:
        match what:
            case "submit":
                asked = submission(
                    owner=OWNERS[which % 3], scan_key=self.keys[which % 2], queue=self.queue
                )
                self.made.append(self.sessions.write(jobs.submit, asked))
                self.wanted.add(self.made[-1].id)
            case "claim" | "claim badly":
                seconds = 600.0 if what == "claim" else -600.0
                self.known += self.sessions.write(
                    jobs.claim, queue=self.queue, owner=WORKER, limit=2, lease_seconds=seconds
                )
            case "cancel" if self.made:
                job = self.made[which % len(self.made)]
                self.sessions.write(jobs.request_cancel, job.id)
                self.wanted.discard(job.id)
            case "succeed" | "fail" | "stop" if self.known:
                self.end(self.known[which % len(self.known)], what)
            case "reap":
                self.sessions.write(jobs.reap, max_attempts=99, dead_owners=lambda _: False)

    def end(self, known: Job, how: str) -> None:
        """What a worker does with an attempt, which it may have lost long ago."""
        renewal = self.sessions.write(jobs.renew, WORKER, {known.id: known.attempt}, 600.0)
        if renewal.lost:
            return
        if how == "fail":
            self.move(known, S.FAILED)
            self.wanted -= {job.id for job in self.seen() if job.state is S.FAILED}
        elif how == "stop" and renewal.cancelled:
            self.move(known, S.CANCELLED)
        elif how == "succeed":
            for state in (S.RUNNING, S.STORING, S.SUCCEEDED):
                self.move(known, state)

    def move(self, known: Job, to: JobState) -> None:
        manifest = f"m/{known.id}.{known.attempt}" if to is S.SUCCEEDED else None
        moved = self.sessions.write(
            jobs.advance, known.id, to, attempt=known.attempt, manifest=manifest
        )
        assert moved is None or moved.id == known.id

    def seen(self) -> list[Job]:
        return [
            job for made in self.made if (job := self.sessions.read(jobs.get, made.id)) is not None
        ]

    def check(self) -> None:
        """At any time: of each scan key at most one attempt runs, and one waits for a turn."""
        for key in self.keys:
            of_key = [job for job in self.seen() if job.scan_key == key]
            held = [job for job in of_key if job.lease_owner and not job.cancel_requested]
            waiting = [job for job in of_key if job.state is S.QUEUED and job.leader is None]
            assert len(held) <= 1
            assert len(waiting) <= 1
            followers = [job for job in of_key if job.state is S.QUEUED and job.leader is not None]
            for job in followers:
                assert self.sessions.read(following.runner, job) is not None, "left behind"

    def drain(self) -> None:
        """Let good workers do what there is."""
        for known in tuple(self.known):
            self.end(known, "succeed")
        while claimed := self.sessions.write(
            jobs.claim, queue=self.queue, owner=WORKER, limit=1, lease_seconds=600.0
        ):
            for known in claimed:
                self.end(known, "succeed")


@given(
    acts=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    *["submit"] * 4,
                    *["cancel"] * 2,
                    "claim",
                    "claim badly",
                    "succeed",
                    "fail",
                    "stop",
                    "reap",
                ]
            ),
            st.integers(0, 11),
        ),
        max_size=30,
    )
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_nobody_is_lost_whatever_happens(sessions: Sessions, acts: list[tuple[str, int]]) -> None:
    clinic = Clinic(sessions)
    for what, which in acts:
        clinic.act(what, which)
        clinic.check()
    clinic.drain()
    for job in clinic.seen():
        assert job.state in TERMINAL, "left behind"
        if job.id in clinic.wanted:
            assert job.state is S.SUCCEEDED
            assert job.manifest is not None


def test_nobody_is_lost_when_many_act_at_once(sessions: Sessions) -> None:
    """Each waits for the others' locks, and none for ever."""
    clinic = Clinic(sessions)

    def act(seed: int) -> None:
        chance = Random(seed)
        for _ in range(40):
            what = chance.choice(
                ["submit", "submit", "cancel", "claim", "claim", "succeed", "fail"]
            )
            clinic.act(what, chance.randrange(12))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(act, range(6)))
    clinic.drain()
    for job in clinic.seen():
        assert job.state in TERMINAL, "left behind"
        assert (job.state is S.SUCCEEDED) is (job.manifest is not None)


@pytest.mark.parametrize("claimed", [0, 1])
def test_a_follower_of_a_follower_there_is_not(sessions: Sessions, claimed: int) -> None:
    made = sessions.write(equal, "ada", "bob")
    for _ in range(claimed):
        sessions.write(claim)
    third = sessions.write(submit, "cyd")
    assert third.leader == made[0].id
