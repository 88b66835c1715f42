"""How soon a job runs again whose worker was killed in the midst of it, while another is idle.

python -m tests.chaos.recovery [--kills 50] [--database sqlite]
"""

import argparse
import random
import signal
import statistics
import sys
import time
from uuid import UUID

import httpx

from neural_mri.backing import jobs
from neural_mri.contract.jobs import JobState
from tests.chaos.storm import Stage, Storm, staged

__all__ = ("claimed_again",)


def claimed_again(stage: Stage, kills: int, seed: int = 0) -> list[float]:
    """Seconds from each kill until another worker had claimed the job."""
    chance, found = random.Random(seed), []
    for _ in range(kills):
        stage.service.wait_until_ready(len(stage.service.names("worker")))
        job_id = _long_job(stage, chance)
        holder = _holder(stage, job_id)
        time.sleep(chance.uniform(0.05, 0.3))
        name = next(
            name for name in stage.service.names("worker") if stage.service.pid(name) == holder
        )
        killed = time.time()
        stage.service.signal(name, signal.SIGKILL)
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
            if move.job == job_id and move.is_now is JobState.CLAIMED and move.attempt == 2:
                return move.at
        time.sleep(0.05)
    raise TimeoutError(f"{job_id} was not claimed again within 60 s")


def main() -> int:
    """Print median and 95th percentile."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.recovery", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    asked = parser.parse_args()
    with staged(Storm(jobs=0, faults=0, database=asked.database, workers=2)) as stage:
        seconds = sorted(claimed_again(stage, asked.kills))
    p95 = seconds[int(0.95 * (len(seconds) - 1))]
    print(  # noqa: T201
        f"{len(seconds)} kills of a busy worker, {asked.database}: claimed again after "
        f"{statistics.median(seconds):.2f} s, p95 {p95:.2f} s, at most {seconds[-1]:.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
