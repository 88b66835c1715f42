"""What can be said of `make` without installing anything."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREREQUISITES = ROOT / "deploy" / "embedded" / "prerequisites.sh"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH of its own, with what the script itself needs and nothing else."""
    for name in ("id", "df", "awk", "sh"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / name).symlink_to(found)
    return tmp_path


def program(path: Path, name: str, script: str) -> None:
    (path / name).write_text(f"#!/bin/sh\n{script}\n")
    (path / name).chmod(0o755)


def check(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(PREREQUISITES), *arguments],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def refusal(path: Path, *arguments: str) -> str:
    """The one sentence."""
    refused = check(path, *arguments)
    assert refused.returncode == 1
    assert refused.stdout == ""
    (sentence,) = refused.stderr.splitlines()
    assert sentence.startswith("neural-mri: ")
    return sentence


def test_without_python_it_is_said(path: Path) -> None:
    assert "Python 3.11 or newer" in refusal(path, "python")


def test_an_old_python_is_passed_over(path: Path) -> None:
    program(path, "python3", "exit 1")
    program(path, "python3.12", f'exec {sys.executable} "$@"')
    assert check(path, "python").stdout == "python3.12\n"


def test_a_named_python_that_will_not_do_is_named_back(path: Path) -> None:
    program(path, "python2", "exit 1")
    assert "PYTHON=python2" in refusal(path, "python", "python2")


def test_without_node_it_is_said(path: Path) -> None:
    assert "Node.js was not found" in refusal(path, "node")


def test_an_old_node_is_refused_with_its_version(path: Path) -> None:
    program(path, "node", '[ "$1" = --version ] && echo v18.19.0')
    program(path, "npm", "exit 0")
    assert "Node.js is v18.19.0" in refusal(path, "node")


def test_a_full_disk_is_refused_with_both_figures(path: Path, tmp_path: Path) -> None:
    assert "the installation needs 999999999 MB" in refusal(
        path, "space", str(tmp_path), "999999999"
    )
    assert check(path, "space", str(tmp_path), "1").returncode == 0


def test_a_browser_that_is_there_is_enough(path: Path) -> None:
    program(path, "chromium", "exit 0")
    assert check(path, "chromium").returncode == 0


@pytest.mark.skipif(os.getuid() == 0, reason="root installs it instead")
def test_without_a_browser_it_is_said(path: Path) -> None:
    assert "Chromium was not found" in refusal(path, "chromium")


def test_every_target_is_explained() -> None:
    listed = subprocess.run(
        ["make", "--silent", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"make ([a-z-]+) ", listed) == [
        "help",
        "up",
        "test",
        "test-cluster",
        "check",
        "bench",
        "chaos",
        "fuzz",
        "audit",
        "docs",
        "bench-web",
        "clean",
    ]


def test_ci_runs_what_a_person_runs() -> None:
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"


def test_constraints_are_exact_and_come_from_anywhere() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert "torch==2.13.0" in pins
