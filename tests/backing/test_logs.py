import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from neural_mri.backing import logs
from neural_mri.backing.settings import Settings


class Written:
    """What went to standard error so far."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self._text = ""

    def text(self) -> str:
        self._text += self._capture.readouterr().err
        return self._text

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    """With logging put back as it was afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield Written(capsys)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    for name in logs._NOISY:
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()


def configure(level: Any = "INFO", form: Any = "json") -> None:
    logs.configure(Settings(log_format=form, log_level=level), process="api")


def test_our_records_and_other_libraries_have_one_form(written: Written) -> None:
    configure()
    structlog.get_logger("ours").info("scan_finished", model="tiny", seconds=0.25)
    logging.getLogger("theirs").warning("it %s", "happened", extra={"port": 80})
    ours, theirs = written.records()
    assert ours["event"] == "scan_finished"
    assert (ours["model"], ours["seconds"], ours["logger"]) == ("tiny", 0.25, "ours")
    assert (theirs["event"], theirs["port"], theirs["logger"]) == ("it happened", 80, "theirs")
    for record in (ours, theirs):
        assert record["process"] == "api"
        assert record["timestamp"].endswith("Z")
        assert record["level"] in {"info", "warning"}


def test_settings_that_nobody_knows_are_told_of_by_name_alone(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURAL_MRI_TELESCOPE_COLOUR", "blue")
    configure()
    (line,) = written.records()
    assert (line["event"], line["level"]) == ("settings_not_known", "warning")
    assert line["names"] == ["NEURAL_MRI_TELESCOPE_COLOUR"]
    assert "blue" not in written.text()


def test_what_is_bound_is_in_every_record(written: Written) -> None:
    configure()
    with structlog.contextvars.bound_contextvars(job_id="7"):
        structlog.get_logger().info("claimed")
        logging.getLogger("theirs").info("said")
    assert [line["job_id"] for line in written.records()] == ["7", "7"]


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_prompt_is_not_logged(written: Written, form: str) -> None:
    configure("INFO", form)
    structlog.get_logger().info("submitted", prompt="my secret", request={"prompt": "my secret"})
    logging.getLogger("theirs").warning("odd", extra={"body": "my secret"})
    structlog.get_logger().warning("refused", answer={"detail": "x", "tokens": ["my secret"]})
    assert "my secret" not in written.text()
    assert "***" in written.text()


def test_debugging_shows_prompts_but_never_secrets(written: Written) -> None:
    configure("DEBUG")
    structlog.get_logger().debug("seen", prompt="hello", headers={"Authorization": "nmri_1_x"})
    [line] = written.records()
    assert line["prompt"] == "hello"
    assert line["headers"] == {"Authorization": "***"}


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_shows_no_local_variables(written: Written, form: str) -> None:
    configure("INFO", form)

    secret = "-".join(["my", "secret"])  # not as it stands in this line of a traceback

    def fail(prompt: str) -> None:
        raise ValueError(f"a prompt of {len(prompt)} characters")

    try:
        fail(secret)
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("theirs").exception("failed")
    assert "a prompt of 9 characters" in written.text()
    assert secret not in written.text()


def test_a_password_in_a_url_is_hidden(written: Written) -> None:
    configure()
    structlog.get_logger().info("connected", url="postgresql://ada:lovelace@db/nmri")
    logging.getLogger("theirs").info("at redis://:lovelace@queue:6379")
    assert "lovelace" not in written.text()


def test_what_is_below_the_level_is_left_out(written: Written) -> None:
    configure("WARNING")
    structlog.get_logger().info("said")
    logging.getLogger("theirs").info("said")
    assert written.text() == ""


def test_configuring_twice_logs_once(written: Written) -> None:
    configure()
    configure()
    structlog.get_logger().info("said")
    assert len(written.records()) == 1


def test_people_get_a_line_they_can_read(written: Written) -> None:
    configure("INFO", "console")
    structlog.get_logger().info("scan_finished", model="tiny")
    assert "scan_finished" in written.text()
    assert "model=tiny" in written.text()
    assert "\x1b" not in written.text()
