"""The Helm chart, as far as it can be looked at without Helm and without a cluster."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import kubernetes_validate
import pytest
import yaml

from neural_mri import __version__
from neural_mri.backing.settings import PREFIX, Settings, load_settings
from tests.deploy.charts import CHART, references, render, text, values
from tests.deploy.runbook import SAMPLES, settings_named

ROOT = CHART.parents[2]
TEMPLATES = sorted(path.name for path in (CHART / "templates").glob("*.yaml"))
OLDEST, NEWEST = "1.27", "1.37"
"""Kubernetes that the chart is for."""
OF_OPERATORS = {"ScaledObject", "ServiceMonitor", "PodMonitor"}
"""Kinds that are not Kubernetes' own."""
SECRETS = {
    "database-url": "postgresql://ada:lovelace@db/nmri",
    "redis-url": "redis://:x@valkey:6379/0",
    "key-pepper": "0123456789abcdef",
    "store-access-key": "a",
    "store-secret-key": "b",
    "metrics-key": "nmri_0",
    "hf-token": "hf_0",
}


def everything_on() -> dict[str, Any]:
    given = copy.deepcopy(values())
    given["autoscaling"]["enabled"] = given["api"]["ingress"]["enabled"] = True
    given["api"]["ingress"]["className"] = "nginx"
    given["models"]["claim"]["storageClass"] = "shared"
    given["monitoring"] |= {"enabled": True, "labels": {"release": "prometheus"}}
    given["worker"]["runtimeClassName"] = "nvidia"
    given["imagePullSecrets"] = [{"name": "registry"}]
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
    """Dotted names of values."""
    if isinstance(value, dict) and value:
        return {leaf for key, each in value.items() for leaf in leaves(each, f"{path}.{key}")}
    return {path}


def test_every_value_is_used_and_every_one_used_exists() -> None:
    used = {
        name
        for template in (CHART / "templates").iterdir()
        for name in references(template.read_text())
    }
    # What is handed on whole has all its parts used.
    unused = {
        leaf
        for leaf in leaves(values(), ".Values")
        if not any(f"{leaf}.".startswith(f"{name}.") for name in used)
    }
    assert unused == set()
    assert objects()  # reads each of them, and fails at one that is not there
    assert "api.keys create --admin" in text("NOTES.txt", values())


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_objects_are_what_kubernetes_takes(version: str) -> None:
    wanted = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    assert wanted == f">={OLDEST}.0-0"
    for given in (values(), everything_on()):
        for each in (each for name in TEMPLATES for each in render(name, given)):
            if each["kind"] not in OF_OPERATORS:
                kubernetes_validate.validate(each, version, strict=True)


def schema() -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for((CHART / "values.schema.json").read_text())


def changed(path: str, value: Any) -> dict[str, Any]:
    given = everything_on()
    *folders, last = path.split(".")
    inner = given
    for folder in folders:
        inner = inner[folder]
    inner[last] = value
    return given


def test_the_values_are_what_their_schema_says_and_it_knows_each() -> None:
    fractions = changed("reaper.resources", {"requests": {"cpu": 0.1}, "limits": {"cpu": 1}})
    for given in (values(), everything_on(), changed("worker.replicas", None), fractions):
        schema().validate(given)
    described = json.loads((CHART / "values.schema.json").read_text())
    assert described["properties"].keys() - {"global", "enabled"} == values().keys()


def test_another_chart_may_have_this_one_as_a_part_of_it() -> None:
    schema().validate(values() | {"enabled": True, "global": {"imageRegistry": "registry"}})
    with pytest.raises(jsonschema_rs.ValidationError):
        schema().validate(values() | {"enabled": "yes"})


@pytest.mark.parametrize("count", [0, 1, 5])
def test_there_are_as_many_workers_as_are_asked_for(count: int) -> None:
    (worker, _) = render("worker.yaml", changed("worker.replicas", count))
    assert worker["spec"]["replicas"] == count


