"""Who may ask for what, and how often: API keys with scopes, and limits in memory.

Limits are counted by each process on its own: with several workers a key may ask that many times as often. A count is
one number, in memory and without threads: some microseconds.
"""

import hmac
import math
from datetime import timedelta
from functools import cache, lru_cache
from ipaddress import ip_address
from typing import Any, ClassVar, NoReturn

from fastapi import HTTPException, Response
from fastapi.routing import APIRoute
from personalization.errors import SettingsError
from personalization.keys import KeyScope, key_digest, parse_keys
from personalization.settings import Settings
from starlette.types import Receive, Scope, Send
from throttled import MemoryStore, RateLimiterType, Throttled
from throttled.rate_limiter import per_duration

from services.api.problems import problems

SCHEME = "key"
"""Name of the security scheme in the OpenAPI document."""
_FAILURES = "30/minute"
"""Refused requests of one address that are told why; those above get a 429 without a line in the log."""
_LONGEST_KEY = 256
_OF_PROXIES = frozenset(
    (b"forwarded", b"via", b"x-real-ip", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto")
)
_PERIODS = {
    "second": timedelta(seconds=1),
    "minute": timedelta(minutes=1),
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
}
_COUNTED = 10_000
"""Addresses and names that are counted at a time; the longest unseen is forgotten first. Bounds the memory."""


class Rate:
    """So many in a period: all at once, and then evenly again (GCRA)."""

    def __init__(self, limit: str) -> None:
        amount, _, period = limit.partition("/")
        self.limit = limit
        self._limiter = Throttled(
            using=RateLimiterType.GCRA.value,
            quota=per_duration(_PERIODS[period], int(amount)),
            store=MemoryStore(options={"MAX_SIZE": _COUNTED}),
        )

    def wait(self, who: str) -> float:
        """Count one; 0 if it is within the rate, else the seconds until one would be, and it is not counted."""
        found = self._limiter.limit(who)
        return found.state.retry_after if found.limited else 0.0


class Gate:
    """Lets requests in, or raises what they are told. One a process; asks no store."""

    def __init__(self, settings: Settings) -> None:
        self._off = settings.api_auth == "off"
        self._keys = parse_keys(settings.api_keys.get_secret_value())
        self._rate = Rate(settings.rate_limit)
        self._failures = Rate(_FAILURES)

    def check(self) -> None:
        """Refuse to start as an API that nobody could ask.

        Raises:
            SettingsError: it asks for keys, and knows none.
        """
        if not self._off and not self._keys:
            raise SettingsError(
                "API_KEYS is empty, so nobody could ask the API. Make a key with `python -m personalization keys new "
                "--name shop --scopes read,write` and put the line it prints into the environment. On a machine of "
                "your own API_AUTH=off asks for no key and serves that machine alone."
            )

    def admit(self, scope: Scope, needed: KeyScope) -> None:
        """Let a request in that bears a key with this scope, within its rate; the key's name is kept in the scope.

        Costs some microseconds and no round trip: a SHA-256, a comparison a key, a count.

        Raises:
            HTTPException: 401, 403 or 429, with the headers that go with them.
        """
        if self._off:
            _refuse_strangers(scope)
            return
        digest = _bearer_digest(scope)
        found = None
        for key in self._keys:  # all of them, whichever is right: the time taken tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            self._refuse(scope)
        scope["caller"] = found.name
        _count(scope, self._rate, found.name)
        if needed not in found.scopes:
            challenge = f'Bearer error="insufficient_scope", scope="{needed}"'
            raise HTTPException(403, f"This key lacks the scope `{needed}`.", {"WWW-Authenticate": challenge})

    def _refuse(self, scope: Scope) -> NoReturn:
        client = scope.get("client")
        address = client[0] if client else "-"
        _count(scope, self._failures, address)
        raise HTTPException(401, "An API key is needed: `Authorization: Bearer …`.", {"WWW-Authenticate": "Bearer"})


class GuardedRoute(APIRoute):
    """A route behind the gate, which comes before FastAPI reads the body or solves a dependency.

    Documents the key and 401, 403, 413, 429 and 503; a route declares its others itself.
    """

    needed: ClassVar[KeyScope] = "read"

    def __init__(self, *args: Any, **options: Any) -> None:
        options["responses"] = {**problems(401, 403, 413, 429, 503), **(options.get("responses") or {})}
        security = {"security": [{SCHEME: [self.needed]}]}
        options["openapi_extra"] = {**(options.get("openapi_extra") or {}), **security}
        super().__init__(*args, **options)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request for this path."""
        if scope["method"] in self.methods:
            scope["app"].state.gate.admit(scope, self.needed)
            answer = await self.at_once(scope)
            if answer is not None:
                await answer(scope, receive, send)
                return
        await super().handle(scope, receive, send)

    async def at_once(self, scope: Scope) -> Response | None:  # noqa: ARG002
        """A subclass may answer an admitted request here, without FastAPI's part of the work; None: it goes on there.

        `scope["path_params"]` and `scope["query_string"]` are as they came, so a subclass checks them itself.
        """
        return None


@cache
def needs(scope: KeyScope) -> type[GuardedRoute]:
    """The class of routes that only a key with this scope may ask: `APIRouter(route_class=needs("read"))`."""
    return type(f"{scope.title()}Route", (GuardedRoute,), {"needed": scope})


def _count(scope: Scope, rate: Rate, who: str) -> None:
    """Count a request, or raise its 429."""
    if wait := rate.wait(who):
        scope["unlogged"] = True
        raise HTTPException(429, f"More than {rate.limit}.", {"Retry-After": str(math.ceil(wait))})


def _bearer_digest(scope: Scope) -> bytes:
    """Of the key that the request bears; of nothing where it bears none, or more than one."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1 or values[0][:7].lower() != b"bearer " or len(values[0]) > _LONGEST_KEY:
        return b""
    return key_digest(values[0][7:].strip())


def _refuse_strangers(scope: Scope) -> None:
    """Without keys only this machine is served: no page of the web that a browser on it shows, and no proxy.

    Such a page may make its own name lead here (DNS rebinding), but must say that name; a proxy usually says for whom
    it asks.
    """
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        raise HTTPException(403, "Without API keys only clients on the same machine are served.")
    for name, value in scope["headers"]:
        if name == b"host" and not _is_own_name(value):
            raise HTTPException(403, "Without API keys the service is asked as `localhost`.")
        if name in _OF_PROXIES:
            raise HTTPException(403, "Without API keys no proxy is served.")


@lru_cache(maxsize=1024)
def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


@lru_cache(maxsize=1024)
def _is_own_name(host: bytes) -> bool:
    """Whether a `Host` is an address of loopback, or a name that no public DNS can hold: without a dot."""
    name = host.decode("latin-1")
    bare = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return ("." not in bare and ":" not in bare) or _is_loopback(bare)
