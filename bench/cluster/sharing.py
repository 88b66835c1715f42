"""Equal scans asked for at once are computed once, and one that is known is answered at once."""

import asyncio
import time

from bench.cluster.caller import Caller
from bench.cluster.figures import Figure, at_most, percentile
from bench.cluster.service import Cluster
from neural_mri.contract.jobs import JobState

__all__ = ("figures",)

AT_ONCE = 50
BAR_MILLISECONDS = 15.0
PROMPT = {"prompt": "The Eiffel Tower is located in the city of"}
PATH = "/api/scan/activation"


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
    hits = [1e3 * seconds for seconds in asyncio.run(_hits(cluster, n_hits))]
    return [
        Figure(
            f"{AT_ONCE} equal requests at once",
            f"{n_passes} forward pass, {whole} results",
            f"1 and {AT_ONCE}: {'met' if exact else 'missed'}",
        ),
        at_most(
            "a known scan, request to answer, median",
            percentile(hits, 0.5),
            BAR_MILLISECONDS,
            " ms",
        ),
    ]
