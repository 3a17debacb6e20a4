"""The HTTP application: its routes and its middleware."""

from fastapi import FastAPI
from fastapi.routing import APIRoute

from server.http.errors import install_error_handlers
from server.http.generation_routes import generation_routes
from server.http.head_requests import HeadRequests
from server.http.intake import Intake
from server.http.memory_routes import memory_routes
from server.http.model_routes import model_routes
from server.http.openapi import openapi_document
from server.http.page_routes import page_routes
from server.http.patch_routes import PatchChanges, patch_routes
from server.http.service import Service
from server.http.status_routes import status_routes
from server.version import VERSION


def create_app(
    service: Service,
    max_body_bytes: int,
    body_timeout_s: float,
    ui: bool = True,
    patch_changes: PatchChanges | None = None,
) -> FastAPI:
    """The application for one service, with the web page if ``ui`` is set.

    The caller attaches and detaches the engine's client. ``patch_changes`` loads and removes row
    patches; by default only this service does.
    """
    # FastAPI's own pages about the document load scripts from other hosts
    app = FastAPI(
        title="memplus", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    generation = generation_routes(service)
    paths = frozenset(route.path for route in generation.routes if isinstance(route, APIRoute))
    app.add_middleware(
        Intake,
        admission=service.admission,
        generating=paths,
        max_bytes=max_body_bytes,
        timeout_s=body_timeout_s,
    )
    app.add_middleware(HeadRequests)
    install_error_handlers(app)
    app.openapi = openapi_document(app)  # type: ignore[method-assign]
    app.include_router(generation)
    for routes in (model_routes, memory_routes, status_routes):
        app.include_router(routes(service))
    app.include_router(patch_routes(service, patch_changes or service.patches))
    if ui:
        app.include_router(page_routes())
    return app
