"""Who floods the queue delays nobody else, and loads of a hundred to one get equal shares.

The many are written to the database, as the API writes a batch; whoever is measured asks by HTTP.
"""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from bench.cluster.caller import Caller
from bench.cluster.figures import Figure, at_least, at_most, plain
from bench.cluster.service import USERS, Cluster
from neural_mri.backing import jobs, keys, models
from neural_mri.backing.database import epoch
from neural_mri.backing.records import Submission
from neural_mri.backing.rows import JOBS
from neural_mri.contract.jobs import JobKind
from neural_mri.contract.scan_keys import scan_key
from neural_mri.contract.scans import ActivationScan, encode_scan
from neural_mri.contract.tokens import Operands, Span, Tokens
from tests.chaos.premises import frozen

__all__ = ("flood", "jain", "shares", "submissions")

FLOODER = "user-00"
FLOOD = 10_000
HEAVY, LIGHT = 100, 1
LIGHT_JOBS = 45
N_USERS = 8
MILLISECOND = 1e-3
"""What the database's clock tells apart."""
LENGTHS = (8, 13, 10, 16, 11, 9, 14, 12, 15)


def jain(shares: Sequence[float]) -> float:
    """Jain's index: 1 where all shares are equal, 1/n where one has everything (Jain, Chiu and Hawe 1984)."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))


def submissions(
    cluster: Cluster, owner: str, count: int, *, lengths: Sequence[int], seed: int
) -> list[Submission]:
    """Different scans of one user, of those lengths in tokens in turn."""
    model = cluster.sessions.read(models.get, cluster.settings.default_model)
    if model is None:
        raise LookupError(cluster.settings.default_model)
    chance = random.Random(seed)  # noqa: S311 (loads are no secrets)
    made = []
    for number in range(count):
        length = lengths[number % len(lengths)]
        ids = tuple(chance.randrange(3, model.architecture.d_vocab) for _ in range(length))
        scan = ActivationScan(prompt=f"{owner} {number}", model=model.name)
        tokens = Tokens(
            ids=ids,
            texts=("x",) * length,
            spans=tuple(Span(at, at + 1) for at in range(length)),
        )
        made.append(
            Submission(
                owner=owner,
                kind=JobKind.SCAN,
                model=model.name,
                revision=model.revision,
                queue=keys.scan_queue(model.revision),
                request=encode_scan(scan),
                tokens=tokens,
                scan_key=scan_key(
                    scan,
                    token_ids=ids,
                    revision=model.revision,
                    tokenizer_digest=model.tokenizer_digest,
                    numerics=model.numerics,
                    operands=Operands(),
                ),
            )
        )
    return made


def _send(cluster: Cluster, wanted: Sequence[Submission]) -> None:
    """Record one user's jobs as the API does a batch, some hundreds a transaction: others write too."""
    for at in range(0, len(wanted), 500):
        cluster.sessions.write(jobs.submit_many, wanted[at : at + 500], max_queued=10**6)


def _forget_waiting(session: Session) -> None:
    session.execute(delete(JOBS).where(JOBS.c.finished_at.is_(None), JOBS.c.lease_owner.is_(None)))


class _Wait(NamedTuple):
    """One job's wait, in seconds."""

    waited: float
    passes: float
    """The same in passes of the flood: of those that were under way meanwhile, in the mean."""
    began: int
    """Passes of the flood that began meanwhile."""


async def _waits(cluster: Cluster, count: int) -> list[_Wait]:
    """What users wait who ask for one scan each while the flood is served."""
    waits = []
    for number in range(count):
        user = f"user-{number + 1:02}"
        async with Caller(cluster.settings, cluster.keys[user]) as caller:
            prompt = f"Ask number {number}: the Eiffel Tower stands in"
            answer = await caller.post("/api/scan/activation", {"prompt": prompt}, wait=60)
        job = cluster.job(answer.json()["id"])
        if job.started_at is None:
            raise RuntimeError(f"job {job.id} is {job.state}")
        created, started = job.created_at.timestamp(), job.started_at.timestamp()
        behind = _passes_between(cluster, created, started)
        lasted = statistics.fmean(each.ended - each.began for each in behind)
        began = sum(created < each.began for each in behind)
        waits.append(_Wait(started - created, (started - created) / lasted, began))
    return waits


class _Pass(NamedTuple):
    """When jobs that were claimed together were, and when the last of them had ended."""

    began: float
    ended: float


