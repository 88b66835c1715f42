"""Equal scans of several people, whose workers die, return as zombies, fail and succeed, and who lose interest.

What must hold is said of every state that the rules can lead to, and in the end: whoever is left waiting
then gets a result.
"""

import shutil
import tempfile
from pathlib import Path
from uuid import UUID

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text
from sqlalchemy.orm import Session

from neural_mri.backing import database, deletion, following, jobs, keys
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.leftovers import left_over
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import HELD, TERMINAL, JobState, Lane
from tests.backing.making import QUEUE, submission, tokens, unused

S = JobState
OWNERS = "abc"
MAX_ATTEMPTS = 3
WORKERS = (LeaseOwner("host-a", 1, 1), LeaseOwner("host-b", 2, 2))
MOVES = (S.RUNNING, S.STORING, S.SUCCEEDED, S.SUCCEEDED, S.FAILED, S.CANCELLED, S.QUEUED)


def everything(session: Session) -> dict[UUID, Job]:
    return {job.id: job for owner in OWNERS for job in jobs.recent(session, owner, limit=1000)}


def clock(session: Session) -> float:
    found = session.execute(text("SELECT virtual_clock FROM queue_clocks")).scalar()
    return float(found or 0.0)


def works(job: Job) -> bool:
    """Whether a job has a turn of its own, or somebody's."""
    return job.state in HELD or job.leader is None


