"""The vectors of messages: those of the run from its staged shards, the others from Milvus."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from personalization.pipeline.embed import embeddings_of
from personalization.schemas import Ref, VectorSpace
from personalization.staging import read
from personalization.stores.milvus import MESSAGES, VectorStore

_ROWS = 1000
_MOST = 200_000  # staged vectors that are kept at hand: 0.8 GB of disk where they have 1024 dimensions


class RunVectors:
    """Reads as `VectorStore.vectors` does, but asks Milvus only for what the run has not staged itself."""

    def __init__(self, vectors: VectorStore, space: VectorSpace, file: IO[bytes], staged: Sequence[Ref]) -> None:
        self._vectors = vectors
        self._collection = space.collection(MESSAGES)
        self._file = file
        self._place: dict[str, tuple[int, int]] = {}  # of a message's vector in the file, with its bytes
        self._end = 0
        for ref in staged:
            if len(self._place) + ref["rows"] > _MOST:
                break
            self._add(ref)

    def vectors(self, collection: str, ids: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield `{id, embedding}` rows of the messages that have a vector, up to 1,000 at a time."""
        if collection != self._collection:
            yield from self._vectors.vectors(collection, ids)
            return
        at_hand = [one for one in ids if one in self._place]
        for start in range(0, len(at_hand), _ROWS):
            yield [{"id": one, "embedding": self._read(one)} for one in at_hand[start : start + _ROWS]]
        yield from self._vectors.vectors(collection, [one for one in ids if one not in self._place])

    def _add(self, ref: Ref) -> None:
        """Copy a shard's vectors, so that each can be read by itself. Holds one shard in memory."""
        table = read(ref)
        matrix = embeddings_of(table)
        self._file.write(matrix.data)
        row_bytes = matrix.shape[1] * matrix.itemsize
        for row, message_id in enumerate(table.column("id").to_pylist()):
            self._place[message_id] = (self._end + row * row_bytes, row_bytes)
        self._end += matrix.nbytes

    def _read(self, message_id: str) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        at, row_bytes = self._place[message_id]
        return np.frombuffer(os.pread(self._file.fileno(), row_bytes, at), dtype=np.float32)


@contextmanager
def run_vectors(vectors: VectorStore, space: VectorSpace, staged: Sequence[Ref]) -> Iterator[RunVectors]:
    """Those of a run in `space` whose embedded shards are `staged`.

    Takes their size of temporary disk, and some 100 bytes a message.
    """
    with tempfile.TemporaryFile(buffering=0) as file:
        yield RunVectors(vectors, space, file, staged)
