"""Trains every contestant of a curve from every seed, scores it, and plots; resumable."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from benchmarks.curves.contestants import Contestant
from benchmarks.curves.plot import plot
from benchmarks.curves.results import TrainedContestant
from benchmarks.curves.training import Training
from benchmarks.result_file import append_result, keep_settings, read_results
from benchmarks.serving_plot import check_plot
from engine.errors import ConfigError
from engine.model.flops import total_flops
from weights.checkpoints.summary import summarize
from weights.training.run_folder import has_run, saved_states
from weights.training.train_config import TrainConfig
from weights.training.trainer import StepReport, Trainer

Result = TypeVar("Result", bound=TrainedContestant)


class Curve(Protocol[Result]):
    """A benchmark of scores against table size.

    Attributes:
        contestants: the models to compare.
        seeds: runs per contestant.
        training: the training of every contestant.
        scale: everything that all results of a folder share, as JSON; kept in ``scale.json``.
        summary: one line about texts and steps.
        result: a trained contestant with its scores.
        panels: label of each plotted score, by its name in ``result``.
        plot_name: file name of the plot.
    """

    @property
    def contestants(self) -> Sequence[Contestant]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def training(self) -> Training: ...
    @property
    def scale(self) -> Mapping[str, Any]: ...
    @property
    def summary(self) -> str: ...
    @property
    def result(self) -> type[Result]: ...
    @property
    def panels(self) -> Mapping[str, str]: ...
    @property
    def plot_name(self) -> str: ...

    def write_texts(self, folder: Path) -> None:
        """Write the texts, the same ones at each call."""

    def score(self, trained: TrainedContestant, checkpoint: Path, texts: Path) -> Result:
        """Score a trained model."""

    def line(self, result: Result) -> str:
        """The scores of a result, as printed."""


def measure_curve(
    curve: Curve[Result], folder: Path, seeds: int | None, only: Sequence[str]
) -> None:
    """Train and score the contestants; skips runs that the folder's ``results.csv`` has.

    All contestants are trained from one seed before any is from the next.

    Raises:
        ConfigError: ``only`` names an unknown contestant, the folder has results of another scale,
            or matplotlib is missing.
        DataError, CheckpointError, TrainingError: as ``Trainer``.
    """
    if unknown := set(only) - {one.name for one in curve.contestants}:
        names = ", ".join(one.name for one in curve.contestants)
        raise ConfigError(f"only: {min(unknown)!r} is unknown; must be one of {names}")
    if seeds is not None and seeds < 1:
        raise ConfigError(f"seeds: must be at least 1, not {seeds}")
    results, picture = folder / "results.csv", folder / curve.plot_name
    folder.mkdir(parents=True, exist_ok=True)
    check_plot(picture)
    texts = _write_texts(curve, folder)
    print(curve.summary)
    for seed in range(seeds if seeds is not None else curve.seeds):
        for contestant in curve.contestants:
            done = {(result.name, result.seed) for result in read_results(results, curve.result)}
            if (not only or contestant.name in only) and (contestant.name, seed) not in done:
                run = folder / "runs" / f"{contestant.name.replace(' ', '-')}-{seed}"
                trained = _train(contestant, curve.training.config(contestant, seed, texts), run)
                result = curve.score(trained, saved_states(run / "checkpoints")[-1], texts)
                append_result(results, result)
                # keep the log; the checkpoints are large
                shutil.rmtree(run / "checkpoints")
                tqdm.write(_line(trained, curve.line(result)))
    plot(read_results(results, curve.result), curve.panels, picture)


def _write_texts(curve: Curve[Result], folder: Path) -> Path:
    """Write the texts if they do not exist; ConfigError if the folder has other settings."""
    texts, record = folder / "corpus", folder / "scale.json"
    if not record.exists():
        curve.write_texts(texts)
    keep_settings(record, curve.scale)
    return texts


def _train(contestant: Contestant, config: TrainConfig, run: Path) -> TrainedContestant:
    trainer = Trainer(config, run, resume=has_run(run))
    before = _earlier_seconds(run)
    started = time.monotonic()
    with tqdm(total=config.run.steps, initial=trainer.step, desc=run.name, leave=False) as bar:

        def show(report: StepReport) -> bool:
            bar.update()
            bar.set_postfix(loss=f"{report.loss:.3f}")
            return True

        try:
            trainer.run(show)
        finally:
            seconds = before + time.monotonic() - started
            (run / "seconds.json").write_text(json.dumps(seconds))
    return TrainedContestant(
        name=contestant.name,
        kind=contestant.kind,
        rows=contestant.num_rows,
        seed=config.run.seed,
        parameters=summarize(saved_states(run / "checkpoints")[-1]).dense.parameters,
        flops=total_flops(trainer.flops),
        scoring_flops=trainer.flops.get("scoring", 0),
        tokens=config.run.steps * config.run.tokens_per_step,
        seconds=seconds,
    )


def _earlier_seconds(run: Path) -> float:
    """Seconds that earlier, interrupted attempts of a run took."""
    file = run / "seconds.json"
    return float(json.loads(file.read_text())) if file.exists() else 0.0


def _line(trained: TrainedContestant, scores: str) -> str:
    return (
        f"{trained.name:<18} seed {trained.seed}  {trained.flops / 1e3:7.1f} kFLOP per token"
        f"  {scores}  {trained.seconds:.0f} s"
    )
