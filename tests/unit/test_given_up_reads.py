"""Reads of the analytics database that nobody waits for any more."""

import asyncio
import sqlite3
from contextlib import suppress
from pathlib import Path

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
