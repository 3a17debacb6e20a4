"""The dashboard and the alerts query metrics that the server has, and Prometheus evaluates them."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server.http.metrics import Metrics
from tests.prometheus import prometheus, tool
from tests.server.running import Running
from tests.test_house import ROOT

MONITORING = ROOT / "docker" / "monitoring"
METRIC = re.compile(r"\bmemplus:[a-z0-9_]+")


def names() -> set[str]:
    """Names of all series that the server exports."""
    text = Metrics("m").render().decode()
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE):
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        found |= {name + end for end in ends}
    return found


@pytest.mark.parametrize("file", ["dashboard.json", "alerts.yml"])
def test_queries_name_metrics_that_exist(file):
    queried = set(METRIC.findall((MONITORING / file).read_text()))
    assert queried and not queried - names()


def test_panels_have_places_of_their_own():
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len({panel["id"] for panel in panels}) == len(panels)


def test_compose_mounts_files_that_exist():
    compose = (ROOT / "docker" / "compose.yaml").read_text()
    mounted = re.findall(r"- (\./[^:]+):", compose)
    assert len(mounted) == 5
    assert all((ROOT / "docker" / Path(path)).is_file() for path in mounted)


@pytest.mark.slow
def test_promtool_accepts_the_files_and_each_alert_fires_when_it_should(tmp_path):
    check = [tool("promtool"), "check", "config", str(MONITORING / "prometheus.yml")]
    checked = subprocess.run(check, capture_output=True, text=True)
    assert checked.returncode == 0 and "4 rules found" in checked.stdout, checked
    # (series, value each minute); a counter that grows by 60 a minute has the rate 1
    firing = {
        "MemplusDown": ('up{job="memplus"}', "0x30"),
        "MemplusRejectsRequests": (
            'memplus:admission_rejections_total{reason="queue_full"}',
            "0+60x30",
        ),
        "MemplusAnswersFail": (
            'memplus:request_success_total{finished_reason="error"}',
            "0+60x30",
        ),
        "MemplusWaitsForRows": ("memplus:table_stall_seconds_total", "0+40x30"),
    }
    tests = []
    for alert, (series, values) in firing.items():
        labels = {"job": "memplus"} if alert == "MemplusDown" else {}
        if alert == "MemplusRejectsRequests":
            labels = {"reason": "queue_full"}
        fires = {"exp_labels": labels, "exp_annotations": summary(alert, labels)}
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": values}],
                "alert_rule_test": [
                    {"eval_time": "20m", "alertname": one, "exp_alerts": [fires] * (one == alert)}
                    for one in firing
                ],
            }
        )
    file = tmp_path / "alerts_test.yml"
    rules = {"rule_files": [str(MONITORING / "alerts.yml")], "evaluation_interval": "1m"}
    file.write_text(yaml.safe_dump(rules | {"tests": tests}))
    tested = subprocess.run([tool("promtool"), "test", "rules", str(file)], capture_output=True)
    assert tested.returncode == 0, tested


def summary(alert: str, labels: dict[str, str]) -> dict[str, str]:
    """The annotations of an alert that fires with these labels."""
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    rule = next(one for group in groups for one in group["rules"] if one["alert"] == alert)
    text = rule["annotations"]["summary"]
    return {"summary": text.replace("{{ $labels.reason }}", labels.get("reason", ""))}


@pytest.mark.slow
def test_prometheus_scrapes_a_server_and_evaluates_rules_and_panels(memory_server, tmp_path):
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    host, port = memory_server.address
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"{host}:{port}"]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    assert memory_server.complete(prompt="memory", max_tokens=4).status_code == 200
    with prometheus(file, tmp_path / "data") as api:
        # a rate needs two samples
        until(lambda: results(api, "count_over_time(memplus:num_requests_running[1m]) > 1"))
        assert results(api, 'up{job="memplus"}')[0]["value"][1] == "1"
        assert scraped(api) == exported(memory_server)
        answers = results(api, "memplus:request_success_total")
        assert sum(float(one["value"][1]) for one in answers) >= 1
        rules = until(lambda: evaluated(api))
        assert {rule["name"] for rule in rules} >= {"MemplusDown", "MemplusWaitsForRows"}
        assert all(rule["health"] == "ok" and not rule.get("lastError") for rule in rules)
        assert all(rule["state"] == "inactive" for rule in rules)
        panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
        queries = [target["expr"] for panel in panels for target in panel["targets"]]
        assert queries and not [query for query in queries if not results(api, query)]


def until(found: Callable[[], Any]) -> Any:
    """The first result of ``found`` that is not empty, within 30 s."""
    deadline = time.monotonic() + 30
    while not (result := found()):
        assert time.monotonic() < deadline
    return result


def results(api: httpx.Client, query: str) -> list[dict[str, Any]]:
    """The series of an instant query."""
    answer = api.get("/query", params={"query": query}).json()
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


def scraped(api: httpx.Client) -> set[str]:
    """Names of all series of the job that Prometheus has stored."""
    answer = api.get("/label/__name__/values", params={"match[]": '{job="memplus"}'}).json()
    return {name for name in answer["data"] if name.startswith("memplus:")}


def exported(server: Running) -> set[str]:
    """Names of all series that a server exports."""
    lines = server.http.get("/metrics").text.splitlines()
    return {re.match(r"[\w:]+", line)[0] for line in lines if not line.startswith("#")}


def evaluated(api: httpx.Client) -> list[dict[str, Any]]:
    """All rules once Prometheus has evaluated each of them; empty before."""
    groups = api.get("/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return rules if rules and all(rule["health"] != "unknown" for rule in rules) else []
