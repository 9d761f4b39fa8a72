"""Asking a store: a deadline, a breaker that leaves a failing store alone, and who is told."""

import asyncio
from collections.abc import Collection

import pytest
from personalization.errors import StoreError
from personalization.recommend import guard as guarding
from personalization.recommend.guard import Guard


class Told:
    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def store_call(self, store: str, seconds: float, failed: bool) -> None:
        assert seconds >= 0
        self.calls.append((store, failed))

    def answered(self, outcome: str, degraded: Collection[str]) -> None: ...


async def fine() -> int:
    return 7


async def down() -> int:
    raise StoreError("neo4j", "does not answer")


async def hangs() -> int:
    await asyncio.sleep(60)
    return 7


async def test_what_the_store_says_is_handed_on_and_told() -> None:
    told = Told()
    guard = Guard(1, told)
    assert await guard.call("neo4j", fine) == 7
    with pytest.raises(StoreError, match="does not answer"):
        await guard.call("neo4j", down)
    assert told.calls == [("neo4j", False), ("neo4j", True)]


async def test_a_store_that_hangs_is_not_waited_for() -> None:
    with pytest.raises(StoreError, match=r"milvus: does not answer within 0\.02 s"):
        await Guard(0.02).call("milvus", hangs)


async def test_a_store_that_keeps_failing_is_left_alone_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarding, "_LEFT_ALONE_S", 0.2)
    guard, asked = Guard(1), 0

    async def counted() -> int:
        nonlocal asked
        asked += 1
        return await (down() if asked <= 6 else fine())

    async def fails() -> None:
        with pytest.raises(StoreError):
            await guard.call("neo4j", counted)

    for _ in range(20):
        await fails()
    assert asked == 5
    assert await guard.call("milvus", fine) == 7  # the others are asked

    await asyncio.sleep(0.25)
    await fails()  # the sixth: still down, so it is left alone at once
    await fails()
    assert asked == 6

    await asyncio.sleep(0.25)
    assert await guard.call("neo4j", counted) == 7
    assert await guard.call("neo4j", counted) == 7


async def test_who_stops_waiting_says_nothing_of_the_store() -> None:
    guard = Guard(60)
    for _ in range(10):
        task = asyncio.create_task(guard.call("neo4j", hangs))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await guard.call("neo4j", fine) == 7


async def test_a_fault_of_ours_is_not_hidden() -> None:
    async def wrong() -> int:
        raise KeyError("oops")

    with pytest.raises(KeyError):
        await Guard(1).call("neo4j", wrong)
