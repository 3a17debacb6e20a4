"""``memplus bench text``: trains every contestant on the same texts and scores its perplexity."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.curves.results import TrainedContestant
from benchmarks.curves.run import measure_curve
from benchmarks.curves.training import TOKENS_PER_STEP, Training
from benchmarks.text.contestants import SEQUENCE_LENGTH, contestants
from benchmarks.text.corpus import SCORED, TextCorpus
from benchmarks.text.results import Result
from weights.checkpoints.checkpoint import load_model
from weights.training.corpus import documents
from weights.training.evaluate import score_texts
from weights.training.training_data import checkpoint_text
from weights.training.wordnet import wordnet_hash


@dataclass(frozen=True)
class Scale:
    """Size of the benchmark.

    Attributes:
        corpus: the texts.
        steps: optimiser steps.
        seeds: runs per contestant.
    """

    corpus: TextCorpus
    steps: int
    seeds: int


FULL = Scale(TextCorpus(num_documents=300), steps=1500, seeds=3)
REDUCED = Scale(TextCorpus(num_documents=100, num_scored=50), steps=500, seeds=1)


def measure(
    folder: Path, wordnet: Path, is_reduced: bool, seeds: int | None, only: Sequence[str]
) -> None:
    """Train and score the contestants; see ``measure_curve``. ``wordnet`` is WordNet's folder."""
    measure_curve(TextCurve(wordnet, is_reduced), folder, seeds, only)


class TextCurve:
    """Perplexity of glosses that were trained on, of others, and of held-out prose."""

    def __init__(self, wordnet: Path, is_reduced: bool) -> None:
        self._wordnet, self._scale = wordnet, REDUCED if is_reduced else FULL
        self.contestants = contestants(is_reduced)
        self.seeds = self._scale.seeds
        self.training = Training(
            steps=self._scale.steps,
            sequence_length=SEQUENCE_LENGTH,
            lr=1e-2,
            warmup_steps=100,
            tokenizer="tokenizer.model",
        )
        self.scale = asdict(self._scale) | {"dict": wordnet_hash(wordnet)}
        self.summary = f"{self._scale.steps:,} steps of {TOKENS_PER_STEP:,} tokens"
        self.result = Result
        self.plot_name = "perplexity.png"
        self.panels = {
            "taught_perplexity": "perplexity of glosses trained on",
            "held_out_perplexity": "perplexity of held-out glosses",
            "prose_perplexity": "perplexity of held-out prose",
        }

    def write_texts(self, folder: Path) -> None:
        """Write the texts and the tokenizer."""
        self._scale.corpus.write(self._wordnet, folder)

    def score(self, trained: TrainedContestant, checkpoint: Path, texts: Path) -> Result:
        """Score the three texts."""
        model, _ = load_model(checkpoint)
        text = checkpoint_text(checkpoint)
        scores: dict[str, Any] = {}
        for name in SCORED:
            one = score_texts(model, text, documents([texts / f"{name}.jsonl"]))
            scores |= {f"{name}_perplexity": one.perplexity, f"{name}_bits": one.bits_per_byte}
        return Result(**asdict(trained), **scores)

    def line(self, result: Result) -> str:
        """The three perplexities."""
        return (
            f"perplexity {result.taught_perplexity:.2f} taught,"
            f" {result.held_out_perplexity:.2f} held out, {result.prose_perplexity:.2f} prose"
        )
