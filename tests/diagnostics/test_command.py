"""`neural-mri diagnose --local` and `neural-mri report`, as processes; and what CI templates make of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml

from neural_mri.contract.suites import Suite
from tests.diagnostics.making import as_toml, edited, saved

ROOT = Path(__file__).parents[2]


class World(NamedTuple):
    """Checkpoints and a suite, in files."""

    folder: Path
    main: Path
    broken: Path
    suite: Path

    def environment(self, **further: str) -> dict[str, str]:
        names = ("PATH", "HOME", "LANG", "OMP_NUM_THREADS", "VIRTUAL_ENV")
        own = {name: os.environ[name] for name in names if name in os.environ}
        return {**own, "NMRI_BASELINES": str(self.folder / "records"), "PYTHONUTF8": "1", **further}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "neural_mri.cli", *arguments],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, suite: Suite) -> World:
    folder = tmp_path_factory.mktemp("world")
    main = saved("llama", folder / "main")

    def zeroed(weights: Any) -> None:
        weights[:, :8] = 0

    broken = edited(main, folder / "broken", "model.layers.1.self_attn.o_proj.weight", zeroed)
    path = folder / "tiny.toml"
    path.write_text(as_toml(suite))
    return World(folder, main, broken, path)


def test_a_gate_fails_and_passes_and_a_baseline_is_measured_once(world: World) -> None:
    compared = ("diagnose", "tiny.toml", "--local", "--baseline", "main", "--out", "report")
    failed = world.run(*compared, "--model", "broken")
    assert failed.returncode == 1, failed.stderr
    assert "L1H0 is where the change begins" in failed.stdout
    assert "measured before" not in failed.stderr
    wrote = {path.name for path in (world.folder / "report").iterdir()}
    assert wrote == {f"diagnosis.{end}" for end in ("html", "md", "json", "junit.xml", "sarif")}
    diagnosis = msgspec.json.decode((world.folder / "report" / "diagnosis.json").read_bytes())
    assert diagnosis["findings"][0]["evidence"]["component"] == "blocks.1.attn.head_0"

    passed = world.run(*compared, "--model", "main")
    assert passed.returncode == 0, passed.stderr
    assert "main: measured before" in passed.stderr

    korean = world.run("report", "report/diagnosis.json", "--format", "md", "--language", "ko")
    assert korean.returncode == 0, korean.stderr
    assert "## 🟢 Neural MRI · 진단: 통과" in korean.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "nowhere"), "neither a folder of safetensors nor a model of the store"),
        ((), "--local needs --model"),
        (("--model", "main", "--baseline", "broken", "--profile", "loose"), "no profile 'loose'"),
    ],
)
def test_what_cannot_run_exits_with_2_and_says_why(
    world: World, arguments: tuple[str, ...], said: str
) -> None:
    answer = world.run("diagnose", "tiny.toml", "--local", *arguments)
    assert answer.returncode == 2, answer.stdout
    assert said in answer.stderr


def test_the_github_action_runs_as_the_shell_steps_it_contains(world: World) -> None:
    action = yaml.safe_load((ROOT / "deploy/ci/github/action.yml").read_text())
    given = {name: str(each.get("default", "")) for name, each in action["inputs"].items()}
    given |= {"model": "broken", "baseline": "main", "suite": "tiny.toml", "python": sys.executable}
    output, summary = world.folder / "output", world.folder / "summary"
    files = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
    codes = []
    for step in action["runs"]["steps"]:
        if "run" not in step:
            assert step["uses"].startswith("actions/")
            continue
        assert "${{" not in step["run"], "inputs reach the shell by its environment alone"
        environment = {name: filled(value, given) for name, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=world.folder,
            env=world.environment(**environment, **files),
            capture_output=True,
            text=True,
            check=False,
        )
        codes.append(done.returncode)
    assert codes == [0, 1], done.stderr
    assert output.read_text() == "outcome=failed\n"
    assert "L1H0 is where the change begins" in summary.read_text()
    assert (world.folder / given["out"] / "diagnosis.sarif").exists()


def filled(value: str, inputs: dict[str, str]) -> str:
    """What GitHub makes of an expression."""
    for name, given in inputs.items():
        value = value.replace(f"${{{{ inputs.{name} }}}}", given)
    return value.replace("${{ github.action_path }}", str(ROOT / "deploy/ci/github"))


def test_the_gitlab_template_runs_as_the_shell_steps_it_contains(world: World) -> None:
    job = yaml.safe_load((ROOT / "deploy/ci/gitlab/neural-mri.yml").read_text())[
        ".neural-mri-diagnose"
    ]
    variables = {name: str(value) for name, value in job["variables"].items()} | {
        "NMRI_MODEL": "main",
        "NMRI_SUITE": "tiny.toml",
        "NMRI_PYTHON": sys.executable,
        "NMRI_TREE": str(ROOT),
    }
    # A runner puts a job's lines into one shell, which ends with the first that fails.
    script = "\n".join(["set -eu", *job["before_script"], *job["script"]])
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=world.folder,
        env=world.environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (world.folder / job["artifacts"]["reports"]["junit"]).exists()
    assert job["artifacts"]["paths"] == [variables["NMRI_OUT"]]
    assert job["cache"]["paths"] == [variables["NMRI_BASELINES"]]
