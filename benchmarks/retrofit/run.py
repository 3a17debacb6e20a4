"""``memplus bench retrofit``: trains every contestant on the same facts, and scores it."""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.memory_variant import can_have_memory
from benchmarks.result_file import append_result, keep_settings, read_results
from benchmarks.retrofit.contestants import BASE, Contestant, contestants
from benchmarks.retrofit.corpus import FACTS, QUESTIONS, GlossCorpus
from benchmarks.retrofit.results import RetrofitResult
from benchmarks.retrofit.scores import score_folder
from engine.errors import ConfigError
from engine.model.config import ModelConfig
from weights.checkpoints.checkpoint import open_checkpoint
from weights.checkpoints.config_json import read_config
from weights.checkpoints.weights_hash import weights_hash
from weights.training.run_folder import saved_states
from weights.training.train_config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from weights.training.trainer import StepReport, Trainer
from weights.training.wordnet import wordnet_hash

# rows learn with this multiple of the weights' learning rate, as in the benchmark model
_TABLE_LR = 10.0


@dataclass(frozen=True)
class Scale:
    """Size of the benchmark.

    Attributes:
        corpus: the texts.
        steps: optimiser steps of a run.
        tokens_per_step: tokens of a step, without padding.
        num_subkeys: N; the table has N * N rows.
    """

    corpus: GlossCorpus
    steps: int
    tokens_per_step: int
    num_subkeys: int


FULL = Scale(GlossCorpus(80, 150, 12), steps=100, tokens_per_step=192, num_subkeys=256)
REDUCED = Scale(GlossCorpus(16, 16, 4), steps=20, tokens_per_step=128, num_subkeys=64)


@dataclass(frozen=True)
class RetrofitRuns:
    """The runs of one benchmark.

    Attributes:
        folder: where ``results.csv`` and the texts are.
        model: checkpoint folder of the model to train.
        wordnet: WordNet's folder.
        scale: size of the benchmark.
        seeds: runs of a contestant at each learning rate.
        only: names of the contestants that run; all if empty.
    """

    folder: Path
    model: Path
    wordnet: Path
    scale: Scale
    seeds: int
    only: Sequence[str]

    @property
    def corpus(self) -> Path:
        """The folder of the texts."""
        return self.folder / "corpus"


def measure(runs: RetrofitRuns) -> None:
    """Train and score the contestants; skips runs that the folder's ``results.csv`` has.

    Raises:
        ConfigError: ``only`` names an unknown contestant, ``seeds`` is less than 1, the model has
            too few layers or has memory layers, or the folder has results of other settings.
        DataError, CheckpointError, TrainingError: as ``Trainer``.
    """
    base = _checked_base(runs)
    runs.folder.mkdir(parents=True, exist_ok=True)
    _check_settings(runs)
    if not (runs.corpus / QUESTIONS).exists():
        shutil.rmtree(runs.corpus, ignore_errors=True)
        runs.scale.corpus.write(runs.wordnet, runs.corpus)
    file = runs.folder / "results.csv"
    for contestant, lr, seed in _planned(runs):
        done = {(one.name, one.lr, one.seed) for one in read_results(file, RetrofitResult)}
        if (contestant.name, lr, seed) not in done:
            made = _train(runs, base, contestant, lr, seed) if contestant.lrs else _untrained(runs)
            append_result(file, made)
            tqdm.write(_line(made))


def train_config(
    runs: RetrofitRuns, base: ModelConfig, contestant: Contestant, lr: float, seed: int
) -> TrainConfig:
    """Training configuration of a contestant; only model, learning rate and frozen part differ."""
    scale = runs.scale
    return TrainConfig(
        data=DataConfig(
            train=(str(runs.corpus / FACTS),), validation_share=0.0, sequence_length=128
        ),
        run=RunConfig(
            steps=scale.steps,
            tokens_per_step=scale.tokens_per_step,
            checkpoint_every=scale.steps,
            evaluate_every=scale.steps,
            seed=seed,
            init_from=str(runs.model),
            freeze=("dense",) if contestant.is_frozen else (),
        ),
        optimizer=OptimizerConfig(
            lr=lr,
            table_lr=lr * _TABLE_LR,
            weight_decay=0.0,
            warmup_steps=scale.steps // 10,
            decay="linear",
        ),
        model=contestant.model(base, scale.num_subkeys),
    )


