"""Calibrations of the models that this process holds: measured once, stored, read by whoever needs them.

A model's own stands in the store under its scan key, so any worker finds what any other has measured; the
store may lose it, and then it is measured again, to the same digits. One that a job has measured is the job's
result, and is found for as long as a job names it: with the last of them somebody's texts are gone. Used by the
task thread alone.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

import msgspec
import pyarrow as pa
import structlog

from neural_mri.backing import keys
from neural_mri.backing.saving import save_result
from neural_mri.backing.storage import Store
from neural_mri.backing.stored import open_result
from neural_mri.contract.problems import Conflict, Gone, Problem, Unavailable
from neural_mri.contract.results import Manifest, signed
from neural_mri.contract.scan_keys import SCANNER_VERSION, calibration_key
from neural_mri.contract.scans import CalibrationScan, ScanKind
from worker.admission import give_back
from worker.resident import Resident
from worker.scanner.calibrating import calibrate
from worker.scanner.calibration import Calibration
from worker.scanner.halving import ran_out
from worker.scanner.listening import Listener, Timed

__all__ = ("Calibrations",)

KEPT = 4
"""Calibrations kept in memory; one takes some matrices of d_model x d_model."""
STORE_PAUSE_SECONDS = 0.5
STORE_SECONDS = 60.0
"""How long a scan waits for a store or a database that is away, as it would for one that does not take its result."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class _Kept(NamedTuple):
    """A calibration in memory, and whose it is."""

    revision: str
    calibration: Calibration


class Calibrations:
    """Where scans get what they are read against."""

    def __init__(self, store: Store, result_of: Callable[[str], str | None] | None = None) -> None:
        """`result_of` says where the result of a calibration job stands, by its scan key, while one names it.

        Without it there are no jobs: what they would have measured stands where the models' own do.
        """
        self._store = store
        self._result_of = result_of
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def prepare(self, resident: Resident, listener: Listener) -> None:
        """See to it that the model's own calibration is there before a person waits for it.

        A model that cannot be calibrated can still be scanned for what needs no calibration.
        """
        try:
            self._found(resident, None, listener, patience_seconds=0.0)
        except Exception as error:
            if not isinstance(error, Problem) and not ran_out(error):
                raise
            log.warning("not_calibrated", model=resident.registered.name, reason=str(error))
        else:
            return
        # Outside the handler: the error's frames hold what there may have been no room for.
        give_back()

    def of(self, resident: Resident, wanted: str | None, listener: Listener) -> Calibration:
        """The calibration of that scan key, or the model's own, which is measured where it is missing.

        Raises `Conflict` where the one that was asked for is there no more, and what `calibrate` raises.
        """
        return self._found(resident, wanted, listener, patience_seconds=STORE_SECONDS)

    def _found(
        self,
        resident: Resident,
        wanted: str | None,
        listener: Listener,
        *,
        patience_seconds: float,
    ) -> Calibration:
        own = _own_key(resident)
        key = wanted or own
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].calibration
        is_own = key == own
        found = _awaited(
            lambda: self._stored(key, resident, is_own=is_own), listener, patience_seconds
        )
        if found is None:
            if not is_own:
                raise Conflict(
                    f"calibration {key} was deleted or is lost: calibrate the model with those texts again"
                )
            found = self._measured(key, resident, listener, patience_seconds)
        self._kept[key] = _Kept(resident.registered.revision, found)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def forget(self, revision: str) -> None:
        """Give back the memory of a model's calibrations; the store keeps them."""
        for key in [key for key, kept in self._kept.items() if kept.revision == revision]:
            del self._kept[key]

    def measured(self, manifest: Manifest, tables: Mapping[str, pa.Table]) -> None:
        """See to it that scans which name a calibration scan's key find what it has measured."""
        if self._result_of is None:
            self._save(manifest, tables)

    def _save(self, manifest: Manifest, tables: Mapping[str, pa.Table]) -> None:
        save_result(self._store, keys.calibration_path(manifest.scan_key), manifest, tables)

    def _stored(self, key: str, resident: Resident, *, is_own: bool) -> Calibration | None:
        path: str | None = keys.calibration_path(key)
        if self._result_of is not None and not is_own:
            path = self._result_of(key)
        if path is None:
            return None
        try:
            result = open_result(self._store, path, whole=True)
            tables = {table.ref.name: result.read(table) for table in result.tables}
        except Gone:
            return None
        if result.manifest.kind is not ScanKind.CALIBRATION:
            return None
        if result.manifest.revision != resident.registered.revision:
            raise Conflict(
                f"calibration {key} is of weights {result.manifest.revision[:16]}, not of "
                f"{resident.registered.name}'s",
                calibration=key,
            )
        return Calibration.from_tables(tables, resident.model.architecture)

    def _measured(
        self, key: str, resident: Resident, listener: Listener, patience_seconds: float
    ) -> Calibration:
        listener = Timed(listener)
        request = CalibrationScan(model=resident.registered.name)
        measured = calibrate(resident.model, request, listener, prefix=resident.model.prefix)
        seconds = listener.own_seconds
        manifest = Manifest(
            scan_key=key,
            kind=ScanKind.CALIBRATION,
            model=resident.registered.name,
            revision=resident.registered.revision,
            numerics=resident.model.numerics,
            scanner_version=SCANNER_VERSION,
            request=msgspec.to_builtins(request),
            tables=(),
            created_at=datetime.now(UTC),
            forward_seconds=seconds,
            compute_seconds=seconds,
            memory_bytes=resident.memory_bytes,
        )
        tables = signed(measured.to_tables(), manifest)
        _awaited(lambda: self._save(manifest, tables), listener, patience_seconds)
        log.info(
            "model_calibrated", model=resident.registered.name, key=key, seconds=round(seconds, 2)
        )
        return measured


def _awaited(work: Callable[[], T], listener: Listener, patience_seconds: float) -> T:
    """What store and database answer, if they do so in time; who is asked to stop waits no longer."""
    give_up_at = time.monotonic() + patience_seconds
    while True:
        try:
            return work()
        except Unavailable as error:
            if time.monotonic() > give_up_at:
                raise
            log.warning("store_awaited", error=str(error))
        time.sleep(STORE_PAUSE_SECONDS)
        listener.checkpoint()


def _own_key(resident: Resident) -> str:
    return calibration_key(
        revision=resident.registered.revision,
        tokenizer_digest=resident.registered.tokenizer_digest,
        numerics=resident.model.numerics,
    )
