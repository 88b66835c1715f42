"""What is done to the service, drawn by a seed."""

import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

import redis

from neural_mri.backing import faults, keys, leftovers
from neural_mri.backing.queue import ticket_message
from neural_mri.backing.storage import Store
from neural_mri.backing.stored import open_result
from neural_mri.contract.problems import Gone, Unavailable
from tests.chaos.clock import Clock
from tests.chaos.premises import Disk, Host, Postgresql, Sqlite, frozen
from tests.chaos.relay import Relay
from tests.chaos.service import Place, Service
from tests.chaos.ways import WAYS

__all__ = ("Faults",)

MOST_SPOILT = 200
"""Results of which one is chosen to be spoilt."""
_ENDING = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
FURTHEST_SECONDS = 600.0
"""How far from the right time a clock may be set."""

_WIRE_FAULTS: Mapping[str, Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "broker": {"stall": (2, 4.0), "lose": (4, 2.0), "cut": (2, 1.0)},
        "database": {"stall": (2, 4.0), "lose": (2, 1.0), "cut": (2, 1.0)},
        "bucket": {
            "stall": (8, 8.0),
            "lose": (1, 1.0),
            "cut": (8, 3.0),
            "refuse": (8, 5.0),
            "fail": (8, 5.0),
        },
    }
)
"""What befalls the way to each server: how often beside other faults, and for how many seconds at most."""


class Fault(NamedTuple):
    weight: float
    do: Callable[[random.Random], None]


