"""Shared by all tests: free ports, the real stores, and settings that point at them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import structlog
from neo4j import GraphDatabase
from personalization.local.config import PACKAGED_MODEL, StackConfig
from personalization.local.stack import Stack
from personalization.settings import Settings
from personalization.stores.milvus import GRPC_OPTIONS
from pydantic import SecretStr
from pymilvus import MilvusClient
from pymongo import MongoClient
from redis import Redis
from sqlalchemy import create_engine, text

# The same examples every time, and none kept: a test fails for everybody or for nobody.
hypothesis.settings.register_profile("platform", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("platform")

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
    names = ("mongodb", "milvus", "neo4j", "redis", "airflow", "api", "dashboard", "embedding")
    ports = {f"{name}_port": port for name, port in zip(names, free_ports(len(names)), strict=True)}
    return StackConfig(local_stack_dir=folder, **ports)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """A command that a test runs sends the log to its own standard error, which is closed with it."""
    yield
    structlog.reset_defaults()


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


@dataclass(frozen=True)
class EmbeddingService:
    """The embedding service as a process."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="session")
def embedding_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddingService]:
    """The embedding service with the packaged model, started once a session."""
    [port] = free_ports(1)
    log = tmp_path_factory.mktemp("embedding") / "log"
    command = [sys.executable, "-m", "uvicorn", "services.embedding.main:app", "--port", str(port)]
    env = os.environ | {"EMBEDDING_MODEL": PACKAGED_MODEL, "STORE_TIMEOUT_S": "60"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=output, stderr=subprocess.STDOUT)
    service = EmbeddingService(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_until_ready(service)
        yield service
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(service: EmbeddingService) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{service.url}/ready").is_success:
                return
        assert service.process.poll() is None, service.log.read_text()
        time.sleep(0.25)
    raise AssertionError(service.log.read_text())


@pytest.fixture
def settings(store_stack: Stack, tmp_path: Path) -> Settings:
    """Settings for empty stores and folders of the test's own."""
    return empty_settings(store_stack, tmp_path)


def empty_settings(store_stack: Stack, tmp_path: Path) -> Settings:
    """Empty the stores, and name folders of the test's own; patient, as the machine may be busy."""
    settings = store_stack.config.settings(
        sqlite_path=tmp_path / "analytics.db",
        staging_uri=str(tmp_path / "staging"),
        inbox_uri=str(tmp_path / "inbox"),
        store_timeout_s=10,
        answer_timeout_s=30,
        answer_store_timeout_s=10,
    )
    empty_stores(settings)
    return settings


def empty_stores(settings: Settings) -> None:
    """Leave nothing in any of the four."""
    with MongoClient(settings.mongodb_uri.get_secret_value()) as mongo:
        mongo.drop_database(settings.mongodb_database)
    milvus = MilvusClient(uri=settings.milvus_uri, grpc_options=GRPC_OPTIONS)
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


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of stores that hold the sample, filled once a session, which takes longer than to start more stores.

    No test that asks for it changes what they hold, but for what is cached.
    """
    folder = tmp_path_factory.mktemp("published")
    stack = Stack(stack_config(folder), only_stores=True)
    stack.start(print)
    try:
        settings = empty_settings(stack, folder)
        from personalization.pipeline.run import run_pipeline  # unit tests need none of it

        assert run_pipeline(SAMPLE, settings, with_quiet_user(folder))["status"] == "success"
        yield settings
    finally:
        stack.stop()


@asynccontextmanager
async def api_of(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app as the server runs it, with these settings."""
    from services.api.main import create_app  # most tests need no FastAPI

    app = create_app(settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://api") as client,
    ):
        yield client


class Stores:
    """What a person with a shell on each store would see."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.mongo = MongoClient(settings.mongodb_uri.get_secret_value())[settings.mongodb_database]
        self.milvus = MilvusClient(uri=settings.milvus_uri, grpc_options=GRPC_OPTIONS)
        auth = (settings.neo4j_user, settings.neo4j_password.get_secret_value())
        self.driver = GraphDatabase.driver(settings.neo4j_uri, auth=auth)
        self.redis = Redis.from_url(settings.redis_url.get_secret_value())

    def close(self) -> None:
        self.mongo.client.close()
        self.milvus.close()
        self.driver.close()
        self.redis.close()

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        engine = create_engine(f"sqlite:///{self.settings.sqlite_path}")
        with engine.connect() as connection:
            rows = [tuple(row) for row in connection.execute(text(query))]
        engine.dispose()
        return rows

    def cypher(self, query: str) -> Any:
        records = self.driver.execute_query(query, database_=self.settings.neo4j_database).records
        return records[0][0]

    def vectors(self, alias: str) -> int:
        rows = self.milvus.query(alias, filter="", output_fields=["count(*)"], consistency_level="Strong")
        return int(rows[0]["count(*)"])

    def snapshot(self) -> dict[str, Any]:
        """Every count and every derived row."""
        return {
            "messages": self.mongo.conversations.count_documents({}),
            "events": self.mongo.events.count_documents({}),
            "quarantine": self.mongo.quarantine.count_documents({}),
            "vectors": self.vectors("messages"),
            "profiles": self.vectors("users"),
            "interests": self.vectors("interests"),
            "nodes": self.cypher("MATCH (n) RETURN count(n)"),
            "edges": self.cypher("MATCH ()-[r]->() RETURN count(r)"),
            "expressed": self.cypher("MATCH ()-[e:EXPRESSED]->() RETURN sum(e.count)"),
            "engaged": self.cypher("MATCH ()-[e:ENGAGED_WITH]->() RETURN sum(e.count)"),
            "intents": self.sql("SELECT message_id, intent_id, user_id FROM message_intents ORDER BY 1"),
            "all_events": self.sql("SELECT event_id, user_id, campaign_id, event, timestamp FROM events ORDER BY 1"),
            "engagement": self.sql("SELECT * FROM user_engagement ORDER BY 1, 2"),
            "campaigns": self.sql("SELECT * FROM campaigns ORDER BY 1"),
            "generation": self.redis.get("personalization:generation"),
        }


@pytest.fixture
def stores(settings: Settings) -> Iterator[Stores]:
    stores = Stores(settings)
    yield stores
    stores.close()


def stage(summary: Any, name: str) -> dict[str, Any]:
    return next(one for one in summary["stages"] if one["stage"] == name)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def with_quiet_user(folder: Path) -> Path:
    """The sample's events, and those of `quiet`, who never said anything: a click, and a dismissal of yesterday."""
    yesterday = datetime.now(UTC) - timedelta(days=1)
    quiet = [
        "q-1,quiet,cinema_two_for_one,click,2026-11-01T09:00:00Z,,",
        f"q-2,quiet,streaming_free_month,dismiss,{yesterday.isoformat()},,",
    ]
    path = folder / "events.csv"
    path.write_text(SAMPLE_EVENTS.read_text() + "\n".join([*quiet, ""]))
    return path


def environment(settings: Settings) -> dict[str, str]:
    """The environment of a process with these settings."""
    given = {
        name.upper(): value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        for name, value in settings.model_dump(exclude_none=True).items()
    }
    return os.environ | given


def kill_after(last_words: str, settings: Settings, *arguments: str, command_name: str = "run") -> None:
    """Run `personalization run` as a process of its own, and SIGKILL it when its log says `last_words`."""
    command = [sys.executable, "-m", "personalization", command_name, *arguments]
    with subprocess.Popen(command, env=environment(settings), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if last_words in line:
                process.kill()
        assert process.wait() == -signal.SIGKILL
