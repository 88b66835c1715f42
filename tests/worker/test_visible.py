"""The one GPU of several that a process is to see. No GPU is needed: it is a matter of the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neural_mri.backing.settings import InvalidSettings, Settings
from worker.visible import choose_gpu

ROOT = Path(__file__).parents[2]
VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("device", "given", "seen"),
    [
        ("cuda:1", None, "1"),
        ("cuda:1", "4,5", "5"),
        ("cuda:0", "GPU-8932f937, GPU-1a2b3c4d", "GPU-8932f937"),
        ("cuda", "4,5", "4,5"),
        ("auto", None, None),
        ("cpu", "4", "4"),
    ],
)
def test_a_gpu_is_counted_among_those_that_the_process_was_given(
    monkeypatch: pytest.MonkeyPatch, device: str, given: str | None, seen: str | None
) -> None:
    monkeypatch.setenv(VISIBLE, "to be put back")
    if given is None:
        monkeypatch.delenv(VISIBLE)
    else:
        monkeypatch.setenv(VISIBLE, given)
    choose_gpu(Settings(device=device))
    assert os.environ.get(VISIBLE) == seen


@pytest.mark.parametrize(
    ("device", "given", "said"),
    [
        ("cuda:1", "4", "gives this process 1"),
        ("cuda:0", "", "gives this process none"),
        ("cuda:1", "4,-1,5", "gives this process 1"),
        ("cuda:one", None, "'cuda:one': expected cuda:N"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, given: str | None, said: str
) -> None:
    monkeypatch.setenv(VISIBLE, given or "")
    if given is None:
        monkeypatch.delenv(VISIBLE)
    with pytest.raises(InvalidSettings, match=said):
        choose_gpu(Settings(device=device))
    assert os.environ.get(VISIBLE) == given


@pytest.mark.parametrize(
    "command", [["worker"], ["worker.local", "a-folder"], ["worker.forge", "3"]], ids=" ".join
)
def test_every_process_that_computes_asks_for_its_own(command: list[str], tmp_path: Path) -> None:
    given = {"NEURAL_MRI_DEVICE": "cuda:1", "NEURAL_MRI_DATA_DIR": str(tmp_path), VISIBLE: "4"}
    process = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **given},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert process.returncode == 1
    assert "NEURAL_MRI_DEVICE=cuda:1" in process.stderr
