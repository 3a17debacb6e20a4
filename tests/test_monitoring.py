"""The dashboard and the alerts query only metrics that the server has."""

import json
import re
from pathlib import Path

import pytest

from server.http.metrics import Metrics
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
