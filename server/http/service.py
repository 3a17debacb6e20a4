"""The served model and its engine, shared by all routes."""

import asyncio
from dataclasses import dataclass

from engine.errors import ContextLengthError
from engine.request import RequestLimits
from server.engine_client import EngineClient
from server.http.admission import Admission
from server.http.errors import ApiError
from server.http.grammar_checker import GrammarChecker
from server.http.metrics import Metrics
from server.limits import LimitOptions
from weights.checkpoints.chat_template import ChatTemplate
from weights.checkpoints.tokenizer import Tokenizer


@dataclass(frozen=True)
class Service:
    """One served model, with checks of requests against it."""

    model_name: str
    created: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    limits: RequestLimits
    engine: EngineClient
    admission: Admission
    metrics: Metrics
    options: LimitOptions
    grammars: GrammarChecker
    log_prompts: bool = False

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) if ``name`` is not the served model."""
        if name is not None and name != self.model_name:
            message = f"model: {name!r} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_engine(self) -> None:
        """Raise ApiError (503) if the engine is not running."""
        if not self.engine.is_alive:
            headers = {"Retry-After": "5"}
            raise ApiError(503, "the engine is not running", "server_error", headers=headers)

    def check_alive(self) -> None:
        """Raise ApiError (503) if the engine is gone for good, or a value table is lost."""
        if self.engine.is_lost:
            raise ApiError(503, "the engine is gone and no restart is left", "server_error")
        if self.engine.lost_tables:
            message = "value tables are lost: " + "; ".join(self.engine.lost_tables)
            raise ApiError(503, message, "server_error", code="table_lost")

    async def encode(
        self, text: str, add_special_tokens: bool, only_end: bool = False
    ) -> list[int]:
        """Token ids of a text.

        ``only_end`` drops the beginning of a text that is longer than any prompt can be.

        Raises:
            ContextLengthError: the text is longer than any prompt can be, without ``only_end``.
        """
        limit = self.limits.max_model_len
        longest = limit * self.tokenizer.longest_token
        if only_end:
            text = text[-longest:]
        elif len(text) > longest:
            raise ContextLengthError("prompt", f"has {len(text)} characters", limit)
        # a long text takes a while, and must not delay the tokens of other requests
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)
