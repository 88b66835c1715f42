"""Accept headers."""

import pytest

from api.negotiation import accepts_coding, preferred
from api.problems import NotAcceptable

OFFERS = ("application/json", "application/vnd.apache.arrow.file")
JSON, ARROW = OFFERS


@pytest.mark.parametrize(
    ("accept", "offer"),
    [
        (None, JSON),
        ("", JSON),
        ("*/*", JSON),
        ("text/html, */*;q=0.1", JSON),
        (ARROW, ARROW),
        (ARROW.upper(), ARROW),
        (f"{ARROW}, */*;q=0.5", ARROW),
        (f"application/*;q=0.2, {ARROW};q=0.3", ARROW),
        (f"application/*, {ARROW};q=0.3", JSON),
        (f"*/*, {JSON};q=0", ARROW),
        ("application/*", JSON),
    ],
)
def test_the_best_liked_offer_is_taken(accept: str | None, offer: str) -> None:
    assert preferred(accept, OFFERS) == offer


@pytest.mark.parametrize("accept", ["text/csv", f"{JSON};q=0", "text/*", f"{ARROW};q=much"])
def test_an_unmet_wish_is_refused_with_the_offers(accept: str) -> None:
    with pytest.raises(NotAcceptable) as refusal:
        preferred(accept, OFFERS)
    assert refusal.value.members["offers"] == OFFERS


@pytest.mark.parametrize(
    ("accept_encoding", "taken"),
    [
        (None, False),
        ("identity", False),
        ("br, gzip", True),
        ("gzip;q=0.5", True),
        ("gzip;q=0", False),
        ("gzip;q=0.0", False),
        ("*", True),
    ],
)
def test_a_coding_is_taken_only_where_it_is_named(
    accept_encoding: str | None, *, taken: bool
) -> None:
    assert accepts_coding(accept_encoding, "gzip") is taken
