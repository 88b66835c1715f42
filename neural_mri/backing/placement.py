"""Which model a worker should load next, and what has to go for it: the policy alone.

A model's *demand* counts its requests: each as 1 while it waits and, once served, less and less as time
goes by. What holding it is worth is demand x what loading costs, and what it takes is bytes: the model with
the least worth a byte goes first. Three rules keep that from doing harm:

- A model comes in at the expense of others only if it is worth clearly more than they are (`ADVANTAGE`):
  otherwise two of equal demand would take turns at every request, and workers would only ever load.
- A model that has just been loaded stays for a while, and until it has served something.
- Jobs that have waited for `patience_seconds` are *overdue*. The longest overdue goes first, whatever the
  demand for others, and nothing else is loaded into room that it waits for: nobody waits for ever.

A model that is held already is loaded a second time only where jobs wait although it is held, for longer
than loading takes, and a worker has the room or holds only what is in clearly less demand.

Every worker knows what all of them hold and comes to the same conclusions: the best offer is the one that
loses least, then the one with the most free memory. Who stands further back waits a moment for those
before it. A claim in SQL decides where they were wrong about each other (`residences`).

Knows no clock, database or device: all times are durations, so that the same code runs under a virtual
clock (`bench.placement`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

__all__ = (
    "ADVANTAGE",
    "HEAD_START_SECONDS",
    "Cost",
    "Demand",
    "Held",
    "Move",
    "Offer",
    "Policy",
    "WorkerRoom",
    "evictions",
    "faded",
    "next_move",
    "offers",
    "score",
    "worth",
)

ADVANTAGE = 2.0
"""How many times as much a model must be worth as what has to go for it."""

HEAD_START_SECONDS = 1.0
"""What a worker gives each of those that made a better offer."""

COPY_LOADS = 2.0
"""A further copy is loaded when jobs wait for so many times as long as loading takes."""


class Policy(NamedTuple):
    """What can be set."""

    residence_seconds: float = 10.0
    patience_seconds: float = 60.0
    demand_seconds: float = 20.0
    """Time constant of what was served."""


class Demand(NamedTuple):
    """What is asked of one set of weights."""

    revision: str
    model: str
    """The name it was asked for by."""
    waiting: int
    oldest_seconds: float
    """How long the first of them has waited; 0 where none waits."""
    recent: float
    """Requests that wait no longer, each as `faded`."""

    @property
    def requests(self) -> float:
        """Those that wait, and those that did, as far as they still count."""
        return self.waiting + self.recent


class Cost(NamedTuple):
    """What holding one set of weights takes: as it was measured last, or an estimate."""

    memory_bytes: int
    load_seconds: float


class Held(NamedTuple):
    """A model in a worker's memory, or on its way there or out."""

    revision: str
    memory_bytes: int
    held_seconds: float
    """Since it was loaded."""
    load_seconds: float
    pinned: bool = False
    settled: bool = True
    """Whether it is loaded, and has served a job since, or nobody waits for it."""


class WorkerRoom(NamedTuple):
    """What one worker holds, and what more it could."""

    worker: str
    budget_bytes: int
    """What its models may take in all."""
    free_bytes: int
    """What it could load now without letting anything go."""
    held: tuple[Held, ...] = ()
    resting: bool = False
    """Whether nothing runs or is loaded on it now: memory that it lacks is then taken by others."""

    def holds(self, revision: str) -> bool:
        """Whether it holds these weights, or is about to."""
        return any(held.revision == revision for held in self.held)

    @property
    def most_bytes(self) -> int:
        """What a model could take beside what is pinned, if nobody else had a part of the memory."""
        return self.budget_bytes - sum(held.memory_bytes for held in self.held if held.pinned)

    @property
    def could_have_bytes(self) -> int:
        """What a model could take now, if all went that is not pinned: others may have memory too.

        While something runs nobody can tell whose memory is missing: then it is the most.
        """
        if not self.resting:
            return self.most_bytes
        evictable = sum(held.memory_bytes for held in self.held if not held.pinned)
        return min(self.most_bytes, self.free_bytes + evictable)


class Move(NamedTuple):
    """A model to be loaded, once others are let go."""

    revision: str
    model: str
    evicted: tuple[str, ...]
    """Their revisions, least worth first."""
    is_copy: bool
    """Whether another worker holds it already."""


class Offer(NamedTuple):
    """What it would cost a worker to take a model in."""

    lost: float
    """Worth of what would have to go."""
    free_bytes: int
    worker: str
    evicted: tuple[str, ...]

    @property
    def order(self) -> tuple[float, int, str]:
        """The best first."""
        return self.lost, -self.free_bytes, self.worker


def faded(seconds: float, demand_seconds: float) -> float:
    """What a request counts that was made so long ago and waits no longer: 1 at once, then less."""
    return math.exp(-max(0.0, seconds) / demand_seconds)


