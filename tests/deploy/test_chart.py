"""The Helm chart, as far as it can be looked at without Helm and without a cluster."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from neural_mri import __version__
from neural_mri.backing.settings import PREFIX, load_settings
from tests.deploy.charts import CHART, references, render, values

ROOT = CHART.parents[2]
TEMPLATES = sorted(path.name for path in (CHART / "templates").iterdir())
SECRETS = {
    "database-url": "postgresql://ada:lovelace@db/nmri",
    "redis-url": "redis://:x@valkey:6379/0",
    "key-pepper": "0123456789abcdef",
    "store-access-key": "a",
    "store-secret-key": "b",
}


def everything_on() -> dict[str, Any]:
    given = copy.deepcopy(values())
    given["autoscaling"]["enabled"] = given["api"]["ingress"]["enabled"] = True
    given["models"]["claim"]["storageClass"] = "shared"
    return given


def objects() -> list[dict[str, Any]]:
    return [each for name in TEMPLATES for each in render(name, everything_on())]


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [
        (each["metadata"]["name"], each["spec"]["template"])
        for each in objects()
        if each["kind"] == "Deployment"
    ]


def containers() -> list[dict[str, Any]]:
    return [
        container
        for _, pod in pods()
        for part in ("initContainers", "containers")
        for container in pod["spec"].get(part, [])
    ]


def leaves(value: Any, path: str) -> set[str]:
    """Dotted names of values; what is handed on whole counts as one."""
    if isinstance(value, dict) and value and "requests" not in value:
        return {leaf for key, each in value.items() for leaf in leaves(each, f"{path}.{key}")}
    return {path}


def test_every_value_is_used_and_every_one_used_exists() -> None:
    used = {
        name
        for template in TEMPLATES
        for name in references((CHART / "templates" / template).read_text())
    }
    known = leaves(values(), ".Values")
    assert known - used == set()
    assert objects()  # reads each of them, and fails at one that is not there


def test_what_is_switched_off_is_not_made() -> None:
    kinds = {each["kind"] for name in TEMPLATES for each in render(name, values())}
    assert kinds.isdisjoint({"ScaledObject", "Ingress"})
    assert {each["kind"] for each in objects()} >= {"ScaledObject", "Ingress", "NetworkPolicy"}


def test_objects_are_named_once_and_belong_to_the_release() -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in objects()]
    assert len(set(names)) == len(names)
    for each in objects():
        assert each["apiVersion"]
        assert each["metadata"]["name"].startswith("mri-")
        assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "mri"


def test_selectors_find_the_pods_they_mean() -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in pods()}
    for each in objects():
        spec = each.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector") or {}
        wanted = selector.get("matchLabels", selector)
        if not wanted:
            continue
        found = [name for name, own in labels.items() if wanted.items() <= own.items()]
        assert found == [each["metadata"]["name"]], each["metadata"]["name"]


def test_named_ports_claims_and_settings_exist() -> None:
    made = {(each["kind"], each["metadata"]["name"]) for each in objects()}
    for name, pod in pods():
        ports = {
            port["name"] for each in pod["spec"]["containers"] for port in each.get("ports", [])
        }
        probed = re.findall(r"'port': '(\w+)'", str(pod["spec"]["containers"]))
        assert set(probed) <= ports, name
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in made
        for part in ("initContainers", "containers"):
            for container in pod["spec"].get(part, []):
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
                (source,) = container["envFrom"]
                assert ("ConfigMap", source["configMapRef"]["name"]) in made


@pytest.mark.parametrize("container", containers(), ids=lambda each: str(each["name"]))
def test_every_process_accepts_the_settings_it_is_given(container: dict[str, Any]) -> None:
    (config,) = render("settings.yaml", values())
    environment = dict(config["data"])
    for variable in container["env"]:
        if "value" in variable:
            environment[variable["name"]] = variable["value"]
        elif secret := variable["valueFrom"].get("secretKeyRef"):
            assert secret["name"] == values()["secretName"]
            environment[variable["name"]] = SECRETS[secret["key"]]
        else:
            environment[variable["name"]] = "10.0.0.7"
    for name, text in environment.items():
        assert isinstance(text, str), name
        expanded = re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], text)
        environment[name] = expanded
    settings = load_settings(
        {name: text for name, text in environment.items() if name.startswith(PREFIX)}
    )
    assert settings.store_url == "s3://results/neural-mri"
    assert settings.database_url.startswith("postgresql://")


def test_every_command_is_a_module_of_the_tree() -> None:
    for container in containers():
        python, flag, module, *_ = container["command"]
        assert (python, flag) == ("python", "-m")
        place = ROOT.joinpath(*module.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def test_no_process_is_root_or_can_become_it() -> None:
    for name, pod in pods():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True, name
        assert pod["spec"]["automountServiceAccountToken"] is False, name
    for container in containers():
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"]
        assert container["resources"]["limits"]["memory"]


def test_workers_are_scaled_by_a_figure_that_the_api_tells() -> None:
    from api.metrics import Now

    (scaled,) = render("autoscaling.yaml", everything_on())
    (trigger,) = scaled["spec"]["triggers"]
    told = {family.name for family in Now([], [], 0).collect()}
    assert set(re.findall(r"neural_mri_\w+", trigger["metadata"]["query"])) <= told
    assert scaled["spec"]["scaleTargetRef"]["name"] in {name for name, _ in pods()}


def test_the_chart_and_its_images_bear_the_versions_of_the_service() -> None:
    chart = yaml.safe_load(Path(CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    for part in ("api", "worker"):
        assert values()[part]["image"].endswith(f":{__version__}")
