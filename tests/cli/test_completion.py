"""Tab in a real shell: commands, options and values complete, with no service anywhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
eval "$(_NEURAL_MRI_COMPLETE=source_bash neural-mri)"
for typed in "sess" "users l" "sessions share --access f"; do
    COMP_WORDS=(neural-mri $typed)
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _neural_mri_completion neural-mri
    echo "${COMPREPLY[@]}"
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="about bash")
def test_bash_completes_commands_subcommands_and_values(tmp_path: Path) -> None:
    program = tmp_path / "neural-mri"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m neural_mri.cli "$@"\n')
    program.chmod(0o755)
    said = subprocess.run(
        ["bash", "-c", SCRIPT],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "NMRI_URL": "http://127.0.0.1:9",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert [sorted(line.split()) for line in said.stdout.splitlines()] == [
        ["sessions"],
        ["limit", "list"],
        ["fork"],
    ]
