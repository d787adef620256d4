"""Dashboard and rules name metrics and labels that a server has, and the rules do as their tests say."""

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.metrics import exercised, labels_by_name

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/hotswap.json").read_text())
_GROUPS = yaml.safe_load((FOLDER / "hotswap.rules.yml").read_text())["groups"]
RULES = [rule for group in _GROUPS for rule in group["rules"]]
SCRAPED = {"instance", "job"}

promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def panels() -> list[dict]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for rule in RULES:
        yield rule.get("alert") or rule["record"], rule["expr"]


@functools.cache
def known() -> dict[str, frozenset[str]]:
    """Labels of every series by its name, those of histograms and recorded ones included."""
    found = {}
    for name, (kind, labels) in labels_by_name(exercised()).items():
        if kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    for rule in RULES:
        if record := rule.get("record"):
            found[record] = frozenset(record.partition(":")[0].split("_")) - {"instance"}
    return {name: labels | SCRAPED for name, labels in found.items()} | {"up": frozenset(SCRAPED)}


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_metric_exists_with_these_labels(where, expression):
    series = known()
    bare = re.sub(r'"[^"]*"', '""', expression)
    used: set[str] = set()
    names = re.findall(r"\b(?:\w+:)?hotswap_\w+(?::\w+)?|\bup\b", bare)
    assert names, where
    for name in names:
        assert name in series, f"{where}: no metric is called {name}"
        used |= series[name]
    for name, matchers in re.findall(r"\b((?:\w+:)?hotswap_\w+(?::\w+)?|up)\{([^}]*)\}", bare):
        for label in re.findall(r"(\w+)\s*[=!]", matchers):
            assert label in series[name], f"{where}: {name} has no label {label}"
    for grouped in re.findall(r"\b(?:by|on|ignoring) \(([^)]*)\)", bare):
        for label in re.findall(r"\w+", grouped):
            assert label in used, f"{where}: nothing has the label {label}"


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_legends_name_labels_that_the_series_have(panel):
    series = known()
    for target in panel["targets"]:
        grouped = re.search(r"\bby \(([^)]*)\)", target["expr"])
        [*names] = re.findall(r"hotswap_\w+", target["expr"])
        given = set(re.findall(r"\w+", grouped[1])) if grouped else series[names[0]]
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= given, target["expr"]


def test_the_dashboard_fits_together():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"])
    source = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    [variable] = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "datasource"]
    assert variable["current"]["value"] == source["datasources"][0]["uid"]


def test_every_metric_of_the_server_is_shown_or_is_left_out_on_purpose():
    text = "\n".join(expression for _, expression in expressions())
    unseen = {name for name in labels_by_name(exercised()) if not re.search(rf"\b{name}", text)}
    assert unseen == {
        "hotswap_adapter_merge_seconds",
        "hotswap_adapters_resident",
        "hotswap_adapters_underway",
        "hotswap_host_cache_adapters",
        "hotswap_host_cache_bytes",
        "hotswap_tenant_requests_total",
        "hotswap_tenant_requests_running",
        "hotswap_tenant_requests_waiting",
        "hotswap_tenant_tokens_total",
    }


def test_every_alert_says_what_it_is_and_what_to_do():
    for rule in RULES:
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("info", "warning", "critical")
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["description"].endswith(".")


def test_every_alert_has_a_test():
    tested = {
        case["alertname"]
        for test in yaml.safe_load((FOLDER / "hotswap.rules.test.yml").read_text())["tests"]
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert tested == {rule["alert"] for rule in RULES if "alert" in rule}


def test_compose_mounts_files_that_exist():
    for service in yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (FOLDER / source).exists()


@promtool
def test_promtool_is_content():
    for arguments in (
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint-fatal", "hotswap.rules.yml"),
        ("test", "rules", "hotswap.rules.test.yml"),
    ):
        run = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
