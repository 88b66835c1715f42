"""From a ticket to the end of the jobs it brings: claim, perform, store, move.

Every move names its attempt; where the fence has fallen the attempt stops, and leaves nothing but chunks
under their own hash. Runs on one thread, the one that runs torch.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import NamedTuple, TypeVar
from uuid import UUID

import msgspec
import structlog
from sqlalchemy.orm import Session

from neural_mri.backing import events, jobs, keys, leftovers, models
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.faults import crash_point
from neural_mri.backing.jobs import Job, LeaseOwner
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.queue import take_back_tickets
from neural_mri.backing.saving import SavedResult, Saving, Unsaved
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import Store, StoreUnavailable
from neural_mri.backing.stored import discard
from neural_mri.backing.tracing import Span
from neural_mri.contract.events import Artifact
from neural_mri.contract.jobs import TERMINAL, JobKind, JobState
from neural_mri.contract.problems import ModelBusy, Problem, ProblemDocument, Unavailable
from neural_mri.contract.results import TableRef
from neural_mri.contract.scans import decode_scan
from worker import admission, metrics, scans
from worker.admission import OutOfMemory, halving, has_lost_device
from worker.calibrations import Calibrations
from worker.intake import Intake
from worker.interludes import Interludes, Lending
from worker.keeper import Holding, Keeper, LeaseLost
from worker.placing import Placing
from worker.refusals import InternalError, incident
from worker.reporter import Outbox, Reporter
from worker.residency import Residency
from worker.scanner.halving import ran_out
from worker.scanner.listening import Cancelled
from worker.scans import Performed, Scanned
from worker.traces import Traces

__all__ = ("Attempts", "Intake", "InternalError", "OutOfMemory")

DATABASE_PAUSE_SECONDS = 0.5
STORE_PAUSE_SECONDS = 0.5
STORE_SECONDS = 60.0
"""How long a result may wait for a store that does not take it."""
QUICK_STORE_SECONDS = 0.005
"""How long the ends of jobs may stand uncommitted until their results are there to stay."""
SLOW_STORE_SECONDS = 10.0
"""How long a store that took longer than that is taken to be slow."""
KNOWN_SECONDS = 1.0
"""How long a model that is asked for again counts as registered as it was."""
NO_RESULTS: Mapping[UUID, SavedResult] = MappingProxyType({})

T = TypeVar("T")

log = structlog.get_logger(__name__)


class _Load(NamedTuple):
    """What jobs that share a pass take together."""

    tokens: int
    bytes: int
    forwards: float
    """Work, in plain forwards of their prompts."""

    def plus(self, more: "_Load") -> "_Load":
        """With another job."""
        return _Load(
            self.tokens + more.tokens, self.bytes + more.bytes, self.forwards + more.forwards
        )

    def is_within(self, limit: "_Load") -> bool:
        """Whether one pass may take as much."""
        return all(each <= most for each, most in zip(self, limit, strict=True))


NOTHING = _Load(0, 0, 0.0)


class _Known(NamedTuple):
    """A model as it was registered a moment ago."""

    model: RegisteredModel
    until: float
    """How long that counts, on the monotonic clock."""


class _Ended(NamedTuple):
    """A job whose result is stored."""

    result: SavedResult
    job: Job | None
    """As it stands; None where it was no longer ours to move."""


class _NotYet(Exception):
    """Results are not there to stay."""


class Attempts:
    """Runs what this worker claims."""

    def __init__(
        self,
        *,
        settings: Settings,
        sessions: Sessions,
        store: Store,
        owner: LeaseOwner,
        keeper: Keeper,
        outbox: Outbox,
        residency: Residency,
        calibrations: Calibrations,
        intake: Intake,
        placing: Placing,
        redis: SyncRedis,
    ) -> None:
        self._settings = settings
        self._sessions = sessions
        self._store = store
        self._owner = owner
        self._keeper = keeper
        self._outbox = outbox
        self._residency = residency
        self._calibrations = calibrations
        self._intake = intake
        self._placing = placing
        self._redis = redis
        self._models_dir = settings.models_dir
        self._traces = Traces()
        self._known: dict[str, _Known] = {}
        self._store_slow_until = 0.0

    def take(self, queue: str) -> int:
        """Claim from a queue and run what was claimed; how many jobs that were.

        Often none: tickets are crude, and one too many is no matter. One for a model that has been
        released leaves the work to whoever holds the model. Raises what says that the device is lost
        (`admission.has_lost_device`), with the jobs still held: they are for a process that has one.
        """
        if queue == self._placing.queue:
            self._placing.act(Lending(self._interludes([])))
            return 0
        if queue not in self._residency.queues() or (
            queue == keys.CONTROL_QUEUE and self._placing.leave_to_others()
        ):
            log.info("ticket_not_served", queue=queue)
            return 0
        crash_point("worker.ticket")
        began = time.time()
        try:
            claimed = self._sessions.write(
                jobs.claim,
                queue=queue,
                owner=self._owner,
                limit=self._settings.batch_jobs,
                tokens=self._settings.batch_tokens,
                forwards=self._settings.batch_forwards,
                lease_seconds=self._settings.lease_seconds,
                starts=True,
            )
        except Unavailable as error:
            log.warning("nothing_claimed", queue=queue, error=str(error))
            return 0
        metrics.CLAIMS.labels("jobs" if claimed else "nothing").inc()
        crash_point("worker.claimed")
        if (mates := len(claimed) - 1) > 0:
            # They have a ticket each, on which nothing would be found any more.
            take_back_tickets(self._redis, queue, mates)
        self._run(claimed, began)
        return len(claimed)

    def _run(self, claimed: Sequence[Job], began: float) -> None:
        """Bring jobs, whose claim began at `began`, to their ends."""
        with ExitStack() as leases:
            leases.enter_context(self._traces.attempts(claimed, began=began))
            held = [leases.enter_context(self._keeper.holding(job)) for job in claimed]
            for together in self._passes(held):
                self._attempt(together)

    def _passes(self, held: Sequence[Holding]) -> Iterator[Sequence[Holding]]:
        """Mates of one claim, in as many passes as they need to stay within what one may take.

        Tokens, memory, and work: who asks for little waits for all that is measured beside it.
        """
        if len(held) < 2:
            yield from [held] if held else []
            return
        limit = _Load(
            self._settings.batch_tokens,
            max(0, self._placing.left()),
            self._settings.batch_forwards,
        )
        together, load = list[Holding](), NOTHING
        for holding in held:
            job = holding.job
            tokens = scans.rows_of(job) * job.n_tokens
            more = _Load(tokens, self._needed(job), job.estimated_cost / max(1, job.n_tokens))
            if together and not load.plus(more).is_within(limit):
                yield together
                together, load = [], NOTHING
            together.append(holding)
            load = load.plus(more)
        yield together

    def _attempt(self, together: Sequence[Holding]) -> None:
        """Bring jobs that share a pass to their ends."""
        started = time.perf_counter()
        metrics.PASS_JOBS.observe(len(together))
        self._share(self._begun(together))
        seconds = round(time.perf_counter() - started, 4)
        for holding in together:
            with _logged(holding.job):
                log.info(
                    "attempt_ended", kind=holding.job.kind, seconds=seconds, mates=len(together)
                )

    def _share(self, holdings: Sequence[Holding]) -> None:
        """Run jobs in one pass. One that spoils it is found by halves, and fails alone."""
        if len(holdings) == 1:
            self._guarded(holdings[0], self._perform)
            return
        left = list(holdings)

        def publish(early: Mapping[int, Performed]) -> None:
            """Those of whom all is measured while their mates go on."""
            these = [holdings[index] for index in early]
            for holding in these:
                left.remove(holding)
            self._publish(these, list(early.values()))

        try:
            scanned = self._scanned(holdings, publish) if holdings else []
        except Exception as error:
            if has_lost_device(error):
                raise
            log.warning("pass_split", jobs=len(left), reason=type(error).__name__)
            scanned = None
        if scanned is None:
            # Outside the handler: the error's frames hold memory that may have been too little.
            if len(left) < len(holdings):
                self._share(left)
                return
            middle = len(holdings) // 2
            self._share(holdings[:middle])
            self._share(holdings[middle:])
            return
        last = {id(holding): result for holding, result in zip(holdings, scanned, strict=True)}
        self._publish(left, [last[id(holding)] for holding in left])

    def _guarded(self, holding: Holding, work: Callable[[Holding], None]) -> bool:
        """Do one job's part, and end the job where that fails; whether it went well.

        The process's one broad except beside the halving: a job takes no other along. Raises what says that
        the device is lost: that ends no job, but the process.
        """
        with _logged(holding.job):
            end: tuple[JobState, ProblemDocument | None] | None = None
            try:
                work(holding)
            except LeaseLost:
                log.warning("lease_lost")
                self._outbox.lose(holding.job.id)
                return False
            except Cancelled:
                end = JobState.CANCELLED, None
            except Problem as problem:
                end = JobState.FAILED, problem.document()
            except Exception as error:
                if has_lost_device(error):
                    raise
                end = JobState.FAILED, _diagnosis(error).document()
            if end is None:
                return True
            # Outside the handlers: an error's frames hold the scan's memory, and who has said that it
            # stopped should have nothing left to do.
            self._end(holding, *end)
            return False

    def _begun(self, together: Sequence[Holding]) -> list[Holding]:
        """Those that are still ours, set to work."""
        for holding in together:
            job = holding.job
            self._tell(msgspec.structs.replace(job, state=JobState.CLAIMED))
            if job.state is not JobState.CLAIMED:
                self._traces.moved(job)
                self._tell(job)
        still = [each for each in together if each.job.state is JobState.CLAIMED]
        if not still:
            return list(together)
        loads = still[0].job.kind is JobKind.LOAD
        return self._moved(still, JobState.LOADING if loads else JobState.RUNNING)

    def _perform(self, holding: Holding) -> None:
        match holding.job.kind:
            case JobKind.SCAN:
                self._publish([holding], halving(lambda: self._scanned([holding])))
            case JobKind.LOAD:
                self._load(holding)
            case JobKind.UNLOAD:
                self._unload(holding)

    def _scanned(
        self,
        holdings: Sequence[Holding],
        ready: Callable[[Mapping[int, Performed]], None] = lambda _early: None,
    ) -> list[Performed]:
        """What jobs that share a pass measure, or what kept one from it alone.

        `ready` is given those that stand while others are still measured.
        """
        job, together = holdings[0].job, [holding.job for holding in holdings]
        interludes = self._interludes(holdings)
        self._residency.serve(job.revision)
        with (
            self._placing.admitted(job.revision, sum(map(self._needed, together))),
            self._traces.part("forward", together, {"neural_mri.mates": len(together)}) as spans,
        ):
            scanned = scans.perform(
                together,
                self._registered(job),
                self._residency.get(job.revision),
                baseline=self._baseline(job),
                calibrations=self._calibrations,
                models_dir=self._models_dir,
                listeners=[self._reporter(holding, interludes) for holding in holdings],
                ready=ready,
                lent_seconds=lambda: interludes.lent_seconds,
            )
            for span, one in zip(spans, scanned, strict=True):
                if isinstance(one, Scanned):
                    span.note({"neural_mri.forward_seconds": one.manifest.forward_seconds})
        return scanned

    def _needed(self, job: Job) -> int:
        """Bytes that a scan is estimated to need beside its model."""
        resident = self._residency.get(job.revision)
        if job.kind is not JobKind.SCAN or resident is None:
            return 0
        return admission.estimate(
            decode_scan(job.request),
            resident.registered.architecture,
            n_tokens=job.n_tokens,
            itemsize=resident.model.plain.dtype.itemsize,
        )

    def _interludes(self, holdings: Sequence[Holding]) -> Interludes:
        return Interludes(
            holdings,
            settings=self._settings,
            sessions=self._sessions,
            owner=self._owner,
            residency=self._residency,
            run=self._run,
        )

    def _reporter(self, holding: Holding, interludes: Interludes | None = None) -> Reporter:
        if interludes is None:
            return Reporter(self._outbox, holding.job.id, holding.check)
        return Reporter(self._outbox, holding.job.id, holding.check, interludes.pause)

    def _publish(self, holdings: Sequence[Holding], performed: Sequence[Performed]) -> None:
        """Store what jobs have measured, and say that it is there: what keeps one from it is its own."""
        results = {
            holding.job.id: result
            for holding, result in zip(holdings, performed, strict=True)
            if self._guarded(holding, partial(_raise, result)) and isinstance(result, Scanned)
        }
        measured = [holding for holding in holdings if holding.job.id in results]
        for holding in measured:
            manifest = results[holding.job.id].manifest
            metrics.FORWARD_SECONDS.labels(holding.job.model, manifest.kind.value).observe(
                manifest.forward_seconds
            )
        crash_point("worker.computed")
        wanted = [each for each in measured if self._guarded(each, Holding.check)]
        unsaved = [self._unsaved(each, results[each.job.id]) for each in wanted]
        with Saving(self._store, unsaved) as saving:
            moved = self._ended_meanwhile(wanted, saving) if saving.is_quick else None
            if moved is None:
                # Small files are there sooner than jobs are moved; else the disk works meanwhile.
                storing = wanted if saving.is_quick else self._moved(wanted, JobState.STORING)
                with self._traces.part("store", [holding.job for holding in storing]):
                    stored = self._stored(storing, results, saving)
                moved = self._ended(storing, stored)
        for result, ended in moved:
            if ended is None:
                self._take_away(result.path, result.manifest.scan_key)
                continue
            home = ended.view().links["result"]
            for ref in result.manifest.tables:
                artifact = Artifact(table=ref.name, url=f"{home}/{ref.name}", bytes=ref.bytes)
                self._outbox.post(ended.id, artifact)
            self._tell(ended)
        crash_point("worker.succeeded")

    def _ended_meanwhile(self, holdings: Sequence[Holding], saving: Saving) -> list[_Ended] | None:
        """End jobs while the disk writes their small results, and commit it once they are there to stay.

        Either takes about as long. None where the store is slow, or does not take one of them: nothing is lost then,
        but who else writes to SQLite has waited for `QUICK_STORE_SECONDS`.
        """
        if time.monotonic() < self._store_slow_until:
            return None
        with self._traces.part("store", [holding.job for holding in holdings]):
            placed = saving.place()
        if placed is None:
            return None
        crash_point("worker.named")
        saved = {holding.job.id: placed[_manifest_path(holding.job)] for holding in holdings}
        try:
            return self._succeeded(
                holdings, saved, stand=lambda: saving.settles(QUICK_STORE_SECONDS)
            )
        except _NotYet:
            self._store_slow_until = time.monotonic() + SLOW_STORE_SECONDS
            return None

    def _ended(
        self, holdings: Sequence[Holding], stored: Sequence[SavedResult | Exception]
    ) -> list[_Ended]:
        """End jobs by what became of storing their results: those that are stored, and how they stand."""
        crash_point("worker.named")
        saved = {}
        for holding, result in zip(holdings, stored, strict=True):
            if self._guarded(holding, partial(_raise, result)) and isinstance(result, SavedResult):
                saved[holding.job.id] = result
        return self._succeeded([each for each in holdings if each.job.id in saved], saved)

    def _succeeded(
        self,
        holdings: Sequence[Holding],
        saved: Mapping[UUID, SavedResult],
        stand: Callable[[], bool] = lambda: True,
    ) -> list[_Ended]:
        moved = self._advanced(holdings, JobState.SUCCEEDED, results=saved, stand=stand)
        return [_Ended(saved[holding.job.id], ended) for holding, ended in moved]

    def _stored(
        self, holdings: Sequence[Holding], results: Mapping[UUID, Scanned], saving: Saving
    ) -> list[SavedResult | Exception]:
        """What became of storing each job's result, if the store takes it within `STORE_SECONDS`.

        A disk that is full for a moment, or a bucket that is away, costs no scan what it has measured.
        """
        stored = saving.finish([_manifest_path(each.job) for each in holdings])
        give_up_at = time.monotonic() + STORE_SECONDS
        while True:
            left = [
                each
                for each in holdings
                if isinstance(stored[_manifest_path(each.job)], StoreUnavailable)
            ]
            if not left or time.monotonic() > give_up_at:
                break
            error = stored[_manifest_path(left[0].job)]
            log.warning("store_awaited", jobs=len(left), error=str(error))
            time.sleep(STORE_PAUSE_SECONDS)
            for holding in tuple(left):
                try:
                    holding.check()
                except Cancelled as stopped:
                    stored[_manifest_path(holding.job)] = stopped
                    left.remove(holding)
            unsaved = [self._unsaved(each, results[each.job.id]) for each in left]
            with Saving(self._store, unsaved) as again:
                stored |= again.finish([each.path for each in unsaved])
        return [stored[_manifest_path(each.job)] for each in holdings]

    def _take_away(self, path: str, scan_key: str) -> None:
        """Forget a result that no row names; where store or database is away it is left behind.

        Of a job that has been deleted meanwhile others may name it; where none does nobody else would ever look for it.
        """
        try:
            if self._sessions.read(leftovers.is_nobodys, path, scan_key):
                discard(self._store, path)
        except Unavailable as error:
            log.warning("result_left_behind", path=path, error=str(error))

    def _unsaved(self, holding: Holding, scanned: Scanned) -> Unsaved:
        job = holding.job
        return Unsaved(
            _manifest_path(job),
            scanned.manifest,
            scanned.tables,
            _counting(self._reporter(holding), len(scanned.tables)),
            keys.packed_path(job.id, job.attempt),
        )

    def _registered(self, job: Job) -> RegisteredModel | None:
        """The job's model as it is registered, or was a moment ago with the same weights."""
        known = self._known.get(job.model)
        if known is None or known.until < time.monotonic() or known.model.revision != job.revision:
            self._known.pop(job.model, None)
            model = self._insisting(lambda: self._sessions.look(models.get, job.model))
            if model is None:
                return None
            known = self._known[job.model] = _Known(model, time.monotonic() + KNOWN_SECONDS)
        return known.model

    def _baseline(self, job: Job) -> RegisteredModel | None:
        """The model that the job's scan compares with."""
        name = scans.baseline_of(job)
        if name is None:
            return None
        return self._insisting(lambda: self._sessions.read(models.get, name))

    def _load(self, holding: Holding) -> None:
        job = holding.job
        held_before = self._residency.get(job.revision) is not None
        reporter = self._reporter(holding, self._interludes([holding]))
        with self._traces.part("load", [job]):
            resident = self._placing.hold(job.model, reporter)
        revision = resident.registered.revision
        try:
            holding.check()
            self._move(holding, JobState.RUNNING)
            self._move(holding, JobState.STORING)
            self._want(job.model, wanted=True)
            self._keeper.beat()
            ended = self._advance(holding, JobState.SUCCEEDED)
        except Cancelled:
            if not held_before:
                self._placing.drop(revision)
            raise
        self._intake.open(keys.scan_queue(revision))
        self._tell(ended)

    def _unload(self, holding: Holding) -> None:
        job = holding.job
        if self._residency.is_pinned(job.revision):
            raise ModelBusy(
                f"{job.model} is pinned (NEURAL_MRI_PINNED_MODELS) and stays loaded",
                model=job.model,
            )
        # First, so that a worker that starts again meanwhile does not load it again.
        self._want(job.model, wanted=False)
        self._placing.let_go(job.revision)
        self._move(holding, JobState.STORING)
        self._tell(self._advance(holding, JobState.SUCCEEDED))

    def _want(self, name: str, *, wanted: bool) -> None:
        self._insisting(lambda: self._sessions.write(models.set_wanted, name, wanted))

    def _move(self, holding: Holding, to: JobState) -> None:
        """Move the job and say so. Raises `LeaseLost` where it is no longer ours to move."""
        self._tell(self._advance(holding, to))

    def _moved(self, holdings: Sequence[Holding], to: JobState) -> list[Holding]:
        """Move jobs and say so: those that were still ours to move."""
        ours = []
        for holding, moved in self._advanced(holdings, to):
            if moved is not None:
                self._tell(moved)
                ours.append(holding)
        return ours

    def _end(self, holding: Holding, to: JobState, problem: ProblemDocument | None = None) -> None:
        [(_, ended)] = self._advanced([holding], to, problem=problem)
        if ended is not None:
            self._tell(ended)

    def _advance(self, holding: Holding, to: JobState) -> Job:
        """The moved job. Raises `LeaseLost`."""
        [(_, moved)] = self._advanced([holding], to)
        if moved is None:
            raise LeaseLost(f"job {holding.job.id} is no longer held by its attempt")
        return moved

    def _advanced(
        self,
        holdings: Sequence[Holding],
        to: JobState,
        *,
        results: Mapping[UUID, SavedResult] = NO_RESULTS,
        problem: ProblemDocument | None = None,
        stand: Callable[[], bool] = lambda: True,
    ) -> list[tuple[Holding, Job | None]]:
        """Move jobs in one transaction; None for those that are no longer ours to move.

        Raises `_NotYet`, and moves none, where their results do not `stand` by then.
        """
        tries = count()

        def advance(session: Session, job: Job, *, again: bool) -> Job | None:
            attempt, result = job.attempt, results.get(job.id)
            manifest = None if result is None else result.path
            moved = jobs.advance(
                session,
                job.id,
                to,
                attempt=attempt,
                manifest=manifest,
                scan_key=None if result is None else result.manifest.scan_key,
                problem=problem,
            )
            if moved is None and again:
                # A database that goes away may have committed what it did not answer.
                return jobs.made(session, job.id, to, attempt=attempt, manifest=manifest)
            return moved

        def advance_all(session: Session) -> dict[UUID, Job | None]:
            again = next(tries) > 0
            # In one order, so that two who move some of the same jobs never wait for each other.
            in_order = sorted((holding.job for holding in holdings), key=lambda job: job.id)
            advanced = {job.id: advance(session, job, again=again) for job in in_order}
            if not stand():
                raise _NotYet
            return advanced

        moved = self._insisting(lambda: self._sessions.write(advance_all)) if holdings else {}
        for holding in holdings:
            job = moved[holding.job.id]
            if job is None:
                with _logged(holding.job):
                    log.warning("lease_lost")
                self._outbox.lose(holding.job.id)
            if job is None or to in TERMINAL:
                self._keeper.let_go(holding)
            if job is None:
                continue
            if to in TERMINAL:
                metrics.ENDED.labels(job.model, to.value).inc()
            self._traces.moved(job)
        return [(holding, moved[holding.job.id]) for holding in holdings]

    def _tell(self, job: Job) -> None:
        self._outbox.post(job.id, events.change_of(job))

    def _insisting(self, work: Callable[[], T]) -> T:
        """The result of a transaction, however long the database is away.

        There is nothing better to do: what was computed would be lost, and the fence decides in the end.
        """
        while True:
            try:
                return work()
            except Unavailable as error:
                log.warning("database_awaited", error=str(error))
                time.sleep(DATABASE_PAUSE_SECONDS)


