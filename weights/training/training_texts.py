"""The documents of a training run: those to train on, and those held out to evaluate it."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, count

from weights.errors import DataError
from weights.training.corpus import corpus_files, documents, other_files
from weights.training.train_config import DataConfig
from weights.training.train_tokenizer import train_tokenizer

# characters of a held-out end of a document: at least these, unless a tenth of it is less
_LEAST_END = 1000
# a shorter document is not divided
_LEAST_DIVIDED = 40
# characters of texts whose tokenizer is trained in seconds: 2 million take about one
_QUICK_CHARACTERS = 10_000_000


@dataclass(frozen=True)
class _Counts:
    """Counts from one pass over the documents; ``longest`` is the index of the longest one."""

    documents: int
    characters: int
    longest: int
    longest_characters: int


class TrainingTexts:
    """The documents that the ``[data]`` section names, read anew from their files each time.

    Held out are the documents of ``validation``, or a random ``validation_share`` of the training
    documents. If this share is less than one document, the end of the longest is held out instead:
    the same share of all characters. Some text to train on is always left.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        """Find the files.

        Raises:
            DataError: a path does not exist or has no text file, or all files are held out.
        """
        self._config, self._seed = config, seed
        self._tokenizer: bytes | None = None
        self._counts: _Counts | None = None
        self.validation_files = list(dict.fromkeys(corpus_files(config.validation)))
        held_out = {path.resolve() for path in self.validation_files}
        # no file twice, and no held-out file, which a folder in data.train may contain
        found = {path.resolve(): path for path in corpus_files(config.train)}
        self.train_files = [path for place, path in found.items() if place not in held_out]
        if not self.train_files:
            raise DataError("data.train: all files are in data.validation too; add others")

    def check(self) -> None:
        """Read every document once.

        Raises:
            DataError: a document cannot be read; the message names the file and the line.
        """
        self._count()
        for _ in documents(self.validation_files, self._config.text_key):
            pass

    def check_tokenizer(self) -> str:
        """Train the tokenizer if that takes seconds; a line for the user.

        Raises:
            DataError: the texts do not allow ``vocab_size``; or a document cannot be read.
        """
        size = f"{self._config.vocab_size:,} tokens"
        if self._count().characters > _QUICK_CHARACTERS:
            return f"tokenizer: {size} (data.vocab_size), not checked; the run trains it"
        self.tokenizer()
        return f"tokenizer: trained on these texts, {size} (data.vocab_size)"

    def tokenizer(self) -> bytes:
        """A tokenizer trained once on the documents, as ``train_tokenizer`` (DataError)."""
        if self._tokenizer is None:
            self._tokenizer = train_tokenizer(self.train(), self._config.vocab_size)
        return self._tokenizer

    def train(self) -> Iterator[str]:
        """The documents to train on (DataError)."""
        for number, text in enumerate(self._all()):
            if number == self._divided:
                yield text[: self._end_of(text)]
            elif number not in self._held_out:
                yield text

    def held_out(self) -> Iterator[str] | None:
        """The documents that are held out (DataError); None if there are none."""
        if self.validation_files:
            return documents(self.validation_files, self._config.text_key)
        if self._divided is not None:
            return (text[self._end_of(text) :] for text in self._only(self._divided.__eq__))
        if self._held_out:
            return self._only(self._held_out.__contains__)
        return None

    def describe(self) -> list[str]:
        """Lines for the user: the texts, what of them is held out, and files that are not read."""
        found, share = self._count(), f"data.validation_share {self._config.validation_share:g}"
        lines = [
            f"texts: files {len(self.train_files):,}, documents {found.documents:,},"
            f" characters {found.characters:,}"
        ]
        if self.validation_files:
            lines.append(f"held out: data.validation, files {len(self.validation_files):,}")
        elif self._divided is not None:
            lines.append(f"held out: the end of the longest document ({share})")
        elif self._held_out:
            lines.append(f"held out: {len(self._held_out):,} of these documents ({share})")
        else:
            lines.append(f"held out: nothing ({share}), so the run has no held-out loss")
        others = other_files((*self._config.train, *self._config.validation))
        if others:
            kinds = ", ".join(sorted({path.suffix or path.name for path in others})[:5])
            lines.append(f"not read: {len(others):,} of other kinds ({kinds})")
        return lines

    def _all(self) -> Iterator[str]:
        return documents(self.train_files, self._config.text_key)

    def _only(self, is_chosen: Callable[[int], bool]) -> Iterator[str]:
        return compress(self._all(), map(is_chosen, count()))

    def _count(self) -> _Counts:
        """Counts of the documents, from one pass over them in the first call (DataError)."""
        if self._counts is None:
            self._counts = self._counted()
        return self._counts

    def _counted(self) -> _Counts:
        characters, longest, longest_characters, number = 0, 0, 0, 0
        for text in self._all():
            characters += len(text)
            if len(text) > longest_characters:
                longest, longest_characters = number, len(text)
            number += 1
        return _Counts(number, characters, longest, longest_characters)

    @cached_property
    def _held_out(self) -> frozenset[int]:
        """Numbers of the training documents that are held out whole."""
        if self.validation_files:
            return frozenset()
        total = self._count().documents
        number = min(round(total * self._config.validation_share), total - 1)
        return frozenset(random.Random(self._seed).sample(range(total), number))

    @property
    def _divided(self) -> int | None:
        """Number of the document whose end is held out; None if no document is divided."""
        is_wanted = self._config.validation_share > 0 and not self.validation_files
        is_long = self._count().longest_characters >= _LEAST_DIVIDED
        if not is_wanted or self._held_out or not is_long:
            return None
        return self._count().longest

    def _end_of(self, text: str) -> int:
        """The character at which the held-out end of a document begins: a word, if there is one."""
        wanted = round(self._config.validation_share * self._count().characters)
        length = min(max(wanted, min(_LEAST_END, len(text) // 10)), len(text) // 2)
        first = len(text) - length
        return max(text.rfind(mark, first // 2, first) for mark in "\n ") + 1 or first
