"""`neural-mri sessions` and `neural-mri batch`, on the real API."""

import re
from pathlib import Path
from uuid import UUID

import httpx
import msgspec
import pyarrow as pa
import pytest
from pyarrow import csv

from neural_mri.cli.exits import ExitCode
from neural_mri.contract.jobs import JobState
from tests.api.shell import Shell
from tests.api.specimens import PROMPT
from tests.api.world import World

NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"


def scanned(api: httpx.Client, world: World, prompt: str = PROMPT) -> str:
    job = api.post("/api/scan/activation", json={"prompt": prompt}).json()["id"]
    world.perform(world.claim(world.queue()))
    return str(job)


def test_a_session_is_kept_shown_and_taken_away(
    shell: Shell, api: httpx.Client, world: World, tmp_path: Path
) -> None:
    jobs = [scanned(api, world), scanned(api, world, "a b")]
    saved = shell("sessions", "save", "Eiffel", *jobs, "--note", "Layer 1 writes the city")
    session = saved.out.strip()
    assert UUID(session).version == 7
    assert "revision" in saved.err
    shown = shell("sessions", "show", session)
    assert "Layer 1 writes the city" in shown.out
    assert PROMPT in shown.out
    assert shell("sessions", "list", "tower").out.count(session) == 1
    assert shell("sessions", "rename", session, "Tower").code == ExitCode.DONE
    assert "Tower, pinned" in shell("sessions", "pin", session).out
    file = tmp_path / "tower.nmri"
    assert shell("sessions", "export", session, str(file)).code == ExitCode.DONE
    opened = shell("sessions", "open", str(file))
    assert opened.out == shell("sessions", "open", session).out
    assert "activations" in opened.out
    assert shell("sessions", "delete", session, "--yes").code == ExitCode.DONE
    taken = shell("sessions", "import", str(file), "--json").json
    assert (taken["name"], taken["origin"]) == ("Tower", "imported")
    body = file.read_bytes()
    file.write_bytes(body[:200] + b"x" + body[201:])
    refused = shell("sessions", "import", str(file))
    assert refused.code == ExitCode.FAILED
    assert "Traceback" not in refused.err
    damaged = shell("sessions", "open", str(file))
    assert damaged.code == ExitCode.FAILED


def test_older_jobs_and_batches_are_listed_after_those_shown(
    shell: Shell, api: httpx.Client
) -> None:
    jobs = [
        api.post("/api/scan/activation", json={"prompt": f"a {n}"}).json()["id"] for n in range(3)
    ]
    first = shell("jobs", "--limit", "2")
    assert [line.split()[0] for line in first.out.splitlines()[1:]] == jobs[:0:-1]
    (said,) = re.findall(r"--after \S+", first.err)
    rest = shell("jobs", *said.split(), "--json")
    assert [job["id"] for job in rest.json] == jobs[:1]
    assert rest.err == ""
    assert shell("jobs", "--after", NOBODYS).code == ExitCode.FAILED
    scans = {"scans": [{"scan_mode": "T1"}]}
    batches = [api.post("/api/batches", json=scans).json()["id"] for _ in range(2)]
    latest = shell("batch", "list", "--limit", "1")
    assert batches[1] in latest.out
    (said,) = re.findall(r"--after \S+", latest.err)
    assert [batch["id"] for batch in shell("batch", "list", *said.split(), "--json").json] == (
        batches[:1]
    )


def test_a_scan_that_a_report_names_is_opened_by_the_digits_it_prints(
    shell: Shell, api: httpx.Client, world: World
) -> None:
    job = scanned(api, world)
    scanned(api, world, "a b")
    key = api.get(f"/api/jobs/{job}/manifest").json()["scan_key"]
    found = shell("jobs", "--scan-key", key[:16], "--json").json
    assert [each["id"] for each in found] == [job]
    refused = shell("jobs", "--scan-key", "L1H0")
    assert refused.code == ExitCode.USAGE
    assert "'L1H0' is not a scan's key" in refused.err


def test_what_differs_is_printed_with_its_components(
    shell: Shell, api: httpx.Client, world: World
) -> None:
    first, second = scanned(api, world), scanned(api, world, PROMPT + " a")
    sides = [shell("sessions", "save", "x", job, "-q").out.strip() for job in (first, second)]
    told = shell("sessions", "diff", *sides)
    assert "changed: fMRI" in told.out
    assert re.search(r"root mean square \d", told.out)
    assert re.search(r"mean, largest \d", told.out)
    assert re.search(r"blocks\.\d\.\w+ +[+-]\d", told.out)
    assert shell("sessions", "diff", *sides, "--json").json["scans"][0]["change"] == "changed"
    more = shell("sessions", "save", "x", second, "--into", sides[0], "--json").json
    assert more["revision"] == 2
    again = shell("sessions", "diff", *sides)
    assert "same: fMRI" in again.out
    forked = shell("sessions", "fork", sides[0], "--name", "y", "--json").json
    assert forked["head"] == more["head"]


