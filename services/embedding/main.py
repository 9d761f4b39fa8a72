"""The embedding service: the pipeline's own encoder behind one path, so that the API's image carries no torch."""

import asyncio
import base64
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

import structlog
from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from personalization.encoder import Encoder, Vectors
from personalization.errors import EmbeddingError
from personalization.settings import Settings, get_settings
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from services.api.logs import configure_logs
from services.api.metrics import Metrics
from services.api.problems import add_problem_handlers
from services.api.shell import Shell
from services.embedding.batching import Batcher, BusyError

MAX_TEXTS = 64
"""Texts of a request, and of a batch: what a newcomer waits for is one such batch and its own."""
_WAITING_TEXTS = 8 * MAX_TEXTS
_BYTES_PER_CHAR = 12  # of JSON at its longest: two escapes for what is beyond the basic plane
_BYTES_BESIDE = 65_536
_TRY_AGAIN_S = 30.0
_RETRY_AFTER = {"Retry-After": "1"}

log = structlog.get_logger(__name__)
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
    """The vectors that the pipeline would store for these texts, zero-padded to `dim`."""
    settings: Settings = request.app.state.settings
    try:
        vectors = await _loaded(request).embed(wanted.texts)
    except BusyError as error:
        raise HTTPException(503, "Too many texts wait to be embedded.", _RETRY_AFTER) from error
    return Embedded(model=settings.embedding_model, dim=settings.embedding_dim, vectors=_encoded(vectors))


@router.get("/health")
async def health() -> Health:
    """Whether the process is up."""
    return Health()


@router.get("/ready")
async def ready(request: Request) -> Ready:
    """Whether the model is loaded; 503 until then."""
    settings: Settings = request.app.state.settings
    _loaded(request)
    return Ready(model=settings.embedding_model, dim=settings.embedding_dim)


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
    app.state.settings = settings
    app.state.metrics = Metrics()
    app.state.batcher = None
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
    serving = asyncio.create_task(_serve(app))
    serving.add_done_callback(_end_with)
    yield
    serving.cancel()


async def _serve(app: FastAPI) -> None:
    """Load the model, then encode what is asked for."""
    settings: Settings = app.state.settings
    encoder = await _load(settings)
    app.state.batcher = Batcher(
        encoder.encode,
        batch_texts=MAX_TEXTS,
        waiting_texts=_WAITING_TEXTS,
        patience_s=settings.store_timeout_s,
    )
    await app.state.batcher.run()


async def _load(settings: Settings) -> Encoder:
    """The model, tried for until it can be loaded: the hub may be out of reach for a while."""
    while True:
        try:
            return await asyncio.to_thread(_warm_encoder, settings)
        except EmbeddingError as error:
            log.error("the model is not loaded", problem=str(error), again_in_s=_TRY_AGAIN_S)
            await asyncio.sleep(_TRY_AGAIN_S)


def _warm_encoder(settings: Settings) -> Encoder:
    # Read when torch is loaded. Threads that spin while they wait for each other take ten times as long for a short
    # text where they share the cores with others.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    encoder = Encoder(settings.embedding_model, settings.embedding_dim)
    encoder.encode(["warm"])  # the first inference takes far longer than others
    return encoder


def _end_with(serving: asyncio.Task[None]) -> None:
    """End the process with what serves, for its supervisor to see."""
    if not serving.cancelled() and (error := serving.exception()) is not None:
        log.error("the encoder ended", error=type(error).__qualname__, problem=str(error))
        signal.raise_signal(signal.SIGTERM)


def _loaded(request: Request) -> Batcher:
    batcher: Batcher | None = request.app.state.batcher
    if batcher is None:
        raise HTTPException(503, "The model is not loaded yet.", _RETRY_AFTER)
    return batcher


def _encoded(vectors: Vectors) -> list[str]:
    return [base64.b64encode(one.tobytes()).decode() for one in vectors.astype("<f4")]


app = create_app(get_settings())
