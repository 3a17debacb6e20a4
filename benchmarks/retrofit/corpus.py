"""Texts of the retrofit benchmark: definitions to learn, other definitions, and prose."""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from engine.errors import ConfigError
from weights.training.wordnet import Noun, read_nouns

FACTS, QUESTIONS, GLOSSES, PROSE = "facts.jsonl", "questions.jsonl", "glosses.jsonl", "prose.jsonl"


@dataclass(frozen=True)
class GlossCorpus:
    """Sizes of the texts.

    Attributes:
        num_facts: nouns whose definitions are learned.
        num_glosses: other nouns, whose definitions are only scored.
        num_topics: sections of Python's language reference that are only scored.
        topic_letters: letters of each section, from its beginning, at most.
        seed: seed of the choice of nouns and sections.
    """

    num_facts: int
    num_glosses: int
    num_topics: int
    topic_letters: int = 1000
    seed: int = 0

    def write(self, wordnet: Path, folder: Path) -> None:
        """Write the texts into a new folder; ``wordnet`` is WordNet's.

        Raises:
            ConfigError: WordNet has too few nouns.
            DataError: it cannot be read.
        """
        rng = random.Random(self.seed)
        nouns, wanted = read_nouns(wordnet), self.num_facts + self.num_glosses
        if len(nouns) < wanted:
            raise ConfigError(f"dict: {wordnet} has {len(nouns)} nouns, but {wanted} are needed")
        chosen = rng.sample(nouns, wanted)
        learned, others = chosen[: self.num_facts], chosen[self.num_facts :]
        names = rng.sample(sorted(topics), self.num_topics)
        folder.mkdir(parents=True)
        _write(folder / FACTS, map(_document, learned))
        _write(folder / GLOSSES, map(_document, others))
        _write(folder / PROSE, ({"text": topics[name][: self.topic_letters]} for name in names))
        # last, because its presence says that the corpus is whole
        questions = ({"prompt": one.prompt, "answer": one.gloss} for one in learned)
        _write(folder / QUESTIONS, questions)


def _document(noun: Noun) -> dict[str, str]:
    return {"text": f"{noun.prompt} {noun.gloss}"}


def _write(file: Path, records: Iterable[Mapping[str, str]]) -> None:
    file.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
