"""Log-probabilities as JSON: OpenAI's format for answers, vLLM's for prompts."""

from collections.abc import Iterable, Sequence
from typing import Any

from engine.sampling.params import TokenLogprobs
from weights.checkpoints.tokenizer import Tokenizer


class LogprobsWriter:
    """Writes the ``logprobs`` objects of one choice; text offsets continue across objects."""

    def __init__(self, tokenizer: Tokenizer, count: int, as_token_ids: bool) -> None:
        """Write the ``count`` likeliest tokens of each position along with its own token.

        ``as_token_ids`` writes ``token_id:7`` instead of a token's text, which can be ambiguous.
        """
        self._count = count
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids
        self._offset = 0

    def write(self, entries: Iterable[TokenLogprobs | None], first_id: int = 0) -> dict[str, Any]:
        """The object for the next tokens; ``None`` is a prompt's first token, ``first_id``."""
        tokens: list[str] = []
        offsets: list[int] = []
        own: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            tokens.append(self._name(first_id if entry is None else entry.token_id))
            offsets.append(self._offset)
            self._offset += len(tokens[-1])
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

    def _name(self, token_id: int) -> str:
        return (
            f"token_id:{token_id}" if self._as_token_ids else self._tokenizer.token_text(token_id)
        )


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
                    "decoded_token": tokenizer.token_text(token_id),
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
        text = f"token_id:{token_id}" if as_token_ids else tokenizer.token_text(token_id)
        fixed = tokenizer.token_bytes(token_id)
        data = tokenizer.token_text(token_id).encode() if fixed is None else fixed
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    content = [
        named(entry.token_id, entry.logprob)
        | {"top_logprobs": [named(*pair) for pair in entry.top[:count]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}
