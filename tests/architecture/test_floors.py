"""The floors hold, and the checks that say so can fail."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("neural_mri", "api", "worker", "deploy")

BREACHES = {
    "floors": ("neural_mri/contract/jobs.py", "import neural_mri.backing.settings"),
    "contract-is-pure": ("neural_mri/contract/jobs.py", "import httpx"),
    "scanner-knows-tensors-only": (
        "worker/scanner/__init__.py",
        "import neural_mri.backing.settings",
    ),
    "no-torch-outside-the-worker": ("api/__init__.py", "import torch"),
    "diagnostics-read-tables": ("neural_mri/diagnostics/__init__.py", "import httpx"),
    "client-stands-alone": ("neural_mri/client/__init__.py", "import neural_mri.backing.settings"),
}
"""For each contract, one line that must break it."""

APPLICATIONS_APART = ("api/__init__.py", "import worker")


def contracts() -> dict[str, str]:
    """Name of each contract by its id."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {c["id"]: c["name"] for c in document["tool"]["importlinter"]["contracts"]}


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as c; c()",
            "--no-cache",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy_of_the_house(tmp_path: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_has_a_breach_that_is_tried() -> None:
    assert set(contracts()) == set(BREACHES)


def test_the_house_keeps_its_contracts() -> None:
    report = lint_imports(ROOT)
    assert report.returncode == 0, report.stdout + report.stderr


@pytest.mark.parametrize(
    ("contract", "file", "line"),
    [(contract, *breach) for contract, breach in BREACHES.items()]
    + [("floors", *APPLICATIONS_APART)],
)
def test_a_breach_is_noticed(copy_of_the_house: Path, contract: str, file: str, line: str) -> None:
    target = copy_of_the_house / file
    target.write_text(target.read_text() + f"\n{line}\n")
    report = lint_imports(copy_of_the_house)
    assert report.returncode == 1, report.stdout + report.stderr
    assert f"{contracts()[contract]} BROKEN" in " ".join(report.stdout.split())
