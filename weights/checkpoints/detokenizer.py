"""Incremental detokenizer: token ids to text, in whole characters."""

import codecs
from collections.abc import Sequence

from weights.checkpoints.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# tokens of context, so that the tokenizer keeps the space before the first new token
_CONTEXT = 6
# tokens at the end of the prompt that are searched for context
_PROMPT_TAIL = 64
_MAX_CHARACTER_BYTES = 4
# tokens that may wait for the rest of a character; after that they become U+FFFD
_MAX_PENDING = 16


class IncrementalDetokenizer:
    """Decodes one growing sequence.

    Tokens with context-free bytes are joined here. Other tokens are decoded together with the
    tokens before them, because a tokenizer drops the space of the first token.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], show_special: bool = False
    ) -> None:
        """Start after ``prompt_ids``, whose text is not returned.

        ``show_special`` emits the names of special tokens, which are skipped by default.
        """
        self._tokenizer = tokenizer
        self._show_special = show_special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        context: list[int] = []
        byte_run, in_run = b"", True
        for token_id in reversed(prompt_ids[-_PROMPT_TAIL:]):
            if token_id in tokenizer.special_ids:
                continue
            fixed_bytes = tokenizer.token_bytes(token_id)
            in_run = in_run and fixed_bytes is not None and len(byte_run) < _MAX_CHARACTER_BYTES
            if in_run and fixed_bytes is not None:
                byte_run = fixed_bytes + byte_run
            elif fixed_bytes is None:
                context.insert(0, token_id)
            if len(context) == _CONTEXT:
                break
        # if the prompt ends within a character, the first new tokens complete it
        self._bytes.decode(byte_run)
        # any text works as context: the new tokens must not be the first
        self._set_context(context or tokenizer.encode("a", add_special_tokens=False))

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens; return the new text that later tokens cannot change, which may be empty."""
        return "".join(map(self._push_one, ids))

    def finish(self) -> str:
        """Return the remaining text; bytes of an incomplete character become U+FFFD."""
        return self._bytes.decode(b"", final=True) + self._show(self._tokenizer.decode(self._ids))

    def _push_one(self, token_id: int) -> str:
        if token_id in self._tokenizer.special_ids:
            if not self._show_special:
                return ""
            return self.finish() + self._tokenizer.token_text(token_id)
        fixed_bytes = self._tokenizer.token_bytes(token_id)
        if fixed_bytes is not None:
            return self._bytes.decode(fixed_bytes)
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
            del self._ids[self._num_shown :]  # tokens without text are not context for others
        return new

    def _set_context(self, ids: list[int]) -> None:
        self._ids = ids
        self._num_shown = len(ids)
        self._shown = self._tokenizer.decode(ids)


def _common_prefix(shown: str, text: str) -> int:
    if text.startswith(shown):
        return len(shown)
    # the new tokens have completed a character at the end of the prompt
    pairs = zip(shown, text, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(shown), len(text)))
