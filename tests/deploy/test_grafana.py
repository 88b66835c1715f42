"""The dashboard asks only for figures that exist."""

import json
import re
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric

from api.metrics import Metrics, Now
from neural_mri.contract.cluster import QueueLoad
from neural_mri.contract.jobs import Lane

DASHBOARD = Path(__file__).parents[2] / "deploy/grafana/neural-mri.json"
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
    "gauge": ("",),
}


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def names(families: list[Metric]) -> dict[str, set[str]]:
    """Names of series as they can be asked for, and their labels."""
    known: dict[str, set[str]] = {}
    for family in families:
        for suffix in SUFFIXES[family.type]:
            known[family.name + suffix] = {
                label for sample in family.samples for label in sample.labels
            } | ({"le"} if suffix == "_bucket" else set())
    return known


def served() -> dict[str, set[str]]:
    """Everything that the API and a worker tell, each series once."""
    from worker import metrics as worker

    api = Metrics()
    api.answered({"path_template": "/", "method": "GET"}, 200, 0.1)
    api._accepted.labels("scan", "stored").inc()
    load = QueueLoad(
        queue="scan.a", model="tiny", lane=Lane.BATCH, waiting=1, oldest_seconds=1.0, running=0
    )
    for family, labels in (
        (worker.CLAIMS, ("jobs",)),
        (worker.FORWARD_SECONDS, ("tiny", "fMRI")),
        (worker.ENDED, ("tiny", "failed")),
        (worker.LOAD_SECONDS, ("tiny",)),
        (worker.RELEASED, ("tiny",)),
    ):
        family.labels(*labels)
    return names(
        [
            *api._registry.collect(),
            *Now([load], 1, 0).collect(),
            *worker.REGISTRY.collect(),
            *worker.Held(lambda: ()).collect(),
        ]
    )


def test_every_query_names_figures_and_labels_that_exist() -> None:
    known = served()
    known["neural_mri_worker_model_memory_bytes"] |= {"model", "state"}
    asked = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert len(asked) >= 16
    for query in asked:
        found = re.findall(r"\bneural_mri_\w+", query)
        assert found, query
        labels = set[str]()
        for name in found:
            assert name in known, f"{query}: there is no {name}"
            labels |= known[name]
        by = re.findall(r"\bby \(([^)]*)\)", query)
        selected = re.findall(r"{([^}]*)}", query)
        for label in [each.strip() for group in by for each in group.split(",")] + [
            each.partition("=")[0].strip() for group in selected for each in group.split(",")
        ]:
            assert label in labels | {"instance"}, f"{query}: no label {label}"


def test_every_figure_is_shown_somewhere() -> None:
    text = DASHBOARD.read_text()
    for name in served():
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        assert family in text, f"nothing shows {family}"


def test_panels_have_names_and_places_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set[tuple[int, int]]()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
