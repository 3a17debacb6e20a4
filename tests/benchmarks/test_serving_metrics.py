"""Serving metrics, compared with values computed by hand."""

import pytest

from benchmarks.completion_client import Completion
from benchmarks.completion_stream import Usage
from benchmarks.serving_load import LoadPoint
from benchmarks.serving_metrics import Latency, ServingMetrics

POINT = LoadPoint(concurrency=2, request_rate=None, num_prompts=5)
# three tokens in three events; five tokens in two events
COMPLETIONS = [
    Completion(10.0, (10.5, 10.6, 10.8), Usage(4, 3, cached_tokens=0)),
    Completion(20.0, (21.0, 21.5), Usage(6, 5, cached_tokens=1)),
]


def test_counts_rates_and_latencies_match_values_computed_by_hand():
    metrics = ServingMetrics(POINT, 4.0, COMPLETIONS, {"HTTP 500: x": 2, "late": 1}, 0.5)
    assert metrics.as_json() == {
        "max_concurrency": 2,
        "request_rate": None,
        "duration": 4.0,
        "completed": 2,
        "failed": 3,
        "total_input_tokens": 10,
        "total_output_tokens": 8,
        "request_throughput": 0.5,
        "output_throughput": 2.0,
        "total_token_throughput": 4.5,
        "mean_ttft_ms": pytest.approx(750),
        "median_ttft_ms": pytest.approx(750),
        "p99_ttft_ms": pytest.approx(995),
        # 0.3 s for two more tokens, 0.5 s for four
        "mean_tpot_ms": pytest.approx(137.5),
        "median_tpot_ms": pytest.approx(137.5),
        "p99_tpot_ms": pytest.approx(149.75),
        "mean_itl_ms": pytest.approx(800 / 3),
        "median_itl_ms": pytest.approx(200),
        "p99_itl_ms": pytest.approx(494),
        "mean_e2el_ms": pytest.approx(1150),
        "median_e2el_ms": pytest.approx(1150),
        "p99_e2el_ms": pytest.approx(1493),
        "cached_prompt_tokens": 1,
        "client_cpu_s": 0.5,
        "failures": {"HTTP 500: x": 2, "late": 1},
    }


def test_the_report_has_the_labels_of_vllms_client_and_the_reasons():
    lines = ServingMetrics(POINT, 4.0, COMPLETIONS, {"late": 1, "HTTP 500: x": 2}, 0.5).describe()
    for line in (
        "Successful requests:                     2",
        "Failed requests:                         3",
        "Benchmark duration (s):                  4.00",
        "Output token throughput (tok/s):         2.00",
        "Mean TTFT (ms):                          750.00",
        "P99 TPOT (ms):                           149.75",
        "Input tokens not computed (cached):      1",
    ):
        assert line in lines.splitlines()
    assert lines.splitlines()[-2:] == ["failed 2 times: HTTP 500: x", "failed 1 times: late"]


def test_one_token_has_no_time_per_output_token():
    one = Completion(1.0, (1.25,), Usage(4, 1, 0))
    latencies = ServingMetrics(POINT, 1.0, [one], {}, 0.0).latencies()
    assert latencies["ttft"] == latencies["e2el"] == Latency(250, 250, 250)
    assert latencies["tpot"] is None and latencies["itl"] is None


def test_a_point_without_responses_has_no_latencies():
    metrics = ServingMetrics(POINT, 1.0, [], {"late": 5}, 0.0)
    assert metrics.as_json()["mean_ttft_ms"] is None
    assert "Mean TTFT (ms):                          -" in metrics.describe().splitlines()