def test_links_are_printed_once(shell: Shell, api: httpx.Client, world: World) -> None:
    session = shell("sessions", "save", "x", scanned(api, world), "-q").out.strip()
    made = shell("sessions", "share", session, "--redact", "--label", "Ada", "--days", "3")
    token = made.out.strip().rpartition("#shared=")[2]
    assert api.get("/api/shared", headers={"share-token": token}).json()["redacted"]
    listed = shell("sessions", "share", session, "--list")
    assert token not in listed.out
    link = re.search(r"[0-9a-f]{12}", listed.out)
    assert link is not None
    assert shell("sessions", "revoke", session, link[0]).code == ExitCode.DONE
    assert api.get("/api/shared", headers={"share-token": token}).status_code == 404
    assert (
        shell("sessions", "share", session, "--redact", "--access", "fork").code == ExitCode.USAGE
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("sessions", "show", "tower"),
        ("sessions", "save", "x", "tower"),
        ("sessions", "open", "nothing.nmri"),
        ("sessions", "import", "nothing.nmri"),
        ("sessions", "show", NOBODYS, "--revision", "x"),
        ("batch", "show", "tower"),
        ("batch", "submit", "nothing.ndjson"),
        ("batch", "submit", "x", "--max-failures", "0"),
        ("batch", "results", NOBODYS, "--csv", "x.csv"),
        ("batch", "results", NOBODYS, "--out", "x.zip", "--table", "predictions"),
    ],
)
def test_bad_usage_is_said_in_a_sentence(shell: Shell, arguments: tuple[str, ...]) -> None:
    said = shell(*arguments)
    assert said.code == ExitCode.USAGE
    assert said.out == ""
    assert arguments[2] in said.err or arguments[-1] in said.err or "--table" in said.err


def test_a_batch_is_submitted_followed_and_read(shell: Shell, world: World, tmp_path: Path) -> None:
    file = tmp_path / "scans.ndjson"
    file.write_text('{"scan_mode":"fMRI","prompt":"a"}\n{"scan_mode":"fMRI","prompt":"b c"}\n')
    with world.working(world.queue()):
        done = shell("batch", "submit", str(file), "--name", "two", "--json")
    assert done.code == ExitCode.DONE
    batch = done.json
    assert (batch["state"], batch["counts"]["succeeded"]) == ("ended", 2)
    lines = shell("batch", "results", batch["id"]).out.splitlines()
    assert [msgspec.json.decode(line)["line"] for line in lines] == [1, 2]
    arrow, table = tmp_path / "p.arrow", tmp_path / "p.csv"
    shell("batch", "results", batch["id"], "--table", "predictions", "--arrow", str(arrow), "--csv", str(table))  # fmt: skip
    assert pa.ipc.open_file(arrow.read_bytes()).read_all()["line"].to_pylist() == [1, 2]
    assert csv.read_csv(table)["line"].to_pylist() == [1, 2]
    assert shell("batch", "results", batch["id"], "--out", str(tmp_path / "all.zip")).code == 0
    assert (tmp_path / "all.zip").read_bytes()[:2] == b"PK"
    assert shell("batch", "list").out.count("two") == 1
    events = shell("batch", "watch", batch["id"], "--json").out.splitlines()
    assert [msgspec.json.decode(line)["type"] for line in events] == ["line", "line", "ended"]
    second = world.job(msgspec.json.decode(lines[1])["job"])
    world.harm(second, "predictions")
    left = shell("batch", "results", batch["id"], "--table", "predictions")
    assert "their results are lost: lines 2" in left.err
    assert {msgspec.json.decode(row)["line"] for row in left.out.splitlines()} == {1}


def test_the_exit_code_of_a_batch_tells_how_it_went(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    file = tmp_path / "scans.ndjson"
    file.write_text('{"scan_mode":"fMRI","prompt":"a"}\n{"scan_mode":"fMRI","facter":1}\n')
    refused = shell("batch", "submit", str(file))
    assert refused.code == ExitCode.FAILED
    assert "line 2: " in refused.err
    batch = shell("batch", "submit", str(file), "--on-invalid", "skip", "--no-wait").out.strip()
    assert shell("batch", "show", batch).out.count("1 refused") == 1
    world.move(world.claim(world.queue()), JobState.FAILED, problem={"detail": "no"})
    assert shell("batch", "watch", batch).code == ExitCode.FAILED
    other = shell("batch", "submit", str(file), "--on-invalid", "skip", "--no-wait").out.strip()
    assert shell("batch", "cancel", other, "--json").json["state"] == "cancelled"
    assert shell("batch", "watch", other, "-q").code == ExitCode.CANCELLED


def test_a_batch_whose_scans_were_stopped_or_deleted_one_by_one_has_not_all_succeeded(
    shell: Shell, world: World, tmp_path: Path
) -> None:
    file = tmp_path / "scans.ndjson"
    file.write_text('{"scan_mode":"fMRI","prompt":"a"}\n{"scan_mode":"fMRI","prompt":"b"}\n')
    batch = shell("batch", "submit", str(file), "--no-wait").out.strip()
    done = world.perform(world.claim(world.queue()))
    stopped = world.claim(world.queue())
    shell("cancel", str(stopped.id))
    world.move(stopped, JobState.CANCELLED)
    for command in (("batch", "watch"), ("watch",)):
        assert shell(*command, batch).code == ExitCode.CANCELLED
    assert shell("delete", str(done.id), "--yes").code == ExitCode.DONE
    for command in (("batch", "watch"), ("watch",)):
        assert shell(*command, batch).code == ExitCode.FAILED


def test_a_revision_that_is_none_is_named_by_its_option(
    shell: Shell, api: httpx.Client, world: World
) -> None:
    session = shell("sessions", "save", "Eiffel", scanned(api, world)).out.strip()
    for option in ("--revision", "--other-revision"):
        said = shell("sessions", "diff", session, session, option, "0" * 12)
        assert said.code == ExitCode.USAGE
        assert f"Invalid value for {option}: the session has no revision" in said.err
