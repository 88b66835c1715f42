"""Pictures of a report, as SVG written into the page: maps of layers and heads, curves, intervals.

Every mark has a title that says its number; colour is never the only channel.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise

from neural_mri.contract.findings import CaseOutcome, Grid, Trajectory
from neural_mri.contract.suites import Expectation
from neural_mri.diagnostics.phrasing import Phrases, is_boundless, number

__all__ = ("curves", "heat_map", "intervals")

_WIDTH = 1040
_BOUNDLESS = 1e20
_LEFT = 58
_RIGHT = 96

_HOT = (
    (0.0, (16, 21, 34)),
    (0.3, (32, 56, 112)),
    (0.55, (204, 136, 48)),
    (0.8, (255, 68, 32)),
    (1.0, (255, 236, 200)),
)
_ORANGE = ((0.0, (20, 24, 33)), (0.5, (178, 92, 22)), (1.0, (255, 190, 110)))
_BLUE = ((0.0, (20, 24, 33)), (0.5, (40, 96, 170)), (1.0, (150, 205, 255)))


def _colour(stops: Sequence[tuple[float, tuple[int, int, int]]], at: float) -> str:
    at = min(1.0, max(0.0, at))
    for (low, first), (high, second) in pairwise(stops):
        if at <= high:
            share = (at - low) / (high - low)
            mixed = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
            return "#" + "".join(f"{part:02x}" for part in mixed)
    return "#ffffff"


def heat_map(grid: Grid, title: str, phrases: Phrases) -> str:
    """Layers from left to right, heads from top to bottom, the MLP below them."""
    n_layers, n_columns = len(grid.rows), len(grid.columns)
    step = (_WIDTH - _LEFT - _RIGHT) / max(n_layers, 1)
    height = max(9.0, min(20.0, 260 / max(n_columns, 1)))
    gap = 1.5 if step > 8 else 0.5
    signed = any(value is not None and value < 0 for row in grid.rows for value in row)
    values = [abs(value) for row in grid.rows for value in row if value is not None]
    largest = max(values, default=0.0) or 1.0
    tall = n_columns * height + 8
    told = f"{title}: {phrases('largest')} {number(largest)} {phrases.unit(grid.unit)}"
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {tall + 34:.0f}" role="img" aria-label="{escape(told)}">',
    ]
    for column, name in enumerate(grid.columns):
        y = column * height + (6 if name == "MLP" else 0)
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y + height / 2 + 3.5:.1f}" text-anchor="end">{name}</text>'
        )
        for layer, row in enumerate(grid.rows):
            value = row[column]
            place = f"L{layer} {name}" if name == "MLP" else f"L{layer}{name}"
            shown = "–" if value is None else number(value)
            fill = "#0d1016" if value is None else _fill(value, largest, signed=signed)
            parts.append(
                f'<rect x="{_LEFT + layer * step:.1f}" y="{y:.1f}" width="{step - gap:.1f}" '
                f'height="{height - gap:.1f}" rx="1.5" fill="{fill}"><title>{place}: {shown} '
                f"{escape(phrases.unit(grid.unit))}</title></rect>"
            )
    for layer, column in grid.marked:
        x, y = _LEFT + layer * step, column * height + (6 if grid.columns[column] == "MLP" else 0)
        parts.append(
            f'<rect class="mark" x="{x - 2:.1f}" y="{y - 2:.1f}" width="{step - gap + 4:.1f}" '
            f'height="{height - gap + 4:.1f}" rx="3"/>'
        )
        name = grid.columns[column]
        label = f"L{layer} {name}" if name == "MLP" else f"L{layer}{name}"
        parts.append(
            f'<path class="pointer" d="M{x + step / 2:.1f} {tall + 2:.1f} V{y + height + 2:.1f}"/>'
        )
        parts.append(
            f'<text class="marked" x="{x + step / 2:.1f}" y="{tall + 28:.1f}" text-anchor="middle">{label}</text>'
        )
    every = max(1, math.ceil(n_layers / 16))
    skipped = {layer for layer, _ in grid.marked}
    for layer in range(0, n_layers, every):
        if not any(abs(layer - other) * step < 34 for other in skipped):
            x = _LEFT + layer * step + step / 2
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{tall + 14:.1f}" text-anchor="middle">{layer}</text>'
            )
    parts.append(
        f'<text class="tick" x="{_LEFT - 8}" y="{tall + 14:.1f}" text-anchor="end">{escape(phrases("layer"))}</text>'
    )
    parts += _legend(largest, tall, signed=signed)
    parts.append("</svg>")
    return "".join(parts)


def _fill(value: float, largest: float, *, signed: bool) -> str:
    if signed:
        at = (abs(value) / largest) ** 0.5
        return _colour(_ORANGE if value < 0 else _BLUE, at)
    return _colour(_HOT, _logarithmic(value, largest))


def _logarithmic(value: float, largest: float) -> float:
    """From 1, where noise ends, to the largest."""
    top = math.log10(max(largest, 10.0))
    return math.log10(max(value, 1.0)) / top if value > 0 else 0.0


def _legend(largest: float, tall: float, *, signed: bool) -> Iterable[str]:
    x, steps = _WIDTH - _RIGHT + 22, 24
    for step in range(steps):
        at = 1 - step / (steps - 1)
        if signed:
            value = (2 * at - 1) * largest
            fill = _fill(-value, largest, signed=True)
        else:
            fill = _colour(_HOT, at)
        yield (
            f'<rect x="{x}" y="{tall * step / steps:.1f}" width="12" '
            f'height="{tall / steps + 0.5:.1f}" fill="{fill}"/>'
        )
    ends = (
        (f"−{number(largest)}", "0", f"+{number(largest)}")
        if signed
        else (number(max(largest, 10.0)), number(max(largest, 10.0) ** 0.5), "≤1")
    )
    for place, text in zip((9.0, tall / 2 + 4, tall), ends, strict=True):
        yield f'<text class="tick" x="{x + 18}" y="{place:.1f}">{text}</text>'


_CURVES = ("#00ffaa", "#8899aa")


def curves(trajectories: Sequence[Trajectory], title: str) -> str:
    """Medians with bands over layers; the first curve is the candidate's."""
    width, height, left, bottom = 505, 210, 46, 26
    known = [
        value
        for each in trajectories
        for line in (each.median, each.low, each.high)
        for value in line
        if value is not None
    ]
    if not known:
        return ""
    low, high = min([*known, 0.0]), max([*known, 0.0])
    n = max(len(each.median) for each in trajectories)

    def x(place: int) -> float:
        return left + (width - left - 8) * place / max(n - 1, 1)

    def y(value: float) -> float:
        return 8 + (height - bottom - 8) * (high - value) / ((high - low) or 1.0)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for value in _ticks(low, high):
        parts.append(
            f'<line class="rule" x1="{left}" x2="{width - 8}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y(value) + 3.5:.1f}" text-anchor="end">{number(value)}</text>'
        )
    # The candidate is drawn last, over its baseline.
    for index, each in reversed(list(enumerate(trajectories))):
        colour = _CURVES[min(index, 1)]
        places = [place for place, value in enumerate(each.median) if value is not None]
        upper = " ".join(f"{x(p):.1f},{y(each.high[p] or 0.0):.1f}" for p in places)
        lower = " ".join(f"{x(p):.1f},{y(each.low[p] or 0.0):.1f}" for p in reversed(places))
        line = " ".join(f"{x(p):.1f},{y(each.median[p] or 0.0):.1f}" for p in places)
        dash = ' stroke-dasharray="5 4"' if index else ""
        parts.append(f'<polygon points="{upper} {lower}" fill="{colour}" opacity="0.13"/>')
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
    every = max(1, math.ceil(n / 8))
    parts += [
        f'<text class="tick" x="{x(place):.1f}" y="{height - 8}" text-anchor="middle">'
        f"{'E' if not place else place - 1}</text>"
        for place in range(0, n, every)
    ]
    parts.append("</svg>")
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / 3))
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= 5:
            step *= factor
            break
    first = math.ceil(low / step)
    return [round(step * tick, 10) for tick in range(first, math.floor(high / step) + 1)]


