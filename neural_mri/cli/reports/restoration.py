"""Patching and tracing as text: the peak of each map, and the maps themselves, small."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import numpy as np
from rich.console import Console
from rich.text import Text

from neural_mri.cli.heat import heat_strip, legend
from neural_mri.cli.listing import print_bars, print_heading
from neural_mri.client import Grid, Restoration
from neural_mri.client.colour import Scale
from neural_mri.client.restoration import RestorationMap
from neural_mri.client.text import visible

__all__ = ("print_restoration",)


def print_restoration(found: Restoration, console: Console) -> None:
    """The question, where each map peaks, and each map by layer and token."""
    foil = "" if found.foil is None else f" rather than {visible(found.foil)}"
    console.print(Text(f"Next token after token {found.position}: {visible(found.answer)}{foil}"))
    line = (
        f"clean {found.clean:.4g}, corrupted {found.corrupted:.4g} {found.metric_unit}; "
        f"p {found.probability_clean:.4f}, {found.probability_corrupted:.4f}"
    )
    console.print(Text(line, style="dim"))
    tokens = Text()
    for position, token in enumerate(found.tokens):
        tokens.append(f"{position}", style="dim").append(f" {visible(token)}  ")
    console.print(tokens)

    peaks = [(one.name, peak) for one in found.maps if (peak := one.peak) is not None]
    if not peaks:
        console.print("nothing to restore: the two runs agree")
        return
    print_heading(f"Where each map is largest ({found.quantity}, {found.unit})", console)
    largest = max(abs(peak.value) for _, peak in peaks) or 1.0
    shares = [max(peak.value, 0.0) / largest for _, peak in peaks]
    print_bars(
        [
            f"{peak.place} at {peak.position} {visible(found.tokens[peak.position])}"
            for _, peak in peaks
        ],
        shares,
        [f"{peak.value:.4f}" for _, peak in peaks],
        shares,
        console,
        notes=[name for name, _ in peaks],
    )
    top = max(float(np.nanmax(one.values)) for one in found.maps if one.peak is not None)
    scale = Scale(0.0, max(top, 1e-6), logarithmic=False)
    print_heading("Layer × token", console)
    for row in _beside_one_another(found.maps, scale, console):
        console.print(row, soft_wrap=True)
    console.print(
        legend(scale, f"{found.quantity}, {found.unit}", console, note="below 0 as 0"),
        soft_wrap=True,
    )


def _beside_one_another(
    maps: Sequence[RestorationMap], scale: Scale, console: Console
) -> Iterator[Text]:
    """As many maps in a row as fit, each under its name."""
    pictures = []
    for one in maps:
        strips = heat_strip(_by_layer(one), scale, console, across="token")
        pictures.append([Text(f"{'':>7}{one.name}", style="dim"), *strips])
    width = 2 + max(line.cell_len for lines in pictures for line in lines)
    abreast = max(console.width // width, 1)
    for first in range(0, len(pictures), abreast):
        for lines in zip_longest(*pictures[first : first + abreast], fillvalue=Text("")):
            row = Text()
            for line in lines:
                row.append_text(line).append(" " * (width - line.cell_len))
            row.rstrip()
            yield row


def _by_layer(one: RestorationMap) -> Grid:
    """Rows by layer; of heads, the largest of each layer."""
    layers = sorted(
        {component.layer for component in one.components if component.layer is not None}
    )
    rows = [
        np.fmax.reduce(
            [
                one.values[row]
                for row, component in enumerate(one.components)
                if component.layer == layer
            ]
        )
        for layer in layers
    ]
    values = np.array(rows, dtype=np.float32)
    return Grid(tuple(f"L{layer}" for layer in layers), tuple(range(values.shape[1])), values)
