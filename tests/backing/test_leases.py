import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.backing import leases
from neural_mri.backing.leases import LeaseOwner


@given(st.text(min_size=1), st.integers(0, 2**22), st.integers(0, 2**63))
def test_an_owner_reads_back_as_it_was_written(host: str, pid: int, ticks: int) -> None:
    owner = LeaseOwner(host, pid, ticks)
    assert LeaseOwner.parse(str(owner)) == owner


@pytest.mark.parametrize("text", ["", "host", "host/1", "/1/2", "host/1/x", "host//2"])
def test_what_is_no_owner_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"{text!r} is not a lease owner"):
        LeaseOwner.parse(text)


def test_this_process_is_alive() -> None:
    here = LeaseOwner.here()
    assert here.pid == os.getpid()
    assert not here.is_dead_here()
    assert LeaseOwner.here() == here


def test_a_process_that_ended_is_dead() -> None:
    script = "from neural_mri.backing.leases import LeaseOwner; print(LeaseOwner.here())"
    said = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert LeaseOwner.parse(said.strip()).is_dead_here()


def test_a_zombie_is_dead() -> None:
    waiting = [sys.executable, "-c", "input()"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        start_ticks = leases._start_ticks(child.pid)
        assert start_ticks is not None
        owner = LeaseOwner.here()._replace(pid=child.pid, start_ticks=start_ticks)
        assert not owner.is_dead_here()
        assert child.stdin is not None
        child.stdin.close()
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)
        assert owner.is_dead_here()


def test_another_process_that_got_the_pid_does_not_keep_a_lease_alive() -> None:
    here = LeaseOwner.here()
    assert here._replace(start_ticks=here.start_ticks - 1).is_dead_here()


def test_nothing_is_proved_about_another_host() -> None:
    assert not LeaseOwner("elsewhere", 2**22, 1).is_dead_here()


def test_a_container_that_shares_our_hosts_name_is_another_host() -> None:
    here = LeaseOwner.here()
    if not Path("/proc/self/ns/pid").is_symlink():
        pytest.skip("this system has no pid namespaces")
    name, _, namespace = here.host.rpartition(":")
    assert namespace.isdecimal()
    neighbour = LeaseOwner(f"{name}:{int(namespace) + 1}", 2**22, 1)
    assert not neighbour.is_dead_here()


def test_without_proc_the_start_time_is_asked_of_the_system() -> None:
    assert leases._start_hundredths(os.getpid()) == round(psutil.Process().create_time() * 100)
    assert leases._start_hundredths(2**22 + 1) is None
