"""The process itself: what it loads, how soon it serves, how it ends."""

import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from api.batches import CHUNK
from neural_mri.backing import jobs
from neural_mri.backing.settings import Settings
from neural_mri.contract.batches import NDJSON
from tests.api.processes import ROOT, client_of, on_own_port, process
from tests.api.reading import follow
from tests.api.specimens import PROMPT
from tests.api.world import World

LOAD_EVERYTHING = """
import sys, api.__main__
from api.app import create_app
from neural_mri.backing.settings import Settings
create_app(Settings())
print(*sorted(sys.modules))
"""


@pytest.fixture
def own_port(world: World) -> Settings:
    return on_own_port(world.settings)


def test_it_never_loads_what_only_others_need() -> None:
    """What the worker computes with, and what the client shows results with: seconds of every start."""
    report = subprocess.run(
        [
            sys.executable,
            "-c",
            LOAD_EVERYTHING,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name.partition(".")[0] for name in report.stdout.split()}
    assert not loaded & {
        *("torch", "transformers", "transformer_lens", "accelerate", "numba", "worker"),
        *("pandas", "polars", "matplotlib", "scipy"),
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_waits_for_events_does_not_hold_up_the_end(
    own_port: Settings, number: signal.Signals
) -> None:
    with process(own_port) as running, client_of(own_port) as api, ThreadPoolExecutor() as pool:
        job = api.post("/api/scan/activation", json={"prompt": PROMPT}).json()
        waiting = pool.submit(
            api.post,
            "/api/scan/activation",
            json={"prompt": PROMPT},
            headers={"prefer": "wait=60"},
        )
        with follow(api, job["links"]["events"]) as stream:
            assert next(stream).name == "state"
            began = time.monotonic()
            running.send_signal(number)
            assert list(stream) == []
        assert waiting.result().status_code == 202
        assert running.wait(timeout=10) == 0
        assert time.monotonic() - began < 10, "not the minute that is asked for"
        assert running.stderr is not None
        said = running.stderr.read()
    assert "Traceback" not in said
    assert "graceful shutdown exceeded" not in said


def test_a_batch_whose_recording_a_death_cut_short_is_filled_when_it_is_sent_again(
    own_port: Settings, world: World, tmp_path: Path
) -> None:
    scans = [
        {"scan_mode": "fMRI", "prompt": text} for text in ("a", *["b"] * (CHUNK - 1), "c", "d")
    ]
    body = b"".join(msgspec.json.encode(scan) + b"\n" for scan in scans)
    headers = {"content-type": NDJSON, "idempotency-key": "nightly"}
    (tmp_path / "api.batch-chunk").touch()
    with (
        process(own_port, NMRI_CRASH_POINTS=str(tmp_path)),
        client_of(own_port) as api,
        pytest.raises(httpx.TransportError),
    ):
        api.post("/api/batches", content=body, headers=headers)
    assert not (tmp_path / "api.batch-chunk").exists(), "it died there"
    with process(own_port), client_of(own_port) as api:
        (half,) = api.get("/api/batches").json()
        assert (half["state"], half["lines"], half["counts"]["queued"]) == ("running", CHUNK + 2, 2)
        assert world.sessions.read(jobs.recent, "local", 10) == [], "of half a batch nothing runs"

        def send(_: int) -> httpx.Response:
            return api.post("/api/batches", content=body, headers=headers)

        with ThreadPoolExecutor(3) as several:
            answers = list(several.map(send, range(3)))
        assert {answer.status_code for answer in answers} == {202}
        assert {answer.json()["id"] for answer in answers} == {half["id"]}
        whole = api.get(half["links"]["self"]).json()
        assert (whole["counts"]["queued"], whole["repeated"]) == (4, CHUNK - 2)
        rows = api.get(half["links"]["lines"]).json()
        assert [row["line"] for row in rows] == list(range(1, CHUNK + 3))
        made = {str(job.id) for job in world.sessions.read(jobs.recent, "local", 10)}
        assert {row["job"] for row in rows} == made
        assert len(made) == 4


def test_a_setting_that_does_not_exist_is_named(own_port: Settings) -> None:
    report = subprocess.run(
        [sys.executable, "-m", "api"],
        cwd=ROOT,
        env={**os.environ, "NEURAL_MRI_PROT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.returncode == 2
    assert "NEURAL_MRI_PROT is not a setting" in report.stderr
    assert "Traceback" not in report.stderr


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="Linux shows another's limits")
def test_more_readers_are_taken_than_a_shell_allows_files(own_port: Settings) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with process(own_port) as started, client_of(own_port):
            allowed, _ = psutil.Process(started.pid).rlimit(psutil.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert allowed == min(hard, 10_240)
