"""A finished scan as text: what a person wants to know first, each number with its unit."""

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neural_mri.cli.heat import heat_strip, legend
from neural_mri.cli.listing import print_bars, print_heading
from neural_mri.cli.reports import (
    print_calibration,
    print_circuit,
    print_comparison,
    print_lens,
    print_restoration,
    print_weights,
)
from neural_mri.client import ActivationMap, Reading, Result
from neural_mri.client.text import visible
from neural_mri.contract.components import Kind
from neural_mri.contract.jobs import JobView
from neural_mri.contract.scans import ScanKind

__all__ = ("print_report",)

_FIRST_TOKENS = 60
_LAST_TOKENS = 20
"""Of a longer prompt, the tokens in between are left out."""


def print_report(
    result: Result, job: JobView, console: Console, *, top: int, head: int | None = None
) -> None:
    """Everything about a result that fits a screen; `top` rows of each list."""
    console.print(Text(result.title, style="bold"))
    match result.kind:
        case ScanKind.FMRI:
            _print_activations(result, console, top)
        case ScanKind.T1:
            _print_topology(result, console, top)
        case ScanKind.ATTENTION:
            _print_attention(result, console, top, head)
        case ScanKind.T2:
            print_weights(result.weights(), console, top)
        case ScanKind.DTI:
            print_circuit(result.circuit(), result.manifest.prompt_tokens, console, top)
        case ScanKind.FLAIR:
            print_lens(result.lens(), console)
        case ScanKind.PERTURBATION:
            print_comparison(result.comparison(), result.manifest.prompt_tokens, console, top)
        case ScanKind.PATCHING | ScanKind.TRACING:
            print_restoration(result.restoration(), console)
        case ScanKind.CALIBRATION:
            print_calibration(result.table(), result.manifest, console)
    _print_timing(result, job, console)


def _print_activations(result: Result, console: Console, top: int) -> None:
    scan = result.activations()
    _print_tokens(scan, console)
    last = f"token {scan.positions[-1]} {visible(scan.tokens[-1])}"

    print_heading(f"Next token after {last}", console)
    predictions = result.predictions(scan.positions[-1])[:top]
    names = [visible(prediction.text) for prediction in predictions]
    shares = [prediction.probability for prediction in predictions]
    print_bars(names, shares, [f"{share:.3f}" for share in shares], shares, console)

    scale = scan.scale()
    for kind, name in ((Kind.HEAD, "heads"), (Kind.MLP, "MLPs")):
        hottest = scan.hottest(kind, top)
        if hottest:
            print_heading(f"Hottest {name} at {last} ({scan.unit})", console)
            _print_readings(hottest, scan, console)

    grid = scan.grid()
    if grid.layers:
        print_heading(f"Layer × component at {last}", console)
        for line in heat_strip(grid, scale, console):
            console.print(line, soft_wrap=True)
        console.print(legend(scale, scan.unit, console), soft_wrap=True)


def _print_tokens(scan: ActivationMap, console: Console) -> None:
    shown = list(zip(scan.positions, scan.tokens, scan.sinks, strict=True))
    left_out = len(shown) - _FIRST_TOKENS - _LAST_TOKENS
    if left_out > 0:
        del shown[_FIRST_TOKENS:-_LAST_TOKENS]
    line = Text()
    for at, (position, token, sink) in enumerate(shown):
        if left_out > 0 and at == _FIRST_TOKENS:
            line.append(f"… {left_out} more …  ", style="dim")
        line.append(f"{position}", style="dim").append(f" {visible(token)}")
        line.append("*  " if sink else "  ", style="dim")
    console.print(line)
    if scan.sinks.any():
        console.print(Text("* attention sink: its norms say little about the text", style="dim"))


def _print_readings(readings: Sequence[Reading], scan: ActivationMap, console: Console) -> None:
    values = [reading.value for reading in readings]
    places = scan.scale().place(np.array(values, dtype=np.float32))
    labels = [reading.component.label for reading in readings]
    print_bars(
        labels,
        [value / max(values) if max(values) > 0 else 0.0 for value in values],
        [f"{value:.4g}" for value in values],
        [float(place) for place in places],
        console,
    )


def _print_topology(result: Result, console: Console, top: int) -> None:
    rows = result.table("topology").to_pylist()
    total = sum(row["parameters"] for row in rows)
    console.print(f"{total:,} parameters, each storage counted once")
    print_heading("By kind", console)
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(justify="right")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        counts = [row["parameters"] for row in rows if row["kind"] == kind]
        share = sum(counts) / total if total else 0.0
        table.add_row(f"  {kind}", f"{len(counts)} ×", f"{sum(counts):,}", f"{share:.1%}")
    console.print(table)
    print_heading("Largest components (parameters)", console)
    rows.sort(key=lambda row: -int(row["parameters"]))
    shares = [row["parameters"] / max(total, 1) for row in rows[:top]]
    amounts = [f"{row['parameters']:,}" for row in rows[:top]]
    print_bars([row["component"] for row in rows[:top]], shares, amounts, shares, console)


def _print_attention(result: Result, console: Console, top: int, head: int | None) -> None:
    tokens = [visible(token) for token in result.manifest.prompt_tokens]
    for layer in result.attention_layers:
        pattern = result.attention(layer)
        if head is not None and head >= len(pattern):
            raise typer.BadParameter(
                f"head {head} does not exist: expected 0 to {len(pattern) - 1}",
                param_hint="--head",
            )
        shown = range(len(pattern)) if head is None else [head]
        print_heading(
            f"Layer {layer}: where token {len(tokens) - 1} {tokens[-1]} looks (probability)",
            console,
        )
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        for at in shown:
            last = pattern[at, -1]
            keys = np.argsort(-last, kind="stable")[:top]
            looks = [Text(f"{last[key]:.2f} {key} {tokens[key]}") for key in keys]
            table.add_row(f"  H{at}", *looks)
        console.print(table)


def _print_timing(result: Result, job: JobView, console: Console) -> None:
    manifest = result.manifest
    parts = [
        f"forward {manifest.forward_seconds:.3f} s",
        f"scanner {manifest.compute_seconds:.3f} s",
    ]
    if job.cached:
        parts.append("known already: nothing was computed")
    elif job.finished_at is not None:
        waited: timedelta = job.finished_at - job.created_at
        parts.append(f"submitted to stored {waited.total_seconds():.3f} s")
    parts.append(f"{manifest.numerics.dtype} on {manifest.numerics.device}")
    console.print()
    console.print(Text(" · ".join(parts), style="dim"))
    console.print(Text(f"job {job.id} · scan {manifest.scan_key[:16]}", style="dim"))
