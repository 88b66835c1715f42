"""Readers of event streams whose connections break at random, and go on from where they stopped.

python -m tests.chaos.cuts [--cuts 1000] [--readers 40] [--seed N]
"""

import argparse
import random
import signal
import sys
import threading
import time
from typing import NamedTuple
from uuid import UUID

import httpx

from neural_mri.backing import keys
from neural_mri.backing.events import parse_entries
from tests.chaos.storm import Stage, Storm, staged

__all__ = ("Cuts", "cut_streams")

PATIENCE_SECONDS = 10.0


class Read(NamedTuple):
    """One event as a reader had it."""

    id: str
    name: str
    data: str


class Reader:
    """Reads a job's events to the end, a few hundred bytes at a time."""

    def __init__(self, url: str, job: UUID, *, seed: int, cuts: int) -> None:
        self.job = job
        self.read: list[Read] = []
        self.cuts = 0
        self.failures: list[str] = []
        self._url = f"{url}/api/jobs/{job}/events"
        self._chance = random.Random(seed)
        self._wanted = cuts

    def run(self) -> None:
        """Until the end has been read; the wanted number of times the connection breaks before that."""
        deadline = time.monotonic() + 180
        with httpx.Client(timeout=PATIENCE_SECONDS, trust_env=False) as client:
            while time.monotonic() < deadline:
                headers = {"Last-Event-ID": self.read[-1].id} if self.read else {}
                try:
                    with client.stream("GET", self._url, headers=headers) as answer:
                        if answer.status_code == 204:
                            return
                        if answer.status_code != 200:
                            time.sleep(0.1)
                            continue
                        if self._follow(answer):
                            return
                except httpx.TransportError:
                    time.sleep(self._chance.uniform(0.0, 0.1))
        self.failures.append(f"{self.job}: no end within 180 s, after {len(self.read)} events")

    def _follow(self, answer: httpx.Response) -> bool:
        """Read on; whether the end came. Broken off in the midst of an event as often as not."""
        left = self._chance.randrange(50, 1500) if self.cuts < self._wanted else None
        held = b""
        for piece in answer.iter_raw():
            part = piece
            if left is not None:
                part, left = piece[:left], left - len(piece)
            held += part
            *whole, held = held.split(b"\n\n")
            for block in whole:
                if self._took(block.decode()):
                    return True
            if left is not None and left <= 0:
                self.cuts += 1
                return False
        return False

    def _took(self, block: str) -> bool:
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "event" not in fields or fields["event"] == "queue":
            return False  # a comment, or a place in the queue, which is of the moment
        if fields["event"] == "reset":
            self.failures.append(f"{self.job}: was told to start anew")
            return False
        self.read.append(Read(fields["id"], fields["event"], fields["data"]))
        return fields["event"] == "ended"


class Cuts(NamedTuple):
    """What came of it."""

    cuts: int
    events: int
    readers: int
    restarts: int
    wrong: list[str]

    def __str__(self) -> str:
        head = (
            f"{self.readers} readers, {self.cuts} cuts, the API killed {self.restarts} times: "
            f"{self.events} events, wrong: {len(self.wrong)}"
        )
        return "\n".join([head, *self.wrong[:20]])


def cut_streams(stage: Stage, *, readers: int, cuts: int, seed: int, restarts: int = 2) -> Cuts:
    """Cut streams of scans that run meanwhile; what was read is what stands in the stream, each once."""
    chance = random.Random(seed)
    url = stage.service.url
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        while client.get("/api/health").status_code != 200:
            time.sleep(0.1)
        jobs = []
        for _ in range(readers):
            words = " ".join(f"w{chance.randrange(1, 60)}" for _ in range(40))
            body = {"prompt": words, "model": "tiny", "canonical": True}
            answer = client.post("/api/scan/activation", json=body).raise_for_status()
            jobs.append(UUID(answer.json()["id"]))
    each = -(-cuts // readers)
    reading = [Reader(url, job, seed=seed + number, cuts=each) for number, job in enumerate(jobs)]
    threads = [threading.Thread(target=reader.run, daemon=True) for reader in reading]
    for thread in threads:
        thread.start()
    for _ in range(restarts):
        time.sleep(chance.uniform(0.5, 2.0))
        stage.service.signal("api", signal.SIGKILL)
    for thread in threads:
        thread.join()
    wrong = [failure for reader in reading for failure in reader.failures]
    with stage.service.broker.client() as redis:
        for reader in reading:
            rows: object = redis.xrange(keys.event_stream(reader.job))
            entries = parse_entries(rows)  # type: ignore[arg-type]
            stood = [(entry.id, entry.name) for entry in entries]
            found = [(event.id.rpartition("/")[2], event.name) for event in reader.read]
            if stood != found:
                wrong.append(
                    f"{reader.job}: {len(found)} events read of {len(stood)}, or in another order"
                )
    return Cuts(
        sum(reader.cuts for reader in reading),
        sum(len(reader.read) for reader in reading),
        readers,
        restarts,
        wrong,
    )


def main() -> int:
    """Exit status: 0 where nothing was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.cuts", description=__doc__)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument("--readers", type=int, default=40)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)  # noqa: T201
    with staged(Storm(jobs=0, faults=0, seed=asked.seed, workers=1)) as stage:
        report = cut_streams(stage, readers=asked.readers, cuts=asked.cuts, seed=asked.seed)
    print(report)  # noqa: T201
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
