"""A prompt as the model reads it."""

from typing import NamedTuple

import msgspec

__all__ = ("Span", "Tokens")


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
