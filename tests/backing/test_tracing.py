import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_mri.backing import tracing
from neural_mri.backing.settings import InvalidSettings, Settings, load_settings

ROOT = Path(__file__).parents[2]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("header", "read"),
    [
        (GOOD, GOOD),
        (f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-00"),
        (f"cc-{TRACE}-{SPAN}-01-what-will-be", GOOD),
        (f"00-{TRACE}-{SPAN}-01-what-will-be", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        (f" {GOOD}", None),
        (f"{GOOD}\n", None),
        ("", None),
        (None, None),
    ],
)
def test_a_callers_span_is_read_as_the_recommendation_says(
    header: str | None, read: str | None
) -> None:
    assert tracing.parsed(header) == read


@given(st.text(max_size=80))
def test_what_is_passed_on_fits_the_jobs_row(header: str) -> None:
    read = tracing.parsed(header)
    assert read is None or (len(read) == 55 and tracing.parsed(read) == read)


def test_where_nothing_is_sent_a_callers_trace_is_carried_on() -> None:
    span = tracing.begin("POST", GOOD)
    assert span.traceparent == GOOD
    assert span.trace_id == TRACE
    span.note({"a": 1})
    span.fail()
    span.end(name="b")
    assert tracing.begin("POST", None).traceparent is None


WITHOUT_TRACES = """
import sys, api.__main__
from neural_mri.backing import tracing
from neural_mri.backing.settings import Settings
with tracing.exported(Settings(), process="api"):
    tracing.begin("GET", None).end()
print(*(name for name in sys.modules if name.startswith("opentelemetry.")))
"""


def test_without_a_collector_no_library_for_it_is_loaded() -> None:
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRACES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    # redis-py loads that of metrics, where it is installed.
    ours = ("opentelemetry.exporter", "opentelemetry.sdk.trace")
    assert [name for name in said.stdout.split() if name.startswith(ours)] == []


WITHOUT_LIBRARY = """
import sys
sys.modules["opentelemetry"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name.startswith("opentelemetry") else find(name)
from api.__main__ import main
sys.exit(main())
"""


def test_a_collector_without_the_library_is_refused_in_words(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, traces_endpoint="http://127.0.0.1:4318")
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY],
        cwd=ROOT,
        env={**os.environ, **settings.environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 2
    assert "pip install 'neural-mri[traces]'" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_collector_that_is_away_holds_nobody_up(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, traces_endpoint="http://127.0.0.1:9")
    with tracing.exported(settings, process="test"):
        span = tracing.begin("GET", GOOD)
        span.end()
        assert span.trace_id == TRACE
        assert span.traceparent != GOOD
    assert tracing.begin("GET", None).traceparent is None


def test_only_an_address_is_one() -> None:
    with pytest.raises(InvalidSettings, match="TRACES_ENDPOINT"):
        load_settings({"NEURAL_MRI_TRACES_ENDPOINT": "collector:4318"})
