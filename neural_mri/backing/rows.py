"""The rows of the database: jobs, models and who holds them, the queues' virtual clocks, users and keys.

Knows columns, constraints and indices; nothing of what moves a job. Times are seconds since 1970 by the
database's own clock: processes on several hosts never compare theirs.
"""

from enum import StrEnum
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Double,
    Enum,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from neural_mri.contract.auth import AuditAction
from neural_mri.contract.jobs import HELD, TERMINAL, JobKind, JobState, Lane

__all__ = (
    "API_KEYS",
    "AUDIT",
    "BATCHES",
    "BATCH_LINES",
    "DISCARDS",
    "IDEMPOTENCY_KEYS",
    "JOBS",
    "KEPT_RESULTS",
    "LOGINS",
    "MODELS",
    "MODEL_COSTS",
    "QUEUE_CLOCKS",
    "RESIDENCES",
    "SPENT",
    "USERS",
    "ApiKeyRow",
    "AuditRow",
    "Base",
    "IdempotencyKeyRow",
    "JobRow",
    "KeptResultRow",
    "LoginRow",
    "ModelCostRow",
    "ModelRow",
    "QueueClockRow",
    "ResidenceRow",
    "UserRow",
)

_UNFINISHED = text("finished_at IS NULL")
_LEASED = text("lease_owner IS NOT NULL")
_FOLLOWING = text("leader IS NOT NULL")
_BOUNDED = text("max_failures IS NOT NULL AND stopped_at IS NULL AND ended_at IS NULL")
_UNFILLED = text("filled_at IS NULL")
_UNFED = text("fed_at IS NULL")
_WAITING = text("wanted IS NOT NULL")


def _words(kind: type[StrEnum]) -> Enum:
    """A StrEnum kept as its value in a VARCHAR: a new member needs no migration."""
    return Enum(
        kind,
        native_enum=False,
        length=16,
        values_callable=lambda members: [member.value for member in members],
    )


def _among(states: frozenset[JobState]) -> str:
    return "state IN (" + ", ".join(f"'{state}'" for state in sorted(states)) + ")"


class Base(DeclarativeBase):
    """The schema as the code reads it; `migrations/` builds it."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        float: Double(),
        str: Text(),
        AuditAction: _words(AuditAction),
        JobKind: _words(JobKind),
        JobState: _words(JobState),
        Lane: _words(Lane),
    }


class JobRow(Base):
    """One job. Only `backing.jobs` writes here."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"(lease_owner IS NOT NULL) = ({_among(HELD)})", name="held_by_its_owner"),
        CheckConstraint("(lease_owner IS NULL) = (lease_until IS NULL)", name="lease_is_whole"),
        CheckConstraint(f"(finished_at IS NOT NULL) = ({_among(TERMINAL)})", name="ends_once"),
        CheckConstraint("manifest IS NULL OR state = 'succeeded'", name="manifest_of_success"),
        CheckConstraint(
            "state <> 'succeeded' OR kind <> 'scan' OR manifest IS NOT NULL",
            name="scan_success_has_manifest",
        ),
        CheckConstraint("NOT (state = 'queued' AND cancel_requested)", name="queued_is_wanted"),
        # Of unfinished rows only: claiming stays as fast when a million jobs have ended.
        Index(
            "ix_jobs_unfinished",
            "queue",
            "state",
            "virtual_start",
            "id",
            sqlite_where=_UNFINISHED,
            postgresql_where=_UNFINISHED,
        ),
        Index(
            "ix_jobs_lanes",
            "queue",
            "lane",
            "state",
            "virtual_start",
            "id",
            sqlite_where=_UNFINISHED,
            postgresql_where=_UNFINISHED,
        ),
        Index("ix_jobs_leased", "lease_owner", sqlite_where=_LEASED, postgresql_where=_LEASED),
        Index("ix_jobs_followers", "leader", sqlite_where=_FOLLOWING, postgresql_where=_FOLLOWING),
        Index("ix_jobs_flow", "queue", "owner", "lane", "virtual_finish"),
        Index(
            "ix_jobs_under_way",
            "owner",
            sqlite_where=_UNFINISHED,
            postgresql_where=_UNFINISHED,
        ),
        Index("ix_jobs_usage", "owner", "finished_at"),
        Index("ix_jobs_pace", "queue", "finished_at"),
        Index("ix_jobs_recent", "owner", "created_at"),
        # The newest of a scan that is asked for again and again is found without the others.
        Index("ix_jobs_results", "scan_key", "finished_at"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(200))
    kind: Mapped[JobKind]
    state: Mapped[JobState]
    model: Mapped[str] = mapped_column(String(200))
    revision: Mapped[str] = mapped_column(String(64))
    queue: Mapped[str] = mapped_column(String(64))
    lane: Mapped[Lane]
    request: Mapped[str]
    """JSON, as it was understood."""
    tokens: Mapped[str | None]
    """JSON of `contract.tokens.Tokens`."""
    operands: Mapped[str]
    """JSON of `contract.tokens.Operands`."""
    n_tokens: Mapped[int]
    scan_key: Mapped[str | None] = mapped_column(String(64))
    reusable: Mapped[bool]
    """Whether the result may answer later jobs of this scan key; false once its bytes are known lost."""
    batch_key: Mapped[str] = mapped_column(String(120))
    """Jobs of equal keys may share a forward pass; a job that cannot share one has its own."""
    virtual_start: Mapped[float]
    """Place in the queue, in cost units over lane weight (start-time fair queueing)."""
    virtual_finish: Mapped[float | None]
    """Where the owner's next job starts at the earliest; NULL for a job that took no turn."""
    estimated_cost: Mapped[float]
    attempt: Mapped[int]
    """Claims so far: the fencing token."""
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[float | None]
    cancel_requested: Mapped[bool]
    deadline_seconds: Mapped[float]
    cached: Mapped[bool]
    manifest: Mapped[str | None] = mapped_column(String(200))
    problem: Mapped[str | None]
    """JSON, as RFC 9457 has it."""
    leader: Mapped[UUID | None]
    """The id under which a worker knows the work that this job waits for, or that was handed over to it;
    NULL for a job that takes, or took, its own turn."""
    traceparent: Mapped[str | None] = mapped_column(String(55))
    """The span that asked for it, as W3C Trace Context writes it."""
    created_at: Mapped[float]
    waiting_since: Mapped[float | None]
    """Since when it has waited for a turn of its own, if not since it was made: it came back, or followed another."""
    started_at: Mapped[float | None]
    """When the latest attempt was claimed."""
    claim_share: Mapped[float | None]
    """Its part, by estimated cost, of what was claimed with it; NULL for all of it, 0 once it waits again or an heir is
    charged."""
    finished_at: Mapped[float | None]


