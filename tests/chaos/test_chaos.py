"""The short mix of what `make chaos` does at length, on real processes."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from neural_mri.backing import events, faults, jobs
from neural_mri.backing.events import WorkerBeat
from neural_mri.backing.jobs import Job
from neural_mri.contract.jobs import JobState
from neural_mri.contract.models import ModelState
from tests.chaos.cuts import cut_streams
from tests.chaos.recovery import claimed_again
from tests.chaos.storm import Stage, Storm, staged, weather

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prctl")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """A service on its feet. A lease holds for so long that nobody is helped by its running out."""
    with staged(Storm(jobs=0, faults=0, seed=6, lease_seconds=60.0)) as stage:
        yield stage


def asked(stage: Stage, words: str) -> UUID:
    with httpx.Client(base_url=stage.service.url, timeout=30, trust_env=False) as client:
        body = {"prompt": words, "model": "tiny"}
        return UUID(client.post("/api/scan/activation", json=body).raise_for_status().json()["id"])


def ended(stage: Stage, job_id: UUID, seconds: float = 60) -> Job:
    """The job, once it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job = stage.sessions.read(jobs.get, job_id)
        assert job is not None
        if job.finished_at is not None:
            return job
        time.sleep(0.02)
    raise TimeoutError(f"{job_id} has not ended: {job}")


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def until_passed(point: Path) -> None:
    """Wait until somebody has come to a crash point."""
    until(lambda: not point.exists())


def states(beat: WorkerBeat) -> set[ModelState]:
    """In what states the models of a worker are."""
    return {model.state for model in beat.models}


def working(stage: Stage) -> set[int]:
    """The processes that work."""
    return {stage.service.working_pid(name) for name in stage.service.names("worker")}


def test_whatever_is_killed_every_accepted_job_ends_once() -> None:
    report = weather(Storm(jobs=60, faults=12, seed=5))
    assert report.wrong == [], str(report)
    assert report.accepted == 60
    assert sum(report.done.values()) == 12
    # A scan whose memory is made to run out may fail of that, and the report says where another did.
    may = {JobState.SUCCEEDED, JobState.CANCELLED, JobState.QUARANTINED, JobState.FAILED}
    assert set(report.verdict.states) <= may, str(report)


def test_cut_streams_go_on_where_they_stopped_and_killed_workers_jobs_elsewhere(
    stage: Stage,
) -> None:
    cuts = cut_streams(stage, readers=4, cuts=40, seed=6, restarts=1)
    assert cuts.wrong == [], str(cuts)
    assert cuts.cuts >= 30
    [seconds] = claimed_again(stage, kills=1)
    # The reaper saw that the worker was dead: it did not wait for the lease to run out.
    assert seconds < 20.0


def test_a_scan_whose_worker_dies_of_a_segmentation_fault_is_done_by_another(stage: Stage) -> None:
    stage.service.arm("worker.computing", "segmentation fault")
    done = ended(stage, asked(stage, "w1 w2 w3 w4 w5 w6 w7"))
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 2)
    # Its parent says so in its own time: a dump of its memory may have to be written first.
    until(lambda: '"signal": "SIGSEGV"' in "".join(stage.service.logs().values()))


def test_a_scan_that_every_device_fails_of_is_set_aside_and_costs_no_other(stage: Stage) -> None:
    """Each worker that has lost its device ends: the next scan on it would have failed too."""
    point = stage.service.arm("worker.computing", "lost device", faults.AGAIN)
    try:
        aside = ended(stage, asked(stage, "w2 w3 w4 w5 w6 w7 w8"))
    finally:
        point.unlink()
    assert (aside.state, aside.attempt) == (JobState.QUARANTINED, 3)
    assert aside.problem is not None
    assert "3 workers were lost while they held this job" in aside.problem["detail"]
    said = "".join(stage.service.logs().values())
    assert said.count("device_lost") >= 3
    after = ended(stage, asked(stage, "w3 w4 w5 w6 w7 w8 w9"))
    assert (after.state, after.attempt) == (JobState.SUCCEEDED, 1)


def test_a_scan_that_takes_all_memory_takes_no_worker_along(stage: Stage) -> None:
    stage.service.wait_until_ready(2)
    before = working(stage)
    stage.service.arm("worker.computing", "exhausted memory")
    done = ended(stage, asked(stage, "w4 w5 w6 w7 w8 w9 w10"))
    assert done.attempt == 1
    if (
        done.state is not JobState.SUCCEEDED
    ):  # a scan in batches would have been tried in smaller ones
        assert done.problem is not None
        assert done.problem["type"].endswith("out-of-memory")
    assert working(stage) == before


def test_while_a_model_takes_long_to_load_its_jobs_wait_and_it_is_said(stage: Stage) -> None:
    for name in stage.service.names("worker"):
        point = stage.service.arm("worker.loading", "slowness")
        stage.service.kill_working(name)
        until_passed(point)
    job_id = asked(stage, "w1 w3 w5 w7 w9 w11")
    with stage.service.broker.client() as client:
        until(lambda: any(ModelState.LOADING in states(beat) for beat in events.heartbeats(client)))
    waiting = stage.sessions.read(jobs.get, job_id)
    assert waiting is not None
    assert waiting.state is JobState.QUEUED
    done = ended(stage, job_id)
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)


def test_workers_that_hear_nothing_any_more_make_way_for_others(stage: Stage) -> None:
    """They live, and their heartbeats are heard."""
    stage.service.wait_until_ready(2)
    before = working(stage)
    for number, _ in enumerate(before):
        point = stage.service.arm("worker.ticket", "deafness")
        ended(stage, asked(stage, f"w5 w6 w7 w8 w9 w{10 + number}"))
        assert not point.exists()
    assert ended(stage, asked(stage, "w6 w7 w8 w9 w10 w11")).attempt == 1
    assert '"event": "deaf"' in "".join(stage.service.logs().values())
    assert working(stage) != before
