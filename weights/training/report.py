"""Report of a finished run: loss curves, and a model card with settings and results."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.model.flops import total_flops
from weights.checkpoints.summary import describe, summarize
from weights.errors import TrainingError
from weights.training.run_folder import saved_states
from weights.training.run_log import RunLog
from weights.training.settings_toml import settings_toml
from weights.training.train_config import TrainConfig

_CARD, _CURVES = "card.md", "curves.png"
_SMOOTHED = 100  # points of the loss curve

Records = Sequence[Mapping[str, Any]]


def describe_flops(flops: Mapping[str, int], tokens_per_step: int) -> str:
    """Compute cost as text; a backward pass counts as two forward passes."""
    forward = total_flops(flops)
    parts = ", ".join(
        f"{part.replace('_', '-')} {count / 1e6:.3g}" for part, count in flops.items()
    )
    step = 3 * forward * tokens_per_step / 1e9
    return (
        f"{forward / 1e6:.4g} MFLOP per token forward ({parts}), {step:.4g} GFLOP per training step"
    )


def write_report(folder: Path, config: TrainConfig, flops: Mapping[str, int]) -> list[Path]:
    """Write the card, and the curves if matplotlib is installed; return the files written.

    Raises:
        TrainingError: the log has no steps or no evaluations, or a file cannot be written.
    """
    records = RunLog(folder / "log.jsonl").records()
    if {"step", "evaluation"} - {record["kind"] for record in records}:
        raise TrainingError(
            f"{folder}: log.jsonl has no steps or no evaluations; finish the run first"
        )
    has_curves = importlib.util.find_spec("matplotlib") is not None
    try:
        if has_curves:
            _draw(records, folder / _CURVES)
        text = _card(folder, config, flops, records, has_curves)
        (folder / _CARD).write_text(text, encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{folder}: {error.filename}: {error.strerror}") from None
    return [folder / _CARD, *([folder / _CURVES] if has_curves else [])]


def remove_report(folder: Path) -> None:
    """Remove the report of a run that goes on, because it would describe another checkpoint."""
    for name in (_CARD, _CURVES):
        (folder / name).unlink(missing_ok=True)


def _card(
    folder: Path,
    config: TrainConfig,
    flops: Mapping[str, int],
    records: Records,
    has_curves: bool,
) -> str:
    last = saved_states(folder / "checkpoints")[-1]
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    tokens = config.run.steps * config.run.tokens_per_step
    tail = steps[-_SMOOTHED:]
    mean = sum(record["loss"] for record in tail) / len(tail)
    found = {key: value for key, value in evaluations[-1].items() if key not in ("kind", "step")}
    lines = [
        f"# {folder.name}",
        "",
        f"Trained by memplus in {config.run.steps:,} steps, {tokens:,} tokens. The mean loss of the"
        f" last {len(tail)} steps is {mean:.4f} nats per token.",
        "",
        f"    memplus serve --model {folder}",
        "",
        f"serves the newest checkpoint: `{last.relative_to(folder)}` when this card was written.",
        "",
        *(_indented(describe(summarize(last)))),
        f"    compute       {describe_flops(flops, config.run.tokens_per_step)}",
        "",
        "Last evaluation: held-out documents, if any, and table usage since the previous one.",
        "",
        *(f"    {key:<24} {value:.6g}" for key, value in found.items()),
        "",
        *(["![curves](curves.png)", ""] if has_curves else []),
        "## Settings",
        "",
        "As a file for `memplus train`:",
        "",
        "```toml",
        *settings_toml(config),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]


def _draw(records: Records, file: Path) -> None:
    from matplotlib.figure import Figure

    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    usage = [key for key in evaluations[-1] if key.endswith((" share", " entropy"))]
    figure = Figure(figsize=(7, 9 if usage else 7), layout="constrained")
    loss, norm, *others = figure.subplots(3 if usage else 2, 1, sharex=True)
    parts = [steps[i : i + max(1, len(steps) // _SMOOTHED)] for i in _starts(len(steps))]
    at = [part[-1]["step"] for part in parts]
    for axes, key in ((loss, "loss"), (norm, "grad_norm")):
        axes.plot(at, [sum(one[key] for one in part) / len(part) for part in parts], label=key)
    if "loss" in evaluations[-1]:
        held_out = [record["loss"] for record in evaluations]
        loss.plot([record["step"] for record in evaluations], held_out, label="held out")
    loss.set_ylabel("nats per token")
    norm.set_ylabel("gradient norm")
    for axes in others:
        for key in usage:
            heights = [record[key] for record in evaluations]
            axes.plot([record["step"] for record in evaluations], heights, label=key)
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("table usage")
    for axes in (loss, norm, *others):
        axes.grid(alpha=0.3)
        axes.legend()
    (others or [norm])[-1].set_xlabel("step")
    figure.savefig(file)


def _starts(count: int) -> range:
    return range(0, count, max(1, count // _SMOOTHED))
