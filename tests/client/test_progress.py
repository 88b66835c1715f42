"""What waits can be seen where somebody looks, and nowhere else."""

import asyncio
import io
import subprocess
import sys

import pytest
from rich.console import Console

from neural_mri.client import AsyncClient, Client
from neural_mri.client.progress import Follower, Row, Terminal, place_in_words, table_of
from neural_mri.contract.events import Ended, Progress, Queued, StateChanged
from neural_mri.contract.jobs import JobState, QueuePlace
from tests.client.wire import Wire

PROMPT = "The Eiffel Tower is in"


@pytest.mark.parametrize(
    ("position", "seconds", "said"),
    [
        (1, None, "next in the queue"),
        (3, None, "place 3 in the queue"),
        (3, 0.2, "place 3 in the queue, starts in about 1 s"),
        (40, 240.0, "place 40 in the queue, starts in about 4 min"),
        (40, 9000.0, "place 40 in the queue, starts in about 2.5 h"),
    ],
)
def test_a_place_is_told_with_its_estimate(position: int, seconds: float | None, said: str) -> None:
    kinds = (QueuePlace, Queued)
    for kind in kinds:
        assert place_in_words(kind(position=position, estimated_start_seconds=seconds)) == said


def terminal() -> tuple[Terminal, io.StringIO]:
    file = io.StringIO()
    return Terminal(Console(file=file, force_terminal=True, width=120)), file


def test_a_terminal_shows_every_call_and_is_left_clean() -> None:
    screen, file = terminal()
    one, two = (Follower(screen, Row(name, "submitted")) for name in ("[one]", "two"))
    one(Queued(position=4, estimated_start_seconds=30.0))
    two(StateChanged(state=JobState.RUNNING, attempt=2))
    two(Progress(stage="forward", done=3, total=30))
    assert one.row.said == "place 4 in the queue, starts in about 30 s"
    assert two.row == Row("two", "forward", 3, 30, "3 of 30")
    two(Ended(state=JobState.SUCCEEDED, attempt=2))
    assert two.row.said == "succeeded"
    two.end()
    one.end()
    drawn = file.getvalue()
    assert "[one]" in drawn
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1
    one.end()  # once more does no harm
    again = Follower(screen, Row("three", "submitted"))
    again.end()
    assert "three" in file.getvalue()


def test_a_notebook_shows_them_as_a_table() -> None:
    rows = [Row("<a>", "forward", 3, 30, "3 of 30"), Row("b", "queued")]
    assert table_of(rows) == (
        '<table><tr><td>&lt;a&gt;</td><td>forward</td><td><progress value="3" max="30"></progress>'
        "</td><td>3 of 30</td></tr><tr><td>b</td><td>queued</td><td></td><td></td></tr></table>"
    )
    assert table_of([]) == ""


WAITING = """
import sys
from neural_mri import Client
with Client(sys.argv[1]) as client:
    client.scan_activation("The Eiffel Tower is in", progress={})
"""


def said(wire: Wire, progress: str, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", WAITING.format(progress), wire.url],
        capture_output=True,
        text=True,
        check=True,
        env={"TERM": "xterm-256color", **environment},
    )
    assert ran.stdout == ""
    return ran.stderr


def test_bars_are_drawn_where_there_is_a_terminal_and_somebody_asked(wire: Wire) -> None:
    assert "fMRI tiny" in said(wire, "True", FORCE_COLOR="1")
    assert said(wire, "True") == ""
    assert said(wire, "False", FORCE_COLOR="1") == ""


def test_a_log_gets_a_line_a_change(wire: Wire) -> None:
    lines = [line.partition(": ")[2] for line in said(wire, "'lines'").splitlines()]
    assert lines == ["queued", "claimed", "running", "forward", "storing", "succeeded"]


def test_who_listens_hears_all_the_same(
    wire: Wire, client: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[object] = []
    client.scan_activation(PROMPT, on_event=heard.append, progress="lines")
    assert any(isinstance(event, Ended) for event in heard)
    assert "forward" in capsys.readouterr().err


def test_many_calls_show_themselves_side_by_side(
    wire: Wire, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scan() -> None:
        async with AsyncClient(wire.url) as client:
            await asyncio.gather(
                *(client.scan_activation(f"{PROMPT} {n}", progress="lines") for n in range(5))
            )

    asyncio.run(scan())
    ended = [line for line in capsys.readouterr().err.splitlines() if line.endswith("succeeded")]
    assert len({line.partition(": ")[0] for line in ended}) == 5
