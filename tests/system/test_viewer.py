"""What a person reads in the browser is what the scanner measured, to the last digit."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neural_mri import Client
from tests.system.service import ROOT, Service

pytestmark = [pytest.mark.smollm2, pytest.mark.browser]

PROMPT = "The Eiffel Tower is located in the city of"
STEPS = 200


@pytest.fixture(scope="module")
def visit(service: Service) -> dict[str, Any]:
    """A visit to the viewer: T1, then a scan, then 200 keys."""
    said = subprocess.run(
        ["node", "scripts/visit-service.mjs", str(service.http.base_url), PROMPT, str(STEPS)],
        cwd=ROOT / "web",
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert said.returncode == 0, said.stderr
    seen: dict[str, Any] = json.loads(said.stdout)
    return seen


def test_every_number_on_the_screen_is_the_stored_float(
    service: Service, visit: dict[str, Any]
) -> None:
    with Client(str(service.http.base_url)) as client:
        table = client.result(visit["job"]).table("activations")
    stored = {row["component"]: np.array(row["value"], np.float32) for row in table.to_pylist()}
    read = {(reading["component"], reading["column"]) for reading in visit["readings"]}
    assert len(read) > STEPS / 4, "the keys went nowhere"
    for reading in visit["readings"]:
        shown = float(reading["value"])
        expected = float(stored[reading["component"]][reading["column"]])
        assert shown == expected or (math.isnan(shown) and math.isnan(expected)), reading


def test_the_first_picture_counts_the_models_own_parameters(
    service: Service, visit: dict[str, Any]
) -> None:
    with Client(str(service.http.base_url)) as client:
        rows = client.scan_structural().table("topology").to_pylist()
    parameters = {row["component"]: row["parameters"] for row in rows}
    structure = visit["structure"]
    assert float(structure["value"]) == parameters[structure["component"]]


def test_the_viewer_complains_of_nothing_and_asks_nobody_else(
    service: Service, visit: dict[str, Any]
) -> None:
    assert visit["complaints"] == []
    assert visit["origins"] == [str(service.http.base_url).rstrip("/")]


def test_a_move_of_the_crosshair_is_announced(visit: dict[str, Any]) -> None:
    assert any(part in visit["told"] for part in ("L2 norm", "token")), visit["told"]


def test_the_viewer_is_built_where_the_service_looks_for_it() -> None:
    assert (Path(ROOT) / "web" / "dist" / "index.html").exists(), "run `make up` or `npm run build`"
