"""`neural-mri models`, `neural-mri model ...` and `neural-mri tokenize`."""

from typing import Annotated

import msgspec
import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from neural_mri.cli import options, outcomes
from neural_mri.cli.terminal import note, print_json, standard_output
from neural_mri.client import Client
from neural_mri.client.text import visible
from neural_mri.contract.jobs import JobView
from neural_mri.contract.models import ModelInfo

__all__ = ("commands", "models", "tokenize")

commands = typer.Typer(no_args_is_help=True, help="Look at, load and unload one model.")

Name = Annotated[str, typer.Argument(help="A registered model.")]
Wait = Annotated[bool, typer.Option("--no-wait", help="Do not wait until it has happened.")]


def models(as_json: options.Json = False, url: options.Url = None) -> None:
    """List the registered models."""
    with options.open_client(url) as client:
        listed = client.models()
    if as_json:
        print_json(listed)
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("model", "state", "parameters", "layers × heads", "context", "numerics"):
        table.add_column(
            heading, justify="right" if heading in {"parameters", "context"} else "left"
        )
    for model in listed:
        shape = model.architecture
        table.add_row(
            model.name + (" (default)" if model.default else ""),
            model.state.value + (", pinned" if model.pinned else ""),
            f"{model.n_parameters:,}",
            f"{shape.n_layers} × {shape.n_heads}",
            str(shape.n_ctx),
            f"{model.numerics.dtype} on {model.numerics.device}",
        )
    standard_output().print(table)


@commands.command()
def info(
    name: Annotated[
        str | None, typer.Argument(help="A registered model.", show_default="the default model")
    ] = None,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Show one model: shape, weights, where it stands."""
    with options.open_client(url) as client:
        model = client.model(name)
    if as_json:
        print_json(model)
    else:
        _print_model(model)


@commands.command()
def load(
    name: Name,
    no_wait: Wait = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Have a worker hold a model, so that scans of it start at once."""
    with options.open_client(url) as client:
        _finish(client, client.load(name), wait=not no_wait, as_json=as_json, quiet=quiet)


@commands.command()
def unload(
    name: Name,
    no_wait: Wait = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Have the workers let a model go."""
    with options.open_client(url) as client:
        _finish(client, client.unload(name), wait=not no_wait, as_json=as_json, quiet=quiet)


def tokenize(
    prompt: options.Prompt,
    model: options.Model = None,
    as_json: options.Json = False,
    url: options.Url = None,
) -> None:
    """Show a prompt as the model reads it: positions, token ids, texts."""
    text = options.read_prompt(prompt)
    with options.open_client(url) as client:
        tokens = client.tokenize(text, model=model)
    if as_json:
        print_json(tokens)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim")
    table.add_column(justify="right")
    table.add_column()
    for position, (token_id, token) in enumerate(zip(tokens.ids, tokens.texts, strict=True)):
        table.add_row(str(position), str(token_id), Text(visible(token)))
    standard_output().print(table)


def _finish(client: Client, job: JobView, *, wait: bool, as_json: bool, quiet: bool) -> None:
    if wait:
        job = outcomes.follow(client, job, quiet=quiet)
    if as_json:
        print_json(outcomes.job_document(job))
    elif not quiet:
        standard_output().print(f"{job.model}: {job.kind.value} {job.state.value}")
        if not wait:
            note(f"follow it with: neural-mri job {job.id} --watch")


def _print_model(model: ModelInfo) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("model", model.name)
    table.add_row("state", model.state.value + (", pinned" if model.pinned else ""))
    table.add_row("source", model.source)
    table.add_row("revision", model.revision)
    table.add_row("parameters", f"{model.n_parameters:,}")
    table.add_row("weights", decimal(model.weights_bytes))
    if model.quantization is not None:
        table.add_row("published as", model.quantization)
    if model.memory_bytes is not None:
        table.add_row("in memory", decimal(model.memory_bytes))
    table.add_row("numerics", f"{model.numerics.dtype} on {model.numerics.device}")
    for name, value in msgspec.structs.asdict(model.architecture).items():
        if value is not None and not isinstance(value, tuple):
            table.add_row(name, str(value))
    standard_output().print(table)
