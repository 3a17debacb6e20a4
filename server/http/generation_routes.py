"""Routes that generate tokens."""

import logging
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from server.http.authentication import key_of
from server.http.chat import chat_answer
from server.http.chat_request import ChatRequest
from server.http.completion_request import CompletionRequest
from server.http.completions import completion_answer
from server.http.response_models import ChatCompletion, Completion
from server.http.responses import respond
from server.http.service import Service

logger = logging.getLogger(__name__)
_COMPLETIONS, _CHAT = GENERATION_PATHS = ("/v1/completions", "/v1/chat/completions")
# characters of a logged prompt
_MAX_LOGGED = 4096


def generation_routes(service: Service) -> APIRouter:
    """``POST /v1/completions`` and ``POST /v1/chat/completions``."""
    router = APIRouter(tags=["generation"])

    def note(body: CompletionRequest | ChatRequest) -> None:
        if service.log_prompts:
            prompt = body.model_dump_json(include={"prompt", "messages"}, exclude_none=True)
            logger.info("prompt: %s", prompt[:_MAX_LOGGED])

    @router.post(_COMPLETIONS, response_model=None, responses=_either(Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        note(body)
        key = key_of(request.scope)
        return await respond(request, completion_answer(service, body, key), body.stream)

    @router.post(_CHAT, response_model=None, responses=_either(ChatCompletion))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        note(body)
        key = key_of(request.scope)
        return await respond(request, chat_answer(service, body, key), body.stream)

    return router


def _either(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Documents a response that is whole, or a stream of events."""
    data = {"type": "string", "description": "a chunk as JSON; the last is `[DONE]`"}
    stream = {
        "type": "object",
        "description": "server-sent events, if `stream` is true",
        "properties": {"data": data},
    }
    return {
        200: {
            "model": whole,
            "description": "the answers",
            "content": {"text/event-stream": {"schema": stream}},
        }
    }
