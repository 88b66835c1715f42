"""Which models this process holds.

Models are loaded and released on the task thread alone, one at a time; other threads only ask what is
held. Two registered names of equal weights are one model in memory.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import structlog
import torch

from neural_mri.backing import keys, models
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import HeldModel
from neural_mri.backing.faults import crash_point
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.settings import Settings
from neural_mri.contract.models import ModelState, Numerics
from neural_mri.contract.problems import UnknownModel
from worker import metrics
from worker.calibrations import Calibrations
from worker.memory import room_of_each
from worker.resident import Resident
from worker.scanner import loading
from worker.scanner.listening import Listener, Silent, Timed

__all__ = ("Residency", "device_class")

SILENT = Silent()

log = structlog.get_logger(__name__)


def device_class(settings: Settings) -> str:
    """`cpu` or `cuda`: where models are loaded."""
    if settings.device != "auto":
        return settings.device.partition(":")[0]
    return "cuda" if torch.cuda.is_available() else "cpu"


class Residency:
    """The models in this process's memory, by the digest of their weights."""

    def __init__(self, settings: Settings, sessions: Sessions, calibrations: Calibrations) -> None:
        self.device = device_class(settings)
        self._settings = settings
        self._dtype = settings.dtype
        self._models_dir = settings.models_dir
        self._sessions = sessions
        self._calibrations = calibrations
        self._pinned: set[str] = set()
        self._lock = threading.Lock()
        self._residents: dict[str, Resident] = {}
        self._served: set[str] = set()
        self._changing: dict[str, HeldModel] = {}

    def get(self, revision: str) -> Resident | None:
        """The model with these weights, if it is held."""
        return self._residents.get(revision)

    def queues(self) -> frozenset[str]:
        """The queues whose work this process can do now."""
        scan_queues = (keys.scan_queue(revision) for revision in tuple(self._residents))
        return frozenset({keys.CPU_QUEUE, keys.CONTROL_QUEUE, *scan_queues})

    def held(self) -> tuple[HeldModel, ...]:
        """What is held, and what is coming or going. Called by any thread."""
        with self._lock:
            resting = {
                revision: HeldModel(
                    name=resident.registered.name,
                    revision=revision,
                    state=ModelState.RESIDENT,
                    memory_bytes=resident.memory_bytes,
                    load_seconds=resident.load_seconds,
                    pinned=revision in self._pinned,
                    held_seconds=round(time.monotonic() - resident.loaded_at, 3),
                    has_served=revision in self._served,
                )
                for revision, resident in self._residents.items()
            }
            return tuple((resting | self._changing).values())

    def serve(self, revision: str) -> None:
        """Say that a job of these weights is being run: they have not been loaded in vain."""
        if revision in self._residents:
            self._served.add(revision)

    def is_pinned(self, revision: str) -> bool:
        """Whether these weights stay, whoever asks."""
        return revision in self._pinned

    def load(
        self,
        name: str,
        listener: Listener = SILENT,
        *,
        pin: bool = False,
    ) -> Resident:
        """Hold a registered model, calibrated. One that is held already stays as it is.

        `listener` hears of bytes, as stage `load`, then of the calibration where that is not stored yet,
        and may stop it. Raises `UnknownModel`, and `UnsupportedModel` when the model cannot be loaded or
        is not what it says. Where memory is lacking now, what `ran_out` knows.
        """
        registered = self._sessions.read(models.get, name)
        if registered is None:
            raise UnknownModel(f"no model {name!r} is registered", model=name)
        if pin:
            self._pinned.add(registered.revision)
        if resident := self.get(registered.revision):
            return resident
        listener.progress("load", 0, registered.weights_bytes)
        numerics = msgspec.structs.replace(
            registered.numerics, dtype=self._dtype, device=self.device
        )
        listener = Timed(listener)
        with self._announced(registered, ModelState.LOADING):
            crash_point("worker.loading")
            rooms = room_of_each(self._settings, self.device)
            model = loading.load(
                self._models_dir / registered.folder,
                numerics,
                [room.available for room in rooms],
                [room.total for room in rooms],
            )
            try:
                resident = Resident(
                    self._published(registered, numerics),
                    model,
                    model.memory_bytes,
                    main_bytes=model.main_bytes,
                )
                listener.progress("load", registered.weights_bytes, registered.weights_bytes)
                self._calibrations.prepare(resident, listener)
            except BaseException:
                model.release()
                raise
            seconds = round(listener.own_seconds, 3)
            resident = resident._replace(load_seconds=seconds, loaded_at=time.monotonic())
            with self._lock:
                self._residents[registered.revision] = resident
        metrics.LOAD_SECONDS.labels(name).observe(resident.load_seconds)
        log.info("model_loaded", model=name, memory_bytes=resident.memory_bytes)
        return resident

    def release(self, revision: str) -> None:
        """Give a model's memory back. Nothing happens when it is not held."""
        with self._lock:
            resident = self._residents.pop(revision, None)
            self._served.discard(revision)
        if resident is None:
            return
        with self._announced(resident.registered, ModelState.UNLOADING):
            self._calibrations.forget(revision)
            resident.model.release()
        metrics.RELEASED.labels(resident.registered.name).inc()
        log.info("model_released", model=resident.registered.name)

    def _published(self, registered: RegisteredModel, numerics: Numerics) -> RegisteredModel:
        """The registered model with the numerics it now runs with: scan keys are made of them."""
        if registered.numerics == numerics:
            return registered
        log.info("numerics_changed", model=registered.name, numerics=msgspec.to_builtins(numerics))
        fields = {**msgspec.structs.asdict(registered), "numerics": numerics}
        del fields["registered_at"]
        return self._sessions.write(models.register, **fields)

    @contextmanager
    def _announced(self, registered: RegisteredModel, state: ModelState) -> Iterator[None]:
        with self._lock:
            self._changing[registered.revision] = HeldModel(
                name=registered.name, revision=registered.revision, state=state
            )
        try:
            yield
        finally:
            with self._lock:
                del self._changing[registered.revision]
