"""`neural-mri scan ...`: one command a modality."""

from typing import Annotated

import typer

from neural_mri.cli import options
from neural_mri.cli.asking import Asking, asks
from neural_mri.client.client import addresses
from neural_mri.contract.anomalies import Lens, Sublayers
from neural_mri.contract.circuits import Ablation, CircuitMethod, Granularity
from neural_mri.contract.scans import (
    ActivationScan,
    Aggregation,
    AnomalyScan,
    AttentionScan,
    CircuitScan,
    StructuralScan,
    WeightScan,
)

__all__ = ("commands",)

commands = typer.Typer(no_args_is_help=True, help="Scan a model.")

_SHOWN_EFFECTS = 10


@commands.command()
@asks()
def structural(
    *,
    model: options.Model = None,
    asking: Asking,
) -> None:
    """Structure (T1): layers, heads, widths and exact parameter counts. Loads no model."""
    asking.scan(StructuralScan(model=model))


@commands.command()
@asks()
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
    calibration: options.Calibration = None,
    canonical: options.Canonical = False,
    asking: Asking,
) -> None:
    """Activations (fMRI): what each component writes to the residual stream at each token of a prompt."""
    chosen = options.read_layers(layers)
    request = ActivationScan(
        model=model,
        prompt=options.read_prompt(prompt),
        layers="all" if chosen == "all" else addresses(chosen),
        aggregation=options.read_aggregation(aggregation),
        include_residual=residual,
        token_positions=options.read_positions(tokens),
        top_predictions=max(asking.top, 10),
        calibration=calibration,
        canonical=canonical,
    )
    asking.scan(request)


@commands.command()
@asks()
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
    canonical: options.Canonical = False,
    asking: Asking,
) -> None:
    """Attention patterns: which tokens each head of some layers reads."""
    request = AttentionScan(
        model=model,
        prompt=options.read_prompt(prompt),
        layers=options.read_layer_numbers(layer),
        canonical=canonical,
    )
    asking.scan(request, head=head)


@commands.command()
@asks()
def weights(
    *,
    model: options.Model = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Layer numbers (3), ranges (5-7) and addresses (blocks.3.mlp), with commas between."
        ),
    ] = "all",
    baseline: Annotated[
        str | None,
        typer.Option(help="A registered model of the same shape: report what differs from it."),
    ] = None,
    sigma: Annotated[
        float,
        typer.Option(
            parser=options.number(1, 1000),
            metavar="X",
            help="Standard deviations beyond which a weight is an outlier.",
        ),
    ] = 6.0,
    asking: Asking,
) -> None:
    """Weights (T2): how large they are, which lie far out, what heads copy. Loads no model.

    neural-mri scan weights --plot weights.png
    """
    chosen = options.read_layers(layers)
    request = WeightScan(
        model=model,
        layers="all" if chosen == "all" else addresses(chosen),
        baseline=baseline,
        outlier_sigma=sigma,
    )
    asking.scan(request)


@commands.command()
@asks(shown=_SHOWN_EFFECTS)
def circuits(
    prompt: options.Prompt,
    *,
    model: options.Model = None,
    answer: options.Answer = None,
    foil: options.Foil = None,
    at: options.At = -1,
    corrupt: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT",
            help="A prompt of as many tokens that asks for the foil: values are taken from its run.",
        ),
    ] = None,
    method: Annotated[
        CircuitMethod,
        typer.Option(
            parser=options.one_of(CircuitMethod),
            metavar="|".join(CircuitMethod),
            help="How effects are measured.",
        ),
    ] = CircuitMethod.FAST,
    ablation: Annotated[
        Ablation | None,
        typer.Option(
            parser=options.one_of(Ablation),
            metavar="|".join(Ablation),
            help="What a component is replaced by.",
            show_default="resample with --corrupt, else mean",
        ),
    ] = None,
    granularity: Annotated[
        Granularity,
        typer.Option(
            parser=options.one_of(Granularity),
            metavar="|".join(Granularity),
            help="What counts as a component.",
        ),
    ] = Granularity.HEADS,
    first_token: Annotated[
        bool,
        typer.Option("--first-token", help="Replace at position 0 too, the attention sink's."),
    ] = False,
    exact: Annotated[
        int,
        typer.Option(
            parser=options.whole_number(0, 4096),
            metavar="N",
            help="How many of the strongest `fast` measures.",
        ),
    ] = 30,
    edges: Annotated[
        int,
        typer.Option(
            parser=options.whole_number(0, 5000), metavar="N", help="How many paths to report."
        ),
    ] = 300,
    steps: Annotated[
        int,
        typer.Option(
            parser=options.whole_number(1, 64),
            metavar="N",
            help="Steps of integrated_gradients.",
        ),
    ] = 5,
    calibration: options.Calibration = None,
    canonical: options.Canonical = False,
    asking: Asking,
) -> None:
    """Circuits (DTI): which components carry an answer, and along which paths.

    Estimates show first, and are then measured.

    neural-mri scan circuits "The Eiffel Tower is located in the city of"
      --answer " Paris"
    """
    request = CircuitScan(
        model=model,
        prompt=options.read_prompt(prompt),
        answer=answer,
        foil=foil,
        target_token_idx=at,
        corrupt_prompt=corrupt,
        method=method,
        ablation=ablation,
        granularity=granularity,
        include_first_token=first_token,
        exact=exact,
        edges=edges,
        steps=steps,
        calibration=calibration,
        canonical=canonical,
    )
    asking.scan(request)


@commands.command()
@asks()
def anomaly(
    prompt: options.Prompt,
    *,
    model: options.Model = None,
    answer: options.Answer = None,
    foil: options.Foil = None,
    at: options.At = -1,
    lens: Annotated[
        Lens,
        typer.Option(
            parser=options.one_of(Lens),
            metavar="|".join(Lens),
            help="How intermediate layers are read.",
        ),
    ] = Lens.BIAS,
    tokens: Annotated[
        str,
        typer.Option(
            help="Token positions, with commas between; `target` is the one asked about alone."
        ),
    ] = "all",
    appearance: Annotated[
        bool,
        typer.Option(
            help="Read every layer, to see where the answer appears; without, far cheaper."
        ),
    ] = True,
    sublayers: Annotated[
        Sublayers,
        typer.Option(
            parser=options.one_of(Sublayers),
            metavar="|".join(Sublayers),
            help="Where to read between attention and MLP too; `all` doubles the work.",
        ),
    ] = Sublayers.TARGET,
    false_alarms: Annotated[
        float,
        typer.Option(
            parser=options.number(1e-6, 0.499),
            metavar="SHARE",
            help="Share of ordinary positions that may be flagged.",
        ),
    ] = 0.01,
    calibration: options.Calibration = None,
    canonical: options.Canonical = False,
    asking: Asking,
) -> None:
    """Anomalies (FLAIR): uncertainty, where the answer appears, and whether it is supported.

    neural-mri scan anomaly "The Eiffel Tower is located in the city of"
      --answer " Paris"
    """
    request = AnomalyScan(
        model=model,
        prompt=options.read_prompt(prompt),
        answer=answer,
        foil=foil,
        target_token_idx=at,
        lens=lens,
        appearance=appearance,
        token_positions="target" if tokens == "target" else options.read_positions(tokens),
        sublayers=sublayers,
        false_alarm_rate=false_alarms,
        calibration=calibration,
        canonical=canonical,
    )
    asking.scan(request)