def intervals(cases: Sequence[CaseOutcome], phrases: Phrases) -> str:
    """A line a case: its score, its interval, chance, and the baseline's score."""
    shares = [case for case in cases if case.expectation is not Expectation.BALANCE]
    balances = [case for case in cases if case.expectation is Expectation.BALANCE]
    return _forest(shares, phrases, (0.0, 1.0)) + (
        _forest(balances, phrases, _balance_range(balances)) if balances else ""
    )


def _balance_range(cases: Sequence[CaseOutcome]) -> tuple[float, float]:
    ends = [
        abs(end)
        for case in cases
        for end in (case.score.value, case.score.interval.low, case.score.interval.high)
    ]
    largest = max((end for end in ends if end < _BOUNDLESS), default=1.0) or 1.0
    return (-largest * 1.05, largest * 1.05)


def _forest(cases: Sequence[CaseOutcome], phrases: Phrases, bounds: tuple[float, float]) -> str:
    left, right, step = 250, 150, 26
    low, high = bounds
    height = len(cases) * step + 30

    def x(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return left + (_WIDTH - left - right) * share

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(phrases("picture_scores"))}">'
    ]
    for tick in _ticks(low, high):
        parts.append(
            f'<line class="rule" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="4" y2="{height - 24}"/>'
        )
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{number(tick)}</text>'
        )
    for row, case in enumerate(cases):
        y = row * step + 18
        parts.append(
            f'<text class="name" x="{left - 16}" y="{y + 4}" text-anchor="end">{escape(phrases.of(case.title))}</text>'
        )
        if not case.score.n:
            parts.append(f'<text class="tick" x="{left + 6}" y="{y + 4}">–</text>')
            continue
        chance = x(case.chance)
        parts.append(
            f'<line class="chance" x1="{chance:.1f}" x2="{chance:.1f}" y1="{y - 9}" y2="{y + 9}"/>'
        )
        if case.baseline is not None and case.baseline.n:
            at = x(case.baseline.value)
            parts.append(
                f'<path class="before" d="M{at:.1f} {y - 7} l6 7 l-6 7 l-6 -7 z"><title>{escape(phrases("before"))} '
                f"{number(case.baseline.value)}</title></path>"
            )
        ends = case.score.interval
        # As expected, beyond doubt: better than chance, or of a balance, none that leans.
        known = not is_boundless(ends)
        if not known:
            as_expected = False
        elif case.expectation is Expectation.BALANCE:
            as_expected = ends.low <= 0 <= ends.high
        else:
            as_expected = ends.low > (case.chance or 0.5)
        kind = "clear" if as_expected else "unclear"
        told = number(case.score.value)
        if known:
            told += f" ({number(ends.low)} – {number(ends.high)})"
            parts.append(
                f'<line class="span {kind}" x1="{x(ends.low):.1f}" x2="{x(ends.high):.1f}" y1="{y}" y2="{y}"/>'
            )
        parts.append(
            f'<circle class="dot {kind}" cx="{x(case.score.value):.1f}" cy="{y}" r="5"><title>{told}</title></circle>'
        )
        parts.append(
            f'<text class="value" x="{_WIDTH - right + 18}" y="{y + 4}">{number(case.score.value)}'
            f'<tspan class="tick" dx="8">n={case.score.n}</tspan></text>'
        )
    parts.append("</svg>")
    return "".join(parts)
