"""Batches: read line by line, recorded together, each scan once."""

import io
import time
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec
import pyarrow as pa
import pytest

from api import batches as reading
from neural_mri.backing import batches, feeding, jobs, limits
from neural_mri.backing.batches import NewBatch
from neural_mri.backing.queue import send_tickets
from neural_mri.backing.settings import Settings
from neural_mri.contract.archives import open_archive
from neural_mri.contract.batches import LEFT_OUT, NDJSON
from neural_mri.contract.jobs import JobState, Lane
from neural_mri.contract.problems import Unavailable
from neural_mri.contract.results import ARROW_STREAM
from tests.api.keyed import Door, keyed
from tests.api.reading import Unanswered, follow, read_all
from tests.api.specimens import PROMPT
from tests.api.world import World

NOBODYS = "01a208e5-620a-7f6d-98da-3f510d18b436"


@pytest.fixture(scope="module")
def shared_door(shared_settings: Settings) -> Iterator[Door]:
    with keyed(shared_settings, user_max_jobs=5) as door:
        yield door


def fmri(prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    return {"scan_mode": "fMRI", "prompt": prompt, **more}


def lines(*scans: object) -> bytes:
    """A line each; text stands as it is."""
    return b"".join(
        (scan.encode() if isinstance(scan, str) else msgspec.json.encode(scan)) + b"\n"
        for scan in scans
    )


def send(
    api: httpx.Client, *scans: object, headers: dict[str, str] | None = None, **query: Any
) -> httpx.Response:
    return api.post(
        "/api/batches",
        content=lines(*scans),
        params=query,
        headers={"content-type": NDJSON, **(headers or {})},
    )


def accepted(api: httpx.Client, *scans: object, **query: Any) -> dict[str, Any]:
    answer = send(api, *scans, **query)
    assert answer.status_code == 202, answer.text
    batch: dict[str, Any] = answer.json()
    assert answer.headers["location"] == batch["links"]["self"] == f"/api/batches/{batch['id']}"
    return batch


def seen(api: httpx.Client, batch: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = api.get(batch["links"]["self"]).json()
    return found


def table_of(api: httpx.Client, batch: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.get(batch["links"]["lines"]).json()
    return found


def test_every_batch_is_found_page_by_page(api: httpx.Client) -> None:
    ids = [accepted(api, fmri(text))["id"] for text in ("a", "b", "c", "d", "e")][::-1]
    pages, after = [], ""
    while page := [batch["id"] for batch in api.get(f"/api/batches?limit=2{after}").json()]:
        pages.append(page)
        after = f"&after={page[-1]}"
    assert pages == [ids[:2], ids[2:4], ids[4:]]
    assert api.get("/api/batches?after=00000000-0000-0000-0000-000000000000").status_code == 404


def test_lines_become_jobs_in_the_batch_lane(api: httpx.Client, world: World) -> None:
    batch = accepted(api, fmri("a"), "", fmri("b"), {"scan_mode": "T1"}, name="nightly")
    assert (batch["lines"], batch["refused"], batch["repeated"]) == (3, 0, 0)
    assert (batch["state"], batch["lane"], batch["name"]) == ("running", "batch", "nightly")
    assert batch["counts"]["queued"] == 3
    rows = table_of(api, batch)
    assert [row["line"] for row in rows] == [1, 3, 4], "numbers count blank lines"
    made = [world.job(row["job"]) for row in rows]
    assert [job.lane for job in made] == ["batch"] * 3
    assert made[0].virtual_start < made[1].virtual_start
    assert api.get("/api/batches").json() == [seen(api, batch)]
    # A ticket is there for each that waits: a worker need not wait for the reaper.
    assert world.claim(world.queue()).id == made[0].id


def test_the_same_as_one_document(api: httpx.Client, world: World) -> None:
    answer = api.post("/api/batches", json={"scans": [fmri("a"), fmri("b")]})
    assert answer.status_code == 202
    assert [row["line"] for row in table_of(api, answer.json())] == [1, 2]
    wrongs: tuple[Any, ...] = ({"scans": []}, {"scans": 3}, {"scan": []}, [1])
    for wrong in wrongs:
        assert api.post("/api/batches", json=wrong).status_code == 400


def test_a_scan_asked_for_twice_runs_once_and_a_known_one_not_at_all(
    api: httpx.Client, world: World
) -> None:
    api.post("/api/scan/activation", json={"prompt": "known"})
    known = world.perform(world.claim(world.queue()))
    under_way = api.post("/api/scan/activation", json={"prompt": "under way"}).json()
    batch = accepted(
        api,
        fmri("a"),
        fmri("known"),
        fmri("a", aggregation="l2_norm"),
        fmri("under way"),
        fmri("a", top_neurons=3),
    )
    assert batch["repeated"] == 1
    assert batch["counts"] == {
        "queued": 3, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 0, "cached": 1,
    }  # fmt: skip
    rows = table_of(api, batch)
    assert rows[2]["repeats"] == 1
    assert rows[2]["job"] == rows[0]["job"]
    assert rows[1]["cached"]
    assert world.job(rows[1]["job"]).manifest == known.manifest
    assert str(world.job(rows[3]["job"]).leader) == under_way["id"]


def test_a_known_result_whose_bytes_are_gone_is_measured_again(
    api: httpx.Client, world: World
) -> None:
    api.post("/api/scan/activation", json={"prompt": PROMPT})
    world.harm(world.perform(world.claim(world.queue())), "activations")
    batch = accepted(api, fmri())
    assert batch["counts"]["queued"] == 1


BAD = (
    fmri("a", layers=["blocks.9.mlp"]),
    "{not json",
    fmri("a", facter=2),
    {"prompt": "a"},
    fmri("a", model="none"),
)


def test_lines_that_cannot_be_done_are_named_and_nothing_is_recorded(
    api: httpx.Client, world: World
) -> None:
    refused = send(api, fmri("a"), *BAD, fmri("b"))
    assert refused.status_code == 422
    problem = refused.json()
    assert problem["type"] == "urn:neural-mri:problem:lines-invalid"
    assert (problem["refused"], problem["lines"]) == (5, 7)
    assert [line["line"] for line in problem["invalid"]] == [2, 3, 4, 5, 6]
    kinds = [line["type"].rpartition(":")[2] for line in problem["invalid"]]
    assert kinds == ["unknown-component", *["invalid-request"] * 3, "unknown-model"]
    assert "facter" in problem["invalid"][2]["detail"]
    assert "the model has 2 layers" in problem["detail"]
    assert api.get("/api/batches").json() == []
    assert world.sessions.read(jobs.recent, "local") == []


def test_or_they_are_left_out_and_reported(api: httpx.Client, world: World) -> None:
    batch = accepted(api, fmri("a"), *BAD, fmri("b"), on_invalid="skip")
    assert (batch["lines"], batch["refused"], batch["counts"]["queued"]) == (7, 5, 2)
    assert [line["line"] for line in batch["invalid"]] == [2, 3, 4, 5, 6]
    rows = table_of(api, batch)
    assert [row["line"] for row in rows if row["job"] is None] == [2, 3, 4, 5, 6]
    assert rows[1]["problem"]["component"] == "blocks.9.mlp"
    assert send(api, *BAD, on_invalid="skip").status_code == 422, "nothing is left to do"


def test_its_events_tell_of_every_line_and_of_one_end(api: httpx.Client, world: World) -> None:
    batch = accepted(api, fmri("a"), fmri("b"), fmri("a"), fmri("c"))
    rows = table_of(api, batch)
    with follow(api, batch["links"]["events"]) as stream:
        first = next(stream)
        assert (first.name, first.data["done"], first.data["total"]) == ("progress", 0, 3)
        job = world.claim(world.queue())
        world.perform(job)
        told = [next(stream), next(stream)]
        assert [message.data["line"] for message in told] == [1, 3]
        assert all(message.data["job"] == str(job.id) for message in told)
        assert all(message.data["batch"] == batch["id"] for message in told)
        world.move(world.claim(world.queue()), JobState.FAILED, problem={"detail": "no reason"})
        world.perform(world.claim(world.queue()))
        rest = list(stream)
    ended = [message for message in rest if message.name == "line"]
    assert [message.data["line"] for message in ended] == [2, 4]
    assert ended[0].data["problem"] == {"detail": "no reason"}
    assert [message.name for message in rest].count("ended") == 1
    last = rest[-1]
    assert (last.name, last.data["state"], last.data["counts"]["failed"]) == ("ended", "ended", 1)
    assert len(rows) == 4
    # Who comes back after the end is sent away; who comes back before it hears of all that is new.
    again = {"last-event-id": last.id}
    assert api.get(batch["links"]["events"], headers=again).status_code == 204
    late = read_all(api, batch["links"]["events"], told[1].id)
    assert {m.data["line"] for m in late if m.name == "line"} >= {2, 4}


@pytest.mark.parametrize("question", ["find", "view", "ended_since"])
def test_a_reader_of_its_events_outlives_a_database_that_does_not_answer(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    batch = accepted(api, fmri("a"), fmri("b"))
    with follow(api, batch["links"]["events"]) as stream:
        assert next(stream).name == "progress"
        assert Unanswered(monkeypatch, batches, question).passes()
        world.perform(world.claim(world.queue()))
        told = [next(stream)]
        away = Unanswered(monkeypatch, batches, question)
        world.perform(world.claim(world.queue()))
        told += list(stream)
    assert away.left == 0
    assert [message.data["line"] for message in told if message.name == "line"] == [1, 2]
    assert [message.name for message in told].count("ended") == 1


def test_results_are_there_as_soon_as_they_are(api: httpx.Client, world: World) -> None:
    batch = accepted(api, fmri("a"), fmri("b"), BAD[0], fmri("a b c"), on_invalid="skip")
    for _ in range(2):
        world.perform(world.claim(world.queue()))
    answer = api.get(batch["links"]["results"])
    assert answer.headers["content-type"] == NDJSON
    found = [msgspec.json.decode(line) for line in answer.content.splitlines()]
    assert [line["line"] for line in found] == [1, 2, 3]
    assert [line["state"] for line in found] == ["succeeded", "succeeded", None]
    assert found[0]["result"]["scan_mode"] == "fMRI"
    assert found[2]["problem"]["component"] == "blocks.9.mlp"
    later = api.get(batch["links"]["results"], params={"after": 1}).content.splitlines()
    assert len(later) == 2


def test_one_table_of_all_results_stands_under_one_another(api: httpx.Client, world: World) -> None:
    batch = accepted(api, fmri("a"), fmri("a b c"), {"scan_mode": "T1"})
    for _ in range(2):
        world.perform(world.claim(world.queue()))
    ask = {"accept": ARROW_STREAM}
    answer = api.get(batch["links"]["results"], params={"table": "activations"}, headers=ask)
    table = pa.ipc.open_stream(answer.content).read_all()
    one = api.get(f"/api/jobs/{table_of(api, batch)[1]['job']}/result/activations")
    own = pa.ipc.open_file(one.content).read_all()
    second = table.filter(pa.compute.equal(table["line"], 2))
    assert second["component"].to_pylist() == own["component"].to_pylist()
    assert second["value"].to_pylist() == own["value"].to_pylist()
    assert set(table["line"].to_pylist()) == {1, 2}
    missing = api.get(batch["links"]["results"], params={"table": "lens"}, headers=ask)
    assert missing.status_code == 404
    assert "activations" in missing.json()["tables"]
    assert api.get(batch["links"]["results"], headers=ask).status_code == 400


def test_everything_comes_in_one_file_whose_hashes_hold(api: httpx.Client, world: World) -> None:
    batch = accepted(api, fmri("a"), fmri("b"))
    for _ in range(2):
        world.perform(world.claim(world.queue()))
    answer = api.get(batch["links"]["results"], headers={"accept": "application/zip"})
    archive = open_archive(io.BytesIO(answer.content), largest=10**8)
    assert len(archive.results) == 2
    assert answer.content == api.get(
        batch["links"]["results"], headers={"accept": "application/zip"}
    ).content  # fmt: skip


def test_results_are_the_same_in_one_file_each_or_table_by_table(
    api: httpx.Client, world: World
) -> None:
    batch = accepted(api, fmri("a"), fmri("a b c"))
    done = [world.perform(world.claim(world.queue())) for _ in range(2)]
    asked: list[tuple[dict[str, str], dict[str, str]]] = [
        ({}, {}),
        ({}, {"accept": "application/zip"}),
    ]
    asked += [({"table": name}, {"accept": ARROW_STREAM}) for name in ("activations", "neurons")]

    def answers() -> list[bytes]:
        found = [
            api.get(batch["links"]["results"], params=params, headers=headers)
            for params, headers in asked
        ]
        assert [answer.status_code for answer in found] == [200] * len(asked)
        return [answer.content for answer in found]

    packed = answers()
    for job in done:
        world.unpack(job)
    assert answers() == packed


@pytest.mark.parametrize(
    ("params", "media_type"),
    [({"table": "activations"}, ARROW_STREAM), ({}, "application/zip")],
    ids=["a table first", "the archive first"],
)
@pytest.mark.parametrize("harm", ["lost", "flipped"])
@pytest.mark.parametrize("form", ["packed", "by table"])
def test_a_lost_result_is_left_out_and_the_others_are_not(
    api: httpx.Client,
    world: World,
    form: str,
    harm: str,
    params: dict[str, str],
    media_type: str,
) -> None:
    batch = accepted(api, fmri("a"), fmri("a b c"), fmri("b"))
    done = [world.perform(world.claim(world.queue())) for _ in range(3)]
    if form == "by table":
        for job in done:
            world.unpack(job)
    world.harm(world.job(str(done[1].id)), "activations", harm)
    if harm == "flipped" and world.settings.store_url:
        # In a bucket it is seen as it is sent: too late to be left out of that answer.
        with pytest.raises(httpx.RemoteProtocolError):
            api.get(batch["links"]["results"], params=params, headers={"accept": media_type})
    for _ in range(2):
        answer = api.get(
            batch["links"]["results"],
            params={"table": "activations"},
            headers={"accept": ARROW_STREAM},
        )
        assert answer.status_code == 200, answer.text
        table = pa.ipc.open_stream(answer.content).read_all()
        assert set(table["line"].to_pylist()) == {1, 3}
        (left_out,) = msgspec.json.decode(table.schema.metadata[LEFT_OUT])
        assert (left_out["line"], left_out["status"]) == (2, 410)
        assert left_out["job"] == str(done[1].id)
        whole = api.get(batch["links"]["results"], headers={"accept": "application/zip"})
        assert whole.status_code == 200, whole.text
        archive = open_archive(io.BytesIO(whole.content), largest=10**8)
        assert len(archive.results) == 2
        with zipfile.ZipFile(io.BytesIO(whole.content)) as file:
            lines = msgspec.json.decode(file.read("lines.json"))
        assert [line["problem"] and line["problem"]["status"] for line in lines] == [
            None,
            410,
            None,
        ]
        assert ["result" in line for line in lines] == [True, False, True]
    again = accepted(api, fmri("a b c"))
    assert again["counts"]["queued"] == 1, "asked for again, it is measured again"


def test_where_all_results_are_lost_it_is_said_that_they_are(
    api: httpx.Client, world: World
) -> None:
    batch = accepted(api, fmri("a"), fmri("b"))
    for _ in range(2):
        world.harm(world.perform(world.claim(world.queue())), "activations")
    ask = {"accept": ARROW_STREAM}
    answer = api.get(batch["links"]["results"], params={"table": "activations"}, headers=ask)
    assert (answer.status_code, answer.json()["lines"]) == (410, [1, 2])


def test_too_many_failures_stop_the_rest(api: httpx.Client, world: World) -> None:
    batch = accepted(api, *(fmri(f"a {n}") for n in range(6)), max_failures=2)
    for _ in range(2):
        assert seen(api, batch)["state"] == "running"
        world.move(world.claim(world.queue()), JobState.FAILED, problem={"detail": "no"})
    held = world.claim(world.queue())
    asked = world.sessions.write(batches.stop_failing)
    assert [each.job.id for each in asked] == [held.id]
    assert seen(api, batch)["counts"]["cancelled"] == 3
    world.move(held, JobState.CANCELLED)
    after = seen(api, batch)
    assert (after["state"], after["counts"]["failed"]) == ("stopped", 2)
    assert world.sessions.write(batches.stop_failing) == []


def test_a_batch_is_cancelled_but_not_what_others_wait_for(api: httpx.Client, world: World) -> None:
    batch = accepted(api, fmri("a"), fmri("b"), fmri("c"), fmri("shared"))
    held = world.claim(world.queue())
    other = api.post("/api/scan/activation", json={"prompt": "shared"}).json()
    answer = api.delete(batch["links"]["self"])
    assert answer.status_code == 202
    assert world.redis.exists(f"cancel:{held.id}")
    world.move(held, JobState.CANCELLED)
    after = seen(api, batch)
    assert (after["state"], after["counts"]["cancelled"]) == ("cancelled", 4)
    assert api.delete(batch["links"]["self"]).status_code == 200
    assert world.claim(world.queue()).id != other["id"], "a surplus ticket may come first"


def test_a_batch_of_more_tokens_than_one_may_have_is_refused_by_the_line(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [fmri("a b c"), fmri("a b c"), fmri("b c d")]  # the second is the first again

    def n_tokens(prompt: str) -> int:
        return len(api.post("/api/tokenize", json={"prompt": prompt}).json()["ids"])

    enough = n_tokens("a b c") + n_tokens("b c d")
    monkeypatch.setattr("api.batches.MOST_TOKENS", enough)
    accepted(api, *read)
    refused = send(api, *read, fmri("a"))
    assert refused.status_code == 422
    assert f"up to line 4 have {enough + n_tokens('a')} tokens" in refused.json()["detail"]
    assert (refused.json()["line"], refused.json()["limit"]) == (4, enough)


def test_the_same_batch_under_the_same_key_is_one_batch(api: httpx.Client, world: World) -> None:
    key = {"idempotency-key": "nightly-1"}
    first = send(api, fmri("a"), fmri("b"), headers=key)
    again = send(api, fmri("a"), fmri("b"), headers=key)
    assert first.json()["id"] == again.json()["id"]
    assert len(world.sessions.read(jobs.recent, "local")) == 2
    other = send(api, fmri("a"), headers=key)
    assert other.status_code == 422
    assert other.json()["type"].endswith("idempotency-key-reused")


def test_a_batch_larger_than_a_limit_is_taken_whole_and_runs_as_there_is_room(
    shared_door: Door, world: World
) -> None:
    with shared_door.user(world, "ada") as ada, shared_door.user(world, "bob") as bob:
        batch = accepted(ada, *(fmri(f"a {n}") for n in range(8)), fmri("a 7"))
        assert (batch["state"], batch["counts"]["queued"]) == ("running", 8)
        usage = ada.get("/api/usage").json()
        assert (usage["in_flight"], usage["max_jobs"]) == (3, 5), "room is left for other things"
        others = [
            ada.post("/api/scan/activation", json={"prompt": f"other {n}"}).status_code
            for n in range(3)
        ]
        assert others == [202, 202, 429]
        assert accepted(bob, fmri("a"))["counts"]["queued"] == 1
        usual = limits.usual(shared_door.settings)

        def go_on() -> list[dict[str, Any]]:
            """As the reaper does."""
            fed = world.sessions.write(feeding.feed, "ada", max_queued=100, usual=usual)
            for queue, count in fed.queued.items():
                send_tickets(world.redis, queue, count)
            return [row for row in table_of(ada, batch) if row["job"] is not None]

        rows = go_on()
        assert [row["line"] for row in rows] == [1, 2, 3], "nothing has ended"
        with world.working(world.queue()):
            until = time.monotonic() + 20
            while seen(ada, batch)["state"] == "running" and time.monotonic() < until:
                rows = go_on()
        assert [row["line"] for row in rows] == list(range(1, 10))
        assert seen(ada, batch)["counts"]["succeeded"] == 8
        for path in (*batch["links"].values(),):
            assert bob.get(path).status_code == 404, path
        assert bob.delete(batch["links"]["self"]).status_code == 404


def test_what_waits_for_room_is_cancelled_with_the_rest(shared_door: Door, world: World) -> None:
    with shared_door.user(world, "ada") as ada:
        batch = accepted(ada, *(fmri(f"a {n}") for n in range(8)))
        stopped = ada.delete(batch["links"]["self"])
        assert stopped.status_code == 200
        assert (stopped.json()["state"], stopped.json()["counts"]["cancelled"]) == ("cancelled", 8)
        told = read_all(ada, batch["links"]["events"])
        ended = [message.data for message in told if message.name == "line"]
        assert sorted(line["line"] for line in ended) == list(range(1, 9))
        assert {line["state"] for line in ended} == {"cancelled"}


def test_a_batch_that_cannot_be_recorded_whole_leaves_nothing_behind(
    api: httpx.Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CHUNK", 2)
    real, calls = batches.fill, []

    def filling(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 1:
            raise Unavailable("the database does not answer now")
        real(*arguments)

    monkeypatch.setattr(batches, "fill", filling)
    assert send(api, *(fmri(f"a {n}") for n in range(4))).status_code == 503
    assert api.get("/api/batches").json() == []
    assert world.sessions.read(jobs.recent, "local") == []


def test_who_follows_a_batch_that_is_undone_hears_that_it_has_ended(
    api: httpx.Client, world: World
) -> None:
    wanted = NewBatch("local", "", Lane.BATCH, 2, "0" * 64)
    half = world.sessions.write(batches.begin, wanted)
    with follow(api, f"/api/batches/{half.id}/events") as stream:
        assert next(stream).data["total"] == 0
        assert world.sessions.write(batches.abandon, half.id)
        (last,) = list(stream)
    assert (last.name, last.data["state"]) == ("ended", "cancelled")


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ({"lane": "fast"}, "lane"),
        ({"max_failures": 0}, "max_failures"),
        ({"on_invalid": "perhaps"}, "on_invalid"),
    ],
)
def test_options_that_cannot_be_are_refused(
    api: httpx.Client, world: World, query: dict[str, Any], named: str
) -> None:
    refused = send(api, fmri("a"), **query)
    assert refused.status_code == 400
    assert named in refused.json()["detail"]


def test_what_is_no_batch_is_refused(api: httpx.Client, world: World) -> None:
    assert send(api).status_code == 400
    assert send(api, fmri("a" * 30_000)).status_code == 400, "longer than a request may be"
    other = api.post("/api/batches", content=b"a,b", headers={"content-type": "text/csv"})
    assert other.status_code == 415
    assert NDJSON in other.json()["detail"]
    assert send(api, *[fmri("a")] * 10_001).status_code == 422
    assert api.get(f"/api/batches/{NOBODYS}").status_code == 404


def test_thousands_of_scans_are_taken_at_the_price_of_reading_them(
    api: httpx.Client, world: World
) -> None:
    """Counted in the processor's time: a test machine may be doing other things."""
    began = time.process_time()
    small = accepted(api, *(fmri(f"b {n}") for n in range(500)))
    a_tenth = time.process_time() - began
    began = time.process_time()
    batch = accepted(api, *(fmri(f"a {n}") for n in range(4500)))
    assert time.process_time() - began < 9 * 2.5 * a_tenth, "no more than in proportion"
    assert (small["counts"]["queued"], batch["counts"]["queued"]) == (500, 4500)
    assert api.delete(batch["links"]["self"]).json()["state"] == "cancelled"
