"""Differences: the messages of MongoDB and the vectors of a space, compared by set, on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from personalization.audit.scratch import Scratch
from personalization.migration.scene import Scene
from personalization.schemas import VectorSpace
from personalization.stores.milvus import MESSAGES

_MISSING = "SELECT id FROM messages EXCEPT SELECT id FROM vectors"
_ORPHANS = "SELECT id FROM vectors EXCEPT SELECT id FROM messages"


@dataclass(frozen=True)
class Differences:
    """How many there are, and which."""

    scratch: Scratch
    messages: int
    vectors: int
    missing: int
    """Messages without a vector."""
    orphans: int
    """Vectors without a message."""

    def missing_pages(self, rows: int) -> Iterator[list[str]]:
        """Their ids, so many at a time."""
        return ([one for (one,) in page] for page in self.scratch.pages(_MISSING, rows=rows))

    def orphan_pages(self, rows: int) -> Iterator[list[str]]:
        """Their ids, so many at a time."""
        return ([one for (one,) in page] for page in self.scratch.pages(_ORPHANS, rows=rows))


@contextmanager
def differences(scene: Scene, space: VectorSpace) -> Iterator[Differences]:
    """Compare. Streams the ids of both once; memory does not grow with them.

    Vectors are read before messages, as audits do: a message that comes in meanwhile is missing, and no vector is an
    orphan whose message came in.
    """
    mongo, milvus = scene.stores.mongo, scene.stores.vectors
    with Scratch.open() as scratch:
        for name in ("messages", "vectors"):
            scratch.table(name, "id TEXT")
        there = ([(one["id"],) for one in page] for page in milvus.pages(space.collection(MESSAGES), ("id",)))
        vectors = scratch.fill("vectors", there)
        stored = ([(one["_id"],) for one in page] for page in mongo.pages("message", ("_id",)))
        messages = scratch.fill("messages", stored)
        counts = [scratch.rows(f"SELECT count(*) FROM ({query})")[0][0] for query in (_MISSING, _ORPHANS)]  # noqa: S608
        yield Differences(scratch, messages, vectors, *counts)
