"""The served model and its engine, shared by all routes."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import ContextLengthError, RequestError
from engine.request import PatchRef, RequestLimits
from server.api_keys import ApiKey
from server.engine_client import EngineClient
from server.http.admission import Admission
from server.http.errors import ApiError
from server.http.grammar_checker import GrammarChecker
from server.http.metrics import Metrics
from server.http.named_patches import NamedPatch
from server.http.served_patches import ServedPatches, check_key
from server.limits import LimitOptions
from server.patch_options import PATCH_NAME
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
    patches: ServedPatches
    log_prompts: bool = False

    def patched_name(self, patch: str) -> str:
        """The name that clients give as ``model`` to use the model with this row patch."""
        return f"{self.model_name}+{patch}"

    def patch_of_model(self, name: str | None, key: ApiKey | None) -> str | None:
        """The row patch that a model's name asks for: ``MODEL+PATCH``; None without one.

        Raises:
            ApiError: 404 if that model does not exist, 403 if the key may not use the patch.
        """
        if name is None or name == self.model_name:
            return None
        prefix = self.patched_name("")
        patch = name.removeprefix(prefix)
        if name.startswith(prefix) and re.fullmatch(PATCH_NAME, patch):
            check_key(key, patch, "model")
            if patch in self.patches:
                return patch
        message = f"model: {name[:80]!r} does not exist; this server has {self.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def patches_for(
        self, model: str | None, named: Sequence[NamedPatch] | None, key: ApiKey | None
    ) -> tuple[PatchRef, ...]:
        """The row patches of a request, which names them by its model or one by one.

        Raises:
            ApiError: as ``patch_of_model`` and ``ServedPatches.refs``.
            RequestError: it does both, or names a patch that is not loaded.
        """
        patch = self.patch_of_model(model, key)
        if patch is None:
            return self.patches.refs(named, key)
        if named is not None:
            message = f"cannot be combined with the model {model!r}, which names a patch"
            raise RequestError("memory_patches", message)
        return self.patches.refs([NamedPatch(patch)], key)

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
