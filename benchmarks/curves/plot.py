"""Plots scores over table size; models without a table are horizontal lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.curves.results import TrainedContestant


def plot(results: Sequence[TrainedContestant], panels: Mapping[str, str], file: Path) -> None:
    """Plot means and ranges over seeds, one panel per score.

    ``panels`` has the axis label of each score, by its name in the results.
    """
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]

    def draw(axes: Axes, score: str) -> None:
        tables = sorted({(one.kind, one.rows) for one in results if one.rows})
        for kind in dict.fromkeys(kind for kind, _ in tables):
            sizes = [rows for own, rows in tables if own == kind]
            found = [
                [getattr(one, score) for one in results if (one.kind, one.rows) == (kind, rows)]
                for rows in sizes
            ]
            middle = [mean(values) for values in found]
            below = [at - min(values) for at, values in zip(middle, found, strict=True)]
            above = [max(values) - at for at, values in zip(middle, found, strict=True)]
            axes.errorbar(sizes, middle, yerr=(below, above), marker="o", capsize=3, label=kind)
        for index, name in enumerate(dict.fromkeys(one.name for one in results if not one.rows)):
            values = [getattr(one, score) for one in results if one.name == name]
            color = f"C{index + 4}"
            axes.axhline(mean(values), linestyle="--", color=color, label=name)
            axes.axhspan(min(values), max(values), color=color, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)

    for axes, (score, label) in zip(all_axes, panels.items(), strict=True):
        draw(axes, score)
        axes.set_ylabel(label)
    all_axes[-1].set_xlabel("rows of the table")
    all_axes[0].legend()
    figure.savefig(file)
