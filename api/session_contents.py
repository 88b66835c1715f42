"""What a session is to hold, resolved: scans by their jobs become scans by their results' hashes.

A result's manifest is copied under its own hash, and so are tables that stand in the job's files, so that a
session needs neither the job's row nor those files: to open one takes the database and the store, and nothing that
computes.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import msgspec
from sqlalchemy.orm import Session

from api.dependencies import Services
from api.results import opened, reading
from neural_mri.backing import (
    jobs,
    kept_results,
    keys,
    session_arrivals,
    session_revisions,
    sessions,
)
from neural_mri.backing.records import Job
from neural_mri.backing.session_arrivals import Settled, Settling, Waiting
from neural_mri.backing.session_revisions import Opened, Saved
from neural_mri.backing.storage import Damaged, Missing, NamedBytes, Store, put_together
from neural_mri.backing.stored import StoredResult, StoredTable, by_itself
from neural_mri.contract.archives import result_digest
from neural_mri.contract.jobs import TERMINAL, JobKind, JobState
from neural_mri.contract.problems import (
    Gone,
    ProblemDocument,
    ResultNotReady,
    Unavailable,
)
from neural_mri.contract.results import Manifest, TableRef
from neural_mri.contract.sessions import (
    Arrival,
    KeyImage,
    NoSuchScan,
    Note,
    SavedScan,
    ScanArrived,
    SessionContent,
    SessionDocument,
    SessionEvent,
    SessionSaved,
    check_views,
)

__all__ = (
    "Kept",
    "add_scan",
    "arriving",
    "content_of",
    "keeping_sessions",
    "kept",
    "opened_at",
    "put_result",
    "saved_scan",
    "settle_all",
    "settle_job",
    "tell_saved",
)


SETTLED_AT_ONCE = 50
"""Scans that join their sessions in one transaction."""
KEPT_AT_ONCE = 8
"""Results that are put in their place side by side: each waits for the disk or the bucket."""

T = TypeVar("T")


class Kept(NamedTuple):
    """A result that a session keeps."""

    digest: str
    path: str
    body: bytes
    """Of its manifest."""
    manifest: Manifest

    def table(self, ref: TableRef) -> StoredTable:
        """Where one of its tables is."""
        return by_itself(self.path, ref)


_manifest = msgspec.json.Decoder(Manifest)


def kept(store: Store, digest: str) -> Kept:
    """A kept result. Raises `Missing`, `Damaged`."""
    path = keys.kept_result_path(digest)
    try:
        body = store.get(path)
    except Missing as missing:
        path = keys.once_kept_result_path(digest)
        try:
            body = store.get(path)
        except Missing:
            raise missing from None
    if result_digest(body) != digest:
        raise Damaged(f"{path} holds bytes whose hash is {result_digest(body)}", path=path)
    return Kept(digest, path, body, _manifest.decode(body))


async def saved_scan(services: Services, job: Job, label: str) -> SavedScan:
    """A job's result, kept from now on. Raises `ResultNotReady`, and `Gone` where bytes are missing."""
    await services.sessions.write(kept_results.expect, [await _digest_of(services, job)])
    return msgspec.structs.replace(await _kept_scan(services, job), label=label)


async def _digest_of(services: Services, job: Job) -> str:
    """What a job's result will be kept as. Raises `ResultNotReady`, `Gone`."""
    return result_digest((await opened(services, job)).body)


async def _kept_scan(services: Services, job: Job) -> SavedScan:
    """A job's result, which was expected. Raises as `saved_scan` does."""
    found = await reading(services, job, partial(_keep, services.store), whole=True)
    if found is None:
        raise Gone(f"some bytes of job {job.id}'s result are missing: scan again", job=str(job.id))
    return _saved(found, "", msgspec.json.decode(job.request))


def _keep(store: Store, result: StoredResult) -> Kept | None:
    """Put a result where nothing but its content names it; None where bytes are missing. Raises `Damaged`."""
    if not result.is_whole():
        return None
    digest = result_digest(result.body)
    path = keys.kept_result_path(digest)
    kept = Kept(digest, path, result.body, result.manifest)
    for table in result.tables:
        if table.path != result.path:
            store.copy(table.path, kept.table(table.ref).path)
    put_result(store, kept.digest, kept.body, _copied(result, kept))
    return kept


