"""The embedding service: vectors of texts that came in with a request, as the pipeline would make them."""

import base64
from collections.abc import Sequence

import httpx
import numpy as np
import structlog

from personalization.errors import StoreError
from personalization.schemas import VectorSpace
from personalization.settings import Settings

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]

_STORE = "embedding"


class AsyncEmbedder:
    """The service's client. No error of it holds a text."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    @classmethod
    def from_settings(cls, settings: Settings) -> "AsyncEmbedder":
        """Connect lazily, and keep connections."""
        try:
            # No proxy: the service is beside whoever asks.
            client = httpx.AsyncClient(
                base_url=settings.embedding_url, timeout=settings.store_timeout_s, trust_env=False
            )
        except httpx.InvalidURL as error:
            raise StoreError(_STORE, "EMBEDDING_URL is not a valid address") from error
        return cls(client)

    async def embed(self, texts: Sequence[str], *, space: VectorSpace | None = None) -> Vectors:
        """Unit vectors of 1 to 64 texts, shape (len(texts), dim), float32, of a space, or of the service's own. One
        round trip.

        Raises:
            StoreError: the service does not answer, is busy, still loads the model, refuses the texts, or answers with
                vectors of another space: those of two never mix.
        """
        headers = {}
        asked = {"texts": list(texts), **(space._asdict() if space is not None else {})}
        if request_id := structlog.contextvars.get_contextvars().get("request_id"):
            headers["x-request-id"] = str(request_id)
        try:
            response = await self.client.post("/embed", json=asked, headers=headers)
        except httpx.HTTPError as error:
            raise StoreError(_STORE, f"does not answer ({type(error).__name__}); is it running?") from error
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise StoreError(_STORE, "is busy, or its model is not loaded yet")
        if response.is_error:
            raise StoreError(_STORE, f"refused the texts with {response.status_code}")
        try:
            answer = response.json()
            own, dim = str(answer["model"]), int(answer["dim"])
            rows = [np.frombuffer(base64.b64decode(one), dtype="<f4") for one in answer["vectors"]]
            vectors = np.stack(rows).astype(np.float32).reshape(len(texts), dim)
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(_STORE, "does not answer with vectors; does EMBEDDING_URL name the service?") from error
        if space not in (None, VectorSpace(own, dim)):
            raise StoreError(_STORE, "made vectors of another space than was asked for; is it of another version?")
        return vectors

    async def ping(self) -> None:
        """One round trip. Raises `StoreError` if the service does not answer, or cannot embed yet."""
        try:
            response = await self.client.get("/ready")
        except httpx.HTTPError as error:
            raise StoreError(_STORE, f"does not answer ({type(error).__name__}); is it running?") from error
        if response.is_error:
            raise StoreError(_STORE, "is not ready; its model is not loaded yet")

    async def aclose(self) -> None:
        """Close the connections."""
        await self.client.aclose()
