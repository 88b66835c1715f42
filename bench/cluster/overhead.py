"""What the queue costs a job: from the request to its recorded end, the scanner's own time taken off.

A model of three layers, so that there is little else. Where the time goes is read from the job's row, and when its end
could be read from SQLite, which is asked all the while: the row says when it was written, which is before its commit.
"""

import asyncio
import sqlite3
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import make_url

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
LOOK_SECONDS = 5e-5
"""How long nobody looks at the database."""
WARM_UP = 30


class Timing(NamedTuple):
    """One job, in milliseconds."""

    recorded: float
    """From the request to the row."""
    waited: float
    """Until a worker held it."""
    held: float
    """Until its end could be read, the scanner's time taken off."""
    answered: float
    """From the request to the answer that waited for the end, the scanner's time taken off."""

    @property
    def overhead(self) -> float:
        """From the request to the end's standing in the database."""
        return self.recorded + self.waited + self.held


class _Asked(NamedTuple):
    job_id: str
    at: float
    """In seconds since 1970."""
    seconds: float
    """Until it was answered."""


async def _asked(cluster: Cluster, n_jobs: int) -> list[_Asked]:
    asked = []
    async with Caller(cluster.settings, cluster.keys["user-00"]) as caller:
        for number in range(WARM_UP + n_jobs):
            words = " ".join(f"w{(number // 40**place) % 40}" for place in range(8))
            began, wall = time.perf_counter(), time.time()
            answer = await caller.post("/api/scan/activation", {"prompt": words}, wait=20)
            answered = time.perf_counter() - began
            asked.append(_Asked(answer.json()["id"], wall, answered))
    return asked[WARM_UP:]


def _timings(cluster: Cluster, n_jobs: int) -> list[Timing]:
    store, timings = storage.open_store(cluster.settings), []
    with _commits(cluster) as commits:
        answered = asyncio.run(_asked(cluster, n_jobs))
    for asked in answered:
        job = cluster.job(asked.job_id)
        if job.manifest is None or job.started_at is None:
            raise RuntimeError(f"job {job.id} is {job.state}")
        own = load_manifest(store, job.manifest).compute_seconds
        # Nothing else is written between a job's end and the answer.
        ended = commits[bisect_left(commits, asked.at + asked.seconds) - 1]
        created, started = job.created_at.timestamp(), job.started_at.timestamp()
        timings.append(
            Timing(
                1e3 * (created - asked.at),
                1e3 * (started - created),
                1e3 * (ended - started - own),
                1e3 * (asked.seconds - own),
            )
        )
    return timings


@contextmanager
def _commits(cluster: Cluster) -> Iterator[list[float]]:
    """When somebody committed to the database, in seconds since 1970, as the block goes on."""
    path = Path(make_url(cluster.settings.effective_database_url).database or "")
    seen, is_over = list[float](), threading.Event()

    def look() -> None:
        with closing(sqlite3.connect(path)) as connection:
            version = None
            while not is_over.is_set():
                (now,) = connection.execute("PRAGMA data_version").fetchone()
                if now != version:
                    seen.append(time.time())
                version = now
                time.sleep(LOOK_SECONDS)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        is_over.set()
        looking.join()


def figures(cluster: Cluster, *, n_jobs: int = 400) -> list[Figure]:
    """Jobs one after another."""
    before = cluster.spent()
    timings = _timings(cluster, n_jobs)
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
