"""`neural-mri diagnose --local` and `neural-mri report`, as processes; and what CI templates make of them."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import typer
import yaml

from neural_mri.cli import diagnose as command
from neural_mri.contract.suites import Suite
from tests.deploy.hosts import Host, host
from tests.diagnostics.making import as_toml, edited, saved

ROOT = Path(__file__).parents[2]


@pytest.fixture
def code_host() -> Iterator[Host]:
    with host() as opened:
        yield opened


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
        (("--model", ""), "--model is empty"),
        (("--model", "main", "--baseline", ""), "--baseline is empty"),
        (("--model", "main", "--records", "tiny.toml/none"), "Not a directory"),
        (("--model", "main", "--baseline", "broken", "--profile", "loose"), "no profile 'loose'"),
    ],
)
def test_what_cannot_run_exits_with_2_and_says_why(
    world: World, arguments: tuple[str, ...], said: str
) -> None:
    answer = world.run("diagnose", "tiny.toml", "--local", *arguments)
    assert answer.returncode == 2, answer.stdout
    assert said in answer.stderr


@pytest.mark.parametrize("gone", ["reader", "room"])
@pytest.mark.parametrize(("model", "code"), [("main", 0), ("broken", 1)])
def test_the_gates_are_told_by_the_exit_code_though_nobody_reads_or_a_disk_is_full(
    world: World, gone: str, model: str, code: int
) -> None:
    if gone == "reader":
        unread, to = os.pipe()
        os.close(unread)
    else:
        to = os.open("/dev/full", os.O_WRONLY)
    arguments = ("diagnose", "tiny.toml", "--local", "--model", model, "--baseline", "main")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "neural_mri.cli", *arguments],
            cwd=world.folder,
            env=world.environment(NMRI_BASELINES=str(world.folder / "unread")),
            stdout=to,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(to)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def mark_of(name: str) -> str:
    """What tells a gate's name from others that are written alike."""
    return hashlib.sha256(name.encode()).hexdigest()[:8]


class Ran(NamedTuple):
    """A job of the action: the exit code of each shell step, and what of it ran."""

    codes: list[int]
    steps: list[str]
    said: str
    outputs: dict[str, dict[str, str]]
    """What each step told the others."""


def run_action(world: World, given: dict[str, str], code_host: Host) -> Ran:
    """The action's steps one by one, as GitHub runs those of a composite action."""
    action = yaml.safe_load((ROOT / "deploy/ci/github/action.yml").read_text())
    defaults = {name: str(each.get("default", "")) for name, each in action["inputs"].items()}
    context = {f"inputs.{name}": value for name, value in {**defaults, **given}.items()}
    context |= {
        "github.action_path": str(ROOT / "deploy/ci/github"),
        "github.event.pull_request.number": "5",
        "github.event_name": "pull_request",
        "github.token": "secret",
    }
    output, summary = world.folder / "output", world.folder / "summary"
    for path in (output, summary):
        path.write_text("")
    files = {"GITHUB_OUTPUT": str(output), "GITHUB_STEP_SUMMARY": str(summary)}
    files |= {"GITHUB_API_URL": code_host.url, "GITHUB_REPOSITORY": "a/b"}
    codes, steps, said, failed = list[int](), list[str](), "", False
    told = dict[str, dict[str, str]]()
    for step in action["runs"]["steps"]:
        output.write_text("")
        if not holds(step.get("if", "success()"), context, failed=failed):
            continue
        steps.append(step["name"])
        if "run" not in step:
            assert step["uses"].partition("/")[0] in ("actions", "github")
            continue
        assert "${{" not in step["run"], "inputs reach the shell by its environment alone"
        environment = {name: filled(value, context) for name, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=world.folder,
            env=world.environment(**environment, **files),
            capture_output=True,
            text=True,
            check=False,
        )
        if outputs := dict(line.split("=") for line in output.read_text().splitlines()):
            told[step["id"]] = outputs
        context |= {f"steps.{step.get('id')}.outputs.{name}": outputs[name] for name in outputs}
        codes.append(done.returncode)
        said += done.stderr
        failed = failed or (done.returncode != 0 and not step.get("continue-on-error", False))
    return Ran(codes, steps, said, told)


