"""What sharing passes saves: scans a second of processor time, of the whole service.

Beside it the same service with one job a pass, and the forwards alone, without a service.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import torch

from bench.cluster.caller import Caller
from bench.cluster.figures import Figure, at_least, plain
from bench.cluster.kinds import KINDS, Kind, scanned
from bench.cluster.service import USERS, Cluster, Spent
from bench.timing import prompt
from neural_mri.contract.jobs import TERMINAL, JobState
from neural_mri.contract.perturbations import PerturbationScan, ZeroAblation
from worker.scanner.loading import LoadedModel

__all__ = ("Load", "Rate", "Raw", "figures", "measured", "of_each_kind", "raw")

LENGTHS = range(8, 17)
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
]
"""Each is one token of the bundled model, with the blank before it."""


UNDER_WAY = frozenset(JobState) - TERMINAL


class Load(NamedTuple):
    """How the users ask."""

    in_flight: int
    """Scans that each has under way at once."""
    each: int
    """Scans that each asks for in all."""


BUSY = Load(in_flight=8, each=8)
ONE_EACH = Load(in_flight=1, each=2)
SOME_EACH = Load(in_flight=4, each=4)
FMRI = KINDS["fMRI"]
PAIR = (FMRI, KINDS["FLAIR at the answer"])
"""What two users ask of the same prompts at once."""


class Rate(NamedTuple):
    """What came of it."""

    n_scans: int
    n_passes: int
    wall_seconds: float
    spent: Spent

    @property
    def per_cpu_second(self) -> float:
        """Scans a second of processor time."""
        return self.n_scans / self.spent.total


def prompts(count: int, *, seed: int) -> list[str]:
    """Different prompts of 8 to 16 words."""
    chance = random.Random(seed)  # noqa: S311 (loads are no secrets)
    return [" ".join(chance.choices(WORDS, k=chance.choice(LENGTHS))) for _ in range(count)]


def measured(cluster: Cluster, load: Load, *, seed: int, kinds: Sequence[Kind] = (FMRI,)) -> Rate:
    """All users at once, each asking again as soon as one of their scans has ended.

    Of several kinds, users ask in turn; those of a turn ask of the same prompts.
    """
    before, passes, began = cluster.spent(), cluster.passes(), time.monotonic()
    asyncio.run(_everybody(cluster, load, seed, kinds))
    return Rate(
        len(USERS) * load.each,
        cluster.passes() - passes,
        time.monotonic() - began,
        cluster.spent().since(before),
    )


async def _everybody(cluster: Cluster, load: Load, seed: int, kinds: Sequence[Kind]) -> None:
    async def one(user: str, kind: Kind, wanted: list[str]) -> None:
        async with Caller(cluster.settings, cluster.keys[user]) as caller:
            while wanted:
                answer = await caller.post(kind.path, _body(kind, wanted.pop()), wait=60)
                while (job := answer.json())["state"] in UNDER_WAY:
                    await asyncio.sleep(1.0)
                    answer = await caller.get(f"/api/jobs/{job['id']}")
                if job["state"] != JobState.SUCCEEDED:
                    raise RuntimeError(answer.body.decode())

    asking = []
    for number, user in enumerate(USERS):
        turn, which = divmod(number, len(kinds))
        wanted = prompts(load.each, seed=1000 * seed + turn)
        asking += [one(user, kinds[which], wanted) for _ in range(load.in_flight)]
    await asyncio.gather(*asking)


def _body(kind: Kind, text: str) -> dict[str, Any]:
    """What is asked of a prompt; of each another head is ablated."""
    body = {**kind.body, "prompt": text}
    if isinstance(kind.request, PerturbationScan):
        body["perturbations"] = [{"operation": "zero", "component": _head(text)}]
    return body


def _head(text: str) -> str:
    chance = random.Random(text)  # noqa: S311 (loads are no secrets)
    return f"blocks.{chance.randrange(30)}.attn.head_{chance.randrange(9)}"


class Raw(NamedTuple):
    """Rows a second of processor time, without a service."""

    forwards: float
    """Of plain forwards, all logits, no cache."""
    scans: float
    """Of the scan's own passes, tables made."""
    alone: float
    """Of the scan itself, one a forward."""


def raw(model: LoadedModel, *, n_rows: int, seed: int, kind: Kind = FMRI) -> Raw:
    """What passes of that many rows do in this process, without a calibration."""
    lengths = LENGTHS[::4]
    seconds = {"forwards": 0.0, "scans": 0.0, "alone": 0.0}
    request = kind.request
    for number, length in enumerate((lengths[0], *lengths)):
        rows = [prompt(model, length, seed=1000 * seed + row) for row in range(n_rows)]
        if isinstance(request, PerturbationScan):
            ablated = (ZeroAblation(component=_head(f"{seed} {number}")),)
            request = msgspec.structs.replace(request, perturbations=ablated)
        ids = torch.tensor([tokens.ids for tokens in rows])
        runs: dict[str, Callable[[], object]] = {
            "forwards": partial(model.plain, input_ids=ids, use_cache=False),
            "scans": partial(scanned, model, request, rows),
            "alone": partial(
                lambda asked, rows: [scanned(model, asked, [tokens]) for tokens in rows],
                request,
                rows,
            ),
        }
        for name, run in runs.items():
            began = time.process_time()
            with torch.inference_mode():
                run()
            if number:  # the first one warms up
                seconds[name] += time.process_time() - began
    done = n_rows * len(lengths)
    return Raw(*(done / seconds[name] for name in Raw._fields))


