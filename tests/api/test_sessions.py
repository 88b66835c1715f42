"""Sessions: saved without losing anybody's save, opened without anything that computes."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from uuid import UUID

import httpx
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from sqlalchemy import delete, update

from api import session_contents, session_files, session_streams
from neural_mri.backing import keys, session_arrivals, session_revisions, sessions
from neural_mri.backing.events import parse_entries
from neural_mri.backing.records import Job
from neural_mri.backing.rows import JOBS, KEPT_RESULTS, SESSION_RESULTS
from neural_mri.contract.archives import (
    SESSION_FILE,
    Archive,
    InvalidArchive,
    canonical,
    chunk_entry,
    open_archive,
    result_entry,
    write_archive,
)
from neural_mri.contract.jobs import JobState
from neural_mri.contract.results import from_ipc
from neural_mri.contract.sessions import SessionDocument
from tests.api.keyed import keyed
from tests.api.reading import Unanswered, follow
from tests.api.specimens import PROMPT
from tests.api.world import World, serving
from tests.backing.stores import clear
from tests.servers import empty, folder_only
from worker.reaper import Reaper

NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"


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


def test_a_revision_is_named_by_the_hash_of_what_it_holds(api: httpx.Client, world: World) -> None:
    job = scanned(api, world)
    note = {"text": "Look here", "scan": job, "component": "blocks.0.mlp", "position": 2}
    session = made(api, job, notes=[note], view={"mode": "fMRI", "layer": 1})
    assert UUID(session.body["id"]).version == 7
    document = session.body["document"]
    assert hashlib.sha256(canonical(document)).hexdigest() == session.revision
    (scan,) = document["scans"]
    assert (scan["kind"], scan["model"], scan["request"]["prompt"]) == ("fMRI", "tiny", PROMPT)
    assert document["notes"][0]["scan"] == scan["result"], "jobs are not named in a document"
    assert job not in canonical(document).decode()
    again = read(save(api, session, notes=document["notes"], message="Less"))
    assert (again.body["document"]["parent"], again.body["revision"]) == (session.revision, 2)
    old = read(api.get(session.path, params={"revision": session.revision}))
    assert old.body["document"] == document
    listed = api.get(f"{session.path}/revisions").json()
    assert [each["revision"] for each in listed] == [again.revision, session.revision]
    assert [each["message"] for each in listed] == ["Less", ""]


def test_of_two_who_save_at_once_the_second_is_told_what_to_read(
    api: httpx.Client, world: World
) -> None:
    session = made(api)
    first = read(save(api, session, view={"layer": 1}))
    late = save(api, session, view={"layer": 2})
    assert late.status_code == 412
    problem = late.json()
    assert problem["type"] == "urn:neural-mri:problem:precondition-failed"
    assert (problem["head"], problem["number"]) == (first.revision, 2)
    assert read(api.get(session.path)).body["document"]["view"] == {"layer": 1}
    assert read(save(api, session, over=problem["head"], view={"layer": 2})).body["revision"] == 3
    bare = api.put(session.path, json={})
    assert (bare.status_code, bare.json()["head"]) == (428, api.get(session.path).json()["head"])
    any_over = api.put(session.path, json={}, headers={"if-match": "*"})
    assert read(any_over).body["revision"] == 4
    several = {"if-match": f'"{"0" * 64}", W/"{read(any_over).revision}"'}
    over = api.put(session.path, json={"view": {"layer": 5}}, headers=several)
    assert read(over).body["revision"] == 5
    assert api.put(session.path, json={}, headers=several).status_code == 412


def test_saving_what_is_there_writes_nothing(api: httpx.Client, world: World) -> None:
    session = made(api, scanned(api, world), view={"layer": 1})
    again = read(save(api, session, view={"layer": 1}))
    assert (again.revision, again.body["revision"]) == (session.revision, 1)
    known = api.get(session.path, headers={"if-none-match": f'"{session.revision}"'})
    assert (known.status_code, known.content) == (304, b"")


def test_what_a_reader_has_is_known_by_the_tags_it_lists(api: httpx.Client) -> None:
    session = made(api)
    link = api.post(f"{session.path}/shares", json={"redact": True}).json()
    carried = {"share-token": link["token"]}
    for path in (session.path, f"{session.path}/export", "/api/shared/export"):
        tag = api.get(path, headers=carried).headers["etag"]
        for condition in ("*", f'"other", W/{tag}', tag):
            known = api.get(path, headers={**carried, "if-none-match": condition})
            assert (known.status_code, known.content) == (304, b""), (path, condition)
        for condition in ('"other"', f'"{tag}-and-more"'):
            other = api.get(path, headers={**carried, "if-none-match": condition})
            assert other.status_code == 200, (path, condition)


def test_sessions_are_found_by_name_note_prompt_and_model(api: httpx.Client, world: World) -> None:
    world.register("other")
    tower = made(api, scanned(api, world), name="First")
    other = made(api, scanned(api, world, "a b", model="other"), name="Zweite")
    noted = made(api, name="Third", notes=[{"text": "100 % of the Heads_up"}])

    def found(**query: Any) -> list[str]:
        page = api.get("/api/sessions", params=query).json()
        return [each["name"] for each in page["sessions"]]

    assert found() == ["Third", "Zweite", "First"]
    assert found(q="zwei") == ["Zweite"]
    assert found(q="eiffel TOWER") == ["First"]
    assert found(q="heads_up") == found(q="100 %") == ["Third"]
    assert found(q="headsxup") == []
    assert found(model="other") == ["Zweite"]
    assert found(q="fmri") == ["Zweite", "First"]
    api.patch(tower.path, json={"name": "Premier", "pinned": True})
    assert found() == ["Premier", "Third", "Zweite"]
    assert found(pinned=True) == found(q="premier") == ["Premier"]
    first = api.get("/api/sessions", params={"limit": 2}).json()
    rest = api.get("/api/sessions", params={"limit": 2, "after": first["next"]}).json()
    assert [each["name"] for each in rest["sessions"]] == ["Zweite"]
    assert rest["next"] is None
    assert api.get("/api/sessions", params={"after": "yesterday"}).status_code == 400
    for session in (other, noted):
        assert api.delete(session.path).status_code == 204
        assert api.get(session.path).status_code == 404
    assert found() == ["Premier"]


def test_a_fork_begins_where_the_other_stands(api: httpx.Client, world: World) -> None:
    session = made(api, scanned(api, world))
    fork = read(api.post(f"{session.path}/fork", json={"name": "Mine"}), status=201)
    assert fork.revision == session.revision
    assert (fork.body["origin"], fork.body["forked_from"]) == ("forked", session.body["id"])
    read(save(api, fork, view={"layer": 7}))
    assert read(api.get(session.path)).revision == session.revision
    api.delete(session.path)
    assert results(api, read(api.get(fork.path))), "a fork holds its results itself"


def results(api: httpx.Client, session: Session) -> dict[str, bytes]:
    """Every table of a session, by its hash, from one request."""
    answer = api.get(f"{session.path}/results")
    assert answer.status_code == 200, answer.text
    archive = open_archive(io.BytesIO(answer.content), largest=10**8)
    return {chunk: archive.chunk(chunk) for chunk in archive.chunks()}


def test_a_session_outlives_the_jobs_and_everything_that_computes(
    lone_world: World,
) -> None:
    with serving(lone_world.settings) as api:
        session = made(api, scanned(api, lone_world), scanned(api, lone_world, "a b"))
        whole = results(api, session)
        with lone_world.sessions.writing() as database:
            database.execute(delete(JOBS))
        clear(lone_world.store, "packed/")
        assert lone_world.valkey is not None
        lone_world.valkey.kill()
        asked: list[str] = []
        api.event_hooks["request"] = [lambda request: asked.append(request.url.path)]
        opened = read(api.get(session.path))
        assert opened == session
        assert results(api, opened) == whole
        assert len(asked) == 2
        # And it can still be saved, by who changes only what is said of the scans.
        assert read(save(api, session, view={"layer": 1})).body["revision"] == 2


def test_what_a_session_keeps_of_a_file_needs_it_no_longer_and_has_the_same_hashes(
    api: httpx.Client, world: World
) -> None:
    job = world.job(scanned(api, world))
    result = world.result(job)
    tables = {each.ref.chunk: result.bytes_of(each) for each in result.tables}
    session = made(api, str(job.id))
    world.store.delete(result.path)
    [scan] = session.body["document"]["scans"]
    assert scan["result"] == hashlib.sha256(result.body).hexdigest()
    assert world.store.get(keys.kept_result_path(scan["result"])) == result.body
    assert results(api, session) == tables
    file = api.get(f"{session.path}/export").content
    archive = open_archive(io.BytesIO(file), largest=10**8)
    assert archive.result(scan["result"]) == result.body
    taken = read(send_file(api, file), status=201)
    assert taken.revision == session.revision
    assert results(api, taken) == tables
    for ref in result.manifest.tables:
        path = f"{taken.path}/results/{scan['result']}/{ref.name}"
        assert api.get(path).content == tables[ref.chunk]


def test_it_keeps_the_same_of_a_result_that_was_stored_table_by_table(
    api: httpx.Client, world: World
) -> None:
    job = world.job(scanned(api, world))
    packed = made(api, str(job.id))
    world.unpack(job)
    assert made(api, str(job.id)).revision == packed.revision


@pytest.mark.parametrize("harm", ["flipped", "cut short", "lost"])
def test_a_damaged_result_is_not_kept_in_any_part(
    api: httpx.Client, world: World, harm: str
) -> None:
    job = world.job(scanned(api, world, "a b c d"))
    result = world.result(job)
    world.harm(job, result.tables[-1].ref.name, harm)
    refused = api.post("/api/sessions", json={"name": "Eiffel", "scans": [{"job": str(job.id)}]})
    assert refused.status_code == 410
    assert refused.json()["job"] == str(job.id)
    kept = keys.kept_result_path(hashlib.sha256(result.body).hexdigest())
    tables = [keys.table_path(kept, each.ref.chunk) for each in result.tables]
    assert not any(world.store.exists(path) for path in (kept, *tables))


def look_later(world: World) -> None:
    """Have so much time pass that the reaper looks at everything that sessions may keep in vain, and let it."""
    with world.sessions.writing() as database:
        database.execute(update(KEPT_RESULTS).values(due=0.0))
    Reaper(world.settings, world.sessions, world.redis, world.store).round()


def files_of(world: World, session: Session) -> set[str]:
    """Every file that a session's results are."""
    found = set()
    for scan in session.body["document"]["scans"]:
        manifest = keys.kept_result_path(scan["result"])
        found |= {manifest, *world.store.beginning(*_beside(manifest))}
    return found


