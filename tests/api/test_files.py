"""Byte ranges, by themselves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.files import Unsatisfiable, extent, is_known


@settings(deadline=None)
@given(st.integers(1, 10**6), st.data())
def test_a_range_is_what_slicing_would_give(size: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, size - 1))
    last = data.draw(st.integers(first, 2 * size))
    body = range(size)
    part = extent(f"bytes={first}-{last}", size)
    assert part is not None
    assert body[part.start : part.end] == body[first : last + 1]
    rest = extent(f"bytes={first}-", size)
    assert rest is not None
    assert body[rest.start : rest.end] == body[first:]
    suffix = data.draw(st.integers(1, 2 * size))
    end = extent(f"bytes=-{suffix}", size)
    assert end is not None
    assert body[end.start : end.end] == body[-suffix:]


@settings(deadline=None)
@given(st.text(max_size=30), st.integers(0, 1000))
def test_any_header_is_a_part_the_whole_or_unsatisfiable(text: str, size: int) -> None:
    try:
        part = extent(f"bytes={text}", size)
    except Unsatisfiable:
        return
    assert part is None or 0 <= part.start < part.end <= size


@pytest.mark.parametrize("text", ["bytes=0-", "bytes=0-0", "bytes=-1"])
def test_an_empty_file_has_no_part(text: str) -> None:
    with pytest.raises(Unsatisfiable):
        extent(text, 0)


def test_tags_are_compared_whole() -> None:
    assert is_known('"a", "b"', '"b"')
    assert is_known("*", '"b"')
    assert not is_known(None, '"b"')
    assert not is_known('"bb"', '"b"')
    assert not is_known("b", '"b"')
