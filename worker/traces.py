"""The spans of this worker's attempts: what each job waited for, and what its time went into.

They continue the trace of the request that asked for the job (`backing.tracing`). Jobs that share a pass
each have its time in their own trace.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from neural_mri.backing import tracing
from neural_mri.backing.records import Job
from neural_mri.backing.tracing import NO_SPAN, NOTHING, Kind, Span
from neural_mri.contract.jobs import JobState

__all__ = ("Traces",)

FAILURES = frozenset({JobState.FAILED, JobState.EXPIRED, JobState.QUARANTINED})


class Traces:
    """The spans of attempts that are not over."""

    def __init__(self) -> None:
        self._attempts: dict[UUID, Span] = {}

    @contextmanager
    def attempts(self, claimed: Iterable[Job], *, began: float) -> Iterator[None]:
        """Each job's attempt, while the block runs; the claim that brought them began at `began`."""
        now = time.time()
        for job in claimed:
            about = {
                "neural_mri.job": str(job.id),
                "neural_mri.kind": job.kind.value,
                "neural_mri.model": job.model,
                "neural_mri.lane": job.lane.value,
                "neural_mri.attempt": job.attempt,
                "neural_mri.tokens": job.n_tokens,
            }
            asked = job.created_at.timestamp()
            # By the database's clock: on another machine it may be a little ahead of ours.
            taken = max(asked, (job.started_at or job.created_at).timestamp())
            tracing.begin("queue", job.traceparent, since=asked, until=taken, attributes=about)
            attempt = tracing.begin(
                "attempt", job.traceparent, kind=Kind.CONSUMER, since=began, attributes=about
            )
            tracing.begin("claim", attempt.traceparent, since=began, until=now)
            self._attempts[job.id] = attempt
        try:
            yield
        finally:
            for job in claimed:
                self._attempts.pop(job.id, NO_SPAN).end()

    @contextmanager
    def part(
        self, name: str, jobs: Iterable[Job], attributes: Mapping[str, Any] = NOTHING
    ) -> Iterator[list[Span]]:
        """A part of these jobs' attempts, which they have in common."""
        spans = [
            tracing.begin(
                name, self._attempts.get(job.id, NO_SPAN).traceparent, attributes=attributes
            )
            for job in jobs
        ]
        try:
            yield spans
        except BaseException:
            for span in spans:
                span.fail()
            raise
        finally:
            for span in spans:
                span.end()

    def moved(self, job: Job) -> None:
        """A job has come to a state, its last perhaps."""
        attempt = self._attempts.get(job.id, NO_SPAN)
        attempt.note({"neural_mri.state": job.state.value})
        if job.state in FAILURES:
            problem = job.problem or {}
            # What the problem says in detail may quote the request.
            attempt.note({"error.type": str(problem.get("type", "unknown"))})
            attempt.fail()
