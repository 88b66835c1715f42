"""Equal scans asked for at once are computed once, one that is known is answered at once, and kinds share."""

import asyncio
import random
import time

from bench.cluster.caller import Caller
from bench.cluster.figures import Figure, at_most, percentile, plain
from bench.cluster.service import Cluster
from bench.cluster.throughput import PAIR, WORDS
from neural_mri.contract.jobs import JobState

__all__ = ("figures",)

AT_ONCE = 50
BAR_MILLISECONDS = 15.0
PROMPT = {"prompt": "The Eiffel Tower is located in the city of"}
PATH = "/api/scan/activation"
N_WORDS = 9


async def _at_once(cluster: Cluster) -> list[str]:
    """Ids of the jobs of equal requests, sent together by all users."""
    keys = list(cluster.keys.values())

    async def one(caller: Caller) -> str:
        answer = await caller.post(PATH, PROMPT, wait=60)
        return str(answer.json()["id"])

    callers = [Caller(cluster.settings, keys[number % len(keys)]) for number in range(AT_ONCE)]
    for caller in callers:
        await caller.__aenter__()
    try:
        return list(await asyncio.gather(*map(one, callers)))
    finally:
        for caller in callers:
            await caller.__aexit__(None, None, None)


async def _of_two_kinds(cluster: Cluster, n_prompts: int) -> list[str]:
    """Ids of the jobs of different prompts, each asked about in two ways by two users, together."""
    chance = random.Random(7)  # noqa: S311 (loads are no secrets)
    texts = [" ".join(chance.choices(WORDS, k=N_WORDS)) for _ in range(n_prompts)]
    keys = list(cluster.keys.values())

    async def one(key: str, path: str, body: dict[str, object]) -> str:
        async with Caller(cluster.settings, key) as caller:
            answer = await caller.post(path, body, wait=60)
            return str(answer.json()["id"])

    asked = [(text, kind) for text in texts for kind in PAIR]
    return list(
        await asyncio.gather(
            *(
                one(keys[number % len(keys)], kind.path, {**kind.body, "prompt": text})
                for number, (text, kind) in enumerate(asked)
            )
        )
    )


async def _hits(cluster: Cluster, n_jobs: int) -> list[float]:
    seconds = []
    async with Caller(cluster.settings, cluster.keys["user-00"]) as caller:
        for _ in range(n_jobs):
            began = time.perf_counter()
            answer = await caller.post(PATH, PROMPT)
            seconds.append(time.perf_counter() - began)
            if not answer.json()["cached"]:
                raise RuntimeError("a known scan was computed again")
    return seconds


def figures(cluster: Cluster, *, n_hits: int = 200) -> list[Figure]:
    """One burst, then hits one after another."""
    before = cluster.passes()
    made = [cluster.job(job_id) for job_id in asyncio.run(_at_once(cluster))]
    n_passes = cluster.passes() - before
    whole = sum(job.state is JobState.SUCCEEDED for job in made)
    results = {job.manifest for job in made}
    exact = n_passes == 1 and whole == AT_ONCE and len(results) == 1
    before = cluster.passes()
    mates = [cluster.job(job_id) for job_id in asyncio.run(_of_two_kinds(cluster, 8))]
    n_shared = cluster.passes() - before
    n_whole = sum(job.state is JobState.SUCCEEDED for job in mates)
    hits = [1e3 * seconds for seconds in asyncio.run(_hits(cluster, n_hits))]
    return [
        Figure(
            f"{AT_ONCE} equal requests at once",
            f"{n_passes} forward pass, {whole} results",
            f"1 and {AT_ONCE}: {'met' if exact else 'missed'}",
        ),
        plain(
            "8 prompts of one length, each asked as fMRI and as FLAIR at the answer by two users at once",
            f"{n_shared} passes, {n_whole} results",
        ),
        at_most(
            "a known scan, request to answer, median",
            percentile(hits, 0.5),
            BAR_MILLISECONDS,
            " ms",
        ),
    ]
