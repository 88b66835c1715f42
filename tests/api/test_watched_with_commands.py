"""`neural-mri watch`, and where a waiting job stands: the real API, its worker played by hand."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from neural_mri.cli.exits import ExitCode
from neural_mri.client import AsyncClient, Client
from neural_mri.contract.events import Ended, Queued
from neural_mri.contract.jobs import JobState
from neural_mri.contract.scans import ActivationScan
from tests.api.shell import Shell
from tests.api.world import World
from tests.system.service import until

NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"


@pytest.fixture
def mri(api: httpx.Client) -> Iterator[Client]:
    with Client(str(api.base_url)) as client:
        yield client


def queued(mri: Client, n: int) -> list[str]:
    return [str(mri.submit(ActivationScan(prompt=f"a {k}")).id) for k in range(n)]


def test_jobs_are_followed_together_and_told_where_they_stand(mri: Client, world: World) -> None:
    first, second = queued(mri, 2)
    told_of_place = threading.Event()

    def work() -> None:
        assert told_of_place.wait(30)
        world.perform(world.claim(world.queue()))
        world.move(world.claim(world.queue()), JobState.FAILED, problem={"detail": "no"})

    places, ends = {}, {}
    with world.beside(work):
        for job, event in mri.watch_many([first, second]):
            if isinstance(event, Queued):
                places[str(job)] = event.position
                if len(places) == 2:
                    told_of_place.set()
            if isinstance(event, Ended):
                ends[str(job)] = event.state
    assert places == {first: 1, second: 2}
    assert ends == {first: JobState.SUCCEEDED, second: JobState.FAILED}
    # All was told already: their ends are told again.
    again = [(str(told.job), told.event) for told in mri.watch_many([second, first])]
    assert {job for job, event in again if isinstance(event, Ended)} == {first, second}
    with pytest.raises(ValueError, match="33 jobs are too many"):
        mri.watch_many([NOBODYS[:-2] + f"{n:02x}" for n in range(33)])


def test_the_same_is_awaited(mri: Client, world: World) -> None:
    jobs = queued(mri, 2)
    for _ in jobs:
        world.perform(world.claim(world.queue()))

    async def ends() -> set[str]:
        async with AsyncClient(mri.base_url) as client:
            return {
                str(told.job)
                async for told in client.watch_many(jobs)
                if isinstance(told.event, Ended)
            }

    assert asyncio.run(ends()) == set(jobs)


def test_a_waiting_job_is_shown_with_its_place(shell: Shell, mri: Client, world: World) -> None:
    first, second = queued(mri, 2)
    # Places are looked up once a second, and another test's jobs may have been running then.
    assert until(lambda: "next in the queue" in shell("job", first).out, 10)
    assert "place 2 in the queue" in shell("job", second).out
    world.claim(world.queue())
    assert "in the queue" not in shell("job", first).out


def test_the_exit_code_tells_how_all_of_them_ended(shell: Shell, mri: Client, world: World) -> None:
    good, bad, stopped = queued(mri, 3)
    world.perform(world.claim(world.queue()))
    world.move(world.claim(world.queue()), JobState.FAILED, problem={"detail": "no"})
    mri.cancel(stopped)
    assert shell("watch", good).code == ExitCode.DONE
    assert shell("watch", good, stopped).code == ExitCode.CANCELLED
    said = shell("watch", good, stopped, bad)
    assert said.code == ExitCode.FAILED
    ends = [line.split()[0::4] for line in said.out.splitlines()[1:]]
    assert ends == [[good, "succeeded"], [stopped, "cancelled"], [bad, "failed"]]
    assert "running" in said.err
    quiet = shell("watch", good, "-q")
    assert (quiet.code, quiet.out, quiet.err) == (ExitCode.DONE, "", "")


def test_jobs_batches_and_sessions_are_told_apart(
    shell: Shell, mri: Client, world: World, tmp_path: Path
) -> None:
    (job,) = queued(mri, 1)
    world.perform(world.claim(world.queue()))
    session = str(mri.sessions.create("Eiffel", [job]).id)
    batch = mri.batches.submit([ActivationScan(prompt="a 0"), ActivationScan(prompt="b")])
    world.perform(world.claim(world.queue()))
    deleted = threading.Thread(target=lambda: mri.sessions.delete(session))

    lines = shell("watch", job, str(batch.id), "--json").lines
    sorts = [(next(iter(line)), line["type"]) for line in lines]
    assert {("job", "ended"), ("batch", "line"), ("batch", "ended")} <= set(sorts)
    assert {line["job"] for line in lines if "batch" not in line} == {job}
    told = shell("watch", str(batch.id))
    assert "2 of 2 succeeded" in told.out

    deleted.start()
    followed = shell("watch", session, "--json")
    deleted.join()
    if followed.code == ExitCode.DONE:  # else it was gone before it was looked for
        assert followed.lines[-1] == {"session": session, "type": "closed", "reason": "deleted"}
    gone = shell("watch", session)
    assert (gone.code, gone.out) == (ExitCode.FAILED, "")
    assert f"no job, batch or session {session}" in gone.err


@pytest.mark.parametrize("what", ["job", "session"])
def test_who_stops_watching_stops_nothing_else(mri: Client, world: World, what: str) -> None:
    (job,) = queued(mri, 1)
    if what == "job":
        command = ["watch", job]
    else:
        command = ["sessions", "watch", str(mri.sessions.create("Eiffel").id)]
    watching = subprocess.Popen(
        [sys.executable, "-m", "neural_mri.cli", *command],
        env={**os.environ, "NMRI_URL": mri.base_url},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stderr is not None
    assert watching.stdout is not None
    if what == "job":
        assert "queue" in watching.stderr.readline()
    else:
        assert "saved" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    out, err = watching.communicate(timeout=30)
    assert (watching.returncode, out) == (ExitCode.INTERRUPTED, "")
    assert "goes on" in err
    assert mri.job(job).state is JobState.QUEUED


@pytest.mark.parametrize("arguments", [("watch",), ("watch", "tower"), ("watch", NOBODYS, "x")])
def test_what_is_no_id_is_said_before_anything_is_asked(
    shell: Shell, arguments: tuple[str, ...]
) -> None:
    said = shell(*arguments)
    assert (said.code, said.out) == (ExitCode.USAGE, "")


# Deleted


def test_jobs_are_deleted_by_their_ids_and_what_a_session_keeps_is_said(
    mri: Client, world: World, shell: Shell
) -> None:
    first, second = queued(mri, 2)
    refused = shell("delete", first, "--yes")
    assert refused.code != ExitCode.DONE
    assert "is queued" in refused.err
    for _ in range(2):
        world.perform(world.claim(world.queue()))
    made = mri.sessions.create("s", [first])
    said = shell("delete", first, second, "--yes")
    assert said.code == ExitCode.DONE
    assert f"deleted {first}; session {made.id} keeps its result" in said.err
    assert f"deleted {second}\n" in said.err
    assert mri.jobs() == []
    assert "there is no job" in shell("delete", first, "--yes").err


def test_what_has_been_deleted_is_said_though_another_cannot_be(
    mri: Client, world: World, shell: Shell
) -> None:
    first, second = queued(mri, 2)
    world.perform(world.claim(world.queue()))
    said = shell("delete", first, second, "--yes", "--json")
    assert said.code != ExitCode.DONE
    assert said.json == [{"id": first, "sessions": []}]
    assert [str(each.id) for each in mri.jobs()] == [second]


def test_nothing_is_deleted_before_somebody_says_so(
    mri: Client, world: World, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    [job] = queued(mri, 1)
    world.perform(world.claim(world.queue()))
    said = shell("delete", job)
    assert said.code == ExitCode.FAILED
    assert "nothing was done" in said.err
    assert [str(each.id) for each in mri.jobs()] == [job]
    assert shell("delete", job, "--yes", "--json").json == [{"id": job, "sessions": []}]
