"""Routes for operators: health and metrics."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from server.http.service import Service


def status_routes(service: Service) -> APIRouter:
    """``GET /health`` and ``GET /metrics``."""
    router = APIRouter(tags=["status"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """200 while the engine runs and can read its value tables; else 503 with the reason."""
        service.check_engine()
        service.check_tables()
        return {"status": "ok"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The metrics in Prometheus' text format."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    return router
