"""DTI: the effect of every component on an answer, the strongest of them, and the paths between them."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from neural_mri.client.circuit_map import CircuitMap
from neural_mri.client.colour import Scale, Values, blue_orange
from neural_mri.client.drawing import (
    BACKGROUND,
    DIVERGING,
    FAINT,
    IN_OUR_FONTS,
    INK,
    Picture,
    colour_bar,
    drawable,
    heat,
    label_layers,
    label_rows,
    new_figure,
    plain,
    subtitle,
)

__all__ = ("circuit_picture",)

_MOST_BARS = 14
_BELOW, _ABOVE = blue_orange(0.2).hex, blue_orange(0.8).hex


@IN_OUR_FONTS
def circuit_picture(circuit: CircuitMap, prompt_tokens: Sequence[str], title: str) -> Picture:
    """Effects by layer around 0, measured ones dotted; below, the strongest components and paths."""
    grid = circuit.grid()
    scale = Scale.around_zero(grid.values)
    tall = float(np.clip(0.26 * len(grid.rows), 2.2, 7.0))
    figure = new_figure(f"{title}\n{_asked(circuit, prompt_tokens)}", width=11.0, height=tall + 5.0)
    has_edges = bool(circuit.edges)
    panels = figure.add_gridspec(2, 2 if has_edges else 1, height_ratios=(tall, 3.0))

    top = figure.add_subplot(panels[0, :])
    heat(top, grid.values, scale, DIVERGING)
    _dot_measured(top, circuit.exact_grid().values)
    label_layers(top, grid.layers)
    label_rows(top, grid.rows)
    if circuit.is_direct:
        subtitle(top, "direct term of each component: orange writes towards the answer")
    else:
        subtitle(
            top,
            f"effect of replacing each component ({circuit.ablation}): blue helps the answer; "
            "dots: measured, else first-order estimates",
        )
    name = "direct term" if circuit.is_direct else f"change of {circuit.question.metric}"
    unit = "logits" if circuit.is_direct else circuit.unit
    colour_bar(figure, [top], scale, DIVERGING, f"{name}, {unit}", aspect=20)

    left = figure.add_subplot(panels[1, 0])
    strongest = circuit.strongest(_MOST_BARS)
    _bars(
        left,
        [
            effect.component.label + ("" if effect.exact or circuit.is_direct else " ≈")
            for effect in strongest
        ],
        [circuit.value(effect) for effect in strongest],
    )
    left.set_xlabel(f"{name}, {unit}", fontsize=8, color=FAINT)
    subtitle(left, "strongest components" + ("" if circuit.is_direct else " (≈ estimate)"))
    if has_edges:
        right = figure.add_subplot(panels[1, 1])
        edges = circuit.edges[:_MOST_BARS]
        _bars(
            right,
            [f"{edge.source.label} → {edge.target.label}" for edge in edges],
            [edge.strength for edge in edges],
        )
        right.set_xlabel("first-order effect of the path, logits", fontsize=8, color=FAINT)
        subtitle(right, "strongest paths")
    return figure


def _asked(circuit: CircuitMap, prompt_tokens: Sequence[str]) -> str:
    asked = circuit.question
    first = max(0, asked.position - 15)
    before = drawable("".join(prompt_tokens[first : asked.position + 1])).replace("␣", " ")
    foil = "" if asked.foil is None else f" rather than {drawable(asked.foil)}"
    return (
        f"{'… ' if first else ''}{before} → {drawable(asked.answer)}{foil}\n"
        f"{asked.metric} {asked.clean:.3g} {circuit.unit}, p {asked.probability_clean:.3f}"
    )


def _dot_measured(axis: Axes, exact: Values) -> None:
    rows, columns = np.nonzero(np.nan_to_num(exact) > 0)
    axis.scatter(columns, rows, s=4, color=INK, edgecolors=BACKGROUND, linewidths=0.5)


def _bars(axis: Axes, names: Sequence[str], values: Sequence[float]) -> None:
    """Signed bars, the first on top, each with its number."""
    colours = [_BELOW if value < 0 else _ABOVE for value in values]
    axis.barh(range(len(values)), values, color=colours, height=0.7)
    axis.set_yticks(range(len(values)), names)
    axis.axvline(0, color=FAINT, linewidth=0.6)
    axis.set_facecolor("none")
    plain(axis)
    low, high = min(values, default=0.0), max(values, default=0.0)
    low, high = min(low, 0.0), max(high, 0.0)
    span = (high - low) or 1.0
    # Room for the numbers on whichever side bars grow; few bars stay as thin as many.
    axis.set_xlim(low - 0.16 * span * (low < 0), high + 0.16 * span * (high > 0))
    axis.set_ylim(max(len(values), _MOST_BARS) - 0.5, -0.5)
    for row, value in enumerate(values):
        side = -1 if value < 0 else 1
        axis.text(
            value + side * 0.012 * span,
            row,
            f"{value:+.3g}",
            va="center",
            ha="left" if side > 0 else "right",
            fontsize=6.5,
            color=INK,
        )