def holds(condition: str, context: dict[str, str], *, failed: bool) -> bool:
    """What GitHub makes of a condition: of conjunctions and comparisons alone, which is all there is."""
    parts = condition.split(" && ")
    if parts[0] not in ("always()", "success()"):
        raise AssertionError(f"{condition!r} does not begin with whether earlier steps matter")
    told = [re.fullmatch(r"([\w.-]+) (==|!=) '(.*)'", part) for part in parts[1:]]
    assert all(told), condition
    return (parts[0] == "always()" or not failed) and all(
        (context.get(name, "") == value) == (sign == "==")
        for name, sign, value in (each.groups() for each in told if each)
    )


def filled(value: str, context: dict[str, str]) -> str:
    """What GitHub makes of an expression."""
    return re.sub(r"\$\{\{ ([\w.-]+) \}\}", lambda found: filled(context[found[1]], context), value)


AFTER = [
    "Keep measurements for later jobs",
    "Upload the report",
    "Show findings among code scanning's alerts",
    "Tell the pull request",
]


def test_the_github_action_runs_as_the_shell_steps_it_contains(
    world: World, code_host: Host
) -> None:
    given = {
        "model": "broken",
        "baseline": "main",
        "suite": "tiny.toml",
        "python": sys.executable,
        "comment": "true",
        "upload-sarif": "true",
    }
    ran = run_action(world, given, code_host)
    assert ran.codes == [0, 0, 1, 0], ran.said
    assert ran.steps[-4:] == AFTER, "what was measured and found is kept though the gate failed"
    assert ran.outputs == {
        "gate": {"slug": f"tiny.toml-broken-{mark_of('tiny.toml broken')}"},
        "diagnose": {"outcome": "failed", "reported": "true"},
    }
    assert "L1H0 is where the change begins" in (world.folder / "summary").read_text()
    assert (world.folder / "neural-mri-report" / "diagnosis.sarif").exists()
    (comment,) = code_host.comments
    assert re.match(r"<!-- neural-mri tiny\.toml_broken [0-9a-f]{8} -->\n", comment["body"])
    assert "L1H0 is where the change begins" in comment["body"]
    assert code_host.tokens == {"Bearer secret"}


def test_the_github_action_needs_no_rights_unless_asked_and_reports_nothing_where_nothing_ran(
    world: World, code_host: Host
) -> None:
    given = {"model": "nowhere", "suite": "tiny.toml", "python": sys.executable}
    ran = run_action(world, {**given, "comment": "true"}, code_host)
    assert ran.codes == [0, 0, 2], ran.said
    assert ran.steps[-1] == AFTER[0]
    assert code_host.comments == []
    passed = run_action(world, {**given, "model": "main"}, code_host)
    assert passed.codes == [0, 0, 0], passed.said
    assert passed.steps[-2:] == AFTER[:2]


def test_gates_of_one_pull_request_keep_their_own_comments_artifacts_and_records(
    world: World, code_host: Host
) -> None:
    action = yaml.safe_load((ROOT / "deploy/ci/github/action.yml").read_text())
    given = {"suite": "tiny.toml", "python": sys.executable, "comment": "true"}
    slugs = []
    for wanted in (
        {"model": "main"},
        {"model": "./main"},
        {"model": "main", "name": "nightly, 밤\noutcome=passed"},
    ):
        ran = run_action(world, {**given, **wanted}, code_host)
        slugs.append(ran.outputs["gate"]["slug"])
    assert slugs[0] == f"tiny.toml-main-{mark_of('tiny.toml main')}"
    assert slugs[1] == f"tiny.toml-.-main-{mark_of('tiny.toml ./main')}"
    assert re.fullmatch(r"nightly--[^,\s=]+-outcome-passed-[0-9a-f]{8}", slugs[2])
    marks = [comment["body"].splitlines()[0] for comment in code_host.comments]
    named = ("tiny.toml_main", "tiny.toml_./main", "nightly_밤_outcome_passed")
    for mark, name in zip(marks, named, strict=True):
        assert re.fullmatch(rf"<!-- neural-mri {re.escape(name)} [0-9a-f]{{8}} -->", mark)
    used = {
        step["uses"].partition("@")[0]: step["with"]
        for step in action["runs"]["steps"]
        if "uses" in step
    }
    slug = "${{ steps.gate.outputs.slug }}"
    assert slug in used["actions/upload-artifact"]["name"]
    assert slug in used["actions/cache/save"]["key"]
    assert slug in used["github/codeql-action/upload-sarif"]["category"]


