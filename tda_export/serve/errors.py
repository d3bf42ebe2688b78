"""Errors in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

INVALID = "invalid_request_error"
SERVER = "server_error"

logger = logging.getLogger(__name__)


class ApiError(HTTPException):
    """An answer other than success.

    Args:
        status: The HTTP status.
        message: What is wrong, and the way out.
        param: The request's field that is wrong.
        code: A code by which programs distinguish errors.
        retry_after: Seconds after which a retry makes sense.
        headers: Headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # JSON can spell lone surrogates, which requests may hold and UTF-8 cannot encode.
        message = message.encode(errors="backslashreplace").decode()
        retry = {} if retry_after is None else {"Retry-After": str(retry_after)}
        super().__init__(status, message, {**(headers or {}), **retry})
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """Return the error in the API's shape."""
        kind = SERVER if self.status_code >= 500 else INVALID
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status_code, self.headers)


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Make the error for a request that is invalid."""
    return ApiError(400, message, param=param, code=code)


def internal() -> ApiError:
    """Make the error for a failure that only the log explains."""
    return ApiError(500, "The server failed. Its log says why.", code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Make an app report every failure in the API's shape."""

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error.response()
        url = f"{request.method} {request.url.path}"
        codes = {404: ("unknown_url", f"Unknown URL: {url}."), 405: ("method_not_supported", f"Not supported: {url}.")}
        code, message = codes.get(error.status_code, (None, str(error.detail)))
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return (malformed(error) if _is_json(request) else not_json()).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return internal().response()


def not_json() -> ApiError:
    """Make the error for a body that is not declared as JSON.

    Pages of other sites can send some such types (text/plain, forms) without a CORS preflight, so none is accepted.
    """
    return invalid(
        "The body is not a request: it does not say that it is JSON. Add the header: -H 'Content-Type: "
        "application/json'.",
        code="unsupported_content_type",
    )


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind.startswith("application/") and kind.endswith(("/json", "+json"))


def malformed(error: RequestValidationError) -> ApiError:
    """Turn the first of pydantic's errors into the API's error."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return invalid(f"The body is not valid JSON: {first['ctx']['error']}.", code="invalid_json")
    param = parameter(first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return invalid(
        f"{param}: {message}." if param else f"The body is not a request: {message}.",
        param=param,
        code="missing_required_parameter" if first["type"] == "missing" else "invalid_value",
    )


def parameter(location: tuple[int | str, ...]) -> str | None:
    """Return the path of a field in the body, such as `messages[0].role`."""
    name = ""
    for part in location[1:]:  # after "body"
        if part in ("str", "int") or str(part).startswith("list["):
            break  # pydantic's name of one of the types that a field may have
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name or None
