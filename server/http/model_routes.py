"""Routes that describe the served model."""

from typing import Any

from fastapi import APIRouter

from server.http.service import Service


def model_routes(service: Service) -> APIRouter:
    """``GET /v1/models`` and ``GET /v1/models/{id}``."""
    router = APIRouter(tags=["model"])

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The list with the one served model."""
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The served model."""
        service.check_model(name)
        return _model(service)

    return router


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "memplus",
        "max_model_len": service.limits.max_model_len,
    }