def test_no_two_gates_of_the_github_action_share_an_artifact_or_a_cache(world: World) -> None:
    action = yaml.safe_load((ROOT / "deploy/ci/github/action.yml").read_text())
    [naming, fetching] = action["runs"]["steps"][:2]
    output = world.folder / "output"

    def slug(**given: str) -> str:
        output.write_text("")
        asked = {"NMRI_PYTHON": sys.executable, "NMRI_NAME": "", "NMRI_SUITE": "", "NMRI_MODEL": ""}
        subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", naming["run"]],
            env=world.environment(**{**asked, **given}, GITHUB_OUTPUT=str(output)),
            check=True,
        )
        [line] = output.read_text().splitlines()
        return line.removeprefix("slug=")

    asked = [
        *({"NMRI_SUITE": "quick", "NMRI_MODEL": model} for model in ("a/b", "a-b", "a b", "a")),
        *({"NMRI_NAME": name} for name in ("a-b", "a/b", "a", "quick-a-b")),
    ]
    slugs = [slug(**each) for each in asked]
    assert len(set(slugs)) == len(slugs)
    assert slugs[4] == "a-b", "which needs no mark"
    assert not [each for each in slugs if set(each) & set('":<>|*?\r\n\\/,+')]
    begins = [
        fetching["with"]["restore-keys"].replace("${{ steps.gate.outputs.slug }}", each)
        for each in slugs
    ]
    assert not [a for a in begins for b in begins if a != b and b.startswith(a)]


def test_the_github_action_saves_its_cache_whatever_the_gate_says(world: World) -> None:
    action = yaml.safe_load((ROOT / "deploy/ci/github/action.yml").read_text())
    used = {
        step["uses"].partition("@")[0]: step for step in action["runs"]["steps"] if "uses" in step
    }
    assert "actions/cache" not in used, "it saves nothing of a job that failed"
    fetched, kept = used["actions/cache/restore"], used["actions/cache/save"]
    assert kept["if"] == "always()"
    assert kept["with"]["path"] == fetched["with"]["path"] == "${{ inputs.records }}"
    assert kept["with"]["key"].startswith(fetched["with"]["restore-keys"])


