"""Errors in OpenAI's format, and the handlers that answer with them."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from engine.errors import ContextLengthError, RequestError
from server.request_id import current_request_id

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An error with the status, body and headers of its response."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = error_body(message, kind, param, code)


class OverloadedError(ApiError):
    """The queue is full."""

    def __init__(self) -> None:
        message = "too many requests are waiting; retry later"
        super().__init__(503, message, "overloaded_error", headers={"Retry-After": "1"})


class DeadlineError(ApiError):
    """The request took longer than it may."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(504, f"the request took longer than {timeout_s:g} s", "timeout_error")


class EngineError(ApiError):
    """The engine failed to process this request, or has died."""

    def __init__(self, message: str) -> None:
        super().__init__(500, _with_request_id(message), "server_error")


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception of a route with an error in OpenAI's format."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return answer(error)

    async def on_request_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        code = "context_length_exceeded" if isinstance(error, ContextLengthError) else None
        return answer(ApiError(400, str(error), param=error.param, code=code))

    async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        param, message = _first_problem(error.errors())
        return answer(ApiError(400, message, param=param))

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers else None
        return answer(ApiError(error.status_code, str(error.detail), headers=headers))

    async def on_any_error(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return answer(ApiError(500, _with_request_id("internal error"), "server_error"))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_any_error)


def _with_request_id(message: str) -> str:
    request_id = current_request_id()
    return f"{message} (request {request_id})" if request_id else message


def _first_problem(errors: Sequence[Any]) -> tuple[str | None, str]:
    problem = errors[0]
    place = [str(part) for part in problem["loc"][1:]]
    if problem["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {problem['ctx']['error']}"
    if problem["type"] == "extra_forbidden":
        return place[0], f"{'.'.join(place)}: unknown option"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if place:
        return place[0], f"{'.'.join(place)}: {message}"
    # checks of the whole body begin their messages with the field's name
    param, colon, _ = message.partition(": ")
    return param if colon and param.isidentifier() else None, message
