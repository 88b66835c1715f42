"""A checkpoint scanned on this machine by processes of its own, with no service about.

A short prompt hardly keeps one core busy, so a small model is scanned by two processes, one thread each; a large
one by a single process that has all cores.
"""

import contextlib
import hashlib
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn, Self, cast

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

__all__ = ("LocalScans", "LocalWorkers", "WorkerEnded", "WorkerMissing")

AHEAD = 2
"""Questions sent to each process before the first of them is answered: it never waits for the next."""
MOST_AHEAD_BYTES = 1 << 14
"""A larger question waits until a process is idle: a pipe takes no more than some of what nobody reads yet."""
MOST_TOGETHER = 12
"""Scans that may share a forward and are sent as one question; what is left goes to whoever is done first."""
TINY_BYTES, SMALL_BYTES = 1 << 25, 1 << 30
"""A model whose weights take from the one to the other is scanned by two; for a smaller one starting a process
costs more than it saves, for a larger one memory does."""


class WorkerMissing(ClientError):
    """The scanner is not installed here."""


class WorkerEnded(ClientError):
    """The scanning process ended before it had answered."""


class _Lane:
    """One process that scans, and the answers that it owes."""

    def __init__(
        self,
        model: str,
        asks: BinaryIO,
        answers: BinaryIO,
        process: "subprocess.Popen[bytes] | None" = None,
    ) -> None:
        self._model = model
        self._asks, self._answers = asks, answers
        self._process = process
        """Where it is a child of our own."""
        self.owed: deque[int] = deque()
        """Numbers of the questions."""

    def fileno(self) -> int:
        """What becomes readable with an answer."""
        return self._answers.fileno()

    def ask(self, question: local.Ask, number: int = 0) -> None:
        self.owed.append(number)
        try:
            local.write_message(self._asks, question)
        except BrokenPipeError:
            self._complain()

    def answer(self) -> Any:
        """The oldest answer that is owed. Raises `Refused` and `WorkerEnded`."""
        answer = local.read_message(self._answers, local.Answer)
        if answer is None:
            self._complain()
        self.owed.popleft()
        if isinstance(answer, local.Failure):
            raise Refused(answer.problem)
        return answer

    def close(self) -> None:
        """Let it end by itself, or end it where it is in the middle of something."""
        with contextlib.suppress(OSError):
            self._asks.close()
        self._answers.close()
        if self._process is not None:
            _end(self._process, now=bool(self.owed))

    def _complain(self) -> NoReturn:
        raise WorkerEnded(
            f"the process that scans {self._model} has ended: what it has written above says why"
        )


