"""The OpenAPI document: adds the errors of every operation in OpenAI's format."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.http.response_models import ErrorBody

_ERRORS = {
    "400": "a mistake of the caller; `param` names the field",
    "401": "the API key is missing or wrong",
    "403": "the API key may not do this, or not use this row patch",
    "404": "the model, the row patch or the endpoint does not exist",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "414": "the URL is too long",
    "415": "the body is compressed",
    "417": "an `Expect` other than `100-continue`",
    "431": "the headers are too large",
    "500": "the server failed at this request",
    "504": "the request took longer than its timeout",
    "503": "the queue is full, the server shuts down, or the engine is not running",
}
_OF_ALL = ("401", "413", "414", "415", "417", "431", "500", "503")
_OF_BODIES = ("400", "403", "404", "408", "504")
_OF_PATHS = ("400", "403", "404")


def openapi_document(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """The function that makes the document of ``app``, once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    return document


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title="memplus",
        version=app.version,
        description="Serves language models with memory layers, with OpenAI's API.",
        routes=app.routes,
        servers=app.servers,
    )
    schemas = document["components"]["schemas"]
    # FastAPI documents its own errors, which this server answers with status 400
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    error = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= error.pop("$defs") | {"ErrorBody": error}
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    # a server that was started without keys needs none
    document["security"] = [{"key": []}, {}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            statuses = {*_OF_ALL, *(_OF_PATHS if "{" in path else ())}
            statuses |= {*(_OF_BODIES if "requestBody" in operation else ())}
            for status in sorted(statuses):
                operation["responses"].setdefault(status, _error(status))
    return document


def _error(status: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ErrorBody"}
    return {
        "description": _ERRORS[status],
        "content": {"application/json": {"schema": schema}},
    }
