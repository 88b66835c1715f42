"""Figures as the page shows them."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ("Figure", "at_least", "at_most", "percentile", "plain", "table")


class Figure(NamedTuple):
    """One line: what was measured, what came out, and what was wanted."""

    what: str
    found: str
    bar: str = ""


def plain(what: str, found: str) -> Figure:
    """A figure that nothing is asked of."""
    return Figure(what, found)


def at_most(what: str, value: float, bar: float, unit: str, *, digits: int = 1) -> Figure:
    """A figure that should be no larger than its bar."""
    verdict = "met" if value <= bar else "missed"
    return Figure(what, f"{value:.{digits}f}{unit}", f"≤ {bar:g}{unit}: {verdict}")


def at_least(what: str, value: float, bar: float, unit: str = "", *, digits: int = 2) -> Figure:
    """A figure that should be no smaller than its bar."""
    verdict = "met" if value >= bar else "missed"
    return Figure(what, f"{value:.{digits}f}{unit}", f"≥ {bar:g}{unit}: {verdict}")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the values lies; the median for 0.5."""
    if share == 0.5:
        return statistics.median(values)
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(figures: Iterable[Figure]) -> str:
    """A table in Markdown."""
    lines = ["| what | found | bar |", "| --- | --- | --- |"]
    lines += [f"| {what} | {found} | {bar} |" for what, found, bar in figures]
    return "\n".join(lines) + "\n"