def put_result(store: Store, digest: str, body: bytes, tables: Iterable[NamedBytes]) -> None:
    """Keep a result, by its manifest and those of its tables that may not be there. Raises `StoreFull`."""
    # The manifest last: a result that is there is whole.
    put_together(store, chain(tables, [NamedBytes(keys.kept_result_path(digest), body)]))


def _copied(result: StoredResult, kept: Kept) -> list[NamedBytes]:
    """Tables that go with the job's file. Raises `Damaged` before one is sent: a bucket has it at once."""
    return [
        NamedBytes(kept.table(table.ref).path, result.bytes_of(table))
        for table in result.tables
        if table.path == result.path
    ]


def _saved(found: Kept, label: str, request: dict[str, Any] | None = None) -> SavedScan:
    manifest = found.manifest
    return SavedScan(
        result=found.digest,
        scan_key=manifest.scan_key,
        kind=manifest.kind,
        model=manifest.model,
        revision=manifest.revision,
        request=manifest.request if request is None else request,
        label=label,
    )


async def content_of(
    services: Services,
    wanted: SessionContent,
    *,
    parent: str | None = None,
    session_id: UUID | None = None,
) -> SessionDocument:
    """The document of what somebody wants kept.

    Raises `NoSuchScan` for what the session does not have, `NestedTooDeeply`, `UnknownJob`, `ResultNotReady` and
    `Gone`.
    """
    check_views(wanted)
    known = await _known(services, session_id)
    scans: dict[str, SavedScan] = {}
    named: dict[str, str] = {}
    for reference in wanted.scans:
        if reference.job is not None:
            job = await services.job(reference.job)
            scan = await saved_scan(services, job, reference.label)
            named[str(reference.job)] = scan.result
        else:
            digest = str(reference.result)
            found = known.get(digest) or await _held(services, session_id, digest)
            scan = msgspec.structs.replace(found, label=reference.label)
        if scan.result in scans:
            raise NoSuchScan(
                f"scans name the result {scan.result} twice: a session holds each once",
                result=scan.result,
            )
        scans[scan.result] = scan
    named |= {digest: digest for digest in scans}
    return SessionDocument(
        parent=parent,
        scans=tuple(scans.values()),
        perturbations=wanted.perturbations,
        notes=tuple(_placed(note, named) for note in wanted.notes),
        key_images=tuple(_placed(image, named) for image in wanted.key_images),
        view=wanted.view,
    )


async def _known(services: Services, session_id: UUID | None) -> Mapping[str, SavedScan]:
    if session_id is None:
        return {}
    opened = await services.sessions.read(session_revisions.opened, session_id)
    document = session_revisions.decode_document(opened.document)
    return {scan.result: scan for scan in document.scans}


async def _held(services: Services, session_id: UUID | None, digest: str) -> SavedScan:
    """A scan of an earlier revision. Raises `NoSuchScan`."""
    if session_id is None or not await services.sessions.read(sessions.holds, session_id, digest):
        raise NoSuchScan(
            f"no revision of the session holds the result {digest}: name a new scan by its job",
            result=digest,
        )
    return _saved(await asyncio.to_thread(kept, services.store, digest), "")


def _placed(what: Note | KeyImage, named: Mapping[str, str]) -> Any:
    """A note or picture, its scan named by its result."""
    if what.scan is None:
        return what
    if what.scan not in named:
        raise NoSuchScan(
            f"a note or key image is about {what.scan}, which is none of the session's scans",
            scan=what.scan,
        )
    return msgspec.structs.replace(what, scan=named[what.scan])


# Scans on their way


async def add_scan(services: Services, session_id: UUID, job: Job, label: str) -> Saved | None:
    """Add a scan of the caller's; None where it is still on its way.

    Raises `ResultNotReady`, `Gone`, and `TooMany` where the session has no room for it beside those on their way.
    """
    author = services.caller.user
    if job.state in TERMINAL:
        await arriving(services, session_id)  # it may be among them
        scan = await saved_scan(services, job, label)
        saved = await services.sessions.write(
            sessions.append, session_id, scan, author=author, job_id=job.id
        )
        await tell_saved(services, saved, author)
        return saved
    waiting = Waiting(session_id, job.id, author, label)
    await services.sessions.write(session_arrivals.add, waiting)
    arrived = ScanArrived(job=job.id, author=author, label=label, state=job.state)
    await services.publisher.publish(session_id, arrived)
    return None


