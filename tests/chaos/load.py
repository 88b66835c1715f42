"""People who ask, and ask again until they are answered."""

import random
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import httpx

from api.batches import CHUNK

__all__ = ("Load",)

PATIENCE_SECONDS = 5.0


class Asked(NamedTuple):
    path: str
    body: dict[str, Any]
    lane: str
    cancel: bool

    @property
    def is_batch(self) -> bool:
        """Whether it asks for many scans."""
        return self.path == "/api/batches"

    @property
    def kept_at(self) -> str:
        """Where what it makes is found."""
        return self.path if self.is_batch else "/api/jobs"


class Load:
    """Requests of several clients at once, each sent again under its key until somebody accepts it."""

    def __init__(self, url: str, *, seed: int, count: int, clients: int, waiting: int) -> None:
        """`waiting` is how many accepted jobs the clients like to have under way."""
        self.accepted: dict[UUID, bool] = {}
        """Jobs by id, and whether somebody asked them to stop."""
        self.batches: dict[UUID, int] = {}
        """Batches by id, and how many lines each was sent with."""
        self.repeats = 0
        """Requests that had to be sent again."""
        self.contradictions: list[str] = []
        self.last = time.monotonic()
        self._url = url
        self._requests = _requests(seed, count)
        self._turn = threading.Lock()
        self._waiting = waiting
        self._under_way = 0
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(seed * 1000 + number,), daemon=True)
            for number in range(clients)
        ]

    @property
    def count(self) -> int:
        """Requests that were accepted."""
        return len(self.accepted) + len(self.batches)

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def is_over(self) -> bool:
        """Whether all has been asked and accepted."""
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def hold_back(self, under_way: int) -> None:
        """Say how many jobs are under way."""
        self._under_way = under_way

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=self._url, timeout=PATIENCE_SECONDS, trust_env=False) as client:
            while not self._stopped.is_set():
                if self._under_way > self._waiting:
                    self._stopped.wait(0.05)
                    continue
                with self._turn:
                    asked = next(self._requests, None)
                if asked is None:
                    return
                self._insist(client, asked, chance)

    def _insist(self, client: httpx.Client, asked: Asked, chance: random.Random) -> None:
        headers = {"Idempotency-Key": uuid4().hex}
        pause = 0.05
        while not self._stopped.is_set():
            try:
                answer = client.post(
                    asked.path, json=asked.body, params={"lane": asked.lane}, headers=headers
                )
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code in (200, 202):
                made = UUID(answer.json()["id"])
                with self._turn:
                    if asked.is_batch:
                        self.batches[made] = len(asked.body["scans"])
                    else:
                        self.accepted[made] = asked.cancel
                    self._under_way += 1
                    self.last = time.monotonic()
                if asked.cancel:
                    self._cancel(client, f"{asked.kept_at}/{made}", chance)
                if chance.random() < (0.5 if asked.is_batch else 0.05):
                    self._repeat(client, asked, headers, made)
                return
            if answer is not None and answer.status_code not in (429, 503):
                self.contradictions.append(f"{asked.path} was answered {answer.text}")
                return
            self.repeats += 1
            time.sleep(pause * chance.uniform(0.5, 1.5))
            pause = min(1.0, pause * 1.5)

    def _repeat(
        self, client: httpx.Client, asked: Asked, headers: dict[str, str], made: UUID
    ) -> None:
        """The same request again makes nothing else."""
        try:
            answer = client.post(
                asked.path, json=asked.body, params={"lane": asked.lane}, headers=headers
            )
        except httpx.TransportError:
            return
        if answer.status_code in (200, 202) and UUID(answer.json()["id"]) != made:
            self.contradictions.append(f"{made} was made again: {answer.text}")

    def _cancel(self, client: httpx.Client, path: str, chance: random.Random) -> None:
        time.sleep(chance.uniform(0.0, 0.3))
        for _ in range(20):
            try:
                if client.delete(path).status_code < 500:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)


def _requests(seed: int, count: int) -> Iterator[Asked]:
    """Mostly scans that no other equals; some that others ask for too, some that are soon regretted."""
    chance = random.Random(seed)
    for _ in range(count):
        body: dict[str, Any]
        kind, lane = chance.random(), chance.choice(("interactive", "interactive", "batch"))
        words = [f"w{chance.randrange(1, 60)}" for _ in range(chance.choice((4, 4, 4, 5, 6)))]
        if chance.random() < 0.15:
            words = [f"w{1 + chance.randrange(5)}"] * 4
        regretted = chance.random() < 0.08
        prompt = " ".join(words)
        if kind < 0.75:
            body = {"prompt": prompt, "model": "tiny", "top_neurons": 0}
            body["canonical"] = chance.random() < 0.3
            yield Asked("/api/scan/activation", body, lane, regretted)
        elif kind < 0.85:
            body = {"prompt": prompt, "model": "tiny", "layers": [0]}
            yield Asked("/api/scan/attention", body, lane, regretted)
        elif kind < 0.95:
            method = chance.choice(("fast", "attribution_patching", "ablation"))
            body = {"prompt": prompt, "model": "tiny", "method": method, "ablation": "zero"}
            body |= {"exact": 3, "edges": 5, "canonical": chance.random() < 0.3}
            yield Asked("/api/scan/circuits", body, lane, regretted)
        elif kind < 0.97:
            body = {"model": "tiny"}
            yield Asked("/api/scan/structural", body, lane, regretted)
        else:
            yield Asked("/api/batches", {"scans": _scans(chance)}, "batch", regretted)


def _scans(chance: random.Random) -> list[dict[str, Any]]:
    """More lines than are recorded at once, most of which ask for what another does."""
    prompts = [f"w{chance.randrange(1, 60)} w{chance.randrange(1, 60)}" for _ in range(8)]
    asked = [*prompts[:4], *chance.choices(prompts[:4], k=CHUNK), *prompts]
    return [{"scan_mode": "fMRI", "prompt": prompt, "model": "tiny"} for prompt in asked]
