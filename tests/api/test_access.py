"""Who may do what: keys, scopes, sessions, and other people's jobs."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import structlog

from api.access import COOKIE
from api.routes import ROUTES
from neural_mri import Client
from neural_mri.backing import access, audit, jobs, logs
from neural_mri.backing.rows import API_KEYS, LOGINS
from neural_mri.backing.settings import InvalidSettings, Settings
from neural_mri.cli.app import run
from neural_mri.contract.auth import ALL_SCOPES, CreatedKey, LoginRequest, Scope
from tests.api.keyed import READER, USER, Door, keyed
from tests.api.reading import read_all
from tests.api.specimens import PROMPT
from tests.api.world import World

ROOT = Path(__file__).parents[2]
ADMIN = (Scope.ADMIN,)
OPEN = {("/api/health", "GET"), ("/api/login", "POST"), ("/api/logout", "POST")}
NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"


@pytest.fixture(scope="module")
def shared_door(shared_settings: Settings) -> Iterator[Door]:
    with keyed(shared_settings) as door:
        yield door


@pytest.fixture
def door(world: World, shared_door: Door) -> Door:
    """A service with keys, on an empty world."""
    return shared_door


def scan(api: httpx.Client, prompt: str = PROMPT) -> str:
    answer = api.post("/api/scan/activation", json={"prompt": prompt})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def kind_of(answer: httpx.Response) -> str:
    return str(answer.json()["type"]).rpartition(":")[2]


# Keys


def filled(path: str) -> str:
    of_kind = {"uuid": NOBODYS, "int": "0"}
    for piece in path.split("{")[1:]:
        name = piece.partition("}")[0]
        path = path.replace("{" + name + "}", of_kind.get(name.partition(":")[2], "x"))
    return path


def test_without_a_key_nothing_is_answered_but_health_and_the_door_itself(door: Door) -> None:
    with door.client() as stranger:
        for handler in ROUTES:
            (path,), (method,) = handler.paths, handler.http_methods
            answer = stranger.request(str(method), filled(path))
            if (path, str(method)) in OPEN:
                assert answer.status_code in (200, 204, 400)
                continue
            if path.startswith("/api/shared") and answer.status_code == 400:
                assert "Share-Token" in answer.text  # a link opens these, and none was shown
                continue
            assert answer.status_code == 401, f"{method} {path}"
            assert kind_of(answer) == "unauthenticated"
            assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_stranger_learns_of_no_worker_and_no_model_from_health(door: Door, world: World) -> None:
    with door.client() as stranger, door.user(world) as ada:
        assert stranger.get("/api/health").json()["models"] == []
        assert [m["name"] for m in ada.get("/api/health").json()["models"]] == ["tiny"]


def test_what_is_no_key_opens_nothing(door: Door) -> None:
    with door.client() as stranger:
        for header in (
            "Bearer",
            "Bearer x",
            "Bearer nmri_0123456789ab_" + 43 * "A",
            "Basic YWRhOmxvdmVsYWNl",
            "nmri_0123456789ab_" + 43 * "A",
        ):
            answer = stranger.get("/api/jobs", headers={"authorization": header})
            assert answer.status_code == 401, header
            assert 20 * "A" not in answer.text


def test_another_secret_under_a_known_id_is_the_same_as_an_unknown_key(
    door: Door, world: World
) -> None:
    key = door.key(world)
    forged = key.key[:-1] + ("A" if key.key[-1] != "A" else "B")
    unknown = "nmri_000000000000" + key.key[17:]
    with door.client(forged) as one, door.client(unknown) as other:
        answers = [one.get("/api/jobs"), other.get("/api/jobs")]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert answers[0].json() == answers[1].json()


def test_a_revoked_key_opens_nothing_from_then_on(door: Door, world: World) -> None:
    key = door.key(world)
    with door.client(key) as ada:
        assert ada.get("/api/jobs").status_code == 200
        revoked = ada.delete(f"/api/keys/{key.id}")
        assert (revoked.status_code, revoked.json()["id"]) == (200, key.id)
        assert revoked.json()["revoked_at"] is not None
        assert ada.get("/api/jobs").status_code == 401


def test_a_key_ends_when_it_was_said_to(door: Door, world: World) -> None:
    with door.client(door.key(world, seconds=0.4)) as ada:
        assert ada.get("/api/jobs").status_code == 200
        time.sleep(0.5)
        assert ada.get("/api/jobs").status_code == 401


def test_the_database_holds_nothing_that_would_open_the_door(door: Door, world: World) -> None:
    key = door.key(world)
    with door.client() as browser:
        token = browser.post("/api/login", json={"key": key.key}).cookies[COOKIE]
    with world.sessions.reading() as session:
        rows = [*session.execute(API_KEYS.select()), *session.execute(LOGINS.select())]
    kept = repr([tuple(row) for row in rows])
    assert key.id in kept
    assert key.key[18:] not in kept
    assert token not in kept
    assert world.sessions.read(access.authenticate, b"another pepper", key.key) is None


def test_no_secret_is_logged_or_shown(
    door: Door, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    key = door.key(world)
    secret = key.key[18:]
    with (
        caplog.at_level(logging.INFO),
        structlog.testing.capture_logs() as events,
        door.client(key) as ada,
    ):
        said = [
            ada.get("/api/jobs").text,
            ada.post("/api/login", json={"key": key.key}).text,
            ada.post("/api/login", json={"key": key.key, "more": 1}).text,
        ]
    assert secret not in caplog.text + str(events) + "".join(said)
    record = logs.hide(None, "info", {"event": "request_answered", "path": f"/x/{key.key}"})
    assert record["path"] == f"/x/{key.key[:18]}***"
    shown = (key, LoginRequest(key=key.key), Settings(key_pepper="p" * 20))
    assert not any(secret in repr(each) or "pppp" in repr(each) for each in shown)


# Scopes


def test_a_key_does_what_its_scopes_say_and_no_more(door: Door, world: World) -> None:
    for method, path, scope in (
        ("GET", "/api/jobs", Scope.SCAN_READ),
        ("GET", f"/api/jobs/{NOBODYS}/events", Scope.SCAN_READ),
        ("POST", "/api/tokenize", Scope.SCAN_READ),
        ("POST", "/api/scan/activation", Scope.SCAN_WRITE),
        ("DELETE", f"/api/jobs/{NOBODYS}", Scope.SCAN_WRITE),
        ("POST", "/api/model/load", Scope.MODEL_LOAD),
        ("DELETE", "/api/model/unload", Scope.MODEL_LOAD),
    ):
        body = {"model": "tiny"} if "model" in path else {"prompt": "a"}
        others = tuple(each for each in ALL_SCOPES if each not in (scope, Scope.ADMIN))
        for scopes, allowed in (((scope,), True), (others, False), (ADMIN, True)):
            with door.user(world, scopes=scopes) as ada:
                answer = ada.request(method, path, json=None if method == "GET" else body)
            assert (answer.status_code != 403) is allowed, answer.text
            if not allowed:
                assert kind_of(answer) == "missing-scope"
                assert answer.json()["scope"] == scope


def test_who_may_only_read_starts_no_work_by_reading(door: Door, world: World) -> None:
    with door.user(world, scopes=USER) as writer, door.user(world, scopes=READER) as reader:
        done = scan(writer)
        world.perform(world.claim(world.queue()))
        assert reader.get(f"/api/jobs/{done}/result").status_code == 200
        refused = reader.get(f"/api/jobs/{done}/attention/0")
        assert (refused.status_code, kind_of(refused)) == (403, "missing-scope")
        assert len(world.sessions.read(jobs.recent, "ada")) == 1


# Other people's jobs


@pytest.mark.parametrize("scopes", [USER, ADMIN])
def test_another_users_job_answers_exactly_as_a_missing_one(
    door: Door, world: World, scopes: tuple[Scope, ...]
) -> None:
    with door.user(world, "ada") as ada, door.user(world, "bob", scopes) as bob:
        theirs = scan(ada)
        world.perform(world.claim(world.queue()))
        for method, rest in (
            ("GET", ""),
            ("GET", "/events"),
            ("GET", "/result"),
            ("GET", "/result/activations"),
            ("GET", "/manifest"),
            ("GET", "/attention/0"),
            ("DELETE", ""),
        ):
            found = bob.request(method, f"/api/jobs/{theirs}{rest}")
            missing = bob.request(method, f"/api/jobs/{NOBODYS}{rest}")
            assert (found.status_code, missing.status_code) == (404, 404), rest
            assert found.text == missing.text.replace(NOBODYS, theirs)
            if "attention" not in rest:
                assert ada.request(method, f"/api/jobs/{theirs}{rest}").status_code == 200, rest


def test_a_stream_of_several_jobs_carries_ones_own_alone(door: Door, world: World) -> None:
    with door.user(world, "ada") as ada, door.user(world, "bob") as bob:
        theirs, mine = scan(ada, "a"), scan(bob, "b")
        answer = bob.get(f"/api/events?jobs={mine},{theirs}")
        assert (answer.status_code, kind_of(answer)) == (404, "unknown-job")
        for _ in range(2):
            world.perform(world.claim(world.queue()))
        assert read_all(bob, f"/api/events?jobs={mine}")[-1].name == "ended"


def test_each_lists_their_own_jobs_and_shares_only_numbers(door: Door, world: World) -> None:
    with door.user(world, "ada") as ada, door.user(world, "bob") as bob:
        theirs = scan(ada)
        world.perform(world.claim(world.queue()))
        mine = scan(bob)
        assert [job["id"] for job in ada.get("/api/jobs").json()] == [theirs]
        (job,) = bob.get("/api/jobs").json()
        assert (job["id"], job["cached"], job["state"]) == (mine, True, "succeeded")
        tables = [
            api.get(f"/api/jobs/{i}/result/activations") for api, i in ((ada, theirs), (bob, mine))
        ]
        assert tables[0].content == tables[1].content


def test_attention_is_measured_for_each_who_asks(door: Door, world: World) -> None:
    """Two people's requests for the same patterns do not run into each other's jobs."""
    with door.user(world, "ada") as ada, door.user(world, "bob") as bob:
        ids = [scan(ada), scan(bob)]
        with world.working(world.queue()):
            for api, job_id in zip((ada, bob), ids, strict=True):
                answer = api.get(f"/api/jobs/{job_id}/attention/0", headers={"prefer": "wait=20"})
                assert answer.status_code == 200, answer.text


# Sessions of browsers


def test_a_browser_gives_its_key_once_and_keeps_a_cookie_no_script_can_read(
    door: Door, world: World
) -> None:
    key = door.key(world)
    with door.client() as browser:
        answer = browser.post("/api/login", json={"key": key.key}, headers={"origin": door.url})
        assert answer.json()["user"] == "ada"
        cookie = SimpleCookie(answer.headers["set-cookie"])[COOKIE]
        assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "strict", "/")
        assert cookie["secure"] == ""
        assert key.key not in cookie.value
        assert browser.get("/api/jobs").status_code == 200
        assert browser.get("/api/login").json()["scopes"] == ["scan:read", "scan:write"]
        job = scan(browser)
        world.perform(world.claim(world.queue()))
        assert read_all(browser, f"/api/jobs/{job}/events")[-1].name == "ended"
        assert browser.post("/api/logout").status_code == 204
        browser.cookies.set(COOKIE, cookie.value)
        assert browser.get("/api/jobs").status_code == 401


def test_behind_tls_the_cookie_is_for_tls_alone(door: Door, world: World) -> None:
    host = door.url.removeprefix("http://")
    with door.client() as browser:
        answer = browser.post(
            "/api/login",
            json={"key": door.key(world).key},
            headers={"origin": f"https://{host}"},
        )
        assert "Secure" in answer.headers["set-cookie"]


def test_another_sites_page_cannot_use_the_cookie(door: Door, world: World) -> None:
    with door.client() as browser:
        browser.post("/api/login", json={"key": door.key(world).key})
        answer = browser.post(
            "/api/scan/activation",
            json={"prompt": PROMPT},
            headers={"origin": "http://evil.test", "sec-fetch-site": "cross-site"},
        )
        assert answer.status_code == 403


def test_sessions_end_with_their_key_and_with_time(door: Door, world: World) -> None:
    key = door.key(world)
    with door.client() as browser:
        browser.post("/api/login", json={"key": key.key})
        world.sessions.write(access.revoke_key, key.id)
        assert browser.get("/api/jobs").status_code == 401
    token = world.sessions.write(
        access.open_login, access.load_pepper(door.settings), door.key(world).id, 0.3
    )
    with door.client() as browser:
        browser.cookies.set(COOKIE, token)
        assert browser.get("/api/jobs").status_code == 200
        time.sleep(0.4)
        assert browser.get("/api/jobs").status_code == 401


# Keys that make keys


def test_a_key_makes_only_keys_that_can_do_no_more(door: Door, world: World) -> None:
    with door.client(door.key(world, seconds=3600.0)) as ada:
        made = ada.post("/api/keys", json={"label": "ci", "scopes": ["scan:read"]})
        assert made.status_code == 201
        key = msgspec.json.decode(made.content, type=CreatedKey)
        assert (key.user, key.label, key.scopes) == ("ada", "ci", READER)
        assert key.expires_at is not None
        with door.client(key) as reader:
            assert reader.get("/api/jobs").status_code == 200
            assert reader.post("/api/keys", json={"scopes": ["scan:write"]}).status_code == 403
            assert reader.post("/api/keys", json={}).status_code == 403
        for wanted in ({"scopes": ["admin"]}, {"scopes": ["model:load"]}, {"user": "bob"}):
            assert ada.post("/api/keys", json=wanted).status_code == 403, wanted
        wrong: dict[str, Any]
        for wrong in ({"scopes": []}, {"scopes": ["root"]}, {"user": "a b"}, {"secret": "x"}):
            assert ada.post("/api/keys", json=wrong).status_code == 400, wrong


def test_a_key_ends_itself_and_none_that_can_do_more(door: Door, world: World) -> None:
    writer, reader, other = (door.key(world, scopes=each) for each in (USER, READER, READER))
    with door.client(reader) as ada:
        assert ada.delete(f"/api/keys/{writer.id}").status_code == 403
        assert ada.delete(f"/api/keys/{other.id}").status_code == 200
        assert ada.delete(f"/api/keys/{reader.id}").status_code == 200
        assert ada.get("/api/login").status_code == 401
    with door.client(writer) as ada:
        assert ada.get("/api/login").status_code == 200


def test_nobody_has_more_keys_than_a_hundred(door: Door, world: World) -> None:
    first = door.key(world)
    with world.sessions.writing() as session:
        for _ in range(access.MOST_KEYS - 1):
            access.create_key(session, b"pepper", user="ada", scopes=READER)
    with door.client(first) as ada:
        refused = ada.post("/api/keys", json={})
        assert refused.status_code == 429
        assert "retry-after" not in refused.headers
        spare = next(k for k in ada.get("/api/keys").json() if k["id"] != first.id)
        ada.delete(f"/api/keys/{spare['id']}")
        assert ada.post("/api/keys", json={}).status_code == 201


def test_an_admin_keeps_everybodys_keys_and_others_their_own(door: Door, world: World) -> None:
    bobs = door.key(world, "bob")
    with door.user(world, "root", ADMIN) as root, door.user(world, "ada") as ada:
        made = root.post("/api/keys", json={"user": "cyd", "scopes": ["scan:read"]}).json()
        assert {key["user"] for key in root.get("/api/keys").json()} == {
            "root",
            "ada",
            "bob",
            "cyd",
        }
        assert [key["user"] for key in root.get("/api/keys?user=cyd").json()] == ["cyd"]
        listed = ada.get("/api/keys?user=bob").json()
        assert [key["user"] for key in listed] == ["ada"]
        assert all("key" not in key and "digest" not in key for key in listed)
        theirs, nobodys = (ada.delete(f"/api/keys/{i}") for i in (bobs.id, "000000000000"))
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.text == nobodys.text.replace("000000000000", bobs.id)
        assert root.delete(f"/api/keys/{made['id']}").status_code == 200


def test_the_command_line_makes_lists_and_revokes_keys(
    door: Door, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NMRI_URL", door.url)
    assert run(["keys", "list"]) == 1
    assert "API key" in capsys.readouterr().err
    monkeypatch.setenv("NMRI_API_KEY", door.key(world, "root", ADMIN).key)
    assert run(["keys", "create", "--user", "ada", "--label", "ci", "--days", "30"]) == 0
    made = capsys.readouterr()
    key = made.out.split()[-1]
    with door.client(key) as ada:
        assert ada.get("/api/login").json()["user"] == "ada"
        assert run(["keys", "list"]) == 0
        listed = capsys.readouterr().out
        assert key[5:17] in listed
        assert key not in listed
        assert run(["keys", "revoke", key[5:17]]) == 0
        assert ada.get("/api/login").status_code == 401
    capsys.readouterr()
    assert run(["keys", "revoke", key]) == 2
    assert key[18:] not in capsys.readouterr().err
    assert run(["keys", "create", "--scope", "root"]) == 2


def test_the_python_client_says_who_asks(
    door: Door, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = door.key(world).key
    with Client(door.url, api_key=key) as client:
        assert [model.name for model in client.models()] == ["tiny"]
    monkeypatch.setenv("NMRI_API_KEY", f"{key}\n")
    with Client(door.url) as client:
        assert client.jobs() == []
    monkeypatch.setenv("NMRI_API_KEY", "hunter2")
    with pytest.raises(ValueError, match="NMRI_API_KEY") as refused:
        Client(door.url)
    assert "hunter2" not in str(refused.value)


# The server's own machine


def python(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("NEURAL_MRI_")}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**inherited, **settings.environment()},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_the_first_admins_key_is_made_beside_the_database(door: Door, world: World) -> None:
    made = python(door.settings, "api.keys", "create", "--admin")
    assert made.returncode == 0, made.stderr
    with door.client(made.stdout.strip()) as root:
        who = root.get("/api/login").json()
    assert (who["user"], set(who["scopes"])) == ("local", set(ALL_SCOPES))
    assert made.stdout.strip() not in made.stderr
    (deed,) = world.sessions.read(audit.entries, limit=10)
    assert (deed.user, deed.subject) == ("(console)", made.stdout[5:17])


def test_without_keys_other_machines_are_not_served(world: World) -> None:
    for host in ("192.0.2.7", "::", "gpu-7.example.org"):
        with pytest.raises(InvalidSettings, match="NEURAL_MRI_AUTH=keys"):
            access.check_bind(Settings(host=host))
        access.check_bind(Settings(host=host, auth="keys"))
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"):
        access.check_bind(Settings(host=host))
    refused = python(msgspec.structs.replace(world.settings, host="192.0.2.7"), "api")
    assert refused.returncode == 2
    assert "NEURAL_MRI_AUTH=keys" in refused.stderr


def test_the_pepper_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "new")
    first = access.load_pepper(settings)
    assert access.load_pepper(settings) == first
    assert len(first) == 64
    path = settings.folder / "keys.pepper"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in settings.folder.iterdir()] == ["keys.pepper"]
    given = msgspec.structs.replace(settings, key_pepper="x" * 16)
    assert access.load_pepper(given) == b"x" * 16
    with pytest.raises(InvalidSettings, match="KEY_PEPPER has 3 characters"):
        access.load_pepper(msgspec.structs.replace(settings, key_pepper="abc"))


def test_at_ones_own_machine_nobody_asks_for_a_key(api: httpx.Client, world: World) -> None:
    assert api.get("/api/login").json() == {
        "user": "local",
        "scopes": list(ALL_SCOPES),
        "key": None,
        "expires_at": None,
    }
    assert world.job(scan(api)).owner == "local"
