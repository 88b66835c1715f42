"""Sessions: saved without losing anybody's save, opened without anything that computes."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any
from uuid import UUID

import httpx
import msgspec
import numpy as np
import pyarrow as pa
import pytest
from sqlalchemy import delete, update

from neural_mri.backing import keys
from neural_mri.backing.rows import JOBS, KEPT_RESULTS, SESSION_RESULTS
from neural_mri.contract.archives import canonical, open_archive
from neural_mri.contract.results import from_ipc
from tests.api.keyed import keyed
from tests.api.saved import Session, made, read, save, scanned, send_file
from tests.api.specimens import PROMPT
from tests.api.world import World, serving
from tests.backing.stores import clear
from worker.reaper import Reaper

NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"


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