def _beside(manifest: str) -> tuple[str, set[str]]:
    folder, name = keys.beside(manifest)
    return folder, {name}


def test_what_a_session_keeps_goes_with_the_last_that_names_it(
    api: httpx.Client, world: World
) -> None:
    shared, own = scanned(api, world, "h g f"), scanned(api, world, "g f h")
    session, other = made(api, shared, own), made(api, shared)
    file = api.get(f"{session.path}/export").content
    everything, theirs = files_of(world, session), files_of(world, other)
    assert theirs < everything
    assert api.delete(session.path).status_code == 204
    Reaper(world.settings, world.sessions, world.redis, world.store).round()
    assert all(map(world.store.exists, everything)), "somebody may be reading it"
    look_later(world)
    assert {path for path in everything if world.store.exists(path)} == theirs
    assert int(world.redis.hget(keys.DELETED, "result:unkept")) >= 1
    assert results(api, other)
    # What was exported is whole again.
    taken = read(send_file(api, file), status=201)
    assert (taken.revision, files_of(world, taken)) == (session.revision, everything)
    look_later(world)
    assert all(map(world.store.exists, everything))
    assert results(api, taken).keys() >= results(api, other).keys()


def test_what_was_kept_for_a_save_that_never_came_is_taken_away(
    api: httpx.Client, world: World
) -> None:
    job = scanned(api, world, "h f g")
    session = made(api, job)
    everything = files_of(world, session)
    with world.sessions.writing() as database:
        database.execute(delete(SESSION_RESULTS))  # as if the save had been cut off before
    look_later(world)
    assert not any(map(world.store.exists, everything))
    assert files_of(world, made(api, job)) == everything, "and it is kept anew when it is asked for"


