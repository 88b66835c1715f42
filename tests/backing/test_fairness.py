from collections import Counter
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from neural_mri.backing import jobs
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import Job
from neural_mri.backing.records import LANE_WEIGHTS
from neural_mri.contract.jobs import JobKind, JobState, Lane
from tests.backing.making import ELSEWHERE, QUEUE, submission, tokens

ATTENTION = b'{"scan_mode":"attention","prompt":"Hello","layers":[0]}'


def claim(session: Session, limit: int = 1, queue: str = QUEUE) -> list[Job]:
    return jobs.claim(session, queue=queue, owner=ELSEWHERE, limit=limit, lease_seconds=60.0)


def flood(session: Session, owner: str, count: int, *, lane: Lane = Lane.INTERACTIVE) -> list[Job]:
    return [jobs.submit(session, submission(owner=owner, lane=lane)) for _ in range(count)]


def owners_served(session: Session, count: int) -> list[str]:
    return [job.owner for _ in range(count) for job in claim(session)]


def test_who_submits_one_job_behind_a_thousand_is_next_but_one(sessions: Sessions) -> None:
    sessions.write(flood, "ada", 1000)
    sessions.write(flood, "bob", 1)
    assert sessions.write(owners_served, 3) == ["ada", "bob", "ada"]


def test_who_comes_while_the_queue_is_under_way_is_next(sessions: Sessions) -> None:
    sessions.write(flood, "ada", 100)
    sessions.write(owners_served, 40)
    sessions.write(flood, "bob", 1)
    assert sessions.write(owners_served, 2) == ["bob", "ada"]


def test_who_was_away_gets_no_credit_for_it(sessions: Sessions) -> None:
    sessions.write(flood, "ada", 200)
    sessions.write(owners_served, 100)
    sessions.write(flood, "bob", 100)
    served = sessions.write(owners_served, 100)
    assert served.count("bob") == pytest.approx(50, abs=1)


def test_one_owners_jobs_run_in_the_order_they_came(sessions: Sessions) -> None:
    sent = sessions.write(flood, "ada", 20)
    ran = [job.id for _ in range(20) for job in sessions.write(claim)]
    assert ran == [job.id for job in sent]


def test_ones_own_batch_does_not_keep_one_waiting(sessions: Sessions) -> None:
    sessions.write(flood, "ada", 500, lane=Lane.BATCH)
    sessions.write(flood, "bob", 500)
    sessions.write(owners_served, 100)
    [asked] = sessions.write(flood, "ada", 1)
    [first] = sessions.write(claim)
    assert first.id == asked.id


def test_lanes_share_a_queue_by_their_weights(sessions: Sessions) -> None:
    for lane in Lane:
        sessions.write(flood, lane.value, 240, lane=lane)
    served = sessions.write(owners_served, 220)
    for lane in Lane:
        assert served.count(lane.value) == pytest.approx(20 * LANE_WEIGHTS[lane], abs=2)


def test_long_prompts_take_their_owners_share_sooner(sessions: Sessions) -> None:
    for _ in range(100):
        sessions.write(jobs.submit, submission(owner="long", tokens=tokens(40)))
        sessions.write(jobs.submit, submission(owner="short", tokens=tokens(10)))
    served = sessions.write(owners_served, 50)
    assert served.count("short") == pytest.approx(40, abs=1)


def test_cancelled_jobs_cost_their_owner_no_turn(sessions: Sessions) -> None:
    regretted = sessions.write(flood, "ada", 50)
    for job in regretted:
        sessions.write(jobs.request_cancel, job.id)
    sessions.write(flood, "bob", 10)
    sessions.write(flood, "ada", 1)
    assert "ada" in sessions.write(owners_served, 2)


def test_submitting_and_cancelling_buys_nobody_a_better_place(sessions: Sessions) -> None:
    sessions.write(flood, "bob", 20)
    served = []
    for _ in range(20):
        sessions.write(flood, "ada", 1)
        [bait] = sessions.write(flood, "ada", 1)
        sessions.write(jobs.request_cancel, bait.id)
        served += sessions.write(owners_served, 1)
    assert served.count("bob") >= 9


def test_who_comes_again_as_soon_as_served_gets_no_more_than_a_share(sessions: Sessions) -> None:
    sessions.write(flood, "bob", 40)
    sessions.write(flood, "ada", 1)
    served = []
    for _ in range(40):
        [job] = sessions.write(claim)
        served.append(job.owner)
        sessions.write(jobs.advance, job.id, JobState.FAILED, attempt=1)
        if job.owner == "ada":
            sessions.write(flood, "ada", 1)
    assert served.count("ada") == pytest.approx(20, abs=1)


def test_a_job_that_lost_its_worker_keeps_its_place(sessions: Sessions) -> None:
    first = sessions.write(flood, "ada", 5)[0]
    sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=-1.0)
    sessions.write(claim)
    sessions.write(jobs.reap, max_attempts=3)
    assert sessions.write(claim)[0].id == first.id


