"""How long a person waits: for the service to start, for a scan's first frame, for its result.

    python -m bench.latency [SCANS]

Starts the embedded service with its default model in a temporary folder, takes scans one after another,
and prints what is spent outside the model's forward pass.
"""

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import bundled
from bench.bundled import MODEL
from neural_mri.backing.settings import Settings
from tests.system.service import Service, free_port, register, running

WARM_UP = 3


class Timing(NamedTuple):
    """One scan, in seconds."""

    accepted: float
    """Until the API answered 202."""
    first_frame: float
    """Until the first token's frame arrived, the forward pass taken off."""
    ended: float
    """Until the end was announced, the scanner's own time taken off."""
    forward: float


class Listener:
    """A client with one connection to ask on and one to listen on."""

    def __init__(self, settings: Settings) -> None:
        self._address = (settings.host, settings.port)
        self._asking = http.client.HTTPConnection(*self._address, timeout=60)

    def scan(self, prompt: str) -> Timing:
        """Ask for a scan and listen to it."""
        started = time.perf_counter()
        job = self._ask("POST", "/api/scan/activation", {"prompt": prompt, "scan_mode": "fMRI"})
        accepted = time.perf_counter() - started
        first_frame = ended = 0.0
        for event in self._events(job["id"]):
            if event == "activation_frame" and not first_frame:
                first_frame = time.perf_counter() - started
            if event == "ended":
                ended = time.perf_counter() - started
        manifest = self._ask("GET", f"/api/jobs/{job['id']}/manifest")
        return Timing(
            accepted,
            first_frame - manifest["forward_seconds"],
            ended - manifest["compute_seconds"],
            manifest["forward_seconds"],
        )

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        payload = None if body is None else json.dumps(body)
        self._asking.request(method, path, payload, {"Content-Type": "application/json"})
        return json.loads(self._asking.getresponse().read())

    def _events(self, job_id: str) -> Iterator[str]:
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        connection.request("GET", f"/api/jobs/{job_id}/events")
        with connection.getresponse() as stream:
            for line in stream:
                if line.startswith(b"event:"):
                    event = line.removeprefix(b"event:").strip().decode()
                    yield event
                    if event == "ended":
                        return


def line(name: str, seconds: list[float], bar: str = "") -> str:
    """Median and 95th percentile, in milliseconds."""
    ordered = sorted(seconds)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    return f"{name:<44} p50 {statistics.median(ordered) * 1e3:7.1f} ms   p95 {p95 * 1e3:7.1f} ms  {bar}"


def api_cold_start(settings: Settings) -> float:
    """Seconds from starting the API's process to its first answer."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "api"],
        env={**os.environ, **settings.environment()},
        stderr=subprocess.DEVNULL,
    ) as process:
        while True:
            connection = http.client.HTTPConnection(settings.host, settings.port)
            try:
                connection.request("GET", "/api/health")
                connection.getresponse().read()
            except OSError:
                time.sleep(0.01)
            else:
                break
        seconds = time.perf_counter() - started
        process.terminate()
    return seconds


def main() -> None:
    """Print the figures."""
    scans = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory(prefix="nmri-") as folder:
        settings = Settings(data_dir=Path(folder) / "data", port=free_port())
        register(settings, MODEL, bundled.folder())
        with running(settings) as service:
            print(f"{'start to first possible scan':<44} {service.wait_until_ready():11.1f} s")
            report(service, scans)
        with running(settings) as service:
            print(
                f"{'second start to first possible scan':<44} {service.wait_until_ready():11.1f} s"
            )
        starts = [api_cold_start(settings) for _ in range(5)]
        print(line("API, start of the process to first answer", starts, "bar: 2000 ms"))


def report(service: Service, scans: int) -> None:
    """Scans one after another, each of its own prompt."""
    listener = Listener(service.settings)
    prompts = [f"The Eiffel Tower number {number} stands in the city of" for number in range(scans)]
    for number in range(WARM_UP):
        listener.scan(f"Warming up, {number}")
    timings = [listener.scan(prompt) for prompt in prompts]
    print(line("forward pass, 14 tokens", [timing.forward for timing in timings]))
    print(line("submit to accepted", [timing.accepted for timing in timings]))
    print(
        line(
            "submit to first frame, without the forward",
            [timing.first_frame for timing in timings],
            "bar: p50 40 ms",
        )
    )
    print(line("submit to end, without the scanner's time", [timing.ended for timing in timings]))


if __name__ == "__main__":
    main()
