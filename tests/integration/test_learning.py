"""From what users did to what they are shown next: the stages `learn` and `publish`, and the answers after them."""

import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Stores, free_ports, kill_after, stage, write_rows
from personalization.errors import StoreError
from personalization.pipeline import learn as learn_stage
from personalization.pipeline.run import run_pipeline
from personalization.recommend.knowledge import ServedKnowledge
from personalization.recommend.service import Ask, Recommender
from personalization.schemas import Event, Recommendations, VectorSpace
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.mongo import event_document
from pydantic import SecretStr
from sqlalchemy import create_engine, text

GROUPS, EACH = 4, 7
CATALOG = "\n".join(
    [
        "intents:",
        "  - {id: flight, name: Flights, examples: [I want to book a flight to Lisbon, Find me a plane to Rome]}",
        "campaigns:",
        *(
            f"  - {{id: g{group}-{at}, name: Offer {at} of group {group}, category: g{group}}}"
            for group in range(GROUPS)
            for at in range(EACH)
        ),
    ]
)


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """With campaigns of four groups, and no exploring."""
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    (catalog / "all.yaml").write_text(CATALOG)
    return settings.model_copy(update={"catalog_path": catalog, "exploration_share": 0.0})


def event(user_id: str, campaign_id: str, kind: str = "click", days_ago: float = 1) -> dict[str, Any]:
    moment = datetime.now(UTC) - timedelta(days=days_ago)
    return {"user_id": user_id, "campaign_id": campaign_id, "event": kind, "timestamp": moment.isoformat()}


def run(settings: Settings, tmp_path: Path, *events: dict[str, Any], ends: str = "success") -> Any:
    path = write_rows(tmp_path / "events.ndjson", list(events)) if events else None
    summary = run_pipeline(None, settings, path)
    assert summary["status"] == ends, summary
    return summary


async def ask(settings: Settings, user_id: str, top: int = 50) -> Recommendations:
    """A new process of the API answers."""
    recommender = Recommender.from_settings(settings)
    question = Ask(user_id, top, explain=True)
    try:
        [before] = await recommender.look_up([(user_id, recommender.variant(question))]) or [None]
        return Recommendations.model_validate_json((await recommender.answer(question, before)).body)
    finally:
        await recommender.aclose()


def shown(answer: Recommendations) -> list[str]:
    return [one.campaign_id for one in answer.recommendations]


def served(stores: Stores) -> tuple[ServedKnowledge, str]:
    """What is served, and the run that published it."""
    [(content, run_id)] = stores.sql("SELECT content, run_id FROM served")
    return ServedKnowledge.from_bytes(content), run_id


