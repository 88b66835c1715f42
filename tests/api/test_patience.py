"""A client of a service that is killed, restarted and full under it: every call is answered, nothing is done twice."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import Popen

import msgspec
import pytest

from neural_mri.backing import feeding, jobs, limits
from neural_mri.backing.settings import Settings
from neural_mri.client import Client, Refused
from neural_mri.client.diagnosing import ServiceScans
from neural_mri.contract.jobs import JobState
from neural_mri.contract.problems import TooMany
from neural_mri.contract.scans import ActivationScan
from tests.api.keyed import Door, keyed
from tests.api.processes import client_of, on_own_port, process
from tests.api.specimens import PROMPT
from tests.api.world import World, serving

SCAN = ActivationScan(prompt=PROMPT)


class Mortal:
    """An API process, and another in its place as soon as it has died."""

    def __init__(self, settings: Settings, opened: ExitStack, crash_points: Path) -> None:
        self._settings = settings
        self._opened = opened
        self.crash_points = crash_points
        self.running = self._start()
        self.lives = 1

    def __call__(self) -> None:
        """Wait for its death, and start another."""
        self.running.wait()
        self.running = self._start()
        self.lives += 1

    def _start(self) -> Popen[str]:
        environment = {"NMRI_CRASH_POINTS": str(self.crash_points)}
        return self._opened.enter_context(process(self._settings, **environment))


@pytest.fixture
def mortal(world: World, tmp_path: Path) -> Iterator[Mortal]:
    settings = on_own_port(world.settings)
    with ExitStack() as opened:
        service = Mortal(settings, opened, tmp_path)
        with client_of(settings):
            yield service


@pytest.fixture
def mri(mortal: Mortal) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{mortal._settings.port}", patience_seconds=120) as client:
        yield client


@contextmanager
def diligent(world: World, settings: Settings | None = None) -> Iterator[None]:
    """A worker beside the test that takes what waits, ticket or not, and a reaper that feeds batches."""
    ending = threading.Event()
    allowed = settings or world.settings

    def work() -> None:
        while not ending.is_set():
            for owner in world.sessions.read(feeding.owners_waiting):
                with suppress(TooMany):
                    world.sessions.write(
                        feeding.feed,
                        owner,
                        max_queued=allowed.max_queued_jobs,
                        usual=limits.usual(allowed),
                    )
            for job in world._claim(world.queue()):
                world.perform(job)
            ending.wait(0.01)

    with world.beside(work):
        try:
            yield
        finally:
            ending.set()


def under_way(world: World) -> int:
    return len(world.sessions.read(jobs.recent, "local"))


def test_an_answer_that_was_lost_with_the_service_is_given_by_the_next(
    world: World, mortal: Mortal, mri: Client
) -> None:
    mri.models()
    mortal.crash_points.joinpath("api.recorded").touch()
    with world.beside(mortal):
        job = mri.submit(SCAN)
    assert mortal.lives == 2
    assert not list(mortal.crash_points.iterdir())
    assert under_way(world) == 1
    (claimed,) = world._claim(world.queue())
    assert world.perform(claimed).id == job.id
    again = mri.submit(SCAN)
    assert (again.id != job.id, again.state, again.cached) == (True, JobState.SUCCEEDED, True)


def test_a_call_outlives_the_service_that_it_was_made_to(
    world: World, mortal: Mortal, mri: Client
) -> None:
    job = mri.submit(SCAN)
    mortal.running.kill()
    mortal.running.wait()
    with world.beside(mortal):
        assert mri.job(job).state is JobState.QUEUED
        assert mri.submit(ActivationScan(prompt="a")).state is JobState.QUEUED
    assert under_way(world) == 2


def test_a_hundred_scans_end_though_the_service_is_killed_in_their_midst(
    world: World, mortal: Mortal, mri: Client
) -> None:
    scans = [ActivationScan(prompt=f"a {n}") for n in range(100)]
    measured = []
    with ThreadPoolExecutor(1) as pool, diligent(world):
        for scanned in ServiceScans(mri, "tiny").scan(scans):
            measured.append(scanned)
            if len(measured) in (20, 70):
                mortal.running.kill()
                pool.submit(mortal)
    assert mortal.lives == 3
    assert len({each.scan_key for each in measured}) == len(scans)
    assert len(world.sessions.read(jobs.recent, "local", 200)) == len(scans)


@pytest.fixture
def door(shared_settings: Settings, world: World) -> Iterator[Door]:
    with keyed(shared_settings, user_max_jobs=2) as door:
        yield door


def refusals(client: Client, seen: Callable[[], None]) -> None:
    """Have it said when the client is refused."""

    def look(response: object) -> None:
        if getattr(response, "status_code", 0) == 429:
            seen()

    client._exchange._http.event_hooks["response"] = [look]


def test_who_may_have_no_more_under_way_waits_until_some_has_ended(
    door: Door, world: World
) -> None:
    key = door.key(world).key
    refused = threading.Event()

    def finish() -> None:
        assert refused.wait(30)
        world.perform(world.claim(world.queue()))

    with Client(door.url, api_key=key, patience_seconds=120) as mri:
        refusals(mri, refused.set)
        mri.submit(SCAN)
        mri.submit(ActivationScan(prompt="a"))
        with world.beside(finish):
            third = mri.submit(ActivationScan(prompt="b"))
        assert refused.is_set()
        assert third.state is JobState.QUEUED
        assert len(mri.jobs()) == 3


def sizes(mri: Client, world: World, n: int, settings: Settings | None = None) -> list[int]:
    """Of the batches, in order, that so many scans were sent as; every one of them is measured."""
    scans = [ActivationScan(prompt=f"c {k}") for k in range(n)]
    with diligent(world, settings):
        measured = list(ServiceScans(mri, "tiny").scan(scans))
    assert len({each.scan_key for each in measured}) == n
    return [batch.lines for batch in reversed(mri.batches.list())]


def test_a_diagnosis_asks_once_and_is_done_as_its_user_has_room(
    shared_settings: Settings, world: World
) -> None:
    few = msgspec.structs.replace(shared_settings, user_max_jobs=5)
    with keyed(shared_settings, user_max_jobs=5) as door:
        key = door.key(world).key
        with Client(door.url, api_key=key, patience_seconds=60) as mri:
            assert sizes(mri, world, 13, few) == [13]


def test_or_as_the_queue_has_room(shared_settings: Settings, world: World) -> None:
    full = msgspec.structs.replace(shared_settings, max_queued_jobs=4)
    with serving(full) as api, Client(str(api.base_url), patience_seconds=60) as mri:
        assert sizes(mri, world, 9, full) == [9]


def test_it_asks_for_no_more_at_once_than_one_request_may_hold(
    shared_settings: Settings, world: World
) -> None:
    brief = msgspec.structs.replace(shared_settings, max_batch_bytes=2000)
    with serving(brief) as api, Client(str(api.base_url), patience_seconds=60) as mri:
        several = sizes(mri, world, 40)
    assert sum(several) == 40
    assert max(several) < 40


def test_who_has_no_patience_is_told_that_there_is_no_room(door: Door, world: World) -> None:
    key = door.key(world).key
    with Client(door.url, api_key=key, patience_seconds=0.5) as mri:
        mri.submit(SCAN)
        mri.submit(ActivationScan(prompt="a"))
        with pytest.raises(Refused) as refused:
            mri.submit(ActivationScan(prompt="b"))
        assert refused.value.status == 429
        assert refused.value.retry_after_seconds == 1
        assert len(mri.jobs()) == 2
