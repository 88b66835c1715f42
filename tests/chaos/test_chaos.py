"""The short mix of what `make chaos` does at length, on real processes."""

import sys

import pytest

from neural_mri.contract.jobs import JobState
from tests.chaos.cuts import cut_streams
from tests.chaos.recovery import claimed_again
from tests.chaos.storm import Storm, staged, weather

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prctl")


def test_whatever_is_killed_every_accepted_job_ends_once() -> None:
    report = weather(Storm(jobs=60, faults=12, seed=5))
    assert report.wrong == [], str(report)
    assert report.accepted == 60
    assert sum(report.done.values()) == 12
    states = set(report.verdict.states)
    assert states <= {JobState.SUCCEEDED, JobState.CANCELLED, JobState.QUARANTINED}, str(report)


def test_cut_streams_go_on_where_they_stopped_and_killed_workers_jobs_elsewhere() -> None:
    with staged(Storm(jobs=0, faults=0, seed=6, lease_seconds=60.0)) as stage:
        cuts = cut_streams(stage, readers=4, cuts=40, seed=6, restarts=1)
        assert cuts.wrong == [], str(cuts)
        assert cuts.cuts >= 30
        [seconds] = claimed_again(stage, kills=1)
    # The reaper saw that the worker was dead: it did not wait for the lease to run out.
    assert seconds < 20.0