async def test_a_dismissed_campaign_is_gone_after_the_next_run_and_a_seen_one_is_not(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    run(settings, tmp_path, event("ann", "g0-0"), event("bob", "g1-0"))
    before = shown(await ask(settings, "ann"))
    assert len(before) == GROUPS * EACH
    origin: Any = {"run_id": None, "attempt": 0, "source": {"uri": "api"}}
    rows = [event("ann", "g0-0", "dismiss", 0.1), event("ann", "g1-0", "impression", 0.1)]
    stores.mongo.events.insert_many([event_document(Event.model_validate(row), origin) for row in rows])
    assert shown(await ask(settings, "ann")) == before  # until the next run

    run(settings, tmp_path)

    after = await ask(settings, "ann")
    assert set(before) - set(shown(after)) == {"g0-0"}
    assert after.excluded is not None
    assert [(one.campaign_id, one.rule) for one in after.excluded] == [("g0-0", "not_again_after_dismiss")]
    assert "g0-0" in shown(await ask(settings, "bob"))


async def test_what_was_answered_years_ago_and_many_impressions_later_still_counts(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    catalog = CATALOG.replace("category: g0}", "category: g0, not_again: {after_conversion_days: 3650}}")
    (Path(settings.catalog_path) / "all.yaml").write_text(catalog)

    run(settings, tmp_path, event("ann", "g0-0", "conversion", 1500), event("ann", "g1-0", "conversion", 1500))

    answer = await ask(settings, "ann")
    assert set(shown(answer)) == {f"g{group}-{at}" for group in range(GROUPS) for at in range(EACH)} - {"g0-0"}


async def test_a_new_user_gets_what_is_popular(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    run(settings, tmp_path, *(event(f"u{at}", "g2-3") for at in range(5)), event("u0", "g0-1"))

    answer = await ask(settings, "new")

    assert answer.strategy == "popular"
    assert shown(answer)[0] == "g2-3"
    assert {reason.source for one in answer.recommendations for reason in one.reasons} <= {"popularity", "recency"}


async def test_with_nothing_but_a_catalog_there_are_answers_all_the_same(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="analytics"):
        await ask(settings, "new")

    summary = run(settings, tmp_path)

    assert stage(summary, "learn")["details"]["ranker"] == "fusion"
    assert len(shown(await ask(settings, "new", 5))) == 5


def test_a_rerun_with_nothing_new_learns_nothing_until_what_is_served_is_old(
    settings: Settings, stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(settings, tmp_path, event("ann", "g0-0"))
    again = run(settings, tmp_path)

    assert stage(again, "learn")["details"] == {"nothing_new": True}
    assert served(stores)[1] == first["run_id"]
    assert stores.redis.get("personalization:generation") == b"1"

    monkeypatch.setattr(learn_stage, "FRESH_MS", 0)
    later = run(settings, tmp_path)

    assert stage(later, "publish")["details"]["nothing_new"] is True
    assert served(stores)[1] == later["run_id"]
    assert stores.redis.get("personalization:generation") == b"2"


async def test_what_another_version_published_is_refused_until_the_next_run_which_replaces_it(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    run(settings, tmp_path, event("ann", "g0-0"))
    [(content,)] = stores.sql("SELECT content FROM served")
    with np.load(io.BytesIO(content)) as stored:
        older = {name: one for name, one in stored.items() if name not in ("format", "classifier", "model")}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **older)
    engine = create_engine(f"sqlite:///{settings.sqlite_path}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE served SET content = :content"), {"content": buffer.getvalue()})
    engine.dispose()
    with pytest.raises(StoreError, match="published by another version; run the pipeline"):
        await ask(settings, "ann")

    summary = run(settings, tmp_path)

    assert stage(summary, "publish")["details"]["nothing_new"] is True
    assert served(stores)[1] == summary["run_id"]
    assert shown(await ask(settings, "ann"))


def test_what_is_served_reads_messages_as_the_run_did(settings: Settings, stores: Stores, tmp_path: Path) -> None:
    moment = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    said = ["I want to book a flight to Madrid", "Is there a plane to Oslo?", "The weather is awful", "hello"]
    rows = [
        {"user_id": "ann", "message": one, "timestamp": moment, "message_id": f"m{at}"} for at, one in enumerate(said)
    ]
    run_pipeline(write_rows(tmp_path / "said.ndjson", rows), settings)
    by_id = {row["id"]: row["embedding"] for row in stores.milvus.query("messages", filter="", limit=10)}

    known, _ = served(stores)

    assert known.space == VectorSpace(settings.embedding_model, settings.embedding_dim)
    assert known.classifier is not None
    vectors = np.asarray(list(by_id.values()), dtype=np.float32)
    read = {
        message_id: [intent_id for intent_id, _ in reading.expressed] or ["other"]
        for message_id, reading in zip(by_id, known.classifier.classify(vectors, settings.intent_keep), strict=True)
    }
    assert sorted(read) == ["m0", "m1", "m2", "m3"]
    stored = stores.sql("SELECT message_id, intent_id FROM message_intents ORDER BY 1")
    assert stored == [(one, intent_id) for one in sorted(read) for intent_id in read[one]]
    assert {intent_id for _, intent_id in stored} == {"flight", "other"}


async def test_an_edited_catalog_is_served_though_there_are_no_users_yet(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    run(settings, tmp_path)
    (Path(settings.catalog_path) / "all.yaml").write_text("campaigns: [{id: only, name: The only offer}]")

    run(settings, tmp_path)

    assert shown(await ask(settings, "new")) == ["only"]


async def test_where_no_campaign_runs_there_is_nothing_to_show(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    run(settings, tmp_path, event("ann", "g0-0"))
    (Path(settings.catalog_path) / "all.yaml").write_text(
        CATALOG.replace("category: g", "active_until: 2026-01-01, category: g")
    )

    run(settings, tmp_path)

    assert shown(await ask(settings, "ann")) == shown(await ask(settings, "new")) == []


async def test_a_publish_that_broke_off_leaves_the_same_when_it_is_retried(
    settings: Settings, stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [event("ann", "g0-0"), event("bob", "g1-0"), event("ann", "g0-1", "dismiss")]
    before = run(settings, tmp_path, rows[0])
    [port] = free_ports(1)
    down = settings.model_copy(update={"redis_url": SecretStr(f"redis://127.0.0.1:{port}/0")})
    run(down, tmp_path, *rows, ends="failed")
    monkeypatch.setattr(AnalyticsStore, "set_serving_state", refuse)
    broken = run(settings, tmp_path, *rows, ends="failed")
    monkeypatch.undo()
    half = served(stores)
    assert half[1] == broken["run_id"] != before["run_id"]

    healed = run(settings, tmp_path, *rows)

    whole = served(stores)
    assert whole[1] == healed["run_id"]
    assert whole[0].campaigns.ids == half[0].campaigns.ids
    for name in ("users", "last_at", "targets", "engaged_category"):
        np.testing.assert_array_equal(getattr(whole[0].campaigns, name), getattr(half[0].campaigns, name))
    np.testing.assert_allclose(whole[0].campaigns.co_engagement, half[0].campaigns.co_engagement, rtol=1e-3)
    assert "g0-1" not in shown(await ask(settings, "ann"))


def refuse(*args: Any, **kwargs: Any) -> None:
    raise StoreError("analytics", "the disk is full")


def test_a_run_killed_after_it_learned_is_healed_by_the_next(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "events.ndjson", [event("ann", "g0-0"), event("bob", "g1-0")])
    kill_after("learn success", settings, "--events", str(path))
    assert stores.sql("SELECT count(*) FROM served") == [(0,)]
    assert stores.redis.get("personalization:generation") is None

    summary = run_pipeline(None, settings, path)

    assert summary["status"] == "success", summary
    known, run_id = served(stores)
    assert run_id == summary["run_id"]
    assert known.campaigns.engaged_ids == ["g0-0", "g1-0"]


async def test_with_enough_feedback_a_learned_ranker_serves_where_it_is_ahead(
    settings: Settings, stores: Stores, tmp_path: Path
) -> None:
    """Users of a group take its offers one after the other, and none twice: what fusion cannot know."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(60):
        offers = rng.permutation(EACH)
        days = np.sort(rng.uniform(0.5, 100, EACH))[::-1]
        rows += [
            event(f"u{user}", f"g{user % GROUPS}-{offer}", "click", day)
            for offer, day in zip(offers[:-1], days, strict=False)
        ]

    details = stage(run(settings, tmp_path, *rows), "learn")["details"]

    assert details["ndcg_gain"] > 0
    assert details["ranker"].startswith("learned-")
    answer = await ask(settings, "u0", 3)
    assert answer.policy == details["ranker"] == served(stores)[0].learned.version  # type: ignore[union-attr]
    for one in answer.recommendations:
        assert sum(reason.share for reason in one.reasons) == pytest.approx(one.score, abs=1e-9)
    fused = await ask(settings.model_copy(update={"ranker": "fusion", "cache_ttl_s": 1}), "u1", 3)
    assert fused.policy == "fusion"
