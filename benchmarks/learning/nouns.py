"""Nouns that the default model was never taught, with their definitions."""

import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.learning.task import LearningTask, model_fingerprint, text_fingerprint
from engine.errors import ConfigError
from weights.checkpoints.checkpoint import load_model
from weights.learning.facts import Fact, fact_passages
from weights.learning.scores import exact_answers
from weights.training.packing import Passage
from weights.training.row_reads import count_reads
from weights.training.training_data import TextTokens, checkpoint_text
from weights.training.wordnet import Noun, read_nouns

_NUM_KNOWN, _NUM_NEUTRAL = 1000, 1000


class NounTasks:
    """Draws nouns without a sense that is tagged in a text: the model was taught all others."""

    def __init__(self, folder: Path, wordnet: Path) -> None:
        """Load the default model from ``folder``, and find the nouns of WordNet that it knows.

        Raises:
            ConfigError: it knows too few of them.
            DataError: ``wordnet`` is not WordNet's folder.
        """
        model, config = load_model(folder, "float32")
        self._base, self._text = model, checkpoint_text(folder)
        self._most = config.model.max_positions
        taught = _passages(read_nouns(wordnet), self._text, self._most)
        self._known = [
            passage
            for passage, is_exact in zip(taught, exact_answers(model, taught), strict=True)
            if is_exact
        ]
        least = 2 * _NUM_KNOWN + _NUM_NEUTRAL
        if len(self._known) < least:
            raise ConfigError(f"model: knows {len(self._known)} nouns, but {least} are needed")
        self._untaught = _passages(read_nouns(wordnet, is_tagged=False), self._text, self._most)
        self.num_facts = len(self._untaught)
        self.fingerprint = {
            **model_fingerprint(folder),
            "known": text_fingerprint(self._known),
            "untaught": text_fingerprint(self._untaught),
        }

    def draw(self, count: int, seed: int) -> LearningTask:
        """Nouns to learn, and known ones: 1,000 held out, 1,000 as neutral text.

        The other known nouns are the background, which may be replayed and whose reads are counted;
        1,000 of these are examined too.
        """
        rng = random.Random(seed)
        facts = rng.sample(self._untaught, count)
        known = rng.sample(self._known, len(self._known))
        first, last = _NUM_KNOWN, _NUM_KNOWN + _NUM_NEUTRAL
        background = [Passage(one.ids) for one in known[last:]]
        return LearningTask(
            name=f"nouns {count}",
            seed=seed,
            base=self._base,
            facts=facts,
            questions=(),
            known=known[last : last + _NUM_KNOWN],
            held_out=known[:first],
            neutral=[Passage(one.ids) for one in known[first:last]],
            background=background,
            fact_reads=count_reads(self._base, facts),
            background_reads=count_reads(self._base, background),
        )


def _passages(nouns: Sequence[Noun], text: TextTokens, most: int) -> list[Passage]:
    facts = [Fact(noun.gloss, noun.prompt, where=noun.word) for noun in nouns]
    return fact_passages(facts, text, most)