def _raise(result: object, _holding: Holding) -> None:
    """Raise what kept a result from being measured, or stored."""
    if isinstance(result, Exception):
        raise result


def _logged(job: Job) -> AbstractContextManager[None]:
    """Log lines inside say whose they are."""
    trace = Span(job.traceparent).trace_id
    return structlog.contextvars.bound_contextvars(
        job_id=str(job.id),
        model=job.model,
        attempt=job.attempt,
        **({} if trace is None else {"trace_id": trace}),
    )


def _manifest_path(job: Job) -> str:
    """Where the manifest of the attempt that holds the job stands, unless its result is one file."""
    return keys.pieces_path(job.id, job.attempt)


def _counting(reporter: Reporter, total: int) -> Callable[[TableRef], None]:
    """Reports tables as they are stored, and stops between two of them."""
    done = 0

    def stored(_ref: TableRef) -> None:
        nonlocal done
        done += 1
        reporter.progress("store", done, total)
        reporter.checkpoint()

    return stored


def _diagnosis(error: Exception) -> Problem:
    """What the caller is told of an error that nobody foresaw; the log has the rest."""
    if ran_out(error):
        metrics.OUT_OF_MEMORY.labels("failed").inc()
        log.warning("out_of_memory", error=str(error))
        return OutOfMemory(
            "the worker's memory does not hold this scan: send a shorter prompt, or ask for less"
        )
    return incident("attempt_failed", error)