def test_of_workers_that_are_scaled_the_chart_says_no_number() -> None:
    (worker, _) = render("worker.yaml", changed("worker.replicas", None))
    assert "replicas" not in worker["spec"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("api.replicas", "two"),
        ("api.replica", 2),
        ("api.ingress.enabled", "yes"),
        ("api.ingress.annotations", {"nginx.ingress.kubernetes.io/proxy-read-timeout": 3600}),
        ("extraEnv", {"NEURAL_MRI_USER_MAX_JOBS": 2000}),
        ("extraEnv", ["NEURAL_MRI_USER_MAX_JOBS=2000"]),
        ("models.sources", {"mine": "hf:acme/mine"}),
        ("models.sources", "mine"),
        ("models.claim.size", "50 GB"),
        ("store.url", "https://s3/results"),
        ("traces.endpoint", "collector:4318"),
        ("worker.device", "gpu"),
        ("worker.dtype", "float8"),
        ("worker.resources", {"limits": {"memory": "8Gi"}}),
        ("autoscaling.waitSeconds", 0),
        ("monitoring.interval", 15),
    ],
)
def test_a_value_of_a_wrong_type_is_refused(path: str, value: Any) -> None:
    with pytest.raises(jsonschema_rs.ValidationError):
        schema().validate(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("traces.endpoint", "http://other:4318"),
        ("store.region", "eu-west-1"),
        ("models.sources", "mine=hf:acme/mine"),
        ("worker.dtype", "bfloat16"),
        ("extraEnv", {"NEURAL_MRI_USER_MAX_JOBS": "2000"}),
    ],
)
def test_whatever_processes_are_told_starts_them_anew_when_it_changes(
    path: str, value: Any
) -> None:
    for name in ("api.yaml", "reaper.yaml", "worker.yaml"):
        before, after = (
            render(name, given)[0]["spec"]["template"]["metadata"]["annotations"]
            for given in (everything_on(), changed(path, value))
        )
        assert before["checksum/settings"] != after["checksum/settings"], name


def test_what_is_switched_off_is_not_made() -> None:
    kinds = {each["kind"] for name in TEMPLATES for each in render(name, values())}
    switched = {"ScaledObject", "Ingress", "ServiceMonitor", "PodMonitor"}
    assert kinds.isdisjoint(switched)
    assert {each["kind"] for each in objects()} >= switched | {"NetworkPolicy"}


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
                for source in container["envFrom"]:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in made


def environment(container: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, str]:
    """What a container's process sees: of its config maps the last counts, and what it is told itself above all."""
    configs = {each["metadata"]["name"]: each["data"] for each in render("settings.yaml", given)}
    seen: dict[str, str] = {}
    for source in container["envFrom"]:
        seen |= configs[source["configMapRef"]["name"]]
    for variable in container["env"]:
        if "value" in variable:
            seen[variable["name"]] = variable["value"]
        elif secret := variable["valueFrom"].get("secretKeyRef"):
            assert secret["name"] == values()["secretName"]
            seen[variable["name"]] = SECRETS[secret["key"]]
        else:
            seen[variable["name"]] = "10.0.0.7"
    for name, written in seen.items():
        assert isinstance(written, str), name
    return {
        name: re.sub(r"\$\((\w+)\)", lambda match: seen[match[1]], written)
        for name, written in seen.items()
    }


@pytest.mark.parametrize("container", containers(), ids=lambda each: str(each["name"]))
def test_every_process_accepts_the_settings_it_is_given(container: dict[str, Any]) -> None:
    seen = environment(container, values())
    settings = load_settings({name: said for name, said in seen.items() if name.startswith(PREFIX)})
    assert settings.store_url == "s3://results/neural-mri"
    assert settings.database_url.startswith("postgresql://")


OWN_VALUES = {
    "NEURAL_MRI_ALLOWED_HOSTS": ("api.allowedHosts", "mri.example.net"),
    "NEURAL_MRI_DEVICE": ("worker.device", "cuda:1"),
}
"""Settings that the chart makes of values of its own: where an operator sets them."""
OF_THE_CONTAINER = {"NEURAL_MRI_WORKER_METRICS_PORT", "NEURAL_MRI_AUTH"}
"""Settings that are as the chart's objects need them."""


@pytest.mark.parametrize("name", sorted(settings_named() - OF_THE_CONTAINER))
def test_every_setting_that_the_runbook_names_can_be_set(name: str) -> None:
    path, said = OWN_VALUES.get(name, ("extraEnv", {name: SAMPLES.get(name, "7")}))
    given = changed(path, said)
    schema().validate(given)
    made = [each for template in TEMPLATES for each in render(template, given)]
    seen = [
        environment(container, given).get(name, "")
        for each in made
        if each["kind"] == "Deployment"
        for container in each["spec"]["template"]["spec"]["containers"]
    ]
    wanted = said if isinstance(said, str) else said[name]
    assert len(seen) == 3
    if path == "extraEnv":
        assert set(seen) == {wanted}
    else:
        assert any(wanted in each for each in seen)


def test_whatever_reads_the_database_first_sees_to_its_schema() -> None:
    migrate = {
        ("python", "-m", "neural_mri.backing"),
        ("python", "-m", "worker.modelstore", "bring"),
    }
    for name, pod in pods():
        (first, *_) = pod["spec"]["initContainers"]
        assert tuple(first["command"]) in migrate, name


