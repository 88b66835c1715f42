"""Claims on models, and what is asked of each, as both databases tell it."""

from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from neural_mri.backing import jobs, keys, models, residences
from neural_mri.backing.database import Sessions, epoch
from neural_mri.backing.leases import LeaseOwner
from neural_mri.backing.placement import Demand, faded
from neural_mri.backing.records import Job
from neural_mri.backing.rows import JOBS, RESIDENCES
from neural_mri.contract.jobs import JobState
from tests.api.specimens import TINY
from tests.backing.making import ELSEWHERE, QUEUE, submission

OTHER = LeaseOwner("a-third-host", 7, 7)
REVISION = "0123456789abcdef" * 4


def alive(_owner: LeaseOwner) -> bool:
    return False


def dead(_owner: LeaseOwner) -> bool:
    return True


def claim(sessions: Sessions, owner: LeaseOwner, copies: int | None = 1, **how: Any) -> bool:
    return sessions.write(
        residences.claim, REVISION, owner, copies=copies, **{"dead_owners": alive, **how}
    ).is_granted


def asked(sessions: Sessions, *, demand_seconds: float = 20.0, **how: Any) -> dict[str, Demand]:
    told = sessions.read(residences.demands, demand_seconds, **how)
    return {demand.revision: demand for demand in told}


def submitted(sessions: Sessions, **changes: Any) -> Job:
    return sessions.write(jobs.submit, submission(**changes))


def test_of_two_workers_one_may_load_a_model(sessions: Sessions) -> None:
    assert claim(sessions, ELSEWHERE)
    assert not claim(sessions, OTHER)
    assert claim(sessions, ELSEWHERE), "who has it may say so again"
    assert claim(sessions, OTHER, copies=2)
    assert claim(sessions, LeaseOwner("a-fourth", 1, 1), copies=None)
    assert set(sessions.read(residences.holders, REVISION, dead_owners=alive)) >= {ELSEWHERE, OTHER}


def test_what_was_let_go_is_anybodys(sessions: Sessions) -> None:
    claim(sessions, ELSEWHERE)
    sessions.write(residences.release, REVISION, ELSEWHERE)
    assert claim(sessions, OTHER)


def test_a_dead_workers_claim_makes_way_at_once_and_a_silent_ones_in_time(
    sessions: Sessions,
) -> None:
    claim(sessions, ELSEWHERE)
    assert claim(sessions, OTHER, dead_owners=dead)
    with sessions.writing() as session:
        session.execute(update(RESIDENCES).values(until=epoch() - 1.0))
    assert claim(sessions, ELSEWHERE)


def test_workers_lost_while_loading_are_counted_until_one_succeeds(sessions: Sessions) -> None:
    def losses() -> int:
        asked_for = sessions.write(
            residences.claim, REVISION, LeaseOwner.here(), copies=1, dead_owners=alive
        )
        return asked_for.losses

    for lost in (1, 2):
        claim(sessions, ELSEWHERE, copies=None)
        with sessions.writing() as session:
            session.execute(update(RESIDENCES).values(until=epoch() - 1.0))
            owner = str(LeaseOwner.here())
            session.execute(
                update(RESIDENCES).where(RESIDENCES.c.owner == owner).values(loaded=True)
            )
        assert losses() == lost
    sessions.write(residences.settle, REVISION, LeaseOwner.here(), memory_bytes=5, load_seconds=1.5)
    assert losses() == 0


def test_a_withdrawn_claim_is_noticed_when_it_is_renewed(sessions: Sessions) -> None:
    claim(sessions, ELSEWHERE)
    assert sessions.write(residences.renew, ELSEWHERE, [REVISION]) == frozenset()
    sessions.write(residences.ask_to_let_go, REVISION)
    assert sessions.write(residences.renew, ELSEWHERE, [REVISION]) == {REVISION}


def test_a_request_counts_while_it_waits_and_fades_once_it_is_served(sessions: Sessions) -> None:
    first, _second = submitted(sessions), submitted(sessions)
    (demand,) = asked(sessions).values()
    assert (demand.revision, demand.model, demand.waiting) == (first.revision, "tiny", 2)
    assert demand.recent == 0.0
    assert 0 <= demand.oldest_seconds < 10

    (claimed,) = sessions.write(
        jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60.0
    )
    for state in (JobState.RUNNING, JobState.FAILED):
        (demand,) = asked(sessions).values()
        assert demand.waiting == 1
        assert demand.recent == pytest.approx(faded(1.25, 20.0), abs=0.1)
        sessions.write(jobs.advance, claimed.id, state, attempt=1)

    def a_while_ago(session: Session) -> None:
        session.execute(update(JOBS).values(created_at=epoch() - 30.0))

    sessions.write(a_while_ago)
    (demand,) = asked(sessions).values()
    assert demand.oldest_seconds == pytest.approx(30.0, abs=5)
    assert demand.recent == pytest.approx(faded(30.0, 20.0), abs=0.05)


