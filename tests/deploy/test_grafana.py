"""The dashboard and the alerts ask only for figures that exist."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import yaml
from prometheus_client.core import Metric

from api.metrics import Metrics, Now
from neural_mri.backing.events import HeldModel, WorkerBeat
from neural_mri.backing.settings import PREFIX, Settings
from neural_mri.contract.cluster import QueueLoad
from neural_mri.contract.jobs import Lane
from neural_mri.contract.models import ModelState

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana/neural-mri.json"
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
    "gauge": ("",),
}


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def alerts() -> list[Any]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())["groups"]
    rules: list[Any] = group["rules"]
    return rules


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
    held = HeldModel(name="tiny", revision="0" * 64, state=ModelState.RESIDENT)
    beat = WorkerBeat(worker="worker-1", device="cpu", models=(held,), at=0.0)
    for family, labels in (
        (worker.CLAIMS, ("jobs",)),
        (worker.FORWARD_SECONDS, ("tiny", "fMRI")),
        (worker.ENDED, ("tiny", "failed")),
        (worker.LOAD_SECONDS, ("tiny",)),
        (worker.RELEASED, ("tiny",)),
        (worker.EVICTED, ("tiny",)),
        (worker.MEMORY, ("free",)),
        (worker.OUT_OF_MEMORY, ("halved",)),
    ):
        family.labels(*labels)
    return names(
        [
            *api._registry.collect(),
            *Now([load], [beat], 0, {Lane.BATCH: 1}, {"job:age": 1}, 1).collect(),
            *worker.REGISTRY.collect(),
            *worker.Held(lambda: ()).collect(),
        ]
    )


def test_every_query_names_figures_and_labels_that_exist() -> None:
    known = served()
    known["neural_mri_worker_model_memory_bytes"] |= {"model", "state"}
    asked = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    assert len(asked) >= 16
    for query in asked + [alert["expr"] for alert in alerts()]:
        found = re.findall(r"\bneural_mri_\w+", query)
        assert found, query
        labels = set[str]()
        for name in found:
            assert name in known, f"{query}: there is no {name}"
            labels |= known[name]
        by = re.findall(r"\bby \(([^)]*)\)", query)
        selected = re.findall(r"{([^}]*)}", query)
        for label in [each.strip() for group in by for each in group.split(",")] + [
            re.split("[=!~]", each)[0].strip() for group in selected for each in group.split(",")
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


def test_every_alert_leads_to_what_to_do() -> None:
    headings = re.findall(r"^### (.+)$", (DEPLOY / "RUNBOOK.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in headings}
    for alert in alerts():
        assert alert["annotations"]["runbook"].removeprefix("#") in anchors, alert["alert"]


def test_the_runbook_names_settings_and_figures_that_exist() -> None:
    text = (DEPLOY / "RUNBOOK.md").read_text()
    known = {PREFIX + field.name.upper() for field in msgspec.structs.fields(Settings)}
    assert set(re.findall(r"NEURAL_MRI_[A-Z_]+", text)) <= known
    assert set(re.findall(r"neural_mri_(?!backing)\w+", text)) <= served().keys()
