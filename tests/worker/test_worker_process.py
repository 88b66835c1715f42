"""The worker as a process of its own: it brings the model that a scan waits for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from neural_mri.backing import keys
from neural_mri.backing.queue import send_tickets
from neural_mri.contract.jobs import JobState
from neural_mri.contract.scans import ActivationScan
from tests.worker.bench import Bench

ROOT = Path(__file__).parents[2]


def test_a_worker_that_holds_nothing_loads_what_is_asked_for(bench: Bench, tmp_path: Path) -> None:
    environment = {**os.environ, **bench.settings.environment()}
    log = tmp_path / "worker.log"
    with log.open("wb") as file:
        worker = subprocess.Popen(
            [sys.executable, "-m", "worker"],
            env=environment,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        job = bench.submit(ActivationScan(prompt="anything", model="tiny"))
        send_tickets(bench.redis, job.queue)
        deadline = time.monotonic() + 240
        while bench.now(job).state is not JobState.SUCCEEDED:
            assert worker.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert "model_placed" in log.read_text()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    finally:
        worker.kill()
        worker.wait()
    assert bench.redis.llen(keys.scan_queue(bench.tiny.revision)) == 0
