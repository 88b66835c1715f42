"""Files of sessions: what is exported and taken in again, and what is refused of them."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from api import session_files
from neural_mri.contract.archives import (
    SESSION_FILE,
    InvalidArchive,
    canonical,
    chunk_entry,
    result_entry,
    write_archive,
)
from neural_mri.contract.sessions import SessionDocument
from tests.api.saved import archived, deep, made, read, save, scanned, send_file
from tests.api.specimens import PROMPT
from tests.api.world import World, serving
from tests.backing.stores import clear
from tests.servers import empty


def test_what_is_exported_and_taken_in_again_has_the_same_hashes(
    lone_world: World, tmp_path: Any
) -> None:
    with serving(lone_world.settings) as api:
        jobs = [scanned(api, lone_world), scanned(api, lone_world, "a b")]
        session = made(api, *jobs, notes=[{"text": "Here"}], view={"layer": 1})
        file = api.get(f"{session.path}/export")
        assert file.headers["content-type"] == SESSION_FILE
        assert file.content == api.get(f"{session.path}/export").content
        # Everything is wiped: the database, the store, Redis.
        empty(lone_world.sessions)
        clear(lone_world.store)
        lone_world.redis.flushall()
        taken = read(send_file(api, file.content), status=201)
        assert taken.revision == session.revision
        assert taken.body["document"] == session.body["document"]
        assert (taken.body["name"], taken.body["origin"]) == ("Eiffel", "imported")
        assert api.get(f"{taken.path}/export").content == file.content
        lone_world.register()
        again = api.post("/api/scan/activation", json={"prompt": PROMPT}).json()
        assert again["state"] == "queued", "what a file says answers no scan"


def test_a_file_whose_results_would_take_more_than_a_session_may_is_refused(
    api: httpx.Client, world: World
) -> None:
    """Many manifests that name one table: each would keep it for itself."""
    session = made(api, scanned(api, world, "f h h"))
    document = msgspec.json.decode(canonical(session.body["document"]), type=SessionDocument)
    [scan] = document.scans
    whole = archived(api, f"{session.path}/export")
    bodies = [
        canonical({**msgspec.json.decode(whole.result(scan.result)), "forward_seconds": number})
        for number in range(40)
    ]
    scans = tuple(
        msgspec.structs.replace(scan, result=hashlib.sha256(body).hexdigest()) for body in bodies
    )
    entries = [
        *map(result_entry, bodies),
        *(
            chunk_entry(chunk, len(whole.chunk(chunk)), partial(whole.chunk, chunk))
            for chunk in whole.chunks()
        ),
    ]
    many = canonical(msgspec.structs.replace(document, parent=None, scans=scans))
    file = io.BytesIO(b"".join(write_archive(entries, document=many)))
    services: Any = SimpleNamespace(
        settings=SimpleNamespace(max_session_bytes=2 * len(file.getvalue()))
    )
    with pytest.raises(InvalidArchive, match=r"would take \d+ bytes"):
        session_files._opened(services, file)


def rewritten(
    body: bytes,
    change: Callable[[str, bytes], bytes | None] = lambda _name, content: content,
    *,
    extra: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """The same archive with some entry changed, left out, or added."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(made, "w", compression) as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
        for name, content in (extra or {}).items():
            new.writestr(name, content)
    return made.getvalue()


def without(name: str) -> Callable[[str, bytes], bytes | None]:
    return lambda each, content: None if each == name else content


def test_a_file_is_refused_by_the_name_of_what_is_wrong_in_it(
    api: httpx.Client, world: World
) -> None:
    session = made(api, scanned(api, world))
    body = api.get(f"{session.path}/export").content
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        names = archive.namelist()
    chunk = next(name for name in names if name.startswith("chunks/"))
    result = next(name for name in names if name.startswith("results/"))

    def flipped(wanted: str) -> bytes:
        return rewritten(
            body,
            lambda name, content: (
                content
                if name != wanted
                else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
            ),
        )

    wrong = {
        chunk: flipped(chunk),
        result: flipped(result),
        "session.json": flipped("session.json"),
        "../../evil": rewritten(body, extra={"../../evil": b"x"}),
        "/etc/passwd": rewritten(body, extra={"/etc/passwd": b"x"}),
        f"chunks/{'0' * 64}.arrow": rewritten(body, extra={f"chunks/{'0' * 64}.arrow": b"x"}),
    }
    for name in (chunk, result, "session.json", "manifest.json"):
        wrong[f"{name} missing"] = rewritten(body, without(name))
    for named, file in wrong.items():
        refused = send_file(api, file)
        assert refused.status_code == 422, named
        problem = refused.json()
        assert problem["type"] == "urn:neural-mri:problem:invalid-archive"
        assert problem["entry"] == named.removesuffix(" missing"), problem
    bomb = rewritten(body, extra={chunk[:-10]: b"\0" * 10**6}, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in send_file(api, bomb).json()["detail"]
    assert send_file(api, b"PK\x03\x04 no").status_code == 422
    assert send_file(api, body[: len(body) // 2]).status_code == 422
    assert send_file(api, b"").status_code == 422
    assert len(api.get("/api/sessions").json()["sessions"]) == 1
    assert send_file(api, body).status_code == 201


def test_what_is_nested_too_deeply_is_refused_where_it_is_saved_and_where_it_is_taken_in(
    api: httpx.Client, world: World
) -> None:
    session = read(save(api, made(api, scanned(api, world)), view=deep(63)))
    whole = archived(api, f"{session.path}/export")
    entries = [
        *(result_entry(whole.result(digest)) for digest in whole.results),
        *(
            chunk_entry(chunk, len(whole.chunk(chunk)), partial(whole.chunk, chunk))
            for chunk in whole.chunks()
        ),
    ]
    kept = msgspec.json.decode(whole.document())

    def taken_in(**changes: Any) -> httpx.Response:
        document = canonical(msgspec.convert(kept | changes, SessionDocument))
        return send_file(api, b"".join(write_archive(entries, document=document)))

    assert taken_in().status_code == 201
    [scan] = kept["scans"]
    for where, content in (
        ("view", {"view": deep(499)}),
        ("key_images[1].view", {"key_images": [{"view": deep(63)}, {"view": deep(499)}]}),
    ):
        for answer in (save(api, session, **content), taken_in(**content)):
            problem = answer.json()
            assert answer.status_code == 422, problem
            assert problem["type"] == "urn:neural-mri:problem:nested-too-deeply"
            assert problem["detail"].startswith(f"{where} is nested 500 levels deep: expected 64")
            assert (problem["depth"], problem["limit"]) == (500, 64)
    answer = taken_in(scans=[scan | {"request": deep(64)}])
    assert (answer.status_code, answer.json()["depth"]) == (422, 65)
    bottomless = b'{"view":' + b"[" * 5000 + b"]" * 5000 + b"}"
    answer = send_file(api, b"".join(write_archive([], document=bottomless)))
    assert (answer.status_code, answer.json()["entry"]) == (422, "session.json")


def test_a_file_over_the_bound_is_not_read(shared_settings: Any, world: World) -> None:
    bounded = msgspec.structs.replace(shared_settings, max_session_bytes=20_000)
    with serving(bounded) as api:
        assert send_file(api, b"x" * 20_001).status_code == 413
        pieces = iter([b"x" * 15_000] * 2)
        assert send_file(api, pieces).status_code == 413  # type: ignore[arg-type]
