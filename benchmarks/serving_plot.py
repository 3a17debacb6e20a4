"""Plots a serving sweep: throughput and latencies over the load."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.serving_metrics import ServingMetrics
from engine.errors import ConfigError

_FORMATS = (".png", ".svg", ".pdf")
# plotted latencies and their axis labels
_LATENCIES = {"ttft": "time to first token, ms", "tpot": "time per output token, ms"}


def check_plot(file: Path) -> None:
    """Check before a benchmark runs that its plot can be drawn in this file's format.

    Raises:
        ConfigError: matplotlib is missing, or the format is not known.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plot: needs matplotlib; install it with `pip install 'memplus[bench]'`")
    if file.suffix not in _FORMATS:
        raise ConfigError(f"plot: {file} must end in one of {', '.join(_FORMATS)}")


def plot(results: Sequence[ServingMetrics], title: str, file: Path) -> None:
    """Plot points of concurrencies or of rates, not both; points may lack latencies."""
    from matplotlib.figure import Figure

    is_rate = results[0].point.request_rate is not None
    loads = [result.point.request_rate or result.point.concurrency or 0 for result in results]
    latencies = [result.latencies() for result in results]
    figure = Figure(figsize=(6, 9), layout="constrained")
    figure.suptitle(title)
    throughput, *others = figure.subplots(1 + len(_LATENCIES), 1, sharex=True)
    throughput.plot(loads, [result.output_throughput for result in results], marker="o")
    throughput.set_ylabel("output tokens per second")
    for axes, (name, label) in zip(others, _LATENCIES.items(), strict=True):
        for part in ("median", "p99"):
            heights = [getattr(found[name], part, float("nan")) for found in latencies]
            axes.plot(loads, heights, marker="o", label=part)
        axes.set_ylabel(label)
        axes.legend()
    for axes in (throughput, *others):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
    others[-1].set_xlabel("requests per second" if is_rate else "concurrent requests")
    figure.savefig(file)
