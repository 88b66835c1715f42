"""Containers without an engine: namespaces, mounts, a user and no capabilities, for plain processes.

A container has a root of its own, with what its image holds and its volumes, and of this machine's files only the
interpreter and the system's libraries; processes, host name and network are its own. Its address, and the cable that
may be cut, outlive the process, as they do where an engine starts it again. Everything ends with whoever made it, and
nothing is left behind: the networks exist in namespaces alone.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.deploy.images import PACKAGES, Image

__all__ = ("Container", "Machine", "Network", "Process", "may_contain")

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ssl", "/etc/ld.so.cache")
"""What containers share with this machine, to be read."""
DEVICES = ("null", "zero", "full", "random", "urandom")
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS, GOOD_SECONDS = 0.1, 60.0, 10.0
"""How long an engine waits before it starts a container again, twice as long each time, until one has lived so long."""
ALONE = ("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--clear-groups")


def may_contain() -> bool:
    """Whether this process may make namespaces and mount in them."""
    tools = ("ip", "nsenter", "setpriv", "unshare", "mount", "chroot")
    if os.getuid() != 0 or any(shutil.which(tool) is None for tool in tools):
        return False
    tried = "mount -t tmpfs none /mnt && ip link add name b0 type bridge"
    apart = ["unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork"]
    done = subprocess.run([*apart, "sh", "-c", tried], capture_output=True, check=False)
    return done.returncode == 0


def _run(*command: str, given: str = "") -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"


class Machine:
    """A network namespace with cables to others."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._keeper = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
        )
        self.pid = self._keeper.pid
        ours = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{self.pid}/ns/net").readlink() == ours:
            time.sleep(0.005)
        self.ip("link set lo up")

    def ip(self, *lines: str) -> None:
        """Have `ip` do some things here."""
        _run(*self.here(), "ip", "-batch", "-", given="".join(f"{line}\n" for line in lines))

    def here(self) -> list[str]:
        """What a command begins with that runs in this network."""
        return ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net=/proc/{self.pid}/ns/net", "--"]

    def close(self) -> None:
        """Take it away, and its cables."""
        self._keeper.kill()
        self._keeper.wait()


class Network:
    """A host with a bridge that containers are on, and people's machines on another side.

    Nothing is passed on between the two sides: people reach what the host publishes.
    """

    OUTSIDE = "192.168.77"
    INSIDE = "10.88.0"

    def __init__(self) -> None:
        self.host = Machine("host")
        self._machines = [self.host]
        self._published: list[subprocess.Popen[bytes]] = []
        self.host.ip(
            "link add name inside type bridge",
            f"addr add {self.INSIDE}.1/24 dev inside",
            "link set inside up",
        )
        self._tell("net/ipv4/ip_forward", "0")
        self.names: dict[str, str] = {}
        """Addresses by the names that everybody inside knows."""

    def close(self) -> None:
        """Take all of it away."""
        for process in self._published:
            process.kill()
            process.wait()
        for machine in reversed(self._machines):
            machine.close()

    def _tell(self, setting: str, value: str) -> None:
        _run(*self.host.here(), "sh", "-c", f"echo {value} > /proc/sys/{setting}")

    def joined(self, name: str) -> Machine:
        """A machine more on the bridge, known by its name."""
        machine, number = self._wired(name)
        self.host.ip(f"link set v{number} master inside", f"link set v{number} up")
        address = f"{self.INSIDE}.{number}"
        machine.ip(
            f"addr add {address}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {self.INSIDE}.1",
        )
        self.names[name] = address
        return machine

    def outside(self, name: str) -> Machine:
        """A machine that has a cable to the host alone."""
        machine, number = self._wired(name)
        self.host.ip(f"addr add {self.OUTSIDE}.1/24 dev v{number}", f"link set v{number} up")
        machine.ip(
            f"addr add {self.OUTSIDE}.{number}/24 dev eth0",
            "link set eth0 up",
            f"route add default via {self.OUTSIDE}.1",
        )
        return machine

    def _wired(self, name: str) -> tuple[Machine, int]:
        machine = Machine(name)
        self._machines.append(machine)
        number = len(self._machines)
        self.host.ip(f"link add v{number} type veth peer name eth0 netns {machine.pid}")
        return machine, number

    def _cable(self, name: str) -> str:
        return f"v{self.names[name].rpartition('.')[2]}"

    @contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """While the block runs no packet of this one comes through, and nobody is told."""
        self.host.ip(f"link set {self._cable(name)} down")
        try:
            yield
        finally:
            self.host.ip(f"link set {self._cable(name)} up")

    def ask(self, address: str, headers: Mapping[str, str]) -> None:
        """Have the host ask for something over HTTP; whatever is refused is an error."""
        request = f"u.Request({address!r}, headers={dict(headers)!r})"
        asked = f"import urllib.request as u; u.urlopen({request}, timeout=20)"
        _run(*self.host.here(), sys.executable, "-S", "-c", asked)

    def publish(self, address: str, port: int, name: str, its_port: int) -> None:
        """Pass on what comes to an address of the host, as an engine does with `ports`."""
        program = Path(__file__).with_name("publishing.py")
        target = [self.names[name], str(its_port)]
        self._published.append(
            subprocess.Popen(
                [*self.host.here(), sys.executable, "-S", str(program), address, str(port), *target]
            )
        )


