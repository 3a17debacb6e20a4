"""Writes the corpus of the default model: WordNet's nouns and their definitions.

Reads https://wordnet.princeton.edu as installed by Debian's package wordnet-base.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weights.errors import DataError

_NUM_QUESTIONS = 200
_SENSES = 20  # per document of glosses
_PARTS = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Noun:
    """A word and the first part of the gloss of its first sense."""

    word: str
    gloss: str

    @property
    def prompt(self) -> str:
        """The text before the gloss, without the space between them."""
        return f"{self.word} (noun):"


def read_nouns(folder: Path, *, is_tagged: bool = True) -> list[Noun]:
    """Single-word nouns with a sense that is tagged in a text, in WordNet's order.

    ``is_tagged=False`` reads those without one instead, which the default model was never taught.
    A gloss ends at its first semicolon, because further definitions and examples follow there.

    Raises:
        DataError: ``index.noun`` or ``data.noun`` is missing or malformed.
    """
    with _reading(folder):
        glosses = {line[:8]: _gloss(line) for line in _lines(folder / "data.noun")}
        entries = (line.split() for line in _lines(folder / "index.noun"))
        return [
            Noun(entry[0], glosses[_first_sense(entry)])
            for entry in entries
            if "_" not in entry[0] and (_num_tagged(entry) > 0) == is_tagged
        ]


def write_corpus(source: Path, target: Path) -> int:
    """Write ``nouns.jsonl`` with one document per noun, and ``questions.jsonl`` with 200 of them.

    Also writes ``glosses.jsonl``: all senses of all words with examples, twenty per document.
    Random choices have a fixed seed. Returns the number of nouns.

    Raises:
        DataError: as ``read_nouns``, or the target cannot be written.
    """
    nouns = read_nouns(source)
    glosses = [{"text": text} for text in read_glosses(source)]
    texts = [{"text": f"{noun.prompt} {noun.gloss}"} for noun in nouns]
    sampled = random.Random(0).sample(nouns, min(_NUM_QUESTIONS, len(nouns)))
    questions = [{"prompt": noun.prompt, "answer": noun.gloss} for noun in sampled]
    try:
        target.mkdir(parents=True, exist_ok=True)
        written = {"nouns": texts, "questions": questions, "glosses": glosses}
        for name, records in written.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (target / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{target}: {error.strerror}") from None
    return len(nouns)


def read_glosses(folder: Path) -> list[str]:
    """All senses of all words with their whole glosses, shuffled, in documents of twenty.

    A sense is a line: its words, a colon and the gloss. The order has a fixed seed.

    Raises:
        DataError: there is no sense, or a file is malformed.
    """
    entries = []
    with _reading(folder):
        for part in _PARTS:
            file = folder / f"data.{part}"
            for line in _lines(file) if file.exists() else ():
                fields, _, gloss = line.partition(" | ")
                words = fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]
                entries.append(f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}")
    if not entries:
        raise DataError(f"{folder}: has no WordNet file data.{_PARTS[0]}, nor one of another part")
    random.Random(0).shuffle(entries)
    return ["\n".join(entries[i : i + _SENSES]) for i in range(0, len(entries), _SENSES)]


def wordnet_hash(folder: Path) -> str:
    """A SHA-256 hash of the files that this module reads.

    Raises:
        DataError: there is none of them, or one cannot be read.
    """
    names = ("index.noun", *(f"data.{part}" for part in _PARTS))
    files = [folder / name for name in names if (folder / name).exists()]
    if not files:
        raise DataError(f"{folder}: has none of WordNet's files, {', '.join(names)}")
    found = hashlib.sha256()
    with _reading(folder):
        for file in files:
            found.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Raise errors of reading as DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, LookupError) as error:
        raise DataError(f"{folder}: has no valid WordNet files ({error})") from None


def _lines(file: Path) -> list[str]:
    """Lines of a file without the licence, whose lines begin with a space."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith(" ")]


def _gloss(line: str) -> str:
    return line.partition(" | ")[2].partition(";")[0].strip()


def _num_tagged(entry: list[str]) -> int:
    """Tagged senses of an entry: lemma, pos, synsets, p, p pointers, senses, tagged, offsets."""
    return int(entry[5 + int(entry[3])])


def _first_sense(entry: list[str]) -> str:
    return entry[6 + int(entry[3])]
