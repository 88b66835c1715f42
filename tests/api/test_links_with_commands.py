"""Links in the shell: what they allow by them, what they do not by nobody, and no key to a stranger."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec
import pytest

from neural_mri.backing.rows import SHARES
from neural_mri.backing.settings import Settings
from neural_mri.cli.exits import ExitCode
from neural_mri.client import Client
from neural_mri.contract.scans import ActivationScan
from neural_mri.contract.sessions import Note
from tests.api.keyed import Door, keyed
from tests.api.shell import Said, Shell
from tests.api.specimens import PROMPT
from tests.api.world import World

TOKEN = "A" * 22


@pytest.fixture(scope="module")
def shared_door(shared_settings: Settings) -> Iterator[Door]:
    with keyed(shared_settings) as door:
        yield door


@pytest.fixture
def ada(shared_door: Door, world: World) -> Iterator[Client]:
    with Client(shared_door.url, api_key=shared_door.key(world).key) as client:
        yield client


@pytest.fixture
def shell(
    shared_door: Door,
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Shell:
    """Bob's."""
    monkeypatch.setenv("NMRI_URL", shared_door.url)
    monkeypatch.setenv("NMRI_API_KEY", shared_door.key(world, "bob").key)
    return Shell(capsys)


def scan(client: Client, world: World, prompt: str = PROMPT) -> str:
    job = client.submit(ActivationScan(prompt=prompt))
    if not job.cached:
        world.perform(world.claim(world.queue()))
    return str(job.id)


@pytest.fixture
def link(ada: Client, world: World) -> Callable[[str], str]:
    session = ada.sessions.create("Eiffel", [scan(ada, world)], notes=[Note(text="Here")])

    def made(access: str) -> str:
        return ada.base_url + ada.sessions.share(session, access=access).path

    return made


def test_a_link_opens_wherever_an_id_does(
    shell: Shell, link: Callable[[str], str], tmp_path: Path
) -> None:
    read = link("read")
    assert "Here" in shell("sessions", "show", read).out
    opened = shell("sessions", "open", read)
    assert "activations" in opened.out
    file = tmp_path / "eiffel.nmri"
    assert shell("sessions", "export", read, str(file)).code == ExitCode.DONE
    assert shell("sessions", "open", str(file)).out == opened.out


def test_a_link_lets_fork_and_add_what_it_allows(
    shell: Shell, link: Callable[[str], str], ada: Client, world: World
) -> None:
    refused = shell("sessions", "fork", link("read"))
    assert refused.code == ExitCode.FAILED
    assert "allows to read" in refused.err
    forked = shell("sessions", "fork", link("fork"), "--name", "Mine", "--json").json
    assert (forked["owner"], forked["name"]) == ("bob", "Mine")
    assert "Mine" in shell("sessions", "list").out
    job = shell("scan", "activation", "a b", "--no-wait", "-q").out.strip()
    world.perform(world.claim(world.queue()))
    added = shell("sessions", "add", link("contribute"), job, "--label", "bob's", "--json").json
    assert [each["label"] for each in added["document"]["scans"]] == ["", "bob's"]
    assert shell("sessions", "add", link("fork"), job).code == ExitCode.FAILED


