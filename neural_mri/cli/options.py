"""Options that several commands share, and how their values are read."""

import re
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from enum import StrEnum
from math import nan
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import typer

from neural_mri.client import DEFAULT_URL, URL_VARIABLE, Client
from neural_mri.client.access import Access
from neural_mri.client.errors import needing
from neural_mri.contract.components import Component
from neural_mri.contract.jobs import Lane
from neural_mri.contract.problems import InvalidAddress
from neural_mri.contract.scans import Aggregation

_LIMIT = 2**31

Choice = TypeVar("Choice", bound=StrEnum)


def whole_number(low: int, high: int = _LIMIT) -> Callable[[str | int], int]:
    """Reads an option's number: its errors name the value, which typer's own do not."""

    def read(given: str | int) -> int:
        text = str(given)  # typer sends defaults through here as well
        if not re.fullmatch(r"-?\d{1,12}", text) or not low <= int(text) <= high:
            bounds = f"{low} or more" if high == _LIMIT else f"from {low} to {high}"
            raise typer.BadParameter(f"{text!r} is not a whole number {bounds}")
        return int(text)

    return read


def one_of(choices: type[Choice]) -> Callable[[str], Choice]:
    """Reads one of an enumeration's values."""

    def read(given: str) -> Choice:
        try:
            return choices(given)
        except ValueError:
            raise typer.BadParameter(f"{given!r} is none: expected {', '.join(choices)}") from None

    return read


def number(low: float, high: float) -> Callable[[str | float], float]:
    """Reads an option's number, as `whole_number` does."""

    def read(given: str | float) -> float:
        try:
            value = float(given)
        except ValueError:
            value = nan
        if not low <= value <= high:
            raise typer.BadParameter(f"{str(given)!r} is not a number from {low:g} to {high:g}")
        return value

    return read


def read_calibration(given: str) -> str:
    """A calibration's scan key."""
    if not re.fullmatch(r"[0-9a-f]{64}", given):
        raise typer.BadParameter(
            f"{given!r} is no calibration's key: expected 64 hexadecimal digits"
        )
    return given


Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar=URL_VARIABLE, help="Where the service is.", show_default=DEFAULT_URL
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A registered model.", show_default="the service's default"),
]
InLane = Annotated[
    Lane, typer.Option("--lane", help="How soon it should run; `batch` for many at once.")
]
Top = Annotated[
    int,
    typer.Option(
        "--top", parser=whole_number(1, 100), metavar="N", help="Rows of each list to show."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no report: only files, JSON, errors.")
]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Print the job's id and leave; see `neural-mri result`.")
]
Canonical = Annotated[
    bool,
    typer.Option(
        "--canonical",
        help="Share no forward pass with others: bit-identical, whatever else is asked meanwhile.",
    ),
]
ArrowFile = Annotated[
    Path | None, typer.Option("--arrow", help="Write the main table here, as an Arrow file.")
]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", help="Write the values here, one a row, as CSV.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", help="Write the picture here: .png, .svg or .pdf.")
]
Prompt = Annotated[str, typer.Argument(help="Text to scan; `-` reads it from standard input.")]


def read_token(text: str) -> str:
    """A token's text: what is no text at all is no token, whatever the model."""
    if not text:
        raise typer.BadParameter("the text is empty: expected a token, such as ' Paris'")
    return text


Answer = Annotated[
    str | None,
    typer.Option(
        "--answer",
        parser=read_token,
        metavar="TOKEN",
        help="The next token asked about, with its space: ' Paris'.",
        show_default="the likeliest",
    ),
]
Foil = Annotated[
    str | None,
    typer.Option(
        "--foil",
        parser=read_token,
        metavar="TOKEN",
        help="A token to compare with: the metric becomes logit(answer) - logit(foil).",
    ),
]
At = Annotated[
    int,
    typer.Option(
        "--at",
        parser=whole_number(-_LIMIT, _LIMIT - 1),
        metavar="N",
        help="Position whose next token is asked about; -1 is the last.",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="KEY",
        parser=read_calibration,
        help="Scan key of a calibration, as `neural-mri calibrate` prints it.",
        show_default="the model's own",
    ),
]

