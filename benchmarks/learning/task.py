"""The task of a learning run: a model, facts to learn, and what it must not forget."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.model.transformer import Transformer
from weights.training.packing import Passage
from weights.training.row_reads import RowReads


@dataclass(frozen=True, eq=False)
class LearningTask:
    """One draw of facts.

    Attributes:
        name: name of the model and its facts in the results.
        seed: seed of the draw, and of the order of facts.
        base: the model before.
        facts: what is learned.
        questions: the same facts in phrasings that are not learned; may be empty.
        known: what the model answers exactly before, and what ``background`` has.
        held_out: what it answers exactly before, and what ``background`` does not have.
        neutral: text whose perplexity should stay, and that is not in ``background``.
        background: text that may be replayed.
        fact_reads, background_reads: rows that facts and the model's other text read.
    """

    name: str
    seed: int
    base: Transformer
    facts: Sequence[Passage]
    questions: Sequence[Passage]
    known: Sequence[Passage]
    held_out: Sequence[Passage]
    neutral: Sequence[Passage]
    background: Sequence[Passage]
    fact_reads: RowReads
    background_reads: RowReads
