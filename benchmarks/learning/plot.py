"""Plots what was learned against what was forgotten."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.learning.results import RATE_SEED, LearningResult


def plot(results: Sequence[LearningResult], file: Path) -> None:
    """One panel per replayed share: small points are runs, large ones means of reported draws."""
    from matplotlib.figure import Figure

    task = results[0].task
    shares = list(dict.fromkeys(one.replay_share for one in results))
    names = list(dict.fromkeys(one.contestant for one in results))
    figure = Figure(figsize=(5 * len(shares), 4.5), layout="constrained")
    panels = figure.subplots(1, len(shares), squeeze=False)[0]
    for panel, share in zip(panels, shares, strict=True):
        for index, name in enumerate(names):
            runs = [
                one
                for one in results
                if (one.task, one.contestant, one.replay_share) == (task, name, share)
            ]
            if not runs:
                continue
            color = f"C{index}"
            panel.scatter([_lost(one) for one in runs], [_recall(one) for one in runs], 12, color)
            best = [one for one in runs if one.seed < RATE_SEED]
            if best:
                middle = mean(map(_lost, best)), mean(map(_recall, best))
                panel.scatter(*middle, 90, color, marker="D", edgecolors="black", label=name)
        panel.set_title(f"{share:.0%} of a step's tokens replayed" if share else "without replay")
        panel.set_xlabel("answers known before, not replayed, that were lost, %")
        panel.set_xscale("symlog", linthresh=1)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"learned of the facts ({task}), %")
    panels[0].legend(loc="lower right")
    figure.savefig(file)


def _lost(result: LearningResult) -> float:
    return 100 * result.lost_held_out


def _recall(result: LearningResult) -> float:
    return 100 * result.recall
