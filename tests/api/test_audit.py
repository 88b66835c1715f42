"""The record of who did what."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy.orm import Session

from neural_mri.backing import access, audit, limits
from neural_mri.backing.audit import CONSOLE, Deed
from neural_mri.backing.settings import Settings
from neural_mri.contract.auth import AuditAction, Scope
from tests.api.keyed import USER, Door, keyed
from tests.api.specimens import PROMPT
from tests.api.world import World

ADMIN = (Scope.ADMIN,)


@pytest.fixture(scope="module")
def shared_door(shared_settings: Settings) -> Iterator[Door]:
    with keyed(shared_settings) as door:
        yield door


@pytest.fixture
def door(shared_door: Door, world: World) -> Door:
    return shared_door


def said(api: httpx.Client, query: str = "") -> list[tuple[str, str, str]]:
    """Who did what to what, oldest first."""
    found: list[dict[str, Any]] = api.get(f"/api/audit{query}").raise_for_status().json()
    return [(each["user"], each["action"], each["subject"]) for each in reversed(found)]


def test_the_record_says_who_did_what_with_which_key(door: Door, world: World) -> None:
    roots = door.key(world, "root", ADMIN)
    with door.client(roots) as root, door.user(world, "ada", (*USER, Scope.MODEL_LOAD)) as ada:
        made = root.post("/api/keys", json={"user": "bob", "label": "ci"}).json()
        root.put("/api/users/bob/limits", json={"max_jobs": 5})
        with door.client() as browser:
            browser.post("/api/login", json={"key": made["key"]})
        loading = ada.post("/api/model/load", json={"model": "tiny"}).json()
        job = ada.post("/api/scan/activation", json={"prompt": PROMPT}).json()
        ada.delete(f"/api/jobs/{job['id']}")
        ada.delete(f"/api/jobs/{job['id']}")
        root.delete(f"/api/keys/{made['id']}")
        assert said(root) == [
            ("root", "key_created", made["id"]),
            ("root", "limits_set", "bob"),
            ("bob", "logged_in", made["id"]),
            ("ada", "model_loaded", "tiny"),
            ("ada", "job_cancelled", job["id"]),
            ("root", "key_revoked", made["id"]),
        ]
        entries = {each["action"]: each for each in root.get("/api/audit").json()}
        assert entries["key_created"]["key"] == roots.id
        assert entries["key_created"]["details"] == {
            "user": "bob",
            "label": "ci",
            "scopes": ["scan:read", "scan:write"],
        }
        assert entries["limits_set"]["details"] == {"max_jobs": 5, "daily_seconds": None}
        assert entries["model_loaded"]["details"] == {"job": loading["id"]}
        assert made["key"][18:] not in root.get("/api/audit").text
        assert PROMPT not in root.get("/api/audit").text


def test_who_deleted_a_session_is_recorded_once_and_who_tried_is_not(
    door: Door, world: World
) -> None:
    with (
        door.user(world, "root", ADMIN) as root,
        door.user(world, "ada") as ada,
        door.user(world, "bob") as bob,
    ):
        path = f"/api/sessions/{ada.post('/api/sessions', json={'name': 'Secret'}).json()['id']}"
        assert bob.delete(path).status_code == 404
        assert ada.delete(path).status_code == 204
        assert ada.delete(path).status_code == 404
        assert said(root) == [("ada", "session_deleted", path.rpartition("/")[2])]
        assert "Secret" not in root.get("/api/audit").text


def test_what_was_refused_or_sent_twice_is_no_deed(door: Door, world: World) -> None:
    with (
        door.user(world, "root", ADMIN) as root,
        door.user(world, "ada", (Scope.SCAN_READ, Scope.MODEL_LOAD)) as ada,
    ):
        assert ada.post("/api/keys", json={"scopes": ["admin"]}).status_code == 403
        assert ada.post("/api/model/load", json={"model": "none"}).status_code == 422
        assert ada.delete("/api/keys/000000000000").status_code == 404
        assert ada.post("/api/login", json={"key": "nmri_x"}).status_code == 401
        assert said(root) == []
        for _ in range(2):
            ada.post("/api/model/load", json={"model": "tiny"}, headers={"idempotency-key": "once"})
        assert said(root) == [("ada", "model_loaded", "tiny")]


def test_a_deed_that_fails_is_not_recorded_and_one_not_recorded_is_not_done(
    world: World,
) -> None:
    def fail(session: Session) -> None:
        access.ensure_user(session, "ada")
        raise RuntimeError("half done")

    def done(_: None) -> Deed:
        return Deed(AuditAction.LIMITS_SET, "ada", {"unspeakable": object()})

    with pytest.raises(RuntimeError, match="half done"):
        world.sessions.write(audit.audited, CONSOLE, done, fail)
    with pytest.raises(TypeError):
        world.sessions.write(audit.audited, CONSOLE, done, access.ensure_user, "ada")
    with world.sessions.reading() as session:
        assert audit.entries(session, limit=10) == []
        assert limits.users(session) == []


def test_the_record_is_for_admins_and_read_page_by_page(door: Door, world: World) -> None:
    with door.user(world, "root", ADMIN) as root, door.user(world, "ada") as ada:
        for who in ("ada", "bob", "cyd"):
            root.put(f"/api/users/{who}/limits", json={})
        assert ada.get("/api/audit").status_code == 403
        first = root.get("/api/audit?limit=2").json()
        assert [each["subject"] for each in first] == ["cyd", "bob"]
        rest = root.get(f"/api/audit?before={first[-1]['id']}").json()
        assert [each["subject"] for each in rest] == ["ada"]
        assert said(root, "?user=ada") == []
        assert len(said(root, "?action=limits_set")) == 3
        assert said(root, "?action=key_created") == []
        for wrong in ("limit=0", "action=stolen", "before=x"):
            assert root.get(f"/api/audit?{wrong}").status_code == 400