def test_an_upgrade_needs_no_gpu_beside_those_that_workers_hold() -> None:
    (worker,) = [
        each
        for each in objects()
        if each["metadata"]["name"] == "mri-worker" and each["kind"] == "Deployment"
    ]
    assert worker["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


def test_an_ingress_lets_through_what_the_service_takes() -> None:
    (ingress,) = render("ingress.yaml", everything_on())
    annotations = ingress["metadata"]["annotations"]
    told = {
        name.removeprefix("nginx.ingress.kubernetes.io/"): annotations[name] for name in annotations
    }
    assert told["proxy-body-size"] == "1g"
    largest = Settings()
    assert max(largest.max_body_bytes, largest.max_batch_bytes, largest.max_session_bytes) <= (
        1 << 30
    )
    assert told["proxy-buffering"] == told["proxy-request-buffering"] == "off"
    assert int(told["proxy-read-timeout"]) > largest.heartbeat_seconds
    host = ingress["spec"]["rules"][0]["host"]
    (api, *_) = render("api.yaml", changed("api.allowedHosts", "elsewhere.example.org"))
    (container,) = api["spec"]["template"]["spec"]["containers"]
    let_in = environment(container, everything_on())["NEURAL_MRI_ALLOWED_HOSTS"].split(",")
    assert {host, "127.0.0.1", "localhost"} <= set(let_in)
    assert ingress["spec"]["ingressClassName"] == "nginx"
    (unnamed,) = render("ingress.yaml", changed("api.ingress.className", ""))
    assert "ingressClassName" not in unnamed["spec"], "the cluster's own"


def test_an_upgrade_waits_for_workers_that_hold_their_models_and_leaves_no_caller_alone() -> None:
    containers_of = {name: pod["spec"]["containers"] for name, pod in pods()}
    [(worker,)] = [each for name, each in containers_of.items() if name.endswith("-worker")]
    file = environment(worker, values())["NEURAL_MRI_WORKER_READY_FILE"]
    assert worker["readinessProbe"]["exec"]["command"] == ["test", "-e", file]
    assert [mount for mount in worker["volumeMounts"] if file.startswith(mount["mountPath"] + "/")]
    [(api,)] = [each for name, each in containers_of.items() if name.endswith("-api")]
    (command, seconds) = api["lifecycle"]["preStop"]["exec"]["command"]
    (pod,) = [pod for name, pod in pods() if name.endswith("-api")]
    assert command == "sleep"
    assert int(seconds) < pod["spec"]["terminationGracePeriodSeconds"] / 2


def test_a_prometheus_operator_asks_with_a_key_at_ports_that_exist() -> None:
    of_api, of_workers = render("monitoring.yaml", everything_on())
    assert of_api["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = of_api["spec"]["endpoints"]
    (service,) = [each for each in objects() if each["kind"] == "Service"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert (
        service["metadata"]["labels"].items() >= of_api["spec"]["selector"]["matchLabels"].items()
    )
    credentials = endpoint["authorization"]["credentials"]
    assert credentials == {"name": values()["secretName"], "key": "metrics-key"}
    (endpoint,) = of_workers["spec"]["podMetricsEndpoints"]
    (worker,) = [pod for name, pod in pods() if name == of_workers["metadata"]["name"]]
    ports = worker["spec"]["containers"][0]["ports"]
    assert endpoint["port"] in {port["name"] for port in ports}


def test_every_key_of_the_secret_is_described() -> None:
    used = set(
        re.findall(r"key: ([a-z-]+)", "".join(text(name, everything_on()) for name in TEMPLATES))
    )
    assert used == SECRETS.keys()
    described = (CHART / "values.yaml").read_text().partition("secretName:")[0]
    for key in used:
        assert key in described


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
    triggers = scaled["spec"]["triggers"]
    told = {family.name for family in Now([], [], 0, busy_workers=0).collect()}
    asked = [re.findall(r"neural_mri_\w+", each["metadata"]["query"]) for each in triggers]
    assert [name for (name,) in asked if name in told] == [
        "neural_mri_jobs_oldest_wait_seconds",
        "neural_mri_workers_busy",
    ]
    assert [each["metadata"]["threshold"] for each in triggers] == ["30", "1"]
    behaviour = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    assert behaviour["scaleDown"]["stabilizationWindowSeconds"] == 600
    assert scaled["spec"]["scaleTargetRef"]["name"] in {name for name, _ in pods()}


def test_the_chart_and_its_images_bear_the_versions_of_the_service() -> None:
    chart = yaml.safe_load(Path(CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    for part in ("api", "worker"):
        assert values()[part]["image"].endswith(f":{__version__}")
