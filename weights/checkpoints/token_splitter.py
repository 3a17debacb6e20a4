"""Finds the names of added tokens in a text, exactly as the tokenizers library does."""

from collections.abc import Iterator, Mapping

from tokenizers import AddedToken, Tokenizer, models

_TEXT = ""


class TokenSplitter:
    """Splits texts at the names of tokens, and at white space that a token takes with it."""

    def __init__(self, tokens: Mapping[int, AddedToken]) -> None:
        self._names = tuple(token.content for token in tokens.values())
        # a vocabulary of one word, which stands for any text between names
        self._tokenizer = Tokenizer(models.WordLevel({_TEXT: 0}, unk_token=_TEXT))
        self._tokenizer.add_tokens(list(tokens.values()))
        places = (self._tokenizer.token_to_id(name) for name in self._names)
        self._ids = dict(zip(places, tokens, strict=True))

    def split(self, text: str) -> Iterator[int | str]:
        """The ids of the names in a text, and the parts between them, in order."""
        if not any(name in text for name in self._names):
            if text:
                yield text
            return
        # encode_batch releases the GIL, encode does not
        (found,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        for place, (start, end) in zip(found.ids, found.offsets, strict=True):
            yield self._ids[place] if place else text[start:end]
