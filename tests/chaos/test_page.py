"""What `docs/chaos.md` says of tests."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "chaos.md"


def test_every_test_that_is_named_is_there() -> None:
    files = list(TESTS.rglob("test_*.py"))
    functions = {
        name
        for file in files
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    known = {file.stem for file in files} | functions
    named = re.findall(r"`(?:tests/\w+/)?(test_\w+)(\.\.\.|\.py)?`", PAGE.read_text())
    assert len(named) > 20
    for name, rest in named:
        is_there = any(each.startswith(name) for each in known) if rest == "..." else name in known
        assert is_there, name
