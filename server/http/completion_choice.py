"""Writes the JSON objects of one choice of ``POST /v1/completions``."""

from collections.abc import Sequence
from typing import Any

from engine.sampling.params import TokenLogprobs
from server.http.completion_request import CompletionRequest
from server.http.logprobs import LogprobsWriter, prompt_logprobs
from server.http.memory_trace import memory_trace
from server.http.text_stream import TextDelta
from weights.checkpoints.tokenizer import Tokenizer


class CompletionChoice:
    """Writes the deltas of one choice; the first contains the prompt if the client asked for it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        body: CompletionRequest,
        prompt_ids: Sequence[int],
        prompt_text: str | None,
    ) -> None:
        """``prompt_text`` is the text for ``echo``; ``None`` decodes the ids instead."""
        self._tokenizer = tokenizer
        self._body = body
        self._prompt_ids = prompt_ids
        self._prompt_text = prompt_text
        self._logprobs = LogprobsWriter(
            tokenizer,
            body.logprobs or 0,
            body.return_tokens_as_token_ids,
            () if body.echo else prompt_ids,
            not body.skip_special_tokens,
        )
        self._is_first = True

    def whole(self, delta: TextDelta) -> dict[str, Any]:
        """The choice of a response that is not streamed: the same as a single chunk."""
        return self.chunk(delta)

    def chunk(self, delta: TextDelta) -> dict[str, Any]:
        """The choice of the next chunk."""
        body, first, self._is_first = self._body, self._is_first, False
        echoes = body.echo and first
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": self._echo() + delta.text if echoes else delta.text,
            "logprobs": None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if body.logprobs is not None:
            entries: list[TokenLogprobs | None] = list(delta.logprobs)
            if echoes:
                entries = [None, *delta.prompt_logprobs, *delta.logprobs]
            choice["logprobs"] = self._logprobs.write(entries, self._prompt_ids[0])
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = (
                prompt_logprobs(self._tokenizer, delta.prompt_logprobs, body.prompt_logprobs)
                if first
                else None
            )
        if body.memory_trace:
            choice["memory_trace"] = memory_trace(delta.memory_reads)
        if body.return_token_ids:
            choice["token_ids"] = delta.token_ids
            choice["prompt_token_ids"] = self._prompt_ids if first else None
        return choice

    def _echo(self) -> str:
        if self._prompt_text is not None:
            return self._prompt_text
        return self._tokenizer.decode(self._prompt_ids)
