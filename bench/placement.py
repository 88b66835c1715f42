"""Loads and waits of five models on two slots under a Zipf load, by the policy that workers follow and by LRU.

    python -m bench.placement

No model is loaded and no time passes: `neural_mri.backing.placement`, the very code that workers run, decides
under a virtual clock. Two rivals serve the same arrivals. *LRU* serves jobs in the order they came, loads what
each needs and lets the least recently used go. *LRU, drained* first serves whatever waits for what is held.
"""

import argparse
import heapq
import random
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from bench import page
from neural_mri.backing.placement import (
    Cost,
    Demand,
    Held,
    Move,
    Policy,
    WorkerRoom,
    faded,
    next_move,
)

__all__ = (
    "POLICIES",
    "Arrival",
    "Outcome",
    "Setting",
    "arrivals",
    "drained_lru",
    "figures",
    "lru",
    "main",
    "placed",
    "simulate",
)

LOOK_SECONDS = 1.0
"""How often a worker asks whether it should hold something else."""


class Setting(NamedTuple):
    """What is served, and by whom."""

    jobs_a_second: float
    workers: int = 1
    slots: int = 2
    """Models that a worker has room for."""
    costs: tuple[Cost, ...] = (Cost(memory_bytes=1, load_seconds=2.0),) * 5
    """Of each model, the most popular first."""
    job_seconds: float = 0.1
    seconds: float = 7200.0
    exponent: float = 1.0
    """Zipf's: the n-th model is asked for n^-exponent as often as the first."""


class Arrival(NamedTuple):
    """One job."""

    at: float
    model: int


class Outcome(NamedTuple):
    """What came of serving all arrivals."""

    loads: int
    waits: tuple[float, ...]
    """From arrival to start, sorted."""
    loading: float
    """Share of the workers' time that went into loading."""

    def quantile(self, share: float) -> float:
        """The wait that this share of the jobs did not exceed."""
        return self.waits[min(len(self.waits) - 1, int(share * len(self.waits)))]

    @property
    def mean(self) -> float:
        """The mean wait."""
        return sum(self.waits) / len(self.waits)


_UNEQUAL = tuple(Cost(memory_bytes=size, load_seconds=4.0 * size) for size in (2, 1, 4, 1, 2))

KINDS = {
    "One worker, two slots": Setting(jobs_a_second=0.0),
    "Two workers, a slot each": Setting(jobs_a_second=0.0, workers=2, slots=1),
    "One worker, models of unequal size": Setting(jobs_a_second=0.0, costs=_UNEQUAL),
}
RATES = (0.02, 0.1, 0.3, 0.5, 0.7, 1.0, 2.0)
BAR = 3.0
"""How many times as often as the policy LRU is to load."""
BUSY = 0.5
"""Share of the workers' time that LRU loads for, from which on the bar is held up: with fewer jobs most
models rest between two requests under any policy."""

TITLE = "Placing models"
INTRODUCTION = f"""`python -m bench.placement`: a simulation, and no measurement of a service. No model is loaded and no time
passes: `neural_mri.backing.placement`, the code by which workers decide, runs under a virtual clock. Five models, asked for by
Zipf's law (exponent 1) for two hours, share room for two; loading takes 2 s, or 4 s a unit of size where sizes are unequal, and a
job 0.1 s. *LRU* serves jobs in the order they came, loads what each needs and lets the least recently used go; *LRU, drained* first
serves whatever waits for what is held. In brackets the share of time that goes into loading; the bar is held up where LRU loads for
{BUSY:.0%} of the time or more. Fewer loads are paid for in waits: while LRU keeps up, its jobs start sooner.
"""


def arrivals(setting: Setting, *, seed: int = 0) -> list[Arrival]:
    """Jobs as they come: a Poisson process, models drawn by Zipf's law."""
    chance = random.Random(seed)  # noqa: S311 (a load, no secret)
    weights = [(rank + 1) ** -setting.exponent for rank in range(len(setting.costs))]
    up_to = list(accumulate(weights))
    made, now = list[Arrival](), 0.0
    while (now := now + chance.expovariate(setting.jobs_a_second)) < setting.seconds:
        made.append(Arrival(now, bisect_left(up_to, chance.random() * up_to[-1])))
    return made


