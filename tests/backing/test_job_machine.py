"""Jobs against a model of them in memory: workers that claim, renew, finish, die and come back as zombies."""

import shutil
import tempfile
from collections.abc import Callable
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
from sqlalchemy.orm import Session

from neural_mri.backing import database, jobs
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import HELD, TERMINAL, TRANSITIONS, JobState, Lane
from tests.backing.making import QUEUE, submission, tokens, unused

S = JobState
MAX_ATTEMPTS = 3
WORKERS = (LeaseOwner("host-a", 1, 1), LeaseOwner("host-b", 2, 2))


class Model:
    """What is known of a job without asking the database."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.state = S.QUEUED
        self.attempt = 0
        self.holder: LeaseOwner | None = None
        self.lease_expired = False
        self.cancel_requested = False

    def move(self, to: JobState) -> None:
        self.state = to
        if to not in HELD:
            self.holder = None

    def may_join(self, head: "Model") -> bool:
        if self is head:
            return True
        lanes = {Lane.INTERACTIVE} if head.job.lane is Lane.INTERACTIVE else set(Lane)
        have_lost_none = self.attempt == 0 and head.attempt == 0
        return (
            have_lost_none and self.job.batch_key == head.job.batch_key and self.job.lane in lanes
        )

    def after_loss(self) -> JobState:
        if self.cancel_requested:
            return S.CANCELLED
        return S.QUARANTINED if self.attempt >= MAX_ATTEMPTS else S.QUEUED


class JobMachine(RuleBasedStateMachine):
    """Every call to `backing.jobs` does what the model says, and nothing else changes."""

    empty: Settings
    attempts = Bundle("attempts")
    """Claims ever made, those long lost among them."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="nmri-"))
        self.sessions = database.sessions(unused(self.empty, self.folder))
        self.models: dict[UUID, Model] = {}
        self.ended: dict[UUID, Job] = {}

    def teardown(self) -> None:
        self.sessions.close()
        shutil.rmtree(self.folder)

    @rule(
        owner=st.sampled_from("ab"),
        length=st.sampled_from([4, 5]),
        lane=st.sampled_from([Lane.INTERACTIVE, Lane.BATCH]),
    )
    def submit(self, owner: str, length: int, lane: Lane) -> None:
        asked = submission(owner=owner, tokens=tokens(length), lane=lane)
        job = self.sessions.write(jobs.submit, asked)
        self.models[job.id] = Model(job)

    @rule(
        target=attempts,
        worker=st.sampled_from(WORKERS),
        limit=st.integers(1, 3),
        lease_seconds=st.sampled_from([600.0, -600.0]),
    )
    def claim(self, worker: LeaseOwner, limit: int, lease_seconds: float) -> object:
        claimed = self.sessions.write(
            jobs.claim,
            queue=QUEUE,
            owner=worker,
            limit=limit,
            lease_seconds=lease_seconds,
        )
        queued = [model for model in self.models.values() if model.state is S.QUEUED]
        fair = sorted(queued, key=lambda model: (model.job.virtual_start, model.job.id))
        mates = [model for model in fair if model.may_join(fair[0])]
        assert [job.id for job in claimed] == [model.job.id for model in mates[:limit]]
        for job in claimed:
            model = self.models[job.id]
            model.move(S.CLAIMED)
            model.attempt += 1
            model.holder, model.lease_expired = worker, lease_seconds < 0
            assert (job.attempt, job.lease_owner) == (model.attempt, worker)
        return multiple(*claimed)

    @rule(attempt=attempts, to=st.sampled_from(sorted(set(JobState) - {S.CLAIMED})))
    def advance(self, attempt: Job, to: JobState) -> None:
        model = self.models[attempt.id]
        may = (
            model.state in HELD
            and model.attempt == attempt.attempt
            and to in TRANSITIONS[model.state]
            and not (to is S.QUEUED and model.cancel_requested)
        )
        manifest = f"manifests/{attempt.id}.{attempt.attempt}" if to is S.SUCCEEDED else None
        moved = self.sessions.write(
            jobs.advance, attempt.id, to, attempt=attempt.attempt, manifest=manifest
        )
        assert (moved is not None) is may
        if may:
            model.move(to)

    @rule(attempt=attempts)
    def renew(self, attempt: Job) -> None:
        model = self.models[attempt.id]
        assert attempt.lease_owner is not None
        mine = model.holder == attempt.lease_owner and model.attempt == attempt.attempt
        renewal = self.sessions.write(
            jobs.renew, attempt.lease_owner, {attempt.id: attempt.attempt}, 600.0
        )
        assert renewal.lost == (set() if mine else {attempt.id})
        assert renewal.cancelled == ({attempt.id} if mine and model.cancel_requested else set())
        if mine:
            model.lease_expired = False

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not self.models:
            return
        model = self.models[data.draw(st.sampled_from(sorted(self.models)))]
        moved = self.sessions.write(jobs.request_cancel, model.job.id).moved
        assert moved is (model.state is S.QUEUED)
        if moved:
            model.move(S.CANCELLED)
        elif model.state in HELD:
            model.cancel_requested = True

    @rule(dead=st.sampled_from([None, *WORKERS]))
    def reap(self, dead: LeaseOwner | None) -> None:
        lost = {
            model.job.id: model.after_loss()
            for model in self.models.values()
            if model.state in HELD and (model.lease_expired or model.holder == dead)
        }
        is_dead: Callable[[LeaseOwner], bool] = lambda owner: owner == dead  # noqa: E731
        taken = self.sessions.write(jobs.reap, max_attempts=MAX_ATTEMPTS, dead_owners=is_dead)
        assert {job.id: job.state for job in taken} == lost
        for job_id, state in lost.items():
            self.models[job_id].move(state)

    @invariant()
    def the_database_says_what_the_model_says(self) -> None:
        def look(session: Session) -> dict[UUID, Job]:
            return {
                job.id: job for owner in "ab" for job in jobs.recent(session, owner, limit=1000)
            }

        found = self.sessions.read(look)
        assert found.keys() == self.models.keys()
        for job_id, model in self.models.items():
            job = found[job_id]
            assert (job.state, job.attempt, job.lease_owner, job.cancel_requested) == (
                model.state,
                model.attempt,
                model.holder,
                model.cancel_requested,
            )
            if job.state in TERMINAL:
                assert self.ended.setdefault(job_id, job) == job, "an ended job never changes"


def test_jobs_do_what_their_model_does(template: Settings) -> None:
    class Machine(JobMachine):
        empty = template

    run = settings(
        max_examples=40,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=run)
