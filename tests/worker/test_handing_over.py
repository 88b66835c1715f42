"""A worker whose job's owner loses interest while others wait for the same scan."""

import time

import pytest

from neural_mri.backing import jobs, stored
from neural_mri.contract.events import ActivationFrame, Ended
from neural_mri.contract.jobs import JobState
from neural_mri.contract.scans import ActivationScan
from tests.worker.bench import Bench, Interrupting

PROMPT = ActivationScan(prompt="anything", model="tiny")


@pytest.mark.parametrize("pause", [0, 1], ids=["at once", "after a renewal"])
def test_a_scan_under_way_goes_on_for_who_still_wants_it(holding_tiny: Bench, pause: int) -> None:
    bench = holding_tiny
    first = bench.submit(PROMPT)
    second, third = (bench.submit(PROMPT, owner=who) for who in ("bob", "cyd"))

    def cancel() -> None:
        bench.sessions.write(jobs.request_cancel, first.id)
        if pause:
            # Long enough for the keeper to renew what it holds, under the id it knows.
            time.sleep(bench.settings.lease_seconds / 3 + 0.3)

    assert bench.attempts(Interrupting(bench.store, cancel)).take(bench.queue) == 1
    assert bench.now(first).state is JobState.CANCELLED
    ended = [bench.now(second), bench.now(third)]
    assert [(job.state, job.attempt) for job in ended] == [
        (JobState.SUCCEEDED, 1),
        (JobState.SUCCEEDED, 0),
    ]
    assert ended[0].manifest == ended[1].manifest
    manifest = stored.load_manifest(bench.store, ended[0].manifest or "")
    assert manifest.scan_key == first.scan_key
    # The worker tells of it where it began to: that is where all who follow listen.
    story = bench.told(first.id)
    assert sum(isinstance(event, ActivationFrame) for event in story) == 6
    assert isinstance(story[-1], Ended)
    assert story[-1].state is JobState.SUCCEEDED
    assert bench.attempts().take(bench.queue) == 0


def test_a_scan_that_nobody_wants_any_more_stops(holding_tiny: Bench) -> None:
    bench = holding_tiny
    first = bench.submit(PROMPT)
    second = bench.submit(PROMPT, owner="bob")

    def cancel() -> None:
        for job in (first, second):
            bench.sessions.write(jobs.request_cancel, job.id)
        time.sleep(bench.settings.lease_seconds / 3 + 0.5)

    bench.attempts(Interrupting(bench.store, cancel)).take(bench.queue)
    assert [bench.now(job).state for job in (first, second)] == [JobState.CANCELLED] * 2
