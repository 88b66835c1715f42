"""Which of a suite's prompts a tokenizer can be asked, and with what text after them noise is measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from neural_mri.contract.problems import PromptTooLong
from neural_mri.contract.suites import Item, Suite
from neural_mri.contract.tokens import Tokens

__all__ = ("Aside", "Asked", "ask")

Tokenize = Callable[[Sequence[str]], list[Tokens]]

SUFFIXES = (
    "\n\nThat was the end of the text, and here is some more of it.",
    " And here is some more of the text.",
)
"""What noise is measured with: a causal model's numbers at a token do not depend on what follows, so what
does change is the order in which the machine added up. The second is for a suite of which no prompt can take the
first: many tokenizers read a colon and the ends of lines after it as one token."""


class Asked(NamedTuple):
    """A prompt that a tokenizer can be asked."""

    name: str
    """`case/number`."""
    item: Item
    answer_id: int
    foil_id: int | None
    n_tokens: int
    corrupt: str | None
    """The corrupt prompt, where it has as many tokens."""
    longer: str | None = None
    """The prompt with one of `SUFFIXES`, where that leaves the prompt's own tokens as they are."""
    n_longer: int = 0
    """Its tokens."""


class Aside(NamedTuple):
    """A prompt that a tokenizer cannot be asked."""

    name: str
    reason: str
    n_tokens: int


def ask(suite: Suite, tokenize: Tokenize) -> list[Asked | Aside]:
    """Every prompt of a suite, in order.

    What stands after a prompt is its next token, so one cannot be asked whose own tokens are others once the answer
    or the foil follows, or where both begin with the same token. Nor one of a single token: there is no place but
    the attention sink. Texts that are longer than a model reads are refused, but for those that noise is measured
    with: they are done without.
    """
    named = [
        (f"{case.id}/{number}", item)
        for case in suite.cases
        for number, item in enumerate(case.items)
    ]
    texts = list(dict.fromkeys(text for _, item in named for text in _texts(item)))
    tokens = dict(zip(texts, tokenize(texts), strict=True))
    found = [_asked(name, item, tokens) for name, item in named]
    prompts = list(dict.fromkeys(each.item.prompt for each in found if isinstance(each, Asked)))
    for suffix in SUFFIXES:
        read = _read_whole([prompt + suffix for prompt in prompts], tokenize)
        longer = {
            prompt: (prompt + suffix, len(more))
            for prompt in prompts
            if (more := read.get(prompt + suffix)) and _next(tokens[prompt], more) is not None
        }
        if longer:
            return [_continued(each, longer) if isinstance(each, Asked) else each for each in found]
    return list(found)


def _continued(asked: Asked, longer: Mapping[str, tuple[str, int]]) -> Asked:
    text, n_tokens = longer.get(asked.item.prompt, (None, 0))
    return asked._replace(longer=text, n_longer=n_tokens)


def _read_whole(texts: Sequence[str], tokenize: Tokenize) -> dict[str, Tokens]:
    """Texts as a checkpoint reads them, without those that are too long for it."""
    try:
        return dict(zip(texts, tokenize(texts), strict=True))
    except Exception as error:
        # Said by the scanner itself, or in the problem document of whoever was asked.
        said = PromptTooLong.type_urn()
        if not isinstance(error, PromptTooLong) and getattr(error, "type", None) != said:
            raise
    half = len(texts) // 2
    if not half:
        return {}
    return _read_whole(texts[:half], tokenize) | _read_whole(texts[half:], tokenize)


def _texts(item: Item) -> Iterator[str]:
    yield item.prompt
    yield item.prompt + item.answer
    if item.foil is not None:
        yield item.prompt + item.foil
    if item.corrupt is not None:
        yield item.corrupt


def _asked(name: str, item: Item, tokens: Mapping[str, Tokens]) -> Asked | Aside:
    prompt = tokens[item.prompt]
    n_tokens = len(prompt)
    if n_tokens < 2:
        return Aside(
            name, f"{item.prompt!r} is {n_tokens} token long, expected 2 or more", n_tokens
        )
    answer_id = _next(prompt, tokens[item.prompt + item.answer])
    foil_id = None if item.foil is None else _next(prompt, tokens[item.prompt + item.foil])
    if answer_id is None or (foil_id is None and item.foil is not None):
        after = item.answer if answer_id is None else item.foil
        why = ": does the prompt end with a space?" if item.prompt != item.prompt.rstrip() else ""
        reason = f"{item.prompt!r} is read as other tokens where {after!r} follows{why}"
        return Aside(name, reason, n_tokens)
    if foil_id == answer_id:
        reason = f"{item.answer!r} and {item.foil!r} begin with the same token"
        return Aside(name, reason, n_tokens)
    fits = item.corrupt is not None and len(tokens[item.corrupt]) == n_tokens
    return Asked(name, item, answer_id, foil_id, n_tokens, item.corrupt if fits else None)


def _next(prompt: Tokens, longer: Tokens) -> int | None:
    """The token after the prompt; None where the longer text does not begin with the prompt's tokens."""
    n = len(prompt)
    if len(longer) <= n or longer.ids[:n] != prompt.ids:
        return None
    return longer.ids[n]
