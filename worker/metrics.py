"""What this worker does, as Prometheus reads it: counted always, served where a port is set.

Labels are names of models, kinds and states: never a job's, a user's or a prompt's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from neural_mri.backing.events import HeldModel
from neural_mri.backing.settings import Settings
from neural_mri.contract.problems import Unavailable

__all__ = (
    "CLAIMS",
    "ENDED",
    "EVICTED",
    "FORWARD_SECONDS",
    "KILLED",
    "LOAD_SECONDS",
    "MEMORY",
    "OUT_OF_MEMORY",
    "PASS_JOBS",
    "REGISTRY",
    "RELEASED",
    "Held",
    "served",
)

REGISTRY = CollectorRegistry()

CLAIMS = Counter(
    "neural_mri_worker_claims",
    "Claims made on a ticket, by what they brought",
    ("found",),
    registry=REGISTRY,
)
PASS_JOBS = Histogram(
    "neural_mri_worker_pass_jobs",
    "Jobs that shared a pass",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=REGISTRY,
)
FORWARD_SECONDS = Histogram(
    "neural_mri_worker_forward_seconds",
    "Seconds of model computation behind a result; jobs that shared a pass each count it",
    ("model", "kind"),
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300),
    registry=REGISTRY,
)
ENDED = Counter(
    "neural_mri_worker_jobs_ended",
    "Jobs this worker brought to an end, by the state they ended in",
    ("model", "state"),
    registry=REGISTRY,
)
LOAD_SECONDS = Histogram(
    "neural_mri_worker_model_load_seconds",
    "Seconds from asking for a model to holding it, calibrated",
    ("model",),
    buckets=(0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600),
    registry=REGISTRY,
)
RELEASED = Counter(
    "neural_mri_worker_models_released",
    "Models whose memory was given back",
    ("model",),
    registry=REGISTRY,
)
EVICTED = Counter(
    "neural_mri_worker_models_evicted",
    "Models whose memory was given back because others needed it",
    ("model",),
    registry=REGISTRY,
)
MEMORY = Gauge(
    "neural_mri_worker_memory_bytes",
    "Bytes that this worker's models may take in all, and what of them is free",
    ("part",),
    registry=REGISTRY,
)
OUT_OF_MEMORY = Counter(
    "neural_mri_worker_out_of_memory",
    "Times that memory ran out, by what was done: batches halved, a scan failed, a load put off",
    ("outcome",),
    registry=REGISTRY,
)
KILLED = Counter(
    "neural_mri_worker_killed",
    "Times that a signal ended this worker's process and another was forked in its place",
    ("signal",),
    registry=REGISTRY,
)
KILLED.labels("SIGKILL")  # from 0 on: a rise from nothing is no rise to Prometheus


class Held(Collector):
    """Memory by model, as it is when asked."""

    def __init__(self, held: Callable[[], Sequence[HeldModel]]) -> None:
        self._held = held

    def collect(self) -> Iterable[Metric]:
        """As gauges."""
        memory = GaugeMetricFamily(
            "neural_mri_worker_model_memory_bytes",
            "Bytes that a held model takes on the device",
            labels=("model", "state"),
        )
        for model in self._held():
            memory.add_metric((model.name, model.state.value), model.memory_bytes or 0)
        yield memory


@contextmanager
def served(settings: Settings, held: Callable[[], Sequence[HeldModel]]) -> Iterator[None]:
    """Answer Prometheus on `worker_metrics_port`, if there is one. Raises `Unavailable` if it is taken."""
    collector = Held(held)
    REGISTRY.register(collector)
    try:
        if not settings.worker_metrics_port:
            yield
            return
        address = settings.host, settings.worker_metrics_port
        try:
            server, thread = start_http_server(address[1], address[0], registry=REGISTRY)
        except OSError as error:
            raise Unavailable(
                f"NEURAL_MRI_WORKER_METRICS_PORT is {address[1]}: {error.strerror}; each worker of a "
                "machine needs a port of its own",
                port=address[1],
            ) from error
        structlog.get_logger(__name__).info("metrics_served", host=address[0], port=address[1])
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
    finally:
        REGISTRY.unregister(collector)