def test_what_was_kept_table_by_table_among_everybodys_is_read_as_it_was(
    api: httpx.Client, world: World
) -> None:
    session = made(api, scanned(api, world, "f f g"), scanned(api, world, "g g f"))
    whole = results(api, session)
    for scan in session.body["document"]["scans"]:
        manifest = keys.kept_result_path(scan["result"])
        body = world.store.get(manifest)
        for ref in msgspec.json.decode(body)["tables"]:
            world.store.copy(keys.table_path(manifest, ref["chunk"]), keys.chunk_path(ref["chunk"]))
            world.store.delete(keys.table_path(manifest, ref["chunk"]))
        world.store.put(keys.once_kept_result_path(scan["result"]), body)
        world.store.delete(manifest)
    assert results(api, session) == whole
    first, second = (scan["result"] for scan in session.body["document"]["scans"])
    assert api.get(f"{session.path}/results/{first}/activations").status_code == 200
    assert api.delete(session.path).status_code == 204
    look_later(world)
    gone = [keys.once_kept_result_path(digest) for digest in (first, second)]
    assert not any(map(world.store.exists, gone))


def test_a_table_of_a_session_can_be_had_alone_and_in_part(api: httpx.Client, world: World) -> None:
    job = scanned(api, world)
    session = made(api, job)
    result = session.body["document"]["scans"][0]["result"]
    path = f"{session.path}/results/{result}/activations"
    own = api.get(f"/api/jobs/{job}/result/activations")
    assert api.get(path).content == own.content
    part = api.get(path, headers={"range": "bytes=0-99"})
    assert (part.status_code, part.content) == (206, own.content[:100])
    assert api.get(f"{session.path}/results/{result}/lens").status_code == 404
    assert api.get(f"{session.path}/results/{'0' * 64}/activations").status_code == 404


