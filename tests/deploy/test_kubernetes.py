"""deploy/kubernetes: the schemas take it, its parts fit together, and the servers take their settings."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hotswap_server.config import ServeSettings, load_settings
from support.metrics import exercised, labels_by_name

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
VERSIONS = ("1.32", kubernetes_validate.latest_version())
# What the servers need to close, after preStop and the longest drain.
CLOSING_S = 15


def documents(path: Path) -> list[dict[str, Any]]:
    return [content for content in yaml.safe_load_all(path.read_text()) if content is not None]


KUSTOMIZATION = yaml.safe_load((FOLDER / "base/kustomization.yaml").read_text())
MANIFESTS = [content for name in KUSTOMIZATION["resources"] for content in documents(FOLDER / "base" / name)]
[DEPLOYMENT] = [manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment"]
POD = DEPLOYMENT["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}


def kind(name: str) -> list[dict[str, Any]]:
    return [manifest for manifest in MANIFESTS if manifest["kind"] == name]


@pytest.fixture
def settings(monkeypatch) -> ServeSettings:
    """What a pod's arguments and its file come to."""
    for variable in ("HOTSWAP_SERVE_HOST", "HOTSWAP_SERVE_STORE"):  # as the image sets them
        monkeypatch.setenv(variable, "the image's")
    verb, *flags = CONTAINER["args"]
    assert verb == "serve"
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    config = Path(given.pop("config"))
    assert config.parent == Path(mounts()["config"])
    return load_settings(FOLDER / "base" / config.name, **given)


def mounts() -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "manifest", MANIFESTS, ids=lambda manifest: f"{manifest['kind']}-{manifest['metadata']['name']}"
)
def test_the_schemas_take_it(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(
    ("folder", "image", "cards"), [("base", "hotswap", None), ("gpu", "hotswap:cuda", "1")]
)
def test_kustomize_builds_what_the_schemas_take(folder, image, cards):
    run = subprocess.run(
        ["kubectl", "kustomize", FOLDER / folder], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    built = list(yaml.safe_load_all(run.stdout))
    for manifest in built:
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
    [deployment] = [manifest for manifest in built if manifest["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert (container["image"], container["resources"]["limits"].get("nvidia.com/gpu")) == (image, cards)
    [config] = [manifest for manifest in built if manifest["kind"] == "ConfigMap"]
    [volume] = [v for v in deployment["spec"]["template"]["spec"]["volumes"] if v["name"] == "config"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]


def test_every_file_is_used():
    named = {*KUSTOMIZATION["resources"], *KUSTOMIZATION["configMapGenerator"][0]["files"]}
    others = {"kustomization.yaml", "prometheus-adapter.yaml"}  # the latter is another chart's
    assert {path.name for path in (FOLDER / "base").iterdir()} == named | others


def test_a_pod_that_ends_outlasts_the_longest_generation(settings):
    assert settings.drain_timeout >= settings.max_timeout
    waits = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"] + settings.drain_timeout
    assert POD["terminationGracePeriodSeconds"] >= waits + CLOSING_S


def test_probes_ask_a_port_that_answers_without_tls(settings):
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert CONTAINER[name]["grpc"]["port"] == settings.health_port
    assert CONTAINER["readinessProbe"]["grpc"]["service"] == "hotswap.v1.InferenceService"
    patience = CONTAINER["livenessProbe"]["periodSeconds"] * CONTAINER["livenessProbe"]["failureThreshold"]
    assert patience > settings.step_timeout


def test_ports_and_addresses_are_those_of_the_server(settings):
    assert {
        "grpc": settings.port,
        "grpc-health": settings.health_port,
        "metrics": settings.metrics_port,
    } == PORTS
    assert (settings.host, settings.store.partition("://")[0]) == ("0.0.0.0", "s3")
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(settings.metrics_port)
    headless = [service for service in kind("Service") if service["spec"].get("clusterIP") == "None"]
    assert [service["metadata"]["name"] for service in headless] == ["hotswap-replicas"]
    for service in kind("Service"):
        for port in service["spec"]["ports"]:
            assert port["port"] == PORTS[port["targetPort"]]


def test_selectors_find_the_pods():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items()
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= labels
    for service in kind("Service"):
        assert service["spec"]["selector"].items() <= labels
    [budget] = kind("PodDisruptionBudget")
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    [scaler] = kind("HorizontalPodAutoscaler")
    assert scaler["spec"]["scaleTargetRef"] == {
        "apiVersion": DEPLOYMENT["apiVersion"],
        "kind": "Deployment",
        "name": DEPLOYMENT["metadata"]["name"],
    }
    assert "replicas" not in DEPLOYMENT["spec"]
    assert [account["metadata"]["name"] for account in kind("ServiceAccount")] == [POD["serviceAccountName"]]


def test_files_that_the_settings_name_are_mounted(settings):
    places = [Path(place) for place in mounts().values()]
    for path in (settings.tls_cert, settings.tls_key, settings.keys_file):
        assert any(place in path.parents for place in places)
    assert mounts().keys() == {volume["name"] for volume in POD["volumes"]}


def test_the_autoscaler_asks_for_metrics_that_servers_have(settings):
    known = labels_by_name(exercised())
    [scaler] = kind("HorizontalPodAutoscaler")
    metrics = {
        metric["pods"]["metric"]["name"]: metric["pods"]["target"] for metric in scaler["spec"]["metrics"]
    }
    for name in metrics:
        assert known[name] == ("gauge", frozenset()), name
    assert int(metrics["hotswap_requests_running"]["averageValue"]) < settings.max_batch_size
    [rule] = yaml.safe_load((FOLDER / "base/prometheus-adapter.yaml").read_text())["rules"]["custom"]
    [pattern] = re.findall(r'__name__=~"([^"]*)"', rule["seriesQuery"])
    assert {name for name in known if re.fullmatch(pattern, name)} == set(metrics)