async def arriving(services: Services, session_id: UUID) -> tuple[Arrival, ...]:
    """Scans on their way, and where they stand; those that have arrived are added first."""
    found = await services.sessions.read(_with_jobs, session_arrivals.of_session, session_id)
    seen = await settle(services, [each for each in found if each.has_arrived])
    left: list[Arrival] = []
    for waiting, job in found:
        if waiting.job_id in seen:
            if (arrival := seen[waiting.job_id]) is not None:
                left.append(arrival)
        elif job is not None:
            view = await services.view(job)
            left.append(_arrival(waiting, view.state, waiting.problem))
    return tuple(left)


class _Coming(NamedTuple):
    """A scan on its way, and its job; None where that is there no more."""

    waiting: Waiting
    job: Job | None

    @property
    def has_arrived(self) -> bool:
        """Whether it is to be added now, or given up."""
        ended = self.job is None or self.job.state in TERMINAL
        return self.waiting.problem is None and ended


def _with_jobs(
    session: Session, find: Callable[[Session, T], list[Waiting]], whose: T
) -> list[_Coming]:
    """Scans on their way, and their jobs."""
    found = find(session, whose)
    known = jobs.found(session, {waiting.job_id for waiting in found})
    return [_Coming(waiting, known.get(waiting.job_id)) for waiting in found]


def _arrival(waiting: Waiting, state: JobState, problem: ProblemDocument | None = None) -> Arrival:
    return Arrival(
        job=waiting.job_id,
        author=waiting.author,
        label=waiting.label,
        state=state,
        problem=problem,
    )


async def opened_at(services: Services, session_id: UUID, revision: str | None = None) -> Opened:
    """A session at a revision; the latest has the scans that have arrived by now.

    Raises `UnknownSession`, `UnknownRevision`.
    """
    if revision is None:
        await arriving(services, session_id)
    return await services.sessions.read(session_revisions.opened, session_id, revision)


async def settle_all(services: Services, owner: str) -> None:
    """Add the scans that have arrived to whichever sessions of an owner they were on their way to."""
    await settle(
        services, await services.sessions.read(_with_jobs, session_arrivals.arrived, owner)
    )


async def settle_job(services: Services, job: Job) -> None:
    """Add a scan that has ended to whichever sessions it was on its way to.

    Raises `Unavailable` where it cannot be read now.
    """
    coming = await services.sessions.read(_with_jobs, session_arrivals.awaiting, job.id)
    await settle(services, coming)
    if coming and await services.sessions.read(_with_jobs, session_arrivals.awaiting, job.id):
        raise Unavailable(
            f"a session waits for the result of job {job.id}, which cannot be read now: try again",
            job=str(job.id),
        )


async def keeping_sessions(services: Services, job: Job) -> tuple[UUID, ...]:
    """The caller's sessions that keep a job's result. Raises `Unavailable` where it cannot be read now."""
    if job.kind is not JobKind.SCAN or job.manifest is None:
        return ()
    try:
        digest = await reading(services, job, lambda result: result_digest(result.body))
    except Gone:
        return ()  # it was lost before
    return tuple(await services.sessions.read(sessions.keeping, services.caller.user, digest))


