"""What the service does, as Prometheus reads it.

Labels are routes by their template, models, kinds, lanes: never an id, a user or a text.
"""

from collections import Counter as Counted
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from neural_mri.backing.events import WorkerBeat
from neural_mri.backing.records import Job
from neural_mri.contract.cluster import QueueLoad
from neural_mri.contract.jobs import JobState, Lane

__all__ = ("MEDIA_TYPE", "NO_ROUTE", "Metrics", "Now")

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NO_ROUTE = "none"
STREAMS = frozenset(
    {
        "/api/events",
        "/api/jobs/{job_id}/events",
        "/api/batches/{batch_id}/events",
        "/api/sessions/{session_id}/events",
        "/api/shared/events",
    }
)
"""They last as long as their readers like: no duration of the service's."""


class Metrics:
    """Counts of one process, and what is looked up when it is asked."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "neural_mri_requests",
            "Requests answered; status 0 where the caller left first",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "neural_mri_request_seconds",
            "Seconds from request to answer, waits that were asked for included; event streams are not",
            ("route", "method"),
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
            registry=self._registry,
        )
        self._accepted = Counter(
            "neural_mri_jobs_accepted",
            "Jobs recorded: answered from a stored result, following an equal one, or queued",
            ("kind", "answer"),
            registry=self._registry,
        )

    def answered(self, scope: Any, status: int | None, seconds: float) -> None:
        """Count a request that has ended."""
        route = str(scope.get("path_template") or NO_ROUTE)
        method = "HEAD" if scope.get("head_only") else str(scope["method"])
        self._requests.labels(route, method, str(status or 0)).inc()
        if route not in STREAMS:
            self._seconds.labels(route, method).observe(seconds)

    def accepted(self, job: Job) -> str:
        """Count a job that has just been recorded; how it was answered."""
        if job.cached:
            answer = "stored"
        elif job.leader is not None and job.state is JobState.QUEUED:
            answer = "followed"
        else:
            answer = "queued"
        self._accepted.labels(job.kind.value, answer).inc()
        return answer

    def accepted_batch(self, *, stored: int, queued: int) -> None:
        """Count the scans of a batch that has just been recorded."""
        for answer, count in (("stored", stored), ("queued", queued)):
            self._accepted.labels("scan", answer).inc(count)

    def exposition(self, now: "Now") -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(_Together(self._registry, now))


class Now(NamedTuple):
    """What is looked up when the metrics are asked for; None is what could not be."""

    loads: Sequence[QueueLoad] | None
    workers: Sequence[WorkerBeat] | None
    """Those heard of lately."""
    readers: int
    lines: Mapping[Lane, int] = MappingProxyType({})
    """Lines of batches that wait for room, by lane."""
    deleted: Mapping[str, int] | None = None
    """How much, by what it was and why: `job:age`."""
    busy_workers: int | None = None
    """Those that hold jobs."""

    def collect(self) -> Iterator[Metric]:
        """As gauges."""
        up = GaugeMetricFamily("neural_mri_up", "Whether it answers", labels=("part",))
        up.add_metric(("database",), float(self.loads is not None))
        up.add_metric(("redis",), float(self.workers is not None))
        yield up
        yield GaugeMetricFamily(
            "neural_mri_event_readers", "Event streams being read", value=self.readers
        )
        if self.workers is not None:
            yield GaugeMetricFamily(
                "neural_mri_workers", "Workers heard of lately", value=len(self.workers)
            )
            yield _copies(self.workers)
        if self.busy_workers is not None:
            yield GaugeMetricFamily(
                "neural_mri_workers_busy", "Workers that hold jobs", value=self.busy_workers
            )
        yield self._lines()
        if self.deleted is not None:
            deleted = CounterMetricFamily(
                "neural_mri_deleted",
                "Jobs, batches and results deleted: because somebody asked, for their age, or needed no more",
                labels=("what", "why"),
            )
            for name, count in sorted(self.deleted.items()):
                deleted.add_metric(name.split(":"), count)
            yield deleted
        yield from self._of_lanes()

    def _lines(self) -> Metric:
        waiting = GaugeMetricFamily(
            "neural_mri_waiting_lines",
            "Lines of batches that wait for room in the queues, and are no jobs yet",
            labels=("lane",),
        )
        for lane, count in self.lines.items():
            waiting.add_metric((lane.value,), count)
        return waiting

    def _of_lanes(self) -> Iterator[Metric]:
        labels = ("model", "lane")
        waiting = GaugeMetricFamily(
            "neural_mri_jobs_waiting", "Jobs that no worker has taken yet", labels=labels
        )
        oldest = GaugeMetricFamily(
            "neural_mri_jobs_oldest_wait_seconds",
            "How long the first of them has waited",
            labels=labels,
        )
        running = GaugeMetricFamily(
            "neural_mri_jobs_running", "Jobs that workers hold", labels=labels
        )
        # A model's work stands in two queues: what needs it loaded, and what does not.
        by_lane: defaultdict[tuple[str, str], list[QueueLoad]] = defaultdict(list)
        for load in self.loads or ():
            by_lane[load.model, load.lane.value].append(load)
        for lane, loads in by_lane.items():
            waiting.add_metric(lane, sum(load.waiting for load in loads))
            oldest.add_metric(lane, max(load.oldest_seconds for load in loads))
            running.add_metric(lane, sum(load.running for load in loads))
        yield from (waiting, oldest, running)


def _copies(workers: Sequence[WorkerBeat]) -> Metric:
    copies = GaugeMetricFamily(
        "neural_mri_model_copies",
        "Workers that hold a model, are loading it or letting it go",
        labels=("model", "state"),
    )
    states = Counted((held.name, held.state.value) for beat in workers for held in beat.models)
    for labels, count in states.items():
        copies.add_metric(labels, count)
    return copies


class _Together(CollectorRegistry):
    """What was counted and what was looked up, for one answer."""

    def __init__(self, counted: CollectorRegistry, now: Now) -> None:
        super().__init__()
        self._counted = counted
        self._now = now

    def collect(self) -> Iterator[Metric]:
        yield from self._counted.collect()
        yield from self._now.collect()
