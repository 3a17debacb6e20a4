"""The runbook names every alert and metric, and every warning and error that a server logs."""

import ast
import re
from pathlib import Path

import pytest

from server.http.metrics import Metrics
from tests.docs.pages import DOCS, ROOT
from tests.test_house import FILES, name, tree

PAGE = re.sub(r"^```.*?^```", "", (DOCS / "operations.md").read_text(), flags=re.DOTALL | re.M)
RUNBOOK = " ".join(PAGE.split())
# commands write these; a server does not
OTHERS = ("server/cli/", "weights/training/", "weights/patches/apply.py", "benchmarks/")
# the runbook may leave out the end of a line
DESCRIBED = tuple(code.rstrip(" .") for code in re.findall(r"`([^`]+)`", RUNBOOK) if len(code) > 9)
LEVELS = ("warning", "error", "exception", "critical", "log")


def lines_of(path: Path) -> list[str]:
    """The messages that a file logs as warnings or errors, with ``...`` for values."""
    found = []
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("logger."):
            continue
        level = ast.unparse(node.func).removeprefix("logger.")
        if level in LEVELS:
            message = node.args[1 if level == "log" else 0]
            assert isinstance(message, ast.Constant), f"{name(path)}: log a plain text"
            found.append(re.sub(r"(%[-+.\d]*[a-z])+", "...", message.value))
    return found


LOGGED = {
    name(path): lines
    for path in FILES
    if not name(path).startswith(OTHERS) and (lines := lines_of(path))
}


@pytest.mark.parametrize("path", LOGGED)
def test_every_warning_and_error_is_in_the_runbook(path):
    missing = [line for line in LOGGED[path] if not line.startswith(DESCRIBED)]
    assert not missing, "describe it in docs/operations.md"


def test_every_metric_is_in_the_runbook():
    text = Metrics("m").render().decode()
    exported = set(re.findall(r"^# TYPE memplus:(\w+?)(?:_created)? ", text, re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", RUNBOOK))
    # the creation time of a counter has the counter's name without its end
    missing = {one for one in exported if not {one, f"{one}_total"} & named}
    assert len(exported) > 30 and not missing


def test_every_alert_has_a_heading():
    rules = (ROOT / "docker" / "monitoring" / "alerts.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert alerts and all(f"### {alert} " in RUNBOOK for alert in alerts)
