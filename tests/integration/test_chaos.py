"""Stores that are stopped, paused, slow, cut off or locked under load. The API is a process of its own."""

import asyncio
import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from chaos_proxy import Api, Given, Load, Proxy, ask, behind, running_api, under_load
from conftest import SAMPLE, empty_settings, stack_config
from personalization.local.stack import Stack
from personalization.pipeline.run import run_pipeline
from personalization.settings import Settings

STORES = ("milvus", "mongodb", "neo4j", "redis")
USERS = ["maria", "filmfan82", "u-1098", "jonas.k", "agnes"]
FAULT_S = 1.0
"""At least; a fault lasts until some were answered under it."""
MARGIN_S = 8.0
"""Of a busy machine, beside the deadline that the API keeps."""
RECOVERY_S = 90.0

Fault = Callable[[str], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Stores of this file's own: it stops their processes."""
    stack = Stack(stack_config(tmp_path_factory.mktemp("stack")), only_stores=True)
    stack.start(print)
    yield stack
    stack.stop()


@pytest.fixture(scope="module")
def proxies(stack: Stack) -> Iterator[dict[str, Proxy]]:
    """One before each store."""
    proxies = {one.name: Proxy(one.port) for one in stack.services if one.port is not None}
    assert set(proxies) == set(STORES)
    yield proxies
    for one in proxies.values():
        one.close()


@pytest.fixture(scope="module")
def published(stack: Stack, proxies: dict[str, Proxy], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of an API on this machine alone, before proxied stores that hold the sample."""
    settings = empty_settings(stack, tmp_path_factory.mktemp("published"))
    assert run_pipeline(SAMPLE, settings)["status"] == "success"
    with closing(sqlite3.connect(settings.sqlite_path)) as analytics:  # in which a writer can lock readers out
        assert analytics.execute("PRAGMA journal_mode=DELETE").fetchone() == ("delete",)
    deadlines = {"answer_timeout_s": 3.0, "answer_store_timeout_s": 1.0}
    return behind(settings, proxies).model_copy(update={"api_auth": "off", **deadlines})


@pytest.fixture(scope="module")
def api(published: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One process for all tests here: nothing may take a restart."""
    with running_api(published, tmp_path_factory.mktemp("api") / "log") as api:
        yield api


@pytest.mark.parametrize("kind", ["stopped", "paused", "slow"])
async def test_a_store_at_fault_is_done_without_and_named(
    kind: str, api: Api, published: Settings, proxies: dict[str, Proxy], stack: Stack
) -> None:
    faults: dict[str, Fault] = {
        "stopped": lambda store: proxies[store].refusing(),
        "paused": partial(paused, stack),
        "slow": lambda store: proxies[store].slow(published.answer_store_timeout_s * 2),
    }
    await recovery(api)

    async with under_load(api, USERS) as load:
        for store in STORES:  # the one before recovers meanwhile
            with faults[kind](store):
                under_it = await during_fault(load)
            if store == "redis":
                assert not [one for one in under_it if "hit" in one.cache_status]
            else:
                assert not [one for one in under_it if one.kind == "new" and store not in one.degraded]
        await recovery(api)
    check(load, api, published)


async def test_connections_that_died_without_a_word_are_replaced(
    api: Api, published: Settings, proxies: dict[str, Proxy]
) -> None:
    await recovery(api)

    async with under_load(api, USERS) as load:
        for one in proxies.values():
            one.forget_connections()
        await recovery(api)
    check(load, api, published)


async def test_all_stores_may_die_and_come_back(api: Api, published: Settings, stack: Stack) -> None:
    await recovery(api)

    async with under_load(api, USERS) as load:
        family = [process for store in STORES for process in processes(stack, store)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, 30)
        under_it = await during_fault(load)
        await asyncio.to_thread(stack.start, print)
        await recovery(api)
    assert not [one for one in under_it if one.kind == "new" and not {"milvus", "mongodb", "neo4j"} <= {*one.degraded}]
    check(load, api, published)


async def test_a_locked_analytics_database_is_done_without_and_named(api: Api, published: Settings) -> None:
    await recovery(api)

    async with under_load(api, USERS) as load:
        with closing(sqlite3.connect(published.sqlite_path, isolation_level=None)) as writer:
            writer.execute("BEGIN EXCLUSIVE")
            under_it = await during_fault(load)
        await recovery(api)
    assert not [one for one in under_it if one.kind == "new" and "analytics" not in one.degraded]
    check(load, api, published)


async def test_an_api_that_starts_before_its_stores_answers_once_they_are_there(
    published: Settings, proxies: dict[str, Proxy], tmp_path: Path
) -> None:
    aside = tmp_path / "analytics.db"
    published.sqlite_path.rename(aside)
    with ExitStack() as down:
        down.callback(aside.rename, published.sqlite_path)
        for one in proxies.values():
            down.enter_context(one.refusing())
        with running_api(published, tmp_path / "log") as api:
            async with under_load(api, USERS) as load:
                await asyncio.sleep(FAULT_S)
                down.close()
                await recovery(api)
            check(load, api, published)


async def test_a_dismissal_while_redis_is_down_counts_then_and_when_it_is_back(
    api: Api, proxies: dict[str, Proxy]
) -> None:
    await recovery(api)
    path = "/recommendations/maria?top=7"

    async with httpx.AsyncClient(base_url=api.url, timeout=60, trust_env=False) as client:

        async def shown() -> list[str]:
            answer = (await client.get(path)).raise_for_status().json()
            return [one["campaign_id"] for one in answer["recommendations"]]

        first = (await shown())[0]
        assert (await client.get(path)).headers["cache-status"] == "personalization; hit"
        with proxies["redis"].refusing():
            event = {"user_id": "maria", "campaign_id": first, "event": "dismiss"}
            posted = await client.post("/v1/events", json={**event, "timestamp": datetime.now(UTC).isoformat()})
            assert posted.status_code == 202, posted.text
            assert first not in await shown()
        await recovery(api)

        assert first not in await shown()
        assert (await client.get(path)).headers["cache-status"] == "personalization; hit"
        assert first not in await shown()


def check(load: Load, api: Api, settings: Settings) -> None:
    """What holds whatever happens to the stores."""
    assert {one.status for one in load.health} == {200}
    for one in load.given:
        assert one.status in (200, 202, 503), one
        assert one.seconds < settings.answer_timeout_s + MARGIN_S, one
        if one.status == 503:
            assert one.content_type == "application/problem+json", one
            assert one.retry_after, one
    log = api.log.read_text()
    assert api.process.poll() is None, log
    for trouble in ("unexpected error", "Traceback", "never retrieved", "never awaited"):
        assert trouble not in log


async def during_fault(load: Load) -> list[Given]:
    """Let a fault that has just begun last for a while; the recommendations asked for and given under it."""
    began = time.monotonic()
    while True:
        await asyncio.sleep(FAULT_S)
        under_it = [one for one in load.given if one.began >= began and one.kind in ("new", "same")]
        if {one.kind for one in under_it if one.status == 200} == {"new", "same"}:
            return [one for one in under_it if one.status == 200]
        assert time.monotonic() - began < RECOVERY_S, under_it


async def recovery(api: Api) -> None:
    """Wait until new answers are whole for every user, and kept."""
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=api.url, timeout=60, trust_env=False) as client:
        whole = 0
        for user in itertools.cycle(USERS):
            path = f"/recommendations/{user}?exclude=not_{time.time_ns()}"
            first, second = [await ask(client, ("new", "GET", path, None)) for _ in range(2)]
            is_whole = first.status == 200 and not first.degraded and second.cache_status == "personalization; hit"
            whole = whole + 1 if is_whole else 0
            if whole == len(USERS):
                return
            told = f"{first}\n{second}\n{api.log.read_text()[-4000:]}"
            assert time.monotonic() - began < RECOVERY_S, told
            await asyncio.sleep(0 if is_whole else 0.1)


def processes(stack: Stack, store: str) -> list[psutil.Process]:
    """The store's process and those it started."""
    [state] = [one for one in stack.states() if one.name == store]
    process = psutil.Process(int(state.description.split(",")[0].removeprefix("pid ")))
    return [process, *process.children(recursive=True)]


@contextmanager
def paused(stack: Stack, store: str) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    family = processes(stack, store)
    for process in family:
        process.suspend()
    try:
        yield
    finally:
        for process in family:
            process.resume()
