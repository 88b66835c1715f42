import json
from uuid import uuid4

import msgspec
import pytest
from sqlalchemy import event, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from neural_mri.backing import jobs, statements
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.rows import JOBS
from neural_mri.contract.jobs import HELD, TERMINAL, TRANSITIONS, JobKind, JobState, JobView
from neural_mri.contract.problems import TooMany, UnknownJob
from tests.backing.making import ELSEWHERE, QUEUE, on_sqlite, submission

S = JobState
KEY = "a" * 64


def claim_one(
    session: Session, *, owner: LeaseOwner = ELSEWHERE, queue: str = QUEUE, seconds: float = 60.0
) -> Job:
    [job] = jobs.claim(session, queue=queue, owner=owner, limit=1, lease_seconds=seconds)
    return job


def run_to_the_end(session: Session, job: Job, manifest: str = "manifests/x.1.json") -> Job:
    for state in (S.RUNNING, S.STORING):
        assert jobs.advance(session, job.id, state, attempt=job.attempt)
    done = jobs.advance(session, job.id, S.SUCCEEDED, attempt=job.attempt, manifest=manifest)
    assert done is not None
    return done


def test_a_job_is_read_back_as_it_was_submitted(sessions: Sessions) -> None:
    asked = submission(scan_key=KEY, deadline_seconds=12.5)
    job = sessions.write(jobs.submit, asked)
    assert sessions.read(jobs.get, job.id) == job
    assert job.state is S.QUEUED
    assert job.tokens == asked.tokens
    assert (job.owner, job.model, job.request) == ("ada", "tiny", asked.request)
    assert (job.n_tokens, job.estimated_cost, job.deadline_seconds) == (8, 8.0, 12.5)
    assert (job.attempt, job.lease_owner, job.manifest, job.problem) == (0, None, None, None)


def test_there_is_no_job_that_nobody_submitted(sessions: Sessions) -> None:
    assert sessions.read(jobs.get, uuid4()) is None


def test_a_job_lives_from_queue_to_result(sessions: Sessions) -> None:
    queued = sessions.write(jobs.submit, submission())
    claimed = sessions.write(claim_one)
    assert (claimed.id, claimed.state, claimed.attempt) == (queued.id, S.CLAIMED, 1)
    assert claimed.lease_owner == ELSEWHERE
    assert claimed.lease_until is not None
    assert claimed.started_at is not None
    assert (claimed.lease_until - claimed.started_at).total_seconds() == pytest.approx(60, abs=0.01)
    done = sessions.write(run_to_the_end, claimed)
    assert (done.state, done.manifest, done.lease_owner) == (
        S.SUCCEEDED,
        "manifests/x.1.json",
        None,
    )
    assert done.finished_at is not None
    assert done.created_at <= claimed.started_at <= done.finished_at


def test_a_view_links_to_the_result_once_there_is_one(sessions: Sessions) -> None:
    job = sessions.write(jobs.submit, submission())
    home = f"/api/jobs/{job.id}"
    assert job.view().links == {"self": home, "events": f"{home}/events"}
    sessions.write(claim_one)
    done = sessions.write(run_to_the_end, msgspec.structs.replace(job, attempt=1))
    view = done.view(base="/lab")
    assert view.links["result"] == f"/lab/jobs/{job.id}/result"
    assert view.request == {"scan_mode": "fMRI", "prompt": "Hello", "model": "tiny"}
    assert msgspec.json.decode(msgspec.json.encode(view), type=JobView) == view


