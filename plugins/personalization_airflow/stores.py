"""The platform's stores, with clients from the Airflow connections `*_default`."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from airflow.providers.mongo.hooks.mongo import MongoHook
from airflow.providers.neo4j.hooks.neo4j import Neo4jHook
from airflow.providers.redis.hooks.redis import RedisHook
from personalization.erasure.places import Places
from personalization.settings import Settings
from personalization.stores.analytics import analytics_store
from personalization.stores.cache import CachePublisher, VectorCache
from personalization.stores.milvus import VectorStore, milvus_errors
from personalization.stores.mongo import MongoStore, mongo_errors
from personalization.stores.neo4j import GraphStore, neo4j_errors
from personalization.stores.together import Stores

from personalization_airflow.milvus import MilvusHook


@contextmanager
def mongo_store(settings: Settings) -> Iterator[MongoStore]:
    """MongoDB by `mongo_default`; its schema names the database."""
    with mongo_errors():
        hook = MongoHook()
        client = hook.get_conn()
    with closing(client):
        yield MongoStore(client, hook.connection.schema or settings.mongodb_database)


@contextmanager
def vector_store() -> Iterator[VectorStore]:
    """Milvus by `milvus_default`."""
    with milvus_errors():
        client = MilvusHook().get_conn()
    with closing(client):
        yield VectorStore(client)


@contextmanager
def graph_store(settings: Settings) -> Iterator[GraphStore]:
    """Neo4j by `neo4j_default`; its schema names the database."""
    hook = Neo4jHook()
    with neo4j_errors():
        driver = hook.get_conn()
    with closing(driver):
        yield GraphStore(driver, hook.connection.schema or settings.neo4j_database)


@contextmanager
def cache_publisher() -> Iterator[CachePublisher]:
    """Redis by `redis_default`."""
    with closing(RedisHook().get_conn()) as client:  # type: ignore[no-untyped-call]
        yield CachePublisher(client)


@contextmanager
def vector_cache(settings: Settings) -> Iterator[VectorCache]:
    """The vectors of texts that were met before, in the same Redis."""
    with cache_publisher() as publisher:
        yield VectorCache(publisher.client, settings.vector_cache_days)


@contextmanager
def all_stores(settings: Settings) -> Iterator[Stores]:
    """All five."""
    with ExitStack() as stack:
        yield Stores(
            mongo=stack.enter_context(mongo_store(settings)),
            vectors=stack.enter_context(vector_store()),
            graph=stack.enter_context(graph_store(settings)),
            analytics=stack.enter_context(analytics_store(settings)),
            cache=stack.enter_context(cache_publisher()),
        )


@contextmanager
def places(settings: Settings) -> Iterator[Places]:
    """All that hold something of a user; only MongoDB is opened at once."""
    with mongo_store(settings) as mongo:
        yield Places(
            mongo=mongo,
            vectors=vector_store,
            graph=lambda: graph_store(settings),
            analytics=lambda: analytics_store(settings),
            cache=cache_publisher,
            staging_uri=settings.staging_uri,
            cache_ttl_s=settings.cache_ttl_s,
        )
