"""From a value to a colour: limits that an attention sink cannot spoil, and a map without reversals.

The first token's norms can be a hundred times everybody else's. Limits taken from the extremes would leave
the rest of the picture black, so they are taken from the middle 96 % of the values that count.
"""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

__all__ = ("Colour", "Scale", "Values", "blue_orange", "grey", "inferno")

Values = npt.NDArray[np.float32]


class Colour(NamedTuple):
    """sRGB, 0 to 255."""

    red: int
    green: int
    blue: int

    @property
    def hex(self) -> str:
        """As CSS and terminals write it: `#fca50a`."""
        return f"#{self.red:02x}{self.green:02x}{self.blue:02x}"


class Scale(NamedTuple):
    """Which values get the first and the last colour; values beyond them get no further one."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, *groups: Values, logarithmic: bool) -> Self:
        """From the 2nd to the 98th percentile of the finite values (and positive, for a logarithm).

        Of several groups, the widest span: three hundred heads do not push thirty MLPs off the scale.
        """
        usable = [
            group[np.isfinite(group) & (group > 0 if logarithmic else True)] for group in groups
        ]
        edges = [np.percentile(group, (2, 98)) for group in usable if group.size]
        if not edges:
            return cls(1.0, 10.0, logarithmic=True) if logarithmic else cls(0.0, 1.0, False)
        low, high = float(min(edge[0] for edge in edges)), float(max(edge[1] for edge in edges))
        if low == high:  # one value: put it in the middle
            low, high = (low / 2, high * 2) if logarithmic else (low - 0.5, high + 0.5)
        return cls(low, high, logarithmic)

    @classmethod
    def around_zero(cls, *groups: Values) -> Self:
        """As far below 0 as above it: the 98th percentile of the finite values' sizes, the widest group's."""
        sizes = [np.abs(group[np.isfinite(group)]) for group in groups]
        edges = [float(np.percentile(size, 98)) for size in sizes if size.size]
        edge = max(edges, default=0.0) or 1.0
        return cls(-edge, edge, logarithmic=False)

    def place(self, values: Values) -> npt.NDArray[np.float64]:
        """Where values lie between `low` (0) and `high` (1), held inside; NaN stays NaN."""
        exact = values.astype(np.float64)
        if not self.logarithmic:
            return np.clip((exact - self.low) / (self.high - self.low), 0, 1)
        with np.errstate(divide="ignore"):  # log 0 is -inf, and its place is 0
            depth = np.log(np.maximum(exact, 0)) - np.log(self.low)
        placed: npt.NDArray[np.float64] = np.clip(
            depth / (np.log(self.high) - np.log(self.low)), 0, 1
        )
        return placed


# Sixteenths of matplotlib's inferno (Smith & van der Walt, public domain); between them, straight lines
# in sRGB stay within 7/255 of it.
_INFERNO = np.array(
    [
        (0, 0, 4), (11, 7, 36), (33, 12, 74), (61, 9, 101), (87, 16, 110), (113, 25, 110),
        (138, 34, 106), (163, 44, 97), (188, 55, 84), (210, 70, 68), (228, 90, 49), (241, 115, 29),
        (249, 142, 9), (252, 172, 17), (249, 203, 53), (242, 234, 105), (252, 255, 164),
    ]
)  # fmt: skip

_DARKEST = 0.2
"""Where our use of the map begins: below it, `little` could not be told from a dark background."""


def inferno(place: float) -> Colour:
    """The colour of a place from 0 to 1: lightness rises all the way, in every kind of colour vision."""
    at = (_DARKEST + (1 - _DARKEST) * place) * (len(_INFERNO) - 1)
    below = min(int(at), len(_INFERNO) - 2)
    mixed = _INFERNO[below] + (at - below) * (_INFERNO[below + 1] - _INFERNO[below])
    return Colour(*(round(float(channel)) for channel in mixed))


def grey(place: float) -> Colour:
    """The colour of a place from 0 to 1 in structural pictures; the first is seen on black as well."""
    return Colour(*(round(dark + place * (light - dark)) for dark, light in _GREYS))


def blue_orange(place: float) -> Colour:
    """The colour of a place from 0 to 1 among signed values: dark at 0.5, lighter towards either end.

    Blue is below 0 and orange above it: every kind of colour vision tells them apart.
    """
    at = place * (len(_BLUE_ORANGE) - 1)
    below = min(int(at), len(_BLUE_ORANGE) - 2)
    mixed = _BLUE_ORANGE[below] + (at - below) * (_BLUE_ORANGE[below + 1] - _BLUE_ORANGE[below])
    return Colour(*(round(float(channel)) for channel in mixed))


_BLUE_ORANGE = np.array(
    [(160, 212, 255), (54, 128, 212), (44, 50, 61), (200, 98, 36), (255, 194, 128)]
)
_GREYS = ((43, 244), (47, 246), (53, 248))
"""First and last red, green and blue."""
