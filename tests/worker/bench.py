"""A worker's parts, put together by hand, on a real database, store, Valkey and (tiny) model."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any
from uuid import UUID

from neural_mri.backing import jobs, keys, storage
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import Publisher, WorkerBeat, parse_entries
from neural_mri.backing.jobs import Job, LeaseOwner, Submission
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import NamedBytes, Store, Writing
from neural_mri.contract.events import Event, decode_event
from neural_mri.contract.jobs import JobKind
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.scan_keys import scan_key
from neural_mri.contract.scans import PromptScan, Scan, encode_scan
from neural_mri.contract.tokens import Operands, Span, Tokens
from worker.attempts import Attempts
from worker.calibrations import Calibrations
from worker.keeper import Keeper
from worker.memory import Memory
from worker.placing import Placing
from worker.reporter import Outbox
from worker.residency import Residency

__all__ = ("Bench", "Interrupting", "Queues")

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Queues:
    """An intake that remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def open(self, queue: str) -> None:
        self.said.append(f"open {queue}")

    def close(self, queue: str) -> None:
        self.said.append(f"close {queue}")


class Interrupting:
    """A store where something else happens while its first files are being written."""

    def __init__(self, store: Store, event: Callable[[], None]) -> None:
        self._store = store
        self._events = [event]
        self.deleted: list[str] = []

    def begin(self, files: Iterable[NamedBytes]) -> Writing:
        try:
            return _Interrupted(self._store.begin(files), self._happen)
        except Unavailable:
            self._happen()
            raise

    def _happen(self) -> None:
        while self._events:
            self._events.pop()()

    def delete(self, path: str) -> None:
        self.deleted.append(path)
        self._store.delete(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class _Interrupted:
    """Files before whose naming something else happens."""

    def __init__(self, writing: Writing, happen: Callable[[], None]) -> None:
        self._writing = writing
        self._happen = happen

    def flush(self) -> None:
        self._writing.flush()

    def place(self, placed: Callable[[int], None], last: Callable[[], None] = lambda: None) -> None:
        self._happen()
        self._writing.place(placed, last)

    def settles(self, within: float) -> bool:
        return self._writing.settles(within)

    def settle(self) -> None:
        self._writing.settle()

    def drop(self) -> None:
        self._writing.drop()


class Bench:
    """A worker's parts, put together by hand."""

    def __init__(
        self, settings: Settings, sessions: Sessions, redis: SyncRedis, tiny: RegisteredModel
    ) -> None:
        self.settings = settings
        self.sessions = sessions
        self.redis = redis
        self.tiny = tiny
        self.queue = keys.scan_queue(tiny.revision)
        self.store: Store = storage.open_store(settings)
        self.calibrations = Calibrations(self.store, lambda key: sessions.look(jobs.result_of, key))
        self.residency = Residency(settings, sessions, self.calibrations)
        self.intake = Queues()
        self.outbox = Outbox(Publisher(redis, settings))
        self.keeper = Keeper(
            sessions=sessions,
            redis=redis,
            owner=LeaseOwner.here(),
            lease_seconds=settings.lease_seconds,
            describe=lambda: WorkerBeat(worker="worker-1@here", device="cpu", at=0.0),
        )
        self.placing = Placing(
            settings=settings,
            sessions=sessions,
            redis=redis,
            owner=LeaseOwner.here(),
            worker="worker-1@here",
            residency=self.residency,
            memory=Memory(settings, "cpu"),
            intake=self.intake,
            outbox=self.outbox,
            beat=self.keeper.beat,
        )

    def attempts(self, store: Store | None = None) -> Attempts:
        return Attempts(
            settings=self.settings,
            sessions=self.sessions,
            store=store or self.store,
            owner=LeaseOwner.here(),
            keeper=self.keeper,
            outbox=self.outbox,
            residency=self.residency,
            calibrations=self.calibrations,
            intake=self.intake,
            placing=self.placing,
            redis=self.redis,
        )

    def submission(
        self,
        scan: Scan,
        *,
        n_tokens: int = 6,
        operands: Operands = Operands(),
        baseline_revision: str | None = None,
        keyed: Mapping[str, Any] = NOTHING,
        tokens: Tokens | None = None,
        **changes: Any,
    ) -> Submission:
        tokens = tokens or (
            Tokens(
                ids=tuple(range(3, 3 + n_tokens)),
                texts=tuple(f"w{index}" for index in range(n_tokens)),
                spans=tuple(Span(3 * index, 3 * index + 2) for index in range(n_tokens)),
            )
            if isinstance(scan, PromptScan)
            else None
        )
        fields: dict[str, Any] = {
            "owner": "ada",
            "kind": JobKind.SCAN,
            "model": "tiny",
            "revision": self.tiny.revision,
            "queue": self.queue if scan.needs_loaded_model else keys.CPU_QUEUE,
            "request": encode_scan(scan),
            "tokens": tokens,
            "operands": operands,
            "scan_key": scan_key(
                scan,
                token_ids=tokens.ids if tokens else None,
                revision=self.tiny.revision,
                tokenizer_digest=self.tiny.tokenizer_digest,
                operands=operands,
                baseline_revision=baseline_revision,
                **{"numerics": self.tiny.numerics, **keyed},
            ),
        }
        return Submission(**{**fields, **changes})

    def submit(self, scan: Scan, **asked: Any) -> Job:
        """A job as it is recorded, with what `submission` takes."""
        job = self.sessions.write(jobs.submit, self.submission(scan, **asked))
        # As the API says of whoever does not wait for the answer.
        self.redis.set(keys.watched(job.source), b"1")
        return job

    def order(self, kind: JobKind) -> Job:
        """A job to load or unload the model."""
        submission = Submission(
            owner="ada",
            kind=kind,
            model="tiny",
            revision=self.tiny.revision,
            queue=keys.CONTROL_QUEUE,
            request=b'{"model":"tiny"}',
        )
        return self.sessions.write(jobs.submit, submission)

    def now(self, job: Job) -> Job:
        found = self.sessions.read(jobs.get, job.id)
        assert found is not None
        return found

    def told(self, job_id: UUID) -> list[Event]:
        assert self.outbox.flush(5)
        rows: Any = self.redis.xrange(keys.event_stream(job_id))
        return [decode_event(entry.data) for entry in parse_entries(rows)]
