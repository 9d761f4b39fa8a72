"""The five stores together."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Self

from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore, analytics_store
from personalization.stores.cache import CachePublisher
from personalization.stores.milvus import VectorStore
from personalization.stores.mongo import MongoStore
from personalization.stores.neo4j import GraphStore


@dataclass(frozen=True)
class Stores:
    """What the stages of a run read and write."""

    mongo: MongoStore
    vectors: VectorStore
    graph: GraphStore
    analytics: AnalyticsStore
    cache: CachePublisher

    @classmethod
    @contextmanager
    def of(cls, settings: Settings) -> Iterator[Self]:
        """Those of the settings, closed behind the block.

        Raises:
            StoreError: Milvus does not answer, or an address is none.
        """
        with ExitStack() as stack:
            mongo = MongoStore.from_settings(settings)
            stack.enter_context(closing(mongo.client))
            vectors = VectorStore.from_settings(settings)
            stack.enter_context(closing(vectors.client))
            graph = GraphStore.from_settings(settings)
            stack.enter_context(closing(graph.driver))
            analytics = stack.enter_context(analytics_store(settings))
            cache = CachePublisher.from_settings(settings)
            stack.enter_context(closing(cache.client))
            yield cls(mongo, vectors, graph, analytics, cache)