class QueueClockRow(Base):
    """How far a queue has come: the virtual start of the job last claimed from it."""

    __tablename__ = "queue_clocks"

    queue: Mapped[str] = mapped_column(String(64), primary_key=True)
    virtual_clock: Mapped[float]


class DiscardRow(Base):
    """What a deleted job may have left in the store. Only `backing.deletion` writes here."""

    __tablename__ = "discards"
    __table_args__ = (Index("ix_discards_deleted", "deleted_at"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    """The job's."""
    work: Mapped[UUID]
    """The id under which workers knew it."""
    attempts: Mapped[int]
    manifest: Mapped[str | None] = mapped_column(String(200))
    scan_key: Mapped[str | None] = mapped_column(String(64))
    deleted_at: Mapped[float]


class SpentRow(Base):
    """What a deleted job had computed, for as long as a day's limit counts it."""

    __tablename__ = "spent"
    __table_args__ = (Index("ix_spent_usage", "owner", "finished_at"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    """The job's."""
    owner: Mapped[str] = mapped_column(String(200))
    finished_at: Mapped[float]
    seconds: Mapped[float]


class IdempotencyKeyRow(Base):
    """The job that a caller's Idempotency-Key made. Only `backing.idempotency` writes here."""

    __tablename__ = "idempotency_keys"

    owner: Mapped[str] = mapped_column(String(200), primary_key=True)
    key: Mapped[str] = mapped_column(String(200), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[UUID]
    created_at: Mapped[float]


class ModelRow(Base):
    """One registered model."""

    __tablename__ = "models"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    source: Mapped[str]
    folder: Mapped[str]
    revision: Mapped[str] = mapped_column(String(64))
    tokenizer_digest: Mapped[str] = mapped_column(String(64))
    architecture: Mapped[str]
    """JSON of `contract.models.Architecture`."""
    n_parameters: Mapped[int] = mapped_column(BigInteger)
    weights_bytes: Mapped[int] = mapped_column(BigInteger)
    quantization: Mapped[str | None] = mapped_column(String(32))
    numerics: Mapped[str]
    """JSON of `contract.models.Numerics`."""
    wanted: Mapped[bool]
    registered_at: Mapped[float]


class ResidenceRow(Base):
    """One worker's claim to hold one set of weights. Only `backing.residences` writes here."""

    __tablename__ = "residences"

    revision: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200), primary_key=True)
    """The process, as leases name it."""
    loaded: Mapped[bool]
    """False while it is loading: a claim that ends so has cost its worker."""
    claimed_at: Mapped[float]
    until: Mapped[float]
    """When the claim ends unless it is renewed."""


class ModelCostRow(Base):
    """What holding one set of weights has cost, where it was last loaded."""

    __tablename__ = "model_costs"

    revision: Mapped[str] = mapped_column(String(64), primary_key=True)
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    load_seconds: Mapped[float | None]
    losses: Mapped[int]
    """Workers lost while they loaded it, since it was last loaded."""


class UserRow(Base):
    """One person, or program, that has or had an API key."""

    __tablename__ = "users"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    created_at: Mapped[float]
    max_jobs: Mapped[int | None]
    """Jobs under way at once; NULL: the setting's, 0: no limit."""
    daily_seconds: Mapped[float | None]
    """Compute within 24 hours; NULL: the setting's, 0: no limit."""


class ApiKeyRow(Base):
    """One API key, without what would let anybody use it."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    user: Mapped[str] = mapped_column(String(200), ForeignKey("users.name"), index=True)
    label: Mapped[str]
    digest: Mapped[str] = mapped_column(String(64))
    """HMAC-SHA-256 of the whole key, under the service's pepper."""
    scopes: Mapped[str]
    """Separated by blanks."""
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class LoginRow(Base):
    """One session of the viewer: a cookie that stands for a key."""

    __tablename__ = "logins"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    """HMAC-SHA-256 of the cookie's value."""
    key_id: Mapped[str] = mapped_column(String(12), ForeignKey("api_keys.id"), index=True)
    created_at: Mapped[float]
    expires_at: Mapped[float] = mapped_column(index=True)


class AuditRow(Base):
    """One deed. Only `backing.audit` writes here, and only adds."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_user", "user", "id"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    at: Mapped[float]
    user: Mapped[str] = mapped_column(String(200))
    key_id: Mapped[str | None] = mapped_column(String(12))
    """No foreign key: what was done outlives what it was done with."""
    action: Mapped[AuditAction]
    subject: Mapped[str] = mapped_column(String(200))
    details: Mapped[str]
    """JSON."""


class BatchRow(Base):
    """Many scans asked for at once. Only `backing.batches` writes here."""

    __tablename__ = "batches"
    __table_args__ = (
        Index("ix_batches_recent", "owner", "created_at"),
        Index("ix_batches_word", "owner", "word", unique=True),
        Index("ix_batches_bounded", "id", sqlite_where=_BOUNDED, postgresql_where=_BOUNDED),
        Index(
            "ix_batches_unfilled", "created_at", sqlite_where=_UNFILLED, postgresql_where=_UNFILLED
        ),
        Index("ix_batches_unfed", "owner", sqlite_where=_UNFED, postgresql_where=_UNFED),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(200))
    name: Mapped[str] = mapped_column(String(200))
    lane: Mapped[Lane]
    lines: Mapped[int]
    max_failures: Mapped[int | None]
    word: Mapped[str | None] = mapped_column(String(200))
    """The caller's Idempotency-Key."""
    digest: Mapped[str] = mapped_column(String(64))
    """Of the request, as it was read."""
    created_at: Mapped[float]
    stopped_at: Mapped[float | None]
    stopped_by: Mapped[str | None] = mapped_column(String(16))
    """`caller` or `failures`."""
    ended_at: Mapped[float | None]
    """Once every job was seen to have ended; until then the jobs themselves tell."""
    filled_at: Mapped[float | None]
    """Once every line was recorded; one that is not was accepted by nobody."""
    fed_at: Mapped[float | None]
    """Once every line was seen to have become its job."""


class BatchLineRow(Base):
    """One line of a batch: the job that it became, or why it became none."""

    __tablename__ = "batch_lines"
    __table_args__ = (
        Index("ix_batch_lines_job", "job_id"),
        Index(
            "ix_batch_lines_waiting",
            "batch_id",
            "line",
            sqlite_where=_WAITING,
            postgresql_where=_WAITING,
        ),
        Index(
            "ix_batch_lines_queues",
            "batch_id",
            "queue",
            "line",
            sqlite_where=_WAITING,
            postgresql_where=_WAITING,
        ),
    )

    batch_id: Mapped[UUID] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[UUID | None]
    """The job's own; of a line that waits for room, the one that it will have."""
    repeats: Mapped[int | None]
    """The earlier line that asked for the same scan, and whose job this is."""
    problem: Mapped[str | None]
    """JSON, as RFC 9457 has it."""
    wanted: Mapped[str | None]
    """JSON of the job to be, of a line that waits for room."""
    queue: Mapped[str | None] = mapped_column(String(64))
    """Where that will wait; NULL of a line that an older release has recorded."""


class SessionRow(Base):
    """One saved session. Only `backing.sessions` writes here."""

    __tablename__ = "sessions"
    __table_args__ = (Index("ix_sessions_recent", "owner", "updated_at", "id"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(200))
    name: Mapped[str] = mapped_column(String(200))
    pinned: Mapped[bool]
    head: Mapped[str] = mapped_column(String(64))
    """Digest of the latest revision."""
    revision: Mapped[int]
    """Its number."""
    scans: Mapped[int]
    models: Mapped[str]
    """Names, between and around them line feeds."""
    words: Mapped[str]
    """What a search looks through, in small letters."""
    origin: Mapped[str] = mapped_column(String(16))
    forked_from: Mapped[UUID | None]
    """No foreign key: a fork outlives what it came from."""
    created_at: Mapped[float]
    updated_at: Mapped[float]


class SessionRevisionRow(Base):
    """One save of a session; never changed."""

    __tablename__ = "session_revisions"
    __table_args__ = (Index("ix_session_revisions_digest", "session_id", "digest"),)

    session_id: Mapped[UUID] = mapped_column(ForeignKey("sessions.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    document: Mapped[str]
    """Canonical JSON: its SHA-256 is the digest."""
    author: Mapped[str] = mapped_column(String(200))
    message: Mapped[str]
    created_at: Mapped[float]


class SessionResultRow(Base):
    """A result that some revision of a session names: it is kept for as long as the session is."""

    __tablename__ = "session_results"
    __table_args__ = (Index("ix_session_results_digest", "digest"),)

    session_id: Mapped[UUID] = mapped_column(ForeignKey("sessions.id"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)


class KeptResultRow(Base):
    """A result that sessions keep, to be looked at when it is due. Only `backing.kept_results` writes here."""

    __tablename__ = "kept_results"
    __table_args__ = (Index("ix_kept_results_due", "due"),)

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    due: Mapped[float]
    taken_at: Mapped[float | None]
    """Since when it is being taken away."""


class SessionArrivalRow(Base):
    """A scan under way that joins a session once it has succeeded."""

    __tablename__ = "session_arrivals"

    session_id: Mapped[UUID] = mapped_column(ForeignKey("sessions.id"), primary_key=True)
    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    author: Mapped[str] = mapped_column(String(200))
    label: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[float]
    problem: Mapped[str | None]
    """Why it joins no more, JSON as RFC 9457 has it: told for a while."""


class ShareRow(Base):
    """A link to a session, without what would let anybody follow it. Only `backing.shares` writes here."""

    __tablename__ = "shares"
    __table_args__ = (
        Index("ix_shares_digest", "digest", unique=True),
        Index("ix_shares_session", "session_id"),
    )

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    session_id: Mapped[UUID] = mapped_column(ForeignKey("sessions.id"))
    digest: Mapped[str] = mapped_column(String(64))
    """HMAC-SHA-256 of the link's token, under the service's pepper."""
    access: Mapped[str] = mapped_column(String(16))
    redacted: Mapped[bool]
    label: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


JOBS = Base.metadata.tables["jobs"]
DISCARDS = Base.metadata.tables["discards"]
SPENT = Base.metadata.tables["spent"]
QUEUE_CLOCKS = Base.metadata.tables["queue_clocks"]
MODELS = Base.metadata.tables["models"]
RESIDENCES = Base.metadata.tables["residences"]
MODEL_COSTS = Base.metadata.tables["model_costs"]
USERS = Base.metadata.tables["users"]
API_KEYS = Base.metadata.tables["api_keys"]
LOGINS = Base.metadata.tables["logins"]
AUDIT = Base.metadata.tables["audit"]
IDEMPOTENCY_KEYS = Base.metadata.tables["idempotency_keys"]
BATCHES = Base.metadata.tables["batches"]
BATCH_LINES = Base.metadata.tables["batch_lines"]
SESSIONS = Base.metadata.tables["sessions"]
SESSION_REVISIONS = Base.metadata.tables["session_revisions"]
SESSION_RESULTS = Base.metadata.tables["session_results"]
KEPT_RESULTS = Base.metadata.tables["kept_results"]
SESSION_ARRIVALS = Base.metadata.tables["session_arrivals"]
SHARES = Base.metadata.tables["shares"]
"""The same as tables: a statement over a mapped class costs several times what SQLite takes to run it."""
