"""Pictures of results, by matplotlib, for dark backgrounds.

Imports matplotlib, so it is itself imported only when a picture is asked for. Figures are not registered
with pyplot: nothing pops up, nothing stays alive, and a notebook shows the figure that a cell returns.
"""

import io
from collections.abc import Sequence
from functools import cache
from math import ceil, sqrt

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font

from neural_mri.client.activation_map import ActivationMap, Grid
from neural_mri.client.colour import Scale, Values, grey, inferno
from neural_mri.client.text import visible
from neural_mri.contract.components import Kind

__all__ = ("Picture", "activation_picture", "attention_picture", "topology_picture")

_BACKGROUND = "#0a0c10"
_UNMEASURED = "#1b2027"
_INK = "#d5dde6"
_FAINT = "#8593a3"
_FONTS = [
    name
    for name in ("JetBrains Mono", "DejaVu Sans Mono", "Noto Sans Mono CJK KR", "Noto Sans CJK KR")
    if name in fontManager.get_font_names()
]
"""Of the fonts we would like, those that are here; matplotlib brings DejaVu itself."""
_IN_OUR_FONTS = mpl.rc_context({"font.family": _FONTS})

_HEAT = LinearSegmentedColormap.from_list(
    "inferno-lit", [tuple(c / 255 for c in inferno(step / 63)) for step in range(64)]
)
_GREY = LinearSegmentedColormap.from_list("grey-lit", [grey(0).hex, grey(1).hex])

_MOST_TOKEN_LABELS = 48
_MOST_HEAD_LABELS = 24


class Picture(Figure):
    """A matplotlib figure that a notebook shows by itself."""

    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        self.savefig(sink, format="png", dpi=110)
        return sink.getvalue()


@_IN_OUR_FONTS
def activation_picture(
    scan: ActivationMap, title: str, *, position: int, logarithmic: bool
) -> Picture:
    """Layer by component at one token; below it, layer by token for MLPs and attention layers.

    All three share one scale, whose limits leave attention sinks out.
    """
    scale = scan.scale(logarithmic=logarithmic)
    column = scan.column(position)
    token = f"{scan.positions[column]} {_label(scan.tokens[column])}"
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
    figure = _figure(title, width=11.0, height=upper + lower + 2.6)
    panels = figure.add_gridspec(
        2, max(len(by_token), 1), height_ratios=(upper, lower), hspace=0.1, wspace=0.06
    )
    top = figure.add_subplot(panels[0, :])
    _heat(top, by_component.values, scale, _HEAT)
    _label_layers(top, by_component.layers)
    _label_rows(top, by_component.rows)
    top.set_title(f"layer × component at token {token}", loc="left", fontsize=9, color=_FAINT)

    axes = [top]
    for at, (name, grid) in enumerate(by_token.items()):
        axis = figure.add_subplot(panels[1, at])
        _heat(axis, grid.values, scale, _HEAT)
        _label_tokens(axis, scan.tokens, scan.positions, scan.sinks, "x")
        if at == 0:
            _label_rows(axis, grid.rows)
        else:
            axis.set_yticks([])
        axis.axvline(column, color=_INK, linewidth=0.6, linestyle=":")
        axis.set_title(f"{name}, layer × token", loc="left", fontsize=9, color=_FAINT)
        axes.append(axis)

    notes = [scan.unit]
    if logarithmic:
        notes.append("log scale")
    if scan.sinks.any() and not scan.sinks.all():
        notes.append("sinks (*) not in the limits")
    _colour_bar(figure, axes, scale, _HEAT, ", ".join(notes))
    return figure


@_IN_OUR_FONTS
def topology_picture(grid: Grid, title: str) -> Picture:
    """Parameters of every head and MLP, layer by component, in greys."""
    scale = Scale.of(grid.values, logarithmic=True)
    figure = _figure(title, width=11.0, height=float(np.clip(0.24 * len(grid.rows), 1.6, 7)) + 1.8)
    axis = figure.add_subplot()
    _heat(axis, grid.values, scale, _GREY)
    _label_layers(axis, grid.layers)
    _label_rows(axis, grid.rows)
    _colour_bar(figure, [axis], scale, _GREY, "parameters, log scale")
    return figure


