"""`neural-mri scan ...`: one command a modality."""

from typing import Annotated

import typer

from neural_mri.cli import options, outcomes
from neural_mri.cli.options import Outputs
from neural_mri.client.client import addresses
from neural_mri.contract.jobs import Lane
from neural_mri.contract.scans import ActivationScan, Aggregation, AttentionScan, StructuralScan

__all__ = ("commands",)

commands = typer.Typer(no_args_is_help=True, help="Scan a model.")

_SHOWN = 5


@commands.command()
def structural(
    *,
    model: options.Model = None,
    lane: options.InLane = Lane.INTERACTIVE,
    top: options.Top = _SHOWN,
    as_json: options.Json = False,
    arrow: options.ArrowFile = None,
    csv: options.CsvFile = None,
    plot: options.PlotFile = None,
    no_wait: options.NoWait = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Structure (T1): layers, heads, widths and exact parameter counts. Loads no model."""
    outputs = Outputs(as_json, quiet, top, arrow, csv, plot).check(wait=not no_wait)
    with options.open_client(url) as client:
        outcomes.scan(client, StructuralScan(model=model), outputs, lane=lane, wait=not no_wait)


@commands.command()
def activation(
    prompt: options.Prompt,
    *,
    model: options.Model = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Layer numbers (3), ranges (5-7) and addresses (blocks.3.mlp), with commas between."
        ),
    ] = "all",
    aggregation: Annotated[
        str, typer.Option(metavar="|".join(Aggregation), help="How a vector becomes a number.")
    ] = Aggregation.L2_NORM.value,
    tokens: Annotated[
        str, typer.Option(help="Token positions, with commas between; -1 is the last token.")
    ] = "all",
    residual: Annotated[bool, typer.Option(help="Report the residual stream as well.")] = True,
    lane: options.InLane = Lane.INTERACTIVE,
    top: options.Top = _SHOWN,
    as_json: options.Json = False,
    arrow: options.ArrowFile = None,
    csv: options.CsvFile = None,
    plot: options.PlotFile = None,
    no_wait: options.NoWait = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Activations (fMRI): what each component writes to the residual stream at each token of a prompt."""
    outputs = Outputs(as_json, quiet, top, arrow, csv, plot).check(wait=not no_wait)
    chosen = options.read_layers(layers)
    request = ActivationScan(
        model=model,
        prompt=options.read_prompt(prompt),
        layers="all" if chosen == "all" else addresses(chosen),
        aggregation=options.read_aggregation(aggregation),
        include_residual=residual,
        token_positions=options.read_positions(tokens),
        top_predictions=max(top, 10),
    )
    with options.open_client(url) as client:
        outcomes.scan(client, request, outputs, lane=lane, wait=not no_wait)


@commands.command()
def attention(
    prompt: options.Prompt,
    *,
    layer: Annotated[
        str,
        typer.Option(metavar="N", help="Layer numbers (3) and ranges (5-7), with commas between."),
    ],
    head: Annotated[
        int | None,
        typer.Option(parser=options.whole_number(0), metavar="N", help="Show this head alone."),
    ] = None,
    model: options.Model = None,
    lane: options.InLane = Lane.INTERACTIVE,
    top: options.Top = _SHOWN,
    as_json: options.Json = False,
    arrow: options.ArrowFile = None,
    csv: options.CsvFile = None,
    plot: options.PlotFile = None,
    no_wait: options.NoWait = False,
    quiet: options.Quiet = False,
    url: options.Url = None,
) -> None:
    """Attention patterns: which tokens each head of some layers reads."""
    outputs = Outputs(as_json, quiet, top, arrow, csv, plot).check(wait=not no_wait)
    request = AttentionScan(
        model=model, prompt=options.read_prompt(prompt), layers=options.read_layer_numbers(layer)
    )
    with options.open_client(url) as client:
        outcomes.scan(client, request, outputs, lane=lane, wait=not no_wait, head=head)
