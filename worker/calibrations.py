"""Calibrations of the models that this process holds: measured once, stored, read by whoever needs them.

A calibration's manifest stands in the store under its scan key, so any worker finds what any other has
measured; the store may lose it, and then it is measured again, to the same digits. Used by the task
thread alone.
"""

from collections import OrderedDict
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
import pyarrow as pa
import structlog
import torch

from neural_mri.backing import keys
from neural_mri.backing.saving import save_result
from neural_mri.backing.storage import Store
from neural_mri.backing.stored import open_result
from neural_mri.contract.problems import Conflict, Gone, Problem
from neural_mri.contract.results import Manifest, signed
from neural_mri.contract.scan_keys import SCANNER_VERSION, calibration_key
from neural_mri.contract.scans import CalibrationScan, ScanKind
from worker.resident import Resident
from worker.scanner.calibrating import calibrate
from worker.scanner.calibration import Calibration
from worker.scanner.listening import Listener, Timed

__all__ = ("Calibrations",)

KEPT = 4
"""Calibrations kept in memory; one takes some matrices of d_model x d_model."""

log = structlog.get_logger(__name__)


class _Kept(NamedTuple):
    """A calibration in memory, and whose it is."""

    revision: str
    calibration: Calibration


class Calibrations:
    """Where scans get what they are read against."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def prepare(self, resident: Resident, listener: Listener) -> None:
        """See to it that the model's own calibration is there before a person waits for it.

        A model that cannot be calibrated can still be scanned for what needs no calibration.
        """
        try:
            self.of(resident, None, listener)
        except (Problem, torch.OutOfMemoryError) as error:
            log.warning("not_calibrated", model=resident.registered.name, reason=str(error))

    def of(self, resident: Resident, wanted: str | None, listener: Listener) -> Calibration:
        """The calibration of that scan key, or the model's own, which is measured where it is missing.

        Raises `Conflict` where the store no longer has the one that was asked for, and what `calibrate`
        raises.
        """
        own = _own_key(resident)
        key = wanted or own
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].calibration
        found = self._stored(key, resident)
        if found is None:
            if key != own:
                raise Conflict(
                    f"the store has lost calibration {key}: calibrate the model with those texts again"
                )
            found = self._measured(key, resident, listener)
        self._kept[key] = _Kept(resident.registered.revision, found)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found

    def forget(self, revision: str) -> None:
        """Give back the memory of a model's calibrations; the store keeps them."""
        for key in [key for key, kept in self._kept.items() if kept.revision == revision]:
            del self._kept[key]

    def save(self, manifest: Manifest, tables: Mapping[str, pa.Table]) -> None:
        """Store what a calibration scan has measured, for scans that name its key."""
        save_result(self._store, keys.calibration_path(manifest.scan_key), manifest, tables)

    def _stored(self, key: str, resident: Resident) -> Calibration | None:
        try:
            result = open_result(self._store, keys.calibration_path(key))
            tables = {table.ref.name: result.read(table) for table in result.tables}
        except Gone:
            return None
        if result.manifest.revision != resident.registered.revision:
            raise Conflict(
                f"calibration {key} is of weights {result.manifest.revision[:16]}, not of "
                f"{resident.registered.name}'s",
                calibration=key,
            )
        return Calibration.from_tables(tables, resident.model.architecture)

    def _measured(self, key: str, resident: Resident, listener: Listener) -> Calibration:
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
        self.save(manifest, signed(measured.to_tables(), manifest))
        log.info(
            "model_calibrated", model=resident.registered.name, key=key, seconds=round(seconds, 2)
        )
        return measured


def _own_key(resident: Resident) -> str:
    return calibration_key(
        revision=resident.registered.revision,
        tokenizer_digest=resident.registered.tokenizer_digest,
        numerics=resident.model.numerics,
    )
