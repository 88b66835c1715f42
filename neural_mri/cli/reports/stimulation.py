"""A perturbation as text."""

from collections.abc import Sequence
from math import isfinite

from rich.console import Console
from rich.table import Table
from rich.text import Text

from neural_mri.cli.listing import print_bars, print_heading
from neural_mri.client import Comparison
from neural_mri.client.comparison import Guess
from neural_mri.client.text import visible
from neural_mri.contract.components import Kind

__all__ = ("print_comparison",)


def print_comparison(
    found: Comparison, prompt_tokens: Sequence[str], console: Console, top: int
) -> None:
    """The answer before and after, the likeliest tokens of both runs, and what changed most."""
    after = f"token {found.position} {visible(prompt_tokens[found.position])}"
    print_heading(f"Next token after {after}", console)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim")
    for _ in range(4):
        table.add_column()
    table.add_row("", "before", "", "after", "", style="dim")
    before, later = found.likeliest("before", top), found.likeliest("after", top)
    for rank in range(max(len(before), len(later))):
        table.add_row(
            f"  {rank + 1}", *_cells(before, rank, "before"), *_cells(later, rank, "after")
        )
    console.print(table)

    print_heading(f"Answer {visible(found.answer)}", console)
    spread = (
        f" ± {found.metric_sd:.2g} over {found.draws} draws" if isfinite(found.metric_sd) else ""
    )
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    arrow = "→" if console.encoding.startswith("utf") else "->"
    for name, pair, unit in (
        (found.metric_name, found.metric, f"{found.unit}{spread}"),
        ("probability", found.probability, ""),
        ("entropy", found.entropy, "nats"),
    ):
        table.add_row(f"  {name}", f"{pair.before:.4g}", arrow, f"{pair.after:.4g}", unit)
    table.add_row("  D_KL(clean, perturbed)", "", "", f"{found.kl:.4g}", "nats")
    console.print(table)

    if found.change is None:
        return
    for kind, name in ((Kind.HEAD, "heads"), (Kind.MLP, "MLPs")):
        changed = [
            reading
            for reading in found.change.hottest(kind, top, position=found.position)
            if reading.value > 0
        ]
        if not changed:
            continue
        print_heading(f"Most changed {name} at {after} (L2 norm of the change)", console)
        largest = changed[0].value
        shares = [reading.value / largest for reading in changed]
        amounts = [f"{reading.value:.4g}" for reading in changed]
        labels = [reading.component.label for reading in changed]
        print_bars(labels, shares, amounts, shares, console)


def _cells(guesses: Sequence[Guess], rank: int, run: str) -> tuple[Text, str]:
    if rank >= len(guesses):
        return Text(""), ""
    guess = guesses[rank]
    return Text(visible(guess.text)), f"{getattr(guess.probability, run):.3f}"
