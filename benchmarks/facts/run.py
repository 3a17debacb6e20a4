"""``memplus bench facts``: trains every contestant on the same facts and tests its recall."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.curves.results import TrainedContestant
from benchmarks.curves.run import measure_curve
from benchmarks.curves.training import TOKENS_PER_STEP, Training
from benchmarks.facts.contestants import SEQUENCE_LENGTH, contestants
from benchmarks.facts.people import PeopleCorpus
from benchmarks.facts.results import Result
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.executor import make_executor
from weights.checkpoints.checkpoint import load_model
from weights.training.corpus import documents
from weights.training.evaluate import read_questions, score_recall, score_texts
from weights.training.training_data import checkpoint_text

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
        return self.corpus.num_people * 19 * self.exposures // TOKENS_PER_STEP


FULL = Scale(PeopleCorpus(num_people=9000), exposures=100, seeds=3)
REDUCED = Scale(PeopleCorpus(num_people=2000, num_questions=1000), exposures=100, seeds=1)


def measure(folder: Path, is_reduced: bool, seeds: int | None, only: Sequence[str]) -> None:
    """Train and test the contestants; see ``measure_curve``."""
    measure_curve(FactsCurve(is_reduced), folder, seeds, only)


class FactsCurve:
    """Recall of facts, and perplexity of new texts of these facts."""

    def __init__(self, is_reduced: bool) -> None:
        self._scale = REDUCED if is_reduced else FULL
        self.contestants = contestants(is_reduced)
        self.seeds = self._scale.seeds
        self.training = Training(
            steps=self._scale.steps,
            sequence_length=SEQUENCE_LENGTH,
            lr=3e-3,
            warmup_steps=200,
            tokenizer="words.model",
        )
        self.scale = asdict(self._scale)
        self.summary = f"{self._scale.corpus.bits:,.0f} bits of facts, {self._scale.steps:,} steps"
        self.result = Result
        self.plot_name = "recall.png"
        self.panels = {
            "recall": "fraction of questions answered correctly",
            "perplexity": "perplexity of new texts of the facts",
        }

    def write_texts(self, folder: Path) -> None:
        """Write texts and questions."""
        self._scale.corpus.write(folder)

    def score(self, trained: TrainedContestant, checkpoint: Path, texts: Path) -> Result:
        """Ask the questions, and score the new texts."""
        model, config = load_model(checkpoint)
        text = checkpoint_text(checkpoint)
        told_anew = score_texts(model, text, documents([texts / "told_anew.jsonl"]))
        engine = Engine(make_executor(model, _ENGINE), _ENGINE, config.eos_ids)
        questions = read_questions(texts / "questions.jsonl")
        recall = score_recall(engine, text.tokenizer, questions).recall
        return Result(
            **asdict(trained), recall=recall, loss=told_anew.loss, perplexity=told_anew.perplexity
        )

    def line(self, result: Result) -> str:
        """Recall and perplexity."""
        return f"recall {result.recall:.3f}  perplexity {result.perplexity:.3f}"
