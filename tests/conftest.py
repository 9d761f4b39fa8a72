"""Shared by all tests: free ports, the real stores, and settings that point at them."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from neo4j import GraphDatabase
from personalization.local.config import StackConfig
from personalization.local.stack import Stack
from personalization.settings import Settings
from pymilvus import MilvusClient
from pymongo import MongoClient
from redis import Redis

PROJECT = Path(__file__).parents[1]
SAMPLE = PROJECT / "include" / "data" / "sample_conversations.json"
SAMPLE_EVENTS = PROJECT / "include" / "data" / "sample_events.csv"


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def stack_config(folder: Path) -> StackConfig:
    """A stack of its own in `folder`, on free ports."""
    names = ("mongodb", "milvus", "neo4j", "redis", "airflow", "api", "dashboard")
    ports = {f"{name}_port": port for name, port in zip(names, free_ports(len(names)), strict=True)}
    return StackConfig(local_stack_dir=folder, **ports)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("PERSONALIZATION_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data sets are not here; PERSONALIZATION_TEST_DATA may name their folder")
    return folder


@pytest.fixture(scope="session")
def store_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The four real stores, started once a session."""
    stack = Stack(stack_config(tmp_path_factory.mktemp("stack")), only_stores=True)
    stack.start(print)
    yield stack
    stack.stop()


@pytest.fixture
def settings(store_stack: Stack, tmp_path: Path) -> Settings:
    """Settings for empty stores and folders of the test's own."""
    return empty_settings(store_stack, tmp_path)


def empty_settings(store_stack: Stack, tmp_path: Path) -> Settings:
    """Empty the stores, and name folders of the test's own."""
    settings = store_stack.config.settings(
        sqlite_path=tmp_path / "analytics.db",
        staging_uri=str(tmp_path / "staging"),
        inbox_uri=str(tmp_path / "inbox"),
        store_timeout_s=10,
    )
    empty_stores(settings)
    return settings


def empty_stores(settings: Settings) -> None:
    """Leave nothing in any of the four."""
    with MongoClient(settings.mongodb_uri.get_secret_value()) as mongo:
        mongo.drop_database(settings.mongodb_database)
    milvus = MilvusClient(uri=settings.milvus_uri)
    for collection in milvus.list_collections():
        for alias in milvus.list_aliases(collection).get("aliases", []):
            milvus.drop_alias(alias)
        milvus.drop_collection(collection)
    milvus.close()
    auth = (settings.neo4j_user, settings.neo4j_password.get_secret_value())
    with GraphDatabase.driver(settings.neo4j_uri, auth=auth) as graph:
        graph.execute_query("MATCH (n) DETACH DELETE n", database_=settings.neo4j_database)
    with Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        redis.flushdb()
