"""Plots recall and perplexity over table size."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.facts.results import Result


def plot(results: Sequence[Result], file: Path) -> None:
    """Plot means and ranges over seeds; models without a table are horizontal lines."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 8), layout="constrained")
    recall, perplexity = figure.subplots(2, 1, sharex=True)

    def draw(axes: Axes, value: Callable[[Result], float]) -> None:
        tables = sorted({(one.kind, one.rows) for one in results if one.rows})
        for kind in dict.fromkeys(kind for kind, _ in tables):
            sizes = [rows for own, rows in tables if own == kind]
            found = [
                [value(one) for one in results if (one.kind, one.rows) == (kind, rows)]
                for rows in sizes
            ]
            middle = [mean(values) for values in found]
            below = [at - min(values) for at, values in zip(middle, found, strict=True)]
            above = [max(values) - at for at, values in zip(middle, found, strict=True)]
            axes.errorbar(sizes, middle, yerr=(below, above), marker="o", capsize=3, label=kind)
        for index, name in enumerate(dict.fromkeys(one.name for one in results if not one.rows)):
            values = [value(one) for one in results if one.name == name]
            color = f"C{index + 4}"
            axes.axhline(mean(values), linestyle="--", color=color, label=name)
            axes.axhspan(min(values), max(values), color=color, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)

    draw(recall, lambda one: one.recall)
    draw(perplexity, lambda one: one.perplexity)
    recall.set_ylabel("fraction of questions answered correctly")
    perplexity.set_ylabel("perplexity of new texts of the facts")
    perplexity.set_xlabel("rows of the table")
    recall.legend()
    figure.savefig(file)
