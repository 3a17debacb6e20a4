"""WordNet's nouns and what they mean: the corpus of the default model.

https://wordnet.princeton.edu, as Debian's package wordnet-base installs it.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from weights.errors import DataError

_NUM_QUESTIONS = 200
_SENSES = 20  # a document of glosses
_PARTS = ("noun", "verb", "adj", "adv")


@dataclass(frozen=True)
class Noun:
    """A word and the first part of the gloss of its first sense."""

    word: str
    gloss: str

    @property
    def prompt(self) -> str:
        """What the gloss is asked for with, and follows after a space."""
        return f"{self.word} (noun):"


def read_nouns(folder: Path) -> list[Noun]:
    """The nouns of one word with a sense that was tagged in a text, in WordNet's order.

    A gloss is taken up to its first semicolon, behind which are others and examples.

    Raises:
        DataError: the folder has no ``index.noun`` and ``data.noun``, or they are of another form.
    """
    try:
        glosses = {line[:8]: _gloss(line) for line in _lines(folder / "data.noun")}
        entries = (line.split() for line in _lines(folder / "index.noun"))
        return [
            Noun(entry[0], glosses[_first_sense(entry)])
            for entry in entries
            if "_" not in entry[0] and _num_tagged(entry) > 0
        ]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, LookupError) as error:
        raise DataError(f"{folder}: not WordNet's files ({error})") from None


def write_corpus(source: Path, target: Path) -> int:
    """Write ``nouns.jsonl``, a document a noun, and ``questions.jsonl``, some of them asked for.

    Beside them ``glosses.jsonl`` has all that WordNet says, examples included, twenty senses a
    document. Returns the number of nouns; what is drawn is the same each time.

    Raises:
        DataError: as ``read_nouns``, or the target cannot be written.
    """
    nouns, entries = read_nouns(source), _entries(source)
    random.Random(0).shuffle(entries)
    glosses = [
        {"text": "\n".join(entries[i : i + _SENSES])} for i in range(0, len(entries), _SENSES)
    ]
    texts = [{"text": f"{noun.prompt} {noun.gloss}"} for noun in nouns]
    asked = random.Random(0).sample(nouns, min(_NUM_QUESTIONS, len(nouns)))
    questions = [{"prompt": noun.prompt, "answer": noun.gloss} for noun in asked]
    try:
        target.mkdir(parents=True, exist_ok=True)
        written = {"nouns": texts, "questions": questions, "glosses": glosses}
        for name, records in written.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (target / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{target}: {error.strerror}") from None
    return len(nouns)


def _entries(folder: Path) -> list[str]:
    """A line a sense: its words, and its whole gloss."""
    entries = []
    for part in _PARTS:
        file = folder / f"data.{part}"
        for line in _lines(file) if file.exists() else ():
            fields, _, gloss = line.partition(" | ")
            words = fields.split()[4 : 4 + 2 * int(fields.split()[3], 16) : 2]
            entries.append(f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}")
    return entries


def _lines(file: Path) -> list[str]:
    """Without the licence, whose lines begin with a space."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith(" ")]


def _gloss(line: str) -> str:
    return line.partition(" | ")[2].partition(";")[0].strip()


def _num_tagged(entry: list[str]) -> int:
    """lemma, pos, synsets, p pointers, p times a pointer, senses, tagged senses, offsets"""
    return int(entry[5 + int(entry[3])])


def _first_sense(entry: list[str]) -> str:
    return entry[6 + int(entry[3])]
