"""Sessions and batches as the Python client meets them: the real API, its worker played by hand."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from neural_mri.client import Client, Damaged, Refused
from neural_mri.client.sessions import read_file
from neural_mri.contract.batches import BatchEnded, BatchState, LineEnded
from neural_mri.contract.jobs import JobState, Lane
from neural_mri.contract.scans import ActivationScan, StructuralScan
from neural_mri.contract.sessions import Note, SessionSaved
from tests.api.specimens import PROMPT
from tests.api.world import World


@pytest.fixture
def mri(api: httpx.Client) -> Iterator[Client]:
    with Client(str(api.base_url)) as client:
        yield client


def scan(mri: Client, world: World, prompt: str = PROMPT) -> str:
    job = mri.submit(ActivationScan(prompt=prompt))
    world.perform(world.claim(world.queue()))
    return str(job.id)


def test_a_batch_is_followed_to_its_end_and_its_tables_are_one(mri: Client, world: World) -> None:
    scans = [ActivationScan(prompt=f"a {n}") for n in range(3)]
    batch = mri.batches.submit([*scans, scans[0]], name="three", max_failures=3)
    assert (batch.lane, batch.repeated, batch.counts.queued) == (Lane.BATCH, 1, 3)
    with world.working(world.queue()):
        events = list(mri.batches.watch(batch))
    ended = [event for event in events if isinstance(event, LineEnded)]
    assert sorted(event.line for event in ended) == [1, 2, 3, 4]
    assert isinstance(events[-1], BatchEnded)
    assert mri.batches.wait(batch).state is BatchState.ENDED
    outcomes = list(mri.batches.outcomes(batch))
    assert [outcome.line.line for outcome in outcomes] == [1, 2, 3, 4]
    assert outcomes[3].result is outcomes[0].result
    first = outcomes[0].result
    assert first is not None
    frame = mri.batches.table(batch, "predictions").to_pandas()
    assert list(frame["line"]) == [1, 2, 3, 4]
    assert set(frame["text"]) == set(first.table("predictions")["text"].to_pylist())
    summaries = list(mri.batches.summaries(batch, after=2))
    assert [line["line"] for line in summaries] == [3, 4]
    assert mri.batches.list(5)[0].name == "three"


def test_a_batch_can_be_sent_from_a_file_and_stopped(
    mri: Client, world: World, tmp_path: Path
) -> None:
    file = tmp_path / "scans.ndjson"
    file.write_text('{"scan_mode":"fMRI","prompt":"a"}\n{"scan_mode":"fMRI","facter":1}\n')
    with pytest.raises(Refused) as refused:
        mri.batches.submit(file)
    assert refused.value.members["invalid"][0]["line"] == 2
    batch = mri.batches.submit(file, on_invalid="skip", idempotency_key="once")
    assert mri.batches.submit(file, on_invalid="skip", idempotency_key="once").id == batch.id
    assert mri.batches.cancel(batch).state is BatchState.CANCELLED
    (line,) = mri.batches.lines(batch, state="cancelled")
    assert (line.line, line.state) == (1, JobState.CANCELLED)
    outcomes = list(mri.batches.outcomes(batch))
    assert [outcome.result for outcome in outcomes] == [None, None]


def test_of_three_results_one_of_which_is_lost_the_others_are_given(
    mri: Client, world: World
) -> None:
    batch = mri.batches.submit([ActivationScan(prompt=f"a {n}") for n in range(4)])
    for _ in range(2):
        world.perform(world.claim(world.queue()))
    lost = world.perform(world.claim(world.queue()))
    world.harm(lost, "activations")
    outcomes = list(mri.batches.outcomes(batch))
    assert [outcome.line.line for outcome in outcomes] == [1, 2, 3], "the fourth has not ended"
    assert [outcome.result is None for outcome in outcomes] == [False, False, True]
    assert outcomes[2].line.problem is not None
    assert outcomes[2].line.problem["status"] == 410


def test_what_cannot_be_fetched_replaces_no_file(mri: Client, world: World, tmp_path: Path) -> None:
    made = mri.sessions.create("Eiffel", [scan(mri, world)])
    link = mri.sessions.share(made)
    shared = mri.sessions.shared(link.token)
    mri.sessions.revoke(made, link.id)
    there, named = tmp_path / "file", tmp_path / "link"
    there.write_bytes(b"precious")
    named.symlink_to(there)
    refused: tuple[Callable[[], None], ...] = (
        lambda: mri.batches.save(made.id, there),
        lambda: mri.sessions.export(uuid4(), there),
        lambda: shared.export(there),
    )
    for write in refused:
        with pytest.raises(Refused):
            write()
        assert there.read_bytes() == b"precious"
    mri.sessions.export(made, named)
    assert named.is_symlink()
    assert there.read_bytes().startswith(b"PK")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["file", "link"]
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none" / "file"))):
        mri.sessions.export(made, tmp_path / "none" / "file")


def test_a_session_opens_with_every_table_by_two_requests(mri: Client, world: World) -> None:
    jobs = [scan(mri, world), scan(mri, world, "a b")]
    made = mri.sessions.create("Eiffel", jobs, labels=["tower", "letters"])
    asked: list[str] = []
    http = mri._exchange._http
    http.event_hooks["request"] = [lambda request: asked.append(request.url.path)]
    with mri.sessions.open(made) as opened:
        assert [result.kind for result in opened.results] == ["fMRI", "fMRI"]
        whole = mri.result(jobs[1])
        assert opened.labelled("letters").table() == whole.table()
        assert opened.results[0].to_pandas().equals(mri.result(jobs[0]).to_pandas())
        with pytest.raises(ValueError, match="tower"):
            opened.labelled("Tower")
    assert [path for path in asked if "/jobs/" not in path] == [
        f"/api/sessions/{made.id}",
        f"/api/sessions/{made.id}/results",
    ]


def test_a_session_is_saved_renamed_forked_compared_and_deleted(mri: Client, world: World) -> None:
    made = mri.sessions.create("Eiffel", [scan(mri, world)])
    noted = mri.sessions.save(made, notes=[Note(text="Here")], message="Noted")
    assert noted.document.scans == made.document.scans
    with pytest.raises(Refused) as stale:
        mri.sessions.save(made, view={"layer": 1})
    assert (stale.value.status, stale.value.members["head"]) == (412, noted.head)
    assert mri.sessions.rename(made, "Tower").name == "Tower"
    assert mri.sessions.pin(made).pinned
    fork = mri.sessions.fork(made, "Mine", revision=made.head)
    assert (fork.head, fork.forked_from) == (made.head, made.id)
    told = mri.sessions.difference(fork, made)
    assert [note.text for note in told.notes_added] == ["Here"]
    assert [each.revision for each in mri.sessions.revisions(made)] == [noted.head, made.head]
    assert [each.name for each in mri.sessions.list(query="eiffel")] == ["Tower", "Mine"]
    assert [each.name for each in mri.sessions.list(limit=1)] == ["Tower"]
    mri.sessions.delete(made)
    assert [each.name for each in mri.sessions.list()] == ["Mine"]


def test_a_file_reads_without_any_service_and_imports_to_the_same_revision(
    mri: Client, world: World, tmp_path: Path
) -> None:
    job = scan(mri, world)
    made = mri.sessions.create("Eiffel", [job])
    path = tmp_path / "eiffel.nmri"
    mri.sessions.export(made, path)
    with read_file(path) as opened:
        assert (opened.name, opened.document) == ("Eiffel", made.document)
        assert opened.results[0].table() == mri.result(job).table()
    taken = mri.sessions.import_file(path)
    assert (taken.head, taken.id != made.id) == (made.head, True)
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)
    with pytest.raises(Damaged, match="chunks/"):
        read_file(path)
    with pytest.raises(Refused) as refused:
        mri.sessions.import_file(path)
    assert refused.value.type.endswith("invalid-archive")


def test_a_link_is_followed_and_a_scan_is_seen_to_arrive(mri: Client, world: World) -> None:
    made = mri.sessions.create("Eiffel")
    link = mri.sessions.share(made, access="contribute", label="Grace")
    shared = mri.sessions.shared(link.token)
    events = shared.watch()
    assert isinstance(next(events), SessionSaved)
    shared.add(scan(mri, world), label="hers")
    arrived = next(events)
    assert isinstance(arrived, SessionSaved)
    assert arrived.number == 2
    asked: list[str] = []
    hooks = {"request": [lambda request: asked.append(request.url.path)]}
    mri._exchange._http.event_hooks = hooks
    with shared.open() as opened:
        assert opened.labelled("hers").kind == "fMRI"
        assert (opened.name, opened.document) == ("Eiffel", shared.get().document)
    assert asked == ["/api/shared/export", "/api/shared"], "two requests might be of two revisions"
    assert shared.fork("Copy").head == mri.sessions.get(made).head
    hidden = mri.sessions.shared(mri.sessions.share(made, redact=True).token)
    with hidden.open() as opened:
        assert opened.document.scans[0].request["prompt"] == "[redacted]"
    mri.sessions.revoke(made, link)
    with pytest.raises(Refused):
        shared.get()
    assert [each.revoked_at is None for each in mri.sessions.shares(made)] == [True, False]


def test_only_scans_can_be_kept(mri: Client, world: World) -> None:
    job = mri.submit(StructuralScan())
    with pytest.raises(Refused, match="is queued") as refused:
        mri.sessions.create("Early", [job])
    assert refused.value.status == 409
    with pytest.raises(ValueError, match="not a job's id"):
        mri.sessions.create("Wrong", ["tower"])
    with pytest.raises(ValueError, match="not a session's id"):
        mri.sessions.get("tower")
