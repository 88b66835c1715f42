"""A prompt as the model reads it."""

from typing import NamedTuple

import msgspec

__all__ = ("Operands", "Span", "Tokens")


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
