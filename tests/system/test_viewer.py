"""What a person reads in the browser is what the scanner measured, to the last digit."""

import json
import math
import subprocess
from collections.abc import Callable
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
    """A visit to the viewer: T1, a scan, 200 keys, then every other modality and a stimulation."""
    said = subprocess.run(
        ["node", "scripts/visit-service.mjs", str(service.http.base_url), PROMPT, str(STEPS)],
        cwd=ROOT / "web",
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
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


MODES = {
    "T2": ("weights", "rms"),
    "DTI": ("effects", "effect"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_static_picture_shows_the_stored_floats(
    service: Service, visit: dict[str, Any], mode: str
) -> None:
    name, column = MODES[mode]
    seen = visit["modes"][mode]
    with Client(str(service.http.base_url)) as client:
        rows = client.result(seen["job"]).table(name).to_pylist()
    stored = {row["component"]: float(row[column]) for row in rows}
    _agree(seen["readings"], lambda component, _: stored[component])


def test_a_flair_picture_shows_how_unusual_each_sublayer_is(
    service: Service, visit: dict[str, Any]
) -> None:
    seen = visit["modes"]["FLAIR"]
    with Client(str(service.http.base_url)) as client:
        table = client.result(seen["job"]).table("nodes")
    rows = [row for row in table.to_pylist() if row["quantity"] == "z"]
    stored = {row["component"]: row["value"] for row in rows}
    # Position 0 is not measured, and stands in the picture all the same.
    _agree(
        seen["readings"],
        lambda component, column: stored[component.partition(".head_")[0]][column - 1],
    )


def test_a_stimulation_shows_what_it_changed(service: Service, visit: dict[str, Any]) -> None:
    seen = visit["modes"]["perturbation"]
    with Client(str(service.http.base_url)) as client:
        result = client.result(seen["job"])
        tables = {
            name: {
                row["component"]: np.array(row["value"], np.float64)
                for row in result.table(name).to_pylist()
            }
            for name in ("activations", "activations_after")
        }
        after = result.table("comparison").to_pylist()[0]["metric_after"]
    assert np.all(tables["activations_after"][seen["component"]] == 0), "zero leaves nothing"
    assert float(seen["after"]) == after

    def difference(component: str, column: int) -> float:
        before, changed = (
            tables[n][component][column] for n in ("activations", "activations_after")
        )
        return float(changed - before)

    _agree(seen["readings"], difference)


def _agree(readings: list[dict[str, Any]], stored: Callable[[str, int], float]) -> None:
    """What was read on the screen is what is stored, digit for digit."""
    assert len({reading["component"] for reading in readings}) > 2, "the keys went nowhere"
    for reading in readings:
        shown, value = (
            float(reading["value"]),
            float(stored(reading["component"], reading["column"])),
        )
        assert shown == value or (math.isnan(shown) and math.isnan(value)), reading


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
