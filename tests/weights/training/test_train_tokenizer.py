"""Tokenizer training on documents, and its errors."""

import pytest
import sentencepiece

from weights.errors import DataError
from weights.training.train_tokenizer import train_tokenizer


def texts():
    yield from ("one red fox", "two red foxes", "12 föxes\n\n") * 20


def test_encoding_and_decoding_keep_any_text():
    model = train_tokenizer(texts(), 300)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert processor.get_piece_size() == 300
    for text in ("one red fox", "  12\n 狐", ""):
        assert processor.decode(processor.encode(text)) == text
    assert train_tokenizer(texts(), 300) == model


def test_too_little_text_for_the_vocabulary_is_an_error():
    with pytest.raises(DataError, match=r"data.vocab_size: must be at most \d+ for.*, not 9000"):
        train_tokenizer(texts(), 9000)
    with pytest.raises(DataError, match=r"data.vocab_size: must be at least \d+ for.*, not 260"):
        train_tokenizer(texts(), 260)
    with pytest.raises(DataError, match="data.train: no tokenizer can be trained on it"):
        train_tokenizer([], 300)


def test_errors_of_the_documents_are_raised_unchanged():
    def broken():
        yield "one red fox"
        raise DataError("a.jsonl, line 2: is empty")

    with pytest.raises(DataError, match=r"^a.jsonl, line 2: is empty$"):
        train_tokenizer(broken(), 300)