def test_an_attempt_that_lost_its_lease_writes_nothing(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    zombie = sessions.write(claim_one, seconds=-1.0)
    sessions.write(jobs.reap, max_attempts=3)
    second = sessions.write(claim_one)
    assert (second.id, second.attempt) == (zombie.id, 2)
    for state in (S.RUNNING, S.FAILED, S.QUEUED, S.CANCELLED):
        assert sessions.write(jobs.advance, zombie.id, state, attempt=zombie.attempt) is None
    lost = sessions.write(jobs.renew, ELSEWHERE, {zombie.id: zombie.attempt}, 60.0)
    assert lost.lost == {zombie.id}
    assert sessions.write(run_to_the_end, second).attempt == 2


def test_another_process_cannot_renew_a_lease(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    job = sessions.write(claim_one)
    stranger = ELSEWHERE._replace(pid=1)
    assert sessions.write(jobs.renew, stranger, {job.id: 1}, 60.0).lost == {job.id}


def test_renewing_holds_a_job_that_would_have_been_taken_back(sessions: Sessions) -> None:
    for _ in range(2):
        sessions.write(jobs.submit, submission())
    held, lost = (sessions.write(claim_one, seconds=-1.0) for _ in range(2))
    renewal = sessions.write(jobs.renew, ELSEWHERE, {held.id: 1}, 60.0)
    assert renewal == (frozenset(), frozenset())
    assert [job.id for job in sessions.write(jobs.reap, max_attempts=3)] == [lost.id]
    assert sessions.write(jobs.renew, ELSEWHERE, {}, 60.0) == (frozenset(), frozenset())


def test_every_move_the_table_forbids_is_refused(sessions: Sessions) -> None:
    paths = {
        S.CLAIMED: (),
        S.LOADING: (S.LOADING,),
        S.RUNNING: (S.RUNNING,),
        S.STORING: (S.RUNNING, S.STORING),
    }
    for source, path in paths.items():
        for to in set(JobState) - {S.CLAIMED}:
            sessions.write(jobs.submit, submission())
            job = sessions.write(claim_one)
            for state in path:
                sessions.write(jobs.advance, job.id, state, attempt=1)
            manifest = "m" if to is S.SUCCEEDED else None
            moved = sessions.write(jobs.advance, job.id, to, attempt=1, manifest=manifest)
            assert (moved is not None) is (to in TRANSITIONS[source]), (source, to)
            if moved is None or to in HELD:
                sessions.write(jobs.advance, job.id, S.FAILED, attempt=1)
            elif to is S.QUEUED:
                sessions.write(jobs.request_cancel, job.id)


def test_only_claiming_makes_a_job_claimed(sessions: Sessions) -> None:
    job = sessions.write(jobs.submit, submission())
    with pytest.raises(ValueError, match="claimed by claim"):
        sessions.write(jobs.advance, job.id, S.CLAIMED, attempt=0)


def test_a_held_job_is_not_moved_without_its_attempt(sessions: Sessions) -> None:
    job = sessions.write(jobs.submit, submission())
    sessions.write(claim_one)
    assert sessions.write(jobs.advance, job.id, S.FAILED) is None


def test_a_scan_cannot_succeed_without_a_manifest(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    job = sessions.write(claim_one)
    for state in (S.RUNNING, S.STORING):
        sessions.write(jobs.advance, job.id, state, attempt=1)
    with pytest.raises(IntegrityError, match="scan_success_has_manifest"):
        sessions.write(jobs.advance, job.id, S.SUCCEEDED, attempt=1)


def test_loading_a_model_succeeds_without_a_manifest(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission(kind=JobKind.LOAD, tokens=None, request=b"{}"))
    job = sessions.write(claim_one)
    for state in (S.RUNNING, S.STORING):
        sessions.write(jobs.advance, job.id, state, attempt=1)
    done = sessions.write(jobs.advance, job.id, S.SUCCEEDED, attempt=1)
    assert done is not None
    assert "result" not in done.view().links


def test_a_failure_says_why(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    job = sessions.write(claim_one)
    problem = {"type": "about:blank", "title": "Out of memory", "status": 500}
    failed = sessions.write(jobs.advance, job.id, S.FAILED, attempt=1, problem=problem)
    assert failed is not None
    assert failed.view().problem == problem


# Cancelling


def test_a_waiting_job_is_cancelled_at_once(sessions: Sessions) -> None:
    job = sessions.write(jobs.submit, submission())
    cancelled, moved = sessions.write(jobs.request_cancel, job.id)
    assert (cancelled.state, moved) == (S.CANCELLED, True)
    claimed = sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60.0)
    assert claimed == []


def test_a_running_job_is_asked_to_stop_and_its_worker_hears_it(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    job = sessions.write(claim_one)
    asked, moved = sessions.write(jobs.request_cancel, job.id)
    assert (asked.state, asked.cancel_requested, moved) == (S.CLAIMED, True, False)
    assert sessions.write(jobs.renew, ELSEWHERE, {job.id: 1}, 60.0).cancelled == {job.id}
    assert sessions.write(jobs.advance, job.id, S.QUEUED, attempt=1) is None, "never runs again"
    assert sessions.write(jobs.advance, job.id, S.CANCELLED, attempt=1) is not None


def test_a_finished_job_cannot_be_cancelled(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    done = sessions.write(run_to_the_end, sessions.write(claim_one))
    assert sessions.write(jobs.request_cancel, done.id) == (done, False)


def test_cancelling_what_never_was_says_so(sessions: Sessions) -> None:
    unknown = uuid4()
    with pytest.raises(UnknownJob, match=str(unknown)):
        sessions.write(jobs.request_cancel, unknown)


# Taking back


def test_an_expired_lease_goes_back_to_the_queue(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    job = sessions.write(claim_one, seconds=-1.0)
    [back] = sessions.write(jobs.reap, max_attempts=3)
    assert (back.id, back.state, back.attempt) == (job.id, S.QUEUED, 1)
    assert (back.lease_owner, back.lease_until, back.finished_at) == (None, None, None)


def test_what_a_dead_process_held_comes_back_before_its_lease_ends(sessions: Sessions) -> None:
    for _ in range(3):
        sessions.write(jobs.submit, submission())
    dead = LeaseOwner.here()._replace(start_ticks=1)
    lost = sessions.write(claim_one, owner=dead)
    sessions.write(claim_one, owner=LeaseOwner.here())
    sessions.write(claim_one, owner=ELSEWHERE)
    assert [job.id for job in sessions.write(jobs.reap, max_attempts=3)] == [lost.id]


def test_a_job_that_loses_its_third_worker_is_set_aside_with_what_is_known(
    sessions: Sessions,
) -> None:
    sessions.write(jobs.submit, submission())
    for attempt in (1, 2, 3):
        job = sessions.write(claim_one, seconds=-1.0)
        assert job.attempt == attempt
        sessions.write(jobs.advance, job.id, S.RUNNING, attempt=attempt)
        [taken] = sessions.write(jobs.reap, max_attempts=3)
    assert taken.state is S.QUARANTINED
    assert taken.problem is not None
    assert taken.problem["type"] == "urn:neural-mri:problem:workers-lost"
    assert (taken.problem["attempts"], taken.problem["last_state"]) == (3, "running")
    assert str(ELSEWHERE) in taken.problem["detail"]


def test_a_lost_job_that_was_asked_to_stop_is_cancelled(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    job = sessions.write(claim_one, seconds=-1.0)
    sessions.write(jobs.request_cancel, job.id)
    assert [each.state for each in sessions.write(jobs.reap, max_attempts=1)] == [S.CANCELLED]


def test_a_job_past_its_deadline_ends_although_its_worker_lives(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission(deadline_seconds=-1.0))
    job = sessions.write(claim_one)
    [late] = sessions.write(jobs.reap, max_attempts=3)
    assert late.state is S.EXPIRED
    assert late.problem is not None
    assert "attempt 1 ran for" in late.problem["detail"]
    assert sessions.write(jobs.renew, ELSEWHERE, {job.id: 1}, 60.0).lost == {job.id}


def test_reaping_twice_takes_back_once(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    sessions.write(claim_one, seconds=-1.0)
    assert len(sessions.write(jobs.reap, max_attempts=3)) == 1
    assert sessions.write(jobs.reap, max_attempts=3) == []


def test_a_job_nobody_takes_is_given_up_in_the_end(sessions: Sessions) -> None:
    job = sessions.write(jobs.submit, submission())
    assert sessions.write(jobs.expire, waiting_seconds=60.0) == []
    [expired] = sessions.write(jobs.expire, waiting_seconds=-1.0)
    assert (expired.id, expired.state) == (job.id, S.EXPIRED)
    assert expired.problem is not None
    assert "no worker took the job" in expired.problem["detail"]


def made_earlier(session: Session, seconds: float) -> None:
    """Have everything that has happened to jobs have happened so long ago."""
    earlier = {
        name: JOBS.c[name] - seconds for name in ("created_at", "waiting_since", "started_at")
    }
    session.connection().execute(update(JOBS).values(earlier))


def test_a_job_whose_worker_was_lost_waits_anew(sessions: Sessions) -> None:
    job = sessions.write(jobs.submit, submission())
    sessions.write(made_earlier, 55.0)
    sessions.write(claim_one, seconds=-1.0)
    sessions.write(made_earlier, 300.0)
    [back] = sessions.write(jobs.reap, max_attempts=3)
    assert back.state is S.QUEUED
    sessions.write(made_earlier, 55.0)
    assert sessions.write(jobs.expire, waiting_seconds=60.0) == []
    sessions.write(made_earlier, 10.0)
    [expired] = sessions.write(jobs.expire, waiting_seconds=60.0)
    assert (expired.id, expired.attempt) == (job.id, 1)


# Cached results


def test_the_same_scan_again_is_answered_by_the_first_result(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission(scan_key=KEY))
    first = sessions.write(run_to_the_end, sessions.write(claim_one))
    again = sessions.write(jobs.submit, submission(scan_key=KEY, owner="bob"))
    assert (again.state, again.cached, again.attempt) == (S.SUCCEEDED, True, 0)
    assert again.manifest == first.manifest
    assert again.view().links["result"] == f"/api/jobs/{again.id}/result"
    assert again.finished_at is not None


@pytest.mark.parametrize("other", [None, "b" * 64])
def test_another_scan_is_not(sessions: Sessions, other: str | None) -> None:
    sessions.write(jobs.submit, submission(scan_key=KEY))
    sessions.write(run_to_the_end, sessions.write(claim_one))
    assert sessions.write(jobs.submit, submission(scan_key=other)).state is S.QUEUED


def test_who_of_many_has_ended_is_one_question(sessions: Sessions) -> None:
    made = [sessions.write(jobs.submit, submission(owner=f"u{n}")) for n in range(5)]
    ended = [sessions.write(jobs.advance, job.id, JobState.CANCELLED) for job in made[:2]]
    asked: list[object] = []
    with sessions.reading() as session:
        event.listen(
            session.connection(), "before_cursor_execute", lambda *given: asked.append(given)
        )
        found = jobs.ended(session, [uuid4(), *(job.id for job in made)])
    assert {job.id: job for job in found} == {job.id: job for job in ended if job}
    assert len(asked) == 1


def test_a_failed_scan_answers_nobody(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission(scan_key=KEY))
    job = sessions.write(claim_one)
    sessions.write(jobs.advance, job.id, S.FAILED, attempt=1)
    assert sessions.write(jobs.submit, submission(scan_key=KEY)).state is S.QUEUED


def test_a_result_whose_bytes_are_lost_is_computed_anew(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission(scan_key=KEY))
    sessions.write(run_to_the_end, sessions.write(claim_one), manifest="manifests/lost.json")
    sessions.write(jobs.submit, submission(scan_key=KEY))
    sessions.write(jobs.withdraw_result, KEY, "manifests/lost.json")
    assert sessions.write(jobs.submit, submission(scan_key=KEY)).state is S.QUEUED
    sessions.write(run_to_the_end, sessions.write(claim_one), manifest="manifests/new.json")
    anew = sessions.write(jobs.submit, submission(scan_key=KEY))
    assert anew.manifest == "manifests/new.json"


def test_of_a_scan_that_is_asked_for_again_and_again_the_newest_result_is_found_by_itself(
    sessions: Sessions,
) -> None:
    other = "b" * 64
    for key in (KEY, other):
        sessions.write(jobs.submit, submission(scan_key=key))
        sessions.write(run_to_the_end, sessions.write(claim_one), manifest=f"manifests/{key[0]}")
    for _ in range(3):
        sessions.write(jobs.submit, submission(scan_key=KEY))
    with sessions.writing() as session:
        newest = session.scalars(
            select(JOBS.c.id).where(JOBS.c.scan_key == KEY).order_by(JOBS.c.finished_at, JOBS.c.id)
        ).all()[-1]
        session.execute(
            update(JOBS)
            .where(JOBS.c.id == newest)
            .values(manifest="manifests/newest", finished_at=JOBS.c.finished_at + 1)
        )
    asked = {KEY, other, "c" * 64}
    assert sessions.read(jobs.known_results, asked) == {
        KEY: "manifests/newest",
        other: "manifests/b",
    }
    sessions.write(jobs.withdraw_result, other, "manifests/newest")
    assert sessions.read(jobs.known_results, {KEY}) == {KEY: "manifests/newest"}, (
        "of its scan alone"
    )
    sessions.write(jobs.withdraw_result, KEY, "manifests/newest")
    assert sessions.write(jobs.known_results, asked, hold=True)[KEY] == f"manifests/{KEY[0]}"
    assert sessions.read(jobs.known_results, set()) == {}


@on_sqlite
def test_no_result_is_looked_for_among_all_of_its_scan(sessions: Sessions) -> None:
    for statement, given in (
        (statements.EXISTING_RESULT, {"key": KEY}),
        (statements.known_results("sqlite"), {"keys": [KEY]}),
        (statements.WITHDRAW_RESULT, {"key": KEY, "path": "x"}),
    ):
        with sessions.reading() as session:
            compiled = statement.compile(session.connection().engine)
            values = tuple(
                json.dumps(value) if isinstance(value, list) else value
                for value in compiled.construct_params(given).values()
            )
            plan = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}", values)
            told = " / ".join(row.detail for row in plan)
        assert "ix_jobs_results (scan_key=?" in told
        assert "TEMP B-TREE" not in told
        assert "SCAN jobs" not in told


# Bounds and lists


def test_beyond_the_bound_jobs_are_refused_until_some_have_ended(sessions: Sessions) -> None:
    first = sessions.write(jobs.submit, submission(), max_queued=2)
    sessions.write(jobs.submit, submission(), max_queued=2)
    with pytest.raises(TooMany, match="2 jobs are unfinished, the limit is 2"):
        sessions.write(jobs.submit, submission(), max_queued=2)
    sessions.write(jobs.request_cancel, first.id)
    sessions.write(jobs.submit, submission(), max_queued=2)


def test_a_held_job_still_counts(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    sessions.write(claim_one)
    with pytest.raises(TooMany):
        sessions.write(jobs.submit, submission(), max_queued=1)


def test_a_cached_answer_is_given_however_many_wait(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission(scan_key=KEY))
    sessions.write(run_to_the_end, sessions.write(claim_one))
    assert sessions.write(jobs.submit, submission(scan_key=KEY), max_queued=0).cached


def test_an_owner_sees_their_own_jobs_newest_first(sessions: Sessions) -> None:
    mine = [sessions.write(jobs.submit, submission(owner="ada")).id for _ in range(4)]
    sessions.write(jobs.submit, submission(owner="bob"))
    assert [job.id for job in sessions.read(jobs.recent, "ada", 3)] == mine[:0:-1]


def test_what_waits_is_counted_by_queue(sessions: Sessions) -> None:
    for queue in ("cpu", "cpu", QUEUE, "load"):
        sessions.write(jobs.submit, submission(queue=queue))
    sessions.write(claim_one, queue="load")
    assert sessions.read(jobs.queued_by_queue) == {"cpu": 2, QUEUE: 1}


def test_terminal_states_lead_nowhere() -> None:
    assert all(not TRANSITIONS[state] for state in TERMINAL)
    assert TERMINAL.isdisjoint(HELD)
