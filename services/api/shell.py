"""What surrounds every request: its id, the bounds of its body and of all requests at once, headers, metrics, the log.

One plain ASGI middleware: a layer for each of these would cost a cached answer more than Redis does. HSTS is left to
the proxy that speaks TLS, and CORS to Starlette's middleware, where origins are set.
"""

import os
import re
import time
import traceback
from collections.abc import Collection

import structlog
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.api.metrics import UNMATCHED, Metrics
from services.api.problems import problem

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{8,64}")
_SLOW_S = 1.0
_FRAMES = 8
_NOT_FOUND = 404
_GONE = 499
"""Status of a request that ended without an answer, as proxies call it."""
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
_HEADERS = (
    (b"cache-control", b"no-store"),  # answers are personal, and Redis is the cache
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)
_POLICY = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")

log = structlog.get_logger(__name__)


class Shell:
    """The middleware. `exempt` paths are answered however busy the process is, `pages` may load scripts."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        max_body_bytes: int,
        max_in_flight: int,
        exempt: Collection[str] = (),
        pages: Collection[str] = (),
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._max_in_flight = max_in_flight
        self._exempt = frozenset(exempt)
        self._pages = frozenset(pages)
        self._in_flight = 0
        self._busy = problem(503, "Too many requests are under way.", {"Retry-After": "1"})
        self._too_large = problem(
            413, f"The body may hold {max_body_bytes:,} bytes.", {"Connection": "close"}
        )  # or the server would go on reading it
        metrics.watch_in_flight(lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id, length = _read_head(scope)
        structlog.contextvars.bind_contextvars(request_id=request_id.decode())
        path = scope["path"]
        headers = [*_HEADERS, (b"x-request-id", request_id)]
        if path not in self._pages:
            headers.append(_POLICY)
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *headers]
            await send(message)

        self._in_flight += 1
        try:
            if self._in_flight > self._max_in_flight and path not in self._exempt:
                self._metrics.shed()
                scope["unlogged"] = True
                await self._busy(scope, receive, sending)
            elif length > self._max_body_bytes:
                await self._too_large(scope, receive, sending)
            else:
                bounded = receive if scope["method"] in _BODILESS else self._bounded(receive)
                await self._app(scope, bounded, sending)
        except Exception as error:  # noqa: BLE001 - the outermost place: what nobody foresaw is told here and goes no further
            # Not its message, nor the values in its frames: they may be what a user said.
            frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
            where = [f"{one.filename}:{one.lineno} {one.name}" for one in frames]
            log.error("unexpected error", error=type(error).__qualname__, where=where)
            if status:  # too late for an answer; the server closes the connection
                raise RuntimeError("the answer broke off") from None
            failed = problem(500, f"Something went wrong here; the log has it under {request_id.decode()}.")
            await failed(scope, receive, sending)
        finally:
            self._in_flight -= 1
            self._tell(scope, status or _GONE, time.perf_counter() - started)

    def _bounded(self, receive: Receive) -> Receive:
        """Count the bytes of a body that did not say its length, or lied."""
        taken = 0

        async def receiving() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body_bytes:
                raise HTTPException(413, f"The body may hold {self._max_body_bytes:,} bytes.", {"Connection": "close"})
            return message

        return receiving

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED)
        if status == _NOT_FOUND and route == UNMATCHED:  # without the path it would tell nothing
            scope["unlogged"] = True
        self._metrics.request(route, scope["method"], status, seconds)
        if (status >= 400 or seconds > _SLOW_S) and "unlogged" not in scope:
            tell = log.warning if status >= 500 or seconds > _SLOW_S else log.info
            client = scope.get("client")
            tell(
                "request",
                method=scope["method"] if route != UNMATCHED else "",
                route=route,
                status=status,
                seconds=round(seconds, 4),
                caller=scope.get("caller"),
                client=client[0] if client else None,
                **({"problem": scope["problem"]} if "problem" in scope else {}),
            )


def _read_head(scope: Scope) -> tuple[bytes, int]:
    """The request's id, the client's where it is one, and the length its body claims; 0 where it claims none."""
    request_id, length = b"", 0
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            if _REQUEST_ID.fullmatch(value):
                request_id = value
        elif name == b"content-length" and value.isdigit():
            length = int(value[:20])
    return request_id or os.urandom(12).hex().encode(), length