class _Slot:
    """A model that is held."""

    def __init__(self, loaded_at: float) -> None:
        self.loaded_at = loaded_at
        self.has_served = False


class _Worker:
    def __init__(self, name: str) -> None:
        self.name = name
        self.held: OrderedDict[int, _Slot] = OrderedDict()
        """The least recently used first."""
        self.look_at = 0.0


class _World:
    """Jobs that wait, and what was served lately."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.waiting: list[deque[float]] = [deque() for _ in setting.costs]
        self.workers = [_Worker(f"worker-{number}") for number in range(setting.workers)]
        self._recent = [0.0 for _ in setting.costs]
        self._faded_at = 0.0

    def serve(self, worker: _Worker, model: int, now: float) -> float:
        """Start a model's first job; how long it has waited."""
        worker.held[model].has_served = True
        worker.held.move_to_end(model)
        arrived = self.waiting[model].popleft()
        # A request fades from when it was made, as the database reckons it.
        self._fade(now)
        self._recent[model] += faded(now - arrived, Policy().demand_seconds)
        return now - arrived

    def demands(self, now: float) -> list[Demand]:
        self._fade(now)
        return [
            Demand(
                revision=str(model),
                model=str(model),
                waiting=len(queue),
                oldest_seconds=now - queue[0] if queue else 0.0,
                recent=self._recent[model],
            )
            for model, queue in enumerate(self.waiting)
        ]

    def room(self, worker: _Worker, now: float) -> WorkerRoom:
        costs = self.setting.costs
        budget = self.setting.slots * max(cost.memory_bytes for cost in costs)
        return WorkerRoom(
            worker=worker.name,
            budget_bytes=budget,
            free_bytes=budget - sum(costs[model].memory_bytes for model in worker.held),
            held=tuple(
                Held(
                    revision=str(model),
                    memory_bytes=costs[model].memory_bytes,
                    held_seconds=now - slot.loaded_at,
                    load_seconds=costs[model].load_seconds,
                    settled=slot.has_served or not self.waiting[model],
                )
                for model, slot in worker.held.items()
            ),
        )

    def oldest(self, models: Sequence[int]) -> int | None:
        """Of these models the one whose first job has waited longest."""
        waited = [model for model in models if self.waiting[model]]
        return min(waited, key=lambda model: self.waiting[model][0], default=None)

    def _fade(self, now: float) -> None:
        share = faded(now - self._faded_at, Policy().demand_seconds)
        self._recent = [count * share for count in self._recent]
        self._faded_at = now


class _Step(NamedTuple):
    """What a worker does next."""

    serve: int | None = None
    load: int | None = None
    evict: tuple[int, ...] = ()


Choose = Callable[[_World, _Worker, float], _Step]


def placed(world: _World, worker: _Worker, now: float) -> _Step:
    """The policy that workers follow."""
    if now >= worker.look_at:
        worker.look_at = now + LOOK_SECONDS
        move = _move(world, worker, now)
        if move is not None:
            return _Step(load=int(move.revision), evict=tuple(map(int, move.evicted)))
    # Tickets of several queues are taken in turn.
    return _Step(serve=next((model for model in worker.held if world.waiting[model]), None))


def _move(world: _World, worker: _Worker, now: float) -> Move | None:
    rooms = [world.room(each, now) for each in world.workers]
    costs = {str(model): cost for model, cost in enumerate(world.setting.costs)}
    return next_move(worker.name, rooms, world.demands(now), costs, Policy())


def lru(world: _World, worker: _Worker, _now: float) -> _Step:
    """Jobs in the order they came."""
    elsewhere = {model for each in world.workers if each is not worker for model in each.held}
    models = [model for model in range(len(world.setting.costs)) if model not in elsewhere]
    return _by_age(world, worker, models)


def drained_lru(world: _World, worker: _Worker, now: float) -> _Step:
    """First what waits for what is held."""
    at_hand = world.oldest(list(worker.held))
    return lru(world, worker, now) if at_hand is None else _Step(serve=at_hand)