def test_nothing_is_asked_by_who_follows_by_known_results_and_by_the_cpu(
    sessions: Sessions,
) -> None:
    for owner in ("ada", "bob"):
        submitted(sessions, owner=owner, scan_key="a" * 64)
    submitted(sessions, queue=keys.CPU_QUEUE)
    (demand,) = asked(sessions).values()
    assert demand.waiting == 1
    (claimed,) = sessions.write(
        jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60.0
    )
    for state in (JobState.RUNNING, JobState.STORING):
        sessions.write(jobs.advance, claimed.id, state, attempt=1)
    sessions.write(jobs.advance, claimed.id, JobState.SUCCEEDED, attempt=1, manifest="m")
    assert submitted(sessions, owner="cyd", scan_key="a" * 64).cached
    (demand,) = asked(sessions).values()
    assert demand.waiting == 0
    assert 0.8 < demand.recent < 1.0


def test_old_requests_are_not_even_looked_at(sessions: Sessions) -> None:
    submitted(sessions)
    (claimed,) = sessions.write(
        jobs.claim, queue=QUEUE, owner=ELSEWHERE, limit=1, lease_seconds=60.0
    )
    sessions.write(jobs.advance, claimed.id, JobState.FAILED, attempt=1)
    assert asked(sessions) != {}
    assert asked(sessions, demand_seconds=1e-9) == {}


def register(session: Session, name: str, revision: str, *, wanted: bool) -> None:
    models.register(
        session,
        name=name,
        source="folder:tiny",
        folder=name,
        revision=revision,
        tokenizer_digest="0" * 64,
        architecture=TINY,
        n_parameters=1000,
        weights_bytes=4000,
        wanted=wanted,
    )


def test_models_that_nobody_should_hold_can_be_left_out(sessions: Sessions) -> None:
    for name, digit, wanted in (
        ("kept", "1", True),
        ("shelved", "2", False),
        ("anchor", "3", False),
    ):
        sessions.write(register, name, digit * 64, wanted=wanted)
        submitted(sessions, model=name, revision=digit * 64, queue=keys.scan_queue(digit * 64))
    assert len(asked(sessions)) == 3
    left = asked(sessions, also_unwanted=False, pinned=["anchor"])
    assert {demand.model for demand in left.values()} == {"kept", "anchor"}
    gone = submitted(sessions, model="gone", revision="4" * 64, queue=keys.scan_queue("4" * 64))
    left = asked(sessions, also_unwanted=False, pinned=["anchor"])
    assert gone.revision in left, "who waits for what no model has is to be told so"


def test_what_a_model_takes_is_guessed_until_it_was_measured(sessions: Sessions) -> None:
    sessions.write(register, "tiny", REVISION, wanted=False)
    guessed = sessions.read(residences.costs, "float32")[REVISION]
    assert guessed.memory_bytes == pytest.approx(4400)
    assert sessions.read(residences.costs, "bfloat16")[REVISION].memory_bytes == pytest.approx(2200)
    sessions.write(
        residences.settle, REVISION, LeaseOwner.here(), memory_bytes=5000, load_seconds=3.5
    )
    assert sessions.read(residences.costs, "float32")[REVISION] == (5000, 3.5)


def test_what_a_load_without_memory_is_guessed_to_take_can_be_told_from_what_was_measured(
    sessions: Sessions,
) -> None:
    sessions.write(register, "tiny", REVISION, wanted=False)
    estimated = sessions.read(residences.costs, "float32")[REVISION]
    sessions.write(residences.guess_memory, REVISION, 9000)
    assert sessions.read(residences.costs, "float32")[REVISION].memory_bytes == 9000
    untouched = sessions.read(residences.costs, "float32", also_guessed=False)
    assert untouched[REVISION] == estimated
    assert sessions.write(residences.forget_guess, REVISION)
    assert sessions.read(residences.costs, "float32")[REVISION] == estimated
    sessions.write(
        residences.settle, REVISION, LeaseOwner.here(), memory_bytes=5000, load_seconds=3.5
    )
    assert not sessions.write(residences.forget_guess, REVISION)
    assert sessions.read(residences.costs, "float32", also_guessed=False)[REVISION] == (5000, 3.5)
