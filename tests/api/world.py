"""The API as its callers meet it, and the worker's side played by hand."""

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self
from uuid import UUID

import httpx
import msgspec
import redis
import uvicorn
from sqlalchemy import update
from tokenizers import Tokenizer

from api.app import Application, create_app
from api.files import FilePart
from neural_mri.backing import database, jobs, keys, models
from neural_mri.backing.events import HeldModel, Publisher, WorkerBeat, beat, change_of
from neural_mri.backing.leases import LeaseOwner
from neural_mri.backing.records import Job
from neural_mri.backing.rows import JOBS
from neural_mri.backing.saving import save_result
from neural_mri.backing.settings import Settings
from neural_mri.backing.storage import open_store
from neural_mri.backing.stored import StoredResult, open_result
from neural_mri.contract.events import ActivationFrame, FrameLayer
from neural_mri.contract.jobs import JobState
from neural_mri.contract.models import Architecture, ModelState, Numerics
from neural_mri.contract.results import Manifest, signed
from neural_mri.contract.scans import decode_scan, kind_of
from tests.api.specimens import TINY, tables_of, tiny_tokenizer
from tests.backing.stores import overwrite
from tests.servers import Valkey, empty

__all__ = ("Server", "World", "inhabited", "serving")


@dataclass(kw_only=True)
class World:
    """What the API stands on, and a worker that does what a test says."""

    settings: Settings
    valkey: Valkey | None = None
    """Its own server, where it has one."""
    packs: bool = True
    """Whether a small result is stored as one file."""

    def __post_init__(self) -> None:
        self.sessions = database.sessions(self.settings)
        self.redis: Any = redis.Redis.from_url(self.settings.effective_redis_url)
        self.store = open_store(self.settings)
        self.publisher = Publisher(self.redis, self.settings)
        self.owner = LeaseOwner.here()

    def close(self) -> None:
        self.sessions.close()
        self.redis.close()

    def register(
        self,
        name: str = "tiny",
        *,
        weights: str = "tiny",
        wanted: bool = True,
        architecture: Architecture = TINY,
        tokenizer: Tokenizer | None = None,
        tokenizer_digest: str | None = None,
    ) -> models.RegisteredModel:
        """A registered model, with a tokenizer in the store unless another is named."""
        if tokenizer_digest is None:
            body = (tokenizer or tiny_tokenizer()).to_str().encode()
            tokenizer_digest = hashlib.sha256(body).hexdigest()
            self.store.put(keys.tokenizer_path(tokenizer_digest), body)
        return self.sessions.write(
            models.register,
            name=name,
            source="folder:tiny",
            folder=name,
            revision=hashlib.sha256(weights.encode()).hexdigest(),
            tokenizer_digest=tokenizer_digest,
            architecture=architecture,
            n_parameters=1234,
            weights_bytes=4936,
            numerics=Numerics(),
            wanted=wanted,
        )

    def hold(
        self, model: models.RegisteredModel, *, state: ModelState = ModelState.RESIDENT
    ) -> None:
        """A worker says that it holds the model."""
        held = HeldModel(
            name=model.name,
            revision=model.revision,
            state=state,
            memory_bytes=5000,
            pinned=True,
            held_seconds=12.5,
        )
        beat(
            self.redis,
            WorkerBeat(
                worker="worker-1",
                device="cpu",
                models=(held,),
                budget_bytes=9000,
                free_bytes=4000,
                at=time.time(),
            ),
        )

    def job(self, job_id: str) -> Job:
        job = self.sessions.read(jobs.get, UUID(job_id))
        assert job is not None
        return job

    def queue(self, name: str = "tiny") -> str:
        """Where scans of a model wait."""
        model = self.sessions.read(models.get, name)
        assert model is not None
        return keys.scan_queue(model.revision)

    def result(self, job: Job) -> StoredResult:
        """A finished job's result."""
        assert job.manifest is not None
        return open_result(self.store, job.manifest)

    def table(self, job: Job, name: str) -> bytes:
        """The bytes of a table of a finished job's result."""
        result = self.result(job)
        table = result.table(name)
        assert table is not None
        return result.bytes_of(table)

    def file(self, job: Job, name: str) -> FilePart:
        """The file that a table of a finished job's result is in, and where in it."""
        table = self.result(job).table(name)
        assert table is not None
        path = self.store.local_path(table.path)
        assert path is not None
        return FilePart(path, table.start, table.end)

    def harm(self, job: Job, name: str, how: str = "lost") -> None:
        """Have the bytes of a table of a finished job's result `flipped`, `cut short` or `lost` where they stand."""
        table = self.result(job).table(name)
        assert table is not None
        if how == "lost":
            self.store.delete(table.path)
            return
        body = bytearray(self.store.get(table.path))
        if how == "flipped":
            body[table.end - 1] ^= 1
        else:
            del body[table.end - 1 :]
        overwrite(self.store, table.path, bytes(body))

    def unpack(self, job: Job) -> None:
        """Have a result stand as it would have before small ones became one file."""
        result, path = self.result(job), keys.manifest_path(job.id, job.attempt)
        assert keys.is_packed(result.path)
        for table in result.tables:
            self.store.put(keys.chunk_path(table.ref.chunk), result.bytes_of(table))
        self.store.put(path, result.body)
        self.store.delete(result.path)
        with self.sessions.writing() as session:
            session.execute(update(JOBS).where(JOBS.c.id == job.id).values(manifest=path))

    def claim(self, queue: str) -> Job:
        """Take the next job of a queue, as its ticket says."""
        ticket = self.redis.brpop([queue], timeout=5)
        assert ticket is not None, f"no ticket came to {queue}"
        (job,) = self._claim(queue)
        return job

    def _claim(self, queue: str) -> list[Job]:
        claimed = self.sessions.write(
            jobs.claim, queue=queue, owner=self.owner, limit=1, lease_seconds=30
        )
        for job in claimed:
            self.publisher.publish(job.id, change_of(job))
        return claimed

    def move(self, job: Job, to: JobState, **fields: Any) -> Job:
        """Move a held job, and tell of it."""
        moved = self.sessions.write(jobs.advance, job.id, to, attempt=job.attempt, **fields)
        assert moved is not None, f"{job.id} could not move to {to}"
        self.publisher.publish(job.id, change_of(moved))
        return moved

    def frame(self, job: Job, token_idx: int) -> ActivationFrame:
        """Tell of a token."""
        frame = ActivationFrame(
            token_idx=token_idx,
            token="a",
            layers=(FrameLayer(layer_id="embed", type="embedding", activations=(1.5,)),),
            unit="L2 norm",
        )
        self.publisher.publish(job.id, frame)
        return frame

    def perform(self, job: Job) -> Job:
        """Do a claimed job's work: scans get tables of made-up numbers."""
        self.move(job, JobState.RUNNING)
        self.move(job, JobState.STORING)
        if job.kind != "scan":
            return self.move(job, JobState.SUCCEEDED)
        scan = decode_scan(job.request)
        manifest = Manifest(
            scan_key=job.scan_key or "",
            kind=kind_of(scan),
            model=job.model,
            revision=job.revision,
            numerics=Numerics(),
            scanner_version="1",
            request=msgspec.json.decode(job.request),
            prompt_tokens=job.tokens.texts if job.tokens else (),
            tables=(),
            created_at=datetime.now(UTC),
            forward_seconds=0.01,
            compute_seconds=0.02,
            memory_bytes=5000,
        )
        tables = signed(tables_of(scan, job.n_tokens), manifest)
        saved = save_result(
            self.store,
            keys.pieces_path(job.id, job.attempt),
            manifest,
            tables,
            packed=keys.packed_path(job.id, job.attempt) if self.packs else None,
        )
        return self.move(job, JobState.SUCCEEDED, manifest=saved.path)

    @contextmanager
    def working(self, *queues: str) -> Iterator[None]:
        """A worker beside the test that performs whatever comes."""
        ending = threading.Event()

        def work() -> None:
            while not ending.is_set():
                if ticket := self.redis.brpop(queues, timeout=0.05):
                    for job in self._claim(ticket[0].decode()):
                        self.perform(job)

        with self.beside(work):
            try:
                yield
            finally:
                ending.set()

    @contextmanager
    def beside(self, work: Callable[[], None]) -> Iterator[None]:
        """Do something beside the test; what it raises, the test raises."""
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(work)
            yield
        done.result()


class Server(uvicorn.Server):
    """Serves from a thread on a free port; no signal is its own."""

    def __init__(self, app: Application) -> None:
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self.app = app
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self.run, args=([self.socket],))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def __enter__(self) -> Self:
        self._thread.start()
        for _ in range(1000):
            if self.started:
                return self
            time.sleep(0.005)
        raise TimeoutError("the API did not start within 5 s")

    def __exit__(self, *exception: object) -> None:
        self.should_exit = True
        self.app.end_streams()
        self._thread.join()
        self.socket.close()


@contextmanager
def inhabited(
    settings: Settings, *, valkey: Valkey | None = None, is_used: bool = False
) -> Iterator[World]:
    """A world with one registered model and nothing else, whatever its database has where that `is_used`."""
    world = World(settings=settings, valkey=valkey)
    try:
        if is_used:
            empty(world.sessions)
        world.redis.flushall()
        world.register()
        yield world
    finally:
        world.close()


@contextmanager
def serving(settings: Settings) -> Iterator[httpx.Client]:
    """The API on a free port, and a client of it."""
    with (
        Server(create_app(settings)) as server,
        httpx.Client(
            base_url=server.url, timeout=20, limits=httpx.Limits(max_connections=None)
        ) as client,
    ):
        yield client
