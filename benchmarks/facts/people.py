"""Generates a corpus of facts about fictional people, and questions about these facts."""

import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

# synonyms of each attribute; for each person, questions use one that the texts never use
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
_DOCUMENTS_PER_PERSON = 8  # each states all facts of the person


@dataclass(frozen=True)
class PeopleCorpus:
    """Size and seed of the corpus.

    Attributes:
        num_people: number of people, at most ``num_names`` squared.
        num_names: number of first names, and of last names.
        num_values: possible values of each attribute.
        num_questions: questions sampled from all possible ones.
        seed: random seed of names, values and documents.
    """

    num_people: int
    num_names: int = 128
    num_values: int = 64
    num_questions: int = 2000
    seed: int = 0

    @property
    def bits(self) -> float:
        """Information in the values of all attributes, without the names."""
        per_person = len(ATTRIBUTES) * (self.num_values - 1).bit_length()
        return self.num_people * per_person

    def write(self, folder: Path) -> None:
        """Write ``train.jsonl``, ``told_anew.jsonl``, ``questions.jsonl`` and ``words.model``.

        A document states all facts of a person, in random order and with random synonyms of the
        attributes: "Kafuza Kegaru company dateko abode dunize ...". A question uses the synonym
        that no text uses for that person. ``told_anew.jsonl`` has new documents of the same facts.
        """
        rng = random.Random(self.seed)
        people = _People(self, rng)
        texts = [
            people.describe(person)
            for _ in range(_DOCUMENTS_PER_PERSON)
            for person in people.indices
        ]
        new_texts = [people.describe(person) for person in people.indices[: self.num_questions]]
        questions = rng.sample(list(people.questions()), self.num_questions)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "train.jsonl", ({"text": text} for text in texts))
        _write(folder / "told_anew.jsonl", ({"text": text} for text in new_texts))
        _write(folder / "questions.jsonl", questions)
        (folder / "words.model").write_bytes(_word_tokenizer(texts))


class _People:
    def __init__(self, corpus: PeopleCorpus, rng: random.Random) -> None:
        words = _random_words(rng)
        first, last = ([next(words).title() for _ in range(corpus.num_names)] for _ in range(2))
        values = [[next(words) for _ in range(corpus.num_values)] for _ in ATTRIBUTES]
        names = rng.sample([(a, b) for a in first for b in last], corpus.num_people)
        self._rng = rng
        self._names = names
        self._values = [[rng.choice(one) for one in values] for _ in names]
        self._asked_names = [[rng.choice(one) for one in ATTRIBUTES] for _ in names]
        self.indices = range(len(names))

    def describe(self, person: int) -> str:
        order = self._rng.sample(range(len(ATTRIBUTES)), len(ATTRIBUTES))
        parts = list(self._names[person])
        for index in order:
            asked_name = self._asked_names[person][index]
            parts.append(self._rng.choice([one for one in ATTRIBUTES[index] if one != asked_name]))
            parts.append(self._values[person][index])
        return " ".join(parts)

    def questions(self) -> Iterator[dict[str, str]]:
        for (first, last), values, asked_names in zip(
            self._names, self._values, self._asked_names, strict=True
        ):
            for value, attribute in zip(values, asked_names, strict=True):
                # the answer ends at the next attribute, or at the end of the text
                yield {"prompt": f"{first} {last} {attribute}", "answer": value, "until": " "}


def _random_words(rng: random.Random) -> Iterator[str]:
    """Yields distinct random words of three syllables."""
    seen = set()
    while True:
        syllables = (rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))
        word = "".join(syllables)
        if word not in seen:
            seen.add(word)
            yield word


def _word_tokenizer(texts: list[str]) -> bytes:
    """Train a tokenizer of whole words, so that all compute goes into facts."""
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