def _checked_base(runs: RetrofitRuns) -> ModelConfig:
    """The model's config, if all options are valid."""
    names = [one.name for one in contestants()]
    if unknown := set(runs.only) - set(names):
        listed = ", ".join(repr(name) for name in names)
        raise ConfigError(f"only: {min(unknown)!r} is unknown; must be one of {listed}")
    if runs.seeds < 1:
        raise ConfigError(f"seeds: must be at least 1, not {runs.seeds}")
    base = read_config(runs.model).model
    if not can_have_memory(base):
        raise ConfigError(f"model: {runs.model} needs more than 3 layers and no memory layers")
    return base


def _check_settings(runs: RetrofitRuns) -> None:
    """Write the settings that all results of a folder share; ConfigError if it has others."""
    shared = {
        "model": weights_hash(open_checkpoint(runs.model)[1].values()),
        "scale": asdict(runs.scale),
        "dict": wordnet_hash(runs.wordnet),
        "contestants": {one.name: [one.memory, one.is_frozen] for one in contestants()},
    }
    keep_settings(runs.folder / "settings.json", shared)


def _planned(runs: RetrofitRuns) -> Iterator[tuple[Contestant, float, int]]:
    """All runs: each contestant's first learning rate, then the others, then further seeds."""
    chosen = [one for one in contestants() if not runs.only or one.name in runs.only]
    yield from ((one, 0.0, 0) for one in chosen if not one.lrs)
    trained = [one for one in chosen if one.lrs]
    for seed in range(runs.seeds):
        # all have equally many rates
        for lrs in zip(*(one.lrs for one in trained), strict=True):
            yield from ((one, lr, seed) for one, lr in zip(trained, lrs, strict=True))


def _untrained(runs: RetrofitRuns) -> RetrofitResult:
    """The scores of the base as it is."""
    scores = score_folder(runs.model, runs.corpus)
    return RetrofitResult(
        BASE,
        lr=0.0,
        seed=0,
        weights=0,
        table_values=0,
        steps=0,
        tokens=0,
        **asdict(scores),
        seconds=0.0,
    )


def _train(
    runs: RetrofitRuns, base: ModelConfig, contestant: Contestant, lr: float, seed: int
) -> RetrofitResult:
    name = "-".join(contestant.name.replace(",", "").split())
    folder = runs.folder / "runs" / f"{name}-{lr:g}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted call
    scale = runs.scale
    trainer = Trainer(train_config(runs, base, contestant, lr, seed), folder, resume=False)
    started = time.monotonic()
    with tqdm(total=scale.steps, desc=folder.name, leave=False) as bar:

        def show(report: StepReport) -> bool:
            bar.update()
            bar.set_postfix(loss=f"{report.loss:.3f}")
            return True

        trainer.run(show)
    seconds = time.monotonic() - started
    del trainer  # its moments take twice the memory of the weights
    (last,) = saved_states(folder / "checkpoints")
    weights, table_values = _num_trained(last, contestant.is_frozen)
    scores = score_folder(last, runs.corpus)
    # keep the log; the checkpoints are large
    for large in ("checkpoints", "adapter"):
        shutil.rmtree(folder / large, ignore_errors=True)
    return RetrofitResult(
        contestant.name,
        lr=lr,
        seed=seed,
        weights=weights,
        table_values=table_values,
        steps=scale.steps,
        tokens=scale.steps * scale.tokens_per_step,
        **asdict(scores),
        seconds=seconds,
    )


def _num_trained(checkpoint: Path, is_frozen: bool) -> tuple[int, int]:
    """Trained numbers of a model: its weights, or those of its memory layers alone; its table."""
    config, stored = open_checkpoint(checkpoint)
    sizes = {name: math.prod(one.shape) for name, one in stored.items()}
    table_values = sum(sizes.pop(name) for name in config.model.table_names)
    weights = sum(size for name, size in sizes.items() if not is_frozen or ".memory." in name)
    return weights, table_values


def _line(one: RetrofitResult) -> str:
    return (
        f"{one.name:<34} lr {one.lr:<7g} seed {one.seed}  recall {one.recall:6.1%}"
        f"  answers {one.answer_loss:.3f} nats per token"
        f"  perplexity of other glosses {one.gloss_perplexity:.2f}, of prose"
        f" {one.prose_perplexity:.2f}  {one.seconds:.0f} s"
    )
