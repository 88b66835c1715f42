"""`neural-mri perturb`, `patching`, `trace` and `calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from neural_mri.cli import operations, options
from neural_mri.cli.asking import Asking, asks
from neural_mri.contract.anomalies import Lens
from neural_mri.contract.perturbations import Direction, PatchSite, TraceKind
from neural_mri.contract.scans import (
    CalibrationScan,
    PatchingScan,
    PerturbationScan,
    TracingScan,
)

__all__ = ("calibrate", "patching", "perturb", "trace")

_EVERY_SITE = [PatchSite.RESIDUAL, PatchSite.ATTENTION, PatchSite.MLP]
_EVERY_KIND = list(TraceKind)


@asks()
def perturb(
    prompt: options.Prompt,
    *,
    zero: Annotated[list[str], typer.Option(metavar="WHERE", help="Set its output to 0.")] = [],  # noqa: B006 -- typer's
    amplify: Annotated[
        list[str], typer.Option(metavar="WHERE=FACTOR", help="Multiply its output.")
    ] = [],  # noqa: B006
    invert: Annotated[
        list[str], typer.Option(metavar="WHERE", help="Change its output's sign.")
    ] = [],  # noqa: B006
    noise: Annotated[
        list[str],
        typer.Option(
            metavar="WHERE=SIGMA", help="Add noise of SIGMA times its own root mean square."
        ),
    ] = [],  # noqa: B006
    ablate: Annotated[
        list[str],
        typer.Option(metavar="WHERE", help="Replace its output by its mean on reference text."),
    ] = [],  # noqa: B006
    inject: Annotated[
        list[str],
        typer.Option(
            metavar="WHERE=VALUES", help="Add values, with commas between, or @FILE of numbers."
        ),
    ] = [],  # noqa: B006
    replace: Annotated[
        list[str], typer.Option(metavar="WHERE=VALUES", help="Put values in its place.")
    ] = [],  # noqa: B006
    patch: Annotated[
        list[str],
        typer.Option(metavar="WHERE", help="Put in its output in the run of the --source prompt."),
    ] = [],  # noqa: B006
    source: Annotated[
        str | None,
        typer.Option(metavar="PROMPT", help="For --patch: a prompt of as many tokens."),
    ] = None,
    tokens: Annotated[
        str,
        typer.Option(help="Token positions to do it at where WHERE names none; -1 is the last."),
    ] = "all",
    draws: Annotated[
        int,
        typer.Option(
            parser=options.whole_number(1, 64), metavar="N", help="For --noise: how many draws."
        ),
    ] = 8,
    seed: Annotated[
        int, typer.Option(parser=options.whole_number(0), metavar="N", help="For --noise.")
    ] = 0,
    model: options.Model = None,
    answer: options.Answer = None,
    foil: options.Foil = None,
    at: options.At = -1,
    activations: Annotated[bool, typer.Option(help="Report what changed inside as well.")] = True,
    calibration: options.Calibration = None,
    canonical: options.Canonical = False,
    asking: Asking,
) -> None:
    """Stimulate components: the next token before and after. No weight is ever changed.

    Operations can be given several times. WHERE is an address, and may name
    token positions after an @. All apply in one run, where they meet in the
    order in which they stand below. For example:

    neural-mri perturb "The Eiffel Tower is located in the city of"
      --zero blocks.21.attn.h3 --amplify blocks.4.mlp=2 --ablate blocks.11.mlp@1,-1
    """
    given = operations.Given(
        zero=zero,
        amplify=amplify,
        invert=invert,
        noise=noise,
        ablate=ablate,
        inject=inject,
        replace=replace,
        patch=patch,
    )
    request = PerturbationScan(
        model=model,
        prompt=options.read_prompt(prompt),
        answer=answer,
        foil=foil,
        target_token_idx=at,
        perturbations=operations.read(
            given,
            positions=options.read_positions(tokens),
            source=source,
            draws=draws,
            seed=seed,
        ),
        top_predictions=max(asking.top, 10),
        perturbed_scan=activations,
        calibration=calibration,
        canonical=canonical,
    )
    asking.scan(request)


@asks()
def patching(
    prompt: options.Prompt,
    *,
    corrupt: Annotated[
        str, typer.Option(metavar="PROMPT", help="A prompt of as many tokens, with another answer.")
    ],
    direction: Annotated[
        Direction,
        typer.Option(
            parser=options.one_of(Direction),
            metavar="|".join(Direction),
            help="Denoising: clean values into the corrupted run. Noising: the reverse.",
        ),
    ] = Direction.DENOISING,
    site: Annotated[
        list[PatchSite],
        typer.Option(
            parser=options.one_of(PatchSite),
            metavar="|".join(PatchSite),
            help="What is patched; can be given several times.",
        ),
    ] = _EVERY_SITE,
    model: options.Model = None,
    answer: options.Answer = None,
    foil: options.Foil = None,
    at: options.At = -1,
    asking: Asking,
) -> None:
    """Activation patching between two prompts: recovery of the answer by layer and token.

    neural-mri patching "The Eiffel Tower is located in the city of"
      --corrupt "The Brandenburg Gate is located in the city of"
    """
    request = PatchingScan(
        model=model,
        prompt=options.read_prompt(prompt),
        corrupt_prompt=corrupt,
        answer=answer,
        foil=foil,
        target_token_idx=at,
        direction=direction,
        sites=tuple(dict.fromkeys(site)),
    )
    asking.scan(request)


@asks()
def trace(
    prompt: options.Prompt,
    *,
    subject: Annotated[
        str, typer.Option(help="Text in the prompt whose tokens are corrupted: 'The Eiffel Tower'.")
    ],
    sigma: Annotated[
        float,
        typer.Option(
            parser=options.number(1e-6, 1000),
            metavar="X",
            help="Noise, in standard deviations of the embedding matrix's entries.",
        ),
    ] = 3.0,
    draws: Annotated[
        int, typer.Option(parser=options.whole_number(1, 32), metavar="N", help="Draws of noise.")
    ] = 3,
    seed: Annotated[
        int, typer.Option(parser=options.whole_number(0), metavar="N", help="Of the noise.")
    ] = 0,
    window: Annotated[
        int,
        typer.Option(
            parser=options.whole_number(1, 101),
            metavar="N",
            help="Layers of MLP and attention restored together.",
        ),
    ] = 6,
    kind: Annotated[
        list[TraceKind],
        typer.Option(
            parser=options.one_of(TraceKind),
            metavar="|".join(TraceKind),
            help="What is restored; can be given several times.",
        ),
    ] = _EVERY_KIND,
    model: options.Model = None,
    answer: options.Answer = None,
    foil: options.Foil = None,
    at: options.At = -1,
    asking: Asking,
) -> None:
    """Causal tracing: corrupt the subject, then restore states one at a time.

    neural-mri trace "The Eiffel Tower is located in the city of"
      --subject "The Eiffel Tower"
    """
    text = options.read_prompt(prompt)
    if not subject or subject not in text:
        raise typer.BadParameter(
            f"{subject!r} does not stand in the prompt: expected a part of {text!r}",
            param_hint="--subject",
        )
    request = TracingScan(
        model=model,
        prompt=text,
        subject=subject,
        answer=answer,
        foil=foil,
        target_token_idx=at,
        sigma=sigma,
        draws=draws,
        seed=seed,
        window=window,
        kinds=tuple(dict.fromkeys(kind)),
    )
    asking.scan(request)


@asks()
def calibrate(
    texts: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Files of reference text; without any, the model writes its own.",
        ),
    ] = [],  # noqa: B006
    *,
    lens: Annotated[
        list[Lens],
        typer.Option(
            parser=options.one_of(Lens),
            metavar="|".join(Lens),
            help="Lenses to calibrate; can be given several times.",
        ),
    ] = [Lens.BIAS],  # noqa: B006
    n_tokens: Annotated[
        int,
        typer.Option(
            "--n-tokens",
            parser=options.whole_number(256, 1_000_000),
            metavar="N",
            help="Tokens of reference text, at most.",
        ),
    ] = 2048,
    seed: Annotated[
        int,
        typer.Option(
            parser=options.whole_number(0), metavar="N", help="Of the text the model writes."
        ),
    ] = 0,
    model: options.Model = None,
    asking: Asking,
) -> None:
    """Measure what scans are read against: reference means, ordinary values, lenses.

    neural-mri calibrate --lens bias --lens ridge --n-tokens 8192
    """
    request = CalibrationScan(
        model=model,
        texts=tuple(map(operations.read_text, texts)),
        n_tokens=n_tokens,
        seed=seed,
        lenses=tuple(dict.fromkeys(lens)),
    )
    asking.scan(request)
