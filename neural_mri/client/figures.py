"""Pictures of structure, activations and attention, by matplotlib, for dark backgrounds.

Imports matplotlib, so it is itself imported only when a picture is asked for.
"""

from collections.abc import Sequence
from math import ceil, sqrt

import numpy as np
import numpy.typing as npt

from neural_mri.client.activation_map import ActivationMap, Grid
from neural_mri.client.colour import Scale
from neural_mri.client.drawing import (
    FAINT,
    GREY,
    HEAT,
    IN_OUR_FONTS,
    INK,
    Picture,
    colour_bar,
    drawable,
    heat,
    label_layers,
    label_rows,
    label_tokens,
    new_figure,
)
from neural_mri.contract.components import Kind

__all__ = ("activation_picture", "attention_picture", "topology_picture")


@IN_OUR_FONTS
def activation_picture(
    scan: ActivationMap, title: str, *, position: int, logarithmic: bool
) -> Picture:
    """Layer by component at one token; below it, layer by token for MLPs and attention layers.

    All three share one scale, whose limits leave attention sinks out.
    """
    scale = scan.scale(logarithmic=logarithmic)
    column = scan.column(position)
    token = f"{scan.positions[column]} {drawable(scan.tokens[column])}"
    by_component = scan.grid(position)
    by_token = {
        name: grid
        for name, kind in (("MLP", Kind.MLP), ("attention", Kind.ATTN))
        if (grid := scan.by_token(kind)).rows
    }

    n_rows = len(by_component.rows)
    upper = float(np.clip(0.24 * n_rows, 1.6, 7.0))
    lower = float(
        np.clip(0.14 * max((len(g.rows) for g in by_token.values()), default=0), 1.6, 5.0)
    )
    figure = new_figure(title, width=11.0, height=upper + lower + 2.6)
    panels = figure.add_gridspec(
        2, max(len(by_token), 1), height_ratios=(upper, lower), hspace=0.1, wspace=0.06
    )
    top = figure.add_subplot(panels[0, :])
    heat(top, by_component.values, scale, HEAT)
    label_layers(top, by_component.layers)
    label_rows(top, by_component.rows)
    top.set_title(f"layer × component at token {token}", loc="left", fontsize=9, color=FAINT)

    axes = [top]
    for at, (name, grid) in enumerate(by_token.items()):
        axis = figure.add_subplot(panels[1, at])
        heat(axis, grid.values, scale, HEAT)
        label_tokens(axis, scan.tokens, scan.positions, scan.sinks, "x")
        if at == 0:
            label_rows(axis, grid.rows)
        else:
            axis.set_yticks([])
        axis.axvline(column, color=INK, linewidth=0.6, linestyle=":")
        axis.set_title(f"{name}, layer × token", loc="left", fontsize=9, color=FAINT)
        axes.append(axis)

    notes = [scan.unit]
    if logarithmic:
        notes.append("log scale")
    if scan.sinks.any() and not scan.sinks.all():
        notes.append("sinks (*) not in the limits")
    colour_bar(figure, axes, scale, HEAT, ", ".join(notes))
    return figure


@IN_OUR_FONTS
def topology_picture(grid: Grid, title: str) -> Picture:
    """Parameters of every head and MLP, layer by component, in greys."""
    scale = Scale.of(grid.values, logarithmic=True)
    figure = new_figure(
        title, width=11.0, height=float(np.clip(0.24 * len(grid.rows), 1.6, 7)) + 1.8
    )
    axis = figure.add_subplot()
    heat(axis, grid.values, scale, GREY)
    label_layers(axis, grid.layers)
    label_rows(axis, grid.rows)
    colour_bar(figure, [axis], scale, GREY, "parameters, log scale")
    return figure


@IN_OUR_FONTS
def attention_picture(
    pattern: npt.NDArray[np.float32], heads: Sequence[int], tokens: Sequence[str], title: str
) -> Picture:
    """One square a head, query by key. The limits leave the first key out: it is the usual sink."""
    n_heads, n_tokens, _ = pattern.shape
    queries, keys = np.tril_indices(n_tokens)
    counted = keys > 0 if n_tokens > 1 else keys >= 0
    high = float(np.percentile(pattern[:, queries[counted], keys[counted]], 99))
    scale = Scale(0.0, max(high, 1e-6), logarithmic=False)
    columns = ceil(sqrt(n_heads))
    rows = -(-n_heads // columns)
    side = 2.6 if n_heads > 1 else 6.0
    figure = new_figure(title, width=columns * side + 1.6, height=rows * side + 1.8)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    above_diagonal = np.triu(np.ones((n_tokens, n_tokens), dtype=bool), 1)
    no_sinks = np.zeros(n_tokens, dtype=bool)
    for axis, head, square in zip(axes, heads, pattern, strict=False):
        heat(axis, np.where(above_diagonal, np.nan, square), scale, HEAT)
        axis.set_aspect("equal")
        axis.set_title(f"H{head}", loc="left", fontsize=9, color=FAINT)
        at = axes.index(axis)
        if at + columns >= n_heads:
            label_tokens(axis, tokens, range(n_tokens), no_sinks, "x")
        else:
            axis.set_xticks([])
        if at % columns == 0:
            label_tokens(axis, tokens, range(n_tokens), no_sinks, "y")
        else:
            axis.set_yticks([])
    for axis in axes[n_heads:]:
        axis.set_axis_off()
    figure.supxlabel("key", fontsize=9, color=FAINT)
    figure.supylabel("query", fontsize=9, color=FAINT)
    note = "attention probability" + (", key 0 not in the limits" if n_tokens > 1 else "")
    colour_bar(figure, axes, scale, HEAT, note)
    return figure
