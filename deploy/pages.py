"""Pages of the documentation that are made, not written: a hook of mkdocs.

The HTTP and command-line references come from the programs themselves, operating from the runbook, and the list
of decisions from their folder, so that none of them can fall behind.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

__all__ = ("on_config", "on_files")

ROOT = Path(__file__).parents[1]
_WRITTEN = {
    "Start": ["index.md", "tutorial.md"],
    "Modalities": [
        f"modalities/{name}.md"
        for name in (
            "index",
            "topology",
            "weights",
            "activations",
            "circuits",
            "anomalies",
            "stimulation",
        )
    ],
    "Use": ["sessions.md", "diagnostics.md", "waiting.md"],
    "Reference": ["reference/python.md", "reference/http.md", "reference/cli.md"],
    "Operate": ["operating.md", "settings.md", "benchmarks.md"],
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The way through the pages: those named here, then whatever else is there, then the decisions."""
    docs = Path(config.docs_dir)
    named = {page for pages in _WRITTEN.values() for page in pages}
    others = sorted(page.name for page in docs.glob("*.md") if page.name not in named)
    nav: list[dict[str, Any]] = [{part: list(pages)} for part, pages in _WRITTEN.items()]
    nav[-1]["Operate"] += others
    nav.append(
        {"Decisions": ["decisions/index.md", *(f"decisions/{p.name}" for p in _decisions())]}
    )
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for path, content in _made().items():
        files.append(File.generated(config, path, content=content))
    return files


def _made() -> dict[str, str]:
    runbook = (ROOT / "deploy/RUNBOOK.md").read_text()
    return {
        "operating.md": runbook.replace("`docs/settings.md`", "[Settings](settings.md)"),
        "decisions/index.md": "\n".join(_list_of_decisions()),
        "reference/http.md": "\n".join(_http()),
        "reference/cli.md": "\n".join(_command_line()),
        "reference/python.md": "\n".join(_python()),
    }


def _decisions() -> list[Path]:
    return sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))


def _list_of_decisions() -> Iterator[str]:
    yield "# Decisions\n\nWhy it is built so; twenty lines each.\n"
    for page in _decisions():
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        yield f"- [{title}]({page.name})"


def _python() -> Iterator[str]:
    import neural_mri.client

    yield "# Python\n"
    yield "The client needs HTTP and Arrow, and nothing of the service's side.\n"
    for name in ("Client", *sorted(set(neural_mri.client.__all__) - {"Client"})):
        if callable(getattr(neural_mri.client, name)):  # a class or a function, no constant
            yield f"::: neural_mri.client.{name}\n"


def _http() -> Iterator[str]:
    from api.app import create_app
    from api.openapi import document, operations
    from neural_mri.backing.settings import Settings

    described = document(create_app(Settings()).litestar)
    yield "# HTTP\n"
    yield "The service describes itself at `/schema`. Refusals are problem details (RFC 9457).\n"
    by_tag: dict[str, list[str]] = {}
    for path, method, spec in operations(described):
        by_tag.setdefault(spec["tags"][0], []).append("\n".join(_operation(method, path, spec)))
    for tag, entries in by_tag.items():
        yield f"## {tag.capitalize()}\n"
        yield from entries


def _operation(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### `{method.upper()} {path}`\n"
    yield f"{operation.get('summary', '')}. {operation.get('description', '')}".strip(". ") + ".\n"
    for parameter in operation.get("parameters", ()):
        described = re.sub(r"\s+", " ", parameter.get("description") or "")
        yield f"- `{parameter['name']}` ({parameter['in']}): {described}"
    content = operation.get("requestBody", {}).get("content", {})
    for media_type, body in content.items():
        for example in body.get("schema", {}).get("examples", ())[:1]:
            yield f"\n`{media_type}`, for example:\n\n```json\n{json.dumps(example, indent=2)}\n```"
    yield "\nAnswers: " + ", ".join(
        f"{status} {answer['description']}" for status, answer in operation["responses"].items()
    )
    yield ""


def _command_line() -> Iterator[str]:
    from neural_mri.cli.app import app

    yield "# Command line\n"
    yield "`neural-mri --install-completion` teaches your shell the commands and options.\n"
    yield from _command(typer.main.get_command(app), "neural-mri", level=2)


def _command(command: Any, path: str, *, level: int) -> Iterator[str]:
    subcommands = getattr(command, "commands", None)
    if subcommands:
        for name, subcommand in subcommands.items():
            yield from _command(subcommand, f"{path} {name}", level=level)
        return
    yield f"{'#' * level} `{path}`\n"
    yield f"{command.help or ''}\n"
    for parameter in command.params:
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        if getattr(parameter, "help", None):
            yield f"- {names}: {parameter.help}"
    yield ""
