"""Sessions and batches of real scans: kept, redacted, taken away and brought back, batched."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete

from neural_mri.backing import broker, database, storage
from neural_mri.backing.rows import JOBS, Base
from neural_mri.backing.settings import Settings
from neural_mri.client import Client
from neural_mri.contract.archives import open_archive
from neural_mri.contract.batches import BatchEvent, BatchState
from neural_mri.contract.perturbations import ZeroAblation
from neural_mri.contract.results import from_ipc
from neural_mri.contract.scans import (
    ActivationScan,
    AnomalyScan,
    CircuitScan,
    PerturbationScan,
    Scan,
    StructuralScan,
)
from neural_mri.contract.sessions import Note
from tests.api.world import serving
from tests.backing.stores import clear
from tests.servers import folder_only
from tests.system.service import Service

pytestmark = pytest.mark.smollm2

EIFFEL = "The Eiffel Tower is located in the city of"
ANSWER = " Paris"


@pytest.fixture(scope="module")
def mri(service: Service) -> Iterator[Client]:
    with Client(str(service.http.base_url), timeout_seconds=120) as client:
        yield client


@pytest.fixture
def scanned(mri: Client) -> list[str]:
    """One of each kind that reads a prompt and is quick: asked for again where a test took them away."""
    scans: list[Scan] = [
        StructuralScan(),
        ActivationScan(prompt=EIFFEL),
        AnomalyScan(prompt=EIFFEL, answer=ANSWER, token_positions="target"),
        PerturbationScan(
            prompt=EIFFEL, answer=ANSWER, perturbations=(ZeroAblation(component="blocks.4.mlp"),)
        ),
        CircuitScan(prompt=EIFFEL, answer=ANSWER, exact=5, edges=20),
    ]
    jobs = [mri.submit(scan) for scan in scans]
    return [str(mri.wait(job).id) for job in jobs]


@folder_only
def test_a_session_of_real_scans_opens_with_no_worker_no_redis_and_no_job(
    service: Service, mri: Client, scanned: list[str]
) -> None:
    made = mri.sessions.create("Eiffel", scanned, notes=[Note(text="Layer 21 writes Paris")])
    with mri.sessions.open(made) as whole:
        before = [
            result.arrow(ref.name) for result in whole.results for ref in result.manifest.tables
        ]
    sessions = database.sessions(service.settings)
    with sessions.writing() as session:
        kept = list(session.execute(JOBS.select()).mappings())
        session.execute(delete(JOBS))
    aside = service.settings.store_dir.with_name("aside")
    (service.settings.store_dir / "packed").rename(aside)
    stopped = [service.child("worker"), service.child("valkey-server")]
    for process in stopped:
        process.suspend()
    asked: list[str] = []
    mri._exchange._http.event_hooks["request"] = [lambda request: asked.append(request.url.path)]
    try:
        with mri.sessions.open(made) as opened:
            tables = [
                result.arrow(ref.name)
                for result in opened.results
                for ref in result.manifest.tables
            ]
            assert opened.document == made.document
    finally:
        mri._exchange._http.event_hooks["request"] = []
        for process in stopped:
            process.resume()
        aside.rename(service.settings.store_dir / "packed")
        with sessions.writing() as session:
            for row in kept:
                session.execute(JOBS.insert().values(**row))
        sessions.close()
    assert len(asked) == 2, asked
    assert tables == before


def test_a_redacted_link_gives_no_token_of_real_tables_away(
    service: Service, mri: Client, scanned: list[str]
) -> None:
    made = mri.sessions.create("Shared", scanned)
    link = mri.sessions.share(made, redact=True)
    headers = {"share-token": link.token}
    body = service.http.get("/api/shared/export", headers=headers).content
    told = service.http.get("/api/shared", headers=headers).content
    words = ["Eiffel", "Tower", "located", "Paris"]
    tokens = {token.strip() for token in mri.tokenize(EIFFEL).texts if len(token.strip()) > 3}
    for word in {*words, *tokens}:
        assert word.encode() not in body, word
        assert word.encode() not in told, word
    archive = open_archive(io.BytesIO(body), largest=10**9)
    texts, numbers = set(), 0
    for chunk in archive.chunks():
        table = from_ipc(archive.chunk(chunk))
        for name in table.column_names:
            if name.endswith("_id"):
                assert set(table[name].to_pylist()) <= {-1}, name
            if name in {"text", "answer", "foil"}:
                texts |= set(table[name].to_pylist())
            numbers += table.num_rows
    assert texts == {""}
    assert numbers > 1000


def test_exported_wiped_and_imported_a_session_has_the_same_hashes(
    service: Service, mri: Client, scanned: list[str], tmp_path: Path
) -> None:
    made = mri.sessions.create("Travels", scanned, view={"mode": "DTI", "layer": 21})
    file = tmp_path / "travels.nmri"
    mri.sessions.export(made, file)
    # Elsewhere: an API alone, which has never seen a scan, a model, a worker or Redis.
    settings = Settings(data_dir=tmp_path / "elsewhere")
    database.migrate(settings)
    with serving(settings) as http, Client(str(http.base_url)) as there:
        taken = there.sessions.import_file(file)
        assert taken.head == made.head
        assert taken.document == made.document
        again = tmp_path / "again.nmri"
        there.sessions.export(taken, again)
        assert again.read_bytes() == file.read_bytes()
        told = there.sessions.difference(taken, taken)
        assert {scan.change.value for scan in told.scans} == {"same"}
        with there.sessions.open(taken) as opened, mri.sessions.open(made) as original:
            for one, two in zip(opened.results, original.results, strict=True):
                assert one.manifest == two.manifest
                assert one.arrow() == two.arrow()
    # And here, once everything that the session named has been wiped.
    sessions = database.sessions(service.settings)
    with sessions.writing() as session:
        for table in reversed(Base.metadata.sorted_tables):
            if table.name.startswith(("session", "shares", "batch", "jobs", "idempotency")):
                session.execute(delete(table))
    sessions.close()
    for folder in ("chunks/", "kept/", "manifests/", "packed/", "pieces/", "saved/"):
        clear(storage.open_store(service.settings), folder)
    with broker.connect(service.settings) as redis:
        redis.flushall()
    back = mri.sessions.import_file(file)
    assert back.head == made.head
    with mri.sessions.open(back) as opened:
        circuit = opened.results[4].circuit()
        assert circuit.strongest(3)
        assert opened.results[1].activations().grid().values.size > 100


def test_a_batch_of_prompts_runs_to_its_end_and_the_second_time_costs_nothing(
    mri: Client, tmp_path: Path
) -> None:
    cities = ("Paris", "Rome", "Berlin", "Madrid", "Lisbon", "Vienna", "Prague")
    file = tmp_path / "prompts.ndjson"
    prompts = [EIFFEL, *(f"{city} is the capital of" for city in cities), EIFFEL]
    file.write_text(
        "".join(json.dumps({"scan_mode": "fMRI", "prompt": each}) + "\n" for each in prompts)
    )
    seen: list[BatchEvent] = []
    batch = mri.batches.submit(file, name="capitals")
    done = mri.batches.wait(batch, seen.append)
    assert (done.state, done.counts.succeeded, done.repeated) == (BatchState.ENDED, 8, 1)
    table = mri.batches.table(done, "predictions").to_pandas()
    last = table[(table["rank"] == 0)].groupby("line").last()["text"]
    assert last[1] == last[9] == ANSWER
    again = mri.batches.wait(mri.batches.submit(file, name="capitals again"))
    assert (again.counts.succeeded, again.counts.cached) == (8, 8)
