"""How long a person waits beside a flood of batch work, and how soon a cancelled scan leaves its worker.

    python -m bench.lanes [--scans 40] [--cancels 20] [--page FILE]

The embedded service with its default model in a temporary folder. Ratios are of one run: the same scans
alone, then beside batch work that never ends.
"""

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import httpx
import psutil

from bench import bundled, page
from bench.bundled import MODEL
from bench.cluster.figures import Figure, at_most, percentile, plain, table
from neural_mri.backing import database, jobs
from neural_mri.backing.database import Sessions
from neural_mri.backing.jobs import Job
from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import TERMINAL, JobState, Lane
from tests.system.service import Service, free_port, register, running

TITLE = "Lanes, and cancelling"
INTRODUCTION = """`python -m bench.lanes`: the embedded service with its default model, one worker; from the request to the
answer, with batch work that never ends beside it. Cancelled scans are stopped at a random moment of their run.
"""
TEN_TOKENS = "The Eiffel Tower {} is located in the city of"
LONG_PROMPT = "{} " + "The quick brown fox jumps over the lazy dog. " * 65
LOOK_SECONDS = 0.002
IDLE_SECONDS = 0.1
WAITING = 20
"""Batch jobs under way."""


class Asked(NamedTuple):
    """A scan that no other equals."""

    path: str
    body: dict[str, Any]


def activation(prompt: str) -> Asked:
    """One forward pass."""
    return Asked("/api/scan/activation", {"prompt": prompt.format(uuid4().hex[:8])})


def trace() -> Asked:
    """A causal trace of three draws."""
    prompt = TEN_TOKENS.format(uuid4().hex[:8])
    return Asked("/api/perturb/trace", {"prompt": prompt, "subject": "The Eiffel Tower"})


def sweep() -> Asked:
    """Every head and MLP replaced."""
    body = {"prompt": TEN_TOKENS.format(uuid4().hex[:8]), "method": "ablation", "ablation": "zero"}
    return Asked("/api/scan/circuits", body)


class Caller:
    """Somebody who asks over HTTP, and looks into the database."""

    def __init__(self, service: Service, sessions: Sessions) -> None:
        self._http = httpx.Client(
            base_url=f"http://{service.settings.host}:{service.settings.port}",
            timeout=120,
            trust_env=False,
        )
        self._sessions = sessions

    def submit(self, asked: Asked, lane: Lane = Lane.INTERACTIVE, wait: int = 0) -> Any:
        """The job as the API answers it."""
        headers = {"Prefer": f"wait={wait}"} if wait else {}
        answer = self._http.post(
            asked.path, json=asked.body, params={"lane": lane.value}, headers=headers
        )
        return answer.raise_for_status().json()

    def seconds(self, asked: Asked) -> float:
        """From the question to the answer."""
        began = time.perf_counter()
        job = self.submit(asked, wait=60)
        if job["state"] != "succeeded":
            raise RuntimeError(f"{asked} came to {job}")
        return time.perf_counter() - began

    def cancel(self, job_id: str) -> None:
        """Ask a job to stop."""
        self._http.delete(f"/api/jobs/{job_id}").raise_for_status()

    def job(self, job_id: str) -> Job:
        """The job's row."""
        found = self._sessions.read(jobs.get, UUID(job_id))
        if found is None:
            raise LookupError(job_id)
        return found

    def until(self, job_id: str, *states: JobState) -> Job:
        """The job once it is in one of the states."""
        while (job := self.job(job_id)).state not in states:
            time.sleep(LOOK_SECONDS)
        return job


@contextmanager
def saturated(caller: Caller, work: Callable[[], Asked]) -> Iterator[None]:
    """Batch work that never ends: always more waits than the worker can take at once."""
    ended = threading.Event()
    under_way: list[str] = []

    def fill() -> None:
        while not ended.is_set():
            under_way[:] = [one for one in under_way if caller.job(one).state not in TERMINAL]
            while len(under_way) < WAITING:
                under_way.append(caller.submit(work(), Lane.BATCH)["id"])
            ended.wait(0.05)

    filling = threading.Thread(target=fill)
    filling.start()
    try:
        while len(under_way) < WAITING:
            time.sleep(0.01)
        caller.until(under_way[0], JobState.RUNNING, *TERMINAL)
        yield
    finally:
        ended.set()
        filling.join()
        for one in reversed(under_way):
            caller.cancel(one)
        for one in under_way:
            caller.until(one, *TERMINAL)


