"""The embedding service: the pipeline's own encoder behind one path, so that the API's image carries no torch."""

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal, Self

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from personalization.encoder import Vectors
from personalization.schemas import VectorSpace
from personalization.settings import Settings, get_settings
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from services.api.logs import configure_logs
from services.api.metrics import Metrics
from services.api.problems import add_problem_handlers
from services.api.shell import Shell
from services.embedding.batching import BusyError
from services.embedding.encoders import MAX_TEXTS, Encoders, NotLoadedError

_BYTES_PER_CHAR = 12  # of JSON at its longest: two escapes for what is beyond the basic plane
_BYTES_BESIDE = 65_536
_RETRY_AFTER = {"Retry-After": "1"}
_RETRY_AFTER_LOADING = {"Retry-After": "5"}

router = APIRouter()


def _fits(text: str) -> str:
    most = get_settings().max_message_chars
    if len(text) > most:
        raise ValueError(f"is longer than {most:,} characters (MAX_MESSAGE_CHARS)")
    return text


class Texts(BaseModel):
    """What is to be embedded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[Annotated[str, Field(min_length=1), AfterValidator(_fits)]] = Field(min_length=1, max_length=MAX_TEXTS)
    model: str | None = Field(default=None, min_length=1, max_length=250)
    """With `dim` the vector space that is wanted; without, that of the settings."""
    dim: int | None = Field(default=None, ge=8, le=32768)

    @model_validator(mode="after")
    def _is_a_space(self) -> Self:
        if (self.model is None) != (self.dim is None):
            raise ValueError("model and dim go together")
        return self


class Embedded(BaseModel):
    """The texts' vectors, in their order."""

    model: str
    dim: int
    vectors: list[str]
    """Each the base64 of `dim` little-endian float32 numbers of unit length: exact, in a third of the size of decimal
    digits and read without parsing them; and still JSON, which a person can ask for with `curl`."""


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The model is loaded."""

    status: Literal["ready"] = "ready"
    model: str
    dim: int


@router.post("/embed")
async def embed(request: Request, wanted: Texts) -> Embedded:
    """The vectors that the pipeline would store for these texts in the wanted space, zero-padded to `dim`."""
    encoders: Encoders = request.app.state.encoders
    wants = wanted.model is not None and wanted.dim is not None
    space = VectorSpace(wanted.model, wanted.dim) if wants else encoders.own  # type: ignore[arg-type]
    try:
        vectors = await encoders.embed(space, wanted.texts)
    except NotLoadedError as error:
        raise HTTPException(503, "The model is not loaded yet.", _RETRY_AFTER_LOADING) from error
    except BusyError as error:
        raise HTTPException(503, "Too many texts wait to be embedded.", _RETRY_AFTER) from error
    return Embedded(model=space.model, dim=space.dim, vectors=_encoded(vectors))


@router.get("/health")
async def health() -> Health:
    """Whether the process is up."""
    return Health()


@router.get("/ready")
async def ready(request: Request) -> Ready:
    """Whether a model is loaded, and which was asked for last; 503 until then."""
    encoders: Encoders = request.app.state.encoders
    if (space := encoders.latest) is None:
        raise HTTPException(503, "The model is not loaded yet.", _RETRY_AFTER_LOADING)
    return Ready(model=space.model, dim=space.dim)


@router.get("/metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    told: Metrics = request.app.state.metrics
    return Response(told.page(), media_type=CONTENT_TYPE_LATEST)


def create_app(settings: Settings) -> FastAPI:
    """The app with these settings. It loads the model when its lifespan begins."""
    app = FastAPI(
        title="Embedding",
        summary="Texts to the vectors that the pipeline would make of them.",
        version="0.1.0",
        lifespan=_lifespan,
    )
    app.state.metrics = Metrics()
    app.state.encoders = Encoders(settings)
    add_problem_handlers(app)
    app.include_router(router)
    app.add_middleware(
        Shell,
        metrics=app.state.metrics,
        max_body_bytes=MAX_TEXTS * _BYTES_PER_CHAR * settings.max_message_chars + _BYTES_BESIDE,
        max_in_flight=settings.max_in_flight,
        exempt=("/health", "/ready", "/metrics"),
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    configure_logs()
    encoders: Encoders = app.state.encoders
    encoders.start(encoders.own)
    yield
    encoders.stop()


def _encoded(vectors: Vectors) -> list[str]:
    return [base64.b64encode(one.tobytes()).decode() for one in vectors.astype("<f4")]


app = create_app(get_settings())
