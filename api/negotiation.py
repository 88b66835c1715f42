"""Which of several forms a reader wants (RFC 9110, section 12.5)."""

from typing import Annotated, NamedTuple

from litestar.params import HeaderParameter

from api.problems import NotAcceptable

__all__ = ("Accept", "accepts_coding", "preferred")

Accept = Annotated[
    str | None, HeaderParameter(name="Accept", description="Which form.", required=False)
]


class _Wish(NamedTuple):
    pattern: str
    quality: float


def preferred(accept: str | None, offers: tuple[str, ...]) -> str:
    """The offer that Accept likes best, the earlier of two it likes alike.

    Raises `NotAcceptable`, naming the offers, when it likes none.
    """
    wishes = [_wish(part) for part in (accept or "*/*").lower().split(",")]
    best = max(offers, key=lambda offer: _quality(offer, wishes))
    if _quality(best, wishes) <= 0:
        raise NotAcceptable(
            f"{accept} is not to be had here, but {' and '.join(offers)}", offers=offers
        )
    return best


def accepts_coding(accept_encoding: str | None, coding: str) -> bool:
    """Whether a reader takes a content coding; none is taken that is not named."""
    wishes = [_wish(part) for part in (accept_encoding or "").lower().split(",")]
    return any(wish.pattern in (coding, "*") and wish.quality > 0 for wish in wishes)


def _wish(part: str) -> _Wish:
    pattern, *parameters = (piece.strip() for piece in part.split(";"))
    quality = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
    try:
        return _Wish(pattern, float(quality))
    except ValueError:
        return _Wish(pattern, 0.0)


def _quality(offer: str, wishes: list[_Wish]) -> float:
    """Of the most exact wish that an offer meets."""
    for pattern in (offer, offer.partition("/")[0] + "/*", "*/*"):
        if met := [wish.quality for wish in wishes if wish.pattern == pattern]:
            return max(met)
    return 0.0
