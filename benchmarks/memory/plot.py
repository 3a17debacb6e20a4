"""Tokens a second over the rows of a table, a line for each tier, dtype and skew."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw a panel for each batch, and each length of prompts."""
    from matplotlib.figure import Figure

    works = sorted({(result["prompt_len"], result["batch"]) for result in results})
    figure = Figure(figsize=(6, 3.5 * len(works)), layout="constrained")
    panels = figure.subplots(len(works), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (prompt_len, batch) in zip(panels, works, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for result in results:
            if (result["prompt_len"], result["batch"]) == (prompt_len, batch):
                name = f"{result['tier']}, {result['dtype']}, {result['skew']}"
                lines.setdefault(name, []).append((result["rows"], result["tokens_per_s"]))
        for name, places in lines.items():
            axes.plot(*zip(*sorted(places), strict=True), marker="o", label=name)
        axes.set_title(f"a prompt of {prompt_len}" if prompt_len else f"{batch} at a time")
        axes.set_ylabel("tokens a second")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    panels[-1].set_xlabel("rows of the table")
    figure.savefig(file, dpi=150)
