"""Many readers of event streams on one API process: how late a frame is.

Twenty jobs that this process holds tell a frame of a real model's size, once or several times a second; a
hundred readers follow each. The readers are one process too: what they take to read is part of the delay.
"""

import asyncio
import resource
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast
from uuid import UUID

import msgspec
from sqlalchemy import delete
from sqlalchemy.orm import Session

from bench.cluster.fairness import submissions
from bench.cluster.figures import Figure, at_most, percentile, plain
from bench.cluster.service import USERS, Cluster
from neural_mri.backing import broker, jobs
from neural_mri.backing.events import AsyncPublisher
from neural_mri.backing.leases import LeaseOwner
from neural_mri.backing.records import Job, Submission
from neural_mri.backing.rows import JOBS as JOBS_TABLE
from neural_mri.contract.events import ActivationFrame, FrameLayer, encode_event

__all__ = ("figures",)

QUEUE = "bench.streams"
CLIENTS = 2000
JOBS = 20
FRAMES_PER_SECOND = 1.0
SECONDS = 12.0
BAR_MILLISECONDS = 250.0
_MARK = b'"token":"'


class _Reader(asyncio.Protocol):
    """Reads one stream, and looks only for when each frame was told."""

    def __init__(self, request: bytes, delays: list[float]) -> None:
        self._request = request
        self._delays = delays
        self._rest = b""
        self.begun = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Look for frames."""
        now = time.monotonic()
        self._rest += data
        while (at := self._rest.find(_MARK)) >= 0:
            end = self._rest.find(b'"', at + len(_MARK))
            if end < 0:
                return
            told = self._rest[at + len(_MARK) : end]
            if told == b"first":
                self.begun.set()
            else:
                self._delays.append(now - float(told))
            self._rest = self._rest[end:]
        self._rest = self._rest[-len(_MARK) :]


def _request(cluster: Cluster, job_id: UUID, user: str) -> bytes:
    return (
        f"GET /api/jobs/{job_id}/events HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        f"authorization: Bearer {cluster.keys[user]}\r\n\r\n"
    ).encode()


def _frame(told: str) -> ActivationFrame:
    """As large as one of the bundled model's, and saying when it was told."""
    heads = tuple(0.1234567 * head for head in range(9))
    layers = [FrameLayer(layer_id="embed", type="embedding", activations=(1.234567,))]
    for layer in range(30):
        layers.append(
            FrameLayer(layer_id=f"blocks.{layer}.attn", type="attention", activations=heads)
        )
        layers.append(
            FrameLayer(layer_id=f"blocks.{layer}.mlp", type="mlp", activations=heads[3:4])
        )
    return ActivationFrame(token_idx=0, token=told, layers=tuple(layers), unit="L2 norm")


class _Round(NamedTuple):
    """What all readers saw."""

    delays: list[float]
    """Of every frame at every reader, in seconds."""
    n_expected: int
    api_seconds: float
    """Of the API's processor time, once everybody was there."""


async def _listen(cluster: Cluster, held: Sequence[Job]) -> _Round:
    loop = asyncio.get_running_loop()
    delays: list[float] = []
    readers: list[_Reader] = []
    transports = []
    publisher = AsyncPublisher(broker.connect_async(cluster.settings), cluster.settings)
    for job in held:
        await publisher.publish(job.id, _frame("first"))
    for number in range(CLIENTS):
        job = held[number % len(held)]
        request = _request(cluster, job.id, job.owner)
        transport, reader = await loop.create_connection(
            partial(_Reader, request, delays), cluster.settings.host, cluster.settings.port
        )
        transports.append(transport)
        readers.append(reader)
        if number % 25 == 24:
            await asyncio.sleep(0.05)
    await asyncio.wait_for(asyncio.gather(*(reader.begun.wait() for reader in readers)), 120)
    before = cluster.spent()
    began, n_told = time.monotonic(), 0
    while time.monotonic() - began < SECONDS:
        # The jobs take turns, as scans of different people do.
        for job in held:
            await publisher.publish(job.id, _frame(f"{time.monotonic():.6f}"))
            n_told += 1
            await asyncio.sleep(
                max(0.0, began + n_told / (len(held) * FRAMES_PER_SECOND) - time.monotonic())
            )
    n_expected = n_told * CLIENTS // len(held)
    for _ in range(50):
        if len(delays) >= n_expected:
            break
        await asyncio.sleep(0.1)
    spent = cluster.spent().since(before)
    for transport in transports:
        transport.close()
    return _Round(delays, n_expected, spent.seconds["api"])


def _hold(cluster: Cluster) -> list[Job]:
    """Jobs of a queue that no worker serves, held by this process."""
    owner = LeaseOwner.here()

    def claim(session: Session, wanted: Sequence[Submission]) -> list[Job]:
        for submission in wanted:
            jobs.submit(session, submission, max_queued=10**6)
        return jobs.claim(session, queue=QUEUE, owner=owner, limit=len(wanted), lease_seconds=600)

    wanted = [
        msgspec.structs.replace(each, queue=QUEUE, scan_key=None)
        for number in range(JOBS)
        for each in submissions(cluster, USERS[number % len(USERS)], 1, lengths=(8,), seed=number)
    ]
    return cluster.sessions.write(claim, wanted)


def _forget(session: Session) -> None:
    session.execute(delete(JOBS_TABLE).where(JOBS_TABLE.c.queue == QUEUE))


def figures(cluster: Cluster) -> list[Figure]:
    """All readers at once, for some seconds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 3 * CLIENTS)), hard))
    held = _hold(cluster)
    try:
        heard = asyncio.run(_listen(cluster, held))
    finally:
        cluster.sessions.write(_forget)
    milliseconds = [1e3 * delay for delay in heard.delays]
    size = len(encode_event(_frame("0")))
    return [
        at_most(
            f"delay of a frame of {size / 1024:.1f} KiB to each of {CLIENTS:,} readers of {JOBS} jobs, "
            f"{FRAMES_PER_SECOND:g} a second each, 95th percentile",
            percentile(milliseconds, 0.95),
            BAR_MILLISECONDS,
            " ms",
            digits=0,
        ),
        plain("the same, median", f"{percentile(milliseconds, 0.5):.0f} ms"),
        plain(
            "frames that arrived, of those that were told",
            f"{len(milliseconds):,} of {heard.n_expected:,}",
        ),
        plain(
            "processor time of the API a frame and reader",
            f"{1e6 * heard.api_seconds / max(1, len(milliseconds)):.0f} µs",
        ),
    ]
