"""What a worker tells Prometheus."""

import socket

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from neural_mri.backing.settings import Settings
from neural_mri.contract.jobs import JobState
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.scans import ActivationScan
from tests.servers import free_port
from tests.worker.bench import Bench
from worker import metrics

Figures = dict[str, dict[frozenset[tuple[str, str]], float]]


def figures(port: int) -> Figures:
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
    found: Figures = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def grown(before: Figures, after: Figures, name: str, **labels: str) -> float:
    key = frozenset(labels.items())
    name = f"neural_mri_worker_{name}"
    return after[name][key] - before.get(name, {}).get(key, 0.0)


def test_claims_passes_ends_and_memory_are_told(holding_tiny: Bench) -> None:
    settings = msgspec.structs.replace(holding_tiny.settings, worker_metrics_port=free_port())
    with metrics.served(settings, holding_tiny.residency.held):
        before = figures(settings.worker_metrics_port)
        for _ in range(3):
            holding_tiny.submit(ActivationScan(model="tiny", prompt="x"), scan_key=None)
        attempts = holding_tiny.attempts()
        assert attempts.take(holding_tiny.queue) == 3
        assert attempts.take(holding_tiny.queue) == 0
        after = figures(settings.worker_metrics_port)
    assert grown(before, after, "claims_total", found="jobs") == 1
    assert grown(before, after, "claims_total", found="nothing") == 1
    assert grown(before, after, "pass_jobs_sum") == 3
    assert grown(before, after, "pass_jobs_count") == 1
    assert grown(before, after, "forward_seconds_count", model="tiny", kind="fMRI") == 3
    ended = grown(before, after, "jobs_ended_total", model="tiny", state=JobState.SUCCEEDED.value)
    assert ended == 3
    (held,) = holding_tiny.residency.held()
    memory = after["neural_mri_worker_model_memory_bytes"]
    assert memory == {frozenset({("model", "tiny"), ("state", "resident")}): held.memory_bytes}
    assert held.load_seconds is not None
    assert held.load_seconds > 0


def test_loads_and_releases_are_counted(bench: Bench) -> None:
    settings = msgspec.structs.replace(bench.settings, worker_metrics_port=free_port())
    with metrics.served(settings, bench.residency.held):
        before = figures(settings.worker_metrics_port)
        resident = bench.residency.load("tiny")
        bench.residency.load("tiny")  # held already
        bench.residency.release(resident.registered.revision)
        after = figures(settings.worker_metrics_port)
    assert grown(before, after, "model_load_seconds_count", model="tiny") == 1
    assert grown(before, after, "models_released_total", model="tiny") == 1
    assert "neural_mri_worker_model_memory_bytes" not in after


def test_no_port_is_opened_unless_one_is_set() -> None:
    with metrics.served(Settings(), lambda: ()):
        assert metrics.REGISTRY.get_sample_value("neural_mri_worker_pass_jobs_count") is not None


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(Unavailable, match=f"WORKER_METRICS_PORT is {port}"),
            metrics.served(Settings(worker_metrics_port=port), lambda: ()),
        ):
            pytest.fail("two servers on one port")
