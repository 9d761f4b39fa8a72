"""Joining: what is asked for together is made together, once, and nobody's leaving takes it from the others."""

import asyncio
from collections.abc import Sequence

import pytest
from personalization.recommend.batching import Batcher


class Works:
    """Doubles numbers, when it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Event()
        self.fails = False

    async def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        await self.go.wait()
        if self.fails:
            raise ValueError("no numbers today")
        return [2 * one for one in numbers]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_comes_while_a_batch_is_under_way_makes_up_the_next() -> None:
    works = Works()
    batcher = Batcher(works, most=3, at_once=1)
    asked = []
    for one in range(6):
        asked.append(asyncio.create_task(batcher.ask(one)))
        await settle()
    works.go.set()

    assert await asyncio.gather(*asked) == [0, 2, 4, 6, 8, 10]
    assert works.batches == [[0], [1, 2, 3], [4, 5]]


async def test_batches_run_side_by_side_up_to_a_number() -> None:
    works = Works()
    batcher = Batcher(works, most=3, at_once=2)
    asked = []
    for one in range(5):
        asked.append(asyncio.create_task(batcher.ask(one)))
        await settle()
    assert works.batches == [[0], [1]]
    works.go.set()
    await asyncio.gather(*asked)
    assert works.batches == [[0], [1], [2, 3, 4]]


@pytest.mark.parametrize("under_way", [True, False])
async def test_nothing_is_made_twice_at_once(under_way: bool) -> None:
    works = Works()
    batcher = Batcher(works, most=3, at_once=1)
    asked = [asyncio.create_task(batcher.ask(one)) for one in ([7, 7] if under_way else [1, 7, 7])]
    await settle()
    asked.append(asyncio.create_task(batcher.ask(7)))
    await settle()
    works.go.set()

    assert (await asyncio.gather(*asked))[-3:] == [14, 14, 14]
    assert sum(batch.count(7) for batch in works.batches) == 1
    assert await batcher.ask(7) == 14
    assert sum(batch.count(7) for batch in works.batches) == 2  # nothing is kept


async def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    works = Works()
    batcher = Batcher(works, most=3, at_once=1)
    first, second = (asyncio.create_task(batcher.ask(7)) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    works.go.set()

    assert await second == 14
    assert first.cancelled()


async def test_a_failure_reaches_all_who_asked_and_nobody_else() -> None:
    works = Works()
    works.fails = True
    works.go.set()
    batcher = Batcher(works, most=3, at_once=1)
    asked = [asyncio.create_task(batcher.ask(one)) for one in (1, 2)]
    for one in asked:
        with pytest.raises(ValueError, match="no numbers today"):
            await one
    works.fails = False

    assert await batcher.ask(1) == 2


async def test_when_the_work_is_cancelled_nobody_waits_for_ever() -> None:
    works = Works()
    batcher = Batcher(works, most=3, at_once=1)
    asked = asyncio.create_task(batcher.ask(1))
    await settle()
    for worker in batcher._workers:
        worker.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asked, 1)


async def test_one_that_spoils_a_batch_spoils_it_for_itself_alone() -> None:
    class RefusedError(Exception): ...

    async def works(numbers: Sequence[int]) -> list[int]:
        if 13 in numbers:
            raise KeyError(13)
        if 99 in numbers:
            raise RefusedError
        return [2 * one for one in numbers]

    batcher = Batcher(works, most=5, at_once=1, alike=RefusedError)
    found = await asyncio.gather(*(batcher.ask(one) for one in (0, 1, 13, 2)), return_exceptions=True)
    assert [one for one in found if not isinstance(one, KeyError)] == [0, 2, 4]
    assert isinstance(found[2], KeyError)

    found = await asyncio.gather(*(batcher.ask(one) for one in (0, 1, 99, 2)), return_exceptions=True)
    assert all(isinstance(one, RefusedError) for one in found)
