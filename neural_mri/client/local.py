"""A checkpoint scanned on this machine by processes of its own, with no service about.

A short prompt hardly keeps one core busy, so a small model is held by two processes that take turns with the
scans, one thread each; a large one by a single process that has all cores.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import msgspec

from neural_mri import __version__
from neural_mri.client.errors import ClientError, Refused
from neural_mri.contract import local
from neural_mri.contract.baselines import Subject, named_after
from neural_mri.contract.results import from_ipc
from neural_mri.contract.scan_keys import SCANNER_VERSION
from neural_mri.contract.scans import Scan, encode_scan
from neural_mri.contract.tokens import Tokens
from neural_mri.diagnostics.measuring import Scanned
from neural_mri.diagnostics.records import Records

__all__ = ("LocalScans", "WorkerEnded", "WorkerMissing")

AHEAD = 2
"""Scans sent to each process before the first of them is answered: it never waits for the next."""
TINY_BYTES, SMALL_BYTES = 1 << 25, 1 << 30
"""A model whose weights take from the one to the other is held twice; for a smaller one starting a process
costs more than it saves, for a larger one memory does."""


class WorkerMissing(ClientError):
    """The scanner is not installed here."""


class WorkerEnded(ClientError):
    """The scanning process ended before it had answered."""


class _Process:
    """One process that scans, and the answers that it owes."""

    def __init__(self, model: str, arguments: Sequence[str]) -> None:
        self._model = model
        self.owed = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.local", *arguments, model],
            cwd=_tree(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._asks = cast("BinaryIO", self._process.stdin)
        self._answers = cast("BinaryIO", self._process.stdout)

    def ask(self, question: local.Ask) -> None:
        self.owed += 1
        try:
            local.write_message(self._asks, question)
        except BrokenPipeError:
            self._complain()

    def answer(self) -> Any:
        """The oldest answer that is owed. Raises `Refused` and `WorkerEnded`."""
        self.owed -= 1
        answer = local.read_message(self._answers, local.Answer)
        if answer is None:
            self._complain()
        if isinstance(answer, local.Failure):
            raise Refused(answer.problem)
        return answer

    def close(self) -> None:
        """Let it end by itself, or end it where it is in the middle of something."""
        with contextlib.suppress(OSError):
            self._asks.close()
        if self.owed:
            self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _complain(self) -> None:
        raise WorkerEnded(
            f"the process that scans {self._model} ended with status {self._process.wait()}: what it has "
            "written above says why"
        )


class LocalScans:
    """One checkpoint, a folder of safetensors or a name of the embedded set-up's model store.

    Its processes start with the first question and end with `close`; use it as a context manager.
    """

    def __init__(
        self,
        model: str,
        *,
        processes: int | None = None,
        threads: int | None = None,
        records: Records | None = None,
    ) -> None:
        """Name a checkpoint; nothing is started yet.

        Args:
            model: A folder, or a name.
            processes: How many hold the checkpoint; two where it is small and there are cores for them.
            threads: Threads of each; the cores, shared out.
            records: Where checkpoints that were seen before are known by their files' contents, so that
                no process has to open them.
        """
        self._records = records
        self._model = _absolute(model)
        self._count = processes or _processes(self._model)
        self._threads = threads or max(1, (os.cpu_count() or 1) // self._count)
        self._running: list[_Process] = []
        self._prepared = False
        self._store: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self._running:
            process.close()
        self._running = []
        self._prepared = False
        if self._store is not None:
            self._store.cleanup()
            self._store = None

    @cached_property
    def subject(self) -> Subject:
        """The checkpoint."""
        contents = None if self._records is None else _contents(Path(self._model))
        if self._records is not None and contents is not None:
            known = self._records.subject(contents)
            if known is not None and known.scanner_version == SCANNER_VERSION:
                return msgspec.structs.replace(known, model=named_after(Path(self._model).name))
        answer: local.Describe = self._asked(local.Which())
        if self._records is not None and contents is not None:
            self._records.remember(contents, answer.subject)
        return answer.subject

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """Texts as the checkpoint reads them."""
        answer: local.Tokenized = self._asked(local.Tokenize(texts=tuple(texts)))
        return list(answer.tokens)

    def scan(self, scans: Sequence[Scan]) -> Iterator[Scanned]:
        """What each scan measured, in their order. Raises `Refused` where the scanner says no."""
        processes = self._ready()
        under_way: deque[_Process] = deque()
        for number, scan in enumerate(scans):
            process = processes[number % len(processes)]
            process.ask(local.Scan(scan=encode_scan(scan)))
            under_way.append(process)
            if len(under_way) >= AHEAD * len(processes):
                yield _scanned(under_way.popleft().answer())
        while under_way:
            yield _scanned(under_way.popleft().answer())

    def _asked(self, question: local.Ask) -> Any:
        [first, *_] = self._started(1)
        first.ask(question)
        return first.answer()

    def _ready(self) -> list[_Process]:
        """All processes, the checkpoint in each one's memory."""
        processes = self._started(self._count)
        if not self._prepared:
            for process in processes:
                process.ask(local.Prepare())
            for process in processes:
                process.answer()
            self._prepared = True
        return processes

    def _started(self, count: int) -> list[_Process]:
        """At least as many processes."""
        if self._store is None:
            # What one has calibrated the others read.
            self._store = tempfile.TemporaryDirectory(prefix="neural-mri-store-")
        arguments = ["--store", self._store.name, "--threads", str(self._threads)]
        while len(self._running) < count:
            self._running.append(_Process(self._model, arguments))
        return self._running


def _scanned(answer: local.Measured) -> Scanned:
    tables = {name: from_ipc(body) for name, body in answer.tables.items()}
    return Scanned(answer.scan_key, tables)


def _processes(model: str) -> int:
    folder = Path(model)
    if (os.cpu_count() or 1) < 2:
        return 1
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return 2 if TINY_BYTES < size <= SMALL_BYTES else 1


def _contents(folder: Path) -> str | None:
    """Digest of everything that says what a checkpoint is and how it is computed here; None for a name."""
    files = sorted(file for file in folder.glob("*") if file.suffix in _TELLING)
    if not folder.is_dir() or not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(
                f"{file.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode()
            )
    own = sorted(
        f"{name}={value}" for name, value in os.environ.items() if name.startswith("NEURAL_MRI_")
    )
    on_gpu = Path("/dev/nvidiactl").exists()
    digest.update("\n".join([__version__, f"gpu {on_gpu}", *own]).encode())
    return digest.hexdigest()


_TELLING = frozenset({".safetensors", ".json"})


def _absolute(model: str) -> str:
    """The processes run elsewhere, so a folder's path is told whole."""
    path = Path(model).expanduser()
    return os.fspath(path.resolve()) if path.is_dir() else model


def _tree() -> Path:
    """Where the worker's code is. Raises `WorkerMissing`: it comes with the source tree, not the wheel."""
    found = find_spec("worker")
    for folder in (found.submodule_search_locations or []) if found else []:
        if (Path(folder) / "local.py").exists():
            return Path(folder).parent
    raise WorkerMissing(
        "scanning on this machine needs the worker, which is not installed here: run from the source "
        "tree after `make up` or `pip install -e '.[worker]'`, or leave --local out and name a service"
    )
