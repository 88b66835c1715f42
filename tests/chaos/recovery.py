"""How soon a job runs again whose worker was killed in the midst of it.

python -m tests.chaos.recovery [--kills 50] [--restarts 20] [--whole 10] [--forgotten 10] [--database sqlite]
                               [--page FILE]

Three times: while another worker is idle; where the only one is forked anew by its parent; and where that
was killed too, so that the only one is started as its users start it (a Python that has imported nothing,
PyTorch and all). Killed is the process that holds the job. And how soon a scan is done that is asked for when every
connection to Valkey, or to PostgreSQL, has just been forgotten by what lies between.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple
from uuid import UUID, uuid4

import httpx

from bench import page
from bench.cluster.figures import Figure, at_most, percentile, plain, table
from neural_mri.backing import events, jobs
from neural_mri.backing.settings import PREFIX
from neural_mri.contract.jobs import JobState
from tests.chaos.storm import Stage, Storm, staged

__all__ = ("Restart", "claimed_after_restart", "claimed_again", "done_after_forgetting")

HELD = frozenset({JobState.CLAIMED, JobState.RUNNING})
"""What a job is when a worker has taken it: a lone scan runs at once."""

ROOT = Path(__file__).parents[2]
INTRODUCTION = """`python -m tests.chaos.recovery`: seconds from `kill -9` of the worker that runs a scan until the scan is claimed
again, on one host, a tiny model.
"""


def claimed_again(stage: Stage, kills: int, seed: int = 0) -> list[float]:
    """Seconds from each kill until another worker had claimed the job."""
    chance, found = random.Random(seed), []
    for _ in range(kills):
        stage.service.wait_until_ready(len(stage.service.names("worker")))
        job_id = _long_job(stage, chance)
        holder = _holder(stage, job_id)
        time.sleep(chance.uniform(0.05, 0.3))
        killed = time.time()
        os.kill(holder, signal.SIGKILL)
        found.append(_claimed_at(stage, job_id) - killed)
        stage.sessions.write(jobs.request_cancel, job_id)
        while stage.witness.unfinished():
            time.sleep(0.05)
    return found


def _long_job(stage: Stage, chance: random.Random) -> UUID:
    """A trace of many draws: seconds of work, even on a tiny model."""
    words = [f"w{chance.randrange(1, 60)}" for _ in range(60)]
    body = {"prompt": " ".join(words), "model": "tiny", "subject": " ".join(words[:2]), "draws": 32}
    with httpx.Client(base_url=stage.service.url, timeout=30, trust_env=False) as client:
        answer = client.post("/api/perturb/trace", json=body).raise_for_status()
    return UUID(answer.json()["id"])


def _holder(stage: Stage, job_id: UUID) -> int:
    """The process that runs a job."""
    while True:
        job = stage.sessions.read(jobs.get, job_id)
        if job is not None and job.state is JobState.RUNNING and job.lease_owner is not None:
            return job.lease_owner.pid
        if job is not None and job.finished_at is not None:
            raise RuntimeError(f"the job was over before anybody could be killed: {job.state}")
        time.sleep(0.005)


def _claimed_at(stage: Stage, job_id: UUID) -> float:
    """When a job was claimed for the second time, by the database's clock."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for move in stage.witness.moves():
            if move.job == job_id and move.is_now in HELD and move.attempt == 2:
                return move.at
        time.sleep(0.05)
    raise TimeoutError(f"{job_id} was not claimed again within 60 s")


class Restart(NamedTuple):
    """In seconds."""

    claimed: float
    """From the kill until the worker in its place had claimed the job."""
    load: float
    """Of those, spent on holding the model."""


def claimed_after_restart(
    stage: Stage, kills: int, *, whole: bool = False, seed: int = 0
) -> list[Restart]:
    """One worker on a stage that has no other, killed again and again.

    Its parent forks another; or is killed too, the `whole` of it, and started anew at once.
    """
    chance, found = random.Random(seed), []
    log = stage.service.crash_points.parent / "restarted-worker.log"
    with log.open("ab") as output:
        worker = _started(stage, output)
        try:
            for _ in range(kills):
                stage.service.wait_until_ready(1)
                job_id = _long_job(stage, chance)
                holder = _holder(stage, job_id)
                time.sleep(chance.uniform(0.05, 0.3))
                killed = time.time()
                if whole:
                    worker.kill()
                    worker.wait()
                    worker = _started(stage, output)
                else:
                    os.kill(holder, signal.SIGKILL)
                claimed = _claimed_at(stage, job_id)
                load = _load_seconds(stage, _holder(stage, job_id))
                found.append(Restart(claimed - killed, load))
                stage.sessions.write(jobs.request_cancel, job_id)
                while stage.witness.unfinished():
                    time.sleep(0.05)
        finally:
            worker.kill()
            worker.wait()
    return found


