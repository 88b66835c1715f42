"""A prompt as the model reads it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

__all__ = ("Encoded", "Operands", "Span", "Tokens", "tokens_of")


class Span(NamedTuple):
    """Characters `start` up to `end` of the prompt; empty for a token that stands for none."""

    start: int
    end: int


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """The token ids of one prompt, exactly as its tokenizer encodes it, nothing prepended by us.

    The text of a byte-level token may be half a character. `texts` merges such runs for reading: the
    first token of a run carries the characters, the others are empty. Indices stay honest.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.ids)


class Operands(msgspec.Struct, frozen=True, kw_only=True):
    """What a scan reads beside its prompt, resolved by the model's tokenizer before it is queued."""

    prompts: dict[str, Tokens] = {}
    """Other prompts, by their text: a corrupt prompt, the source of a patch."""
    token_ids: dict[str, int] = {}
    """Single tokens by the name of the request's field: `answer`, `foil`."""


class Encoded(Protocol):
    """What a tokenizer of the `tokenizers` library makes of a text."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""

    @property
    def tokens(self) -> Sequence[str]:
        """Tokens as the vocabulary spells them."""

    @property
    def offsets(self) -> Sequence[tuple[int, int]]:
        """Characters that each token stands for."""

    @property
    def special_tokens_mask(self) -> Sequence[int]:
        """1 where the tokenizer added a token of its own."""


def tokens_of(encoding: Encoded, prompt: str) -> Tokens:
    """An encoding as the contract has it.

    A byte-level token may be a part of a character: tokenizers then give it the whole character's span.
    Each character is shown by the first token that touches it, so the texts put together are the prompt.
    White space that a tokenizer leaves out of a token's span belongs to the token all the same.
    """
    texts, spans, shown = [], [], 0
    for token, (start, end), is_added in zip(
        encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True
    ):
        if is_added:
            texts.append(token)
            spans.append(Span(shown, shown))
        else:
            texts.append(prompt[shown:end])
            spans.append(Span(min(start, shown), end))
            shown = max(shown, end)
    return Tokens(ids=tuple(encoding.ids), texts=tuple(texts), spans=tuple(spans))
