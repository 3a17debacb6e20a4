"""Log-probabilities as JSON: OpenAI's format for answers, vLLM's for prompts."""

from collections.abc import Iterable, Sequence
from typing import Any

from engine.sampling.params import TokenLogprobs
from weights.checkpoints.detokenizer import IncrementalDetokenizer
from weights.checkpoints.tokenizer import Tokenizer


class LogprobsWriter:
    """Writes the ``logprobs`` objects of one choice; text offsets continue across objects.

    An offset is the number of characters before the token's first one. Tokens without text of
    their own, such as hidden special tokens and later parts of a character, add none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        count: int,
        as_token_ids: bool,
        context_ids: Sequence[int] = (),
        show_special: bool = False,
    ) -> None:
        """Write the ``count`` likeliest tokens of each position along with its own token.

        Args:
            tokenizer: names the tokens.
            count: number of likeliest tokens.
            as_token_ids: name tokens ``token_id:7`` instead of by their texts.
            context_ids: tokens before the text that is written; empty at the beginning of a text.
            show_special: whether the text shows special tokens.
        """
        self._count = count
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._text = IncrementalDetokenizer(tokenizer, context_ids, show_special)
        self._begins_text = not context_ids
        self._offset = 0

    def write(self, entries: Iterable[TokenLogprobs | None], first_id: int = 0) -> dict[str, Any]:
        """The object for the next tokens; ``None`` is a prompt's first token, ``first_id``."""
        tokens: list[str] = []
        offsets: list[int] = []
        own: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            token_id = first_id if entry is None else entry.token_id
            tokens.append(self._name(token_id))
            offsets.append(self._offset)
            self._offset += self._num_characters(token_id)
            own.append(None if entry is None else entry.logprob)
            tops.append(None if entry is None else self._top(entry))
        return {
            "tokens": tokens,
            "token_logprobs": own,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        pairs = [*entry.top[: self._count], (entry.token_id, entry.logprob)]
        named: dict[str, float] = {}
        for token_id, logprob in pairs:
            named.setdefault(self._name(token_id), logprob)
        return named

    def _num_characters(self, token_id: int) -> int:
        text = self._text.push([token_id])
        if self._begins_text and text:
            self._begins_text = False
            if self._tokenizer.token_bytes(token_id) is None:
                # some tokens lose their space at the beginning of a text
                return len(self._tokenizer.decode([token_id]))
        return len(text)

    def _name(self, token_id: int) -> str:
        return token_name(self._tokenizer, token_id, self._as_token_ids)


def token_name(tokenizer: Tokenizer, token_id: int, as_token_id: bool) -> str:
    """The name under which clients find a token."""
    return f"token_id:{token_id}" if as_token_id else tokenizer.token_name(token_id)


def prompt_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], count: int
) -> list[dict[str, Any] | None]:
    """One entry per prompt token, null for the first: log-probability, rank and text by id."""
    positions: list[dict[str, Any] | None] = [None]
    for entry in entries:
        ranked = [
            (token_id, value, rank) for rank, (token_id, value) in enumerate(entry.top[:count], 1)
        ]
        ranked.append((entry.token_id, entry.logprob, entry.rank))
        positions.append(
            {
                str(token_id): {
                    "logprob": logprob,
                    "rank": rank,
                    "decoded_token": tokenizer.token_name(token_id),
                }
                for token_id, logprob, rank in ranked
            }
        )
    return positions


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], count: int, as_token_ids: bool
) -> dict[str, Any]:
    """OpenAI's format for chat: each token with its text, bytes and ``count`` likeliest tokens."""

    def named(token_id: int, logprob: float) -> dict[str, Any]:
        name = token_name(tokenizer, token_id, as_token_ids)
        fixed = tokenizer.token_bytes(token_id)
        data = tokenizer.token_text(token_id).encode() if fixed is None else fixed
        return {"token": name, "logprob": logprob, "bytes": list(data)}

    content = [
        named(entry.token_id, entry.logprob)
        | {"top_logprobs": [named(*pair) for pair in entry.top[:count]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}
