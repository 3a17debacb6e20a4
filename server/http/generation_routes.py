"""Routes that generate tokens."""

from fastapi import APIRouter, Request, Response

from server.http.completion_request import CompletionRequest
from server.http.completions import completion_answer
from server.http.responses import respond
from server.http.service import Service


def generation_routes(service: Service) -> APIRouter:
    """``POST /v1/completions``."""
    router = APIRouter(tags=["generation"])

    @router.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one or more prompts."""
        return await respond(request, completion_answer(service, body), body.stream)

    return router