@_IN_OUR_FONTS
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
    figure = _figure(title, width=columns * side + 1.6, height=rows * side + 1.8)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    above_diagonal = np.triu(np.ones((n_tokens, n_tokens), dtype=bool), 1)
    no_sinks = np.zeros(n_tokens, dtype=bool)
    for axis, head, square in zip(axes, heads, pattern, strict=False):
        _heat(axis, np.where(above_diagonal, np.nan, square), scale, _HEAT)
        axis.set_aspect("equal")
        axis.set_title(f"H{head}", loc="left", fontsize=9, color=_FAINT)
        at = axes.index(axis)
        if at + columns >= n_heads:
            _label_tokens(axis, tokens, range(n_tokens), no_sinks, "x")
        else:
            axis.set_xticks([])
        if at % columns == 0:
            _label_tokens(axis, tokens, range(n_tokens), no_sinks, "y")
        else:
            axis.set_yticks([])
    for axis in axes[n_heads:]:
        axis.set_axis_off()
    figure.supxlabel("key", fontsize=9, color=_FAINT)
    figure.supylabel("query", fontsize=9, color=_FAINT)
    note = "attention probability" + (", key 0 not in the limits" if n_tokens > 1 else "")
    _colour_bar(figure, axes, scale, _HEAT, note)
    return figure


def _figure(title: str, *, width: float, height: float) -> Picture:
    figure = Picture(figsize=(width, height), facecolor=_BACKGROUND, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    return figure


def _norm(scale: Scale) -> Normalize:
    return (LogNorm if scale.logarithmic else Normalize)(scale.low, scale.high, clip=True)


def _heat(axis: Axes, values: Values, scale: Scale, colours: Colormap) -> None:
    shown = np.ma.masked_invalid(np.maximum(values, scale.low) if scale.logarithmic else values)
    axis.imshow(shown, cmap=colours, norm=_norm(scale), aspect="auto", interpolation="nearest")
    axis.set_facecolor(_UNMEASURED)
    axis.tick_params(length=0, colors=_FAINT, labelsize=7, labelfontfamily=_FONTS)
    for side in axis.spines.values():
        side.set_visible(False)


def _label_layers(axis: Axes, layers: Sequence[int]) -> None:
    step = -(-len(layers) // 40)
    ticks = range(0, len(layers), step)
    axis.set_xticks(ticks, [str(layers[at]) for at in ticks])
    axis.set_xlabel("layer", fontsize=8, color=_FAINT)


def _label_rows(axis: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // _MOST_HEAD_LABELS)
    ticks = [at for at in range(len(names)) if at % step == 0 or at == len(names) - 1]
    axis.set_yticks(ticks, [names[at] for at in ticks])


def _label_tokens(
    axis: Axes,
    tokens: Sequence[str],
    positions: Sequence[int],
    sinks: npt.NDArray[np.bool_],
    side: str,
) -> None:
    step = -(-len(tokens) // _MOST_TOKEN_LABELS)
    ticks = range(0, len(tokens), step)
    labels = [f"{positions[at]} {_label(tokens[at])}{' *' if sinks[at] else ''}" for at in ticks]
    if side == "x":
        axis.set_xticks(ticks, labels, rotation=60, ha="right", rotation_mode="anchor")
    else:
        axis.set_yticks(ticks, labels)


def _label(token: str) -> str:
    """A token as our fonts can draw it: a box for each character that none of them has."""
    return "".join(c if ord(c) in _drawable() else "□" for c in visible(token))


@cache
def _drawable() -> frozenset[int]:
    return frozenset().union(*(get_font(findfont(name)).get_charmap() for name in _FONTS))


def _colour_bar(
    figure: Picture, axes: Sequence[Axes], scale: Scale, colours: Colormap, label: str
) -> None:
    bar = figure.colorbar(
        ScalarMappable(_norm(scale), colours), ax=list(axes), fraction=0.03, pad=0.015, aspect=40
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_FAINT, labelsize=7, labelfontfamily=_FONTS, which="both", length=2)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    bar.set_label(label, fontsize=8, color=_INK)
