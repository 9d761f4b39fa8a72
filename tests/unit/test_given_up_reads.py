"""Reads of the analytics database that nobody waits for any more."""

import asyncio
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore, AsyncAnalyticsReader


async def give_up_after(seconds: float, path: Path) -> None:
    reader = AsyncAnalyticsReader.from_settings(Settings(_env_file=None, sqlite_path=path))
    read = asyncio.create_task(reader.learned_at())
    await asyncio.sleep(seconds)
    read.cancel()
    with suppress(asyncio.CancelledError):
        await read
    await reader.aclose()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def give_up_while_a_connection_opens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, may_open = threading.Event(), threading.Event()
    plain = sqlite3.connect

    def slow_disk(*args: Any, **options: Any) -> sqlite3.Connection:
        opening.set()
        assert may_open.wait(60)
        return plain(*args, **options)

    monkeypatch.setattr(sqlite3, "connect", slow_disk)
    reader = AsyncAnalyticsReader.from_settings(Settings(_env_file=None, sqlite_path=path))
    read = asyncio.create_task(reader.learned_at())
    assert await asyncio.to_thread(opening.wait, 60)
    read.cancel()
    with suppress(asyncio.CancelledError):
        await read
    closing = asyncio.create_task(reader.aclose())
    await asyncio.wait([closing], timeout=0.1)
    waits = not closing.done()
    may_open.set()
    await closing
    assert waits  # or aiosqlite's thread would tell a loop that is closed by then
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_connection_that_was_just_being_opened_is_closed_before_the_loop_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "analytics.db"
    sqlite3.connect(path).close()
    asyncio.run(give_up_while_a_connection_opens(path, monkeypatch))


@pytest.mark.parametrize("seconds", [0.005, 0.02, 0.05])
@pytest.mark.parametrize("locked", [False, True])
def test_a_process_ends_though_a_read_was_just_given_up(tmp_path: Path, seconds: float, locked: bool) -> None:
    path = tmp_path / "analytics.db"
    store = AnalyticsStore.from_settings(Settings(_env_file=None, sqlite_path=path))
    store.ensure_schema()
    store.engine.dispose()
    with sqlite3.connect(path, isolation_level=None) as writer:
        if locked:
            writer.execute("PRAGMA journal_mode = DELETE")
            writer.execute("BEGIN EXCLUSIVE")
        asyncio.run(give_up_after(seconds, path))
    writer.close()
