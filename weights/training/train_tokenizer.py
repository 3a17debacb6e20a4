"""A sentencepiece tokenizer made from the documents that a model will be trained on."""

import io
from collections.abc import Iterable, Iterator

import sentencepiece

from weights.errors import DataError

_LONGEST_LINE = 2048  # characters; the library passes longer ones over
_MOST_CHARACTERS = 100_000_000  # more change little, and take hours


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A serialised model: byte pairs, every byte a token, digits apart, begin and end of text.

    Text is kept as it is: nothing is normalised, and no space is put before it.

    Raises:
        DataError: there is too little text for so many tokens, or ``documents`` raised it.
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
            max_sentence_length=4 * _LONGEST_LINE,
            pad_id=-1,
            num_threads=1,  # so that the same text always gives the same tokenizer
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        raise DataError(f"vocab_size: {vocab_size} does not fit these texts ({error})") from None
    return model.getvalue()


class _Lines:
    """What the library iterates over, which makes another error of the one raised there."""

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
    left = _MOST_CHARACTERS
    for document in documents:
        for line in document.splitlines():
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]
        left -= len(document)
        if left < 0:
            return
