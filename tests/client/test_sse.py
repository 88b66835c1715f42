"""The parser reads what the standard says, however the bytes are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.client.sse import Message, Parser

NASTY = (
    b"\xef\xbb\xbf: a comment\r\n"
    b"retry: 1500\n\n"
    b'id: 1-0\revent: progress\rdata: {"a": 1}\r\r'
    b"id: 2-0\r\nevent: state\r\ndata: first\r\ndata: second\r\n\r\n"
    + "id: 3-0\ndata: 한국어 🧠 é\n\n".encode()
    + b": heartbeat\n\n"
    b"data:no space\n\n"
    b"data\n\n"
    b"id: 4\x000\nretry: soon\nunknown: field\ndata:  two spaces\n\n"
    b"event: without data\n\n"
    b"id: 5-0\ndata: cut of"
)

READ = [
    Message("progress", '{"a": 1}', "1-0"),
    Message("state", "first\nsecond", "2-0"),
    Message("message", "한국어 🧠 é", "3-0"),
    Message("message", "no space", "3-0"),
    Message("message", "", "3-0"),
    Message("message", " two spaces", "3-0"),
]


def parsed(chunks: list[bytes]) -> list[Message]:
    parser = Parser()
    return [message for chunk in chunks for message in parser.feed(chunk)]


def test_a_stream_is_read_as_the_standard_says() -> None:
    assert parsed([NASTY]) == READ


def test_a_stream_may_arrive_byte_by_byte() -> None:
    assert parsed([bytes([byte]) for byte in NASTY]) == READ


@given(st.lists(st.integers(0, len(NASTY)), max_size=40))
def test_where_a_stream_is_cut_changes_nothing(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(NASTY)]
    assert parsed([NASTY[a:b] for a, b in pairwise(edges)]) == READ


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n\0", codec="utf-8")), min_size=1),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_data_reads_back_as_it_was_written(lines: list[str], line_end: str) -> None:
    written = line_end.join([*(f"data: {line}" for line in lines), "", ""]).encode()
    assert parsed([written[:7], written[7:]]) == [Message("message", "\n".join(lines), "")]


def test_a_message_cut_off_does_not_move_the_last_id() -> None:
    parser = Parser("0-0")
    assert list(parser.feed(b"id: 1-0\ndata: x\n")) == []
    resumed = Parser("0-0")
    assert [message.id for message in resumed.feed(b"data: y\n\n")] == ["0-0"]


def test_the_server_sets_the_pause_before_a_reconnect() -> None:
    parser = Parser()
    assert parser.retry_seconds is None
    list(parser.feed(b"retry: 1500\n"))
    assert parser.retry_seconds == 1.5


@pytest.mark.parametrize("prefix", [b"\xef", b"\xef\xbb", b""])
def test_bytes_that_only_begin_like_a_byte_order_mark_are_kept(prefix: bytes) -> None:
    assert parsed([prefix, b"\ndata: x\n\n"]) == [Message("message", "x", "")]


def test_a_long_line_in_many_pieces_is_read_in_linear_time() -> None:
    parser = Parser()
    chunks = [b"data: ", *([b"x" * 16] * 50_000), b"\n\n"]
    (message,) = [message for chunk in chunks for message in parser.feed(chunk)]
    assert len(message.data) == 800_000
