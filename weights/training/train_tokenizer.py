"""Trains a sentencepiece tokenizer on documents."""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

from weights.errors import DataError

_MAX_LINE = 2048  # characters; the library skips longer lines
_MAX_CHARACTERS = 100_000_000  # more text takes hours and changes little


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A serialised BPE model with byte fallback, single digits, and begin and end tokens.

    Text is not normalised, and no space is added before it.

    Raises:
        DataError: the text is too short for ``vocab_size``, or ``documents`` raised it.
    """
    model = io.BytesIO()
    lines = _Lines(documents)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            max_sentence_length=4 * _MAX_LINE,
            pad_id=-1,
            num_threads=1,  # for a reproducible tokenizer
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        raise DataError(f"data.vocab_size: {vocab_size} does not fit the texts ({error})") from None
    return model.getvalue()


class _Lines:
    """Iterator for the library, which hides exceptions: keeps a DataError to raise it again."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._lines = _lines(documents)
        self.error: DataError | None = None

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        try:
            return next(self._lines)
        except DataError as error:
            self.error = error
            raise


def _lines(documents: Iterable[str]) -> Iterator[str]:
    left = _MAX_CHARACTERS
    for document in documents:
        for line in document.splitlines():
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]
        left -= len(document)
        if left < 0:
            return