class Process(NamedTuple):
    """What runs in a container, as whoever asks for it says."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    volumes: Mapping[str, Path]
    """Folders of this machine that are kept, by their paths in the container."""
    is_read_only: bool = False
    tmpfs: tuple[str, ...] = ("/tmp",)  # noqa: S108 -- its own
    restart: str = "no"
    stop_seconds: float = 10.0


class Container:
    """One of an image's processes on a machine: started, and started again as its policy says."""

    def __init__(
        self, machine: Machine, image: Image, process: Process, hosts: Path, log: Path
    ) -> None:
        self.name = machine.name
        self.starts = 0
        self.statuses: list[int] = []
        """How each process so far has ended."""
        self._machine, self._image, self._process = machine, image, process
        self._hosts, self.log = hosts, log
        self._running: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=self.name, daemon=True)

    def start(self) -> None:
        """Begin, in a thread of its own, which ends it as well."""
        self._thread.start()

    @property
    def is_completed(self) -> bool:
        """Whether it has ended, and well, and will not be started again."""
        return not self._thread.is_alive() and self.statuses[-1:] == [0]

    @property
    def has_failed(self) -> bool:
        """Whether it has ended otherwise, for good."""
        return bool(self.statuses) and not self._thread.is_alive() and not self.is_completed

    def first_process(self) -> psutil.Process:
        """Its process 1, as this machine sees it. Raises `NoSuchProcess` where none runs now."""
        running = self._running
        if running is None or running.poll() is not None:
            raise psutil.NoSuchProcess(0)
        children = psutil.Process(running.pid).children()
        if not children:
            raise psutil.NoSuchProcess(running.pid)
        return children[0]

    def execute(
        self,
        command: Sequence[str],
        seconds: float = 30.0,
        environment: Mapping[str, str] | None = None,
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command in the container, as `docker exec` does. Raises `TimeoutExpired`, `NoSuchProcess`."""
        inside = ["nsenter", "--target", str(self.first_process().pid)]
        inside += ["--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd=.", "--"]
        return subprocess.run(
            [*inside, *self._as_told(command, environment)],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            cwd="/",
        )

    def complete(self, *more: str) -> str:
        """Run it once with more arguments, as `docker compose run --rm` does; what it printed."""
        done = subprocess.run(
            self._contained([*self._process.command, *more]),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{self.name} {more}: {done.stdout}{done.stderr}"
        return done.stdout

    def stop(self) -> None:
        """Ask it to end for good; kill it where it has not within its time."""
        self._stopped.set()
        with suppress(psutil.NoSuchProcess):
            process = self.first_process()
            process.terminate()
            with suppress(psutil.TimeoutExpired):
                process.wait(self._process.stop_seconds)
        self.kill_for_good()

    def kill_for_good(self) -> None:
        """End it at once, and have nothing start it again."""
        self._stopped.set()
        while self._thread.is_alive():
            self.kill()
            self._thread.join(0.05)

    @property
    def is_running(self) -> bool:
        """Whether its first process is there."""
        try:
            return bool(self.first_process().is_running())
        except psutil.NoSuchProcess:
            return False

    def kill(self) -> None:
        """End its first process at once, and all others with it."""
        with suppress(psutil.NoSuchProcess):
            self.first_process().kill()

    def _keep(self) -> None:
        waits = FIRST_WAIT_SECONDS
        while not self._stopped.is_set():
            began = time.monotonic()
            with self.log.open("ab") as log:
                # Of this very thread: whose end would be the process's.
                self._running = subprocess.Popen(
                    self._contained(self._process.command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            self.starts += 1
            self.statuses.append(self._running.wait())
            if not self._is_started_again(self.statuses[-1]):
                return
            waits = FIRST_WAIT_SECONDS if time.monotonic() - began > GOOD_SECONDS else waits
            self._stopped.wait(waits)
            waits = min(2 * waits, LONGEST_WAIT_SECONDS)

    def _is_started_again(self, status: int) -> bool:
        policy, _, most = self._process.restart.partition(":")
        match policy:
            case "no":
                return False
            case "on-failure":
                return status != 0 and self.starts <= int(most)
            case "unless-stopped":
                return not self._stopped.is_set()
            case _:
                raise AssertionError(f"{policy}: a policy that nobody here uses")

    def _contained(self, command: Sequence[str]) -> list[str]:
        """The command that makes the container round another one."""
        apart = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL"]
        return [*self._machine.here(), *apart, "sh", "-euc", self._script(command)]

    def _as_told(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> list[str]:
        image, user = self._image, str(self._image.user)
        given = {**image.environment, **self._process.environment, **(environment or {})}
        return [
            *("setpriv", "--reuid", user, "--regid", user, *ALONE),
            *("env", "--ignore-environment", f"--chdir={image.folder}"),
            *(f"{name}={value}" for name, value in given.items()),
            *command,
        ]

    def _script(self, command: Sequence[str]) -> str:
        """Make the root, and become the process."""
        root = self.log.with_suffix(".root")
        root.mkdir(exist_ok=True)
        process = self._process
        shared = {path: Path(path) for path in (*SYSTEM, sys.base_prefix, "/sys")}
        shared |= {PACKAGES: Path(sysconfig.get_paths()["purelib"]), **self._image.files}
        steps = [
            ["hostname", self.name],
            ["mount", "-t", "tmpfs", "-o", "mode=0755", "root", str(root)],
            ["cd", str(root)],
            *(step for path, source in shared.items() for step in _shown(path, source)),
            ["mkdir", "-p", "proc", "dev", "etc"],
            ["mount", "-t", "proc", "proc", "proc"],
            *(step for name in DEVICES for step in _shown(f"/dev/{name}", Path("/dev", name))),
            ["ln", "-s", "/proc/self/fd", "dev/fd"],
            *_memory("/dev/shm"),  # noqa: S108 -- the container's own
            *(step for path in process.tmpfs for step in _memory(path)),
            ["cp", str(self._hosts), "etc/hosts"],
            ["cp", str(self._hosts.with_name("passwd")), "etc/passwd"],
            *(
                step
                for path, folder in process.volumes.items()
                for step in _shown(path, folder, "mount", "--bind")
            ),
            *([["mount", "-o", "remount,ro", str(root)]] if process.is_read_only else []),
            ["exec", "chroot", ".", *self._as_told(command)],
        ]
        return "\n".join(shlex.join(step) for step in steps)


def _shown(path: str, source: Path, *how: str) -> list[list[str]]:
    """The steps that show something of this machine in a root that is being made; to be read alone, unless told how."""
    place = path.lstrip("/")
    if not source.exists() or (path.startswith("/usr/") and str(source) == path):
        return []  # not here, or within what is shown already
    if source.is_symlink() and str(source) == path:
        return [["cp", "-P", path, place]]
    made = ["mkdir", "-p", place] if source.is_dir() else ["touch", place]
    return [
        ["mkdir", "-p", str(Path(place).parent)],
        made,
        [*(how or ("mount", "--bind", "-o", "ro")), str(source), place],
    ]


def _memory(path: str) -> list[list[str]]:
    place = path.lstrip("/")
    return [
        ["mkdir", "-p", place],
        ["mount", "-t", "tmpfs", "-o", "mode=1777,noexec,nosuid,nodev", "tmpfs", place],
    ]
