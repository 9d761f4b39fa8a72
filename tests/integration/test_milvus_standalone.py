"""The same pipeline and readers against the genuine Milvus standalone instead of Milvus Lite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SAMPLE, stack_config
from personalization.local.stack import Stack
from personalization.pipeline.run import run_pipeline
from personalization.settings import Settings
from personalization.stores.milvus import AsyncVectorReader

pytest.importorskip("milvus", reason="the package `milvus` is not installed")


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    config = stack_config(tmp_path / "stack").model_copy(update={"local_milvus": "standalone"})
    stack = Stack(config, only_stores=True)
    stack.start(print)
    yield config.settings()
    stack.stop()


async def test_vectors_are_written_once_and_neighbours_are_found(settings: Settings) -> None:
    first, again = (run_pipeline(SAMPLE, settings) for _ in range(2))

    assert first["status"] == again["status"] == "success", (first, again)
    details = again["stages"][-1]["details"]
    assert details["nothing_new"] is True
    assert details["vectors"] == details["messages"] == 440
    reader = AsyncVectorReader(settings)
    own, *interests = await reader.user_vectors("maria")
    neighbours = await reader.neighbours("maria", own, 10)
    unknown = await reader.user_vectors("nobody-we-know")
    await reader.close()
    assert 1 <= len(interests) <= 4
    assert len(unknown) == 0
    assert len(neighbours) == 10
    assert "maria" not in {one["user_id"] for one in neighbours}