class FollowingMachine(RuleBasedStateMachine):
    """Whatever is done, and by whom."""

    empty: Settings
    attempts = Bundle("attempts")
    """Claims ever made, those long lost among them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="nmri-"))
        self.sessions = database.sessions(unused(self.empty, self.folder))
        self.ended: dict[UUID, Job] = {}
        self.seen: dict[UUID, int] = {}
        self.clock = 0.0
        self.results: dict[str, Job] = {}
        """What each claim may have left in the store, by where it would stand."""
        self.deleted: set[UUID] = set()
        self.taken: set[str] = set()
        """What was taken away of deleted jobs."""
        self.left_over: set[str] = set()

    def teardown(self) -> None:
        try:
            self.everybody_is_served_in_the_end()
            self.what_is_left_over_is_what_nobody_holds_or_names_or_ever_will()
            self.of_all_that_is_deleted_nothing_is_left()
        finally:
            self.sessions.close()
            shutil.rmtree(self.folder)

    def everybody_is_served_in_the_end(self) -> None:
        """The workers come to life again: nobody waits for a turn that never comes."""
        self.sessions.write(jobs.reap, max_attempts=10, dead_owners=lambda _owner: True)
        for _ in range(200):
            claimed = self.sessions.write(
                jobs.claim, queue=QUEUE, owner=WORKERS[0], limit=8, lease_seconds=600
            )
            if not claimed:
                break
            for job in claimed:
                for state in (S.RUNNING, S.STORING):
                    assert self.sessions.write(jobs.advance, job.id, state, attempt=job.attempt)
                path = keys.manifest_path(job.id, job.attempt)
                assert self.sessions.write(
                    jobs.advance, job.id, S.SUCCEEDED, attempt=job.attempt, manifest=path
                )
        left = [job for job in self.sessions.read(everything).values() if job.state not in TERMINAL]
        assert left == []

    def of_all_that_is_deleted_nothing_is_left(self) -> None:
        for job_id in self.sessions.read(everything):
            self.sessions.write(deletion.delete_job, job_id)
        self.take_away()
        claimed = self.sessions.read(everything), self.results.keys() - self.taken
        assert claimed == ({}, set())

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        before = self.sessions.read(everything)
        ended = [job_id for job_id, job in before.items() if job.state in TERMINAL]
        if not ended:
            return
        job_id = data.draw(st.sampled_from(sorted(ended)))
        self.sessions.write(deletion.delete_job, job_id)
        self.deleted.add(job_id)
        del before[job_id], self.ended[job_id]
        assert self.sessions.read(everything) == before, "nobody else notices"

    @rule()
    def take_away(self) -> None:
        def look(session: Session) -> deletion.Unneeded:
            return deletion.unneeded(session, deletion.discarded(session, older_seconds=-1.0))

        found = self.sessions.read(look)
        self.sessions.write(deletion.settle, found.discards)
        self.taken |= set(found.results)

    @rule(
        owner=st.sampled_from(OWNERS),
        key=st.sampled_from(["k" * 64, "m" * 64, None]),
        lane=st.sampled_from(list(Lane)),
        length=st.sampled_from([4, 40]),
    )
    def submit(self, owner: str, key: str | None, lane: Lane, length: int) -> None:
        known = key is not None and any(
            job.scan_key == key and job.state is S.SUCCEEDED
            for job in self.sessions.read(everything).values()
        )
        wanted = submission(owner=owner, scan_key=key, lane=lane, tokens=tokens(length))
        job = self.sessions.write(jobs.submit, wanted)
        assert job.cached is known
        if not known and job.leader is None:
            assert job.virtual_start >= self.clock

    @rule(
        target=attempts,
        worker=st.sampled_from(WORKERS),
        limit=st.integers(1, 3),
        lease_seconds=st.sampled_from([600.0, -600.0]),
        most_cost=st.sampled_from([None, None, 10.0]),
    )
    def claim(
        self, worker: LeaseOwner, limit: int, lease_seconds: float, most_cost: float | None
    ) -> object:
        waiting = [
            job
            for job in self.sessions.read(everything).values()
            if job.state is S.QUEUED
            and job.leader is None
            and (
                most_cost is None
                or (job.lane is Lane.INTERACTIVE and job.estimated_cost <= most_cost)
            )
        ]
        claimed = self.sessions.write(
            jobs.claim,
            queue=QUEUE,
            owner=worker,
            limit=limit,
            lease_seconds=lease_seconds,
            most_cost=most_cost,
        )
        first = min(waiting, key=lambda job: (job.virtual_start, job.id), default=None)
        assert (claimed[0].id if claimed else None) == (first.id if first else None)
        self.results |= {keys.manifest_path(job.id, job.attempt): job for job in claimed}
        return multiple(*claimed)

    @rule(attempt=attempts, to=st.sampled_from(MOVES))
    def advance(self, attempt: Job, to: JobState) -> None:
        before = self.sessions.read(everything)
        path = keys.manifest_path(attempt.id, attempt.attempt) if to is S.SUCCEEDED else None
        moved = self.sessions.write(
            jobs.advance, attempt.id, to, attempt=attempt.attempt, manifest=path
        )
        after = self.sessions.read(everything)
        if moved is None:
            assert after == before, "who is not heard changes nothing"
            return
        assert moved.id == attempt.id, "a worker is answered under the id it knows"
        changed = [job for job in after.values() if before[job.id] != job]
        assert any(job.state is to and job.attempt == attempt.attempt for job in changed)
        if to in (S.RUNNING, S.STORING):
            assert len(changed) == 1
        if to is S.SUCCEEDED:
            assert {job.manifest for job in changed} == {path}
            same = [job for job in after.values() if job.scan_key and job.source == attempt.id]
            assert all(job.state in TERMINAL for job in same), "all who followed have it"

    @rule(attempt=attempts)
    def run_to_the_end(self, attempt: Job) -> None:
        for to in (S.RUNNING, S.STORING, S.SUCCEEDED):
            self.advance(attempt, to)

    @rule(attempt=attempts)
    def renew(self, attempt: Job) -> None:
        assert attempt.lease_owner is not None
        renewal = self.sessions.write(
            jobs.renew, attempt.lease_owner, {attempt.id: attempt.attempt}, 600.0
        )
        holding = [
            job
            for job in self.sessions.read(everything).values()
            if attempt.id in (job.id, job.leader)
            and job.attempt == attempt.attempt
            and job.lease_owner == attempt.lease_owner
        ]
        assert renewal.lost == (set() if holding else {attempt.id})
        assert len(holding) <= 1, "an attempt is of one job"

    @rule(attempt=attempts, lent=st.sampled_from([0.5, 2.0]))
    def lend(self, attempt: Job, lent: float) -> None:
        """What an attempt lends moves its beginning and nothing else, and nobody else's."""
        assert attempt.lease_owner is not None
        before = self.sessions.read(everything)
        known = {attempt.id: attempt.attempt}
        for deadline, begun in ((600.0, 0.0), (-600.0, lent)):
            self.sessions.write(
                jobs.reckon,
                attempt.lease_owner,
                known,
                deadline_seconds=deadline,
                begun_seconds=begun,
            )
        after = self.sessions.read(everything)
        for job_id, job in after.items():
            was = before[job_id]
            if job != was:
                assert attempt.id in (job.id, job.leader)
                assert (job.state, job.attempt, job.deadline_seconds) == (
                    was.state,
                    was.attempt,
                    was.deadline_seconds,
                )
                assert job.started_at is not None
                assert was.started_at is not None
                assert abs((job.started_at - was.started_at).total_seconds() - lent) < 0.01

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        known = self.sessions.read(everything)
        if not known:
            return
        job = known[data.draw(st.sampled_from(sorted(known)))]
        asked = self.sessions.write(jobs.request_cancel, job.id)
        now = self.sessions.read(everything)
        if job.state in TERMINAL:
            assert not asked.moved
            assert now == known
        elif job.state is S.QUEUED:
            assert now[job.id].state is S.CANCELLED
        else:
            assert now[job.id].state is S.CANCELLED or now[job.id].cancel_requested

    @rule(dead=st.sampled_from([None, *WORKERS]))
    def reap(self, dead: LeaseOwner | None) -> None:
        before = self.sessions.read(everything)
        taken = self.sessions.write(
            jobs.reap, max_attempts=MAX_ATTEMPTS, dead_owners=lambda owner: owner == dead
        )
        for job in taken:
            assert before[job.id].state in HELD
        now = self.sessions.read(everything)
        assert not any(job.lease_owner == dead for job in now.values() if dead is not None)

    @rule()
    def expire(self) -> None:
        before = self.sessions.read(everything)
        self.sessions.write(jobs.expire, waiting_seconds=3600.0)
        assert self.sessions.read(everything) == before, "nobody has waited for an hour"

    @invariant()
    def what_has_ended_stays(self) -> None:
        found = self.sessions.read(everything)
        for job_id, job in found.items():
            if job.state in TERMINAL:
                assert self.ended.setdefault(job_id, job) == job
        assert self.ended.keys() <= found.keys()

    @invariant()
    def attempts_only_grow(self) -> None:
        for job in self.sessions.read(everything).values():
            assert job.attempt >= self.seen.get(job.id, 0)
            self.seen[job.id] = job.attempt

    @invariant()
    def what_is_left_over_is_what_nobody_holds_or_names_or_ever_will(self) -> None:
        left = set(self.sessions.read(left_over, list(self.results)))
        # Of a job that is not there any more others see to what it has left.
        there = {path for path in self.results if self.results[path].id not in self.deleted}
        assert self.left_over & there <= left
        self.left_over = left
        found = self.sessions.read(everything).values()
        named = {job.manifest for job in found}
        held = {
            path
            for path, attempt in self.results.items()
            for job in found
            if job.state in HELD
            and attempt.id in (job.id, job.leader)
            and job.attempt == attempt.attempt
        }
        assert left == there - named - held
        assert not self.taken & (named | held), "what was taken away nobody holds or names"

    @invariant()
    def the_clock_only_goes_forward(self) -> None:
        now = self.sessions.read(clock)
        assert now >= self.clock
        self.clock = now

    @invariant()
    def whoever_is_held_has_a_holder(self) -> None:
        for job in self.sessions.read(everything).values():
            assert (job.lease_owner is not None) is (job.state in HELD)

    @invariant()
    def equal_scans_run_once(self) -> None:
        under_way: dict[str, list[Job]] = {}
        for job in self.sessions.read(everything).values():
            if job.state not in TERMINAL and job.scan_key and not job.cancel_requested:
                under_way.setdefault(job.scan_key, []).append(job)
        for same in under_way.values():
            assert sum(works(job) for job in same) == 1, same

    @invariant()
    def whoever_follows_follows_somebody(self) -> None:
        def look(session: Session) -> None:
            for job in everything(session).values():
                if job.state is S.QUEUED and job.leader is not None:
                    found = following.runner(session, job)
                    assert found is not None, job
                    assert found.state not in TERMINAL

        self.sessions.read(look)


def test_equal_scans_are_never_lost_nor_run_twice(template: Settings) -> None:
    class Machine(FollowingMachine):
        empty = template

    on_postgresql = bool(template.database_url)
    run = settings(
        max_examples=5 if on_postgresql else 20,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=run)
