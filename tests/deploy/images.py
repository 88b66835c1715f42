"""What a recipe's image holds, without an engine that builds it: its last stage's files, packages, variables, user.

Files are copied as `COPY` says. Of the packages that this machine has, those are shown that `pip install` would bring:
nothing else can be imported. Nothing is downloaded; the interpreter is this one, whatever `FROM` names.
"""

import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = (
    "PACKAGES",
    "RECIPES",
    "Image",
    "client_image",
    "instructions",
    "interpreter",
    "recipe_image",
)

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
PACKAGES = "/packages"
"""Where this machine's packages lie in a container; on its path are links to some of them."""
_VIEWER = ("/viewer/dist", ROOT / "web/dist")
"""What the viewer's stage makes, and where `make` does."""


class Image(NamedTuple):
    """What a container is made of."""

    files: dict[str, Path]
    """Folders of this machine, by their paths in the container: nobody changes them there."""
    environment: dict[str, str]
    user: int
    folder: str = "/"
    """Where commands begin."""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """A recipe's steps."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", recipe.read_text(), flags=re.MULTILINE))
    return [
        (line.partition(" ")[0], line.partition(" ")[2].strip())
        for line in text.splitlines()
        if line.strip()
    ]


def recipe_image(recipe: Path, folder: Path) -> Image:
    """The image of a recipe, with its files under a folder."""
    steps = _last_stage(recipe)
    said = {name: rest for name, rest in steps if name in {"USER", "WORKDIR", "CMD"}}
    user, group = said["USER"].split(":")
    assert user == group
    _files_of(steps, folder / "tree")
    _packages_of(_installed(recipe), folder / "venv", said["WORKDIR"])
    return Image(
        files={said["WORKDIR"]: folder / "tree", "/venv": folder / "venv"},
        environment=_environment_of(steps),
        user=int(user),
        folder=said["WORKDIR"],
        command=tuple(re.findall(r'"([^"]*)"', said["CMD"])),
    )


def client_image(folder: Path) -> Image:
    """Somebody's own machine, after `pip install neural-mri`: the client and the command."""
    _copy(ROOT / "neural_mri", folder / "tree/neural_mri", into=False)
    _packages_of(_with_needs(_project(())), folder / "venv", "/app")
    path = {"PATH": "/venv/bin:/usr/bin:/bin", "HOME": "/tmp"}  # noqa: S108 -- its own
    return Image({"/app": folder / "tree", "/venv": folder / "venv"}, path, user=10001)


def interpreter() -> Path:
    """This machine's Python, outside environments."""
    return Path(os.path.realpath(sys.executable))


def _last_stage(recipe: Path) -> list[tuple[str, str]]:
    steps = instructions(recipe)
    return steps[max(index for index, (name, _) in enumerate(steps) if name == "FROM") :]


def _environment_of(steps: Iterable[tuple[str, str]]) -> dict[str, str]:
    """What `ENV` sets."""
    given = (pair for name, rest in steps if name == "ENV" for pair in rest.split())
    return dict(pair.split("=", 1) for pair in given)


def _files_of(steps: Iterable[tuple[str, str]], tree: Path) -> None:
    """Copy what `COPY` does."""
    tree.mkdir(parents=True)
    for name, rest in steps:
        if name != "COPY":
            continue
        *sources, target = rest.split()
        if sources[0].startswith("--from="):
            _, source = sources
            if source == _VIEWER[0] and _VIEWER[1].is_dir():
                shutil.copytree(_VIEWER[1], tree / target)
            else:
                assert source in {"/venv", _VIEWER[0]}, rest
            continue
        for source in sources:
            _copy(ROOT / source, tree / target, into=target.endswith("/"))


def _copy(source: Path, target: Path, *, into: bool) -> None:
    if source.is_dir():  # with what has been compiled of it: the recipes compile all
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        target = target / source.name if into else target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _installed(recipe: Path) -> Iterator[str]:
    """What `pip install` is asked for, and what comes with it."""
    for name, rest in instructions(recipe):
        if name != "RUN" or "pip install" not in rest:
            continue
        for extras in re.findall(r"--editable '\.\[([\w,]+)\]'", rest):
            yield from _with_needs(_project(extras.split(",")))
        for name_alone in re.findall(r"--no-deps ([\w.-]+)==", rest):
            yield canonicalize_name(name_alone)


def _project(extras: Iterable[str]) -> list[Requirement]:
    """What the project needs, with these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    return [Requirement(written) for group in groups for written in group]


def _with_needs(wanted: Iterable[Requirement]) -> set[str]:
    """The names of everything that is installed for these."""
    names, left, done = set[str](), list(wanted), set[tuple[str, str]]()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name == "neural-mri":
            left += _project(requirement.extras)
            continue
        extras = {"", *requirement.extras}
        names.add(name)
        for extra in {extra for extra in extras if (name, extra) not in done}:
            done.add((name, extra))
            for written in distribution(name).requires or ():
                needed = Requirement(written)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    left.append(needed)
    return {name for name in names if name != "neural-mri"}


def _packages_of(names: Iterable[str], venv: Path, *paths: str) -> None:
    """An environment in which nothing but these can be imported, and what lies at these paths."""
    site = venv / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    site.mkdir(parents=True)
    (venv / "bin").mkdir()
    (venv / "bin/python").symlink_to(interpreter())
    (venv / "pyvenv.cfg").write_text(f"home = {interpreter().parent}\n")
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, place in ours.items():
        module, _, function = place.partition(":")
        program = f"#!/venv/bin/python\nimport sys\nfrom {module} import {function}\n"
        (venv / "bin" / name).write_text(f"{program}sys.exit({function}())\n")
        (venv / "bin" / name).chmod(0o755)
    (site / "neural-mri.pth").write_text("".join(f"{path}\n" for path in paths))
    for name in names:
        record = distribution(name).read_text("RECORD")
        assert record, name
        tops = {re.split("[/,]", line, maxsplit=1)[0] for line in record.splitlines()}
        for top in tops - {"..", "__pycache__", ""}:
            if not (site / top).is_symlink():
                (site / top).symlink_to(f"{PACKAGES}/{top}")
