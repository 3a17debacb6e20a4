"""Finds the token ids by which a word can appear in a text."""

from weights.checkpoints.tokenizer import Tokenizer

# texts before a word: none, a line, a letter, a digit, a bracket, a quotation mark
_BEFORE = ("", "\n", "a", "1", "(", '"')


def word_ids(tokenizer: Tokenizer, word: str) -> list[tuple[int, ...]]:
    """The distinct id sequences of a word, and of the word after a space.

    Tokenizers write a word in several ways: at the beginning of a text, where sentencepiece adds a
    space, after a space, at the beginning of a line, and after other characters. A tokenizer that
    merges the word with the character before it has no sequence for that place.
    """
    found: dict[tuple[int, ...], None] = {}
    for before in _BEFORE:
        start = tokenizer.encode(before, add_special_tokens=False)
        for text in (word, f" {word.lstrip()}"):
            ids = tokenizer.encode(before + text, add_special_tokens=False)
            if ids[: len(start)] == start and len(ids) > len(start):
                found[tuple(ids[len(start) :])] = None
    return list(found)
