"""One checkpoint scanned by a process of its own: no queue, no database, no HTTP, no port.

    python -m worker.local FOLDER_OR_NAME

Whoever starts it talks to it over standard input and output, in `contract.local`'s messages: what is the
checkpoint, what are its tokens, what do these scans measure. Scans run through `worker.scans`, those that can
in one forward as a service's do, so their numbers and keys are the service's. It ends when its input does.
`worker.forge` forks such processes, ready to scan.
"""

import argparse
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import torch
from tokenizers import Tokenizer

from neural_mri.backing import database, logs, models
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.records import Job, new_id
from neural_mri.backing.settings import InvalidSettings, Settings, load_settings
from neural_mri.backing.storage import FolderStore
from neural_mri.contract.baselines import Subject, named_after
from neural_mri.contract.jobs import JobKind, JobState, Lane
from neural_mri.contract.local import (
    Ask,
    Describe,
    Failure,
    Measured,
    Prepare,
    Results,
    Scans,
    Tokenize,
    Tokenized,
    Which,
    read_message,
    write_message,
)
from neural_mri.contract.problems import Problem, PromptTooLong, UnknownModel, Unprocessable
from neural_mri.contract.results import to_ipc
from neural_mri.contract.scan_keys import ANSWERS
from neural_mri.contract.scans import (
    PromptScan,
    Scan,
    TargetedScan,
    WeightScan,
    decode_scan,
    encode_scan,
)
from neural_mri.contract.tokens import Operands, Tokens, tokens_of
from worker import modelstore, scans
from worker.calibrations import Calibrations
from worker.residency import device_class
from worker.resident import Resident
from worker.scanner import bridging, conversion, loading, topology
from worker.scanner.listening import Silent
from worker.visible import choose_gpu

__all__ = ("LocalScanner", "opened", "registered_folder", "serve")

MOST_TOKENS = 2048
"""Read in one forward."""
_REFUSALS = (OSError, MemoryError, torch.OutOfMemoryError)
"""What goes wrong with a scan beside what the scanner refuses."""


def registered_folder(
    folder: Path, *, dtype: str = "float32", device: str = "cpu"
) -> RegisteredModel:
    """What the registry would say of a folder of safetensors. Raises `UnsupportedModel`."""
    skeleton = bridging.skeleton(bridging.read_configuration(folder))
    anatomy = topology.examine(skeleton)
    rows = topology.parameter_rows(skeleton, anatomy)
    made_from = conversion.origin(folder)
    return RegisteredModel(
        name=named_after(folder.name),
        source=f"folder:{folder.name}",
        folder=str(folder),
        revision=conversion.weights_digest(folder),
        tokenizer_digest=conversion.tokenizer_digest(folder),
        architecture=anatomy.architecture,
        n_parameters=sum(row.size for row in rows if not row.tied_to),
        weights_bytes=sum(file.stat().st_size for file in conversion.weight_files(folder)),
        quantization=made_from.quantization if made_from else None,
        numerics=loading.published_numerics(folder, dtype=dtype, device=device),
        wanted=True,
        registered_at=datetime.now(UTC),
    )


def registered_name(settings: Settings, name: str) -> RegisteredModel:
    """A model of the embedded set-up's store, brought there first where its source is known.

    Its folder is told whole, so that it can be found from anywhere. Raises `UnknownModel`.
    """
    settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    database.migrate(settings)
    sessions = database.sessions(settings)
    try:
        found = sessions.read(models.get, name)
    finally:
        sessions.close()
    if found is None or not (settings.models_dir / found.folder).is_dir():
        if name not in modelstore.KNOWN_SOURCES:
            raise UnknownModel(
                f"{name!r} is neither a folder of safetensors nor a model of the store in "
                f"{settings.folder}: expected a path, or a name that `python -m worker.modelstore list` "
                "shows",
                model=name,
            )
        found = modelstore.add(settings, name)
    return msgspec.structs.replace(found, folder=str(settings.models_dir / found.folder))