_PICTURES = (".png", ".svg", ".pdf")
_RANGE = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


class Outputs(NamedTuple):
    """What to do with a result, checked before anything is asked of the service."""

    as_json: bool
    quiet: bool
    top: int
    arrow: Path | None = None
    csv: Path | None = None
    plot: Path | None = None

    def check(self, *, wait: bool = True) -> "Outputs":
        """Raises `typer.BadParameter` for a file that could not be written."""
        for option, path in (("--arrow", self.arrow), ("--csv", self.csv), ("--plot", self.plot)):
            if path is None:
                continue
            if not wait:
                raise typer.BadParameter(
                    "--no-wait leaves before there is a result", param_hint=option
                )
            if not path.absolute().parent.is_dir():
                raise typer.BadParameter(
                    f"cannot write {path}: there is no folder {path.absolute().parent}",
                    param_hint=option,
                )
        if self.plot is not None:
            if self.plot.suffix.lower() not in _PICTURES:
                raise typer.BadParameter(
                    f"{self.plot.name!r} names no picture format: expected {', '.join(_PICTURES)}",
                    param_hint="--plot",
                )
            with needing("matplotlib", "--plot"):
                import matplotlib as _  # noqa: F401, ICN001 -- only whether it is there
        return self


timeout: ContextVar[float | None] = ContextVar("timeout", default=None)
"""What `neural-mri --timeout` says, of every command; None leaves it to the environment."""


def open_client(url: str | None) -> Client:
    """A client. Raises `typer.BadParameter` where the address is none."""
    try:
        return Client(url, timeout_seconds=timeout.get())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def open_access(url: str | None) -> Access:
    """What keys and users are asked after. Raises `typer.BadParameter` where the address is none."""
    try:
        return Access(url, timeout_seconds=timeout.get())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def read_prompt(prompt: str) -> str:
    """The prompt, from standard input for `-`, whose one final newline is dropped."""
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise typer.BadParameter(
                f"standard input is not UTF-8: {error}", param_hint="PROMPT"
            ) from error
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt:
        raise typer.BadParameter("the prompt is empty: expected text", param_hint="PROMPT")
    return prompt


def read_layers(text: str, option: str = "--layers") -> Literal["all"] | tuple[str | int, ...]:
    """`all`, or a list of layer numbers (`3`), ranges (`5-7`) and addresses (`blocks.3.mlp`)."""
    if text == "all":
        return "all"
    listed: list[str | int] = []
    for part in _parts(text):
        if match := _RANGE.fullmatch(part):
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last:
                raise typer.BadParameter(
                    f"{part!r} runs backwards: expected {last}-{first}", param_hint=option
                )
            listed += range(first, last + 1)
            continue
        try:
            listed.append(str(Component.parse(part)))
        except InvalidAddress as error:
            raise typer.BadParameter(
                f"{error.detail}; or a layer number, or a range such as 5-7", param_hint=option
            ) from error
    return tuple(listed)


def read_positions(text: str, option: str = "--tokens") -> Literal["all"] | tuple[int, ...]:
    """`all`, or a list of token positions, negative ones counting from the end."""
    if text == "all":
        return "all"
    try:
        return tuple(int(part) for part in _parts(text))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no list of token positions: expected whole numbers such as 0,3,-1, or all",
            param_hint=option,
        ) from None


def read_layer_numbers(text: str) -> tuple[int, ...]:
    """A list of layer numbers and ranges, each layer once."""
    layers = read_layers(text, "--layer")
    numbers = tuple(layer for layer in dict.fromkeys(layers) if isinstance(layer, int))
    if layers == "all" or len(numbers) < len(set(layers)):
        raise typer.BadParameter(
            f"{text!r} is no list of layers: expected numbers such as 3, 0,4 or 5-7",
            param_hint="--layer",
        )
    return numbers


def read_aggregation(text: str) -> Aggregation:
    """How vectors become numbers, by name."""
    try:
        return Aggregation(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no aggregation: expected {', '.join(Aggregation)}",
            param_hint="--aggregation",
        ) from None


def _parts(text: str) -> Iterable[str]:
    return (part.strip() for part in text.split(","))
