"""What must hold of jobs whatever happened, as the database itself has written it down.

Triggers note every move of every job, whoever makes it and by whatever code, with the attempt and the time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import text
from sqlalchemy.orm import Session

from neural_mri.backing import batches, keys, leftovers, storage
from neural_mri.backing.broker import SyncRedis
from neural_mri.backing.database import Sessions
from neural_mri.backing.events import parse_entries
from neural_mri.backing.records import AnyRow
from neural_mri.backing.settings import Settings
from neural_mri.backing.stored import open_result
from neural_mri.contract.events import Ended, decode_event
from neural_mri.contract.jobs import TERMINAL, TRANSITIONS, JobState
from neural_mri.contract.problems import Gone
from neural_mri.contract.scans import decode_scan

__all__ = ("Move", "Witness")

NOTHING_SPOILT: Mapping[str, bytes] = MappingProxyType({})

_NOW = {
    "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
}
_TABLE = """
CREATE TABLE chaos_moves (
    number {serial}, job {uuid} NOT NULL, was TEXT, is_now TEXT NOT NULL, was_attempt INTEGER,
    attempt INTEGER NOT NULL, manifest TEXT, leader {uuid}, at DOUBLE PRECISION NOT NULL)
"""
_SQLITE = (
    """CREATE TRIGGER chaos_made AFTER INSERT ON jobs BEGIN
    INSERT INTO chaos_moves (job, is_now, attempt, manifest, leader, at)
    VALUES (new.id, new.state, new.attempt, new.manifest, new.leader, {now}); END""",
    """CREATE TRIGGER chaos_moved AFTER UPDATE ON jobs
    WHEN old.state <> new.state OR old.attempt <> new.attempt BEGIN
    INSERT INTO chaos_moves (job, was, is_now, was_attempt, attempt, manifest, leader, at)
    VALUES (new.id, old.state, new.state, old.attempt, new.attempt, new.manifest, new.leader, {now}); END""",
)
_POSTGRESQL = (
    """CREATE FUNCTION chaos_note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO chaos_moves (job, is_now, attempt, manifest, leader, at)
        VALUES (new.id, new.state, new.attempt, new.manifest, new.leader, {now});
    ELSIF old.state <> new.state OR old.attempt <> new.attempt THEN
        INSERT INTO chaos_moves (job, was, is_now, was_attempt, attempt, manifest, leader, at)
        VALUES (new.id, old.state, new.state, old.attempt, new.attempt, new.manifest, new.leader, {now});
    END IF; RETURN NULL; END $$""",
    """CREATE TRIGGER chaos_moved AFTER INSERT OR UPDATE ON jobs
    FOR EACH ROW EXECUTE FUNCTION chaos_note()""",
)


class Move(NamedTuple):
    """One line of what the database has noted."""

    job: UUID
    was: JobState | None
    is_now: JobState
    was_attempt: int | None
    attempt: int
    manifest: str | None
    leader: UUID | None
    at: float


class Verdict(NamedTuple):
    """What was found, and what is wrong with it."""

    states: Counter[str]
    wrong: list[str]
    claims: int
    most_attempts: int


class Witness:
    """Reads what happened. Install it before the first job is made."""

    def __init__(self, sessions: Sessions, settings: Settings) -> None:
        self._sessions = sessions
        self._settings = settings
        self.store = storage.open_store(settings)
        """Where results are, reached straight."""
        self._dialect = sessions.engine.dialect.name

    def install(self) -> None:
        """From now on every move is noted."""
        sqlite = self._dialect == "sqlite"
        serial = "INTEGER PRIMARY KEY AUTOINCREMENT" if sqlite else "BIGSERIAL PRIMARY KEY"
        statements = [_TABLE.format(serial=serial, uuid="CHAR(32)" if sqlite else "UUID")]
        statements += [
            one.format(now=_NOW[self._dialect]) for one in (_SQLITE if sqlite else _POSTGRESQL)
        ]
        with self._sessions.writing() as session:
            for statement in statements:
                session.connection().exec_driver_sql(statement)

    def moves(self) -> list[Move]:
        """Everything that was noted, in the order in which it happened."""
        with self._sessions.reading() as session:
            rows = session.execute(text("SELECT * FROM chaos_moves ORDER BY number")).all()
        return [
            Move(
                _uuid(row.job),
                None if row.was is None else JobState(row.was),
                JobState(row.is_now),
                row.was_attempt,
                row.attempt,
                row.manifest,
                None if row.leader is None else _uuid(row.leader),
                row.at,
            )
            for row in rows
        ]

    def unfinished(self) -> int:
        """Jobs that have not ended, and lines of batches that are to become jobs."""
        with self._sessions.reading() as session:
            found: int = session.execute(
                text(
                    "SELECT (SELECT count(*) FROM jobs WHERE finished_at IS NULL) + (SELECT count(*) "
                    "FROM batch_lines JOIN batches ON id = batch_id "
                    "WHERE wanted IS NOT NULL AND filled_at IS NOT NULL)"
                )
            ).scalar_one()
        return found

    def verdict(
        self, accepted: Iterable[UUID], spoilt: Mapping[str, bytes] = NOTHING_SPOILT
    ) -> Verdict:
        """Whether every accepted job has ended once, as it should, and nothing was left lying about.

        `spoilt` is what was left of results that were spoilt, by path: nobody may take it for a result.
        """
        wrong: list[str] = []
        of_job: defaultdict[UUID, list[Move]] = defaultdict(list)
        for move in self.moves():
            of_job[move.job].append(move)
        wrong += [f"{job} was accepted and is lost" for job in accepted if job not in of_job]
        for job, moves in of_job.items():
            wrong += _wrong_with(job, moves)
        with self._sessions.reading() as session:
            wrong += _wrong_with_rows(session)
        wrong += self._wrong_with_results(of_job, spoilt)
        return Verdict(
            states=Counter(moves[-1].is_now.value for moves in of_job.values()),
            wrong=wrong,
            claims=sum(_is_claim(move) for moves in of_job.values() for move in moves),
            most_attempts=max((moves[-1].attempt for moves in of_job.values()), default=0),
        )

    def wrong_with_batches(self, accepted: Mapping[UUID, int]) -> Iterator[str]:
        """Accepted batches, by how many lines they were sent with, whose lines are not all there, each once."""
        for batch_id, count in accepted.items():
            with self._sessions.reading() as session:
                batch = batches.find(session, batch_id)
                lines = batches.lines(session, batch_id, after=0, limit=count + 1)
            if batch is None:
                yield f"batch {batch_id} was accepted and is lost"
            elif [line.line for line in lines] != list(range(1, count + 1)):
                yield f"batch {batch_id} of {count} lines has {len(lines)}"
            for line in lines:
                # The state is the job's own: of a job that is not there nothing is said.
                if line.problem is None and line.state not in TERMINAL:
                    yield f"line {line.line} of batch {batch_id} has no job that has ended: {line}"
            jobs = [line.job for line in lines if line.repeats is None and line.job is not None]
            if len(jobs) != len(set(jobs)):
                yield f"batch {batch_id} names a job twice"

    def _wrong_with_results(
        self, of_job: dict[UUID, list[Move]], spoilt: Mapping[str, bytes]
    ) -> Iterator[str]:
        store = self.store
        same: dict[str, dict[str, str]] = {}
        ends = {moves[-1].manifest for moves in of_job.values()} - {None}
        for path in sorted(filter(None, ends)):
            try:
                result = open_result(store, path, whole=True)
                for table in result.tables:
                    result.bytes_of(table)
            except Gone as error:
                if path not in spoilt:
                    yield f"{path}: {error}"
                continue
            if path in spoilt and store.get(path) == spoilt[path]:
                yield f"{path}: was spoilt, and is read all the same"
            manifest = result.manifest
            tables = {ref.name: ref.chunk for ref in manifest.tables}
            if decode_scan(msgspec.json.encode(manifest.request)).shared_forward is not None:
                continue  # whose company may show in the last digit
            if same.setdefault(manifest.scan_key, tables) != tables:
                yield f"{path}: another attempt at the same scan has come to other numbers"

    def leaks(self, redis: SyncRedis) -> list[str]:
        """What lies about that nobody will ever take away."""
        found = []
        for key in redis.scan_iter(count=1000):
            name = key.decode()
            if (
                name.startswith(("events:", "watched:", "cancel:", "worker:"))
                and redis.ttl(key) < 0
            ):
                found.append(f"{name} never expires")
        queues = [keys.CPU_QUEUE, keys.CONTROL_QUEUE]
        queues += [key.decode() for key in redis.scan_iter("scan.*")]
        waiting = {queue: redis.llen(queue) for queue in queues}
        return [
            *found,
            *(f"{count} tickets in {queue}" for queue, count in waiting.items() if count),
        ]

    def half_written(self) -> list[Path]:
        """Files that somebody began to write and did not finish: a bucket shows none."""
        return [path for path in self._settings.store_dir.rglob(".*") if path.is_file()]

    def orphans(self) -> set[str]:
        """Results in the store that no job names."""
        aged = leftovers.aged_results(self.store, older_seconds=0.0)
        stored = {keys.result_of(path) for path in aged}
        with self._sessions.reading() as session:
            named = session.execute(text("SELECT manifest FROM jobs WHERE manifest IS NOT NULL"))
            return stored - set(named.scalars())

    def tidy(self) -> None:
        """Take away what the reaper does when it is old enough."""
        self.store.sweep(older_seconds=0.0)
        found = list(leftovers.aged_results(self.store, older_seconds=0.0))
        for path in self._sessions.read(leftovers.left_over, found):
            self.store.delete(path)

    def told_wrongly(self, redis: SyncRedis, jobs: Iterable[UUID]) -> list[str]:
        """Streams that tell another end than the database, or tell on after it."""
        with self._sessions.reading() as session:
            rows = session.execute(text("SELECT id, state FROM jobs WHERE leader IS NULL")).all()
        states = {_uuid(row.id): JobState(row.state) for row in rows}
        found = []
        for job in jobs:
            if job not in states:
                continue
            rows_told: object = redis.xrange(keys.event_stream(job))
            told = [decode_event(entry.data) for entry in parse_entries(rows_told)]  # type: ignore[arg-type]
            ends = [place for place, event in enumerate(told) if isinstance(event, Ended)]
            for place in ends:
                event = told[place]
                assert isinstance(event, Ended)
                if event.state is not states[job]:
                    found.append(f"{job} was told to be {event.state}, it is {states[job]}")
        return found


def _uuid(value: object) -> UUID:
    return value if isinstance(value, UUID) else UUID(str(value))


def _is_claim(move: Move) -> bool:
    """Whether a worker took the job: one that comes alone is begun as it is taken."""
    begun = move.was is JobState.QUEUED and move.is_now is JobState.RUNNING
    return begun or move.is_now is JobState.CLAIMED


def _wrong_with(job: UUID, moves: list[Move]) -> Iterator[str]:
    ends = [move for move in moves if move.is_now in TERMINAL and move.was is not move.is_now]
    if len(ends) != 1:
        yield f"{job} has ended {len(ends)} times: {[move.is_now.value for move in moves]}"
    if ends and moves[-1] is not ends[-1]:
        yield f"{job} has moved after its end: {moves[-1]}"
    attempt = 0
    for move in moves:
        if move.attempt < attempt:
            yield f"{job} went back from attempt {attempt} to {move.attempt}"
        attempt = move.attempt
        follows = move.leader is not None
        may = move.was is None or follows or move.is_now in TRANSITIONS[move.was]
        if not may and not _is_claim(move):
            yield f"{job} went from {move.was} to {move.is_now}"
        if _is_claim(move) and move.attempt != (move.was_attempt or 0) + 1:
            yield f"{job} was claimed without a new attempt: {move}"
    end = moves[-1]
    own = end.was is not None and end.was is not JobState.QUEUED
    if end.is_now is JobState.SUCCEEDED and own:
        work = end.leader or job
        own_paths = keys.Attempt(work, end.attempt).results
        if end.manifest not in own_paths:
            yield f"{job} was published by another attempt: {end.manifest}, none of {own_paths}"


def _wrong_with_rows(session: Session) -> Iterator[str]:
    columns = "id, state, attempt, problem"

    def rows(where: str) -> list[AnyRow]:
        return list(session.execute(text(f"SELECT {columns} FROM jobs WHERE {where}")))  # noqa: S608

    for row in rows("finished_at IS NULL"):
        yield f"{row.id} has not ended: {row.state}"
    for row in rows("lease_owner IS NOT NULL AND finished_at IS NOT NULL"):
        yield f"{row.id} has ended and is still held"
    # Who asks for no more than others fails where memory is made to run out, and of nothing else.
    said = "state IN ('failed', 'expired') AND problem NOT LIKE '%out-of-memory%'"
    for row in rows(said):
        yield f"{row.id} has {row.state}, attempt {row.attempt}, though it asks for nothing wrong: {row.problem}"
    for row in rows("state = 'succeeded' AND manifest IS NULL"):
        yield f"{row.id} has succeeded without a result"