class Faults:
    """Draws faults and does them, some of them at the same time."""

    def __init__(
        self,
        service: Service,
        database: Sqlite | Postgresql,
        *,
        seed: int,
        queue: str,
        store: Store,
        disk: Disk | None,
        host: Host | None,
        wires: Mapping[str, Relay],
        clocks: Mapping[str, Clock],
        only: str = "",
    ) -> None:
        self.done: Counter[str] = Counter()
        self.log: list[str] = []
        self.spoilt: dict[str, bytes] = {}
        """What was left of results, by path."""
        self._service = service
        self._database = database
        self._chance = random.Random(seed)
        self._queue = queue
        self._store = store
        self._disk = disk
        self._host = host
        self._wires = wires
        self._clocks = clocks
        self._busy: dict[str, threading.Thread] = {}
        """What lasts, by what it is done to."""
        self._began = time.monotonic()
        self._kinds = {
            name: fault for name, fault in self._known().items() if re.search(only, name)
        }

    def one(self) -> str:
        """Do a fault; one that lasts goes on by itself, and what befalls its victim next waits for it.

        One seed gives one sequence of faults, each with its own length and victim.
        """
        names = list(self._kinds)
        [name] = self._chance.choices(names, [self._kinds[name].weight for name in names])
        target, own = name.split()[-1], random.Random(self._chance.random())
        self.done[name] += 1
        self.log.append(f"{time.monotonic() - self._began:9.3f} {name}")
        lasting = threading.Thread(
            target=self._do, args=(name, own, self._busy.get(target)), daemon=True
        )
        self._busy[target] = lasting
        lasting.start()
        return name

    def _do(self, name: str, chance: random.Random, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        self._kinds[name].do(chance)

    def settle(self) -> None:
        """Wait until nothing is being done any more, and disarm what nobody came to."""
        for lasting in self._busy.values():
            lasting.join()
        for point in faults.POINTS:
            (self._service.crash_points / point).unlink(missing_ok=True)

    def _known(self) -> Mapping[str, Fault]:
        service = self._service
        lease = service.settings.lease_seconds
        kinds = {
            "kill worker": Fault(14, self._kill_worker),
            "end worker": Fault(3, partial(self._end, "worker")),
            "freeze worker": Fault(6, partial(self._freeze, "worker", 2.5 * lease)),
            "crash in worker": Fault(14, partial(self._crash, "worker")),
            "kill api": Fault(8, partial(self._signal, "api", signal.SIGKILL)),
            "end api": Fault(2, partial(self._end, "api")),
            "freeze api": Fault(4, partial(self._freeze, "api", 2.0)),
            "crash in api": Fault(6, partial(self._crash, "api")),
            "kill reaper": Fault(8, partial(self._signal, "reaper", signal.SIGKILL)),
            "freeze reaper": Fault(4, partial(self._freeze, "reaper", 3.0)),
            "crash in reaper": Fault(4, partial(self._crash, "reaper")),
            "double reaper": Fault(2, self._double_reaper),
            "kill broker": Fault(5, lambda _: service.broker.kill()),
            "freeze broker": Fault(4, self._freeze_broker),
            "empty broker": Fault(6, self._flush),
            "cut connections of broker": Fault(3, self._cut_connections),
            "stray tickets in broker": Fault(3, self._stray_tickets),
        }
        kinds["spoil result in store"] = Fault(3, self._spoil)
        for how in self._database.faults:
            longest = 7.0 if how == "lock" and self._database.kind == "sqlite" else 2.5
            kinds[f"{how} database"] = Fault(4, partial(self._disturb, how, longest))
        if self._disk is not None:
            disk = self._disk
            kinds["fill disk"] = Fault(4, lambda chance: disk.fill(chance.uniform(0.2, 3.0)))
        for name, wire in self._wires.items():
            for how, (weight, longest) in _WIRE_FAULTS[name].items():
                kinds[f"{how} wire to {name}"] = Fault(
                    weight, partial(self._misbehave, wire, how, longest)
                )
        for name, clock in self._clocks.items():
            kinds[f"set clock of {name}"] = Fault(3, partial(self._set, clock))
        if self._host is not None:
            host = self._host
            kinds["cut cable"] = Fault(6, lambda chance: host.cut(chance.uniform(0.2, 3 * lease)))
        for way in WAYS:
            point = "worker.loading" if way == "slowness" else "worker.computing"
            kinds[f"{way} in worker"] = Fault(3, partial(self._befall, point, way))
        return kinds

    @staticmethod
    def _misbehave(wire: Relay, how: str, longest: float, chance: random.Random) -> None:
        wire.misbehave(how, chance.uniform(0.1, longest))

    @staticmethod
    def _set(clock: Clock, chance: random.Random) -> None:
        clock.set(chance.uniform(-FURTHEST_SECONDS, FURTHEST_SECONDS))

    def _one(self, program: str, chance: random.Random) -> str:
        return chance.choice(self._service.names(program))

    def _signal(self, program: str, signum: signal.Signals, chance: random.Random) -> None:
        self._service.signal(self._one(program, chance), signum)

    def _end(self, program: str, chance: random.Random) -> None:
        """As people and their supervisors do, some of whom do not wait for the end."""
        name, signum = self._one(program, chance), chance.choice(_ENDING)
        for _ in range(chance.choice((1, 1, 2))):
            self._service.signal(name, signum)
            time.sleep(chance.uniform(0.0, 0.5))

    def _kill_worker(self, chance: random.Random) -> None:
        """The process that works, as the kernel does for want of memory, or its parent and so both."""
        name = self._one("worker", chance)
        if chance.random() < 0.5:
            self._service.kill_working(name)
        else:
            self._service.signal(name, signal.SIGKILL)

    def _freeze(self, program: str, longest: float, chance: random.Random) -> None:
        self._service.frozen(self._one(program, chance), chance.uniform(0.1, longest))

    def _crash(self, program: str, chance: random.Random) -> None:
        point = chance.choice([each for each in faults.POINTS if each.startswith(program)])
        self._befall(point, "", chance)

    def _befall(self, point: str, way: str, chance: random.Random) -> None:
        place = self._service.arm(point, way)
        deadline = time.monotonic() + chance.uniform(0.5, 3.0)
        while place.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        place.unlink(missing_ok=True)

    def _double_reaper(self, chance: random.Random) -> None:
        self._service.one_more(Place("reaper-extra", "reaper"), chance.uniform(0.5, 3.0))

    def _freeze_broker(self, chance: random.Random) -> None:
        with frozen([self._service.broker.pid]):
            time.sleep(chance.uniform(0.2, 3.0))

    def _disturb(self, how: str, longest: float, chance: random.Random) -> None:
        self._database.disturb(how, chance.uniform(0.1, longest))

    def _flush(self, _chance: random.Random) -> None:
        with suppress(redis.RedisError), self._service.broker.client() as client:
            client.flushall()

    def _cut_connections(self, _chance: random.Random) -> None:
        with suppress(redis.RedisError), self._service.broker.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)

    def _stray_tickets(self, chance: random.Random) -> None:
        """Many more than there are jobs, and some that say nothing anybody knows."""
        queue = chance.choice([self._queue, keys.CPU_QUEUE])
        strange = ticket_message(queue).replace(b"neural_mri.ticket", b"neural_mri.riddle")
        count = chance.choice((50, 50, 50, 2000))
        noise = [strange] if chance.random() < 0.8 else [strange, chance.randbytes(40)]
        with suppress(redis.RedisError), self._service.broker.client() as client:
            client.lpush(queue, *(ticket_message(queue) for _ in range(count)), *noise)

    def _place(self, chance: random.Random, path: str, size: int) -> int:
        """A byte of a result that means something: not one of those that keep tables apart."""
        parts = [range(size)]
        with suppress(Gone):  # spoilt already
            result = open_result(self._store, path)
            tables = [range(each.start, each.end) for each in result.tables if each.path == path]
            parts = [range(len(result.body)), *tables]
        return chance.choice([place for part in parts for place in part])

    def _spoil(self, chance: random.Random) -> None:
        """Take a result away, or change a byte of it."""
        with suppress(Unavailable):
            paths = list(islice(leftovers.aged_results(self._store, 0.0), MOST_SPOILT))
            if not paths:
                return
            path = chance.choice(paths)
            if chance.random() < 0.5:
                self.spoilt[path] = b""
                self._store.delete(path)
                return
            body = bytearray(self._store.get(path))
            body[self._place(chance, path, len(body))] ^= 1 << chance.randrange(8)
            self.spoilt[path] = bytes(body)
            self._store.put(path, bytes(body))
