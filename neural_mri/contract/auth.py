"""Who may do what: API keys, the scopes they carry, and who a request comes from.

A key is written `nmri_<id>_<secret>`: 12 hexadecimal digits that may be shown, and 256 random bits that are
shown once, when the key is made. No struct here prints a secret.
"""

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

import msgspec
from msgspec import Meta

from neural_mri.contract.problems import NotFound, Problem

__all__ = (
    "ALL_SCOPES",
    "KEY_PATTERN",
    "AuditAction",
    "AuditEntry",
    "CreatedKey",
    "Identity",
    "KeyView",
    "LoginRequest",
    "MissingScope",
    "NewKey",
    "Scope",
    "Unauthenticated",
    "UnknownKey",
    "Usage",
    "UserLimits",
)

KEY_PATTERN = re.compile(r"nmri_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")

UserName = Annotated[
    str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+\-]*$")
]
Label = Annotated[str, Meta(max_length=100)]


class Scope(StrEnum):
    """What a key lets its bearer do."""

    SCAN_READ = "scan:read"
    """Look at models, and at one's own jobs and results."""
    SCAN_WRITE = "scan:write"
    """Ask for scans, and stop them."""
    MODEL_LOAD = "model:load"
    """Have models loaded and unloaded."""
    ADMIN = "admin"
    """Everything: other people's keys and limits, and the record of who did what, among it."""


ALL_SCOPES = tuple(Scope)


class Unauthenticated(Problem):
    """Who asks is not known."""

    status = 401


class MissingScope(Problem):
    """The API key does not allow this."""

    status = 403


class UnknownKey(NotFound):
    """There is no such API key."""


class KeyView(msgspec.Struct, frozen=True, kw_only=True):
    """An API key as it may be shown: everything but its secret."""

    id: str
    user: str
    label: str
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class NewKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An API key to be made."""

    user: UserName | None = None
    """Whose it will be; only an admin can make one for somebody else."""
    label: Label = ""
    """What it is for, in its owner's words."""
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1, max_length=len(ALL_SCOPES))] = (
        Scope.SCAN_READ,
        Scope.SCAN_WRITE,
    )
    expires_in_seconds: Annotated[float, Meta(gt=0, le=3_153_600_000)] | None = None
    """Never where left out; never later than the key that makes it."""


class CreatedKey(KeyView, frozen=True, kw_only=True):
    """A key that has just been made."""

    key: str
    """The whole key, secret included: shown this once."""

    def __repr__(self) -> str:
        return f"CreatedKey({self.id})"


class LoginRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key, to be exchanged for a session's cookie."""

    key: Annotated[str, Meta(min_length=1, max_length=200)]

    def __repr__(self) -> str:
        return "LoginRequest(***)"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who a request comes from, as the service sees it."""

    user: str
    scopes: tuple[Scope, ...]
    key: str | None = None
    """The id of the API key it came with; None where the service asks for none."""
    expires_at: datetime | None = None
    """When key or session end."""

    def may(self, scope: Scope) -> bool:
        """Whether this is allowed; an admin may do everything."""
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def require(self, scope: Scope) -> None:
        """Raises `MissingScope` where this is not allowed."""
        if not self.may(scope):
            raise MissingScope(
                f"this needs the scope {scope}; the key has " + ", ".join(sorted(self.scopes)),
                scope=scope.value,
            )


class UserLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One user's own limits: null is everybody's, 0 is none."""

    max_jobs: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    """Jobs under way at once, waiting ones among them."""
    daily_seconds: Annotated[float, Meta(ge=0)] | None = None
    """Seconds for which workers hold the user's jobs, within any 24 hours."""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a user has under way and has computed, beside what they may."""

    user: str
    in_flight: int
    """Jobs that have not ended."""
    max_jobs: int | None
    """None: no limit."""
    seconds_today: float
    """For which workers held the user's jobs, within the last 24 hours."""
    daily_seconds: float | None


class AuditAction(StrEnum):
    """What the record of deeds tells of."""

    KEY_CREATED = "key_created"
    KEY_REVOKED = "key_revoked"
    LOGGED_IN = "logged_in"
    LIMITS_SET = "limits_set"
    MODEL_LOADED = "model_loaded"
    """Asked for: the job in the details tells what became of it."""
    MODEL_UNLOADED = "model_unloaded"
    MODEL_REGISTERED = "model_registered"
    """Its weights brought into the store, or others in their place, on the server's own machine."""
    JOB_CANCELLED = "job_cancelled"
    JOB_DELETED = "job_deleted"
    SESSION_SHARED = "session_shared"
    SESSION_UNSHARED = "session_unshared"
    SESSION_DELETED = "session_deleted"


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Who did what, when."""

    id: UUID
    at: datetime
    user: str
    key: str | None = None
    """The id of the API key it was done with."""
    action: AuditAction
    subject: str
    """What it was done to: a key's id, a model's name, a user's, a job's id."""
    details: dict[str, Any] = {}