def worth(requests: float, cost: Cost | Held) -> float:
    """Of holding a model with so many requests: the seconds of loading that it saves."""
    return requests * max(cost.load_seconds, 1e-3)


def score(requests: float, cost: Cost | Held) -> float:
    """What a byte of it is worth: demand x load cost / bytes."""
    return worth(requests, cost) / max(1, cost.memory_bytes)


def next_move(
    me: str,
    workers: Sequence[WorkerRoom],
    demands: Iterable[Demand],
    costs: Mapping[str, Cost],
    policy: Policy,
) -> Move | None:
    """What worker `me`, which is one of `workers`, should load now.

    None where it should stay as it is, or leave it to another.
    """
    own = next(worker for worker in workers if worker.worker == me)
    by_revision = {demand.revision: demand for demand in demands}
    requests = {
        revision: demand.requests / max(1, _copies(workers, revision))
        for revision, demand in by_revision.items()
    }
    for demand in _in_turn(by_revision.values(), costs, policy):
        cost, copies = costs[demand.revision], _copies(workers, demand.revision)
        if own.holds(demand.revision) or cost.memory_bytes > own.could_have_bytes:
            continue
        if copies and not _deserves_a_copy(demand, cost):
            continue
        # A copy takes over a share of those that wait; who was served was served without it.
        value = worth(demand.waiting / (copies + 1) if copies else demand.requests, cost)
        overdue = not copies and demand.oldest_seconds >= policy.patience_seconds
        found = offers(workers, demand, cost, requests, policy)
        mine = next((offer for offer in found if offer.worker == me), None)
        if mine is None:
            if overdue and not found:
                return None  # the room it waits for is not given to others
            continue
        if not overdue and mine.evicted and value < ADVANTAGE * mine.lost:
            continue
        ahead = found.index(mine)
        if demand.oldest_seconds >= ahead * HEAD_START_SECONDS:
            return Move(demand.revision, demand.model, mine.evicted, is_copy=copies > 0)
    return None


def _copies(workers: Iterable[WorkerRoom], revision: str) -> int:
    return sum(worker.holds(revision) for worker in workers)


def _in_turn(demands: Iterable[Demand], costs: Mapping[str, Cost], policy: Policy) -> list[Demand]:
    """Models that somebody waits for: the overdue by age, then the others by worth."""

    def turn(demand: Demand) -> tuple[bool, float]:
        is_patient = demand.oldest_seconds < policy.patience_seconds
        by = score(demand.requests, costs[demand.revision])
        return is_patient, -(by if is_patient else demand.oldest_seconds)

    return sorted((d for d in demands if d.waiting and d.revision in costs), key=turn)


def _deserves_a_copy(demand: Demand, cost: Cost) -> bool:
    return demand.oldest_seconds >= max(1.0, COPY_LOADS * cost.load_seconds)


def offers(
    workers: Iterable[WorkerRoom],
    demand: Demand,
    cost: Cost,
    requests: Mapping[str, float],
    policy: Policy,
    *,
    at_once: bool = False,
) -> list[Offer]:
    """What each worker that does not hold a model would have to give for it, the best first.

    `requests` is the demand for each model, a copy's share of it; `at_once` as for `evictions`.
    """
    found = []
    for worker in workers:
        if worker.holds(demand.revision):
            continue
        evicted = evictions(worker, cost.memory_bytes, requests, policy, at_once=at_once)
        if evicted is not None:
            lost = sum(worth(requests.get(held.revision, 0.0), held) for held in evicted)
            names = tuple(held.revision for held in evicted)
            found.append(Offer(lost, worker.free_bytes, worker.worker, names))
    return sorted(found, key=lambda offer: offer.order)


def evictions(
    worker: WorkerRoom,
    memory_bytes: int,
    requests: Mapping[str, float],
    policy: Policy,
    *,
    at_once: bool = False,
) -> list[Held] | None:
    """What a worker lets go to have room for so many bytes, least worth a byte first; None where it cannot.

    `at_once` does not spare what has only just come.
    """
    held = sum(each.memory_bytes for each in worker.held)
    missing = memory_bytes - min(worker.free_bytes, worker.budget_bytes - held)
    if missing <= 0:
        return []
    may_go = sorted(
        (each for each in worker.held if _may_go(each, policy, at_once=at_once)),
        key=lambda each: score(requests.get(each.revision, 0.0), each),
    )
    chosen = list[Held]()
    for each in may_go:
        if missing <= 0:
            break
        chosen.append(each)
        missing -= each.memory_bytes
    if missing > 0:
        return None
    for each in reversed(chosen[:-1]):
        # A larger one taken last may have made some of the others needless.
        if missing + each.memory_bytes <= 0:
            chosen.remove(each)
            missing += each.memory_bytes
    return chosen


def _may_go(held: Held, policy: Policy, *, at_once: bool) -> bool:
    if held.pinned:
        return False
    stays = max(policy.residence_seconds, held.load_seconds)
    return at_once or (held.settled and held.held_seconds >= stays)
