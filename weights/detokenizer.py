"""Token ids to text as they come, never half a character."""

from collections.abc import Sequence

from weights.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# enough context for a tokenizer to decide about the space before the first new token
_CONTEXT = 6
# a character has four bytes at most; longer runs are no text and are shown as what they are
_MAX_PENDING = 16


class IncrementalDetokenizer:
    """The text of one growing sequence.

    A token is decoded together with those before it, since a tokenizer may drop the space of a
    first token or need several tokens for one character. Joined, the pieces are the whole text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        """Start after ``prompt_ids``, whose text is not repeated."""
        self._tokenizer = tokenizer
        tail = prompt_ids[-4 * _CONTEXT :]
        self._ids = [i for i in tail if i not in tokenizer.special_ids][-_CONTEXT:]
        self._num_shown = len(self._ids)
        self._shown = tokenizer.decode(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that is now certain, perhaps none."""
        self._ids += (i for i in ids if i not in self._tokenizer.special_ids)
        pending = len(self._ids) - self._num_shown
        text = self._tokenizer.decode(self._ids)
        if not pending or (text.endswith(_REPLACEMENT) and pending <= _MAX_PENDING):
            return ""
        return self._show(text)

    def finish(self) -> str:
        """The rest, when no more tokens come: bytes of an unfinished character as U+FFFD."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        new = text[_common_prefix(self._shown, text) :]
        if new:
            self._ids = self._ids[self._num_shown :]
            self._num_shown = len(self._ids)
            self._shown = self._tokenizer.decode(self._ids)
        return new


def _common_prefix(shown: str, text: str) -> int:
    if text.startswith(shown):
        return len(shown)
    # the prompt ended within a character, which the new tokens have completed
    pairs = zip(shown, text, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(shown), len(text)))