def _by_age(world: _World, worker: _Worker, models: Sequence[int]) -> _Step:
    model = world.oldest(models)
    if model is None or model in worker.held:
        return _Step(serve=model)
    costs, room = world.setting.costs, world.room(worker, 0.0)
    free, evicted = room.free_bytes, list[int]()
    for held in worker.held:
        if free >= costs[model].memory_bytes:
            break
        evicted.append(held)
        free += costs[held].memory_bytes
    return _Step(load=model, evict=tuple(evicted))


POLICIES: Mapping[str, Choose] = {"placed": placed, "LRU": lru, "LRU, drained": drained_lru}


def simulate(
    setting: Setting, jobs: Sequence[Arrival], choose: Choose, *, until: Arrival | None = None
) -> Outcome:
    """Serve all jobs; or some, up to the first job of a model: then the waits are that one's alone."""
    world = _World(setting)
    coming, waits, loads, loading = deque(jobs), list[float](), 0, 0.0
    # Workers by when they are next free to do something; the number keeps ties in order.
    turns = [(0.0, number) for number in range(setting.workers)]
    now = 0.0
    while len(waits) < len(jobs):
        now, number = heapq.heappop(turns)
        worker = world.workers[number]
        while coming and coming[0].at <= now:
            job = coming.popleft()
            world.waiting[job.model].append(job.at)
        step = choose(world, worker, now)
        if step.load is not None:
            for evicted in step.evict:
                del worker.held[evicted]
            seconds = setting.costs[step.load].load_seconds
            worker.held[step.load] = _Slot(now + seconds)
            loads, loading = loads + 1, loading + seconds
            heapq.heappush(turns, (now + seconds, number))
        elif step.serve is not None:
            waits.append(world.serve(worker, step.serve, now))
            if until is not None and step.serve == until.model:
                waits = [now - until.at]
                break
            heapq.heappush(turns, (now + setting.job_seconds, number))
        else:
            later = now + LOOK_SECONDS
            sooner = coming[0].at if coming else later
            heapq.heappush(turns, (max(now + 1e-6, min(sooner, later)), number))
    return Outcome(loads, tuple(sorted(waits)), loading / (now * setting.workers))


def figures(rates: Sequence[float] = RATES) -> Iterator[str]:
    """Tables of what each policy makes of growing loads, one for each kind of set-up."""
    for kind, setting in KINDS.items():
        lines = []
        for rate in rates:
            loaded = setting._replace(jobs_a_second=rate)
            jobs = arrivals(loaded)
            lines.append(
                _line(rate, {name: simulate(loaded, jobs, each) for name, each in POLICIES.items()})
            )
        yield f"### {kind}\n\n" + "\n".join((_HEADING, *lines)) + "\n"


_HEADING = f"""| jobs a second | {
    " | ".join(f"loads, {name}" for name in POLICIES)
} | LRU's / placed | mean wait, {", ".join(POLICIES)} | longest wait | bar |
|{"---|" * (len(POLICIES) + 5)}"""


def _line(rate: float, found: Mapping[str, Outcome]) -> str:
    ratio = found["LRU"].loads / found["placed"].loads
    bar = ""
    if found["LRU"].loading >= BUSY:
        bar = f"≥ {BAR:.1f}: {'met' if ratio >= BAR else 'missed'}"
    cells = (
        f"{rate:g}",
        *(f"{each.loads} ({each.loading:.0%})" for each in found.values()),
        f"{ratio:.1f}",
        ", ".join(f"{each.mean:.1f}" for each in found.values()) + " s",
        ", ".join(f"{each.waits[-1]:.0f}" for each in found.values()) + " s",
        bar,
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables, and write them on the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.placement", description=__doc__)
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    asked = parser.parse_args()
    found = []
    for table in figures():
        print(table, flush=True)
        found.append(table)
    page.replace_section(asked.page, TITLE, f"{INTRODUCTION}\n" + "\n".join(found))


if __name__ == "__main__":
    main()
