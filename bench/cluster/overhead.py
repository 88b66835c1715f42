"""What the queue costs a job: from the request to its recorded end, the scanner's own time taken off.

A model of three layers, so that there is little else. Where the time goes is read from the job's row, and when its end
was committed from what its worker logged next: the row says when it was written, which is before.
"""

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec

from bench.cluster.caller import Caller
from bench.cluster.figures import Figure, at_most, percentile, plain
from bench.cluster.service import Cluster
from neural_mri.backing import storage
from neural_mri.backing.stored import load_manifest

__all__ = ("INTRODUCTION", "TITLE", "figures")

TITLE = "The price of a job"
INTRODUCTION = """`python -m bench.cluster --only overhead`: what the queue adds to a scan, from the request to its recorded end: a
whole service (API, worker, reaper, Valkey, SQLite), a model of three layers, scans one after another. Wall time
but for the last row: it grows with whatever else runs, and with the disk under `TMPDIR`, to which each result is
flushed before it counts.
"""
BAR_MILLISECONDS = 5.0
WARM_UP = 30


class Timing(NamedTuple):
    """One job, in milliseconds."""

    recorded: float
    """From the request to the row."""
    waited: float
    """Until a worker held it."""
    held: float
    """Until its end was committed and logged, the scanner's time taken off."""
    answered: float
    """From the request to the answer that waited for the end, the scanner's time taken off."""

    @property
    def overhead(self) -> float:
        """From the request to the end's standing in the database."""
        return self.recorded + self.waited + self.held


async def _timings(cluster: Cluster, n_jobs: int) -> list[Timing]:
    store = storage.open_store(cluster.settings)
    answers = []
    async with Caller(cluster.settings, cluster.keys["user-00"]) as caller:
        for number in range(WARM_UP + n_jobs):
            words = " ".join(f"w{(number // 40**place) % 40}" for place in range(8))
            began, wall = time.perf_counter(), time.time()
            answer = await caller.post("/api/scan/activation", {"prompt": words}, wait=20)
            answered = time.perf_counter() - began
            answers.append(_Asked(answer.json()["id"], wall, answered))
    ended, timings = _ends(cluster), []
    for asked in answers[WARM_UP:]:
        job = cluster.job(asked.job_id)
        if job.manifest is None or job.started_at is None:
            raise RuntimeError(f"job {job.id} is {job.state}")
        own = load_manifest(store, job.manifest).compute_seconds
        created, started = job.created_at.timestamp(), job.started_at.timestamp()
        timings.append(
            Timing(
                1e3 * (created - asked.at),
                1e3 * (started - created),
                1e3 * (ended[asked.job_id] - started - own),
                1e3 * (asked.seconds - own),
            )
        )
    return timings


class _Asked(NamedTuple):
    job_id: str
    at: float
    """In seconds since 1970."""
    seconds: float
    """Until it was answered."""


def _ends(cluster: Cluster) -> dict[str, float]:
    """When the worker was done with each job, in seconds since 1970, by the job's id."""
    ends = {}
    for line in cluster.service.log("worker").splitlines():
        if '"attempt_ended"' in line:
            said = msgspec.json.decode(line)
            ends[said["job_id"]] = datetime.fromisoformat(said["timestamp"]).timestamp()
    return ends


def figures(cluster: Cluster, *, n_jobs: int = 400) -> list[Figure]:
    """Jobs one after another."""
    before = cluster.spent()
    timings = asyncio.run(_timings(cluster, n_jobs))
    spent = cluster.spent().since(before)

    def median(values: Sequence[float]) -> float:
        return percentile(values, 0.5)

    parts = (
        f"{median([t.recorded for t in timings]):.1f} until its row stands, "
        f"{median([t.waited for t in timings]):.1f} until a worker holds it, "
        f"{median([t.held for t in timings]):.1f} until its end stands"
    )
    overhead = [timing.overhead for timing in timings]
    return [
        at_most(
            "a job's way through the queue, nothing to compute, median",
            median(overhead),
            BAR_MILLISECONDS,
            " ms",
        ),
        plain("the same, 95th percentile", f"{percentile(overhead, 0.95):.1f} ms"),
        plain("of which, milliseconds", parts),
        plain(
            "until the answer that waited for the end, median",
            f"{median([timing.answered for timing in timings]):.1f} ms",
        ),
        plain("processor milliseconds a job, the scanner's own included", spent.each(n_jobs)),
    ]
