"""``memplus bench serving``: loads an OpenAI-compatible server and measures its responses."""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvloop
from tqdm import tqdm

from benchmarks.completion_client import CompletionClient
from benchmarks.load_run import LoadRun
from benchmarks.serving_load import LoadPoint, ServingLoad
from benchmarks.serving_metrics import ServingMetrics
from benchmarks.serving_plot import check_plot, plot
from engine.errors import ConfigError


def measure(load: ServingLoad, json_file: Path | None, plot_file: Path | None) -> None:
    """Print the metrics of each point of the sweep; write all of them as JSON and as a plot.

    Raises:
        ConfigError: all warm-up requests failed, the URL is invalid, or a file cannot be written.
    """
    if plot_file is not None:
        check_plot(plot_file)
    if load.seed is None:
        load = replace(load, seed=secrets.randbits(32))
    shapes = f"{load.input_len} tokens in, {load.output_len} out"
    print(f"{load.model} at {load.base_url}, {shapes}, seed {load.seed}")
    # uvloop halves the client's CPU time
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        results = runner.run(_sweep(load, json_file))
    if len(results) > 1:
        print(_table(results))
    if plot_file is not None:
        plot(results, f"{load.model}, {shapes}", plot_file)


async def _sweep(load: ServingLoad, json_file: Path | None) -> list[ServingMetrics]:
    client = CompletionClient(load.base_url, load.timeout_s)
    results: list[ServingMetrics] = []
    try:
        for index, point in enumerate(load.points):
            results.append(await _measure_point(client, load, point, index))
            print(results[-1].describe(), flush=True)
            if json_file is not None:
                settings = {
                    "model": load.model,
                    "input_len": load.input_len,
                    "output_len": load.output_len,
                    "seed": load.seed,
                }
                rows = [settings | result.as_json() for result in results]
                json_file.write_text(json.dumps(rows, indent=1) + "\n")
    finally:
        client.close()
    return results


async def _measure_point(
    client: CompletionClient, load: ServingLoad, point: LoadPoint, index: int
) -> ServingMetrics:
    rng = load.rng(f"{point.name}, point {index}")
    if load.warm_up:
        warm_up = LoadRun(client, load, lambda: None)
        await warm_up.send_concurrently(load.bodies(rng, load.warm_up), load.warm_up)
        if not warm_up.completions:
            raise ConfigError(f"{load.base_url}: {warm_up.failures.most_common(1)[0][0]}")
    bodies = load.bodies(rng, point.num_prompts)
    with tqdm(total=len(bodies), desc=point.name, unit="req", leave=False, disable=None) as bar:
        run = LoadRun(client, load, bar.update)
        cpu_before, before = time.process_time(), time.perf_counter()
        if point.request_rate is not None:
            await run.send_at_rate(bodies, point.request_rate, rng)
        else:
            assert point.concurrency is not None
            await run.send_concurrently(bodies, point.concurrency)
        seconds = time.perf_counter() - before
        cpu_seconds = time.process_time() - cpu_before
    return ServingMetrics(point, seconds, run.completions, run.failures, cpu_seconds)


def _table(results: Sequence[ServingMetrics]) -> str:
    head = f"{'':<28}{'output tok/s':>13}{'TTFT p50':>10}{'p99 ms':>9}{'TPOT p50':>10}{'p99 ms':>9}"
    lines = [f"{head}{'failed':>8}"]
    for result in results:
        line = f"{result.point.name:<28}{result.output_throughput:>13.1f}"
        latencies = result.latencies()
        for name, width in (("ttft", 10), ("tpot", 10)):
            latency = latencies[name]
            if latency is None:
                line += f"{'-':>{width}}{'-':>9}"
            else:
                line += f"{latency.median:>{width}.1f}{latency.p99:>9.1f}"
        lines.append(f"{line}{result.failed:>8}")
    return "\n".join(lines)
