"""The encoders in this process: that of the settings, and the one that is asked for once a migration has changed it."""

import asyncio
import os
import signal
from dataclasses import dataclass

import structlog
from personalization.encoder import Encoder, Vectors
from personalization.errors import EmbeddingError
from personalization.schemas import VectorSpace
from personalization.settings import Settings

from services.embedding.batching import Batcher

MAX_TEXTS = 64
"""Texts of a request, and of a batch: what a newcomer waits for is one such batch and its own."""
MOST = 2
"""Encoders at a time; the one that was not asked for the longest makes room."""
_WAITING_TEXTS = 8 * MAX_TEXTS
_TRY_AGAIN_S = 30.0

log = structlog.get_logger(__name__)


class NotLoadedError(Exception):
    """The model is being loaded."""


@dataclass
class _Serving:
    task: "asyncio.Task[None]"
    batcher: Batcher | None = None


class Encoders:
    """Batches texts for the encoder of the space they are to be of, which is loaded when it is first asked for.

    Other models than the settings' are only loaded from this machine's disk, where the pipeline has brought them:
    whoever may ask cannot make the service fetch a model.
    """

    def __init__(self, settings: Settings) -> None:
        self.own = VectorSpace(settings.embedding_model, settings.embedding_dim)
        self._settings = settings
        self._serving: dict[VectorSpace, _Serving] = {}

    @property
    def latest(self) -> VectorSpace | None:
        """The one of those that are loaded that was asked for last."""
        loaded = [space for space, one in self._serving.items() if one.batcher is not None]
        return loaded[-1] if loaded else None

    def start(self, space: VectorSpace) -> None:
        """Load its model, if need be in the place of another one."""
        while len(self._serving) >= MOST:
            dropped = next(iter(self._serving))
            self._serving.pop(dropped).task.cancel()
            log.info("a model is let go", model=dropped.model, dim=dropped.dim)
        task = asyncio.create_task(self._serve(space))
        task.add_done_callback(_end_with)
        self._serving[space] = _Serving(task)

    def stop(self) -> None:
        """End what serves."""
        for one in self._serving.values():
            one.task.cancel()

    async def embed(self, space: VectorSpace, texts: list[str]) -> Vectors:
        """Vectors of the texts, shape (len(texts), dim).

        Raises:
            NotLoadedError: its model is being loaded, from now on if it was not before.
            BusyError: as `Batcher.embed`.
        """
        if space not in self._serving:
            self.start(space)
        serving = self._serving[space] = self._serving.pop(space)  # asked for last
        if serving.batcher is None:
            raise NotLoadedError
        return await serving.batcher.embed(texts)

    async def _serve(self, space: VectorSpace) -> None:
        """Load the model, then encode what is asked for."""
        encoder = await self._load(space)
        batcher = Batcher(
            encoder.encode,
            batch_texts=MAX_TEXTS,
            waiting_texts=_WAITING_TEXTS,
            patience_s=self._settings.store_timeout_s,
        )
        self._serving[space].batcher = batcher
        await batcher.run()

    async def _load(self, space: VectorSpace) -> Encoder:
        """The model, tried for until it can be loaded: the hub may be out of reach for a while."""
        while True:
            try:
                return await asyncio.to_thread(self._warm_encoder, space)
            except EmbeddingError as error:
                log.error("the model is not loaded", problem=str(error), again_in_s=_TRY_AGAIN_S)
                await asyncio.sleep(_TRY_AGAIN_S)

    def _warm_encoder(self, space: VectorSpace) -> Encoder:
        # Read when torch is loaded. Threads that spin while they wait for each other take ten times as long for a
        # short text where they share the cores with others.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        encoder = Encoder(space.model, space.dim, only_local=space != self.own)
        encoder.encode(["warm"])  # the first inference takes far longer than others
        return encoder


def _end_with(serving: "asyncio.Task[None]") -> None:
    """End the process with what serves, for its supervisor to see."""
    if not serving.cancelled() and (error := serving.exception()) is not None:
        log.error("the encoder ended", error=type(error).__qualname__, problem=str(error))
        signal.raise_signal(signal.SIGTERM)
