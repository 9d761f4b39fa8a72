"""An app with everything but its routes and stores: gate, shell, problems, metrics, and the document of all this."""

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from personalization.settings import Settings
from starlette.types import Lifespan

from services.api.metrics import Metrics
from services.api.problems import Problem, add_problem_handlers
from services.api.security import SCHEME, Gate
from services.api.shell import Shell

EXEMPT = ("/health", "/v1/health", "/v1/ready", "/v1/metrics")
"""Paths that are answered however busy the process is."""
_PAGES = ("/docs", "/redoc")


def base_app(settings: Settings, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The app; `state` holds `settings`, `gate` and `metrics`.

    Raises:
        SettingsError: API_KEYS cannot be read.
    """
    off = settings.api_auth == "off"
    docs, redoc = _PAGES if off else (None, None)  # they load scripts from elsewhere
    app = FastAPI(
        title="Personalization Platform",
        summary="Which campaigns are worth showing to a user, and why.",
        version="0.1.0",
        lifespan=lifespan,
        docs_url=docs,
        redoc_url=redoc,
        generate_unique_id_function=_operation_id,
        redirect_slashes=False,  # an id that ends with one is none, and no place to be sent to
    )
    app.state.settings = settings
    app.state.gate = Gate(settings)
    app.state.metrics = Metrics()
    add_problem_handlers(app)
    if origins := [one.strip() for one in settings.cors_origins.split(",") if one.strip()]:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
    app.add_middleware(
        Shell,
        metrics=app.state.metrics,
        max_body_bytes=settings.max_body_bytes,
        max_in_flight=settings.max_in_flight,
        exempt=EXEMPT,
        pages=_PAGES if off else (),
    )
    _complete_document(app, with_keys=not off)
    return app


def _operation_id(route: APIRoute) -> str:
    """The function's name: links refer to it, and generated clients call their methods so."""
    return route.name if route.path.startswith("/v1/") else f"{route.name}_unversioned"


def _complete_document(app: FastAPI, *, with_keys: bool) -> None:
    """Add to the OpenAPI document what the routes only refer to; no key where none is asked for."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = app.openapi_schema
        if document is None:
            document = plain()
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).setdefault("Problem", Problem.model_json_schema())
            if with_keys:
                components["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer"}}
            else:
                for operation in (one for path in document["paths"].values() for one in path.values()):
                    operation.pop("security", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
