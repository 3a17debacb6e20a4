"""Value tables in /metrics and in the activity log, by table, tier and layer."""

import asyncio
import re
import subprocess
import sys

import pytest

from engine.request import EngineStatistics, TableCounts
from memory_ops.native import disk_rows
from memory_ops.tables.table_statistics import TableStatistics
from server.http.activity_log import ActivityLog
from server.http.metrics import Metrics
from tests.server.running import running

NAMES = (
    *("requested_rows", "unique_rows", "hits", "misses", "late", "bytes_read"),
    *("prefetched", "prefetched_used", "stall_seconds"),
)


def values(text: str) -> dict[str, dict[tuple[str, str, str], float]]:
    """Table counters: name -> (table, tier, layer) -> value."""
    line = re.compile(
        r'memplus:table_(\w+)_total\{layer="(\w+)",model_name="[\w-]+",table="([\w.]+)",'
        r'tier="(\w+)"\} (\S+)'
    )
    found: dict[str, dict[tuple[str, str, str], float]] = {}
    for name, layer, table, tier, value in line.findall(text):
        found.setdefault(name, {})[table, tier, layer] = float(value)
    return found


def test_a_completion_is_counted_by_layer(memory_server):
    before = values(memory_server.http.get("/metrics").text)
    assert memory_server.complete(prompt="hello", max_tokens=4, ignore_eos=True).is_success
    found = values(memory_server.http.get("/metrics").text)
    assert found.keys() == set(NAMES)
    for layer in ("1", "3"):
        labels = ("memory.table", "device", layer)
        # 5 prompt tokens and 3 generated ones, 2 heads x 3 rows
        gained = found["requested_rows"][labels]
        gained -= before.get("requested_rows", {}).get(labels, 0)
        # 54 if one warm-up token ran before the first request
        assert gained in (48, 54)
    assert len(found["requested_rows"]) == 2


@pytest.mark.skipif(not disk_rows.is_available(), reason="built without a compiler")
def test_the_disk_tier_exports_its_counters(memory_plus_folder):
    options = ("--table-tier", "disk", "--table-cache", "2KiB")
    with running(memory_plus_folder, *options) as server:
        assert server.complete(prompt="hello", max_tokens=20, ignore_eos=True).is_success
        found = values(server.http.get("/metrics").text)
    assert found.keys() == set(NAMES)
    for labels in (("memory.table", "disk", "1"), ("memory.table", "disk", "3")):
        counted = {name: found[name][labels] for name in NAMES}
        assert counted["hits"] + counted["misses"] + counted["late"] == counted["unique_rows"] > 0
        assert counted["requested_rows"] >= counted["unique_rows"]
    assert sum(found["bytes_read"].values()) > 0 and sum(found["stall_seconds"].values()) > 0


def counts(layer: int, requested: int, **others) -> TableCounts:
    totals = TableStatistics(requested_rows=requested, **others)
    return TableCounts("memory.table", "disk", layer, totals)


def test_the_http_process_does_not_import_torch():
    modules = "server.http.app, server.http.metrics, server.serve"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_counters_continue_over_omitted_reports_and_engine_restarts():
    metrics = Metrics("mock")

    def observe(*tables):
        metrics.observe_step(EngineStatistics(tables=tables))
        counted = values(metrics.render().decode())
        return [counted["requested_rows"].get(("memory.table", "disk", layer)) for layer in "12"]

    assert observe(counts(1, 10), counts(2, 5)) == [10, 5]
    metrics.observe_step(EngineStatistics(tables=None))
    assert observe(counts(1, 12), counts(2, 5)) == [12, 5]
    metrics.observe_step(EngineStatistics())  # reported when an engine has ended
    # the counts of its successor are above or below the old ones
    assert observe(counts(1, 100), counts(2, 1)) == [112, 6]
    assert observe(counts(1, 101), counts(2, 2)) == [113, 7]
    # if one total fell, all totals of that table and layer restarted
    assert observe(counts(1, 200, hits=7), counts(2, 3)) == [212, 8]
    assert observe(counts(1, 250, hits=1), counts(2, 4)) == [462, 9]