def _passes_between(cluster: Cluster, since: float, until: float) -> list[_Pass]:
    """The flood's passes that were under way at some time between two, or else the one before."""
    together = (
        select(JOBS.c.started_at.label("began"), func.max(JOBS.c.finished_at).label("ended"))
        .where(
            JOBS.c.owner == FLOODER,
            JOBS.c.finished_at.is_not(None),
            # Its own pass may take some of the flood along.
            JOBS.c.started_at < until - MILLISECOND,
        )
        .group_by(JOBS.c.started_at)
        .order_by(JOBS.c.started_at.desc())
        .limit(16)
    )
    with cluster.sessions.reading() as session:
        latest = [_Pass(row.began, row.ended) for row in session.execute(together)]
    return [each for each in latest if each.ended > since] or latest[:1]


def _shares(cluster: Cluster) -> dict[str, int]:
    """Tokens computed for each of eight users while all of them had work waiting."""
    loads = {
        user: LIGHT_JOBS * (HEAVY if number < N_USERS // 2 else LIGHT)
        for number, user in enumerate(USERS[:N_USERS])
    }
    # Nobody is served before all have asked: who is alone is given mates from far ahead of their turn, and has
    # so much less of what comes next.
    with frozen([cluster.service.child("worker").pid]):
        # Nine lengths in an order that repeats after all of them: every user's work is alike in the mean.
        for seed, (user, count) in enumerate(loads.items()):
            _send(cluster, submissions(cluster, user, count, lengths=LENGTHS, seed=seed))
        asked = _now(cluster)
    small = [user for user, count in loads.items() if count == LIGHT_JOBS]
    while (done := _first_done(cluster, small)) is None:
        time.sleep(0.2)
    served: Counter[str] = Counter(dict.fromkeys(loads, 0))
    shares = select(JOBS.c.owner, JOBS.c.n_tokens).where(
        JOBS.c.started_at >= asked, JOBS.c.started_at <= done, JOBS.c.owner.in_(loads)
    )
    with cluster.sessions.reading() as session:
        for row in session.execute(shares):
            served[row.owner] += row.n_tokens
    cluster.sessions.write(_forget_waiting)
    return dict(served)


def _now(cluster: Cluster) -> float:
    with cluster.sessions.reading() as session:
        return float(session.execute(select(epoch())).scalar_one())


def _first_done(cluster: Cluster, users: Sequence[str]) -> float | None:
    """When the last job of one of the users was taken, the first of whom that is true; None before."""
    taken = (
        select(func.max(JOBS.c.started_at).label("at"))
        .where(JOBS.c.owner.in_(users))
        .group_by(JOBS.c.owner)
        .having(func.count() == func.count(JOBS.c.started_at))
    )
    with cluster.sessions.reading() as session:
        return min(session.execute(taken).scalars(), default=None)


def flood(cluster: Cluster) -> list[Figure]:
    """One user's flood, and others who come later."""
    began = time.monotonic()
    _send(cluster, submissions(cluster, FLOODER, FLOOD, lengths=LENGTHS, seed=1))
    took = time.monotonic() - began
    waits = asyncio.run(_waits(cluster, 7))
    with cluster.sessions.reading() as session:
        left = len(session.execute(select(JOBS.c.id).where(JOBS.c.finished_at.is_(None))).all())
    cluster.sessions.write(_forget_waiting)
    return [
        at_most(
            f"wait of a second user's job behind {FLOOD:,} of a first's, the longest of {len(waits)}",
            max(wait.passes for wait in waits),
            2.0,
            " job-times",
            digits=2,
        ),
        plain(
            "passes of the first's that began while it waited, the most",
            str(max(wait.began for wait in waits)),
        ),
        plain(
            f"the same in seconds; {left:,} jobs were still waiting, recorded in {took:.1f} s",
            f"{max(wait.waited for wait in waits):.2f} s",
        ),
    ]


def shares(cluster: Cluster) -> list[Figure]:
    """Unequal loads, on a service whose users have asked for nothing yet."""
    found = _shares(cluster)
    return [
        at_least(
            f"Jain's index of tokens computed for {N_USERS} users, loads {HEAVY}:{LIGHT}",
            jain(list(found.values())),
            0.95,
            digits=3,
        ),
        plain(
            f"of which, tokens by user, the first {N_USERS // 2} of the large loads",
            ", ".join(map(str, found.values())),
        ),
    ]
