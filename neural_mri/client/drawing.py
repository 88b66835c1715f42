"""What all pictures are drawn with: one background, one ink, colour bars with units.

Imports matplotlib, so it is itself imported only when a picture is asked for. Figures are not registered
with pyplot: nothing pops up, nothing stays alive, and a notebook shows the figure that a cell returns.
"""

import io
from collections.abc import Sequence
from functools import cache

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.ticker import LogFormatter

from neural_mri.client.colour import Scale, Values, blue_orange, grey, inferno
from neural_mri.client.text import visible

__all__ = (
    "BACKGROUND",
    "DIVERGING",
    "FAINT",
    "GREY",
    "HEAT",
    "INK",
    "IN_OUR_FONTS",
    "Picture",
    "colour_bar",
    "drawable",
    "heat",
    "label_layers",
    "label_rows",
    "label_tokens",
    "new_figure",
    "plain",
    "subtitle",
)

BACKGROUND = "#0a0c10"
UNMEASURED = "#1b2027"
INK = "#d5dde6"
FAINT = "#8593a3"
NOTHING = "nothing that was measured lies on this grid"
_FONTS = [
    name
    for name in ("JetBrains Mono", "DejaVu Sans Mono", "Noto Sans Mono CJK KR", "Noto Sans CJK KR")
    if name in fontManager.get_font_names()
]
"""Of the fonts we would like, those that are here; matplotlib brings DejaVu itself."""
IN_OUR_FONTS = mpl.rc_context(
    {
        "font.family": _FONTS,
        # Dollars and backslashes of a prompt are characters, not formulas.
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
    }
)
"""Around what makes a picture's texts: each keeps what it was made with, whenever it is drawn."""

HEAT = LinearSegmentedColormap.from_list(
    "inferno-lit", [tuple(c / 255 for c in inferno(step / 63)) for step in range(64)]
)
DIVERGING = LinearSegmentedColormap.from_list(
    "blue-orange", [blue_orange(step / 64).hex for step in range(65)]
)
GREY = LinearSegmentedColormap.from_list("grey-lit", [grey(0).hex, grey(1).hex])

_MOST_TOKEN_LABELS = 48
_MOST_HEAD_LABELS = 24


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself."""

    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        self.savefig(sink, format="png", dpi=110)
        return sink.getvalue()


def new_figure(title: str, *, width: float, height: float) -> Picture:
    """An empty picture, sizes in inches."""
    figure = Picture(figsize=(width, height), facecolor=BACKGROUND, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _norm(scale: Scale) -> Normalize:
    return (LogNorm if scale.logarithmic else Normalize)(scale.low, scale.high, clip=True)


def heat(axis: Axes, values: Values, scale: Scale, colours: Colormap) -> None:
    """Values as cells, `[row column]`; NaN, not measured, in the colour of the ground.

    Where there is no cell at all, a sentence says so.
    """
    axis.set_facecolor(UNMEASURED)
    plain(axis)
    if not values.size:
        axis.text(0.5, 0.5, NOTHING, transform=axis.transAxes, ha="center", fontsize=8, color=FAINT)
        return
    shown = np.ma.masked_invalid(np.maximum(values, scale.low) if scale.logarithmic else values)
    axis.imshow(shown, cmap=colours, norm=_norm(scale), aspect="auto", interpolation="nearest")


def plain(axis: Axes) -> None:
    """Neither frame nor tick marks; small labels."""
    axis.tick_params(length=0, colors=FAINT, labelsize=7, labelfontfamily=_FONTS)
    for side in axis.spines.values():
        side.set_visible(False)


def subtitle(axis: Axes, text: str) -> None:
    """What one panel shows."""
    axis.set_title(text, loc="left", fontsize=9, color=FAINT)


def label_layers(axis: Axes, layers: Sequence[int]) -> None:
    """Layer numbers under columns that are layers."""
    step = max(1, -(-len(layers) // 40))
    ticks = range(0, len(layers), step)
    axis.set_xticks(ticks, [str(layers[at]) for at in ticks])
    axis.set_xlabel("layer", fontsize=8, color=FAINT)


def label_rows(axis: Axes, names: Sequence[str]) -> None:
    """Names beside rows, the last one always, as many others as do not touch."""
    step = max(1, -(-len(names) // _MOST_HEAD_LABELS))
    last = len(names) - 1
    ticks = [at for at in range(len(names)) if at == last or (at % step == 0 and last - at >= step)]
    axis.set_yticks(ticks, [names[at] for at in ticks])


def label_tokens(
    axis: Axes,
    tokens: Sequence[str],
    positions: Sequence[int],
    sinks: npt.NDArray[np.bool_],
    side: str,
) -> None:
    """Tokens with their positions, along `x` or `y`; sinks bear a star."""
    step = -(-len(tokens) // _MOST_TOKEN_LABELS)
    ticks = range(0, len(tokens), step)
    labels = [f"{positions[at]} {drawable(tokens[at])}{' *' if sinks[at] else ''}" for at in ticks]
    if side == "x":
        axis.set_xticks(ticks, labels, rotation=60, ha="right", rotation_mode="anchor")
    else:
        axis.set_yticks(ticks, labels)


def drawable(token: str) -> str:
    """A token as our fonts can draw it: a box for each character that none of them has."""
    return "".join(c if ord(c) in _drawable() else "□" for c in visible(token))


@cache
def _drawable() -> frozenset[int]:
    return frozenset().union(*(get_font(findfont(name)).get_charmap() for name in _FONTS))


def colour_bar(
    figure: Picture,
    axes: Sequence[Axes],
    scale: Scale,
    colours: Colormap,
    label: str,
    *,
    aspect: float = 40,
) -> None:
    """What the colours mean, with the unit; `axes` are the panels that share it. Without a picture in any of them, none."""
    if not any(axis.images for axis in axes):
        return
    bar = figure.colorbar(
        ScalarMappable(_norm(scale), colours),
        ax=list(axes),
        fraction=0.03,
        pad=0.015,
        aspect=aspect,
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=FAINT, labelsize=7, labelfontfamily=_FONTS, which="both", length=2)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    if scale.logarithmic:  # where there is less than a decade; matplotlib's own would be formulas
        bar.ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    bar.set_label(label, fontsize=8, color=INK)