def lanes(caller: Caller, scans: int) -> Iterator[Figure]:
    """Interactive scans alone, and beside batch work of several kinds."""

    def ask() -> list[float]:
        timings = []
        for _ in range(scans):
            time.sleep(random.uniform(0.0, 0.3))  # noqa: S311  a person asks at any moment
            timings.append(caller.seconds(activation(TEN_TOKENS)))
        return timings

    ask()
    alone = ask()
    yield plain("an interactive scan of 12 tokens, alone", _line(alone))
    for name, work in BATCH_WORK.items():
        with saturated(caller, work):
            beside = ask()
        yield plain(f"the same beside batch {name}", _line(beside))
        ratio = percentile(beside, 0.95) / percentile(alone, 0.95)
        yield at_most(
            f"the same, 95th percentile against that of {scans} alone", ratio, 2, " x", digits=2
        )


def _line(seconds: list[float]) -> str:
    median, late = (1e3 * percentile(seconds, share) for share in (0.5, 0.95))
    return f"median {median:.0f} ms, 95th percentile {late:.0f} ms"


class Stopped(NamedTuple):
    """One cancelled scan, in seconds."""

    idle: float
    """From the wish until the worker had put the job down."""
    works_on: bool
    """Whether the worker computed after it had said that it stopped."""


def stopped(caller: Caller, worker: psutil.Process, asked: Asked, after: float) -> Stopped | None:
    """Cancel a scan some time after it began to run; None where it ended before."""
    job_id = caller.submit(asked)["id"]
    caller.until(job_id, JobState.RUNNING, *TERMINAL)
    time.sleep(after)
    wished = time.time()
    caller.cancel(job_id)
    ended = caller.until(job_id, *TERMINAL)
    if ended.state is not JobState.CANCELLED or ended.finished_at is None:
        return None
    before, looked_at = _cpu_seconds(worker), time.perf_counter()
    time.sleep(IDLE_SECONDS)
    # On a busy machine a tenth of a second is longer.
    busy = (_cpu_seconds(worker) - before) / (time.perf_counter() - looked_at)
    return Stopped(ended.finished_at.timestamp() - wished, works_on=busy > 0.5)


def _cpu_seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def cancels(caller: Caller, worker: psutil.Process, count: int) -> Iterator[Figure]:
    """Scans of every long kind, each cancelled at a random moment."""
    n_ended = n_working = 0
    for name, (work, seconds) in CANCELLED.items():
        found = [
            stopped(caller, worker, work(), random.uniform(0.0, seconds))  # noqa: S311
            for _ in range(count)
        ]
        ended = [each for each in found if each is not None]
        n_ended += len(ended)
        n_working += sum(each.works_on for each in ended)
        late = percentile([each.idle for each in ended], 0.95)
        yield at_most(
            f"cancelled to idle, {name}, 95th percentile of {len(ended)}", 1e3 * late, 250, " ms"
        )
    yield Figure(
        f"said cancelled while work went on, of {n_ended}",
        str(n_working),
        f"0: {'missed' if n_working else 'met'}",
    )


BATCH_WORK: dict[str, Callable[[], Asked]] = {
    "traces of three draws": trace,
    "sweeps of every head and MLP": sweep,
    "activations of 12 tokens": lambda: activation(TEN_TOKENS),
}
CANCELLED: dict[str, tuple[Callable[[], Asked], float]] = {
    "trace of three draws": (trace, 3.0),
    "sweep of every head and MLP": (sweep, 1.5),
    "activations of 650 tokens": (lambda: activation(LONG_PROMPT), 1.5),
}


def main() -> None:
    """Print the figures, and write them on the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.lanes", description=__doc__)
    parser.add_argument("--scans", type=int, default=40, help="of each kind of company (40)")
    parser.add_argument("--cancels", type=int, default=20, help="of each kind of scan (20)")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    asked = parser.parse_args()
    found = []
    for figure in _figures(asked.scans, asked.cancels):
        print(*filter(None, figure), sep="   ", flush=True)
        found.append(figure)
    page.replace_section(asked.page, TITLE, f"{INTRODUCTION}\n{table(found)}")


def _figures(scans: int, count: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="nmri-") as folder:
        settings = Settings(data_dir=Path(folder) / "data", port=free_port())
        register(settings, MODEL, bundled.folder())
        with running(settings) as service:
            service.wait_until_ready()
            sessions = database.sessions(settings)
            caller = Caller(service, sessions)
            if scans:
                yield from lanes(caller, scans)
            if count:
                yield from cancels(caller, service.child("worker"), count)
            sessions.close()


if __name__ == "__main__":
    main()
