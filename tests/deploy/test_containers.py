"""The whole compose file as it is, each service alone with its address, and somebody at another machine."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.composed import Composed, until
from tests.deploy.composition import COMPOSE
from tests.deploy.containers import Container, Network, Process, may_contain
from tests.deploy.images import client_image
from tests.deploy.test_compose import SECRETS
from tests.deploy.test_parity import container_of
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.skipif(
    not may_contain(),
    reason="namespaces may not be made here: only root may, with util-linux and iproute2",
)
HOST = "mri.example.org"
PORT = 8642
OWNER = 10001
"""Whom the recipes run processes as, and the runbook gives what is imported."""
VARIABLES = {
    **SECRETS,
    "API_ADDRESS": f"{Network.OUTSIDE}.1:{PORT}",
    "ALLOWED_HOSTS": f"127.0.0.1,localhost,api,{HOST}",
    "DEFAULT_MODEL": "tiny",
    "MODEL_SOURCES": "tiny=folder:/data/import/tiny",
    "PINNED_MODELS": "tiny",
    "DEVICE": "cpu",
}
OTHER_SETTINGS = "# of one core\nOMP_NUM_THREADS=1\nNEURAL_MRI_THREADS=1\n"


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Composed]:
    """Before anything is started, with a model in the folder that the runbook names."""
    file = Path(shutil.copy(COMPOSE, tmp_path / "compose.yaml"))
    (tmp_path / "settings.env").write_text(OTHER_SETTINGS)
    with Composed(tmp_path, file, VARIABLES) as made:
        imported = save_tiny_model(made.volume("models") / "import/tiny")
        for path in (imported.parent, imported, *imported.iterdir()):
            os.chown(path, OWNER, OWNER)
        yield made


class Laptop:
    """Somebody's machine, with the command and nothing else, that reaches the host alone."""

    def __init__(self, composed: Composed, folder: Path) -> None:
        folder.mkdir()
        machine = composed.network.outside("laptop")
        for name in ("hosts", "passwd"):
            shutil.copy(folder.parent / name, folder)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{Network.OUTSIDE}.1 {HOST}\n")
        self._container = Container(
            machine,
            client_image(folder / "image"),
            Process(("sleep", "infinity"), {"NMRI_URL": f"http://{HOST}:{PORT}"}, {}),
            folder / "hosts",
            folder / "log",
        )
        self._container.start()
        until(lambda: self._container.is_running, "a laptop")
        self.key = ""

    def says(self, *arguments: str) -> str:
        """What `neural-mri` prints."""
        done = self._container.execute(
            ["neural-mri", *arguments], 120.0, {"NMRI_API_KEY": self.key}
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def reaches(self, address: str) -> bool:
        """Whether anything at an address can be told from nothing."""
        asked = f"import socket; socket.create_connection(({address!r}, 9), timeout=0.3)"
        said = self._container.execute(["python", "-c", asked]).stderr
        return "timed out" not in said and "unreachable" not in said

    def close(self) -> None:
        self._container.kill_for_good()


@pytest.fixture
def laptop(composed: Composed, tmp_path: Path) -> Iterator[Laptop]:
    opened = Laptop(composed, tmp_path / "laptop")
    yield opened
    opened.close()


def imports(container: Container, module: str) -> bool:
    """Whether a container's Python finds it."""
    found = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return container.execute(["python", "-c", found]).returncode == 0


def check_premises(composed: Composed) -> None:
    """That containers are what the file and the recipes say: no more can be done in them."""
    api, worker = composed.containers["api"], composed.containers["worker"]
    assert not imports(api, "torch")
    assert not imports(api, "transformers")
    assert not imports(api, "worker.process")
    assert imports(api, "litestar")
    assert imports(worker, "torch")
    assert not imports(worker, "litestar")
    for container in (api, worker, composed.containers["reaper"]):
        for place, may in (("/app/x", False), ("/x", False), ("/etc/x", False), ("/tmp/x", True)):  # noqa: S108
            touched = container.execute(["touch", place]).returncode == 0
            assert touched is may, f"{container.name}: {place}"
        said = container.execute(["cat", "/proc/self/status"]).stdout
        assert "Uid:\t10001\t10001\t10001\t10001" in said
        assert "CapBnd:\t0000000000000000" in said
        assert "NoNewPrivs:\t1" in said
        addresses = container.execute(["hostname", "-I"]).stdout
        assert addresses.split()[0] == composed.network.names[container.name]


def check_probes(composed: Composed) -> None:
    """That a kubelet, which asks from the host, would find each process as the chart has it asked for."""
    for name in ("api", "worker", "reaper"):
        container = container_of(name)
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.get(kind, {})
            if asked := probe.get("httpGet"):
                headers = {each["name"]: each["value"] for each in asked.get("httpHeaders", ())}
                place = f"{composed.network.names[name]}:{ports[asked['port']]}"
                composed.network.ask(f"http://{place}{asked['path']}", headers)
            if told := probe.get("exec"):
                deadline = time.monotonic() + 60
                while (done := composed.containers[name].execute(told["command"])).returncode:
                    assert time.monotonic() < deadline, f"{name}: {kind}: {done.stderr}"
                    time.sleep(0.2)


def test_the_file_comes_up_serves_somebody_elsewhere_and_mends_itself(
    composed: Composed, laptop: Laptop
) -> None:
    composed.up()
    check_premises(composed)
    check_probes(composed)
    for service in ("database", "valkey", "objects", "api", "worker"):
        assert not laptop.reaches(composed.network.names[service]), f"{service} is not published"
    laptop.key = composed.containers["keys"].complete("create", "--admin", "--user", "ada").strip()
    laptop.key = laptop.says("keys", "create", "--user", "grace").strip()
    first = json.loads(laptop.says("scan", "activation", "w1 w2 w3", "--json"))
    assert first["model"] == "tiny"

    inside = composed.containers["api"].execute(
        ["neural-mri", "cluster", "--once"], 120.0, {"NMRI_API_KEY": laptop.key}
    )
    assert "tiny" in inside.stdout, inside.stderr

    # Killed with all that it is: what is asked for then is done by the next, which the file says is started.
    worker = composed.containers["worker"]
    worker.kill()
    job = laptop.says("scan", "circuits", "w4 w5 w6", "--no-wait").split()[0]
    until(lambda: worker.starts == 2, "the worker's second start")
    assert "succeeded" in laptop.says("watch", job)

    # So is Valkey, with what it had been told.
    valkey = composed.containers["valkey"]
    valkey.kill()
    until(lambda: valkey.starts == 2 and composed.is_healthy("valkey"), "Valkey's second start")
    assert "DB loaded from append only file" in composed.log("valkey")

    with composed.network.cut("database"):
        until(lambda: not composed.is_healthy("api"), "the outage")
    until(lambda: composed.is_healthy("api"), "the return")
    assert json.loads(laptop.says("scan", "activation", "w8 w9", "--json"))["model"] == "tiny"
    assert composed.containers["api"].starts == 1, "a cable that is cut is no reason to start anew"

    for name in ("api", "reaper", "worker"):
        composed.containers[name].stop()
        assert composed.containers[name].statuses[-1] == 0, f"{name}: {composed.log(name)[-2000:]}"
