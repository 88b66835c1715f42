"""What this worker holds, decided: loads what is asked for, lets go what is in the way.

The decisions are `backing.placement`'s, the claims `backing.residences`'. A thread looks about once a
second; where there is something to do, it puts a ticket into the worker's own queue, because models are
loaded and released by the task thread alone, between jobs.

A model that cannot be loaded is said to be so to everybody who waits for it, unless another worker has it:
nobody waits for what will not come (`worker.refusals`).
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import structlog

from neural_mri.backing import events, keys, models, placement, residences
from neural_mri.backing.broker import AWAY, SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import HeldModel
from neural_mri.backing.leases import LeaseOwner
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.placement import Cost, Held, Move, Policy, WorkerRoom
from neural_mri.backing.queue import send_tickets
from neural_mri.backing.residences import Claim
from neural_mri.backing.settings import Settings
from neural_mri.contract.models import ModelState
from neural_mri.contract.problems import Problem, Unavailable, UnknownModel
from worker import metrics
from worker.admission import OutOfMemory, give_back, shown
from worker.ending import end_process
from worker.intake import Intake
from worker.memory import Memory
from worker.refusals import Refusals, Seen, incident, too_large
from worker.reporter import Outbox
from worker.residency import Residency
from worker.resident import Resident
from worker.rooms import are_all_loaded, held_as, room_of
from worker.scanner.halving import has_lost_device, ran_out
from worker.scanner.listening import Listener, Silent, Timed

__all__ = ("LoadsKillWorkers", "Placing")

LOOK_SECONDS = 1.0
POKED_SECONDS = 5.0
"""When a ticket to oneself counts as lost."""
RETRY_SECONDS = 5.0
"""When a load is tried again that a database was away for."""
AVOIDED_SECONDS = 60.0
"""When a load is tried again that has failed here, while others may do better."""
QUEUE_SECONDS = 60
"""When the own queue is forgotten: its worker may have died."""
GUESSED_LOW = 1.5
"""What a model is taken to need, in what it was, once loading it has run out of memory."""

SILENT = Silent()

log = structlog.get_logger(__name__)


class LoadsKillWorkers(Problem):
    """Every worker that loaded this model was lost."""

    status = 500


class Placing:
    """One worker's part in placing models. Use as a context manager round its whole life."""

    def __init__(
        self,
        *,
        settings: Settings,
        sessions: Sessions,
        redis: SyncRedis,
        owner: LeaseOwner,
        worker: str,
        residency: Residency,
        memory: Memory,
        intake: Intake,
        outbox: Outbox,
        beat: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._redis = redis
        self._owner = owner
        self._worker = worker
        self._residency = residency
        self._memory = memory
        self._intake = intake
        self._beat = beat
        self._refusals = Refusals(settings=settings, sessions=sessions, owner=owner, outbox=outbox)
        self._policy = Policy(
            settings.model_residence_seconds,
            settings.model_patience_seconds,
            settings.model_demand_seconds,
        )
        self.queue = keys.placement_queue(worker)
        """Where a ticket asks this worker to `act`."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="placing", daemon=True)
        self._lock = threading.Lock()
        self._withdrawn: frozenset[str] = frozenset()
        self._renew_at = 0.0
        self._poked_at = -POKED_SECONDS
        self._loading: Timed | None = None
        self._avoided: dict[str, float] = {}
        """Weights that are not loaded on demand before a time on the monotonic clock."""
        self._in_use: list[str] = []
        """Models that scans run on: more than one where a short scan runs inside a long one."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.set()
        self._thread.join(timeout=POKED_SECONDS)
        for model in self._residency.held():
            self._quietly(residences.release, model.revision)

    # On the task thread.

    def begin(self) -> None:
        """Hold the pinned models, and those of the wanted ones that nobody holds and that fit.

        Raises what a pinned model's load does; a wanted one may have gone bad since.
        """
        for name in self._settings.pinned:
            self._load_alone(name, self._registered(name).revision, SILENT, pin=True)
        for model in self._sessions.read(models.all):
            if not model.wanted or model.name in self._settings.pinned:
                continue
            if self._cost(model).memory_bytes > self.room().free_bytes:
                log.warning("wanted_model_not_loaded", model=model.name, reason="no room")
                continue
            if not self._claim(model.revision, copies=1).is_granted:
                continue
            try:
                self._load(model.name, model.revision, SILENT)
            except Problem as problem:
                log.warning("wanted_model_not_loaded", model=model.name, reason=problem.detail)
            except Exception as error:
                if has_lost_device(error):
                    raise
                log.exception("wanted_model_not_loaded", model=model.name)
            else:
                continue
            give_back()

    def act(self, listener: Listener = SILENT) -> None:
        """Let go and load what should be let go and loaded now; most often nothing.

        A load is told to the listener, and pauses as it does.
        """
        self._poked_at = -POKED_SECONDS
        with self._lock:
            withdrawn, self._withdrawn = self._withdrawn, frozenset()
        for revision in withdrawn:
            self.drop(revision)
        try:
            seen = self._look()
            if self._refusals.due(seen):
                give_back()  # before it is said that there is too little
                seen = self._look()
            for refused in self._refusals.due(seen):
                self._refusals.refuse(refused.revision, refused.problem)
                self._forget_guess(refused.revision)
            move = self._next_move(seen)
            if move is not None:
                self._make(move, seen, listener)
        except Unavailable as error:
            log.warning("nothing_placed", error=str(error))

    def hold(self, name: str, listener: Listener) -> Resident:
        """Hold a model because somebody asks for it by name; what is in least demand makes room.

        Raises `OutOfMemory` where it fits in beside the pinned models by no means, and what
        `Residency.load` does.
        """
        registered = self._registered(name)
        if resident := self._residency.get(registered.revision):
            return resident
        for held in self._in_its_way(registered):
            self._evict(held.revision, in_favour_of=name)
        return self._load_alone(name, registered.revision, listener)

    def _load_alone(
        self, name: str, revision: str, listener: Listener, *, pin: bool = False
    ) -> Resident:
        """Claim and load a model, whoever has it; where memory runs out, once more without any that is not pinned.

        Raises `OutOfMemory` where that does not help.
        """
        others = list[Held]()
        while True:
            for held in others:
                self._evict(held.revision, in_favour_of=name)
            self._claim(revision, copies=None)
            try:
                return self._load(name, revision, listener, pin=pin)
            except Exception as error:
                if not ran_out(error):
                    raise
                log.warning("out_of_memory", model=name, error=str(error).partition("\n")[0])
            # Outside the handler: the error's frames hold what there was no room for.
            metrics.OUT_OF_MEMORY.labels("load").inc()
            give_back()
            others = [held for held in self.room().held if not held.pinned]
            if not others:
                break
        raise OutOfMemory(
            f"memory ran out while {name} was loaded, beside the models that are pinned: a smaller model, or a "
            "worker with more memory is needed",
            model=name,
        )

    def _in_its_way(self, model: RegisteredModel) -> list[Held]:
        """What is let go for a model that is asked for by name. Raises `OutOfMemory` where that is not enough.

        What it was guessed to take, since loading it ran out of memory, keeps nobody from trying.
        """
        costs = [self._cost(model), self._cost(model, also_guessed=False)]
        for cost in costs:
            room = self.room()
            requests = self._requests(room)
            evicted = placement.evictions(
                room, cost.memory_bytes, requests, self._policy, at_once=True
            )
            if evicted is not None:
                return evicted
            give_back()
        raise too_large(model.name, costs[-1], [self.room()])

    def leave_to_others(self) -> bool:
        """Whether the next request to load a model is better left to another worker for a moment."""
        try:
            asked = self._sessions.read(residences.next_load)
            if asked is None:
                return False
            rooms, _ = self._rooms()
            cost = self._sessions.read(residences.costs, self._settings.dtype).get(asked.revision)
        except Unavailable:
            return False
        if cost is None or rooms[0].holds(asked.revision):
            return False
        if any(room.holds(asked.revision) for room in rooms):
            ahead = 1  # whoever holds it has it loaded already
        else:
            found = placement.offers(rooms, asked, cost, {}, self._policy, at_once=True)
            ahead = next(
                (at for at, offer in enumerate(found) if offer.worker == self._worker), len(found)
            )
        return asked.oldest_seconds < ahead * placement.HEAD_START_SECONDS

    def let_go(self, revision: str) -> None:
        """Give a model's memory back, because somebody asks for that: every worker's copy of it."""
        self.drop(revision)
        self._quietly(residences.ask_to_let_go, revision)

    def drop(self, revision: str) -> None:
        """Give the memory of this worker's copy back, unless it is pinned."""
        if self._residency.is_pinned(revision):
            return
        if self._residency.get(revision) is not None:
            self._intake.close(keys.scan_queue(revision))
        self._residency.release(revision)
        self._quietly(residences.release, revision)
        self._beat()

    @contextmanager
    def admitted(self, revision: str, n_bytes: int) -> Iterator[None]:
        """Run a scan that needs so much beside its model: others go where they are in its way.

        Raises `OutOfMemory` where it would not fit with all of them gone.
        """
        if n_bytes == 0:
            with self._memory.lent():
                yield
            return
        models_held = self._residency.held()
        held = sum(map(self._in_the_way, models_held))
        if not self._memory.has_amply(n_bytes, held):
            total, left = self._memory.for_scans(held)
            stays = sum(
                self._in_the_way(each)
                for each in models_held
                if each.pinned or each.revision == revision
            )
            if n_bytes > total - stays:
                raise OutOfMemory(
                    f"this scan takes about {shown(n_bytes)} beside its model, and this worker has "
                    f"{shown(max(0, total - stays))} for it: send a shorter prompt, or ask for less",
                    estimated_bytes=n_bytes,
                    budget_bytes=max(0, total - stays),
                )
            if n_bytes > left:
                room = self.room()
                self._make_room(room, n_bytes, left, beside={revision, *self._in_use})
        self._in_use.append(revision)
        try:
            with self._memory.lent():
                yield
        finally:
            self._in_use.remove(revision)

    def _make_room(self, room: WorkerRoom, n_bytes: int, left: int, *, beside: set[str]) -> None:
        others = tuple(
            each._replace(memory_bytes=self._in_the_way(each))
            for each in room.held
            if each.revision not in beside
        )
        beside_it = sum(each.memory_bytes for each in others)
        evicted = placement.evictions(
            WorkerRoom(room.worker, beside_it + left, left, others),
            n_bytes,
            self._requests(room),
            self._policy,
            at_once=True,
        )
        # Where that is not enough the scan tries with what there is: it was only an estimate.
        for each in others if evicted is None else evicted:
            self._evict(each.revision, in_favour_of="a scan")

    def left(self) -> int:
        """Bytes that a scan could have now."""
        return self._memory.for_scans(sum(map(self._in_the_way, self.room().held))).available

    def _in_the_way(self, model: HeldModel | Held) -> int:
        """Bytes that scans would have if a model went: of a spread one what is on the first GPU."""
        resident = self._residency.get(model.revision)
        if resident is not None and self._memory.is_of_several:
            return resident.main_bytes
        return model.memory_bytes or 0

    # On any thread.

    def room(self) -> WorkerRoom:
        """What this worker holds, and what more it could."""
        return self._own_room({}, {})

    # What there is to see.

    def _look(self) -> Seen:
        settings = self._settings
        demands = self._sessions.read(
            residences.demands,
            self._policy.demand_seconds,
            also_unwanted=settings.load_on_demand,
            pinned=settings.pinned,
        )
        costs = self._sessions.read(residences.costs, settings.dtype)
        waiting = {demand.revision: demand.waiting for demand in demands}
        rooms, are_all_heard = self._rooms(waiting, costs)
        return Seen(rooms, tuple(demands), costs, are_all_heard)

    def _rooms(
        self, waiting: Mapping[str, int] | None = None, costs: Mapping[str, Cost] | None = None
    ) -> tuple[tuple[WorkerRoom, ...], bool]:
        waiting, costs = waiting or {}, costs or {}
        own = self._own_room(waiting, costs)
        try:
            beats = events.heartbeats(self._redis)
        except AWAY:
            return (own,), False
        others = (room_of(beat, waiting, costs) for beat in beats if beat.worker != self._worker)
        return (own, *(room for room in others if room is not None)), True

    def _own_room(self, waiting: Mapping[str, int], costs: Mapping[str, Cost]) -> WorkerRoom:
        models_held = self._residency.held()
        held = tuple(held_as(model, waiting, costs) for model in models_held)
        room = self._memory.for_models(sum(each.memory_bytes for each in held))
        resting = self._memory.is_resting and are_all_loaded(models_held)
        return WorkerRoom(self._worker, room.total, room.available, held, resting)

    def _requests(self, room: WorkerRoom) -> dict[str, float]:
        """What is asked of the models that this worker holds."""
        try:
            demands = self._sessions.read(residences.demands, self._policy.demand_seconds)
        except Unavailable:
            return {}
        held = {each.revision for each in room.held}
        return {each.revision: each.requests for each in demands if each.revision in held}

    def _registered(self, name: str) -> RegisteredModel:
        registered = self._sessions.read(models.get, name)
        if registered is None:
            raise UnknownModel(f"no model {name!r} is registered", model=name)
        return registered

    def _cost(self, model: RegisteredModel, *, also_guessed: bool = True) -> Cost:
        dtype = self._settings.dtype
        costs = self._sessions.read(residences.costs, dtype, also_guessed=also_guessed)
        estimated = residences.estimate(model.n_parameters, model.weights_bytes, dtype)
        return costs.get(model.revision, estimated)

    def _next_move(self, seen: Seen) -> Move | None:
        now = time.monotonic()
        costs = {
            revision: cost
            for revision, cost in seen.costs.items()
            if self._avoided.get(revision, now) <= now
        }
        return placement.next_move(self._worker, seen.rooms, seen.demands, costs, self._policy)

    # Loading and letting go.

    def _make(self, move: Move, seen: Seen, listener: Listener) -> None:
        name = self._name_of(move)
        others = sum(room.holds(move.revision) for room in seen.rooms[1:])
        claim = self._claim(move.revision, copies=others + 1)
        if not claim.is_granted:
            return
        if claim.losses >= self._settings.max_attempts:
            self._quietly(residences.release, move.revision)
            self._give_up(
                move,
                LoadsKillWorkers(
                    f"{claim.losses} workers were lost while they loaded {move.model}: it is not tried "
                    "again by itself; POST /api/model/load tries once more",
                    model=move.model,
                ),
            )
            return
        for revision in move.evicted:
            self._evict(revision, in_favour_of=move.model)
        try:
            self._load(name, move.revision, listener)
        except Unavailable as problem:
            log.warning("model_not_loaded", model=move.model, reason=problem.detail)
            self._avoid(move.revision, RETRY_SECONDS)
            return
        except Problem as problem:
            log.warning("model_not_loaded", model=move.model, reason=problem.detail)
            self._give_up(move, problem)
            return
        except Exception as error:
            if has_lost_device(error):
                raise
            if not ran_out(error):
                self._give_up(move, incident("load_failed", error))
                return
        else:
            log.info(
                "model_placed",
                model=move.model,
                evicted=len(move.evicted),
                is_copy=move.is_copy,
            )
            self._intake.open(keys.scan_queue(move.revision))
            return
        # Outside the handler: the error's frames hold what there was no room for.
        self._guess_higher(move, seen.costs[move.revision])

    def _give_up(self, move: Move, problem: Problem) -> None:
        """Say that a model is not to be had, unless others have it: then it is only not to be had here."""
        if move.is_copy or self._is_held_elsewhere(move.revision):
            self._avoid(move.revision, AVOIDED_SECONDS)
            return
        self._refusals.refuse(move.revision, problem)

    def _is_held_elsewhere(self, revision: str) -> bool:
        try:
            owners = self._sessions.read(residences.holders, revision)
        except Unavailable:
            return True  # nobody is refused for what is not known
        return any(owner != self._owner for owner in owners)

    def _avoid(self, revision: str, seconds: float) -> None:
        self._avoided[revision] = time.monotonic() + seconds

    def _name_of(self, move: Move) -> str:
        """A name that has the weights now: the one that was asked for may have others by now."""
        names = [
            model.name
            for model in self._sessions.read(models.all)
            if model.revision == move.revision
        ]
        return move.model if move.model in names or not names else names[0]

    def _load(self, name: str, revision: str, listener: Listener, *, pin: bool = False) -> Resident:
        """Load a model that this worker has claimed. What it raises has given the claim back."""
        self._loading = Timed(listener)
        try:
            resident = self._residency.load(name, self._loading, pin=pin)
        except BaseException:
            self._quietly(residences.release, revision)
            raise
        finally:
            self._loading = None
        self._quietly(
            residences.settle,
            revision,
            memory_bytes=resident.memory_bytes,
            load_seconds=resident.load_seconds,
        )
        self._beat()
        return resident

    def _claim(self, revision: str, *, copies: int | None) -> Claim:
        return self._sessions.write(residences.claim, revision, self._owner, copies=copies)

    def _evict(self, revision: str, *, in_favour_of: str) -> None:
        resident = self._residency.get(revision)
        if resident is None:
            return
        name = resident.registered.name
        metrics.EVICTED.labels(name).inc()
        log.info("model_evicted", model=name, in_favour_of=in_favour_of)
        self.drop(revision)

    def _quietly(self, work: Callable[..., None], revision: str, **details: float) -> None:
        """Tell the database what is so already; that it does not hear it now is made good in time."""
        arguments = (revision,) if work is residences.ask_to_let_go else (revision, self._owner)
        try:
            self._sessions.write(work, *arguments, **details)
        except Unavailable as error:
            log.warning("residence_not_told", revision=revision[:16], error=str(error))

    def _guess_higher(self, move: Move, cost: Cost) -> None:
        """Loading ran out of memory: the next worker to think of it should know that it takes more."""
        give_back()
        guess = self._guess(cost)
        metrics.OUT_OF_MEMORY.labels("load").inc()
        log.warning("out_of_memory", model=move.model, guessed_bytes=guess)
        try:
            self._sessions.write(residences.guess_memory, move.revision, guess)
        except Unavailable as error:
            log.warning("residence_not_told", revision=move.revision[:16], error=str(error))

    def _guess(self, cost: Cost) -> int:
        """What a model is taken to need that loading ran out of memory for, in bytes.

        Others may have stood in its way: all of them go before it is taken for larger than a worker.
        """
        guess = int(cost.memory_bytes * GUESSED_LOW)
        # Resting: what is there now counts, whoever has the rest.
        room = self.room()._replace(resting=True)
        has_others = any(not held.pinned for held in room.held)
        if has_others and room.could_have_bytes > cost.memory_bytes:
            return min(guess, room.could_have_bytes)
        return guess

    def _forget_guess(self, revision: str) -> None:
        """Who waited has been told what it was guessed to take; who asks later has it tried again, not at once."""
        try:
            if self._sessions.write(residences.forget_guess, revision):
                self._avoid(revision, AVOIDED_SECONDS)
        except Unavailable as error:
            log.warning("residence_not_told", revision=revision[:16], error=str(error))

    # On the watching thread.

    def _watch(self) -> None:
        try:
            while not self._closing.wait(LOOK_SECONDS):
                with self._tolerating():
                    self._renew()
                    self._poke()
        except Exception:
            # A worker that no longer sees what is asked for would keep everybody waiting.
            log.exception("placing_failed")
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    @contextmanager
    def _tolerating(self) -> Iterator[None]:
        try:
            yield
        except (Unavailable, *AWAY) as error:
            log.debug("nothing_seen", error=str(error))

    def _renew(self) -> None:
        loading = self._loading
        if loading is not None and loading.own_seconds > self._settings.job_deadline_seconds:
            log.error("load_unheeded", seconds=self._settings.job_deadline_seconds)
            end_process()
        if time.monotonic() < self._renew_at:
            return
        # Sooner than a claim ends, and soon enough for who asked for a model to be let go.
        self._renew_at = time.monotonic() + self._settings.lease_seconds / 2
        held = [model for model in self._residency.held() if model.state is ModelState.RESIDENT]
        missing = self._sessions.write(
            residences.renew, self._owner, [model.revision for model in held]
        )
        pinned = {model.revision for model in held if model.pinned}
        for model in held:
            if model.revision in missing & pinned:
                self._sessions.write(
                    residences.settle,
                    model.revision,
                    self._owner,
                    memory_bytes=model.memory_bytes or 0,
                    load_seconds=model.load_seconds or 0.0,
                )
        with self._lock:
            self._withdrawn |= missing - pinned

    def _poke(self) -> None:
        """Ask the task thread to act, where there is something to do."""
        if time.monotonic() - self._poked_at < POKED_SECONDS:
            return
        if not self._withdrawn:
            seen = self._look()
            if not self._refusals.due(seen) and self._next_move(seen) is None:
                return
        if send_tickets(self._redis, self.queue):
            self._redis.expire(self.queue, QUEUE_SECONDS)
            self._poked_at = time.monotonic()