def test_drafts_have_vllm_s_names():
    metrics = Metrics("m")
    metrics.observe_step(EngineStatistics(drafts=2, draft_tokens=9, accepted_tokens=5))
    metrics.observe_step(EngineStatistics(drafts=3, draft_tokens=10, accepted_tokens=6))
    lines = metrics.render().decode().splitlines()
    for name, value in (("drafts", 3), ("draft_tokens", 10), ("accepted_tokens", 6)):
        assert f'memplus:spec_decode_num_{name}_total{{model_name="m"}} {value}.0' in lines


@pytest.fixture
def log():
    """(activity log, its lines, its clock)."""
    lines, now = [], [50.0]
    log = ActivityLog(lines.append, lambda: now[0])
    return log, lines, now


def test_a_line_covers_the_time_since_the_last_line(log):
    log, lines, now = log
    step = EngineStatistics(3, 1, 5, 20, step_tokens=100, new_tokens=3)
    log.observe_step(step)
    log.observe_step(step)
    now[0] += 10
    log.report()
    assert lines == [
        "3 running, 1 waiting, 25.0% of KV blocks used; tokens/s: 20.0 computed, 0.6 generated"
    ]
    # no step finished since the last line
    now[0] += 10
    log.report()
    assert lines[1].endswith("tokens/s: 0.0 computed, 0.0 generated")
    log.observe_step(EngineStatistics(step_tokens=50))
    now[0] += 5
    log.report()
    assert lines[2].startswith("0 running") and " 10.0 computed" in lines[2]


def test_an_idle_engine_logs_nothing(log):
    log, lines, now = log
    log.report()
    log.observe_step(EngineStatistics())
    now[0] += 10
    log.report()
    assert lines == []


def test_a_line_has_the_hit_rate_and_the_stalls_of_tables_that_fetch(log):
    log, lines, now = log
    first = (counts(1, 90, unique_rows=50, hits=40), counts(2, 90, unique_rows=50, hits=30))
    log.observe_step(EngineStatistics(step_tokens=1, tables=first))
    now[0] += 10
    log.report()
    assert lines[0].endswith("; table rows: 70.0% cache hits, 0.0% of the time stalled")
    second = (
        counts(1, 100, unique_rows=60, hits=49, stall_seconds=0.5),
        counts(2, 100, unique_rows=60, hits=40, stall_seconds=1.0),
    )
    log.observe_step(EngineStatistics(step_tokens=1, tables=second))
    now[0] += 10
    log.report()
    assert lines[1].endswith("; table rows: 95.0% cache hits, 15.0% of the time stalled")
    log.observe_step(EngineStatistics(step_tokens=1, tables=None))
    log.report()
    assert "table rows" not in lines[2]
    # a stall that began before the last line
    third = (counts(1, 110, unique_rows=70, hits=49, stall_seconds=9.0), second[1])
    log.observe_step(EngineStatistics(step_tokens=1, tables=third))
    now[0] += 2
    log.report()
    assert lines[3].endswith("; table rows: 0.0% cache hits, 100.0% of the time stalled")


def test_a_failing_write_does_not_end_the_log(caplog):
    lines = []

    def say(line):
        lines.append(line)
        raise BrokenPipeError("nobody reads")

    log = ActivityLog(say)
    log.observe_step(EngineStatistics(num_running=1))

    async def scenario():
        task = asyncio.ensure_future(log.run(0))
        while len(lines) < 3 and not task.done():
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(scenario())
    assert len(lines) == 3 and "nobody reads" in caplog.text


@pytest.mark.slow
def test_the_server_logs_lines_while_it_works(slow_folder):
    with running(slow_folder, "--log-interval-s", "1") as server:
        body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # a reference, since dropping it would close the stream
            next(lines)
            logged = next(line for line in server.process.stderr if " running, " in line)
    assert re.match(r"1 running, 0 waiting, [\d.]+% of KV blocks used; tokens/s: ", logged)
