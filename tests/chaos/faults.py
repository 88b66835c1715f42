"""What is done to the service, drawn by a seed."""

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import redis

from neural_mri.backing import faults, keys
from neural_mri.backing.queue import ticket_message
from tests.chaos.premises import Disk, Host, Postgresql, Sqlite, frozen
from tests.chaos.service import Place, Service

__all__ = ("Faults",)


class Fault(NamedTuple):
    weight: float
    do: Callable[[], None]


class Faults:
    """Draws faults and does them, some of them at the same time."""

    def __init__(
        self,
        service: Service,
        database: Sqlite | Postgresql,
        *,
        seed: int,
        queue: str,
        disk: Disk | None,
        host: Host | None,
    ) -> None:
        self.done: Counter[str] = Counter()
        self.log: list[str] = []
        self._service = service
        self._database = database
        self._chance = random.Random(seed)
        self._queue = queue
        self._disk = disk
        self._host = host
        self._busy: dict[str, threading.Thread] = {}
        """What lasts, by what it is done to."""
        self._began = time.monotonic()
        self._kinds = self._known()

    def one(self) -> str:
        """Do a fault; those that last go on by themselves. Its name."""
        names = list(self._kinds)
        while True:
            [name] = self._chance.choices(names, [self._kinds[name].weight for name in names])
            target = name.split()[-1]
            busy = self._busy.get(target)
            if busy is None or not busy.is_alive():
                break
        self.done[name] += 1
        self.log.append(f"{time.monotonic() - self._began:9.3f} {name}")
        lasting = threading.Thread(target=self._kinds[name].do, daemon=True)
        self._busy[target] = lasting
        lasting.start()
        return name

    def settle(self) -> None:
        """Wait until nothing is being done any more, and disarm what nobody came to."""
        for lasting in self._busy.values():
            lasting.join()
        for point in faults.POINTS:
            (self._service.crash_points / point).unlink(missing_ok=True)

    def _known(self) -> Mapping[str, Fault]:
        service, seconds = self._service, self._chance.uniform
        lease = service.settings.lease_seconds
        kinds = {
            "kill worker": Fault(14, lambda: self._signal("worker", signal.SIGKILL)),
            "end worker": Fault(3, lambda: self._signal("worker", signal.SIGTERM)),
            "freeze worker": Fault(6, lambda: self._freeze("worker", seconds(0.2, 2.5 * lease))),
            "crash in worker": Fault(14, lambda: self._crash("worker", seconds(0.5, 3.0))),
            "kill api": Fault(8, lambda: self._signal("api", signal.SIGKILL)),
            "end api": Fault(2, lambda: self._signal("api", signal.SIGTERM)),
            "freeze api": Fault(4, lambda: self._freeze("api", seconds(0.1, 2.0))),
            "crash in api": Fault(6, lambda: self._crash("api", seconds(0.5, 3.0))),
            "kill reaper": Fault(8, lambda: self._signal("reaper", signal.SIGKILL)),
            "freeze reaper": Fault(4, lambda: self._freeze("reaper", seconds(0.1, 3.0))),
            "crash in reaper": Fault(4, lambda: self._crash("reaper", seconds(0.5, 3.0))),
            "double reaper": Fault(2, lambda: service.one_more(self._extra(), seconds(0.5, 3.0))),
            "kill broker": Fault(5, service.broker.kill),
            "freeze broker": Fault(4, lambda: self._freeze_broker(seconds(0.2, 3.0))),
            "empty broker": Fault(6, self._flush),
            "cut connections of broker": Fault(3, self._cut_connections),
            "stray tickets in broker": Fault(3, self._stray_tickets),
        }
        for how in self._database.faults:
            longest = 7.0 if how == "lock" and self._database.kind == "sqlite" else 2.5
            kinds[f"{how} database"] = Fault(4, partial(self._disturb, how, longest))
        if self._disk is not None:
            disk = self._disk
            kinds["fill disk"] = Fault(4, lambda: disk.fill(seconds(0.2, 3.0)))
        if self._host is not None:
            host = self._host
            kinds["cut cable"] = Fault(6, lambda: host.cut(seconds(0.2, 3.0 * lease)))
        return kinds

    def _one(self, program: str) -> str:
        return self._chance.choice(self._service.names(program))

    def _signal(self, program: str, signum: signal.Signals) -> None:
        self._service.signal(self._one(program), signum)

    def _freeze(self, program: str, seconds: float) -> None:
        self._service.frozen(self._one(program), seconds)

    def _crash(self, program: str, seconds: float) -> None:
        point = self._chance.choice([each for each in faults.POINTS if each.startswith(program)])
        place = self._service.arm(point)
        deadline = time.monotonic() + seconds
        while place.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        place.unlink(missing_ok=True)

    def _extra(self) -> Place:
        return Place("reaper-extra", "reaper")

    def _freeze_broker(self, seconds: float) -> None:
        with frozen([self._service.broker.pid]):
            time.sleep(seconds)

    def _disturb(self, how: str, longest: float) -> None:
        self._database.disturb(how, self._chance.uniform(0.1, longest))

    def _flush(self) -> None:
        with suppress(redis.RedisError), self._service.broker.client() as client:
            client.flushall()

    def _cut_connections(self) -> None:
        with suppress(redis.RedisError), self._service.broker.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)

    def _stray_tickets(self) -> None:
        """Many more than there are jobs, and some that say nothing anybody knows."""
        queue = self._chance.choice([self._queue, keys.CPU_QUEUE])
        strange = ticket_message(queue).replace(b"neural_mri.ticket", b"neural_mri.riddle")
        with suppress(redis.RedisError), self._service.broker.client() as client:
            client.lpush(queue, *(ticket_message(queue) for _ in range(50)), strange)
