"""The chart starts what the compose file starts: what is true of one's processes is of the other's."""

import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.deploy.charts import render, values
from tests.deploy.composition import COMPOSE, merged, services
from tests.deploy.test_chart import environment
from tests.deploy.test_compose import SECRETS

PLACES = {
    "migrations": ("api.yaml", "initContainers"),
    "models": ("worker.yaml", "initContainers"),
    "api": ("api.yaml", "containers"),
    "reaper": ("reaper.yaml", "containers"),
    "worker": ("worker.yaml", "containers"),
}
"""Where the chart has what the compose file calls so."""
OF_EACH = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "HF_TOKEN",
    "NEURAL_MRI_ALLOWED_HOSTS",
    "NEURAL_MRI_DATABASE_URL",
    "NEURAL_MRI_DEVICE",  # a cluster is said to have GPUs; on a host it is looked for
    "NEURAL_MRI_KEY_PEPPER",
    "NEURAL_MRI_REDIS_URL",
    "NEURAL_MRI_STORE_ENDPOINT",
}
"""Variables that both set, each to its own."""
OF_THE_CHART = {"ALLOWED_HOSTS", "INGRESS_HOST", "POD_IP", "NEURAL_MRI_DTYPE"}
"""Of which the names of the API are made; and what the compose file leaves to settings.env."""


def pod_of(name: str) -> dict[str, Any]:
    file, _ = PLACES[name]
    deployment, *_ = render(file, values())
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


def container_of(name: str) -> dict[str, Any]:
    (found,) = [each for each in pod_of(name)[PLACES[name][1]] if each["name"] == name]
    container: dict[str, Any] = found
    return container


@pytest.mark.parametrize("name", PLACES)
def test_a_process_has_the_same_command_variables_and_rights(name: str) -> None:
    service, container = services(SECRETS)[name], container_of(name)
    assert container["command"] == service["command"]
    theirs, ours = environment(container, values()), service["environment"]
    assert theirs.keys() - OF_THE_CHART == ours.keys()
    for variable in ours.keys() - OF_EACH:
        assert theirs[variable] == ours[variable], variable
    part = "worker" if "worker" in service["image"] else "api"
    assert container["image"] == values()[part]["image"]
    assert service["build"]["dockerfile"] == f"deploy/docker/{part}.Dockerfile"
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] is service["read_only"] is True
    assert context["capabilities"]["drop"] == service["cap_drop"]
    assert pod_of(name)["securityContext"]["runAsUser"] == values()["runAs"]
    written = {mount["mountPath"] for mount in container["volumeMounts"]}
    kept = {volume.partition(":")[2] for volume in service.get("volumes", ())}
    assert kept | set(service["tmpfs"]) <= written


@pytest.mark.parametrize("name", ["models", "worker"])
def test_models_are_kept_where_workers_find_them(name: str) -> None:
    (volume,) = services(SECRETS)[name]["volumes"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container_of(name)["volumeMounts"]}
    assert volume == f"models:{mounted['models']}"


def test_who_registers_models_is_told_what_workers_compute_on() -> None:
    """Scans are asked for by what is registered, before a worker has loaded anything."""
    variable, gpus = "NEURAL_MRI_DEVICE", COMPOSE.with_name("compose.gpu.yaml")
    for given in ({}, {"DEVICE": "cpu"}, {"DEVICE": "cuda:1"}):
        found = services({**SECRETS, **given})
        for each in (found, merged(found, services(SECRETS, gpus))):
            said = {name: each[name]["environment"].get(variable) for name in ("models", "worker")}
            assert said["models"] == said["worker"], given
    said = {name: environment(container_of(name), values()) for name in ("models", "worker")}
    assert said["models"].get(variable) == said["worker"][variable]


def asked(probe: Mapping[str, Any], ports: Mapping[str, int]) -> str:
    """The address that a probe asks, as the container itself would."""
    return f"http://127.0.0.1:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"


@pytest.mark.parametrize(
    ("name", "probe", "variable"),
    [
        ("api", "readinessProbe", "NEURAL_MRI_PORT"),
        ("api", "startupProbe", "NEURAL_MRI_PORT"),
        ("worker", "livenessProbe", "NEURAL_MRI_WORKER_METRICS_PORT"),
    ],
)
def test_a_probe_asks_what_a_health_check_does(name: str, probe: str, variable: str) -> None:
    service, container = services(SECRETS)[name], container_of(name)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(*ports.values()) == service["environment"][variable]
    (address,) = re.findall(r"'(http:[^']+)'", " ".join(service["healthcheck"]["test"]))
    assert asked(container[probe], ports) == address


def test_the_reapers_probe_is_its_health_check() -> None:
    _, *check = services(SECRETS)["reaper"]["healthcheck"]["test"]
    probe = container_of("reaper")["livenessProbe"]["exec"]["command"]
    assert [part.replace('"', "'") for part in probe] == check


def test_what_is_published_is_where_the_api_listens() -> None:
    (published,) = services(SECRETS)["api"]["ports"]
    ((port,),) = [[each["containerPort"] for each in container_of("api")["ports"]]]
    assert published.endswith(f":{port}")