def test_scans_are_named_by_what_the_session_or_the_caller_has(
    api: httpx.Client, world: World
) -> None:
    job = scanned(api, world)
    session = made(api, job)
    result = session.body["document"]["scans"][0]["result"]
    emptied = read(api.put(session.path, json={}, headers={"if-match": f'"{session.revision}"'}))
    back = api.put(
        session.path,
        json={"scans": [{"result": result, "label": "again"}]},
        headers={"if-match": f'"{emptied.revision}"'},
    )
    assert read(back).body["document"]["scans"][0]["label"] == "again"
    waiting = api.post("/api/scan/activation", json={"prompt": "not yet"}).json()["id"]
    for scans, status in (
        ([{"job": NOBODYS}], 404),
        ([{"job": waiting}], 409),
        ([{"result": "0" * 64}], 422),
        ([{"job": job}, {"result": result}], 422),
        ([{"job": job, "result": result}], 400),
        ([{}], 400),
    ):
        refused = api.put(session.path, json={"scans": scans}, headers={"if-match": "*"})
        assert refused.status_code == status, refused.text
    strange = {"notes": [{"text": "a", "scan": "1" * 64}]}
    assert api.put(session.path, json=strange, headers={"if-match": "*"}).status_code == 422
    refused = api.post("/api/sessions", json={"name": "a\0b"})
    assert refused.status_code == 400


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


def send_file(api: httpx.Client, body: bytes) -> httpx.Response:
    return api.post("/api/sessions/import", content=body, headers={"content-type": SESSION_FILE})


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


def deep(levels: int) -> Any:
    """Objects and lists in one another."""
    value: Any = "within"
    for level in range(levels):
        value = {"in": value} if level % 2 else [value]
    return {"in": value}


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


