"""What one user may have under way at once, and compute within any 24 hours.

Counted in the transaction that submits: of many requests at once none slips through. A day is the last 24
hours, not the calendar's. What counts is the time for which a worker held the user's jobs; those that were
claimed together share it by what they were estimated to cost, so that nobody is charged a pass that others
had a part in, and all together no more than it took. Results that were known, and scans that followed
another's, cost nothing. What a deleted job has computed counts as before.
"""

import math
from typing import Any, NamedTuple

from sqlalchemy import Executable, and_, bindparam, func, select, union_all, update
from sqlalchemy.orm import Session

from neural_mri.backing.access import ensure_user
from neural_mri.backing.database import epoch
from neural_mri.backing.prepared import Prepared
from neural_mri.backing.rows import JOBS, SPENT, USERS
from neural_mri.backing.settings import Settings
from neural_mri.contract.auth import Usage, UserLimits
from neural_mri.contract.problems import TooMany

__all__ = (
    "CHARGED",
    "DAY_SECONDS",
    "NO_LIMITS",
    "Limits",
    "NotBrief",
    "check",
    "most_jobs",
    "set_limits",
    "usage",
    "users",
    "usual",
)

DAY_SECONDS = 86_400.0
LONGEST_RETRY_SECONDS = 60.0

_job = JOBS.c
_spent = SPENT.c
_user = USERS.c
_MINE = _job.owner == bindparam("who")
_UNDER_WAY = and_(_MINE, _job.finished_at.is_(None))
_RAN_TODAY = and_(
    _MINE,
    _job.started_at.is_not(None),
    _job.finished_at > epoch() - DAY_SECONDS,
)

_OVERRIDES = select(_user.max_jobs, _user.daily_seconds).where(_user.name == bindparam("who"))
_OWN_LIMITS = Prepared(_OVERRIDES)
_OWN_LIMITS_LOCKED = Prepared(_OVERRIDES.with_for_update())
_IN_FLIGHT = Prepared(select(func.count()).select_from(JOBS).where(_UNDER_WAY))
_PART = func.coalesce(_job.claim_share, 1.0)
CHARGED = (_job.finished_at - _job.started_at) * _PART
"""What a job that has run counts for."""
_SPENT_TODAY = and_(_spent.owner == bindparam("who"), _spent.finished_at > epoch() - DAY_SECONDS)
"""By jobs that have been deleted since."""
_SECONDS_ENDED = select(
    select(func.coalesce(func.sum(CHARGED), 0.0)).where(_RAN_TODAY).scalar_subquery()
    + select(func.coalesce(func.sum(_spent.seconds), 0.0)).where(_SPENT_TODAY).scalar_subquery()
)
_SECONDS_HELD = select(func.coalesce(func.sum((epoch() - _job.started_at) * _PART), 0.0)).where(
    _UNDER_WAY, _job.lease_owner.is_not(None)
)
_LATEST = (
    select(_job.finished_at - _job.started_at)
    .where(_RAN_TODAY)
    .order_by(_job.finished_at.desc())
    .limit(16)
)
_LEAVING = union_all(
    select(
        CHARGED.label("charged"), (_job.finished_at + DAY_SECONDS - epoch()).label("leaves_in")
    ).where(_RAN_TODAY),
    select(_spent.seconds, _spent.finished_at + DAY_SECONDS - epoch()).where(_SPENT_TODAY),
).order_by("leaves_in")


class NotBrief(Exception):
    """The user has a limit that takes more to look at than a few rows: nothing was done."""


class Limits(NamedTuple):
    """Bounds of one user; 0 is none."""

    max_jobs: int = 0
    daily_seconds: float = 0.0


NO_LIMITS = Limits()


def usual(settings: Settings) -> Limits:
    """What a user may who has no limits of their own."""
    if settings.auth == "off":
        return NO_LIMITS
    return Limits(settings.user_max_jobs, settings.user_daily_seconds)


