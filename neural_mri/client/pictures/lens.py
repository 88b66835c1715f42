"""FLAIR: how far the lens is from the model's prediction at each layer, and three channels a token."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.patches import Rectangle

from neural_mri.client.colour import Scale, Values
from neural_mri.client.drawing import (
    BACKGROUND,
    FAINT,
    HEAT,
    IN_OUR_FONTS,
    INK,
    Picture,
    colour_bar,
    drawable,
    heat,
    label_tokens,
    new_figure,
    plain,
    subtitle,
)
from neural_mri.client.lens_map import LensMap, Reading
from neural_mri.contract.components import Component, Kind

__all__ = ("lens_picture",)

_MOST_COLUMNS_WITH_TEXT = 18
_ALARM = "#ff5d73"
_CALM = "#7f9bb3"


@IN_OUR_FONTS
def lens_picture(lens: LensMap, title: str) -> Picture:
    """Layer by token, the embedding lowest, with the lens's likeliest tokens; three channels below."""
    divergence = lens.values["kl"]
    n_places, n_columns = divergence.shape
    scale = Scale(0.0, Scale.of(divergence, logarithmic=False).high, logarithmic=False)
    tall = float(np.clip(0.19 * n_places, 2.5, 9.0))
    wide = float(np.clip(0.72 * n_columns + 2.6, 7.0, 14.0))
    figure = new_figure(f"{title}\n{_asked(lens)}".strip(), width=wide, height=tall + 4.6)
    grid = figure.add_gridspec(4, 1, height_ratios=(tall, 0.8, 0.8, 0.8))

    top = figure.add_subplot(grid[0])
    heat(top, divergence, scale, HEAT)
    top.invert_yaxis()
    top.set_xticks([])
    step = -(-n_places // 16)
    ticks = sorted({*range(0, n_places, step), n_places - 1})
    top.set_yticks(ticks, [_place(lens.places[at]) for at in ticks])
    top.set_ylabel("after layer", fontsize=8, color=FAINT)
    _outline(top, lens.values["anomalous"])
    if n_columns <= _MOST_COLUMNS_WITH_TEXT:
        _write_tokens(top, lens, scale, HEAT)
    subtitle(
        top,
        f"D_KL(model ‖ {lens.lens} lens) and the lens's likeliest next token"
        + ("; outlined: anomalous" if lens.false_alarm_rate is not None else ""),
    )
    colour_bar(figure, [top], scale, HEAT, "D_KL(model ‖ lens), nats", aspect=30)

    channels: tuple[tuple[str, str, Callable[[Reading], float], Callable[[Reading], bool]], ...] = (
        ("entropy", "nats", lambda r: r.entropy, lambda r: r.uncertain),
        ("decided at", "share of layers", lambda r: r.depth, lambda _: False),
        (
            "support",
            "ordinary SD",
            lambda r: r.own.support if r.own else np.nan,
            lambda r: bool(r.own and r.own.anomalous),
        ),
    )
    for at, (name, unit, value, flagged) in enumerate(channels):
        axis = figure.add_subplot(grid[at + 1])
        _channel(axis, lens, value, flagged)
        axis.set_ylabel(f"{name}\n{unit}", fontsize=7, color=FAINT)
        if at < len(channels) - 1:
            axis.set_xticks([])
        else:
            nowhere: npt.NDArray[np.bool_] = np.zeros(n_columns, dtype=bool)
            label_tokens(axis, lens.tokens, lens.positions, nowhere, "x")
            axis.set_xlabel(
                "after token (red: beyond the false-alarm rate"
                + (f" of {lens.false_alarm_rate:g})" if lens.false_alarm_rate else ")"),
                fontsize=8,
                color=FAINT,
            )
    return figure


def _asked(lens: LensMap) -> str:
    """The answer and the foil with their support; nothing where the target was not measured."""
    return "   ".join(
        f"{support.role} {drawable(support.text)}: p {np.exp(support.log_probability):.3f}, "
        f"support {support.support:+.2f} SD"
        for support in lens.asked
    )


def _place(component: Component) -> str:
    return "embed" if component.kind is Kind.EMBED else str(component.layer)


def _channel(
    axis: Axes,
    lens: LensMap,
    value: Callable[[Reading], float],
    flagged: Callable[[Reading], bool],
) -> None:
    values = [value(reading) for reading in lens.readings]
    colours = [_ALARM if flagged(reading) else _CALM for reading in lens.readings]
    axis.bar(range(len(values)), np.nan_to_num(values), color=colours, width=0.72)
    axis.set_xlim(-0.5, len(values) - 0.5)
    axis.axhline(0, color=FAINT, linewidth=0.5)
    axis.set_facecolor("none")
    axis.locator_params(axis="y", nbins=3)
    plain(axis)


def _outline(axis: Axes, anomalous: Values) -> None:
    for row, column in np.argwhere(np.nan_to_num(anomalous) > 0):
        corner = (column - 0.47, row - 0.45)
        axis.add_patch(Rectangle(corner, 0.94, 0.9, fill=False, edgecolor=INK, linewidth=1.0))


def _write_tokens(axis: Axes, lens: LensMap, scale: Scale, colours: Colormap) -> None:
    """The likeliest token in each cell, in whichever ink is seen on it."""
    places = scale.place(lens.values["kl"])
    for row, texts in enumerate(lens.likeliest):
        for column, text in enumerate(texts):
            if not text:
                continue
            red, green, blue, _ = colours(places[row, column])
            is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5
            shown = drawable(text).removeprefix("␣") or "␣"
            axis.text(
                column,
                row,
                shown if len(shown) <= 9 else shown[:8] + "…",
                ha="center",
                va="center",
                fontsize=5.5,
                color=BACKGROUND if is_light else INK,
            )
