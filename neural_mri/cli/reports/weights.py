"""T2 as text."""

import numpy as np
from rich.console import Console
from rich.table import Table

from neural_mri.cli.heat import heat_strip, legend
from neural_mri.cli.listing import print_bars, print_heading
from neural_mri.client import WeightMap
from neural_mri.client.colour import Scale, Values

__all__ = ("print_weights",)


def print_weights(found: WeightMap, console: Console, top: int) -> None:
    """The largest weights by component, the farthest single weights, and what changed or copies."""
    if found.relative_change is not None:
        print_heading(f"Most changed from {found.baseline} (|W - W₀| / |W₀|)", console)
        _print_ranked(found, found.relative_change, console, top)
    grid = found.grid(found.rms)
    scale = Scale.of(grid.values, logarithmic=False)
    if grid.layers:
        print_heading("Layer × component (RMS weight)", console)
        for line in heat_strip(grid, scale, console):
            console.print(line, soft_wrap=True)
        console.print(legend(scale, "RMS weight", console, note="2nd to 98th percentile"))
    print_heading("Largest weights (RMS of a component's matrices)", console)
    _print_ranked(found, found.rms, console, top)
    if found.outliers:
        print_heading("Farthest weights (standard deviations from their tensor's mean)", console)
        table = Table.grid(padding=(0, 2))
        for justify in ("right", "left", "right", "right"):
            table.add_column(justify=justify, style="dim" if justify == "right" else "")
        for rank, outlier in enumerate(found.outliers[:top], 1):
            table.add_row(
                f"  {rank}", outlier.place, f"{outlier.value:+.4g}", f"{outlier.z:+.1f} σ"
            )
        console.print(table)
    if np.isfinite(found.copying).any():
        print_heading("Heads that copy what they attend to (OV copying score, -1 to 1)", console)
        _print_ranked(found, found.copying, console, top)


def _print_ranked(found: WeightMap, values: Values, console: Console, top: int) -> None:
    ranked = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")[:top]
    order = [row for row in ranked if np.isfinite(values[row])]
    largest = max((float(values[row]) for row in order), default=1.0)
    shares = [max(float(values[row]) / largest, 0.0) if largest > 0 else 0.0 for row in order]
    names = [found.components[row].label for row in order]
    print_bars(names, shares, [f"{float(values[row]):.4g}" for row in order], shares, console)