def _limits(session: Session, user: str, usual: Limits, *, lock: bool = False) -> Limits:
    """A user's own limits where they have some. Locked, submissions of one user take turns."""
    wanted = _OWN_LIMITS_LOCKED if lock else _OWN_LIMITS
    row = _run(session, wanted, user).one_or_none()
    if row is None:
        return usual
    return Limits(
        usual.max_jobs if row.max_jobs is None else row.max_jobs,
        usual.daily_seconds if row.daily_seconds is None else row.daily_seconds,
    )


def check(
    session: Session, user: str, usual: Limits, *, count: int = 1, briefly: bool = False
) -> None:
    """Whether the user may submit so many jobs more. Raises `TooMany`, which says when to try again.

    What somebody has computed within a day is summed up over all of their jobs of it: asked `briefly`, this raises
    `NotBrief` instead.
    """
    limits = _limits(session, user, usual, lock=True)
    if briefly and limits.daily_seconds:
        raise NotBrief
    if limits.max_jobs:
        in_flight: int = _run(session, _IN_FLIGHT, user).scalar_one()
        if in_flight + count > limits.max_jobs:
            more = "" if count == 1 else f"there is no room for {count} more; "
            raise TooMany(
                f"{in_flight} of your jobs are under way, {limits.max_jobs} are allowed: {more}try "
                "again when some have ended",
                in_flight=in_flight,
                limit=limits.max_jobs,
                retry_after_seconds=_typical_seconds(session, user),
            )
    if limits.daily_seconds:
        used = _seconds(session, user)
        if used >= limits.daily_seconds:
            raise TooMany(
                f"your jobs have computed for {used:.0f} s within the last 24 hours, "
                f"{limits.daily_seconds:g} s are allowed",
                seconds=round(used, 3),
                limit=limits.daily_seconds,
                retry_after_seconds=_until_below(session, user, used, limits.daily_seconds),
            )


def most_jobs(session: Session, user: str, usual: Limits) -> int | None:
    """How many jobs the user may have under way: none after a day's work, None for any number."""
    limits = _limits(session, user, usual, lock=True)
    if limits.daily_seconds and _seconds(session, user) >= limits.daily_seconds:
        return 0
    return limits.max_jobs or None


def _seconds(session: Session, user: str) -> float:
    ended: float = _run(session, _SECONDS_ENDED, user).scalar_one()
    held: float = _run(session, _SECONDS_HELD, user).scalar_one()
    return ended + held


def _typical_seconds(session: Session, user: str) -> int:
    """About how long one of the user's jobs holds a worker."""
    lasted: list[float] = [seconds for (seconds,) in _run(session, _LATEST, user)]
    mean = sum(lasted) / len(lasted) if lasted else 1.0
    return math.ceil(min(max(mean, 1.0), LONGEST_RETRY_SECONDS))


def _until_below(session: Session, user: str, used: float, limit: float) -> int:
    """Seconds until enough of what was computed is a day ago."""
    for row in _run(session, _LEAVING, user):
        used -= row.charged
        if used < limit:
            leaves_in: float = row.leaves_in
            return max(1, math.ceil(leaves_in))
    # What still runs is over the limit by itself.
    return math.ceil(DAY_SECONDS)


def usage(session: Session, user: str, usual: Limits) -> Usage:
    """What a user has under way and has computed, beside what they may."""
    limits = _limits(session, user, usual)
    return Usage(
        user=user,
        in_flight=_run(session, _IN_FLIGHT, user).scalar_one(),
        max_jobs=limits.max_jobs or None,
        seconds_today=round(_seconds(session, user), 3),
        daily_seconds=limits.daily_seconds or None,
    )


def users(session: Session) -> list[str]:
    """Everybody who has or had a key, by name."""
    return list(session.connection().execute(select(_user.name).order_by(_user.name)).scalars())


def set_limits(session: Session, user: str, wanted: UserLimits) -> None:
    """Give a user limits of their own, or take them back."""
    ensure_user(session, user)
    session.connection().execute(
        update(USERS)
        .where(_user.name == user)
        .values(max_jobs=wanted.max_jobs, daily_seconds=wanted.daily_seconds)
    )


def _run(session: Session, statement: Executable | Prepared, user: str) -> Any:
    if isinstance(statement, Prepared):
        return statement.run(session, {"who": user})
    return session.connection().execute(statement, {"who": user})
