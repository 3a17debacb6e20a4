"""Routes that describe the served model."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.errors import RequestError
from server.http.authentication import key_of
from server.http.chat import chat_prompt
from server.http.errors import ApiError
from server.http.json_text import large_json_text
from server.http.response_models import Detokenized, Model, ModelList, Tokens
from server.http.service import Service
from server.http.tokenize_request import DetokenizeRequest, TokenizeRequest


def model_routes(service: Service) -> APIRouter:
    """The model's description and its tokenizer."""
    router = APIRouter(tags=["model"])

    @router.get("/v1/models", responses={200: {"model": ModelList}})
    async def models(request: Request) -> dict[str, Any]:
        """The served model, also with each loaded row patch."""
        patched = service.patches.of_key(key_of(request.scope))
        models = [_model(service), *(_model(service, one.name) for one in patched)]
        return {"object": "list", "data": models}

    @router.get("/v1/models/{name:path}", responses={200: {"model": Model}})
    async def model(name: str, request: Request) -> dict[str, Any]:
        """The served model, maybe with a row patch: ``MODEL+PATCH``."""
        return _model(service, service.patch_of_model(name, key_of(request.scope)))

    @router.post("/tokenize", response_model=None, responses={200: {"model": Tokens}})
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """Token ids of a text or of a conversation."""
        service.patch_of_model(body.model, key_of(request.scope))
        if body.prompt is None:
            ids = list(await chat_prompt(service, body))
        else:
            ids = await service.encode(body.prompt, body.add_special_tokens)

        def written() -> str:
            limit = service.limits.max_model_len
            answer: dict[str, Any] = {"count": len(ids), "max_model_len": limit, "tokens": ids}
            if body.return_token_strs:
                names = [service.tokenizer.token_name(token_id) for token_id in ids]
                answer["token_strs"] = names
            return large_json_text(answer)

        # many tokens take a while, and must not delay the tokens of other requests
        return Response(await asyncio.to_thread(written), media_type="application/json")

    @router.post("/detokenize", responses={200: {"model": Detokenized}})
    async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, Any]:
        """The text of token ids."""
        service.patch_of_model(body.model, key_of(request.scope))
        limit = service.limits.max_model_len
        if len(body.tokens) > limit:
            raise RequestError("tokens", f"at most {limit} token ids, not {len(body.tokens)}")
        return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}

    @router.post("/v1/embeddings", include_in_schema=False)
    @router.post("/v1/score", include_in_schema=False)
    async def unsupported() -> None:
        """Refused: the server generates text, and computes no embeddings or similarities."""
        message = "this server generates text; it has no embeddings and no similarity scores"
        raise ApiError(404, message, code="unsupported_endpoint")

    return router


def _model(service: Service, patch: str | None = None) -> dict[str, Any]:
    """The model, or the model with a row patch, as vLLM describes an adapter."""
    name = service.model_name
    return {
        "id": name if patch is None else service.patched_name(patch),
        "object": "model",
        "created": service.created if patch is None else service.patches[patch].created,
        "owned_by": "memplus",
        "root": name,
        "parent": None if patch is None else name,
        "max_model_len": service.limits.max_model_len,
        "has_chat_template": service.chat_template is not None,
    }
