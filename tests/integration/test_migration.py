"""Another embedding model against the real stores: nothing is mixed, lost or doubled, whenever it is broken off."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import SAMPLE, Stores, api_of, environment, kill_after, stage, write_rows
from personalization.audit.command import audit_at
from personalization.encoder import get_encoder
from personalization.erasure.erase import erase
from personalization.erasure.places import Places
from personalization.errors import EmbeddingError, MigrationError
from personalization.local.config import PACKAGED_MODEL
from personalization.migration import swap as swapping
from personalization.migration.fill import embed_messages
from personalization.migration.run import drop_former, migrate, roll_back
from personalization.migration.scene import Scene
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.run import run_pipeline
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import INTERESTS, MESSAGES, USERS
from personalization.stores.together import Stores as PlatformStores
from rich.console import Console

WIDE, NARROW = VectorSpace(PACKAGED_MODEL, 1024), VectorSpace(PACKAGED_MODEL, 384)
ALIASES = (MESSAGES, USERS, INTERESTS)


CATALOG = """
intents:
- {id: films, name: Films, examples: [Which horror film is good?, Recommend me a comedy, What is on at the cinema?]}
- {id: travel, name: Travel, examples: [I want to fly to Lisbon, Book me a hotel, Is my flight on time?]}
- {id: cards, name: Cards, examples: [Where is my new card?, My card was stolen, How do I block my card?]}
campaigns:
- {id: cinema, name: Two for one at the cinema, intents: [films]}
- {id: breaks, name: City breaks, intents: [travel]}
- {id: insurance, name: Card insurance, intents: [cards]}
"""


@pytest.fixture
def some(tmp_path: Path) -> Path:
    """Messages of the sample, enough to compare neighbours by."""
    rows = [one for at, one in enumerate(json.loads(SAMPLE.read_text(encoding="utf-8"))) if at % 6 == 0]
    return write_rows(tmp_path / "some.ndjson", rows)


@pytest.fixture
def sharded(settings: Settings, tmp_path: Path) -> Settings:
    """Small shards, and a catalog that is embedded in no time."""
    (tmp_path / "catalog.yaml").write_text(CATALOG)
    changes = {"shard_rows": 30, "catalog_path": tmp_path / "catalog.yaml"}
    return settings.model_copy(update={**changes, "embedding_model": WIDE.model, "embedding_dim": WIDE.dim})


def spaces(settings: Settings) -> dict[VectorSpace, str]:
    analytics = AnalyticsStore.from_settings(settings)
    try:
        return dict(analytics.spaces())
    finally:
        analytics.engine.dispose()


def vectors_of(stores: Stores, space: VectorSpace, alias: str = MESSAGES) -> dict[str, Any]:
    rows = stores.milvus.query(
        space.collection(alias), filter="", limit=10_000, output_fields=["id", "embedding"], consistency_level="Strong"
    )
    return {row["id"]: np.asarray(row["embedding"], dtype=np.float32) for row in rows}


def assert_whole(stores: Stores, settings: Settings, *wanted: VectorSpace) -> None:
    """In each space there are the vectors of all messages, and no others, as its model makes them of their texts."""
    texts = {one["_id"]: one["message"] for one in stores.mongo.conversations.find()}
    for space in wanted:
        there = vectors_of(stores, space)
        assert set(there) == set(texts)
        clean = get_encoder(space.model, space.dim).encode(list(texts.values()))
        cosines = (np.stack([there[one] for one in texts]) * clean).sum(axis=1)
        assert cosines.min() > 0.995
        users = set(vectors_of(stores, space, USERS))
        assert users == {one["user_id"] for one in stores.mongo.conversations.find()}


def live_of(stores: Stores, alias: str = MESSAGES) -> list[str]:
    """Collections behind an alias."""
    return [one for one in stores.milvus.list_collections() if alias in stores.milvus.list_aliases(one)["aliases"]]


@pytest.fixture
async def api(sharded: Settings, some: Path) -> AsyncIterator[httpx.AsyncClient]:
    assert run_pipeline(some, sharded)["status"] == "success"
    async with api_of(sharded) as client:
        yield client


async def test_another_model_takes_over_and_the_former_one_comes_back(
    api: httpx.AsyncClient, sharded: Settings, stores: Stores, tmp_path: Path
) -> None:
    before = (await api.get("/v1/users/maria/similar")).json()
    with pytest.raises(MigrationError, match="nothing to do"):
        migrate(WIDE.model, WIDE.dim, sharded)

    figures = migrate(NARROW.model, NARROW.dim, sharded)

    assert figures["missing"] == figures["orphans"] == 0
    assert figures["neighbour_overlap"] > 0.9
    assert figures["intent_accuracy"]["before"] == figures["intent_accuracy"]["after"]
    assert spaces(sharded) == {NARROW: "live", WIDE: "kept"}
    assert_whole(stores, sharded, WIDE, NARROW)
    assert [live_of(stores, one) for one in ALIASES] == [[NARROW.collection(one)] for one in ALIASES]
    after = (await api.get("/v1/users/maria/similar")).json()
    assert [one["user_id"] for one in after["similar"]][:3] == [one["user_id"] for one in before["similar"]][:3]
    served = await api.get("/v1/recommendations/maria")
    assert "degraded" not in served.json()

    # A run goes on with what is served, whatever the settings say, and keeps the former space up to date.
    edited = stores.mongo.conversations.find_one({"user_id": "maria"})
    assert edited is not None
    new = [
        {"user_id": "maria", "message": "I would like to learn Portuguese", "timestamp": "2026-11-01T09:00:00Z"},
        {
            "user_id": "maria",
            "message": "Which horror film is on tonight?",
            "timestamp": edited["timestamp"].isoformat(),
            "message_id": edited["_id"],
        },
    ]
    summary = run_pipeline(write_rows(tmp_path / "new.ndjson", new), sharded)
    assert summary["status"] == "success", summary
    assert stage(summary, "embed")["details"]["dim"] == NARROW.dim
    assert stage(summary, "mirror_vectors")["details"]["spaces"] == [WIDE.name]
    assert_whole(stores, sharded, WIDE, NARROW)

    # The audit compares both, and mends the one that is kept, too.
    quiet = Console(quiet=True)
    assert audit_at(sharded, quiet, repair=False).findings == []
    stores.milvus.delete(WIDE.collection(MESSAGES), ids=[edited["_id"]])
    mended = audit_at(sharded, quiet, repair=True)
    assert [(one.kind.name, one.left) for one in mended.findings] == [("kept_vector_missing", 0)]
    assert_whole(stores, sharded, WIDE, NARROW)

    roll_back(sharded)
    assert spaces(sharded) == {WIDE: "live", NARROW: "kept"}
    assert_whole(stores, sharded, WIDE, NARROW)
    with Places.of(sharded) as places:
        assert erase("maria", places).status == "erased"
    assert_whole(stores, sharded, WIDE, NARROW)
    with pytest.raises(MigrationError, match="reembed_finish"):
        migrate(NARROW.model, 512, sharded)


async def test_what_is_broken_off_goes_on_behind_the_last_shard_and_an_edit_meanwhile_wins(
    api: httpx.AsyncClient, sharded: Settings, stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (await api.get("/v1/recommendations/maria")).json()
    arguments = ("--model", NARROW.model, "--dim", str(NARROW.dim))
    kill_after("fill success", sharded, *arguments, command_name="reembed")
    assert spaces(sharded) == {WIDE: "live", NARROW: "filling"}
    assert (await api.get("/v1/recommendations/maria")).json() == before
    assert live_of(stores) == [WIDE.collection(MESSAGES)]
    filled = set(vectors_of(stores, NARROW))
    assert len(filled) == 30

    one = stores.mongo.conversations.find_one({"_id": min(filled)})
    assert one is not None
    edit = {
        "user_id": one["user_id"],
        "message": "My flight was cancelled",
        "timestamp": one["timestamp"].isoformat(),
        "message_id": one["_id"],
    }
    new = {"user_id": "maria", "message": "Where is my parcel?", "timestamp": "2026-11-01T09:00:00Z"}
    assert run_pipeline(write_rows(tmp_path / "edit.ndjson", [edit, new]), sharded)["status"] == "success"
    # An orphan, as an erasure that was broken off would leave it.
    stray = {"id": "stray", "user_id": "nobody", "timestamp": 1, "embedding": [1.0] + [0.0] * (NARROW.dim - 1)}
    stores.milvus.upsert(NARROW.collection(MESSAGES), [stray])

    migrate(*NARROW, sharded)

    assert_whole(stores, sharded, WIDE, NARROW)
    shards = stores.sql("SELECT shards, rows_in FROM pipeline_runs WHERE stage = 'fill' ORDER BY started_at DESC")
    assert shards[0] == (2, stores.mongo.conversations.count_documents({}) - 1 - 30)

    monkeypatch.setattr(swapping, "MOVED_ON", swapping.MOVED_ON * 0)
    assert drop_former(sharded) == {WIDE.name: stores.mongo.conversations.count_documents({})}
    assert spaces(sharded) == {NARROW: "live"}
    assert not any(stores.milvus.has_collection(WIDE.collection(alias)) for alias in ALIASES)
    assert (await api.get("/v1/users/maria/similar")).is_success
    with pytest.raises(MigrationError, match="nothing is to be dropped"):
        drop_former(sharded)


async def test_what_does_not_hold_is_not_served(api: httpx.AsyncClient, sharded: Settings, stores: Stores) -> None:
    with pytest.raises(EmbeddingError, match="384-d"):
        migrate(NARROW.model, 64, sharded)
    assert spaces(sharded) == {WIDE: "live"}
    kill_after("fill success", sharded, "--model", NARROW.model, "--dim", "384", command_name="reembed")
    rng = np.random.default_rng(0)
    rows = stores.milvus.query(
        NARROW.collection(MESSAGES), filter="", limit=1000, output_fields=["*"], consistency_level="Strong"
    )
    for row in rows:
        noise = rng.normal(size=NARROW.dim)
        row["embedding"] = (noise / np.linalg.norm(noise)).tolist()
    stores.milvus.upsert(NARROW.collection(MESSAGES), rows)
    before = (await api.get("/v1/users/maria/similar")).json()

    with pytest.raises(MigrationError, match="other vectors than its model makes"):
        migrate(*NARROW, sharded)

    assert spaces(sharded) == {WIDE: "live", NARROW: "filling"}
    assert live_of(stores) == [WIDE.collection(MESSAGES)]
    assert (await api.get("/v1/users/maria/similar")).json() == before
    assert stores.sql("SELECT status FROM pipeline_runs WHERE stage = 'verify' ORDER BY started_at DESC")[0] == (
        "failed",
    )


async def test_a_text_that_is_edited_while_it_is_embedded_is_embedded_again(
    api: httpx.AsyncClient, sharded: Settings, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MongoDB is asked behind the write: the run that edits may have written its vector before ours."""
    one = stores.mongo.conversations.find_one()
    assert one is not None
    encoder = get_encoder(NARROW.model, NARROW.dim)
    encode, texts = encoder.encode, []

    def encode_and_edit(batch: list[str]) -> Any:
        texts.extend(batch)
        change = {"$set": {"message": "Edited meanwhile", "content_hash": "another"}}
        stores.mongo.conversations.update_one({"_id": one["_id"]}, change)
        return encode(batch)

    monkeypatch.setattr(encoder, "encode", encode_and_edit)
    stores.redis.flushdb()  # or the vectors of the texts were known
    with PlatformStores.of(sharded) as platform:
        platform.vectors.ensure_schema(NARROW)
        scene = Scene(platform, Staging(sharded.staging_uri, "test"), sharded)
        report = StageReport(run_id="test", stage="fill", shard=0, attempt=1, started_at=datetime.now(UTC))
        assert embed_messages(report, [one["_id"], "gone"], NARROW, scene) == 1

    assert texts == [one["message"], "Edited meanwhile"]
    assert (vectors_of(stores, NARROW)[one["_id"]] @ encode(["Edited meanwhile"])[0]) > 0.995


