"""The task of a learning run: a model, facts to learn, and what it must not forget."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.model.transformer import Transformer
from weights.patches.model_identity import model_identity
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


class Tasks(Protocol):
    """Draws of facts for one model.

    Attributes:
        num_facts: the most facts that a draw may have.
        fingerprint: hashes of the model and of all texts.
    """

    @property
    def num_facts(self) -> int: ...

    @property
    def fingerprint(self) -> Mapping[str, str]: ...

    def draw(self, count: int, seed: int) -> LearningTask:
        """Draw ``count`` facts, 1 to ``num_facts``."""


def model_fingerprint(folder: Path) -> dict[str, str]:
    """Hashes of a model's dense weights and tables."""
    identity = model_identity(folder)
    return {"row_choice": identity.row_choice, **identity.origins}


def text_fingerprint(passages: Iterable[Passage]) -> str:
    """A hash of tokens."""
    made = hashlib.sha256()
    for one in passages:
        made.update(np.array([len(one.ids), one.num_given, *one.ids], dtype="<i8").tobytes())
    return made.hexdigest()
