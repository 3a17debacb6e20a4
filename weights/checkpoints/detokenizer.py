"""Token ids to text as they come, never half a character."""

import codecs
from collections.abc import Sequence

from weights.checkpoints.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# enough context for a tokenizer to decide about the space before the first new token
_CONTEXT = 6
# of the prompt, since it may be long
_LOOKED_AT = 64
_LONGEST_CHARACTER = 4
# tokens for one character, most of them a byte; longer runs are shown as what they are
_MAX_PENDING = 16


class IncrementalDetokenizer:
    """The text of one growing sequence.

    Tokens that stand for the same bytes in every text are put together here. Any other is decoded
    together with those before it, since a tokenizer drops the space of a first token.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], show_special: bool = False
    ) -> None:
        """Start after ``prompt_ids``, whose text is not repeated.

        ``show_special`` writes special tokens by their names, which else are no text.
        """
        self._tokenizer = tokenizer
        self._show_special = show_special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        context: list[int] = []
        byte_run, in_run = b"", True
        for token_id in reversed(prompt_ids[-_LOOKED_AT:]):
            if token_id in tokenizer.special_ids:
                continue
            own = tokenizer.token_bytes(token_id)
            in_run = in_run and own is not None and len(byte_run) < _LONGEST_CHARACTER
            if in_run and own is not None:
                byte_run = own + byte_run
            elif own is None:
                context.insert(0, token_id)
            if len(context) == _CONTEXT:
                break
        # the prompt may end within a character, which the first new tokens then complete
        self._bytes.decode(byte_run)
        # any text will do: what matters is that the new tokens are not the first
        self._set_context(context or tokenizer.encode("a", add_special_tokens=False))

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; return the text that is now certain, perhaps none."""
        return "".join(map(self._push_one, ids))

    def finish(self) -> str:
        """The rest, when no more tokens come: bytes of an unfinished character as U+FFFD."""
        return self._bytes.decode(b"", final=True) + self._show(self._tokenizer.decode(self._ids))

    def _push_one(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            if not self._show_special:
                return ""
            return self.finish() + self._tokenizer.token_text(token_id)
        own = self._tokenizer.token_bytes(token_id)
        if own is not None:
            return self._bytes.decode(own)
        unfinished = self._bytes.decode(b"", final=True)
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        pending = len(self._ids) - self._num_shown
        if text.endswith(_REPLACEMENT) and text != self._shown and pending <= _MAX_PENDING:
            return unfinished
        return unfinished + self._show(text)

    def _show(self, text: str) -> str:
        new = text[_common_prefix(self._shown, text) :]
        if new:
            self._set_context(self._ids[self._num_shown :])
        else:
            del self._ids[self._num_shown :]  # tokens without any text are no context for others
        return new

    def _set_context(self, ids: list[int]) -> None:
        self._ids = ids
        self._num_shown = len(ids)
        self._shown = self._tokenizer.decode(ids)


def _common_prefix(shown: str, text: str) -> int:
    if text.startswith(shown):
        return len(shown)
    # the prompt ended within a character, which the new tokens have completed
    pairs = zip(shown, text, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(shown), len(text)))
