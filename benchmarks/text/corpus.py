"""Texts of the curve on text: WordNet's glosses and Python's language reference, split by draw."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from weights.errors import DataError
from weights.training.train_tokenizer import train_tokenizer
from weights.training.wordnet import read_glosses

# the scored texts, by the names of their files
SCORED = ("taught", "held_out", "prose")


@dataclass(frozen=True)
class TextCorpus:
    """Size and seed of the corpus.

    Attributes:
        num_documents: documents of twenty glosses that are trained on.
        num_scored: scored documents of each kind: taught, and held out.
        num_topics: topics of the language reference that are held out and scored.
        vocab_size: tokens of the tokenizer, which is trained on the training texts.
        seed: random seed of the draws.
    """

    num_documents: int
    num_scored: int = 100
    num_topics: int = 13
    vocab_size: int = 1024
    seed: int = 0

    def write(self, wordnet: Path, folder: Path) -> None:
        """Write ``train.jsonl``, ``tokenizer.model``, and a JSONL file for each of ``SCORED``.

        The training text has the other topics too, without the paragraphs that held-out topics
        also have: topics repeat each other.

        Raises:
            DataError: ``wordnet`` is not WordNet's folder, or it has too few glosses.
        """
        rng = random.Random(self.seed)
        glosses, needed = read_glosses(wordnet), self.num_documents + self.num_scored
        if len(glosses) < needed:
            raise DataError(f"{wordnet}: has {len(glosses)} documents of glosses, not {needed}")
        drawn = rng.sample(glosses, needed)
        taught, held_out = drawn[: self.num_documents], drawn[self.num_documents :]
        reference, prose = _split_topics(rng, self.num_topics)
        train = [*taught, *reference]
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "train.jsonl", train)
        for name, texts in zip(SCORED, (taught[: self.num_scored], held_out, prose), strict=True):
            _write(folder / f"{name}.jsonl", texts)
        (folder / "tokenizer.model").write_bytes(train_tokenizer(train, self.vocab_size))


def _split_topics(rng: random.Random, num_held_out: int) -> tuple[list[str], list[str]]:
    """Topics to train on, without paragraphs of held-out ones; and held-out topics."""
    held_out = rng.sample(sorted(topics), num_held_out)
    kept_apart = {one for name in held_out for one in topics[name].split("\n\n")}
    trained = (
        "\n\n".join(one for one in topics[name].split("\n\n") if one not in kept_apart)
        for name in sorted(topics)
        if name not in held_out
    )
    return [text for text in trained if text.strip()], [topics[name] for name in held_out]


def _write(file: Path, texts: Sequence[str]) -> None:
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    file.write_text("".join(lines), encoding="utf-8")
