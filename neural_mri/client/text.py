"""Token text for people: spaces seen, nothing that moves a cursor or a page."""

import unicodedata

__all__ = ("visible",)

_NAMED = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def visible(token: str) -> str:
    r"""A token as it can be shown in one line: `␣Paris`, `⏎⏎`; `∅` where it carries no text.

    Control and formatting characters come out as escapes (`\x1b`), so that a prompt cannot drive a
    terminal. The empty token is the later part of a character that several tokens make up.
    """
    return "".join(map(_shown, token)) or "∅"


def _shown(character: str) -> str:
    if (named := _NAMED.get(character)) is not None:
        return named
    if unicodedata.category(character) in _UNPRINTABLE:
        return character.encode("unicode_escape").decode("ascii")
    return character