def test_what_differs_is_told_scan_by_scan_and_component_by_component(
    api: httpx.Client, world: World
) -> None:
    kept, first = scanned(api, world), scanned(api, world, "a b")
    gone, come = scanned(api, world, "c"), api.post("/api/scan/structural", json={}).json()["id"]
    world.perform(world.claim("cpu"))
    second = scanned(api, world, "a b", aggregation="max")
    before = made(api, kept, first, gone, notes=[{"text": "old"}])
    after = made(api, kept, second, come, notes=[{"text": "new"}], view={"layer": 1})
    told = api.get(f"{before.path}/difference", params={"other": after.body["id"]}).json()
    assert [(each["change"], each["kind"]) for each in told["scans"]] == [
        ("same", "fMRI"),
        ("changed", "fMRI"),
        ("removed", "fMRI"),
        ("added", "T1"),
    ]
    changed = told["scans"][1]
    assert changed["fields"] == {"aggregation": ["l2_norm", "max"]}
    assert [note["text"] for note in told["notes_added"]] == ["new"]
    assert [note["text"] for note in told["notes_removed"]] == ["old"]
    assert told["view_changed"]
    table = changed["table"]
    assert (table["table"], table["column"], table["largest"]) == ("activations", "value", 0.0)
    assert table["rank_correlation"] == pytest.approx(1.0)


