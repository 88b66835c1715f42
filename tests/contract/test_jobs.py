"""The states of a job."""

from datetime import UTC, datetime
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.contract.jobs import (
    HELD,
    TERMINAL,
    TRANSITIONS,
    JobKind,
    JobState,
    JobView,
    Lane,
)

MOMENTS = st.datetimes(timezones=st.just(UTC))


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(JobState)


def test_a_terminal_state_is_never_left() -> None:
    assert {"succeeded", "failed", "cancelled", "expired", "quarantined"} == TERMINAL
    assert all(not TRANSITIONS[state] for state in TERMINAL)


@given(st.lists(st.sampled_from(JobState), max_size=20))
def test_a_walk_along_the_table_ends_for_good(wishes: list[JobState]) -> None:
    state, ended = JobState.QUEUED, False
    for wish in wishes:
        if wish in TRANSITIONS[state]:
            assert not ended
            state = wish
            ended = state in TERMINAL


@pytest.mark.parametrize("held", sorted(HELD))
def test_a_held_job_can_be_lost_failed_and_cancelled(held: JobState) -> None:
    assert TRANSITIONS[held] >= {
        JobState.QUEUED,
        JobState.FAILED,
        JobState.CANCELLED,
        JobState.EXPIRED,
        JobState.QUARANTINED,
    }


def test_success_comes_only_to_what_has_run() -> None:
    before = {state for state, following in TRANSITIONS.items() if JobState.SUCCEEDED in following}
    assert before == {JobState.RUNNING, JobState.STORING}


@given(
    st.uuids(),
    st.sampled_from(JobKind),
    st.sampled_from(JobState),
    st.sampled_from(Lane),
    MOMENTS,
    st.none() | MOMENTS,
)
def test_a_job_reads_back_as_it_was_written(
    job_id: UUID,
    kind: JobKind,
    state: JobState,
    lane: Lane,
    created: datetime,
    finished: datetime | None,
) -> None:
    view = JobView(
        id=job_id,
        kind=kind,
        state=state,
        model="tiny",
        revision="a" * 64,
        lane=lane,
        request={"prompt": "a"},
        created_at=created,
        finished_at=finished,
        links={"self": f"/api/jobs/{job_id}"},
    )
    assert msgspec.json.decode(msgspec.json.encode(view), type=JobView) == view
