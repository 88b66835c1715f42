"""Prompts into tokens, by each model's own tokenizer, without the model.

The tokenizer's `tokenizer.json` is in the object store under its digest. What its post-processor puts
around a prompt (a BOS, mostly) is kept, nothing else is added; truncation and padding are switched off.
"""

import asyncio
from collections import OrderedDict

from tokenizers import Tokenizer

from neural_mri.backing import keys
from neural_mri.backing.storage import Missing, Store
from neural_mri.contract.problems import Unavailable, Unprocessable
from neural_mri.contract.tokens import Tokens, tokens_of

__all__ = ("Tokenizers", "tokens_of")

KEPT = 8
"""Tokenizers kept in memory; one takes some 10 to 100 MB and as many milliseconds to read."""

LONG_PROMPT_CHARACTERS = 1000
"""A longer one is encoded in a thread: a tokenizer reads some million characters a second."""


class Tokenizers:
    """Tokenizers by digest, read once each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: OrderedDict[str, asyncio.Task[Tokenizer]] = OrderedDict()

    async def encode(self, digest: str, prompt: str) -> Tokens:
        """The prompt's tokens.

        Raises `Unprocessable` when there are none, `Unavailable` when the store lost the tokenizer.
        """
        tokenizer = await self.tokenizer(digest)
        if len(prompt) > LONG_PROMPT_CHARACTERS:
            encoding = await asyncio.to_thread(tokenizer.encode, prompt)
        else:
            encoding = tokenizer.encode(prompt)
        if not encoding.ids:
            raise Unprocessable(
                "the prompt has no tokens: the tokenizer drops all of its characters"
            )
        return tokens_of(encoding, prompt)

    async def token_id(self, digest: str, name: str, text: str) -> int:
        """The one token that `text` is. Raises `Unprocessable` naming its tokens where it is several."""
        tokenizer = await self.tokenizer(digest)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) == 1:
            return int(ids[0])
        pieces = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in ids]
        hint = (
            "" if text.startswith(" ") else ": within a sentence a word's token begins with a space"
        )
        raise Unprocessable(
            f"{name} {text!r} is {len(ids)} tokens, {pieces}: expected text that is one token, or its "
            f"id{hint}",
            tokens=ids,
        )

    async def tokenizer(self, digest: str) -> Tokenizer:
        """The tokenizer of that digest."""
        reading = self._read.get(digest)
        if reading is None or (reading.done() and reading.exception() is not None):
            reading = asyncio.create_task(asyncio.to_thread(self._load, digest))
            self._read[digest] = reading
            while len(self._read) > KEPT:
                self._read.popitem(last=False)
        self._read.move_to_end(digest)
        # Shielded: whoever asked first may go away, the others still wait for it.
        return await asyncio.shield(reading)

    def _load(self, digest: str) -> Tokenizer:
        try:
            body = self._store.get(keys.tokenizer_path(digest))
        except Missing as error:
            raise Unavailable(
                f"the store has no tokenizer {digest}: register the model again"
            ) from error
        tokenizer = Tokenizer.from_str(body.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