class LocalScanner:
    """One checkpoint, loaded when the first scan needs it. Not for several threads."""

    def __init__(self, registered: RegisteredModel, workshop: Path) -> None:
        self.registered = registered
        self._folder = Path(registered.folder)
        self._calibrations = Calibrations(FolderStore(workshop))
        self._loaded: Resident | None = None
        tokenizer = Tokenizer.from_file(str(self._folder / conversion.TOKENIZER_FILE))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @property
    def subject(self) -> Subject:
        """The checkpoint."""
        model = self.registered
        return Subject(
            model=model.name,
            revision=model.revision,
            tokenizer_digest=model.tokenizer_digest,
            numerics=model.numerics,
            family=model.architecture.family,
            n_layers=model.architecture.n_layers,
            n_heads=model.architecture.n_heads,
            n_parameters=model.n_parameters,
        )

    def prepare(self) -> None:
        """Have the checkpoint in memory before the first scan asks for it."""
        self._resident()

    def tokens(self, text: str) -> Tokens:
        """A text as the checkpoint reads it. Raises `PromptTooLong`."""
        tokens = tokens_of(self._tokenizer.encode(text), text)
        n_ctx = self.registered.architecture.n_ctx
        if len(tokens) > n_ctx:
            raise PromptTooLong(
                f"a prompt has {len(tokens)} tokens, {self.registered.name} reads {n_ctx} at most",
                n_tokens=len(tokens),
                limit=n_ctx,
            )
        return tokens

    def scan(self, bodies: Sequence[bytes]) -> list[Measured | Failure]:
        """What became of each scan, in their order. Those that may share a forward do."""
        found: dict[int, Measured | Failure] = {}
        alike: defaultdict[tuple[object, int], list[_Asked]] = defaultdict(list)
        for index, body in enumerate(bodies):
            try:
                asked = self._understood(index, body)
            except Problem as problem:
                found[index] = Failure(problem=problem.document())
                continue
            shared = asked.scan.shared_forward
            alike[(shared or index, asked.job.n_tokens)].append(asked)
        for (_, n_tokens), group in alike.items():
            rows = max(1, MOST_TOKENS // max(1, n_tokens))
            for start in range(0, len(group), rows):
                found.update(self._performed(group[start : start + rows]))
        return [found[index] for index in range(len(bodies))]

    def _understood(self, place: int, body: bytes) -> "_Asked":
        """A scan and what the queue would have had of it. Raises what the scanner refuses."""
        scan = decode_scan(body)
        scan.check(self.registered.architecture)
        scan = msgspec.structs.replace(scan, model=self.registered.name)
        tokens = self.tokens(scan.prompt) if isinstance(scan, PromptScan) else None
        job = _job(self.registered, encode_scan(scan), tokens, self._operands(scan))
        return _Asked(place, scan, job)

    def _performed(self, group: "Sequence[_Asked]") -> "dict[int, Measured | Failure]":
        """What became of scans that share a forward, or of one."""
        scan = group[0].scan
        done: Sequence[scans.Performed]
        try:
            done = scans.perform(
                [asked.job for asked in group],
                self.registered,
                self._resident() if scan.needs_loaded_model else None,
                baseline=self._baseline(scan),
                calibrations=self._calibrations,
                models_dir=self._folder.parent,
                listeners=[Silent()] * len(group),
            )
        except Problem as problem:
            done = [problem] * len(group)
        except _REFUSALS as error:
            done = [_refusal(error)] * len(group)
        return {asked.place: _told(one) for asked, one in zip(group, done, strict=True)}

    def _baseline(self, scan: object) -> RegisteredModel | None:
        if not isinstance(scan, WeightScan) or scan.baseline is None:
            return None
        return registered_folder(Path(scan.baseline).resolve())

    def _operands(self, scan: object) -> Operands:
        prompts = {text: self.tokens(text) for text in getattr(scan, "other_prompts", ())}
        ids: dict[str, int] = {}
        if isinstance(scan, TargetedScan):
            for name in ANSWERS:
                token = getattr(scan, name)
                if isinstance(token, str):
                    found = self._tokenizer.encode(token, add_special_tokens=False).ids
                    if len(found) != 1:
                        raise Unprocessable(
                            f"{name} {token!r} is {len(found)} tokens: expected one"
                        )
                    ids[name] = found[0]
                elif token is not None:
                    ids[name] = token
        return Operands(prompts=prompts, token_ids=ids)

    def _resident(self) -> Resident:
        if self._loaded is None:
            model = loading.load(self._folder, self.registered.numerics)
            self._loaded = Resident(self.registered, model, model.memory_bytes)
        return self._loaded


class _Asked(NamedTuple):
    """A scan among those that came with it."""

    place: int
    scan: Scan
    job: Job


def _told(done: scans.Performed) -> Measured | Failure:
    if isinstance(done, scans.Scanned):
        return Measured(
            scan_key=done.manifest.scan_key,
            tables={name: to_ipc(table) for name, table in done.tables.items()},
        )
    if isinstance(done, Problem):
        return Failure(problem=done.document())
    raise done


def _refusal(error: BaseException) -> Problem:
    return Unprocessable(f"{type(error).__name__}: {error}")


def _job(model: RegisteredModel, request: bytes, tokens: Tokens | None, operands: Operands) -> Job:
    """The scan as the queue would have had it."""
    return Job(
        id=new_id(),
        owner="local",
        kind=JobKind.SCAN,
        state=JobState.RUNNING,
        model=model.name,
        revision=model.revision,
        queue="",
        lane=Lane.BATCH,
        request=request,
        tokens=tokens,
        operands=operands,
        n_tokens=len(tokens) if tokens else 0,
        scan_key=None,
        batch_key="",
        virtual_start=0.0,
        estimated_cost=0.0,
        attempt=1,
        lease_owner=None,
        lease_until=None,
        cancel_requested=False,
        deadline_seconds=0.0,
        cached=False,
        manifest=None,
        reusable=True,
        problem=None,
        leader=None,
        traceparent=None,
        created_at=datetime.now(UTC),
        started_at=None,
        finished_at=None,
    )


def _answer(scanner: LocalScanner, asked: Ask) -> Describe | Tokenized | Results:
    match asked:
        case Tokenize(texts=texts):
            return Tokenized(tokens=tuple(map(scanner.tokens, texts)))
        case Scans(scans=bodies):
            return Results(results=tuple(scanner.scan(bodies)))
        case Prepare():
            scanner.prepare()
            return Describe(subject=scanner.subject)
        case Which():
            return Describe(subject=scanner.subject)


def serve(
    open_scanner: Callable[[], LocalScanner],
    asks: BinaryIO,
    answers: BinaryIO,
    *,
    until_prepared: bool = False,
) -> LocalScanner | None:
    """Answer until the input ends. What goes wrong with one question is that question's answer.

    With `until_prepared` no further than that: the scanner, the checkpoint in its memory. None at the end.
    """
    scanner: LocalScanner | None = None
    while (asked := read_message(asks, Ask)) is not None:
        try:
            scanner = scanner or open_scanner()
            answer: Describe | Tokenized | Results | Failure = _answer(scanner, asked)
        except Problem as problem:
            answer = Failure(problem=problem.document())
        except _REFUSALS as error:
            answer = Failure(problem=_refusal(error).document())
        write_message(answers, answer)
        if until_prepared and isinstance(asked, Prepare) and isinstance(answer, Describe):
            return scanner
    return None


def opened(settings: Settings, model: str, store: Path) -> LocalScanner:
    """A checkpoint, by its folder or its name. Raises the `Problem` of one that is not there."""
    path = Path(model).expanduser()
    registered = (
        registered_folder(path.resolve(), dtype=settings.dtype, device=device_class(settings))
        if path.is_dir()
        else registered_name(settings, model)
    )
    return LocalScanner(registered, store)


def main(arguments: list[str] | None = None) -> int:
    """Serve one checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m worker.local")
    parser.add_argument("model", help="a folder of safetensors, or the name of a registered model")
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if left out")
    parser.add_argument("--store", type=Path, help="where calibrations are kept for others to read")
    given = parser.parse_args(arguments)
    # Nothing else may write where answers go.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        settings = load_settings()
        choose_gpu(settings)
    except InvalidSettings as error:
        sys.stderr.write(f"neural-mri: {error}\n")
        return 1
    logs.configure(settings, process="local")
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="neural-mri-local-") as own:
        store = given.store or Path(own)
        serve(lambda: opened(settings, given.model, store), sys.stdin.buffer, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
