"""Routes for operators: liveness, readiness, version and metrics."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from server.http.authentication import key_of
from server.http.service import Service
from server.version import VERSION


def status_routes(service: Service) -> APIRouter:
    """``GET /health``, ``/ready``, ``/version`` and ``/metrics``."""
    router = APIRouter(tags=["status"])

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Liveness: 503 if only a restart of the server helps, because the engine is gone for
        good or a value table is lost."""
        service.check_alive()
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """Readiness: 503 while the server cannot answer; it loads, drains, has no engine, or has
        lost a default row patch."""
        service.check_alive()
        service.check_engine()
        service.patches.check_defaults()
        return {"status": "ready"}

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The version of memplus."""
        return {"version": VERSION}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        """The metrics in Prometheus' text format; of row patches only those that requests with
        this key may use."""
        key = key_of(request.scope)
        text = service.metrics.render() if key is None else service.metrics.render(key.may_use)
        return Response(text, media_type="text/plain; version=0.0.4")

    return router