def test_a_link_can_be_watched(link: Callable[[str], str], ada: Client) -> None:
    watching = subprocess.Popen(
        [sys.executable, "-m", "neural_mri.cli", "sessions", "watch", link("read")],
        env={name: value for name, value in os.environ.items() if not name.startswith("NMRI_")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout is not None
    assert msgspec.json.decode(watching.stdout.readline())["type"] == "saved"
    (session,) = ada.sessions.list()
    ada.sessions.delete(session)
    out, _ = watching.communicate(timeout=30)
    assert watching.returncode == ExitCode.DONE
    assert msgspec.json.decode(out.splitlines()[-1])["type"] == "closed"


def test_an_address_of_the_viewers_is_as_good_as_an_id(
    shell: Shell, shared_door: Door, world: World
) -> None:
    job = shell("scan", "activation", PROMPT, "--no-wait", "-q").out.strip()
    world.perform(world.claim(world.queue()))
    session = shell("sessions", "save", "x", job, "-q").out.strip()
    address = f"{shared_door.url}/#layout=stack&session={session}"
    assert "x" in shell("sessions", "show", address).out
    assert shell("sessions", "rename", address, "y").code == ExitCode.DONE
    elsewhere = shell("sessions", "show", address.replace("127.0.0.1", "localhost"))
    assert elsewhere.code == ExitCode.USAGE
    assert "add --url http://localhost" in elsewhere.err


@pytest.mark.parametrize("command", ["rename", "pin", "delete", "share", "revoke", "revisions"])
def test_what_only_owners_may_is_refused_for_a_link_without_repeating_it(
    shell: Shell, command: str
) -> None:
    more = {"rename": ["x"], "revoke": ["0" * 12]}.get(command, [])
    said = shell("sessions", command, f"http://127.0.0.1:9/#shared={TOKEN}", *more)
    assert (said.code, said.out) == (ExitCode.USAGE, "")
    assert "expected the id of a session of yours" in said.err
    assert TOKEN not in said.err


@pytest.mark.parametrize(
    "link", ["http://127.0.0.1/#shared=AAA", "tower#shared=" + TOKEN, "http://127.0.0.1/#x=1"]
)
def test_what_is_no_link_is_said(shell: Shell, link: str) -> None:
    for command in ("show", "open", "watch"):
        assert shell("sessions", command, link).code == ExitCode.USAGE


def test_a_link_to_a_stranger_gets_no_key(shell: Shell) -> None:
    met: list[dict[str, str]] = []

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            met.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        link = f"http://127.0.0.1:{server.server_address[1]}/#shared={TOKEN}"
        said: list[Said] = [shell("sessions", "show", link), shell("sessions", "fork", link)]
        server.shutdown()
        serving.join()
    assert [each.code for each in said] == [ExitCode.FAILED, ExitCode.USAGE]
    assert "add --url" in said[1].err
    (headers,) = met
    assert headers["share-token"] == TOKEN
    assert "authorization" not in headers


def test_revisions_are_listed_and_named_by_their_first_digits(shell: Shell, world: World) -> None:
    job = shell("scan", "activation", PROMPT, "--no-wait", "-q").out.strip()
    world.perform(world.claim(world.queue()))
    session = shell("sessions", "save", "x", job, "-q", "--message", "Begun").out.strip()
    shell("sessions", "save", "x", job, "--into", session, "--note", "Seen", "--message", "Noted")
    listed = shell("sessions", "revisions", session, "--json").json
    assert [each["message"] for each in listed] == ["Noted", "Begun"]
    begun = listed[1]["revision"]
    table = shell("sessions", "revisions", session)
    assert begun[:12] in table.out
    assert "bob" in table.out
    assert shell("sessions", "show", session, "--revision", begun[:12]).out.count("Seen") == 0
    assert shell("sessions", "show", session, "--revision", begun).out.count("Seen") == 0
    assert "Seen" in shell("sessions", "show", session).out
    told = shell("sessions", "diff", session, session, "--revision", begun[:8], "--json").json
    assert [note["text"] for note in told["notes_added"] + told["notes_removed"]] == ["Seen"]
    for wrong in ("x", "abc", begun + "0"):
        assert shell("sessions", "show", session, "--revision", wrong).code == ExitCode.USAGE
    nothing = "f" * 12 if not begun.startswith("f" * 12) else "0" * 12
    said = shell("sessions", "show", session, "--revision", nothing)
    assert (said.code, f"no revision '{nothing}'" in said.err) == (ExitCode.USAGE, True)


def test_a_link_that_is_over_is_not_called_good(shell: Shell, world: World) -> None:
    job = shell("scan", "activation", PROMPT, "--no-wait", "-q").out.strip()
    world.perform(world.claim(world.queue()))
    session = shell("sessions", "save", "x", job, "-q").out.strip()
    shell("sessions", "share", session, "--label", "for good")
    shell("sessions", "share", session, "--label", "a week", "--days", "7")
    listed = shell("sessions", "share", session, "--list").out
    assert [" good" in line for line in listed.splitlines()[1:]] == [False, True]
    assert "until 20" in listed
    with world.sessions.writing() as writing:
        writing.execute(SHARES.update().values(expires_at=1.0))
    again = shell("sessions", "share", session, "--list").out
    assert again.count("expired 1970") == 2