def _together(rates: Sequence[Rate]) -> Rate:
    return Rate(
        sum(rate.n_scans for rate in rates),
        sum(rate.n_passes for rate in rates),
        sum(rate.wall_seconds for rate in rates),
        Spent(
            {
                name: sum(rate.spent.seconds.get(name, 0.0) for rate in rates)
                for name in rates[0].spent.seconds
            }
        ),
    )


def figures(sharing: Cluster, alone: Cluster, model: LoadedModel, *, rounds: int) -> list[Figure]:
    """Both services and the bare forwards in turn, round after round.

    In turn, so that a slow minute of the machine falls on all of them alike.
    """
    shared, single, few, bare = [], [], [], []
    for cluster in (sharing, alone):
        measured(cluster, Load(in_flight=1, each=1), seed=999)
    for seed in range(rounds):
        shared.append(measured(sharing, BUSY, seed=4 * seed))
        single.append(measured(alone, BUSY, seed=4 * seed + 1))
        few.append(measured(sharing, ONE_EACH, seed=4 * seed + 2))
        bare.append(raw(model, n_rows=sharing.settings.batch_jobs, seed=seed))
    many, one, calm = _together(shared), _together(single), _together(few)
    forwards = statistics.mean(each.forwards for each in bare)
    scans = statistics.mean(each.scans for each in bare)
    n_users, rate = len(USERS), many.per_cpu_second
    return [
        plain(
            f"{n_users} users, {BUSY.in_flight} scans under way each, prompts of 8 to 16 tokens",
            f"{rate:.1f} scans a processor second, {many.n_scans / many.n_passes:.1f} a pass",
        ),
        at_least("the same against one forward a job", rate / one.per_cpu_second, 1.9, " x"),
        at_least(
            "the same against plain forwards of as many rows as may share one",
            100 * rate / forwards,
            90,
            " %",
            digits=0,
        ),
        plain(
            "the same a second of the clock, of one processor's forwards a second",
            f"{100 * many.n_scans / many.wall_seconds / forwards:.0f} %",
        ),
        plain(
            "the same against the scan's own passes of so many rows", f"{100 * rate / scans:.0f} %"
        ),
        plain(
            f"{n_users} users, one scan under way each, against one forward a job",
            f"{calm.per_cpu_second / one.per_cpu_second:.2f} x, "
            f"{calm.n_scans / calm.n_passes:.1f} a pass",
        ),
        plain("processor milliseconds a scan, shared", many.spent.each(many.n_scans)),
        plain("processor milliseconds a scan, one a forward", one.spent.each(one.n_scans)),
    ]


def of_each_kind(
    sharing: Cluster, alone: Cluster, model: LoadedModel, *, rounds: int
) -> Iterator[Figure]:
    """The same of every kind that shares a forward, and of two kinds that share one between them."""
    asked: dict[str, Sequence[Kind]] = {
        name: (kind,) for name, kind in KINDS.items() if kind.request.shared_forward is not None
    }
    asked["fMRI and FLAIR at the answer, of the same prompts"] = PAIR
    for name, kinds in asked.items():
        shared, single, bare = [], [], []
        for seed in range(rounds):
            # Prompts of their own: what has been asked before is not computed again.
            fresh = 10_000 + 100 * len(name) + 2 * seed
            shared.append(measured(sharing, SOME_EACH, seed=fresh, kinds=kinds))
            single.append(measured(alone, SOME_EACH, seed=fresh + 1, kinds=kinds))
            n_rows = sharing.settings.batch_jobs
            bare += [raw(model, n_rows=n_rows, seed=seed, kind=kind) for kind in kinds]
        many, one = _together(shared), _together(single)
        forwards = statistics.mean(each.forwards for each in bare)
        passes = statistics.harmonic_mean([each.scans for each in bare])
        in_process = passes / statistics.harmonic_mean([each.alone for each in bare])
        rate = many.per_cpu_second
        yield plain(
            f"{name}: shared against one forward a job",
            f"{rate / one.per_cpu_second:.2f} x of {one.per_cpu_second:.1f} scans a processor second, "
            f"{many.n_scans / many.n_passes:.1f} a pass",
        )
        yield plain(
            f"{name}: the same against plain forwards of as many rows as may share one, and against "
            "the scan's own passes",
            f"{100 * rate / forwards:.0f} %, {100 * rate / passes:.0f} %",
        )
        yield plain(
            f"{name}: the scan's own passes against the scan alone, without a service",
            f"{in_process:.2f} x",
        )
