"""What `neural-mri perturb` is told to do to components, read from its options.

Knows addresses, positions and numbers; what the model has, and how many values a component takes, is the
service's to say.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import typer

from neural_mri.cli.options import read_positions
from neural_mri.contract.components import Component
from neural_mri.contract.perturbations import (
    Amplify,
    Inject,
    InjectMode,
    Invert,
    MeanAblation,
    Noise,
    Patch,
    Perturbation,
    ZeroAblation,
)
from neural_mri.contract.problems import InvalidAddress

__all__ = ("Given", "read", "read_text")

_FARTHEST = 1e6
_MOST_NOISE = 1000.0
_ALONE: Mapping[str, type[ZeroAblation | Invert | MeanAblation]] = {
    "--zero": ZeroAblation,
    "--invert": Invert,
    "--ablate": MeanAblation,
}


class Given(NamedTuple):
    """The options as they were typed, an operation each, in the order in which they apply."""

    zero: Sequence[str] = ()
    amplify: Sequence[str] = ()
    invert: Sequence[str] = ()
    noise: Sequence[str] = ()
    ablate: Sequence[str] = ()
    inject: Sequence[str] = ()
    replace: Sequence[str] = ()
    patch: Sequence[str] = ()


class _Place(NamedTuple):
    component: str
    token_positions: Literal["all"] | tuple[int, ...]
    amount: str | None
    """What stood after the `=`."""


def read(
    given: Given,
    *,
    positions: Literal["all"] | tuple[int, ...],
    source: str | None,
    draws: int,
    seed: int,
) -> tuple[Perturbation, ...]:
    """The perturbations. Raises `typer.BadParameter` naming the option and the value that is none."""
    if source and not given.patch:
        raise typer.BadParameter(
            "nothing is patched from it: expected --patch as well", param_hint="--source"
        )
    made: list[Perturbation] = []
    for option, text in _each(given):
        place = _place(text, option, positions)
        where: Any = {"component": place.component, "token_positions": place.token_positions}
        match option:
            case "--amplify":
                factor = _number(place, text, option, low=-_FARTHEST, high=_FARTHEST, usual=2.0)
                made.append(Amplify(factor=factor, **where))
            case "--noise":
                sigma = _number(place, text, option, low=0.0, high=_MOST_NOISE, usual=1.0)
                made.append(Noise(sigma=sigma, draws=draws, seed=seed, **where))
            case "--inject" | "--replace":
                mode = InjectMode.ADD if option == "--inject" else InjectMode.REPLACE
                made.append(Inject(values=_values(place, text, option), mode=mode, **where))
            case _:
                made.append(_alone(place, text, option, source))
    return tuple(made)


def _alone(place: _Place, text: str, option: str, source: str | None) -> Perturbation:
    """An operation that takes no number."""
    if place.amount is not None:
        raise typer.BadParameter(
            f"{text!r} has a value after its address: expected the address alone",
            param_hint=option,
        )
    component, at = place.component, place.token_positions
    if option in _ALONE:
        return _ALONE[option](component=component, token_positions=at)
    if not source:
        raise typer.BadParameter(
            f"{text!r} is patched from no prompt: expected --source as well", param_hint=option
        )
    return Patch(component=component, token_positions=at, source_prompt=source)


def read_text(path: Path) -> str:
    """A file's text. Raises `typer.BadParameter` naming it where it cannot be read or is empty."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    if not text.strip():
        raise typer.BadParameter(f"{path} is empty: expected text")
    return text


def _each(given: Given) -> Iterator[tuple[str, str]]:
    for name, texts in given._asdict().items():
        for text in texts:
            yield f"--{name}", text


def _place(text: str, option: str, positions: Literal["all"] | tuple[int, ...]) -> _Place:
    """`ADDRESS[@POSITIONS][=AMOUNT]`."""
    where, separator, amount = text.partition("=")
    address, at, tokens = where.partition("@")
    try:
        component = str(Component.parse(address.strip()))
    except InvalidAddress as error:
        raise typer.BadParameter(error.detail, param_hint=option) from error
    return _Place(
        component,
        read_positions(tokens, option) if at else positions,
        amount if separator else None,
    )


def _number(
    place: _Place, text: str, option: str, *, low: float, high: float, usual: float
) -> float:
    if place.amount is None:
        return usual
    try:
        value = float(place.amount)
    except ValueError:
        value = high + 1
    if not low <= value <= high:
        raise typer.BadParameter(
            f"{place.amount!r} in {text!r} is not a number from {low:g} to {high:g}",
            param_hint=option,
        )
    return value


def _values(place: _Place, text: str, option: str) -> tuple[float, ...]:
    """Numbers with commas or spaces between, or `@FILE` of them."""
    if not place.amount:
        raise typer.BadParameter(
            f"{text!r} names no values: expected {place.component}=0.5,1 or "
            f"{place.component}=@FILE",
            param_hint=option,
        )
    listed = place.amount
    if listed.startswith("@"):
        listed = read_text(Path(listed[1:])).strip().strip("[]")
    try:
        values = tuple(float(part) for part in re.split(r"[\s,]+", listed.strip()) if part)
    except ValueError as error:
        raise typer.BadParameter(
            f"{place.amount!r} holds what is no number: {error}", param_hint=option
        ) from error
    if not values or not all(abs(value) <= _FARTHEST for value in values):
        raise typer.BadParameter(
            f"{place.amount!r} holds no values: expected numbers from -1e6 to 1e6",
            param_hint=option,
        )
    return values
