"""The same pipeline and readers against the genuine Milvus standalone instead of Milvus Lite."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SAMPLE, stack_config
from personalization.erasure.erase import erase
from personalization.erasure.places import Places
from personalization.local.stack import Stack
from personalization.pipeline.run import run_pipeline
from personalization.schemas import VectorSpace
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


async def test_vectors_are_written_once_neighbours_are_found_and_a_user_is_erased(settings: Settings) -> None:
    first, again = (run_pipeline(SAMPLE, settings) for _ in range(2))

    assert first["status"] == again["status"] == "success", (first, again)
    details = again["stages"][-1]["details"]
    assert details["nothing_new"] is True
    assert details["vectors"] == details["messages"] == 440
    reader = AsyncVectorReader(settings)
    space = VectorSpace(settings.embedding_model, settings.embedding_dim)
    found = await reader.user_vectors(space, ["maria", "nobody-we-know"])
    [neighbours] = await reader.neighbours(space, found["maria"][:1], 10)
    with Places.of(settings) as places:
        erased = erase("maria", places)
    assert erased.status == "erased"
    assert await reader.user_vectors(space, ["maria"]) == {}
    await reader.close()
    assert set(found) == {"maria"}
    assert 2 <= len(found["maria"]) <= 5
    assert len(neighbours) == 10
    assert neighbours[0]["user_id"] == "maria"
