"""The stores that hold something of a user, and how each is opened."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Self

from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore, analytics_store
from personalization.stores.cache import CachePublisher
from personalization.stores.milvus import VectorStore
from personalization.stores.mongo import MongoStore
from personalization.stores.neo4j import GraphStore


@dataclass(frozen=True)
class Places:
    """MongoDB, which keeps the erasures, and the others: each is opened where it is asked, as it may be down."""

    mongo: MongoStore
    vectors: Callable[[], AbstractContextManager[VectorStore]]
    graph: Callable[[], AbstractContextManager[GraphStore]]
    analytics: Callable[[], AbstractContextManager[AnalyticsStore]]
    cache: Callable[[], AbstractContextManager[CachePublisher]]
    staging_uri: str
    cache_ttl_s: int

    @classmethod
    @contextmanager
    def of(cls, settings: Settings) -> Iterator[Self]:
        """Those of the settings, on connections of their own.

        Raises:
            StoreError: the address of MongoDB is no address.
        """
        mongo = MongoStore.from_settings(settings)
        with closing(mongo.client):
            yield cls(
                mongo=mongo,
                vectors=lambda: _vectors(settings),
                graph=lambda: _graph(settings),
                analytics=lambda: analytics_store(settings),
                cache=lambda: _cache(settings),
                staging_uri=settings.staging_uri,
                cache_ttl_s=settings.cache_ttl_s,
            )


@contextmanager
def _vectors(settings: Settings) -> Iterator[VectorStore]:
    store = VectorStore.from_settings(settings)
    with closing(store.client):
        yield store


@contextmanager
def _graph(settings: Settings) -> Iterator[GraphStore]:
    store = GraphStore.from_settings(settings)
    with closing(store.driver):
        yield store


@contextmanager
def _cache(settings: Settings) -> Iterator[CachePublisher]:
    store = CachePublisher.from_settings(settings)
    with closing(store.client):
        yield store