def test_the_gitlab_template_runs_as_the_shell_steps_it_contains(
    world: World, code_host: Host
) -> None:
    job = yaml.safe_load((ROOT / "deploy/ci/gitlab/neural-mri.yml").read_text())[
        ".neural-mri-diagnose"
    ]
    variables = {name: str(value) for name, value in job["variables"].items()} | {
        "NMRI_MODEL": "main",
        "NMRI_SUITE": "tiny.toml",
        "NMRI_PYTHON": sys.executable,
        "NMRI_TREE": str(ROOT),
    }
    variables |= {"CI_API_V4_URL": code_host.url, "CI_PROJECT_ID": "1", "CI_MERGE_REQUEST_IID": "5"}

    def ran(lines: list[str], **further: str) -> subprocess.CompletedProcess[str]:
        # A runner puts a job's lines into one shell, which ends with the first that fails.
        return subprocess.run(
            ["sh", "-c", "\n".join(["set -eu", *lines])],
            cwd=world.folder,
            env=world.environment(**{**variables, **further}),
            capture_output=True,
            text=True,
            check=False,
        )

    done = ran([*job["before_script"], *job["script"]])
    assert done.returncode == 0, done.stderr
    # What comes after has a shell of its own, whether the script failed or not.
    assert ran(job["after_script"]).returncode == 0
    assert code_host.comments == [], "without a token nobody is told"
    assert ran(job["after_script"], NMRI_TOKEN="secret").returncode == 0
    assert re.match(
        r"<!-- neural-mri tiny\.toml_main [0-9a-f]{8} -->\n## 🟢", code_host.comments[0]["body"]
    )
    assert ran(job["after_script"], NMRI_TOKEN="secret", NMRI_NAME="other").returncode == 0
    assert code_host.comments[1]["body"].startswith("<!-- neural-mri other -->")
    # Handed on to a job of which nothing comes, the report is nobody's.
    report, lines = (world.folder / job["artifacts"]["reports"]["junit"]).parent, job["script"]
    for failing in (lines, [*job["before_script"], "exit 2"]):
        report.mkdir(exist_ok=True)
        for name in ("diagnosis.md", "diagnosis.junit.xml"):
            (report / name).write_text("## 🟢 another job's")
        assert ran(failing, NMRI_MODEL="nowhere").returncode == 2
        assert ran(job["after_script"], NMRI_TOKEN="secret", NMRI_MODEL="nowhere").returncode == 0
        assert list(report.iterdir()) == []
    assert len(code_host.comments) == 2
    assert ran(lines).returncode == 0
    assert "/" not in job["cache"]["key"]
    assert job["cache"]["key"].removeprefix("neural-mri-") == "$CI_JOB_NAME_SLUG", (
        "which has no slash, whatever suites and branches are called"
    )
    assert (world.folder / job["artifacts"]["reports"]["junit"]).exists()
    assert job["artifacts"]["paths"] == [variables["NMRI_OUT"]]
    assert job["cache"]["paths"] == [variables["NMRI_BASELINES"]]
    assert job["cache"]["when"] == job["artifacts"]["when"] == "always"


@pytest.mark.parametrize("url", ["", "http://mri.example.net"], ids=["local", "cluster"])
@pytest.mark.parametrize("template", ["github", "gitlab"])
def test_a_template_beside_its_own_tree_installs_what_the_tree_needs(
    template: str, url: str, tmp_path: Path
) -> None:
    """There the packages can be imported, and what they need cannot: what is installed counts."""
    if template == "github":
        action = yaml.safe_load((ROOT / "deploy/ci/github/action.yml").read_text())
        (lines,) = [s["run"] for s in action["runs"]["steps"] if s["name"].startswith("Install")]
    else:
        gitlab = yaml.safe_load((ROOT / "deploy/ci/gitlab/neural-mri.yml").read_text())
        lines = "\n".join(gitlab[".neural-mri-diagnose"]["before_script"])
    installed = tmp_path / "installed"
    bare = tmp_path / "python"
    bare.write_text(
        f'#!/bin/sh\nif [ "$1" = -m ]; then echo "$@" >> {installed}; exit; fi\n'
        f'exec {sys.executable} -S "$@"\n'
    )
    bare.chmod(0o755)

    def install(python: str) -> str:
        installed.write_text("")
        given = {
            "NMRI_PYTHON": python,
            "NMRI_URL": url,
            "NMRI_TREE": ".",
            "NMRI_OUT": str(tmp_path),
        }
        done = subprocess.run(
            ["bash", "-eu", "-c", lines],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **given},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return installed.read_text()

    asked = "-m pip install --quiet --constraint ./constraints.txt --editable "
    assert install(str(bare)) == f"{asked}.{'' if url else '[embedded]'}\n"
    assert install(sys.executable) == ""


def test_an_error_that_nobody_foresaw_is_no_gate_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("zip() argument 2 is shorter than argument 1")

    monkeypatch.setattr(command, "diagnosed", broken)
    with pytest.raises(typer.Exit) as left:
        command.diagnose("quick", model="m", baseline="n")
    assert left.value.exit_code == 2
    assert "argument 2 is shorter" in capsys.readouterr().err
