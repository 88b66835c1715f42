"""Sessions as people make, save and read them."""

import io
from typing import Any, NamedTuple

import httpx

from neural_mri.contract.archives import SESSION_FILE, Archive, open_archive
from tests.api.specimens import PROMPT
from tests.api.world import World

__all__ = ("Session", "archived", "deep", "made", "read", "save", "scanned", "send_file")


def scanned(api: httpx.Client, world: World, prompt: str = PROMPT, **more: Any) -> str:
    """The id of a scan that has succeeded."""
    answer = api.post("/api/scan/activation", json={"prompt": prompt, **more})
    assert answer.status_code == 202, answer.text
    if answer.json()["state"] != "succeeded":
        world.perform(world.claim(world.queue()))
    return str(answer.json()["id"])


class Session(NamedTuple):
    """A session as it was last read."""

    path: str
    revision: str
    body: dict[str, Any]


def read(answer: httpx.Response, *, status: int = 200) -> Session:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert answer.headers["etag"] == f'"{body["opened"]}"'
    return Session(body["links"]["self"], body["opened"], body)


def made(api: httpx.Client, *jobs: str, name: str = "Eiffel", **more: Any) -> Session:
    body = {"name": name, "scans": [{"job": job} for job in jobs], **more}
    answer = api.post("/api/sessions", json=body)
    session = read(answer, status=201)
    assert answer.headers["location"] == session.path
    return session


def save(
    api: httpx.Client, session: Session, over: str | None = None, **body: Any
) -> httpx.Response:
    held = [{"result": scan["result"]} for scan in session.body["document"]["scans"]]
    tag = {"if-match": f'"{over or session.revision}"'}
    return api.put(session.path, json={"scans": held, **body}, headers=tag)


def send_file(api: httpx.Client, body: bytes) -> httpx.Response:
    return api.post("/api/sessions/import", content=body, headers={"content-type": SESSION_FILE})


def archived(api: httpx.Client, path: str, **headers: str) -> Archive:
    """What a file of a session holds."""
    answer = api.get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    return open_archive(io.BytesIO(answer.content), largest=10**8)


def deep(levels: int) -> Any:
    """Objects and lists in one another."""
    value: Any = "within"
    for level in range(levels):
        value = {"in": value} if level % 2 else [value]
    return {"in": value}
