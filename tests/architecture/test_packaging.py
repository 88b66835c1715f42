"""What each process and each user has to install."""

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

TORCH_STACK = {"accelerate", "torch", "transformer-lens", "transformers"}
SERVER_SIDE = {"celery", "kombu", "litestar", "redis", "sqlalchemy"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirement: Requirement) -> set[str]:
    """Names of everything a requirement brings, by the metadata of what is installed."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [requirement]
    while waiting:
        wanted = waiting.pop()
        key = (canonical(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            requires = metadata.distribution(wanted.name).requires or []
        except metadata.PackageNotFoundError:
            continue
        for line in requires:
            further = Requirement(line)
            extras = wanted.extras or {""}
            if further.marker is None or any(
                further.marker.evaluate({"extra": extra}) for extra in extras
            ):
                waiting.append(further)
    return {name for name, _ in seen}


def test_the_api_environment_has_no_torch() -> None:
    installed = closure(Requirement("neural-mri[api]"))
    assert {"litestar", "redis", "sqlalchemy"} <= installed
    assert not installed & TORCH_STACK


def test_a_client_needs_no_server_side_library() -> None:
    installed = closure(Requirement("neural-mri"))
    assert {"httpx", "pyarrow"} <= installed
    assert not installed & (TORCH_STACK | SERVER_SIDE)


def test_the_wheel_holds_the_library_alone(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--quiet",
            "--wheel-dir",
            tmp_path,
            ROOT,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packages = {Path(name).parts[0] for name in archive.namelist()}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"neural_mri"}


def test_api_and_worker_are_not_installed_anywhere() -> None:
    for name in ("api", "worker"):
        assert name not in metadata.packages_distributions()
