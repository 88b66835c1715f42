"""Pieces that reports are made of: headings, ranked bars, small tables."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neural_mri.cli.heat import has_colour
from neural_mri.client.colour import blue_orange, inferno

__all__ = ("print_bars", "print_heading", "print_signed")

_BAR_WIDTH = 24


def print_bars(
    names: Sequence[str],
    shares: Sequence[float],
    amounts: Sequence[str],
    heats: Sequence[float],
    console: Console,
    *,
    notes: Sequence[str] = (),
) -> None:
    """Ranked rows: name, amount, and a bar of `share` (0 to 1) in the colour of `heat` (0 to 1).

    `notes` stand after the amounts.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim")
    table.add_column(max_width=32, no_wrap=True)
    table.add_column(justify="right")
    if notes:
        table.add_column(style="dim")
    table.add_column()
    for rank, (name, share, amount, heat) in enumerate(
        zip(names, shares, amounts, heats, strict=True), 1
    ):
        colour = inferno(max(heat, 0.3)).hex if has_colour(console) else ""
        block = "█" if console.encoding.startswith("utf") else "#"
        bar = Text(block * max(round(share * _BAR_WIDTH), int(share > 0)), style=colour)
        said = (notes[rank - 1],) if notes else ()
        table.add_row(f"  {rank}", Text(name), amount, *said, bar)
    console.print(table)


def print_signed(
    names: Sequence[str], values: Sequence[float], notes: Sequence[str], console: Console
) -> None:
    """Ranked rows of values with a sign, bars as long as their sizes; blue below 0, orange above."""
    reach = max(map(abs, values), default=0.0) or 1.0
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim")
    table.add_column(max_width=40, no_wrap=True)
    table.add_column(justify="right")
    if any(notes):
        table.add_column(style="dim")
    table.add_column()
    block = "█" if console.encoding.startswith("utf") else "#"
    for rank, (name, value, note) in enumerate(zip(names, values, notes, strict=True), 1):
        colour = blue_orange(0.2 if value < 0 else 0.8).hex if has_colour(console) else ""
        bar = Text(block * max(round(abs(value) / reach * _BAR_WIDTH), 1), style=colour)
        said = (note,) if any(notes) else ()
        table.add_row(f"  {rank}", Text(name), f"{value:+.4g}", *said, bar)
    console.print(table)


def print_heading(text: str, console: Console) -> None:
    """A line that says what follows, and in which unit."""
    console.print()
    console.print(Text(text, style="bold"))
