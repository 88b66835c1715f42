"""A worker's parent and the processes it forks: real ones, most of them with work that is a few lines."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

import httpx
import msgspec
import psutil
import pytest

from neural_mri.backing.records import Job
from neural_mri.backing.settings import PREFIX
from neural_mri.contract.jobs import JobState
from neural_mri.contract.scans import TracingScan
from tests.servers import free_port
from tests.worker.bench import Bench
from worker.reaper import Reaper

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a worker forks on Linux only")

NOTHING: Mapping[str, str] = MappingProxyType({})
ROOT = Path(__file__).parents[2]
UNSHARED = ("--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child")
SHORT = "from worker.forking import kept_alive; import os, signal, sys, time; say = print; "


class Kept:
    """A program that keeps its worker alive, in a session of its own."""

    def __init__(
        self, command: list[str], log: Path, environment: Mapping[str, str], *, first: bool
    ) -> None:
        self._log = log
        unshared = ["unshare", *UNSHARED] if first else []
        own = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        with log.open("wb") as output:
            self.process = psutil.Popen(
                [*unshared, sys.executable, *command],
                cwd=ROOT,
                env={**own, "PYTHONUNBUFFERED": "1", **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def says(self) -> str:
        return self._log.read_text()

    def worker(self) -> psutil.Process:
        """The forked process, as soon as there is one."""
        self.until(lambda: bool(self.process.children()))
        [worker] = self.process.children()
        return worker

    def until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.says()
            time.sleep(0.02)

    def said(self, word: str, count: int = 1) -> None:
        """Wait until it has been said so often."""
        self.until(lambda: self.says().count(word) >= count)

    def ended(self) -> int:
        status: int = self.process.wait(30)
        return status


@contextmanager
def keeping(
    command: list[str], log: Path, environment: Mapping[str, str] = NOTHING, *, first: bool = False
) -> Iterator[Kept]:
    """It runs until the block is left; as the `first` process of a namespace, if so asked."""
    kept = Kept(command, log, environment, first=first)
    try:
        yield kept
    finally:
        with suppress(psutil.NoSuchProcess):
            kept.process.kill()
        kept.process.wait()


def may_unshare() -> bool:
    """Whether this process may make a namespace in which another is the first."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", *UNSHARED, "true"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "worker.log"


def short(body: str) -> list[str]:
    """A program whose worker does only this, given its `life`; its children's parent ends as it says."""
    work = "\n".join(f"    {line}" for line in body.splitlines())
    return ["-c", f"{SHORT}\ndef work(life):\n{work}\nsys.exit(kept_alive(work))"]


WAITING = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
life.held()
say("up")
time.sleep(60)
"""


@pytest.mark.parametrize("status", [0, 1, 3])
def test_a_worker_that_ends_by_itself_ends_its_parent_with_its_status(
    log: Path, status: int
) -> None:
    with keeping(short(f"return {status}"), log) as kept:
        assert kept.ended() == status


def test_killed_workers_are_replaced_and_no_two_draw_the_same_numbers(log: Path) -> None:
    body = "import numpy, random; life.held(); life.served(); say('drew', random.random(), numpy.random.rand())"
    with keeping(short(f"{body}\ntime.sleep(60)"), log) as kept:
        pids = set()
        for count in range(1, 4):
            kept.said("drew", count)
            worker = kept.worker()
            pids.add(worker.pid)
            worker.kill()
        kept.said("drew", 4)
        assert len(pids) == 3
        drawn = [line.split()[1:] for line in kept.says().splitlines() if line.startswith("drew")]
        assert len({each for line in drawn for each in line}) == 2 * len(drawn)
        assert kept.says().count("signal=SIGKILL") == 3


def test_a_worker_that_dies_of_its_start_three_times_is_given_up_as_it_ended(log: Path) -> None:
    with keeping(short("os.kill(os.getpid(), signal.SIGSEGV)"), log) as kept:
        assert kept.ended() == -signal.SIGSEGV
        assert kept.says().count("worker_killed") == 3


@pytest.mark.skipif(not may_unshare(), reason="needs the right to make a namespace of processes")
def test_a_container_s_first_process_buries_strangers_and_gives_up_with_a_status(log: Path) -> None:
    """It cannot end itself by a signal: the kernel shields it."""
    body = """
    if not os.fork():
        os.fork() or time.sleep(0.1)
        os._exit(0)
    os.wait()
    time.sleep(0.3)
    zombies = [pid for pid in os.listdir("/proc") if pid.isdecimal() and " Z " in open(f"/proc/{pid}/stat").read()]
    say("is", os.getppid(), zombies)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    [_, code] = short(body.replace("\n    ", "\n").strip())
    with keeping(["-c", code], log, first=True) as kept:
        assert kept.ended() == 128 + signal.SIGKILL
        assert kept.says().count("is 1 []") == 3, kept.says()


def test_what_the_whole_group_is_told_a_worker_is_told_once(log: Path) -> None:
    body = """
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    life.held()
    say("up")
    while not heard:
        time.sleep(0.01)
    time.sleep(0.3)
    return len(heard)
    """
    with keeping(short(body.replace("\n    ", "\n").strip()), log) as kept:
        kept.said("up")
        os.killpg(kept.process.pid, signal.SIGINT)
        assert kept.ended() == 1


