"""What all requests for a scan have in common.

Strict where a human sends them: an unknown field is refused, so that a typing error is never a silent
default.
"""

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

import msgspec
from msgspec import Meta

from neural_mri.contract.models import Architecture, ModelName
from neural_mri.contract.problems import InvalidPositions

__all__ = (
    "MAX_PROMPT_CHARACTERS",
    "Address",
    "AnswerToken",
    "CalibrationKey",
    "Choice",
    "Forward",
    "Positions",
    "Prompt",
    "PromptScan",
    "ScanBase",
    "TargetedScan",
    "resolve_positions",
)

MAX_PROMPT_CHARACTERS = 200_000

Prompt = Annotated[str, Meta(min_length=1, max_length=MAX_PROMPT_CHARACTERS)]
Address = Annotated[str, Meta(max_length=80)]
AnswerToken = Annotated[str, Meta(min_length=1, max_length=200)] | Annotated[int, Meta(ge=0)]
Positions = Literal["all"] | Annotated[tuple[int, ...], Meta(min_length=1)]
"""Token positions, from 0; negative ones count from the end."""
CalibrationKey = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$", max_length=64)]
"""Scan key of a calibration."""


class Choice(StrEnum):
    """One of a few words that a request may say."""

    @classmethod
    def _missing_(cls, value: object) -> Self:
        words = ", ".join(repr(member.value) for member in cls)
        raise ValueError(f"{value!r} is not a valid {cls.__name__}: expected one of {words}")


class Forward(StrEnum):
    """The forwards that prompts of several scans may be rows of, where they are of as many tokens.

    Never padded: padding changes the numbers.
    """

    READ = "read"
    """The plain model, read: by fMRI, and by FLAIR at the answer."""
    PATTERNS = "patterns"
    """The bridged model, which shows how attention is spent."""
    EDITED = "edited"
    """The plain model, rows of which are perturbed."""
    DIFFERENTIATED = "differentiated"
    """The plain model, and back: by DTI, where one gradient is all it takes."""


class ScanBase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every request has."""

    model: ModelName | None = None
    """A registered model's name; the service's default model where it is left out."""

    needs_loaded_model: ClassVar[bool] = True

    @property
    def shared_forward(self) -> Forward | None:
        """The forward that its prompt may be a row of among others' rows; None where it runs alone."""
        return None

    @property
    def n_rows(self) -> int:
        """Rows of that forward that it takes."""
        return 1

    @property
    def other_prompts(self) -> tuple[str, ...]:
        """Texts that the scan reads beside its prompt, each once."""
        return ()

    @property
    def needs_calibration(self) -> bool:
        """Whether the scan is read against the model's calibration."""
        return False

    def check(self, architecture: Architecture) -> None:
        """Raises the `Unprocessable` that names what contradicts itself, or what the model lacks."""

    def __post_init__(self) -> None:
        for name, text in self._texts():
            if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError(f"{name} must not hold NUL or lone surrogate characters")

    def _texts(self) -> Iterator[tuple[str, str]]:
        """What tokenizers are to read, by what it is called."""
        for text in self.other_prompts:
            yield "another prompt", text


class PromptScan(ScanBase, frozen=True, kw_only=True):
    """A scan of the model reading one prompt."""

    prompt: Prompt

    def _texts(self) -> Iterator[tuple[str, str]]:
        yield "prompt", self.prompt
        yield from super()._texts()


def resolve_positions(
    positions: Literal["all"] | tuple[int, ...], n_tokens: int
) -> tuple[int, ...]:
    """Positions counted from 0, in order, each once. Raises `InvalidPositions` naming a bad one."""
    if positions == "all":
        return tuple(range(n_tokens))
    resolved = set()
    for position in positions:
        if not -n_tokens <= position < n_tokens:
            tokens = "token" if n_tokens == 1 else "tokens"
            raise InvalidPositions(
                f"token_positions has {position}, but the prompt has {n_tokens} {tokens}: expected "
                f"{-n_tokens} to {n_tokens - 1}",
                position=position,
                n_tokens=n_tokens,
            )
        resolved.add(position % n_tokens)
    return tuple(sorted(resolved))


class TargetedScan(PromptScan, frozen=True, kw_only=True):
    """A scan that asks about one next token."""

    target_token_idx: int = -1
    """Position whose next token is asked about; negative ones count from the end."""
    answer: AnswerToken | None = None
    """The next token asked about, as text that is one token, or as its id; the likeliest where left out."""
    foil: AnswerToken | None = None
    """A token to compare with: the metric becomes the logit difference answer - foil."""
