"""A storm: load and faults together, then a calm in which everything must come right."""

import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
from sqlalchemy import make_url

from neural_mri.backing import database as databases
from neural_mri.backing import keys
from neural_mri.backing.database import Sessions
from neural_mri.backing.settings import Settings
from neural_mri.contract.problems import Unavailable
from tests.chaos.clock import Clock, may_step
from tests.chaos.faults import Faults
from tests.chaos.load import Load
from tests.chaos.premises import Broker, Disk, Host, Postgresql, Sqlite, may_mount
from tests.chaos.relay import Relay
from tests.chaos.service import Place, Service
from tests.chaos.witness import Verdict, Witness
from tests.servers import Bucket, bucket, free_port
from tests.tiny import save_tiny_model

__all__ = ("Report", "Stage", "Storm", "staged", "weather")

LEASE_SECONDS = 2.0
DISK_MEGABYTES = 2048


class Storm(NamedTuple):
    """What is asked for."""

    jobs: int
    faults: int
    database: str = "sqlite"
    store: str = "folder"
    hosts: int = 1
    workers: int = 2
    seed: int = 0
    lease_seconds: float = LEASE_SECONDS
    quiet_seconds: float = 180.0
    """How long the calm may last before a job counts as lost."""
    minutes: float = 600.0
    """How long the storm may last: what has not been asked by then is not asked."""
    max_queued: int = 1_000_000
    only: str = ""
    """Of all faults those alone whose names this pattern finds."""

    @property
    def under_way(self) -> int:
        """How many jobs the clients like to have under way."""
        return max(50, min(400, self.jobs // 4))


class Stage(NamedTuple):
    """A service that stands, and what may be done to it."""

    service: Service
    database: Sqlite | Postgresql
    sessions: Sessions
    witness: Witness
    queue: str
    disk: Disk | None
    host: Host | None
    wires: Mapping[str, Relay]
    """What lies between the service and whatever it reaches over a network, by that one's name."""
    clocks: Mapping[str, Clock]
    """What the service and its broker go by, and what the database does."""


class Litter(NamedTuple):
    """What killed processes have left in the store."""

    halves: int
    """Files begun and not finished: the reaper takes them away when they are an hour old."""
    orphans: int
    """Results that no job names, of workers killed between the two: the reaper takes them away once a day."""


class Report(NamedTuple):
    """What came of it."""

    storm: Storm
    accepted: int
    batches: int
    """Of what was accepted: requests for many scans."""
    repeats: int
    seconds: float
    calm_seconds: float
    """From the last fault until the last job had ended."""
    done: dict[str, int]
    births: int
    litter: Litter
    verdict: Verdict
    wrong: list[str]

    def __str__(self) -> str:
        states = ", ".join(
            f"{count} {state}" for state, count in sorted(self.verdict.states.items())
        )
        faults = ", ".join(f"{count} x {name}" for name, count in sorted(self.done.items()))
        attempts = f"{self.verdict.claims} claims, at most {self.verdict.most_attempts} of one job"
        said = [
            f"{self.accepted} accepted, {self.batches} batches among them, {self.repeats} requests sent again; {states}",
            f"{sum(self.done.values())} faults in {self.seconds:.0f} s: {faults}",
            f"{self.births} processes started; {attempts}; calm after {self.calm_seconds:.1f} s",
            f"left: {self.litter.halves} halves of files, {self.litter.orphans} results nobody names",
            f"wrong: {len(self.wrong)}",
            *self.wrong[:40],
        ]
        return "\n".join(said)


@contextmanager
def staged(storm: Storm) -> Iterator[Stage]:
    """The service on its feet, with a tiny model. Everything is gone when the block is left."""
    from worker import modelstore

    with ExitStack() as undo:
        # Asked to end, it ends what it has begun.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        undo.callback(signal.signal, signal.SIGTERM, before)
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nmri-chaos-")))
        data = folder / "data"
        data.mkdir()
        host = None
        address = "127.0.0.1"
        if storm.hosts == 2:
            host = Host()
            undo.callback(host.stop)
            host.start()
            address = host.here
        disk = None
        if storm.store == "folder" and may_mount():
            disk = Disk(data / "results", DISK_MEGABYTES)
            disk.folder.mkdir()
            undo.enter_context(disk.mounted())
        clocks = {}
        if may_step():
            # PostgreSQL's user must reach them, so they do not lie in our own folder.
            tower = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nmri-clock-")))
            tower.chmod(0o755)
            named = ("service",) if storm.database == "sqlite" else ("service", "database")
            clocks = {name: Clock(tower / name) for name in named}
        times = {name: clock.environment for name, clock in clocks.items()}
        database = (
            Sqlite(data)
            if storm.database == "sqlite"
            else Postgresql(folder, data, address, free_port(), times.get("database", {}))
        )
        undo.callback(database.kill)
        database.start()
        broker = Broker(folder, address, free_port(), times.get("service", {}))
        own = database.settings
        if storm.store == "s3":
            # The calibration and what the storm's own people read come to the bucket straight.
            own = msgspec.structs.replace(own, **_in(undo.enter_context(bucket())))
        wires = _wires(own, broker, address)
        for wire in wires.values():
            undo.callback(wire.stop)
            wire.start()
        settings = msgspec.structs.replace(
            _over(wires, own),
            redis_url=f"redis://{address}:{wires['broker'].port}/0",
            port=free_port(),
            default_model="tiny",
            pinned_models="tiny",
            device="cpu",
            threads=1,
            lease_seconds=storm.lease_seconds,
            reaper_interval_seconds=0.1,
            max_queued_jobs=storm.max_queued,
            log_format="json",
        )
        tiny = modelstore.add(settings, "tiny", f"folder:{save_tiny_model(folder / 'tiny')}")
        sessions = databases.sessions(own)
        undo.callback(sessions.close)
        witness = Witness(sessions, own)
        witness.install()
        service = Service(settings, broker, _places(storm, host), folder, times.get("service", {}))
        undo.enter_context(service)
        # The calibration is measured once, by whoever is first.
        service.wait_until_ready(storm.workers)
        yield Stage(
            service,
            database,
            sessions,
            witness,
            keys.scan_queue(tiny.revision),
            disk,
            host,
            wires,
            clocks,
        )


def _in(store: Bucket) -> dict[str, str]:
    """Settings of a service whose results are in a bucket."""
    return {"store_url": store.url("storm"), "store_endpoint": store.endpoint}


def _wires(own: Settings, broker: Broker, address: str) -> dict[str, Relay]:
    """One to each server, by what it serves."""
    targets = {"broker": broker.port}
    if own.database_url:
        targets["database"] = make_url(own.database_url).port or 0
    if own.store_endpoint:
        targets["bucket"] = urlsplit(own.store_endpoint).port or 0
    return {name: Relay(address, free_port(), target) for name, target in targets.items()}


def _over(wires: Mapping[str, Relay], own: Settings) -> Settings:
    """The settings of who reaches the servers over these wires."""
    changes = {}
    if wire := wires.get("database"):
        url = make_url(own.database_url).set(port=wire.port)
        changes["database_url"] = url.render_as_string(hide_password=False)
    if wire := wires.get("bucket"):
        changes["store_endpoint"] = f"http://{wire.address}:{wire.port}"
    return msgspec.structs.replace(own, **changes)


def _places(storm: Storm, host: Host | None) -> list[Place]:
    """Workers on the second host where there is one, with a reaper of their own."""
    there = None if host is None else host.name
    places = [Place("api", "api"), Place("reaper", "reaper")]
    places += [Place(f"worker-{number}", "worker", there) for number in range(storm.workers)]
    if host is not None:
        places.append(Place("reaper-there", "reaper", there))
    return places


def weather(storm: Storm, tell: Callable[[str], None] = lambda _: None) -> Report:
    """Have the storm pass over a service, and see what is left."""
    # So near the bound that lines of batches wait for room, and now and then somebody is sent away.
    with staged(storm._replace(max_queued=storm.under_way + 10)) as stage:
        load = Load(
            stage.service.url,
            seed=storm.seed,
            count=storm.jobs,
            clients=8,
            waiting=storm.under_way,
        )
        faults = Faults(
            stage.service,
            stage.database,
            seed=storm.seed,
            queue=stage.queue,
            store=stage.witness.store,
            disk=stage.disk,
            host=stage.host,
            wires=stage.wires,
            clocks=stage.clocks,
            only=storm.only,
        )
        began = time.monotonic()
        _rage(storm, stage, load, faults, tell)
        calm = time.monotonic()
        while _unfinished(stage.witness) != 0 and time.monotonic() - calm < storm.quiet_seconds:
            time.sleep(0.1)
        ended = time.monotonic()
        verdict, wrong, litter = _look_round(stage, load, faults)
        if wrong:
            tell(f"logs are in {_kept_logs(stage.service, faults)}")
        return Report(
            storm=storm,
            accepted=load.count,
            batches=len(load.batches),
            repeats=load.repeats,
            seconds=ended - began,
            calm_seconds=ended - calm,
            done=dict(faults.done),
            births=stage.service.births,
            litter=litter,
            verdict=verdict,
            wrong=wrong,
        )


def _rage(
    storm: Storm, stage: Stage, load: Load, faults: Faults, tell: Callable[[str], None]
) -> None:
    """Load and faults, which keep step with the jobs that have been taken in."""
    began = told = time.monotonic()
    load.start()
    while not load.is_over() and time.monotonic() - began < 60 * storm.minutes:
        under_way = _unfinished(stage.witness)
        if under_way is not None:
            load.hold_back(under_way)
        done = sum(faults.done.values())
        if done < storm.faults * min(1.0, (load.count + 1) / storm.jobs):
            faults.one()
        if time.monotonic() - told > 20:
            told = time.monotonic()
            tell(
                f"{told - began:7.0f} s  {load.count} accepted, {under_way} under way, "
                f"{done} faults"
            )
        time.sleep(0.02)
    while load.is_over() and sum(faults.done.values()) < storm.faults:
        faults.one()
        time.sleep(0.1)
    load.stop()
    faults.settle()


def _look_round(stage: Stage, load: Load, faults: Faults) -> tuple[Verdict, list[str], Litter]:
    """Stop everything, and see what is wrong."""
    service, witness = stage.service, stage.witness
    wrong = [*load.contradictions]
    with service.broker.client() as redis:
        # Strays are taken and found to mean nothing.
        deadline = time.monotonic() + 20
        while (leaks := witness.leaks(redis)) and time.monotonic() < deadline:
            time.sleep(0.2)
        wrong += leaks
        wrong += witness.told_wrongly(redis, load.accepted)
    service.stop()
    wrong += [f"process {pid} had to be killed" for pid in service.left_over]
    litter = Litter(len(witness.half_written()), len(witness.orphans()))
    witness.tidy()
    wrong += [f"half a file stays: {path}" for path in witness.half_written()]
    wrong += [f"a result that nobody names stays: {path}" for path in witness.orphans()]
    verdict = witness.verdict(load.accepted, faults.spoilt)
    wrong += [*verdict.wrong, *witness.wrong_with_batches(load.batches)]
    return verdict, wrong, litter


def _kept_logs(service: Service, faults: Faults) -> Path:
    kept = Path(tempfile.mkdtemp(prefix="nmri-storm-"))
    for name, text in service.logs().items():
        (kept / f"{name}.log").write_text(text)
    (kept / "faults.log").write_text("\n".join(faults.log))
    return kept


def _unfinished(witness: Witness) -> int | None:
    try:
        return witness.unfinished()
    except Unavailable:
        return None