def test_a_frozen_worker_still_ends_when_its_parent_is_told_to(log: Path) -> None:
    with keeping(short(WAITING.strip()), log) as kept:
        kept.said("up")
        kept.worker().suspend()
        kept.process.terminate()
        assert kept.ended() == 0


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_no_worker_outlives_its_parent(log: Path, signum: signal.Signals) -> None:
    """Not even a frozen one."""
    with keeping(short(WAITING.strip()), log) as kept:
        kept.said("up")
        worker = kept.worker()
        if signum is signal.SIGSTOP:
            worker.suspend()
        kept.process.kill()
        kept.process.wait()
        psutil.wait_procs([worker], timeout=5)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_who_is_told_to_go_between_two_workers_goes(log: Path) -> None:
    body = "say('up')\ntime.sleep(60)"
    with keeping(short(body), log) as kept:
        for count in (1, 2):
            kept.said("up", count)
            kept.worker().kill()
        kept.said("again_in_seconds=0.5")
        kept.process.terminate()
        assert kept.ended() in (0, -signal.SIGTERM)


IMPORTS = """
import os, sys
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
import numpy as np
import torch

asked = []

def asking(name, ask):
    def told(*arguments, **named):
        asked.append(name)
        return ask(*arguments, **named)
    return told

for name in ("is_available", "device_count", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, asking(name, getattr(torch.cuda, name)))

from neural_mri.backing.settings import Settings
from worker import forking, process

forking.import_the_rest(Settings())
assert asked == [], asked
assert forking.why_not() is None, forking.why_not()

# Integers of numpy: one thread, no library of linear algebra. What torch makes of several threads here,
# as of so many numbers it would, a child would wait for in vain.
whole = np.arange(600 * 600).reshape(600, 600) % 7
product = whole @ whole

def work(life):
    torch.set_num_threads(2)
    rows = torch.from_numpy(whole).double()
    weights = rows.clone().requires_grad_()
    (rows @ weights).sum().backward()
    assert np.array_equal((rows @ rows).numpy(), product)
    assert torch.equal(weights.grad, rows.sum(0)[:, None].expand(600, 600))
    assert np.array_equal(rows.numpy() @ rows.numpy(), product)
    assert torch.exp(torch.rand(10**6)).sum() > 10**6
    print("threads", len(os.listdir("/proc/self/task")))
    return 0

sys.exit(forking.kept_alive(work))
"""


def test_imports_start_no_thread_ask_for_no_gpu_and_a_fork_computes_on_two_threads(
    log: Path,
) -> None:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    with keeping(["-c", IMPORTS], log, threads) as kept:
        assert kept.ended() == 0, kept.says()
        assert int(kept.says().split("threads ")[1]) >= 2, kept.says()


def test_a_job_whose_worker_is_killed_is_done_by_another_of_the_same_parent(
    bench: Bench, log: Path, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"
    settings = msgspec.structs.replace(
        bench.settings,
        pinned_models="tiny",
        worker_metrics_port=free_port(),
        worker_ready_file=str(ready),
    )
    ready.touch()  # an earlier one's
    reaper = Reaper(settings, bench.sessions, bench.redis, bench.store)
    prompt = " ".join(f"w{index % 10}" for index in range(50))

    def asked(draws: int) -> Job:
        scan = TracingScan(model="tiny", prompt=prompt, subject="w0 w1", draws=draws)
        return bench.submit(scan, n_tokens=50)

    def is_in(job: Job, state: JobState) -> bool:
        reaper.round()
        found = bench.now(job)
        assert found.state is state or found.finished_at is None, found
        return found.state is state

    with keeping(["-m", "worker"], log, settings.environment()) as kept:
        kept.until(lambda: not ready.exists() or "worker_ready" in kept.says())
        kept.said("worker_ready")
        assert ready.exists()
        first = kept.worker()
        job = asked(draws=32)
        kept.until(lambda: is_in(job, JobState.RUNNING))
        holder = bench.now(job).lease_owner
        assert holder is not None
        assert (holder.pid, kept.process.num_threads()) == (first.pid, 1)
        assert not [each for each in kept.process.net_connections("all") if each.raddr]
        first.kill()
        kept.until(lambda: is_in(job, JobState.SUCCEEDED))
        assert bench.now(job).attempt == 2
        second = kept.worker()
        assert second.pid != first.pid
        told = httpx.get(f"http://127.0.0.1:{settings.worker_metrics_port}/metrics").text
        assert 'neural_mri_worker_killed_total{signal="SIGKILL"} 1.0' in told

        last = asked(draws=31)
        kept.until(lambda: is_in(last, JobState.RUNNING))
        kept.process.terminate()
        assert (kept.ended(), ready.exists()) == (0, False)
        assert (bench.now(last).state, bench.now(last).attempt) == (JobState.SUCCEEDED, 1)
        assert kept.says().count("worker_killed") == 1


def test_a_worker_that_cannot_start_ends_its_parent_with_1(bench: Bench, log: Path) -> None:
    settings = msgspec.structs.replace(bench.settings, pinned_models="unheard-of")
    with keeping(["-m", "worker"], log, settings.environment()) as kept:
        assert kept.ended() == 1
        assert "worker_not_started" in kept.says()
        assert "worker_killed" not in kept.says()
