"""T2: how large each component's weights are, where weights lie far out, and what heads copy."""

import numpy as np
from matplotlib.axes import Axes

from neural_mri.client.activation_map import Grid
from neural_mri.client.colour import Scale
from neural_mri.client.drawing import (
    DIVERGING,
    FAINT,
    HEAT,
    IN_OUR_FONTS,
    INK,
    Picture,
    colour_bar,
    heat,
    label_layers,
    label_rows,
    new_figure,
    subtitle,
)
from neural_mri.client.weight_map import WeightMap

__all__ = ("weight_picture",)

_MOST_LISTED = 8


@IN_OUR_FONTS
def weight_picture(found: WeightMap, title: str) -> Picture:
    """Layer by component: RMS with outliers marked, and below it OV copying, or the change where known."""
    size = found.grid(found.rms)
    tall = float(np.clip(0.24 * len(size.rows), 1.6, 7.0))
    figure = new_figure(title, width=11.0, height=2 * tall + 2.6)
    top, bottom = figure.subplots(2, 1)

    scale = Scale.of(size.values, logarithmic=False)
    heat(top, size.values, scale, HEAT)
    _mark_outliers(top, found.grid(found.outlier_share))
    label_layers(top, size.layers)
    label_rows(top, size.rows)
    subtitle(
        top,
        "root mean square of each component's matrices; circles: the area is the share of weights "
        f"beyond {found.outlier_sigma:g} σ",
    )
    colour_bar(figure, [top], scale, HEAT, "RMS weight", aspect=20)

    if found.relative_change is None:
        copying = found.grid(found.copying)
        heads = [at for at, name in enumerate(copying.rows) if name != "MLP"]
        names = tuple(copying.rows[at] for at in heads)
        grid = Grid(names, copying.layers, copying.values[heads])
        limits = Scale(-1.0, 1.0, logarithmic=False)
        colours, label = DIVERGING, "copying score, -1 to 1"
        subtitle(bottom, "what each head moves, OV: above 0 it copies the tokens it attends to")
    else:
        grid = found.grid(found.relative_change)
        limits = Scale.of(grid.values, logarithmic=False)
        colours, label = HEAT, "|W - W₀| / |W₀|"
        subtitle(bottom, f"change from {found.baseline}, relative to its norm")
    heat(bottom, grid.values, limits, colours)
    label_layers(bottom, grid.layers)
    label_rows(bottom, grid.rows)
    colour_bar(figure, [bottom], limits, colours, label, aspect=20)

    farthest = [
        f"{outlier.place}  {outlier.value:+.3g}  ({outlier.z:+.0f} σ)"
        for outlier in found.outliers[:_MOST_LISTED]
    ]
    half = -(-len(farthest) // 2)
    lines = [
        f"{left:<52}{right}"
        for left, right in zip(farthest[:half], [*farthest[half:], ""][:half], strict=True)
    ]
    if lines:
        text = "farthest weights\n" + "\n".join(lines)
        figure.supxlabel(text, x=0.02, ha="left", fontsize=7, color=FAINT)
    return figure


def _mark_outliers(axis: Axes, shares: Grid) -> None:
    rows, columns = np.nonzero(np.nan_to_num(shares.values) > 0)
    found = shares.values[rows, columns]
    if found.size:
        areas = 60 * found / found.max()
        axis.scatter(columns, rows, s=areas, facecolors="none", edgecolors=INK, linewidths=0.8)
