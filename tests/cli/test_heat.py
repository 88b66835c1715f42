"""The picture in the terminal shows every component once, with colour and without."""

import io
from typing import Literal

import numpy as np
import pytest
from rich.console import Console

from neural_mri.cli.heat import frame_strip, heat_strip, legend, shade
from neural_mri.client.activation_map import Grid
from neural_mri.client.colour import Scale


def console(*, colour: bool, width: int = 100, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    system: Literal["truecolor"] | None = "truecolor" if colour else None
    return Console(file=file, width=width, color_system=system, force_terminal=colour)


def grid(n_heads: int, n_layers: int) -> Grid:
    values = np.arange(1, (n_heads + 1) * n_layers + 1, dtype=np.float32)
    rows = (*(f"H{head}" for head in range(n_heads)), "MLP")
    return Grid(rows, tuple(range(n_layers)), values.reshape(n_heads + 1, n_layers))


def lines(picture: Grid, where: Console) -> list[str]:
    scale = Scale.of(picture.values, logarithmic=True)
    return [line.plain for line in heat_strip(picture, scale, where)]


def test_without_colour_a_cell_is_a_block_as_high_as_its_value() -> None:
    drawn = lines(grid(2, 6), console(colour=False))
    assert drawn == [" layer 0    5 ", "    H0 ▁▂▃▄▅▅", "    H1 ▆▆▆▇▇▇", "   MLP ██████"]


def test_a_terminal_without_unicode_is_drawn_in_ascii() -> None:
    drawn = lines(grid(2, 6), console(colour=False, encoding="ascii"))
    assert "".join(drawn).isascii()


def test_cells_are_two_columns_wide_where_they_fit() -> None:
    wide, narrow = (lines(grid(3, 30), console(colour=True, width=w)) for w in (80, 60))
    assert {len(line) for line in wide[1:]} == {7 + 60}
    assert {len(line) for line in narrow[1:]} == {7 + 30}


@pytest.mark.parametrize(("n_heads", "n_lines"), [(16, 17), (17, 10), (32, 17), (33, 18)])
def test_many_heads_share_lines_two_by_two(n_heads: int, n_lines: int) -> None:
    drawn = lines(grid(n_heads, 4), console(colour=True))[1:]
    assert len(drawn) == n_lines
    named = [int(name) for line in drawn[:-1] for name in line.split()[0][1:].split("-")]
    assert named == list(range(n_heads))


def test_what_was_not_measured_is_left_blank() -> None:
    picture = grid(2, 3)
    picture.values[0, 1] = np.nan
    where = console(colour=False)
    assert lines(picture, where)[1][8] == " "
    assert shade(float("nan"), where) == " "


def test_the_legend_has_limits_and_unit() -> None:
    text = legend(Scale(0.5, 1234.0, logarithmic=True), "L2 norm", console(colour=False)).plain
    assert text.split()[0] == "0.5"
    assert "1.23e+03  L2 norm, log scale" in text


def test_layers_not_reached_yet_are_blank_while_a_scan_runs() -> None:
    values = np.array([1, np.nan, 9], dtype=np.float32)
    assert frame_strip(values, console(colour=False)).plain.strip(" ") == "▁ █"
    assert len(frame_strip(values, console(colour=True)).plain.strip(" ")) == 3
