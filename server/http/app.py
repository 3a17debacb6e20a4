"""The HTTP application: its routes and its middleware."""

from fastapi import FastAPI

from server.http.body_limit import BodyLimit
from server.http.errors import install_error_handlers
from server.http.generation_routes import generation_routes
from server.http.model_routes import model_routes
from server.http.service import Service
from server.http.status_routes import status_routes
from server.version import VERSION


def create_app(service: Service, max_body_bytes: int, body_timeout_s: float) -> FastAPI:
    """The application for one service. The caller attaches and detaches the engine's client."""
    app = FastAPI(title="memplus", version=VERSION)
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes, timeout_s=body_timeout_s)
    install_error_handlers(app)
    for routes in (generation_routes, model_routes, status_routes):
        app.include_router(routes(service))
    return app
