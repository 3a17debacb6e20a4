"""Routes that show the model's memory layers."""

from typing import Any

from fastapi import APIRouter

from engine.process import EngineLostError
from server.http.errors import ApiError
from server.http.memory_trace import table_object
from server.http.response_models import Memory
from server.http.service import Service


def memory_routes(service: Service) -> APIRouter:
    """``GET /v1/memory``."""
    router = APIRouter(tags=["memory"])

    @router.get("/v1/memory", responses={200: {"model": Memory}})
    async def memory() -> dict[str, Any]:
        """The value tables, their tiers, and how often their rows are read.

        Reads are counted in one of 16 steps.
        """
        try:
            report = await service.engine.memory_report()
        except EngineLostError as error:
            raise ApiError(503, str(error), "server_error", headers={"Retry-After": "5"}) from None
        if report.error is not None:
            raise ApiError(500, f"the value tables: {report.error}", "server_error")
        return {"object": "memory", "data": [table_object(table) for table in report.tables]}

    return router
