"""Who may see the dashboard: whoever has the password, or, where none is asked for, this machine alone."""

import asyncio
import hashlib
import hmac
from html import escape
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, urlsplit

from itsdangerous import BadSignature, TimestampSigner
from personalization.errors import SettingsError
from personalization.settings import Settings
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from streamlit import config, context

COOKIE = "personalization_dashboard"
LOGIN, LOGOUT = "/login", "/logout"
OPEN = frozenset(("/_stcore/health",))
"""For probes."""

_SECONDS = 12 * 3600
_WRONG_S = 1.0
_WAITING = 20
_LONGEST = 4096
_PAGE = Path(__file__).with_name("login.html").read_text(encoding="utf-8")

_guarded = False


class Login:
    """ASGI middleware that shows its own page to whoever has no session, before any of Streamlit's code.

    A session is a signed cookie that ends after 12 hours, or with the password. One wrong password a second is
    answered, whoever asks; guesses that would have to wait long are refused.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._password = settings.dashboard_password.get_secret_value()
        self._signer = TimestampSigner(self._password, salt=COOKIE, digest_method=hashlib.sha256)
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what has a session."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        if scope["type"] == "websocket":
            if self._has_session(connection):
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        answer = await self._answer(Request(scope, receive))
        await (answer or self._app)(scope, receive, send)

    async def _answer(self, request: Request) -> Response | None:
        """None where Streamlit is to answer."""
        path = request.url.path
        if path == LOGOUT:
            leave = RedirectResponse(LOGIN, status_code=303)
            leave.delete_cookie(COOKIE)
            return leave
        if path == LOGIN:
            return await self._log_in(request) if request.method == "POST" else _page(request)
        if self._has_session(request):
            return None
        if "text/html" in request.headers.get("accept", ""):
            target = quote(path + (f"?{request.url.query}" if request.url.query else ""), safe="")
            return RedirectResponse(f"{LOGIN}?next={target}", status_code=303)
        return PlainTextResponse("Log in first.", status_code=401)

    async def _log_in(self, request: Request) -> Response:
        origin = request.headers.get("origin")
        if origin not in (None, "null") and urlsplit(origin).netloc != request.headers.get("host"):
            return PlainTextResponse("Log in on the dashboard's own page.", status_code=403)
        if int(request.headers.get("content-length") or _LONGEST + 1) > _LONGEST:
            return PlainTextResponse("That is no password.", status_code=413)
        if self._waiting >= _WAITING:
            return PlainTextResponse("Too many try to log in. Wait a little.", status_code=429)
        async with request.form(max_files=0, max_fields=2) as form:
            given = str(form.get("password", ""))
        self._waiting += 1
        try:
            async with self._turn:
                if not hmac.compare_digest(_digest(given), _digest(self._password)):
                    await asyncio.sleep(_WRONG_S)
                    return _page(request, wrong=True)
        finally:
            self._waiting -= 1
        enter = RedirectResponse(_own_path(request.query_params.get("next", "/")), status_code=303)
        enter.set_cookie(
            COOKIE,
            self._signer.sign("in").decode(),
            max_age=_SECONDS,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
        return enter

    def _has_session(self, connection: HTTPConnection) -> bool:
        try:
            self._signer.unsign(connection.cookies.get(COOKIE, ""), max_age=_SECONDS)
        except BadSignature:
            return False
        return True


def guard(settings: Settings) -> bool:
    """Whether a password is to be asked for.

    Raises:
        SettingsError: nobody could log in, or everybody could look.
    """
    global _guarded
    if settings.dashboard_auth == "off":
        if not _is_loopback(config.get_option("server.address")):
            raise SettingsError(
                "DASHBOARD_AUTH=off serves this machine alone: add `--server.address 127.0.0.1`, or set a "
                "DASHBOARD_PASSWORD and leave DASHBOARD_AUTH out."
            )
        return False
    if not settings.dashboard_password.get_secret_value():
        raise SettingsError(
            "DASHBOARD_PASSWORD is empty, so nobody could log in: set one, such as `openssl rand -hex 24`. On a "
            "machine of your own DASHBOARD_AUTH=off asks for none and serves that machine alone."
        )
    _guarded = True
    return True


def is_guarded() -> bool:
    """Whether this process asks for a password."""
    return _guarded


def is_open_to_others() -> bool:
    """Whether somebody on another machine looks without a password, as after another command than the documented."""
    try:
        return not _guarded and not ip_address(context.ip_address or "127.0.0.1").is_loopback
    except ValueError:  # tests run the pages without a server
        return False


def _is_loopback(address: str | None) -> bool:
    try:
        return address == "localhost" or ip_address(address or "0.0.0.0").is_loopback  # noqa: S104 - what none means
    except ValueError:
        return False


def _digest(password: str) -> bytes:
    return hashlib.sha256(password.encode("utf-8", "surrogatepass")).digest()


def _own_path(target: str) -> str:
    """The target, if it is a path of this server; its start page otherwise."""
    is_own = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    return target if is_own else "/"


def _page(request: Request, wrong: bool = False) -> Response:
    target = quote(_own_path(request.query_params.get("next", "/")), safe="")
    told = '<p role="alert">This is not the password.</p>' if wrong else ""
    content = _PAGE.replace("{{action}}", escape(f"{LOGIN}?next={target}")).replace("{{told}}", told)
    page = HTMLResponse(content, status_code=401 if wrong else 200)
    headers = MutableHeaders(raw=page.raw_headers)
    headers["cache-control"] = "no-store"
    headers["content-security-policy"] = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'"
    headers["x-frame-options"] = "DENY"
    return page
