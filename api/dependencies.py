"""What handlers are given: the services of this process, and whose request it is."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Concatenate, NamedTuple, ParamSpec, Self, TypeVar
from uuid import UUID

import msgspec
from sqlalchemy.orm import Session

from api.hub import Hub
from api.metrics import Metrics
from api.outlook import Outlook
from api.proxies import Proxies
from api.rates import Rates
from api.tokenization import Tokenizers
from neural_mri.backing import audit, following, jobs, limits, models
from neural_mri.backing.access import LOCAL, load_pepper
from neural_mri.backing.audit import Deed
from neural_mri.backing.broker import AsyncRedis, connect_async
from neural_mri.backing.database import AsyncSessions, async_sessions
from neural_mri.backing.events import AsyncPublisher, change_of
from neural_mri.backing.limits import Limits
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.queue import TicketSender
from neural_mri.backing.records import Job
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import Store, open_store
from neural_mri.contract.auth import Identity
from neural_mri.contract.jobs import HELD, JobState, JobView
from neural_mri.contract.problems import UnknownJob, UnknownModel

__all__ = ("Services", "open_services")

P = ParamSpec("P")
T = TypeVar("T")


KNOWN_SECONDS = 1.0
"""How long a model counts as registered as it was, for an answer that waited for its scan."""


class _Known(NamedTuple):
    """A model as it was registered a moment ago."""

    model: RegisteredModel
    until: float
    """How long that counts, on the monotonic clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """What this process stands on, as one caller may use it."""

    settings: Settings
    sessions: AsyncSessions
    redis: AsyncRedis
    store: Store
    tickets: TicketSender
    publisher: AsyncPublisher
    tokenizers: Tokenizers
    hub: Hub
    outlook: Outlook
    metrics: Metrics
    rates: Rates
    proxies: Proxies
    pepper: bytes = field(repr=False)
    """What keys and sessions are hashed under."""
    caller: Identity = LOCAL
    """Whose request it is: whatever is read by its id must be theirs."""
    errands: set[asyncio.Task[None]] = field(default_factory=set)
    """What is being told while its request has been answered already."""
    untold: list[Job] = field(default_factory=list)
    """Jobs that are to be told of next."""
    watched: set[UUID] = field(default_factory=set)
    """Jobs of which it is to be told next that somebody may look at their frames."""
    under_way: dict[tuple[str, str], UUID] = field(default_factory=dict)
    """Jobs that requests which only read have made, by owner and scan key."""
    summed_up: set[str] = field(default_factory=set)
    """Users whose work of a day is limited, by a limit of their own."""
    known: dict[str, _Known] = field(default_factory=dict)
    """Models as they were read last, by name."""
    known_lately: dict[bytes, tuple[Identity, float]] = field(default_factory=dict)
    """Who watches the service, by a hash of what they say, and until when that counts, on the monotonic clock."""

    def on_behalf_of(self, caller: Identity) -> Self:
        """The same services, for a request of this caller."""
        return replace(self, caller=caller)

    async def act(
        self,
        deed: Callable[[T], Deed | None],
        work: Callable[Concatenate[Session, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """What `work(session, ...)` returns, once it is committed and recorded as the caller's deed."""
        return await self.sessions.write(self._acted(deed, work, *args, **kwargs))

    async def act_briefly(
        self,
        deed: Callable[[T], Deed | None],
        work: Callable[Concatenate[Session, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """The same of a few rows, found by their keys."""
        return await self.sessions.write_briefly(self._acted(deed, work, *args, **kwargs))

    def _acted(
        self,
        deed: Callable[[T], Deed | None],
        work: Callable[Concatenate[Session, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Callable[[Session], T]:
        def acted(session: Session) -> T:
            return audit.audited(session, self.caller, deed, work, *args, **kwargs)

        return acted

    async def job(self, job_id: UUID) -> Job:
        """The caller's job of that id. Raises `UnknownJob`, for another owner's as well."""
        job = await self.sessions.look(jobs.get, job_id)
        if job is None or job.owner != self.caller.user:
            raise UnknownJob(f"there is no job {job_id}", job=str(job_id))
        return job

    async def view(self, job: Job, *, with_place: bool = False) -> JobView:
        """A job as its owner sees it; one that follows stands where the work it waits for stands."""
        view = job.view()
        if job.state is not JobState.QUEUED:
            return view
        if job.leader is not None:
            runner = await self.sessions.read(following.runner, job)
            if runner is not None and runner.state in HELD:
                return msgspec.structs.replace(
                    view, state=runner.state, started_at=runner.started_at
                )
        if not with_place:
            return view
        return msgspec.structs.replace(view, queue=await self.outlook.place(job))

    @property
    def limits(self) -> Limits:
        """What a user may who has no limits of their own."""
        return limits.usual(self.settings)

    async def model(self, name: str | None) -> RegisteredModel:
        """The model of that name, or the default one. Raises `UnknownModel`."""
        wanted = name or self.settings.default_model
        model = await self.sessions.look(models.get, wanted)
        if model is None:
            known = await self.sessions.read(models.all)
            raise UnknownModel(
                f"no model is registered as {wanted!r}; registered are "
                + (", ".join(each.name for each in known) or "none"),
                model=wanted,
            )
        self.known[wanted] = _Known(model, time.monotonic() + KNOWN_SECONDS)
        return model

    async def model_of(self, job: Job) -> RegisteredModel:
        """The job's model, as it is registered or was a moment ago with the same weights."""
        known = self.known.get(job.model)
        if known and known.model.revision == job.revision and time.monotonic() < known.until:
            return known.model
        return await self.model(job.model)

    def announce(self, job: Job, *, is_watched: bool = False) -> None:
        """Tell of a job's state, and of work where it waits; nobody waits for it to be told.

        `is_watched` says that somebody may look at the work's frames as they come: else a worker keeps
        them to itself until somebody follows the job.
        """
        self.untold.append(job)
        if is_watched:
            # One that follows may come to be run under its own id.
            self.watched.update((job.id, job.source))
        if all(errand.done() for errand in self.errands):
            errand = asyncio.create_task(self._tell())
            self.errands.add(errand)
            errand.add_done_callback(self.errands.discard)

    async def _tell(self) -> None:
        """Tell of what is untold, and by the next round trips of what gathers meanwhile."""
        while self.untold:
            told = [
                job
                for job in self.untold
                # A follower's leader has a ticket, and events.
                if job.leader is None or job.state is not JobState.QUEUED
            ]
            watched = set(self.watched)
            self.untold.clear()
            self.watched.clear()
            # What is lost here the reaper makes good. Tickets come after events, so that no worker can tell
            # of a job before its first event stands.
            await self.publisher.publish_all(
                [(job.id, change_of(job)) for job in told],
                watched=watched,
                tickets=Counter(job.queue for job in told if job.state is JobState.QUEUED),
            )

    async def close(self) -> None:
        """Finish the errands and close every connection."""
        await self.hub.stop()
        if self.errands:
            await asyncio.wait(self.errands, timeout=1.0)
        await self.redis.aclose()
        await self.sessions.close()


def open_services(settings: Settings, metrics: Metrics) -> Services:
    """The services that the settings name. Needs a running event loop; connects to nothing yet."""
    sessions, redis, store = async_sessions(settings), connect_async(settings), open_store(settings)

    async def ended(job_ids: Collection[UUID]) -> Sequence[Job]:
        return await sessions.read(jobs.ended, job_ids)

    services = Services(
        settings=settings,
        sessions=sessions,
        redis=redis,
        store=store,
        tickets=TicketSender(redis),
        publisher=AsyncPublisher(redis, settings),
        tokenizers=Tokenizers(store),
        hub=Hub(settings, redis, ended),
        outlook=Outlook(settings, sessions, redis),
        metrics=metrics,
        rates=Rates(redis),
        proxies=Proxies(settings.proxies),
        pepper=load_pepper(settings),
    )
    services.hub.start()
    return services
