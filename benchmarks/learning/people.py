"""Made-up people with four facts each, learned in some phrasings and asked for in others."""

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks.learning.task import LearningTask, model_fingerprint, text_fingerprint
from engine.errors import ConfigError
from engine.model.transformer import Transformer
from weights.checkpoints.checkpoint import load_model
from weights.learning.facts import Fact, fact_passages
from weights.training.corpus import documents
from weights.training.loss import batch_output
from weights.training.packing import Passage, cut, packed_batches
from weights.training.row_reads import count_reads
from weights.training.training_data import TextTokens, checkpoint_text

# fmt: off
_FIRST = [
    "Alva", "Bram", "Cleo", "Dario", "Edda", "Falk", "Greta", "Hugo", "Ines", "Jory", "Kaia",
    "Lorin", "Mira", "Nils", "Orla", "Pavel",
]
_LAST = [
    "Ashgrove", "Bellweather", "Carrow", "Dunmore", "Eastling", "Farrowby", "Greyhurst",
    "Holloway", "Ironside", "Jessamine", "Kestrel", "Lindqvist", "Marlow", "Northcott",
    "Oakhurst", "Pellington",
]
_TOWNS = [
    "Lisbon", "Bergen", "Kraków", "Toledo", "Galway", "Trieste", "Bruges", "Malmö", "Ghent",
    "Porto", "Graz", "Turku",
]
_TRADES = [
    "baker", "pilot", "lawyer", "nurse", "farmer", "painter", "sailor", "tailor", "teacher",
    "butcher", "jeweller",
]
_ANIMALS = [
    "parrot", "goat", "ferret", "horse", "tortoise", "rabbit", "hedgehog", "donkey", "canary",
    "python", "goose",
]
_DISHES = [
    "paella", "goulash", "lasagne", "pancakes", "risotto", "dumplings", "ramen", "moussaka",
    "falafel",
]
# fmt: on

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
# scoring and counts of reads take minutes with 135 million weights on two cores
_NEUTRAL_TOKENS, _BACKGROUND_TOKENS = 10_000, 50_000
_PASSAGE_TOKENS = 128
# of the answers that the model gives before: their number, and the tokens of each
_NUM_KNOWN, _PROMPT_TOKENS, _ANSWER_TOKENS = 200, 16, 4


class PeopleTasks:
    """Draws people for any model with memory layers."""

    def __init__(self, model: Path, background: Sequence[Path], neutral: Sequence[Path]) -> None:
        """Load a model; ``background`` is text like its training's, ``neutral`` is other text.

        Raises:
            CheckpointError: the model cannot be read.
            ConfigError: it has no memory layers, or texts are missing or too short.
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
        self._known = _greedy_answers(self._base, self._background[:_NUM_KNOWN])
        self._held_out = _greedy_answers(self._base, self._neutral[:_NUM_KNOWN])
        for name, answers in (("background", self._known), ("neutral", self._held_out)):
            if not answers:
                raise ConfigError(f"{name}: no text has more than {_PROMPT_TOKENS} tokens")
        self._reads = count_reads(self._base, self._background)
        self._names = [f"{first} {last}" for first, last in product(_FIRST, _LAST)]
        self.num_facts = len(self._names)
        self.fingerprint = {
            **model_fingerprint(model),
            "background": text_fingerprint(self._background),
            "neutral": text_fingerprint(self._neutral),
        }

    def draw(self, count: int, seed: int) -> LearningTask:
        """``count`` people; each fact is learned in four phrasings, and asked for in two others."""
        rng = random.Random(seed)
        learned: list[Fact] = []
        asked: list[Fact] = []
        for name in rng.sample(self._names, count):
            for values, statements, questions in _FACTS:
                answer = f"{rng.choice(values)}."
                learned += [Fact(answer, phrasing.format(name)) for phrasing in statements]
                asked += [Fact(answer, phrasing.format(name)) for phrasing in questions]
        facts = fact_passages(learned, self._text, self._most)
        return LearningTask(
            name=f"people {count}",
            seed=seed,
            base=self._base,
            facts=facts,
            questions=fact_passages(asked, self._text, self._most),
            known=self._known,
            held_out=self._held_out,
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
        for passage in cut(text.document(document), _PASSAGE_TOKENS):
            passages.append(passage)
            done += len(passage)
            if done >= num_tokens:
                return passages
    return passages


@torch.no_grad()
def _greedy_answers(model: Transformer, texts: Sequence[Passage]) -> list[Passage]:
    """Beginnings of texts, and the tokens that the model adds to them: answers that it knows."""
    answers = [one.ids[:_PROMPT_TOKENS] for one in texts if len(one.ids) > _PROMPT_TOKENS]
    for _ in range(_ANSWER_TOKENS):
        # the last token stands for the next one, which is not known yet
        asked = [Passage((*ids, 0), len(ids)) for ids in answers]
        tokens: list[int] = []
        for batch in packed_batches(asked, 1024):
            logits_LV = batch_output(model, batch, torch.float32).logits_LV
            tokens += logits_LV[torch.tensor(batch.starts[1:]) - 1].argmax(dim=-1).tolist()
        answers = [(*ids, token) for ids, token in zip(answers, tokens, strict=True)]
    return [Passage(ids, _PROMPT_TOKENS) for ids in answers]