def test_differences_are_those_of_the_tables_themselves(api: httpx.Client, world: World) -> None:
    jobs = [scanned(api, world), scanned(api, world, PROMPT + " a")]
    sides = [made(api, job) for job in jobs]
    query = {"other": sides[1].body["id"], "strongest": 1000}
    told = api.get(f"{sides[0].path}/difference", params=query).json()
    (changed,) = told["scans"]
    tables = [from_ipc(api.get(f"/api/jobs/{job}/result/activations").content) for job in jobs]
    means = [
        {
            row["component"]: float(np.mean(row["value"]))
            for row in table.select(["component", "value"]).to_pylist()
        }
        for table in tables
    ]
    assert changed["table"]["rows"] == len(means[0]) == len(changed["table"]["strongest"])
    for row in changed["table"]["strongest"]:
        name = row["component"]
        expected = means[1][name] - means[0][name]
        assert row["difference"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    rms = np.sqrt(np.mean([(means[1][name] - means[0][name]) ** 2 for name in means[0]]))
    assert changed["table"]["root_mean_square"] == pytest.approx(rms, rel=1e-5)
    assert isinstance(tables[0], pa.Table)


def test_two_revisions_of_one_session_are_compared_alike(api: httpx.Client, world: World) -> None:
    session = made(api, scanned(api, world))
    read(api.put(session.path, json={}, headers={"if-match": "*"}))
    told = api.get(
        f"{session.path}/difference",
        params={"other": session.body["id"], "revision": session.revision},
    ).json()
    assert [each["change"] for each in told["scans"]] == ["removed"]


def test_a_scan_under_way_arrives_before_everybodys_eyes(api: httpx.Client, world: World) -> None:
    session = made(api)
    with follow(api, f"{session.path}/events") as stream:
        first = next(stream)
        assert (first.name, first.data["revision"]) == ("saved", session.revision)
        job = api.post("/api/scan/activation", json={"prompt": "a"}).json()["id"]
        added = api.post(f"{session.path}/scans", json={"job": job, "label": "mine"})
        assert added.status_code == 202
        assert [each["job"] for each in added.json()["arriving"]] == [job]
        told = next(stream)
        assert (told.name, told.data["job"], told.data["label"]) == ("scan", job, "mine")
        world.perform(world.claim(world.queue()))
        messages = [next(stream)]
        while messages[-1].name != "saved":
            messages.append(next(stream))
        saved = messages[-1].data
        detail = read(api.get(session.path)).body
        assert saved["revision"] == detail["head"]
        assert saved["added"] == [detail["document"]["scans"][0]["result"]]
        assert detail["arriving"] == []
        # And of a save by anybody.
        read(save(api, read(api.get(session.path)), view={"layer": 3}))
        assert next(stream).data["number"] == 3
        api.delete(session.path)
        assert next(stream).name == "closed"
        assert list(stream) == []


@pytest.mark.parametrize("module", [sessions, session_arrivals], ids=lambda each: each.__name__)
def test_a_reader_of_its_events_outlives_a_database_that_does_not_answer(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    session = made(api)
    question = "find" if module is sessions else "of_session"
    monkeypatch.setattr(session_streams, "LOOK_SECONDS", 0.1)
    with follow(api, f"{session.path}/events") as stream:
        assert next(stream).name == "saved"
        away = Unanswered(monkeypatch, module, question)
        assert away.passes()
        read(save(api, session, view={"layer": 3}))
        assert next(stream).data["number"] == 2
        world.redis.flushall()
        api.delete(session.path)
        assert next(stream).name == "closed"


def test_a_scan_that_fails_on_its_way_is_told_of_and_forgotten(
    api: httpx.Client, world: World
) -> None:
    session = made(api)
    job = api.post("/api/scan/activation", json={"prompt": "a"}).json()["id"]
    api.post(f"{session.path}/scans", json={"job": job})
    with follow(api, f"{session.path}/events") as stream:
        heard = [next(stream), next(stream)]
        assert {message.name for message in heard} == {"saved", "scan"}
        world.move(world.claim(world.queue()), JobState.FAILED, problem={"detail": "no"})
        while (last := next(stream)).data.get("state") != "failed":
            assert last.name == "scan"
    assert api.get(session.path).json()["arriving"] == []
    assert api.get(session.path).json()["scans"] == 0


def coming(api: httpx.Client, world: World, session: Session, prompt: str = "a") -> Job:
    """A scan that has ended on its way into a session, which nobody has looked at since."""
    job = api.post("/api/scan/activation", json={"prompt": prompt}).json()["id"]
    assert api.post(f"{session.path}/scans", json={"job": job}).status_code == 202
    return world.perform(world.claim(world.queue()))


@folder_only
def test_a_scan_that_cannot_be_read_now_goes_on_waiting(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_contents, "KEPT_AT_ONCE", 1)
    session = made(api)
    job = coming(api, world, session)
    file = world.file(job, "activations").file
    aside = file.rename(file.with_name("aside"))
    file.mkdir()  # an error of the store's, not a file that is missing
    second = coming(api, world, session, "b")
    for _ in range(2):
        arriving = read(api.get(session.path)).body["arriving"]
        # The second could be read, but where one cannot, nobody waits for the others in vain.
        assert [each["job"] for each in arriving] == [str(job.id), str(second.id)]
        assert {(each["state"], each["problem"]) for each in arriving} == {("succeeded", None)}
    assert api.get("/api/sessions").json()["sessions"][0]["scans"] == 0
    monkeypatch.undo()
    beside = read(api.get(session.path)).body
    assert beside["scans"] == 1, "who is asked for beside it is read"
    assert [each["job"] for each in beside["arriving"]] == [str(job.id)]
    file.rmdir()
    aside.rename(file)
    after = read(api.get(session.path)).body
    assert (after["scans"], after["arriving"]) == (2, [])


def test_scans_that_arrive_together_are_one_revision_in_the_order_in_which_they_were_added(
    api: httpx.Client, world: World
) -> None:
    session = made(api)
    labels = ["first", "second", "third"]
    for label in labels:
        job = api.post("/api/scan/activation", json={"prompt": label}).json()["id"]
        api.post(f"{session.path}/scans", json={"job": job, "label": label})
    for _ in labels:
        world.perform(world.claim(world.queue()))
    [listed] = api.get("/api/sessions").json()["sessions"]
    after = read(api.get(session.path)).body
    assert [scan["label"] for scan in after["document"]["scans"]] == labels
    assert (listed["head"], after["revision"], after["arriving"]) == (after["head"], 2, [])
    assert api.get(f"{session.path}/revisions").json()[0]["message"] == "Added 3 scans"


def test_a_revision_is_told_once_though_one_of_those_that_arrived_failed(
    api: httpx.Client, world: World
) -> None:
    session = made(api)
    for label in ("first", "second", "third"):
        job = api.post("/api/scan/activation", json={"prompt": label}).json()["id"]
        api.post(f"{session.path}/scans", json={"job": job, "label": label})
    for fails in (False, True, False):
        job = world.claim(world.queue())
        world.move(job, JobState.FAILED, problem={"detail": "no"}) if fails else world.perform(job)
    assert api.get("/api/sessions").json()["sessions"][0]["scans"] == 2
    rows = world.redis.xrange(keys.event_stream(UUID(session.path.rpartition("/")[2])))
    told = [entry.name for entry in parse_entries(rows)]
    assert (told.count("saved"), told[-1]) == (1, "scan")


def test_a_scan_whose_bytes_are_gone_does_not_join_and_says_why(
    api: httpx.Client, world: World
) -> None:
    session = made(api)
    job = coming(api, world, session)
    world.harm(job, "activations")
    with follow(api, f"{session.path}/events") as stream:
        heard = [next(stream), next(stream)]
    (told,) = [message.data for message in heard if message.name == "scan"]
    assert told["problem"]["status"] == 410
    (refused,) = read(api.get(session.path)).body["arriving"]
    assert refused["problem"] == told["problem"]
    assert refused["problem"]["job"] == str(job.id)


LOOKS: dict[str, Callable[[httpx.Client, Session], object]] = {
    "export": lambda api, session: len(archived(api, f"{session.path}/export").results),
    "results": lambda api, session: len(archived(api, f"{session.path}/results").results),
    "fork": lambda api, session: api.post(f"{session.path}/fork", json={}).json()["scans"],
    "list": lambda api, _: api.get("/api/sessions").json()["sessions"][0]["scans"],
    "revisions": lambda api, session: len(api.get(f"{session.path}/revisions").json()) - 1,
    "difference": lambda api, session: len(
        api.get(
            f"{session.path}/difference",
            params={"other": session.body["id"], "other_revision": session.revision},
        ).json()["scans"]
    ),
    "change": lambda api, session: api.patch(session.path, json={"pinned": True}).json()["scans"],
}


def archived(api: httpx.Client, path: str, **headers: str) -> Archive:
    """What a file of a session holds."""
    answer = api.get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    return open_archive(io.BytesIO(answer.content), largest=10**8)


@pytest.mark.parametrize("look", LOOKS)
def test_a_scan_that_has_arrived_is_there_however_one_looks(
    api: httpx.Client, world: World, look: str
) -> None:
    session = made(api)
    coming(api, world, session)
    assert LOOKS[look](api, session) == 1


@pytest.mark.parametrize("path", ["export", "results"])
@pytest.mark.parametrize("shown", [{}, {"redact": True}], ids=["whole", "redacted"])
def test_it_is_there_for_who_follows_a_link(
    api: httpx.Client, world: World, path: str, shown: dict[str, bool]
) -> None:
    session = made(api)
    link = api.post(f"{session.path}/shares", json=shown).json()
    coming(api, world, session)
    file = archived(api, f"/api/shared/{path}", **{"share-token": link["token"]})
    assert len(file.results) == 1


def test_a_session_takes_no_more_scans_than_it_can_hold_and_can_be_opened_all_the_same(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (session_arrivals, session_revisions):
        monkeypatch.setattr(room, "MOST_SCANS", 2)
    done = [scanned(api, world, f"a {n}") for n in range(2)]
    session = made(api)
    job = coming(api, world, session, "b")
    later = api.post("/api/scan/activation", json={"prompt": "c"}).json()["id"]
    assert api.post(f"{session.path}/scans", json={"job": later}).status_code == 202
    for another in (done[0], api.post("/api/scan/activation", json={"prompt": "d"}).json()["id"]):
        refused = api.post(f"{session.path}/scans", json={"job": another})
        assert (refused.status_code, refused.json()["limit"]) == (429, 2)
    # A save takes the place that was kept.
    head = read(api.get(session.path))
    assert [scan["request"]["prompt"] for scan in head.body["document"]["scans"]] == ["b"]
    read(
        api.put(
            session.path,
            json={"scans": [{"job": job} for job in done]},
            headers={"if-match": f'"{head.revision}"'},
        )
    )
    world.perform(world.claim(world.queue()))
    for _ in range(2):
        opened = read(api.get(session.path)).body
        (left,) = opened["arriving"]
        assert (left["job"], left["state"]) == (later, "succeeded")
        assert "as many as one can hold" in left["problem"]["detail"]
        assert opened["scans"] == 2
    assert str(job.id) not in {each["job"] for each in opened["arriving"]}


def test_scans_of_several_people_at_once_are_all_added(api: httpx.Client, world: World) -> None:
    jobs = [scanned(api, world, f"a {n}") for n in range(8)]
    session = made(api)

    def add(job: str) -> int:
        return api.post(f"{session.path}/scans", json={"job": job}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(add, jobs)) == {200}
    after = read(api.get(session.path))
    assert (after.body["scans"], after.body["revision"]) == (8, 9)
    listed = api.get(f"{session.path}/revisions").json()
    for newer, older in pairwise(listed):
        assert newer["parent"] == older["revision"]


def test_a_stream_goes_on_where_its_reader_stopped(api: httpx.Client, world: World) -> None:
    session = made(api)
    with follow(api, f"{session.path}/events") as stream:
        next(stream)
        second = read(save(api, session, view={"layer": 1}))
        last = next(stream)
        assert last.data["revision"] == second.revision
    third = read(save(api, second, view={"layer": 2}))
    fourth = read(save(api, third, view={"layer": 3}))
    with follow(api, f"{session.path}/events", last.id) as stream:
        assert [next(stream).data["revision"] for _ in range(2)] == [
            third.revision,
            fourth.revision,
        ]


@pytest.mark.parametrize("never_told", ["99999999999999-0", "end"])
def test_a_place_that_no_event_has_is_the_beginning(
    api: httpx.Client, world: World, never_told: str
) -> None:
    session = made(api)
    with follow(api, f"{session.path}/events", never_told) as stream:
        assert next(stream).data["revision"] == session.revision
        second = read(save(api, session, view={"layer": 1}))
        told = next(stream)
    assert told.data["revision"] == second.revision
    assert told.id != never_told, "it was told when it happened, not found in the database later"
    assert int(told.id.partition("-")[0]) > 0


def test_a_session_is_its_owners_alone_on_every_route(shared_settings: Any, world: World) -> None:
    with (
        keyed(shared_settings) as door,
        door.user(world, "ada") as ada,
        door.user(world, "bob") as bob,
    ):
        job = scanned(ada, world)
        session = made(ada, job)
        result = session.body["document"]["scans"][0]["result"]
        share = ada.post(f"{session.path}/shares", json={}).json()["id"]
        mine = made(bob).body["id"]
        for method, path, body in (
            ("GET", "", None),
            ("PUT", "", {}),
            ("PATCH", "", {"name": "Bob's"}),
            ("POST", "/fork", {}),
            ("POST", "/scans", {"job": job}),
            ("GET", "/revisions", None),
            ("GET", "/results", None),
            ("GET", f"/results/{result}/activations", None),
            ("GET", "/export", None),
            ("GET", f"/difference?other={mine}", None),
            ("GET", "/events", None),
            ("POST", "/shares", {}),
            ("GET", "/shares", None),
            ("DELETE", f"/shares/{share}", None),
            ("DELETE", "", None),
        ):
            headers = {"if-match": "*"} if method == "PUT" else {}
            answer = bob.request(method, session.path + path, json=body, headers=headers)
            assert answer.status_code == 404, (method, path)
            assert answer.json()["type"].endswith("unknown-session")
        other = bob.get(f"/api/sessions/{mine}/difference?other={session.body['id']}")
        assert other.status_code == 404
        stolen = bob.post("/api/sessions", json={"name": "x", "scans": [{"job": job}]})
        assert stolen.status_code == 404
        by_hash = bob.put(
            f"/api/sessions/{mine}", json={"scans": [{"result": result}]}, headers={"if-match": "*"}
        )
        assert by_hash.status_code == 422
        assert bob.get("/api/sessions").json()["sessions"][0]["id"] == mine
        assert read(ada.get(session.path)).revision == session.revision