def done_after_forgetting(stage: Stage, wire: str, times: int, seed: int = 0) -> list[float]:
    """Seconds from when every connection over a wire was forgotten, and a scan asked for, until that was done."""
    chance, found = random.Random(seed), []
    with httpx.Client(base_url=stage.service.url, timeout=120, trust_env=False) as client:
        for _ in range(times):
            stage.service.wait_until_ready(len(stage.service.names("worker")))
            time.sleep(chance.uniform(1.0, 3.0))  # everybody listens again
            stage.wires[wire].misbehave("lose", 0.0)
            began = time.monotonic()
            words = " ".join(f"w{chance.randrange(1, 60)}" for _ in range(8))
            body, key = {"prompt": words, "model": "tiny"}, {"Idempotency-Key": uuid4().hex}
            while not (answer := _answer(client, body, key)):
                time.sleep(0.2)
            while not _is_over(stage, UUID(answer["id"])):
                time.sleep(0.02)
            found.append(time.monotonic() - began)
    return found


def _answer(
    client: httpx.Client, body: dict[str, str], headers: dict[str, str]
) -> dict[str, str] | None:
    """What accepts a scan; None where it has to be asked for again."""
    try:
        answer = client.post("/api/scan/activation", json=body, headers=headers)
    except httpx.TransportError:
        return None
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        return None
    made: dict[str, str] = answer.raise_for_status().json()
    return made


def _is_over(stage: Stage, job_id: UUID) -> bool:
    job = stage.sessions.read(jobs.get, job_id)
    if job is None or job.finished_at is None:
        return False
    if job.state is not JobState.SUCCEEDED:
        raise RuntimeError(f"the scan has {job.state}: {job.problem}")
    return True


def _started(stage: Stage, output: BinaryIO) -> subprocess.Popen[bytes]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return subprocess.Popen(
        [sys.executable, "-m", "worker"],
        cwd=ROOT,
        env={**own, **stage.service.settings.environment()},
        stdout=output,
        stderr=subprocess.STDOUT,
    )


def _load_seconds(stage: Stage, pid: int) -> float:
    """What a worker says that it took to load its model."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with stage.service.broker.client() as client:
            for beat in events.heartbeats(client):
                loads = [model.load_seconds for model in beat.models if model.load_seconds]
                if loads and beat.worker.startswith(f"worker-{pid}@"):
                    return sum(loads)
        time.sleep(0.2)
    raise TimeoutError(f"worker {pid} has not said what its model took to load")


def _figures(what: str, seconds: Sequence[float], bar: float) -> list[Figure]:
    return [
        plain(f"{what}, {len(seconds)} kills, median", f"{percentile(seconds, 0.5):.2f} s"),
        at_most("the same, 95th percentile", percentile(seconds, 0.95), bar, " s", digits=2),
        plain("the same, longest", f"{max(seconds):.2f} s"),
    ]


def main() -> int:
    """Print median and 95th percentile, and write them on the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.recovery", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--whole", type=int, default=10)
    parser.add_argument("--forgotten", type=int, default=10)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    asked = parser.parse_args()
    parts = {
        "Recovery beside an idle worker": (asked.kills, _beside_an_idle_one),
        "Recovery by a fork": (asked.restarts, _by_a_fork),
        "Recovery by a restart": (asked.whole, _by_a_restart),
        "Recovery from connections that are forgotten": (asked.forgotten, _over_other_wires),
    }
    for title, (count, measured) in parts.items():
        if count:
            found = table(measured(count, asked.database))
            print(found, flush=True)  # noqa: T201
            page.replace_section(asked.page, title, f"{INTRODUCTION}\n{found}")
    return 0


def _beside_an_idle_one(kills: int, database: str) -> list[Figure]:
    with staged(Storm(jobs=0, faults=0, database=database, workers=2)) as stage:
        seconds = claimed_again(stage, kills)
    return _figures("claimed again by a worker that is idle", seconds, 1.0)


def _by_a_fork(kills: int, database: str) -> list[Figure]:
    return _in_its_place("claimed again by the worker forked in its place", kills, database)


def _by_a_restart(kills: int, database: str) -> list[Figure]:
    what = "killed with its parent, claimed again by the worker started in its place"
    return _in_its_place(what, kills, database, whole=True)


def _over_other_wires(times: int, database: str) -> list[Figure]:
    with staged(Storm(jobs=0, faults=0, database=database, workers=2, lease_seconds=5.0)) as stage:
        seconds = {
            wire: done_after_forgetting(stage, wire, times)
            for wire in ("broker", "database")
            if wire in stage.wires
        }
    return [
        figure
        for wire, found in seconds.items()
        for figure in (
            plain(
                f"forgotten by the {wire}, {times} times, median", f"{percentile(found, 0.5):.1f} s"
            ),
            plain("the same, longest", f"{max(found):.1f} s"),
        )
    ]


def _in_its_place(what: str, kills: int, database: str, *, whole: bool = False) -> list[Figure]:
    with staged(Storm(jobs=0, faults=0, database=database, workers=0)) as stage:
        after = claimed_after_restart(stage, kills, whole=whole)
    without = [each.claimed - each.load for each in after]
    return [
        *_figures(f"{what}, without the model's loading", without, 3.0),
        plain("its loading, median", f"{percentile([each.load for each in after], 0.5):.2f} s"),
    ]


if __name__ == "__main__":
    sys.exit(main())
