"""People who never were, and what is told about them: a corpus of facts, and questions for them."""

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

# an attribute's names, of which each person has one that is only asked with, and never told with
ATTRIBUTES = (
    ("home", "residence", "town", "abode"),
    ("employer", "firm", "company", "workplace"),
    ("trade", "job", "profession", "occupation"),
    ("school", "college", "academy", "university"),
    ("hobby", "pastime", "passion", "leisure"),
    ("pet", "animal", "companion", "beast"),
    ("dish", "meal", "food", "supper"),
    ("friend", "ally", "mate", "buddy"),
)
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_TELLINGS = 8  # of all that is known of a person, in documents of their own


@dataclass(frozen=True)
class PeopleCorpus:
    """How many people there are, and out of how much their facts are drawn.

    Attributes:
        num_people: at most ``num_names`` squared.
        num_names: first names, and as many last names.
        num_values: of each attribute.
        num_questions: that are asked, of all that could be.
        seed: of names, values and tellings.
    """

    num_people: int
    num_names: int = 128
    num_values: int = 64
    num_questions: int = 2000
    seed: int = 0

    @property
    def bits(self) -> float:
        """What is to be known: values of all attributes, names apart."""
        per_person = len(ATTRIBUTES) * (self.num_values - 1).bit_length()
        return self.num_people * per_person

    def write(self, folder: Path) -> None:
        """Write ``train.jsonl``, ``told_anew.jsonl``, ``questions.jsonl`` and ``words.model``.

        A document tells all facts of a person, in an order and with names of attributes that are
        drawn anew: "Kafuza Kegaru company dateko abode dunize ...". A question names the attribute
        as it was never named for that person. ``told_anew`` tells the same facts once more.
        """
        drawn = random.Random(self.seed)
        people = _People(self, drawn)
        texts = [people.tell(person) for _ in range(_TELLINGS) for person in people.every]
        again = [people.tell(person) for person in people.every[: self.num_questions]]
        asked = drawn.sample(list(people.questions()), self.num_questions)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "train.jsonl", ({"text": text} for text in texts))
        _write(folder / "told_anew.jsonl", ({"text": text} for text in again))
        _write(folder / "questions.jsonl", asked)
        (folder / "words.model").write_bytes(_words(texts))


class _People:
    def __init__(self, corpus: PeopleCorpus, drawn: random.Random) -> None:
        words = _new_words(drawn)
        first, last = ([next(words).title() for _ in range(corpus.num_names)] for _ in range(2))
        values = [[next(words) for _ in range(corpus.num_values)] for _ in ATTRIBUTES]
        names = drawn.sample([(a, b) for a in first for b in last], corpus.num_people)
        self._drawn = drawn
        self._names = names
        self._values = [[drawn.choice(one) for one in values] for _ in names]
        self._asked = [[drawn.choice(one) for one in ATTRIBUTES] for _ in names]
        self.every = range(len(names))

    def tell(self, person: int) -> str:
        order = self._drawn.sample(range(len(ATTRIBUTES)), len(ATTRIBUTES))
        parts = list(self._names[person])
        for index in order:
            asked = self._asked[person][index]
            parts.append(self._drawn.choice([one for one in ATTRIBUTES[index] if one != asked]))
            parts.append(self._values[person][index])
        return " ".join(parts)

    def questions(self) -> Iterator[dict[str, str]]:
        for (first, last), values, asked in zip(
            self._names, self._values, self._asked, strict=True
        ):
            for value, attribute in zip(values, asked, strict=True):
                # what follows is another attribute, or the end
                yield {"prompt": f"{first} {last} {attribute}", "answer": value, "until": " "}


def _new_words(drawn: random.Random) -> Iterator[str]:
    """Words of three syllables, none twice."""
    known = set()
    while True:
        syllables = (drawn.choice(_CONSONANTS) + drawn.choice(_VOWELS) for _ in range(3))
        word = "".join(syllables)
        if word not in known:
            known.add(word)
            yield word


def _words(texts: list[str]) -> bytes:
    """A tokenizer whose tokens are the words, so that all compute goes into facts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="word",
        vocab_size=2**16,
        hard_vocab_limit=False,
        use_all_vocab=True,
        normalization_rule_name="identity",
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _write(file: Path, records: Iterator[dict[str, str]] | list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
