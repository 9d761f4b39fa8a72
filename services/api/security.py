"""Who may ask for what."""

from functools import cache
from typing import Any, Literal

from fastapi.routing import APIRoute

from services.api.problems import problems

Scope = Literal["read", "write", "erase"]


@cache
def needs(scope: Scope) -> type[APIRoute]:  # noqa: ARG001
    """The class of routes that only a key with this scope may ask: `APIRouter(route_class=needs("read"))`.

    Documents the key and 401, 403, 413, 429 and 503 with every route; a route declares its others itself.
    """

    class GuardedRoute(APIRoute):
        def __init__(self, *args: Any, **options: Any) -> None:
            options["responses"] = {**problems(401, 403, 413, 429, 503), **(options.get("responses") or {})}
            super().__init__(*args, **options)

    return GuardedRoute