class LocalWorkers:
    """Where the processes of this machine's scans come from, for several checkpoints at once.

    Where it can be (Linux), imports are made once, by a process that forks the others; `start` begins with
    them before anything is asked. Elsewhere every process makes its own. A context manager.
    """

    def __init__(self, *, forks: bool = sys.platform == "linux") -> None:
        self._forks = forks
        self._forge: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._store: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to import. Raises `WorkerMissing`."""
        if self._forks:
            self._forging()

    def _forging(self) -> socket.socket:
        """Where the process is asked that forks the others."""
        if self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, contextlib.ExitStack() as unless_started:
                unless_started.enter_context(ours)
                end = theirs.fileno()
                self._forge = _started("worker.forge", str(end), pass_fds=[end])
                unless_started.pop_all()
            self._socket = ours
        return self._socket

    def lanes(self, model: str, *, count: int, threads: int) -> list[_Lane]:
        """Processes for one checkpoint. The first must have it in memory before the others answer.

        Raises `WorkerMissing`, `WorkerEnded`.
        """
        if self._store is None:
            # What one has calibrated the others read.
            self._store = tempfile.TemporaryDirectory(
                prefix="neural-mri-store-", ignore_cleanup_errors=True
            )
        if not self._forks:
            arguments = ["--store", self._store.name, "--threads", str(threads), model]
            return [_spawned(model, arguments) for _ in range(count)]
        wanted = local.Open(model=model, store=self._store.name, threads=threads)
        return self._forked(wanted, count)

    def _forked(self, wanted: local.Open, count: int) -> list[_Lane]:
        forge = self._forging()
        pipes = [(os.pipe(), os.pipe()) for _ in range(count)]
        theirs = [end for asks, answers in pipes for end in (asks[0], answers[1])]
        try:
            socket.send_fds(forge, [msgspec.msgpack.encode(wanted)], theirs)
        except OSError as error:
            for asks, answers in pipes:
                os.close(asks[1])
                os.close(answers[0])
            raise WorkerEnded(
                "the process that was to start others has ended: what it has written above says why"
            ) from error
        finally:
            for end in theirs:
                os.close(end)
        return [
            _Lane(wanted.model, os.fdopen(asks[1], "wb"), os.fdopen(answers[0], "rb", 0))
            for asks, answers in pipes
        ]

    def close(self) -> None:
        """End all processes."""
        if self._socket is not None:
            self._socket.close()
        if self._forge is not None:
            _end(self._forge, now=True)
        if self._store is not None:
            self._store.cleanup()
        self._socket = self._forge = self._store = None


class LocalScans:
    """One checkpoint, a folder of safetensors or a name of the embedded set-up's model store.

    Its processes start with the first question and end with `close`; use it as a context manager. One
    question is asked at a time: what is left of a scan's results must be let go before the next.
    """

    def __init__(
        self,
        model: str,
        *,
        processes: int | None = None,
        threads: int | None = None,
        records: Records | None = None,
        workers: LocalWorkers | None = None,
    ) -> None:
        """Name a checkpoint; nothing is started yet.

        Args:
            model: A folder, or a name.
            processes: How many scan the checkpoint; two where it is small and there are cores for them.
            threads: Threads of each; the cores, shared out.
            records: Where checkpoints that were seen before are known by their files' contents, so that
                no process has to open them.
            workers: Where its processes come from; its own where left out.

        Raises `ValueError` for more processes than one checkpoint may have.
        """
        if processes is not None and not 1 <= processes <= local.MOST_PROCESSES:
            raise ValueError(
                f"processes is {processes}: expected 1 to {local.MOST_PROCESSES}, or None"
            )
        self._records = records
        self._model = _absolute(model)
        self._count = processes or _processes(self._model)
        self._threads = threads or max(1, (os.cpu_count() or 1) // self._count)
        self._workers = workers or LocalWorkers()
        self._owns_workers = workers is None
        self._lanes: list[_Lane] = []
        self._prepared = False

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
        self._part()
        if self._owns_workers:
            self._workers.close()

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
        """What each scan measured, in their order. Raises `Refused` where the scanner says no.

        Scans that stand together and may share a forward do. Whichever process is done has the next.
        """
        with self._asking() as lanes:
            self._prepare(lanes)
            waiting = deque(enumerate(_questions(scans)))
            found: dict[int, tuple[local.Measured | local.Failure, ...]] = {}
            n_given, n_questions = 0, len(waiting)
            while n_given < n_questions:
                for owed in range(AHEAD):
                    for lane in lanes:
                        if (
                            waiting
                            and len(lane.owed) <= owed
                            and (not owed or _is_small(waiting[0][1]))
                        ):
                            number, question = waiting.popleft()
                            lane.ask(question, number)
                if n_given in found:
                    yield from map(_scanned, found.pop(n_given))
                    n_given += 1
                    continue
                busy = [lane for lane in lanes if lane.owed]
                for lane in select.select(busy, (), ())[0]:
                    number = lane.owed[0]
                    found[number] = lane.answer().results

    def _asked(self, question: local.Ask) -> Any:
        with self._asking() as [first, *_]:
            first.ask(question)
            return first.answer()

    def _prepare(self, lanes: Sequence[_Lane]) -> None:
        """Have the checkpoint in memory of all processes."""
        if self._prepared:
            return
        for lane in lanes:
            lane.ask(local.Prepare())
        for lane in lanes:
            lane.answer()
        self._prepared = True

    @contextlib.contextmanager
    def _asking(self) -> Iterator[list[_Lane]]:
        """All processes, for one question; those are let go whose answers nobody has waited for.

        Whoever asked them next would take the answers for his own.
        """
        if not self._lanes:
            self._lanes = self._workers.lanes(self._model, count=self._count, threads=self._threads)
        lanes = self._lanes
        if _owe(lanes):
            raise RuntimeError(
                f"{self._model} is still asked something else: expected one at a time"
            )
        try:
            yield lanes
        finally:
            if _owe(lanes) and lanes is self._lanes:
                self._part()

    def _part(self) -> None:
        """Let the processes go."""
        for lane in self._lanes:
            lane.close()
        self._lanes = []
        self._prepared = False


def _owe(lanes: Sequence[_Lane]) -> bool:
    return any(lane.owed for lane in lanes)


def _questions(scans: Sequence[Scan]) -> Iterator[local.Scans]:
    """The scans in their order, those together that may share a forward."""
    for shared, alike in groupby(scans, key=lambda scan: scan.shared_forward):
        bodies = [encode_scan(scan) for scan in alike]
        width = 1 if shared is None else MOST_TOGETHER
        for start in range(0, len(bodies), width):
            yield local.Scans(scans=tuple(bodies[start : start + width]))


def _is_small(question: local.Scans) -> bool:
    return sum(map(len, question.scans)) < MOST_AHEAD_BYTES


def _scanned(result: local.Measured | local.Failure) -> Scanned:
    if isinstance(result, local.Failure):
        raise Refused(result.problem)
    tables = {name: from_ipc(body) for name, body in result.tables.items()}
    return Scanned(result.scan_key, tables)


def _spawned(model: str, arguments: Sequence[str]) -> _Lane:
    """A process that makes its own imports."""
    process = _started("worker.local", *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return _Lane(model, cast("BinaryIO", process.stdin), cast("BinaryIO", process.stdout), process)


def _started(module: str, *arguments: str, **how: Any) -> "subprocess.Popen[bytes]":
    # Without a buffer of our own: what has come is known by asking for what is readable.
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], cwd=_tree(), bufsize=0, **how
    )


def _end(process: "subprocess.Popen[bytes]", *, now: bool) -> None:
    if now:
        process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


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
