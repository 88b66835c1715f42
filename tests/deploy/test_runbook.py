"""What operators are told to type exists, and is read by the parsers that will read it."""

import importlib
import importlib.util
import re
import shlex
from collections.abc import Sequence
from typing import Any

import pytest
import typer

from api.routes.health import Status
from neural_mri.cli.app import app
from tests.deploy.charts import CHART, text, values
from tests.deploy.composition import COMPOSE, services
from tests.deploy.runbook import RUNBOOK
from tests.deploy.test_chart import SECRETS as SECRET_OF_THE_CHART
from tests.deploy.test_chart import containers
from tests.deploy.test_compose import SECRETS

ROOT = RUNBOOK.parents[1]
PAGES = (RUNBOOK, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), COMPOSE)
SOME_JOB = "0198c1d2-0000-7000-8000-000000000000"
SAMPLES = (
    (re.compile(r"\bkeys revoke ID\b"), "keys revoke 0123456789ab"),
    (re.compile(r'"?\$(?:job|session|batch|link)"?|\bID\b|\b[0-9a-f]{8}-…'), SOME_JOB),
    (re.compile(r"\bsessions diff A B\b"), f"sessions diff {SOME_JOB} {SOME_JOB}"),
    (re.compile(r"\bscan-key KEY\b"), "scan-key " + "0" * 64),
)
"""What stands for anybody's own."""


def code(page: str) -> list[str]:
    """What a page shows as code: lines of blocks, and what stands in a sentence."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    comments = re.findall(r"^#   (docker .*?)(?:   .*|(?: prints .*))?$", page, re.MULTILINE)
    sentences = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return [
        *lines,
        *comments,
        *(" ".join(each.split()) for each in re.findall(r"`([^`]+)`", sentences)),
    ]


def typed(*programs: str) -> list[list[str]]:
    """Commands of these programs, in words."""
    pages = [page.read_text() for page in PAGES]
    notes = text("NOTES.txt", values())
    lines = [line for page in pages for line in code(page)]
    lines += [line.strip() for line in notes.splitlines() if line.startswith("  ")]
    found = []
    for line in lines:
        inner = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.partition("  #")[0].strip())
        inner = re.sub(r"^printf [^|]* \| ", "", inner)  # what a command is told by its input
        inner = re.split(r" [>|] ", inner.removeprefix(".venv/bin/"))[0]
        for pattern, sample in SAMPLES:
            inner = pattern.sub(sample, inner)
        if any(inner == program or inner.startswith(f"{program} ") for program in programs):
            found.append(shlex.split(inner.replace("…", "")))
    return found


def as_ids(commands: Sequence[Sequence[str]]) -> list[str]:
    return [" ".join(command)[:60] for command in commands]


def read_by_the_command(words: list[str]) -> None:
    """Find the command, and have it read its arguments; raises what click does. A name alone needs none."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="neural-mri")
    while words and hasattr(command, "commands"):
        _, words, _ = command.make_parser(context).parse_args(words)  # its own options come first
        name, command, words = command.resolve_command(context, words)
        context = command.context_class(command, info_name=name, parent=context)
    if words:
        command.make_context(command.name, words, parent=context.parent)


OURS = typed("neural-mri")
MODULES = typed("python -m")


@pytest.mark.parametrize("command", OURS, ids=as_ids(OURS))
def test_a_command_of_ours_is_read(command: list[str]) -> None:
    read_by_the_command(command[1:])


@pytest.mark.parametrize(
    "wrong", ["cluster --twice", "users limits ada", "job x", "keys revoke ID"]
)
def test_a_command_that_is_none_is_not(wrong: str) -> None:
    with pytest.raises(Exception, match=r"No such|not a key's id|not a job's id"):
        read_by_the_command(shlex.split(wrong))


def read_by_its_module(command: Sequence[str]) -> None:
    python, flag, module, *arguments = command
    assert (python, flag) == ("python", "-m")
    assert importlib.util.find_spec(module), f"there is no {module}"
    if arguments:
        if hasattr(importlib.import_module(module), "_parser"):
            importlib.import_module(module)._parser().parse_args(arguments)
        else:
            assert module.split(".")[0] in {"bench", "tests"}, f"{module} takes no arguments"


@pytest.mark.parametrize("command", MODULES, ids=as_ids(MODULES))
def test_a_module_is_there_and_reads_its_arguments(command: list[str]) -> None:
    read_by_its_module(command)


def test_what_compose_is_asked_for_is_in_its_files() -> None:
    asked = typed("docker")
    assert len(asked) >= 4
    for docker, compose, *words in asked:
        assert (docker, compose) == ("docker", "compose")
        for at, word in enumerate(words):
            if word == "--file":
                assert COMPOSE.with_name(words[at + 1]).is_file()
        if words[0] == "run":
            remove, service, *arguments = words[1:]
            assert remove == "--rm"
            read_by_its_module([*services(SECRETS)[service]["entrypoint"], *arguments])
        if words[0] == "exec":
            flag, _, service, ours, *arguments = words[1:]
            assert (flag, ours) == ("--env", "neural-mri")
            assert service == "api"
            read_by_the_command(arguments)


def test_what_a_cluster_is_asked_for_is_in_the_chart() -> None:
    asked = typed("kubectl", "helm")
    assert len(asked) >= 6
    names = {each["name"] for each in containers()}
    given = set[str]()
    for words in asked:
        if "--container" in words:
            assert words[words.index("--container") + 1] in names
        if "--" in words:
            inside = words[words.index("--") + 1 :]
            if inside[:2] == ["sh", "-c"]:
                key, run, ours, *arguments = shlex.split(inside[2])
                assert (key, run, ours) == ("NMRI_API_KEY=$(cat)", "exec", "neural-mri")
                assert "-i" in words, "the key comes by its input"
                read_by_the_command(arguments)
            else:
                read_by_its_module(inside)
        given |= {word.split("=")[1] for word in words if word.startswith("--from-literal=")}
        if words[:2] == ["helm", "install"]:
            assert (ROOT / words[3]).resolve() == CHART.resolve()
    assert given <= SECRET_OF_THE_CHART.keys()
    assert given >= {"database-url", "redis-url", "key-pepper"}


def test_every_target_of_make_that_is_named_is_there() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in typed("make") if len(words) > 1}
    assert {"up", "test", "docs"} <= named <= known


def test_pages_that_are_read_are_there() -> None:
    assert all(page.is_file() for page in PAGES)
    assert len(OURS) > 30
    assert len(MODULES) > 6


OF_OTHERS = {"log_error_verbosity"}
"""A setting of PostgreSQL's, which the compose file sets as well."""


def test_what_is_looked_for_in_logs_is_written_there() -> None:
    code_of_ours = "\n".join(
        path.read_text()
        for package in ("api", "worker", "neural_mri/backing")
        for path in (ROOT / package).rglob("*.py")
    )
    names = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", RUNBOOK.read_text()))
    looked_for = {name for name in names - OF_OTHERS if not name.startswith("neural_mri_")}
    assert {"worker_not_started", "worker_killed", "settings_not_known"} <= looked_for
    for name in looked_for:
        assert f'"{name}"' in code_of_ours or f"{name}=" in code_of_ours, name


def test_states_of_health_that_are_told_of_are_the_services() -> None:
    told = set(re.findall(r"health `(\w+)`", RUNBOOK.read_text()))
    assert told == {"degraded", "waiting"}
    assert told <= set(Status)
