"""The Prefer header."""

import pytest

from api.waiting import wait_seconds


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, None),
        ("", None),
        ("wait=10", 10),
        ("wait=0", 0),
        ("Wait = 7", 7),
        ('wait="7"', 7),
        ("respond-async, wait=7", 7),
        ("respond-async; wait=7; foo", 7),
        ("wait=600", 60),
        ("wait=-1", None),
        ("wait=soon", None),
        ("await=5", None),
        ("respond-async", None),
    ],
)
def test_the_seconds_to_wait(prefer: str | None, seconds: int | None) -> None:
    assert wait_seconds(prefer) == seconds
