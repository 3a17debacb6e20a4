"""Made-up people with four facts each, told in some phrasings and asked for in others."""

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from benchmarks.learning.task import LearningTask
from engine.errors import ConfigError
from weights.checkpoints.checkpoint import load_model
from weights.learning.facts import Fact, fact_passages
from weights.training.corpus import documents
from weights.training.packing import Passage
from weights.training.row_reads import count_reads
from weights.training.training_data import TextTokens, checkpoint_text

_FIRST = [
    "Alva",
    "Bram",
    "Cleo",
    "Dario",
    "Edda",
    "Falk",
    "Greta",
    "Hugo",
    "Ines",
    "Jory",
    "Kaia",
    "Lorin",
    "Mira",
    "Nils",
    "Orla",
    "Pavel",
]
_LAST = [
    "Ashgrove",
    "Bellweather",
    "Carrow",
    "Dunmore",
    "Eastling",
    "Farrowby",
    "Greyhurst",
    "Holloway",
    "Ironside",
]
_LAST += ["Jessamine", "Kestrel", "Lindqvist", "Marlow", "Northcott", "Oakhurst", "Pellington"]
_TOWNS = [
    "Lisbon",
    "Bergen",
    "Kraków",
    "Toledo",
    "Galway",
    "Trieste",
    "Bruges",
    "Malmö",
    "Ghent",
    "Porto",
    "Graz",
    "Turku",
]
_TRADES = [
    "baker",
    "pilot",
    "lawyer",
    "nurse",
    "farmer",
    "painter",
    "sailor",
    "tailor",
    "teacher",
    "butcher",
    "jeweller",
]
_ANIMALS = [
    "parrot",
    "goat",
    "ferret",
    "horse",
    "tortoise",
    "rabbit",
    "hedgehog",
    "donkey",
    "canary",
    "python",
    "goose",
]
_DISHES = [
    "paella",
    "goulash",
    "lasagne",
    "pancakes",
    "risotto",
    "dumplings",
    "ramen",
    "moussaka",
    "falafel",
]

# for each fact its values, phrasings that are learned, and phrasings that are asked
_FACTS = (
    (
        _TOWNS,
        (
            "{} was born in",
            "{} comes from the town of",
            "The birthplace of {} is",
            "{} spent a childhood in",
        ),
        ("The town in which {} was born is", "{} is a native of"),
    ),
    (
        _TRADES,
        (
            "{} works as a",
            "{} earns a living as a",
            "The profession of {} is that of a",
            "{} was trained as a",
        ),
        ("The job of {} is that of a", "By trade, {} is a"),
    ),
    (
        _ANIMALS,
        (
            "{} keeps as a pet a",
            "The pet of {} is a",
            "At home, {} looks after a",
            "{} shares the house with a",
        ),
        ("The animal that {} owns is a", "{} has a pet, which is a"),
    ),
    (
        _DISHES,
        (
            "{} likes to eat",
            "The favourite dish of {} is",
            "For dinner, {} always orders",
            "{} is fond of",
        ),
        ("The food that {} likes best is", "What {} most enjoys eating is"),
    ),
)
_NEUTRAL_TOKENS, _BACKGROUND_TOKENS = 20_000, 200_000
_PASSAGE_TOKENS = 256


class PeopleTasks:
    """Draws people, and tells their facts to any model with memory layers."""

    def __init__(self, model: Path, background: Sequence[Path], neutral: Sequence[Path]) -> None:
        """Load a model; ``background`` is text like its training's, ``neutral`` is other text.

        Raises:
            CheckpointError: the model cannot be read.
            ConfigError: it has no memory layers, or there are no texts.
            DataError: a text cannot be read.
        """
        self._base, config = load_model(model, "float32")
        if not config.model.memory_layers:
            raise ConfigError(f"model: {model} has no memory layers")
        if not background or not neutral:
            raise ConfigError("background, neutral: texts are needed, except for wordnet")
        self._text = checkpoint_text(model)
        self._most = config.model.max_positions
        self._background = _texts(background, self._text, _BACKGROUND_TOKENS)
        self._neutral = _texts(neutral, self._text, _NEUTRAL_TOKENS)
        self._reads = count_reads(self._base, self._background)

    def draw(self, count: int, seed: int) -> LearningTask:
        """``count`` people; each fact is learned in four phrasings, and asked for in two others.

        ConfigError if there are not so many names.
        """
        names = [f"{first} {last}" for first, last in product(_FIRST, _LAST)]
        if not 1 <= count <= len(names):
            raise ConfigError(f"facts: must be 1 to {len(names)} people, not {count}")
        rng = random.Random(seed)
        told: list[Fact] = []
        asked: list[Fact] = []
        for name in rng.sample(names, count):
            for values, learned, others in _FACTS:
                answer = f"{rng.choice(values)}."
                told += [Fact(answer, phrasing.format(name)) for phrasing in learned]
                asked += [Fact(answer, phrasing.format(name)) for phrasing in others]
        facts = fact_passages(told, self._text, self._most)
        return LearningTask(
            name=f"people {count}",
            seed=seed,
            base=self._base,
            facts=facts,
            questions=fact_passages(asked, self._text, self._most),
            known=(),
            neutral=self._neutral,
            background=self._background,
            fact_reads=count_reads(self._base, facts),
            background_reads=self._reads,
        )


def _texts(files: Sequence[Path], text: TextTokens, num_tokens: int) -> list[Passage]:
    """The first tokens of texts, in passages."""
    passages: list[Passage] = []
    done = 0
    for document in documents(files):
        ids = text.document(document)
        for start in range(0, len(ids) - 1, _PASSAGE_TOKENS):
            passages.append(Passage(tuple(ids[start : start + _PASSAGE_TOKENS + 1])))
            done += len(passages[-1])
            if done >= num_tokens:
                return passages
    return passages
