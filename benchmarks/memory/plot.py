"""Plots tokens per second over table rows, one line per tier, cache, dtype and skew."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Plot one panel per batch size and per prompt length."""
    from matplotlib.figure import Figure

    workloads = sorted({(result["prompt_len"], result["batch"]) for result in results})
    figure = Figure(figsize=(6, 3.5 * len(workloads)), layout="constrained")
    panels = figure.subplots(len(workloads), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (prompt_len, batch) in zip(panels, workloads, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for result in results:
            if (result["prompt_len"], result["batch"]) == (prompt_len, batch):
                name = f"{result['tier']}, {result['dtype']}, {result['skew']}"
                if result["cache_share"] is not None:
                    name += f", {result['cache_share']:.3g} cached"
                lines.setdefault(name, []).append((result["rows"], result["tokens_per_s"]))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        axes.set_title(f"prefill of {prompt_len}" if prompt_len else f"decode, batch {batch}")
        axes.set_ylabel("tokens per second")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[-1].set_xlabel("rows of the table")
    figure.savefig(file, dpi=150)
