"""A TCP proxy that can be told to misbehave, and the API as a process behind such proxies, under load."""

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from conftest import PROJECT, free_ports
from personalization.settings import Settings
from pydantic import SecretStr

_AT_ONCE = 16
_PAUSE_S = 0.02
"""Between two requests of one client, so that the machine is not what is slow."""

_numbers = itertools.count()  # of requests; none asks twice what no cache shall hold


class Proxy:
    """Hands TCP connections on to a port of this machine. Lives in a thread of its own: connections outlast a test."""

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        [self.port] = free_ports(1)
        self._delay_s = 0.0
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._listen())

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Break every connection and take no new one, as where the store was stopped."""
        self._do(self._hang_up())
        try:
            yield
        finally:
            self._do(self._listen())

    @contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Hand everything on that much later."""
        self._delay_s = seconds
        try:
            yield
        finally:
            self._delay_s = 0.0

    def forget_connections(self) -> None:
        """Never hand anything on any more on what is connected now, nor tell of it, as a router that lost its table."""
        self._do(self._forget())

    def close(self) -> None:
        """Break every connection and end the thread."""
        self._do(self._hang_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for one in list(self._connections):
            one.abort()
        while self._connections:
            await asyncio.sleep(0.01)

    async def _forget(self) -> None:
        for one in self._connections:
            one.forgotten = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            above, below = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection([writer, below])
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._hand_on(reader, below, connection))
                both.create_task(self._hand_on(above, writer, connection))
        finally:
            connection.abort()
            self._connections.discard(connection)

    async def _hand_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: "_Connection"
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if connection.forgotten:
                    continue
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                writer.write(data)
                await writer.drain()
        if not connection.forgotten:
            connection.abort()


@dataclass(eq=False)
class _Connection:
    """Both ends of a connection."""

    writers: list[asyncio.StreamWriter]
    forgotten: bool = False

    def abort(self) -> None:
        for one in self.writers:
            one.transport.abort()


def behind(settings: Settings, proxies: dict[str, Proxy]) -> Settings:
    """The settings with every store behind its proxy."""
    redis, mongodb = settings.redis_url.get_secret_value(), settings.mongodb_uri.get_secret_value()
    at = {name: (f"127.0.0.1:{one.upstream_port}", f"127.0.0.1:{one.port}") for name, one in proxies.items()}
    return settings.model_copy(
        update={
            "redis_url": SecretStr(redis.replace(*at["redis"])),
            "mongodb_uri": SecretStr(mongodb.replace(*at["mongodb"])),
            "neo4j_uri": settings.neo4j_uri.replace(*at["neo4j"]),
            "milvus_port": proxies["milvus"].port,
        }
    )


@dataclass(frozen=True)
class Api:
    """The API as a process."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


@contextmanager
def running_api(settings: Settings, log: Path) -> Iterator[Api]:
    """The API in a process of its own, as soon as it is up."""
    env = {
        name.upper(): value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        for name, value in settings.model_dump(exclude_none=True).items()
    }
    [port] = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "services.api.main:app", "--port", str(port), "--no-access-log"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=PROJECT, env=os.environ | env, stdout=output, stderr=output)
    api = Api(f"http://127.0.0.1:{port}", log, process)
    try:
        deadline = time.monotonic() + 120
        while True:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{api.url}/health").is_success:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield api
    finally:
        process.terminate()
        process.wait(30)


@dataclass(frozen=True)
class Given:
    """What a request came to."""

    kind: str
    status: int
    seconds: float
    began: float
    content_type: str
    retry_after: str | None
    cache_status: str
    degraded: tuple[str, ...]


@dataclass
class Load:
    """Clients that never stop asking, and what they were given."""

    given: list[Given] = field(default_factory=list)
    health: list[Given] = field(default_factory=list)


Request = tuple[str, str, str, Any]
"""Kind, method, path and body."""


def questions(users: list[str]) -> Iterator[Request]:
    """Everything that is asked in turn: mostly recommendations, half of which no cache can hold."""
    for number, user in zip(_numbers, itertools.cycle(users)):
        at = number % 16
        if at == 3:
            asked = {"user_ids": users[:8], "exclude": [f"not_{number}"]}
            yield "batch", "POST", "/v1/recommendations:batch", asked
        elif at == 7:
            yield "profile", "GET", f"/v1/users/{user}/profile", None
        elif at == 11:
            yield "similar", "GET", f"/v1/users/{user}/similar", None
        elif at == 15:
            click = {"user_id": "clicker", "campaign_id": "weekend_city_breaks", "event": "click"}
            known_by = {"event_id": f"click-{number}", "timestamp": "2026-11-01T09:00:00Z"}
            yield "event", "POST", "/v1/events", click | known_by
        elif number % 2:
            yield "new", "GET", f"/recommendations/{user}?top={1 + number % 50}&exclude=not_{number}", None
        else:
            yield "same", "GET", f"/recommendations/{user}", None


async def ask(client: httpx.AsyncClient, request: Request) -> Given:
    """Ask once."""
    kind, method, path, body = request
    began = time.monotonic()
    response = await client.request(method, path, json=body)
    seconds = time.monotonic() - began
    degraded = response.json().get("degraded", ()) if kind in ("new", "same") else ()
    return Given(
        kind,
        response.status_code,
        seconds,
        began,
        response.headers["content-type"],
        response.headers.get("retry-after"),
        response.headers.get("cache-status", ""),
        tuple(degraded),
    )


@asynccontextmanager
async def under_load(api: Api, users: list[str]) -> AsyncIterator[Load]:
    """Many clients at once while the block runs; at its end each has its last answer."""
    load, asking, over = Load(), questions(users), asyncio.Event()

    async def go_on(given: list[Given], next_one: Callable[[], Request], pause_s: float) -> None:
        while not over.is_set():
            given.append(await ask(client, next_one()))
            await asyncio.sleep(pause_s)

    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=api.url, timeout=60, limits=limits, trust_env=False) as client,
        asyncio.TaskGroup() as clients,
    ):
        for _ in range(_AT_ONCE):
            clients.create_task(go_on(load.given, lambda: next(asking), _PAUSE_S))
        clients.create_task(go_on(load.health, lambda: ("health", "GET", "/health", None), 0.1))
        try:
            yield load
        finally:
            over.set()
