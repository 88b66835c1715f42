"""What scans are read against: measured once, found by everybody, measured again where it was lost."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import msgspec
import pytest
import torch

from neural_mri.backing import keys, storage, stored
from neural_mri.backing.database import Sessions
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import NamedBytes, Store, StoreUnavailable, Writing
from neural_mri.contract.problems import Conflict, Unavailable
from neural_mri.contract.scan_keys import calibration_key
from worker import calibrations as module
from worker.calibrations import Calibrations
from worker.residency import Residency
from worker.resident import Resident
from worker.scanner.calibration import Calibration
from worker.scanner.listening import Cancelled, Silent

T = TypeVar("T")


@pytest.fixture
def store(settings: Settings) -> Store:
    return storage.open_store(settings)


@pytest.fixture
def resident(
    settings: Settings, sessions: Sessions, store: Store, tiny: RegisteredModel
) -> Iterator[Resident]:
    held = Residency(settings, sessions, Calibrations(store))
    yield held.load("tiny")
    held.release(tiny.revision)


def own_key(resident: Resident) -> str:
    return calibration_key(
        revision=resident.registered.revision,
        tokenizer_digest=resident.registered.tokenizer_digest,
        numerics=resident.model.numerics,
    )


def same(one: Calibration, other: Calibration) -> bool:
    return all(
        table.equals(other.to_tables()[name], check_metadata=True)
        for name, table in one.to_tables().items()
    )


def test_a_model_that_is_loaded_has_its_calibration_in_the_store(
    resident: Resident, store: Store
) -> None:
    manifest = stored.load_manifest(store, keys.calibration_path(own_key(resident)))
    assert manifest.scan_key == own_key(resident)
    assert manifest.revision == resident.registered.revision
    assert {ref.name for ref in manifest.tables} >= {"calibration_means", "calibration_lens"}


def test_another_process_reads_it_and_measures_nothing(
    resident: Resident, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Calibrations(store).of(resident, None, Silent())

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(module, "calibrate", refuse)
    assert same(Calibrations(store).of(resident, None, Silent()), first)


def test_what_the_store_has_lost_is_measured_again_to_the_same_digits(
    resident: Resident, store: Store
) -> None:
    first = Calibrations(store).of(resident, None, Silent())
    path = keys.calibration_path(own_key(resident))
    manifest = stored.load_manifest(store, path)
    store.delete(keys.chunk_path(manifest.tables[0].chunk))
    again = Calibrations(store).of(resident, None, Silent())
    assert same(again, first)
    healed = stored.load_manifest(store, path)
    assert [ref.chunk for ref in healed.tables] == [ref.chunk for ref in manifest.tables]


def test_one_that_was_asked_for_by_its_key_and_is_lost_is_refused(
    resident: Resident, store: Store
) -> None:
    for calibrations in (Calibrations(store), Calibrations(store, lambda _key: None)):
        with pytest.raises(Conflict, match="f was deleted or is lost"):
            calibrations.of(resident, "f" * 64, Silent())


def test_one_that_a_job_has_measured_is_found_where_its_result_stands_and_nowhere_else(
    resident: Resident, store: Store
) -> None:
    own = keys.calibration_path(own_key(resident))
    found = Calibrations(store, lambda _key: own).of(resident, "e" * 64, Silent())
    assert same(found, Calibrations(store).of(resident, None, Silent()))
    store.put(keys.calibration_path("e" * 64), store.get(own))
    with pytest.raises(Conflict, match="was deleted or is lost"):
        Calibrations(store, lambda _key: None).of(resident, "e" * 64, Silent())


def test_a_database_that_is_away_for_a_moment_costs_no_scan(
    resident: Resident, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_PAUSE_SECONDS", 0.01)
    refusals = [Unavailable("away")]

    def result_of(_key: str) -> str:
        if refusals:
            raise refusals.pop()
        return keys.calibration_path(own_key(resident))

    found = Calibrations(store, result_of).of(resident, "e" * 64, Silent())
    assert same(found, Calibrations(store).of(resident, None, Silent()))


def test_one_of_other_weights_is_refused(resident: Resident, store: Store) -> None:
    own = stored.load_manifest(store, keys.calibration_path(own_key(resident)))
    other = msgspec.structs.replace(own, revision="0" * len(resident.registered.revision))
    store.put(keys.calibration_path("e" * 64), stored.sealed(other))
    with pytest.raises(Conflict, match="not of tiny's"):
        Calibrations(store).of(resident, "e" * 64, Silent())


class AwayFor:
    """A store that does not answer so often."""

    def __init__(self, store: Store, times: int) -> None:
        self._store = store
        self.left = times

    def get(self, path: str) -> bytes:
        return self._answering(lambda: self._store.get(path))

    def get_range(self, path: str, start: int, end: int) -> bytes:
        return self._answering(lambda: self._store.get_range(path, start, end))

    def begin(self, files: Iterable[NamedBytes]) -> Writing:
        return self._answering(lambda: self._store.begin(files))

    def _answering(self, call: Callable[[], T]) -> T:
        if self.left:
            self.left -= 1
            raise StoreUnavailable("away")
        return call()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_store_that_is_away_for_a_moment_costs_no_scan(
    resident: Resident, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STORE_PAUSE_SECONDS", 0.01)
    away = AwayFor(store, times=3)
    assert same(
        Calibrations(away).of(resident, None, Silent()),
        Calibrations(store).of(resident, None, Silent()),
    )
    assert away.left == 0


def test_a_store_that_stays_away_is_said_and_who_stops_does_not_wait_for_it(
    resident: Resident, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = AwayFor(store, times=10**6)
    monkeypatch.setattr(module, "STORE_PAUSE_SECONDS", 0.01)
    with pytest.raises(Cancelled):
        Calibrations(away).of(resident, None, Impatient())
    monkeypatch.setattr(module, "STORE_SECONDS", 0.05)
    with pytest.raises(StoreUnavailable):
        Calibrations(away).of(resident, None, Silent())


class Impatient(Silent):
    """Stops whatever it hears of."""

    def checkpoint(self) -> None:
        raise Cancelled


def test_a_load_that_is_cancelled_while_it_calibrates_holds_nothing(
    settings: Settings, sessions: Sessions, store: Store, tiny: RegisteredModel
) -> None:
    held = Residency(settings, sessions, Calibrations(store))
    with pytest.raises(Cancelled):
        held.load("tiny", Impatient())
    assert held.held() == ()
    assert held.get(tiny.revision) is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_a_model_that_cannot_be_calibrated_can_still_be_held(
    settings: Settings,
    sessions: Sessions,
    store: Store,
    tiny: RegisteredModel,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, "calibrate", no_memory)
    held = Residency(settings, sessions, Calibrations(store))
    held.load("tiny")
    assert held.get(tiny.revision) is not None
