"""Starting and stopping, with a model so small that only the processes take time."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from neural_mri.backing.settings import Settings
from tests.system.service import (
    ROOT,
    Service,
    environment,
    free_port,
    is_gone,
    register,
    running,
    until,
)
from tests.tiny import save_tiny_model


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which two tiny models are registered, to copy."""
    folder = tmp_path_factory.mktemp("models")
    settings = Settings(data_dir=tmp_path_factory.mktemp("prepared") / "data")
    register(settings, "tiny", save_tiny_model(folder / "tiny"))
    register(settings, "other", save_tiny_model(folder / "other", seed=1))
    return settings.folder


@pytest.fixture
def settings(tmp_path: Path, prepared_data: Path) -> Settings:
    return _settings(prepared_data, tmp_path)


def _settings(prepared_data: Path, folder: Path) -> Settings:
    return Settings(
        data_dir=shutil.copytree(prepared_data, folder / "data"),
        port=free_port(),
        pinned_models="tiny",
        default_model="tiny",
    )


@pytest.fixture
def service(settings: Settings) -> Iterator[Service]:
    """A service to end."""
    with running(settings) as service:
        service.wait_until_ready()
        yield service


@pytest.fixture(scope="module")
def lasting_service(
    tmp_path_factory: pytest.TempPathFactory, prepared_data: Path
) -> Iterator[Service]:
    """A service that every test leaves as it was."""
    with running(_settings(prepared_data, tmp_path_factory.mktemp("lasting"))) as service:
        service.wait_until_ready()
        yield service


def launch(settings: Settings) -> subprocess.CompletedProcess[str]:
    """A launcher that is expected to refuse."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.embedded"],
        cwd=ROOT,
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_neither_a_kill_nor_control_c_leaves_a_process_or_loses_a_result(
    service: Service, settings: Settings
) -> None:
    first = service.scan("w3 w4 w5", wait=60)
    killed = service.processes()
    assert len(killed) == (6 if sys.platform == "linux" else 5)
    service.launcher.kill()
    service.launcher.wait()
    with running(settings) as again:
        again.wait_until_ready()
        assert all(is_gone(process) for process in killed)
        second = again.scan("w3 w4 w5", wait=60)
        assert (first["cached"], second["cached"]) == (False, True)
        assert first["scan_key"] == second["scan_key"]
        stopped = again.processes()
        assert again.stop(signal.SIGINT) == 0
        assert all(is_gone(process) for process in stopped)
        assert again.says().splitlines()[-1] == "Stopped."
    assert not settings.valkey_socket.exists()


def test_a_second_launcher_is_refused_the_folder(lasting_service: Service) -> None:
    refused = launch(msgspec.structs.replace(lasting_service.settings, port=free_port()))
    assert refused.returncode == 1
    (said,) = refused.stderr.splitlines()
    assert (
        f"already running on {lasting_service.settings.folder} (process {lasting_service.launcher.pid})"
        in said
    )
    assert lasting_service.scan("w8 w9", wait=60)["state"] == "succeeded"


def test_a_process_that_dies_is_started_again(lasting_service: Service) -> None:
    api = lasting_service.child("api")
    os.kill(api.pid, signal.SIGKILL)
    assert until(lambda: "api ended (Killed); starting it again" in lasting_service.says(), 5)

    settings = lasting_service.settings

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((settings.host, settings.port)) == 0

    assert until(answers, 30)
    assert lasting_service.scan("w1 w2", wait=60)["state"] == "succeeded"


def test_models_come_and_go_while_the_worker_runs(lasting_service: Service) -> None:
    loaded = lasting_service.load("other")
    assert loaded["state"] == "succeeded", loaded
    assert lasting_service.model("other")["state"] == "resident"
    assert lasting_service.scan("w3 w4", model="other", wait=60)["state"] == "succeeded"
    unloaded = lasting_service.unload("other")
    assert unloaded["state"] == "succeeded", unloaded
    assert lasting_service.model("other")["state"] == "available"
    assert lasting_service.scan("w3 w5", wait=60)["state"] == "succeeded"  # the pinned one stays


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_killed_worker_is_forked_again_and_its_parent_is_started_again(
    lasting_service: Service,
) -> None:
    parent, worker = lasting_service.parent("worker"), lasting_service.child("worker")
    worker.kill()
    assert until(lambda: lasting_service.resident_pid() not in (None, worker.pid), 60)
    assert lasting_service.parent("worker") == parent
    worker = lasting_service.child("worker")
    parent.kill()
    assert until(lambda: is_gone(worker), 5)
    assert until(lambda: lasting_service.resident_pid() not in (None, worker.pid), 60)
    assert "worker ended (Killed); starting it again" in lasting_service.says()


def test_a_model_that_was_loaded_is_loaded_again_after_a_restart(lasting_service: Service) -> None:
    lasting_service.load("other")
    worker = lasting_service.child("worker")
    worker.kill()
    assert until(lambda: lasting_service.resident_pid() not in (None, worker.pid), 60)
    assert until(lambda: lasting_service.model("other")["state"] == "resident", 30)
    assert lasting_service.unload("other")["state"] == "succeeded"


def test_what_cannot_start_is_said_in_one_sentence(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", settings.port))
        taken.listen()
        refused = launch(settings)
    assert refused.returncode == 1
    (said,) = refused.stderr.splitlines()
    assert said.startswith(f"neural-mri: port {settings.port} of 127.0.0.1 is already taken")


def test_a_model_that_nobody_knows_is_refused_with_what_to_do(settings: Settings) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    refused = launch(msgspec.structs.replace(settings, pinned_models="unheard-of"))
    assert refused.returncode == 1
    assert "python -m worker.modelstore add unheard-of folder:/path" in refused.stderr
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before


def test_a_redis_server_that_is_not_there_is_said(settings: Settings, tmp_path: Path) -> None:
    nowhere = msgspec.structs.replace(settings, redis_url=f"unix://{tmp_path}/nobody.sock")
    refused = launch(nowhere)
    assert refused.returncode == 1
    (said,) = refused.stderr.splitlines()
    assert said == "neural-mri: the server that NEURAL_MRI_REDIS_URL names does not answer."