def test_queues_do_not_wait_for_each_other(sessions: Sessions) -> None:
    sessions.write(flood, "ada", 10)
    job = sessions.write(jobs.submit, submission(queue="cpu"))
    assert [each.id for each in sessions.write(claim, queue="cpu")] == [job.id]
    assert sessions.write(claim, queue="nobody") == []


# Batches


def test_mates_have_the_heads_exact_length_and_come_in_fair_order(sessions: Sessions) -> None:
    lengths = (8, 9, 8, 8, 9, 8)
    sent = [sessions.write(jobs.submit, submission(tokens=tokens(length))) for length in lengths]
    batch = sessions.write(claim, limit=3)
    assert [job.id for job in batch] == [sent[0].id, sent[2].id, sent[3].id]
    assert {job.n_tokens for job in batch} == {8}
    assert [job.id for job in sessions.write(claim, limit=3)] == [sent[1].id, sent[4].id]


def test_who_has_lost_a_worker_comes_alone(sessions: Sessions) -> None:
    """It may be what ends them: its mates are claimed with it once, and not again."""
    sent = sessions.write(flood, "ada", 3)
    sessions.write(jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=2, lease_seconds=-1.0)
    sessions.write(jobs.reap, max_attempts=3)
    sent += sessions.write(flood, "ada", 1)
    claimed = [sessions.write(claim, limit=8) for _ in range(3)]
    assert [[job.id for job in together] for together in claimed] == [
        [sent[0].id],
        [sent[1].id],
        [sent[2].id, sent[3].id],
    ]


def test_who_looks_on_waits_for_nobodys_rows(sessions: Sessions) -> None:
    sessions.write(flood, "ada", 8, lane=Lane.BATCH)
    sent = [sessions.write(flood, "bob", 1), sessions.write(flood, "cyd", 1)]
    sessions.write(claim)
    assert [job.id for job in sessions.write(claim, limit=8)] == [job.id for [job] in sent]
    assert {job.lane for job in sessions.write(claim, limit=8)} == {Lane.BATCH}


def test_who_looks_on_comes_along_where_the_head_is_in_no_hurry(sessions: Sessions) -> None:
    sessions.write(flood, "ada", 1, lane=Lane.BATCH)
    sessions.write(flood, "bob", 2)
    lanes = [job.lane for job in sessions.write(claim, limit=8)]
    assert lanes == [Lane.BATCH, Lane.INTERACTIVE, Lane.INTERACTIVE]


def test_other_passes_and_other_weights_are_no_mates(sessions: Sessions) -> None:
    sessions.write(jobs.submit, submission())
    sessions.write(jobs.submit, submission(request=ATTENTION))
    sessions.write(jobs.submit, submission(revision="f" * 64))
    assert [len(sessions.write(claim, limit=8)) for _ in range(4)] == [1, 1, 1, 0]


def test_what_reads_no_prompt_runs_alone(sessions: Sessions) -> None:
    for kind in (JobKind.LOAD, JobKind.LOAD, JobKind.SCAN, JobKind.SCAN):
        sessions.write(jobs.submit, submission(kind=kind, tokens=None))
    assert [len(sessions.write(claim, limit=8)) for _ in range(4)] == [1, 1, 1, 1]


def test_mates_taken_from_far_back_do_not_move_the_queues_clock(sessions: Sessions) -> None:
    for index in range(40):
        sessions.write(jobs.submit, submission(owner="ada", tokens=tokens(8 + index % 2)))
    sessions.write(claim, limit=8)
    sessions.write(flood, "bob", 1)
    assert sessions.write(claim)[0].owner == "bob"


@given(
    arrivals=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(list(Lane)), st.integers(1, 30)),
        min_size=5,
        max_size=40,
    )
)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_while_two_wait_neither_gets_ahead_by_more_than_a_job(
    sessions: Sessions, arrivals: list[tuple[str, Lane, int]]
) -> None:
    """Start-time fair queueing's bound (Goyal, Vin and Cheng 1997, theorem 1).

    Each owner's jobs of a lane are a flow. Over any time in which two have jobs waiting, what they get, in
    cost over weight, differs by no more than the largest job of each.
    """
    queue = f"scan.{uuid4().hex}"
    sent = [
        sessions.write(
            jobs.submit, submission(queue=queue, owner=who, lane=lane, tokens=tokens(cost))
        )
        for who, lane, cost in arrivals
    ]
    share = {job.id: job.estimated_cost / LANE_WEIGHTS[job.lane] for job in sent}
    largest = dict[tuple[str, Lane], float]()
    for job in sent:
        largest[flow(job)] = max(share[job.id], largest.get(flow(job), 0.0))
    waiting = Counter(map(flow, sent))
    got = dict.fromkeys(waiting, 0.0)
    for _ in sent:
        [job] = sessions.write(claim, queue=queue)
        got[flow(job)] += share[job.id]
        waiting[flow(job)] -= 1
        busy = [each for each, count in waiting.items() if count]
        for one in busy:
            for other in busy:
                assert got[one] - got[other] <= largest[one] + largest[other] + 1e-9


def flow(job: Job) -> tuple[str, Lane]:
    return job.owner, job.lane