async def test_a_space_that_cannot_be_kept_up_falls_behind_and_is_filled_anew(
    api: httpx.AsyncClient, sharded: Settings, stores: Stores, tmp_path: Path
) -> None:
    lost = VectorSpace("package:no_such_package", 384)
    analytics = AnalyticsStore.from_settings(sharded)
    analytics.set_space(lost, "kept")
    new = {"user_id": "maria", "message": "Where is my parcel?", "timestamp": "2026-11-01T09:00:00Z"}

    summary = run_pipeline(write_rows(tmp_path / "new.ndjson", [new]), sharded)

    assert summary["status"] == "success", summary
    assert stage(summary, "mirror_vectors")["details"] == {"behind": lost.name}
    assert analytics.spaces() == {WIDE: "live", lost: "behind"}
    with pytest.raises(EmbeddingError):
        roll_back(sharded)
    analytics.engine.dispose()


def test_a_run_that_was_overtaken_is_not_served(sharded: Settings) -> None:
    analytics = AnalyticsStore.from_settings(sharded)
    analytics.ensure_schema()
    assert analytics.publish_served(b"first", 1, "first", WIDE)
    analytics.set_space(NARROW, "filling")
    analytics.swap_served(b"swapped", 2, "second", NARROW)

    assert not analytics.publish_served(b"late", 3, "first", WIDE)

    assert analytics.served_content() == b"swapped"
    assert analytics.spaces() == {NARROW: "live", WIDE: "kept"}
    analytics.engine.dispose()


def test_nothing_is_migrated_before_anything_is_published(sharded: Settings) -> None:
    assert environment(sharded)["EMBEDDING_DIM"] == "1024"
    with pytest.raises(MigrationError, match="nothing is published"):
        migrate(*NARROW, sharded)
