"""The service under load and under fire, with its default model.

Every test leaves the service ready. What a moment costs depends on the machine, so limits are stated
beside what the machine itself needs: the model's load, the scan.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from neural_mri.backing import broker, events, keys
from tests.system.service import Service, is_gone, until

pytestmark = pytest.mark.smollm2

LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 150
"""About 1500 tokens: seconds of work, so that there is a middle to be killed in."""


def test_a_scan_asked_for_over_http_knows_where_the_eiffel_tower_is(service: Service) -> None:
    job = service.scan("The Eiffel Tower is located in the city of", wait=60)
    assert job["state"] == "succeeded", job
    likeliest = job["result"]["predictions"]
    assert "Paris" in str(likeliest), likeliest


def test_frames_are_told_of_a_scan_that_may_be_watched_and_not_to_who_waits_for_the_answer(
    service: Service,
) -> None:
    watched = service.scan(f"Watched at {time.time()}")
    assert service.wait_for(watched["id"], "succeeded")
    waited = service.scan(f"Waited for at {time.time()}", wait=60)
    assert waited["state"] == "succeeded", waited
    frames = {"activation_frame", "layer_frame"}
    with broker.connect(service.settings) as redis:
        assert until(lambda: "ended" in told(redis, watched["id"]), 5)
        assert until(lambda: "ended" in told(redis, waited["id"]), 5)
        assert frames <= told(redis, watched["id"])
        assert not frames & told(redis, waited["id"])


def told(redis: broker.SyncRedis, job_id: str) -> set[str]:
    """Names of the events in a job's stream."""
    rows: Any = redis.xrange(keys.event_stream(UUID(job_id)))
    return {entry.name for entry in events.parse_entries(rows)}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_one_worker_loads_torch_and_nobody_else(service: Service) -> None:
    processes = [service.launcher, *map(service.child, ("api", "worker.reaper", "worker"))]
    with_torch = [
        "libtorch" in Path(f"/proc/{process.pid}/maps").read_text() for process in processes
    ]
    assert with_torch == [False, False, False, True]


def test_a_killed_worker_costs_its_job_one_attempt_and_nothing_else(service: Service) -> None:
    job = service.scan(f"{time.time()} {LONG_PROMPT}")
    service.wait_for(job["id"], "running")
    killed = service.child("worker")
    killed.kill()
    assert until(lambda: service.job(job["id"])["state"] == "queued", 5)
    assert until(lambda: service.resident_pid() not in (None, killed.pid), 90), service.says()
    resident_at = time.monotonic()
    service.wait_for(job["id"], "running", "storing", "succeeded", seconds=5)
    assert time.monotonic() - resident_at < 5
    done = service.wait_for(job["id"], "succeeded", "failed", "quarantined", seconds=60)
    assert (done["state"], done["attempt"]) == ("succeeded", 2), done


def test_a_broker_that_forgets_everything_loses_no_job(service: Service) -> None:
    accepted = [service.scan(f"Question {number} of {time.time()}") for number in range(20)]
    with broker.connect(service.settings) as redis:
        redis.flushall()
    waiting = [job for job in accepted if service.job(job["id"])["state"] == "queued"]
    assert waiting, "every scan had run before anything was forgotten"
    for job in accepted:
        done = service.wait_for(job["id"], "succeeded", "failed", seconds=90)
        assert (done["state"], done["attempt"]) == ("succeeded", 1)


def test_a_killed_broker_comes_back_and_scans_go_on(service: Service) -> None:
    service.child("valkey-server").kill()
    job = service.scan(f"During the outage {time.time()}")
    assert service.wait_for(job["id"], "succeeded", "failed")["state"] == "succeeded"
    again = service.scan(f"After the outage {time.time()}", wait=60)
    assert again["state"] == "succeeded"


def test_a_worker_that_hears_nothing_any_more_is_replaced(service: Service) -> None:
    frozen = service.child("worker")
    os.kill(frozen.pid, signal.SIGSTOP)
    job = service.scan(f"Is anybody there? {time.time()}")
    assert until(lambda: is_gone(frozen), 30), service.says()
    assert service.wait_for(job["id"], "succeeded", "failed", seconds=90)["state"] == "succeeded"
    assert "has said nothing for too long" in service.says()


def test_a_running_scan_stops_when_it_is_asked_to(service: Service) -> None:
    job = service.scan(f"{time.time()} {LONG_PROMPT}")
    service.wait_for(job["id"], "running")
    asked_at = time.monotonic()
    service.http.delete(f"/api/jobs/{job['id']}")
    assert service.wait_for(job["id"], "cancelled", "succeeded")["state"] == "cancelled"
    assert time.monotonic() - asked_at < 5
    assert service.scan(f"Next, please {time.time()}", wait=60)["state"] == "succeeded"


def test_a_short_scan_is_done_before_the_long_one_that_it_finds_under_way(service: Service) -> None:
    long = service.trace(
        f"{time.time()} The Eiffel Tower is located in the city of", "Eiffel Tower"
    )
    service.wait_for(long["id"], "running")
    short = service.scan(f"Where is it? {time.time()}", wait=60)
    assert short["state"] == "succeeded"
    assert service.job(long["id"])["state"] == "running", "one worker, and it has not let go of it"
    service.http.delete(f"/api/jobs/{long['id']}")
    assert service.wait_for(long["id"], "cancelled", "succeeded")["state"] == "cancelled"
