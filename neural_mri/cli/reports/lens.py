"""FLAIR as text."""

from math import isfinite

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neural_mri.cli.listing import print_heading
from neural_mri.client import LensMap
from neural_mri.client.text import visible

__all__ = ("print_lens",)

_MOST_LINES = 80


def print_lens(lens: LensMap, console: Console) -> None:
    """A line a token with what is anomalous there, and how far the answer is supported."""
    if lens.asked:
        print_heading("Support (ordinary standard deviations: low is suspicious)", console)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        for _ in range(3):
            table.add_column(justify="right")
        table.add_column()
        for support in lens.asked:
            table.add_row(
                f"  {support.role}",
                Text(visible(support.text)),
                f"log p {support.log_probability:.3f}",
                f"gain {support.gain:+.2f} nats",
                f"support {_number(support.support, '+.2f')}",
                Text("unsupported", style="bold red") if support.anomalous else "",
            )
        console.print(table)
    print_heading("After each token", console)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("token", min_width=8)
    table.add_column("next")
    for heading in ("p", "entropy\nnats", "decided\nafter layer", "support\nSD"):
        table.add_column(heading, justify="right")
    table.add_column("flags")
    for reading in lens.readings[-_MOST_LINES:]:
        if not reading.predicted:
            name = Text(f"{reading.position} {visible(reading.token)}", style="dim")
            table.add_row(name, Text("not measured", style="dim"))
            continue
        table.add_row(
            Text(f"{reading.position} {visible(reading.token)}"),
            Text(visible(reading.predicted)),
            f"{reading.max_probability:.3f}",
            f"{reading.entropy:.2f}",
            str(reading.layer),
            _number(reading.own.support if reading.own else float("nan"), "+.2f"),
            Text(", ".join(reading.flags), style="bold red"),
        )
    console.print(table)
    if (left_out := len(lens.readings) - _MOST_LINES) > 0:
        console.print(Text(f"{left_out} earlier tokens left out", style="dim"))
    judged = (
        "no calibration to judge by: nothing is flagged"
        if lens.false_alarm_rate is None
        else f"flags: beyond what {lens.false_alarm_rate:g} of ordinary text exceeds"
    )
    console.print()
    console.print(Text(f"{lens.lens} lens; {judged}", style="dim"))


def _number(value: float, form: str) -> str:
    return format(value, form) if isfinite(value) else "-"