async def settle(services: Services, arrived: Sequence[_Coming]) -> dict[UUID, Arrival | None]:
    """Add scans that have ended, or give them up; of several who see one end, one does.

    What is left of each to be seen, by its job: one that cannot be read now goes on waiting, and one that cannot join
    though it succeeded says why. Some at a time, so that others who write have their turn.
    """
    seen: dict[UUID, Arrival | None] = {}
    is_away = False
    for some in _some(arrived, SETTLED_AT_ONCE):
        # Of a store that is away each would wait in vain, and whoever looks with them.
        kept = {} if is_away else await _kept_of(services, some)
        is_away = is_away or any(isinstance(each, Unavailable) for each in kept.values())
        wanted: list[Settling] = []
        for waiting, job in some:
            found = None if job is None else kept.get(job.id)
            if isinstance(found, SavedScan):
                labelled = msgspec.structs.replace(found, label=waiting.label)
                wanted.append(Settling(waiting, labelled))
            elif isinstance(found, Gone | ResultNotReady):
                wanted.append(Settling(waiting, None, found.document()))
            elif _has_result(job):
                seen[waiting.job_id] = _arrival(waiting, JobState.SUCCEEDED)
            else:
                wanted.append(Settling(waiting, None))
        if wanted:
            settled = await services.sessions.write(session_arrivals.settle_all, wanted)
            seen |= await _tell_settled(services, some, wanted, settled)
    return seen


def _some(arrived: Sequence[_Coming], count: int) -> Iterator[Sequence[_Coming]]:
    for start in range(0, len(arrived), count):
        yield arrived[start : start + count]


def _has_result(job: Job | None) -> bool:
    return job is not None and job.state is JobState.SUCCEEDED


async def _kept_of(
    services: Services, some: Iterable[_Coming]
) -> dict[UUID, SavedScan | Gone | ResultNotReady | Unavailable]:
    """What is kept of each job's result, or why it is not, by the job: several at once, each once."""
    turns = asyncio.Semaphore(KEPT_AT_ONCE)

    away: list[Unavailable] = []

    async def tried(
        work: Callable[[Job], Awaitable[T]], job: Job
    ) -> T | Gone | ResultNotReady | Unavailable:
        async with turns:
            try:
                return away[0] if away else await work(job)
            except (Gone, ResultNotReady) as lost:
                return lost
            except Unavailable as error:
                away.append(error)
                return error

    wanted = {job.id: job for _, job in some if job is not None and _has_result(job)}
    digests = await asyncio.gather(
        *(tried(partial(_digest_of, services), job) for job in wanted.values())
    )
    named = {
        job.id: digest
        for job, digest in zip(wanted.values(), digests, strict=True)
        if isinstance(digest, str)
    }
    try:
        await services.sessions.write(kept_results.expect, named.values())
    except Unavailable as error:
        return dict.fromkeys(wanted, error)
    away.clear()  # these could be read
    scans = await asyncio.gather(
        *(tried(partial(_kept_scan, services), wanted[job_id]) for job_id in named)
    )
    why_not = {
        job_id: reason
        for job_id, reason in zip(wanted, digests, strict=True)
        if not isinstance(reason, str)
    }
    return {**why_not, **dict(zip(named, scans, strict=True))}


async def _tell_settled(
    services: Services,
    some: Iterable[_Coming],
    wanted: Sequence[Settling],
    settled: Sequence[Settled],
) -> dict[UUID, Arrival | None]:
    """Tell who follows the sessions of what has become of scans; what is left of each to be seen, by its job."""
    known = {job.id: job for _, job in some if job is not None}
    told: list[tuple[UUID, SessionEvent]] = []
    seen: dict[UUID, Arrival | None] = {}
    for (waiting, scan, _), each in zip(wanted, settled, strict=True):
        seen[waiting.job_id] = None
        if each.saved is not None and each.saved.is_new:
            event = (waiting.session_id, _saved_event(each.saved, waiting.author))
            told += () if event in told else (event,)  # some are one revision
        job = known.get(waiting.job_id)
        if job is None or (scan is not None and each.problem is None):
            continue
        arrival = _arrival(waiting, job.state, each.problem)
        if each.is_ours:
            told.append((waiting.session_id, ScanArrived(**msgspec.structs.asdict(arrival))))
        if each.problem is not None:
            seen[waiting.job_id] = arrival
    await services.publisher.publish_all(told)
    return seen


async def tell_saved(services: Services, saved: Saved, author: str) -> None:
    """Tell who follows the session of a new revision."""
    if saved.is_new:
        await services.publisher.publish(saved.view.id, _saved_event(saved, author))


def _saved_event(saved: Saved, author: str) -> SessionSaved:
    view = saved.view
    return SessionSaved(
        revision=view.head,
        number=view.revision,
        name=view.name,
        author=author,
        added=saved.added,
    )
