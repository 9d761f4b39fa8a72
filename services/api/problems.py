"""Errors as RFC 9457 `application/problem+json`. Nothing internal is told; the log has it."""

from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from personalization.errors import StoreError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
_RETRY_AFTER_S = 5

log = structlog.get_logger(__name__)


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


_MEANINGS = {
    400: "The body is not JSON.",
    401: "No API key, or one that is not known.",
    403: "The API key lacks the scope, or the client may not come from there.",
    404: "There is no such thing.",
    413: "The body is larger than MAX_BODY_BYTES.",
    422: "An id, a parameter or the body is not valid; `detail` says which.",
    429: "Too many requests with this key; try again after `Retry-After` seconds.",
    500: "Something went wrong here; the log has it under the request's id.",
    503: "Too busy, or a store does not answer; try again after `Retry-After` seconds.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for these statuses. `add_problem_handlers` brings the schema they refer to."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def add_problem_handlers(app: FastAPI) -> None:
    """Make every error of the app a problem document."""
    app.exception_handler(StoreError)(_store_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_unexpected_error)


async def _store_error(request: Request, error: StoreError) -> JSONResponse:
    log.error("store error", path=request.url.path, problem=str(error))
    detail = f"The {error.store} store does not answer, or no run has been published yet."
    return _problem(HTTPStatus.SERVICE_UNAVAILABLE, detail, headers={"Retry-After": str(_RETRY_AFTER_S)})


async def _validation_error(request: Request, error: RequestValidationError) -> JSONResponse:  # noqa: ARG001
    problems = (f"{one['loc'][-1]}: {one['msg'].removeprefix('Value error, ')}" for one in error.errors())
    return _problem(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(problems))


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return _problem(HTTPStatus(error.status_code), detail, headers=error.headers)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    log.error("unexpected error", path=request.url.path, exc_info=error)
    return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong here; it has been logged.")


def _problem(status: HTTPStatus, detail: str, headers: Any = None) -> JSONResponse:
    content = Problem(title=status.phrase, status=status, detail=detail).model_dump()
    return JSONResponse(content, status, headers, media_type=MEDIA_TYPE)
