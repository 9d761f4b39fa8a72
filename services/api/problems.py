"""Errors as RFC 9457 `application/problem+json`. Nothing internal is told, and nothing that was sent is repeated."""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from personalization.errors import StoreError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
_RETRY_AFTER_S = 5
_TOLD = 10
"""Problems of one body that are named."""


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


_MEANINGS = {
    400: "The body is not JSON.",
    401: "No API key, or one that is not known.",
    403: "The key lacks the scope; or there are no keys, and the client is on another machine.",
    404: "There is no such thing.",
    409: "The `event_id` is that of another event.",
    410: "The user was erased; nothing of theirs is taken.",
    413: "The body is larger than MAX_BODY_BYTES.",
    422: "An id, a parameter or the body is not valid; `detail` says which.",
    429: "Too many requests with this key; try again after `Retry-After` seconds.",
    503: "Too busy, or a store does not answer; try again after `Retry-After` seconds.",
}
_PLAIN = {404: "There is nothing at this path.", 405: "This path does not take this method; `Allow` says which."}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for these statuses. The app's document brings the schema they refer to."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def add_problem_handlers(app: FastAPI) -> None:
    """Make every error of the app a problem document; what nobody foresaw is the shell's."""
    app.exception_handler(StoreError)(_store_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(HTTPException)(_http_error)


def problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """The answer of an error."""
    content = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail)
    return Response(content.model_dump_json(), status, headers, media_type=MEDIA_TYPE)


def told(errors: Iterable[Mapping[str, Any]]) -> str:
    """What pydantic found wrong, in words that repeat nothing of what was sent."""
    found = [_told(one) for one in errors]
    more = [f"and {len(found) - _TOLD} more"] if len(found) > _TOLD else []
    return "; ".join([*found[:_TOLD], *more])


async def _store_error(request: Request, error: StoreError) -> Response:
    request.scope["problem"] = str(error)  # for the request's line in the log
    detail = (
        "The embedding service does not answer, or still loads its model."
        if error.store == "embedding"
        else f"The {error.store} store does not answer, or no run has been published yet."
    )
    return problem(503, detail, {"Retry-After": str(_RETRY_AFTER_S)})


async def _validation_error(request: Request, error: RequestValidationError) -> Response:  # noqa: ARG001
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":  # as a body that no text can be read from
        return problem(400, "The body is not JSON.")
    return problem(422, told(errors))


async def _http_error(request: Request, error: HTTPException) -> Response:  # noqa: ARG001
    is_default = error.detail == HTTPStatus(error.status_code).phrase
    detail = _PLAIN.get(error.status_code, error.detail) if is_default else error.detail
    return problem(error.status_code, detail, error.headers)


def _told(error: Mapping[str, Any]) -> str:
    """Where it is and what is asked for. A name that the sender made up, or a value, is not repeated."""
    place = [str(part) for part in error["loc"][1:]] or [str(error["loc"][0])]
    message: str = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        place[-1] = "another field"
    elif error["type"] == "union_tag_invalid":
        message = f"must be one of {error['ctx']['expected_tags']}"
    return f"{'.'.join(place)}: {message}"
