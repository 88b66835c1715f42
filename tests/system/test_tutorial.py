"""The tutorial, as a new user follows it: every command as it is printed, and what it is said to print."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.system.service import ROOT, Service

TUTORIAL = (ROOT / "docs/tutorial.md").read_text()
# Where `make up` has said that it listens, if nobody chose another port.
USUAL_ADDRESS = "localhost:8642"


class Step(NamedTuple):
    """A block to be typed, and the lines that it is said to print among others."""

    language: str
    typed: str
    remark: str
    """`elsewhere`: typed in another terminal. `fails`: refused, which is the point."""
    printed: list[str]


def steps() -> Iterator[Step]:
    block = re.compile(
        r"(?:<!-- (?P<remark>\w+) -->\n)?```(?P<language>sh|python)\n(?P<typed>.*?)```\n"
        r"(?:\n```text\n(?P<printed>.*?)```)?",
        re.DOTALL,
    )
    for found in block.finditer(TUTORIAL):
        printed = (found["printed"] or "").splitlines()
        yield Step(found["language"], found["typed"], found["remark"] or "", printed)


def words(line: str) -> str:
    return " ".join(line.split())


@pytest.fixture
def terminal(tmp_path: Path, service: Service) -> tuple[Path, dict[str, str]]:
    """A folder with the environment that `make up` makes, and a shell that knows nothing else."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    environment = {
        name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ
    }
    address = f"http://{service.settings.host}:{service.settings.port}"
    return tmp_path, environment | {"NMRI_URL": address, "COLUMNS": "120"}


def test_every_command_works_as_printed(
    terminal: tuple[Path, dict[str, str]], service: Service
) -> None:
    folder, environment = terminal
    here = f"localhost:{service.settings.port}"
    exported = ""
    followed = [step for step in steps() if step.remark != "elsewhere"]
    assert len(followed) > 7
    for step in followed:
        typed = step.typed.replace(USUAL_ADDRESS, here)
        if step.language == "python":
            typed = f"python - <<'END'\n{typed}END\n"
        ran = subprocess.run(
            ["bash", "-o", "pipefail", "-e", "-c", exported + typed],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        said = ran.stdout + ran.stderr
        assert (ran.returncode != 0) == (step.remark == "fails"), f"{step.typed}\n{said}"
        exported += "".join(
            f"{line}\n" for line in step.typed.splitlines() if line.startswith("export ")
        )
        left = [words(line) for line in said.splitlines()]
        for expected in map(words, step.printed):
            at = next((at for at, line in enumerate(left) if expected in line), None)
            assert at is not None, f"{step.typed}\nshould print {expected!r}, and prints\n{said}"
            del left[: at + 1]


def test_what_is_typed_in_the_other_terminal_is_a_target_of_the_makefile() -> None:
    [elsewhere] = [step.typed.strip() for step in steps() if step.remark == "elsewhere"]
    dry = subprocess.run(
        [*elsewhere.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "deploy.embedded" in dry.stdout
