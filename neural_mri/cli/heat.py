"""Layer by component as coloured cells in a terminal; as block characters where there is no colour."""

from collections.abc import Iterator
from math import isnan

from rich.console import Console
from rich.style import Style
from rich.text import Text

from neural_mri.client.activation_map import Grid
from neural_mri.client.colour import Scale, Values, inferno

__all__ = ("heat_strip", "legend", "shade")

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII = ".:-=+*#%@"
_LABEL_WIDTH = 7
_MOST_FULL_ROWS = 17
"""Up to sixteen heads and the MLP get a line each; beyond that two heads share one."""


def heat_strip(
    grid: Grid, scale: Scale, console: Console, *, across: str = "layer"
) -> Iterator[Text]:
    """The lines of the picture: a header of the numbers of what runs across, then a line a row or two."""
    places = scale.place(grid.values)
    coloured = has_colour(console)
    fits_wide = _LABEL_WIDTH + 2 * len(grid.layers) <= console.width
    width = 2 if coloured and fits_wide else 1
    yield Text(_header(grid.layers, width, across), style="dim")
    for label, upper, lower in _lines(grid, paired=coloured and len(grid.rows) > _MOST_FULL_ROWS):
        line = Text().append(f"{label:>{_LABEL_WIDTH - 1}} ", "dim")
        for column in range(len(grid.layers)):
            top = float(places[upper, column])
            if not coloured:
                line.append(shade(top, console))
            elif lower is None:
                line.append(" " * width, _background(top))
            else:
                bottom = float(places[lower, column])
                line.append("▀" * width, _foreground(top) + _background(bottom))
        yield line


def legend(
    scale: Scale, unit: str, console: Console, *, note: str = "sinks not in the limits"
) -> Text:
    """The colour bar: first value, the colours, last value, unit."""
    bar = Text().append(f"{'':>{_LABEL_WIDTH}}{scale.low:.3g} ", "dim")
    for step in range(8):
        if has_colour(console):
            bar.append("  ", _background(step / 7))
        else:
            bar.append(shade(step / 7, console))
    kind = "log scale" if scale.logarithmic else "linear"
    return bar.append(f" {scale.high:.3g}  {unit}, {kind}, {note}", "dim")


def shade(place: float, console: Console) -> str:
    """One character for a place from 0 to 1: a block of that height, or plain ASCII."""
    if isnan(place):
        return " "
    ramp = _BLOCKS if console.encoding.startswith("utf") else _ASCII
    return ramp[min(int(place * len(ramp)), len(ramp) - 1)]


def frame_strip(values: Values, console: Console) -> Text:
    """One cell a layer, while a scan runs: NaN where it has not been reached."""
    places = Scale.of(values, logarithmic=True).place(values)
    strip = Text(" " * (_LABEL_WIDTH - 1))
    for place in map(float, places):
        if has_colour(console):
            strip.append(
                "▪" if isnan(place) else "█", "dim" if isnan(place) else _foreground(place)
            )
        else:
            strip.append(shade(place, console))
    return strip


def has_colour(console: Console) -> bool:
    """Whether enough colours are there for a colour map: sixteen are not."""
    return console.color_system in {"256", "truecolor", "windows"}


def _lines(grid: Grid, *, paired: bool) -> Iterator[tuple[str, int, int | None]]:
    """Label, row and, where two rows share a line, the second row."""
    heads = [row for row, name in enumerate(grid.rows) if name != "MLP"]
    if paired:
        for upper in heads[::2]:
            lower = upper + 1 if upper + 1 in heads else None
            label = grid.rows[upper] if lower is None else f"{grid.rows[upper]}-{lower}"
            yield label, upper, lower
    else:
        yield from ((grid.rows[row], row, None) for row in heads)
    if "MLP" in grid.rows:
        yield "MLP", grid.rows.index("MLP"), None


def _header(layers: tuple[int, ...], width: int, across: str) -> str:
    """Numbers over their columns, as many as do not touch."""
    line = " " * _LABEL_WIDTH
    for column, layer in enumerate(layers):
        start = _LABEL_WIDTH + column * width
        if layer % 5 == 0 and len(line) <= start:
            line = line.ljust(start) + f"{layer} "
    return f"{across:>{_LABEL_WIDTH - 1}}" + line[_LABEL_WIDTH - 1 :]


def _foreground(place: float) -> Style:
    return Style(color=_hex(place))


def _background(place: float) -> Style:
    return Style(bgcolor=_hex(place))


def _hex(place: float) -> str:
    return "#1b2027" if isnan(place) else inferno(place).hex
