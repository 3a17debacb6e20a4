"""``memplus bench facts``: trains every contestant on the same facts and tests its recall."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.facts.contestants import Contestant, contestants
from benchmarks.facts.people import PeopleCorpus
from benchmarks.facts.plot import plot
from benchmarks.facts.results import Result
from benchmarks.result_file import append_result, read_results
from benchmarks.serving_plot import check_plot
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.executors.executor import make_executor
from engine.model.flops import total_flops
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.summary import summarize
from weights.training.corpus import documents
from weights.training.evaluate import TextScore, read_questions, score_recall, score_texts
from weights.training.run_folder import has_run, saved_states
from weights.training.train_config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from weights.training.trainer import StepReport, Trainer
from weights.training.training_data import checkpoint_text

_TOKENS_PER_STEP = 2048
_ENGINE = EngineConfig(kv_cache_gib=0.1, max_num_seqs=256)


@dataclass(frozen=True)
class Scale:
    """Size of the benchmark.

    Attributes:
        corpus: the facts.
        exposures: approximate number of documents per person during training.
        seeds: runs per contestant.
    """

    corpus: PeopleCorpus
    exposures: int
    seeds: int

    @property
    def steps(self) -> int:
        """Optimiser steps; a person's document has 19 predicted tokens."""
        return self.corpus.num_people * 19 * self.exposures // _TOKENS_PER_STEP


FULL = Scale(PeopleCorpus(num_people=9000), exposures=100, seeds=3)
REDUCED = Scale(PeopleCorpus(num_people=2000, num_questions=1000), exposures=100, seeds=1)


def measure(folder: Path, is_reduced: bool, seeds: int | None, only: Sequence[str]) -> None:
    """Train and test the contestants; skips runs that the folder's ``results.csv`` has.

    Raises:
        ConfigError: ``only`` names an unknown contestant, the folder has results of another scale,
            or matplotlib is missing.
        DataError, CheckpointError, TrainingError: as ``Trainer``.
    """
    scale = REDUCED if is_reduced else FULL
    all_contestants = contestants(is_reduced)
    if unknown := set(only) - {one.name for one in all_contestants}:
        names = ", ".join(one.name for one in all_contestants)
        raise ConfigError(f"only: {min(unknown)!r} is unknown; must be one of {names}")
    results = folder / "results.csv"
    folder.mkdir(parents=True, exist_ok=True)
    check_plot(folder / "recall.png")
    _write_corpus(scale, folder)
    print(f"{scale.corpus.bits:,.0f} bits of facts, {scale.steps:,} steps")
    for seed in range(seeds if seeds is not None else scale.seeds):
        for contestant in all_contestants:
            done = {(result.name, result.seed) for result in read_results(results, Result)}
            if (not only or contestant.name in only) and (contestant.name, seed) not in done:
                run = folder / "runs" / f"{contestant.name.replace(' ', '-')}-{seed}"
                result = _train(contestant, seed, scale, run)
                append_result(results, result)
                # keep the log; the checkpoints are large
                shutil.rmtree(run / "checkpoints")
                tqdm.write(_line(result))
    plot(read_results(results, Result), folder / "recall.png")


def train_config(contestant: Contestant, seed: int, steps: int, corpus: Path) -> TrainConfig:
    """Training configuration of a contestant; only model and optimiser layout differ."""
    return TrainConfig(
        data=DataConfig(
            train=(str(corpus / "train.jsonl"),),
            validation_share=0.0,
            tokenizer=str(corpus / "words.model"),
            sequence_length=64,
        ),
        run=RunConfig(
            steps=steps,
            tokens_per_step=_TOKENS_PER_STEP,
            dtype="float32",
            seed=seed,
            checkpoint_every=1000,
            evaluate_every=steps,
        ),
        optimizer=OptimizerConfig(
            lr=3e-3,
            table_lr=1e-2,
            weight_decay=0.0,
            row_wise=contestant.row_wise,
            warmup_steps=200,
            least_lr_share=0.02,
        ),
        model=contestant.model,
    )


def _write_corpus(scale: Scale, folder: Path) -> None:
    """Write the corpus if it does not exist; ConfigError if the folder has another scale."""
    corpus, scale_json = folder / "corpus", json.dumps(asdict(scale))
    if (record := folder / "scale.json").exists():
        if record.read_text() != scale_json:
            raise ConfigError(f"out: {folder} has results of another scale")
        return
    scale.corpus.write(corpus)
    record.write_text(scale_json)


def _train(contestant: Contestant, seed: int, scale: Scale, run: Path) -> Result:
    corpus = run.parent.parent / "corpus"
    config = train_config(contestant, seed, scale.steps, corpus)
    trainer = Trainer(config, run, resume=has_run(run))
    before = _earlier_seconds(run)
    started = time.monotonic()
    with tqdm(total=scale.steps, initial=trainer.step, desc=run.name, leave=False) as bar:

        def show(report: StepReport) -> bool:
            bar.update()
            bar.set_postfix(loss=f"{report.loss:.3f}")
            return True

        try:
            trainer.run(show)
        finally:
            seconds = before + time.monotonic() - started
            (run / "seconds.json").write_text(json.dumps(seconds))
    last = saved_states(run / "checkpoints")[-1]
    recall, text_score = _scores(last, corpus)
    parameters = summarize(last).dense.parameters
    return Result(
        name=contestant.name,
        kind=contestant.kind,
        rows=contestant.num_rows,
        seed=seed,
        parameters=parameters,
        flops=total_flops(trainer.flops),
        scoring_flops=trainer.flops.get("scoring", 0),
        tokens=scale.steps * _TOKENS_PER_STEP,
        recall=recall,
        loss=text_score.loss,
        perplexity=text_score.perplexity,
        seconds=seconds,
    )


def _earlier_seconds(run: Path) -> float:
    """Seconds that earlier, interrupted attempts of a run took."""
    file = run / "seconds.json"
    return float(json.loads(file.read_text())) if file.exists() else 0.0


def _scores(checkpoint: Path, corpus: Path) -> tuple[float, TextScore]:
    model, config = load_model(checkpoint)
    text = checkpoint_text(checkpoint)
    text_score = score_texts(model, text, documents([corpus / "told_anew.jsonl"]))
    engine = Engine(make_executor(model, _ENGINE), _ENGINE, config.eos_ids)
    questions = read_questions(corpus / "questions.jsonl")
    return score_recall(engine, text.tokenizer, questions).recall, text_score


def _line(result: Result) -> str:
    return (
        f"{result.name:<18} seed {result.seed}  {result.flops / 1e3:7.1f} kFLOP per token"
        f"  recall {result.recall:.3f}  perplexity {result.perplexity:.3f}"
        f"  {result.seconds:.0f} s"
    )
