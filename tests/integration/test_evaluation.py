"""The history as the real stores hold it, and its evaluation as the DAG's task runs it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from airflow.sdk.exceptions import AirflowSkipException
from conftest import SAMPLE, SAMPLE_EVENTS, Stores, write_rows
from personalization.catalog.loading import load_catalog
from personalization.errors import TooLittleFeedbackError
from personalization.evaluation.dataset import Refused, build_history, load_events, load_messages
from personalization.evaluation.recording import Request, evaluate_stores
from personalization.learning.history import History
from personalization.learning.loading import load_history
from personalization.pipeline.embed import campaign_vectors_of, embed_campaigns
from personalization.pipeline.lineage import StageReport
from personalization.pipeline.run import run_pipeline
from personalization.quality.reports import evaluation_history, latest_evaluation
from personalization.schemas import VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging, read
from personalization.stores.analytics import AnalyticsStore, open_read_only
from personalization.stores.milvus import VectorStore
from upath import UPath


def new_report(run_id: str = "evaluation") -> StageReport:
    return StageReport(run_id=run_id, stage="evaluate", shard=0, attempt=1, started_at=datetime.now(UTC))


def of_stores(settings: Settings) -> History:
    catalog = load_catalog(settings.catalog_path)
    staged = embed_campaigns(
        new_report(),
        catalog=catalog,
        space=VectorSpace(settings.embedding_model, settings.embedding_dim),
        staging=Staging(settings.staging_uri, "test"),
    )
    analytics, vectors = AnalyticsStore.from_settings(settings), VectorStore.from_settings(settings)
    try:
        return load_history(
            analytics=analytics,
            vectors=vectors,
            space=VectorSpace(settings.embedding_model, settings.embedding_dim),
            catalog=catalog,
            campaign_vectors=campaign_vectors_of(read(staged), catalog),
            settings=settings,
        )
    finally:
        analytics.engine.dispose()
        vectors.client.close()


def evaluate(settings: Settings, request: Request, run_id: str = "evaluation") -> dict[str, Any]:
    analytics, vectors = AnalyticsStore.from_settings(settings), VectorStore.from_settings(settings)
    try:
        return evaluate_stores(
            new_report(run_id),
            request,
            catalog=load_catalog(settings.catalog_path),
            space=VectorSpace(settings.embedding_model, settings.embedding_dim),
            analytics=analytics,
            vectors=vectors,
            staging=Staging(settings.staging_uri, run_id),
            settings=settings,
        )
    finally:
        analytics.engine.dispose()
        vectors.client.close()


def of_files(settings: Settings) -> History:
    return build_history(
        load_messages(UPath(SAMPLE), Refused()),
        load_events(UPath(SAMPLE_EVENTS), Refused()),
        load_catalog(settings.catalog_path),
        settings,
    )


def in_one_order(part: Any) -> dict[str, Any]:
    columns = vars(part)
    keys = [np.round(one, 3) for name, one in columns.items() if one.ndim == 1]
    order = np.lexsort(keys[::-1])
    return {name: column[order] for name, column in columns.items()}


def test_the_stores_and_the_files_tell_the_same_history(settings: Settings, stores: Stores) -> None:
    assert run_pipeline(SAMPLE, settings, SAMPLE_EVENTS)["status"] == "success"

    stored, filed = of_stores(settings), of_files(settings)

    assert stored.user_ids == filed.user_ids
    assert stored.catalog.ids == filed.catalog.ids
    np.testing.assert_allclose(stored.catalog.text, filed.catalog.text, atol=0.02)  # batches differ in half precision
    assert (stored.messages.user == filed.messages.user).all()
    assert (stored.messages.at == filed.messages.at).all()
    cosines = (stored.messages.vectors * filed.messages.vectors).sum(axis=1)
    assert stored.messages.vectors.shape == filed.messages.vectors.shape == (440, 384)
    assert stored.messages.vectors.dtype == np.float32
    assert cosines.min() > 0.999
    ours, theirs = in_one_order(stored.intents), in_one_order(filed.intents)
    # Where a message is at the edge of what an intent is, half precision may decide.
    assert abs(len(ours["at"]) - len(theirs["at"])) <= 2
    assert len(set(zip(*_listed(ours), strict=True)) ^ set(zip(*_listed(theirs), strict=True))) <= 4
    for history in (stored, filed):
        assert (np.diff(history.signals.at) >= 0).all()
    ours, theirs = (
        {name: column[one.signals.is_event] for name, column in vars(one.signals).items()} for one in (stored, filed)
    )
    for name, column in ours.items():
        np.testing.assert_array_equal(column, theirs[name], err_msg=name)


def _listed(intents: dict[str, Any]) -> list[list[int]]:
    return [intents[name].tolist() for name in ("user", "at", "intent")]


def test_a_world_without_a_message_or_an_event_is_a_history_too(settings: Settings, stores: Stores) -> None:
    run_pipeline(None, settings)

    history = of_stores(settings)

    assert history.user_ids == []
    assert len(history.messages.at) == len(history.signals.at) == 0


@pytest.fixture
def lively(settings: Settings, tmp_path: Path) -> Settings:
    """Stores in which enough was clicked to tell policies apart: users who click what they speak of."""
    topics = {"flights": "I want to fly to Lisbon", "cinema": "What is on at the cinema?", "pets": "My dog needs a vet"}
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    campaigns = [
        {"id": f"{topic}_{number}", "name": f"{topic} {number}", "intents": [topic]}
        for topic in topics
        for number in range(8)
    ]
    intents = [{"id": topic, "name": topic, "examples": [text, f"{topic}, please"]} for topic, text in topics.items()]
    (catalog / "all.json").write_text(json.dumps({"intents": intents, "campaigns": campaigns}))
    start = datetime(2026, 8, 3, tzinfo=UTC)
    messages, events = [], []
    for user in range(15):
        topic = list(topics)[user % 3]
        for week in range(6):
            at = start + timedelta(weeks=week, hours=user)
            messages.append({"user_id": f"u{user:02d}", "message": topics[topic], "timestamp": at.isoformat()})
            clicked = f"{topic}_{(week + user // 3) % 8}"
            one = {"user_id": f"u{user:02d}", "campaign_id": clicked, "event": "click"}
            events.append(one | {"timestamp": (at + timedelta(hours=2)).isoformat()})
    lively = settings.model_copy(update={"catalog_path": catalog})
    summary = run_pipeline(
        write_rows(tmp_path / "messages.jsonl", messages), lively, write_rows(tmp_path / "events.jsonl", events)
    )
    assert summary["status"] == "success", summary
    return lively


def test_only_the_newest_messages_are_held_in_memory(lively: Settings) -> None:
    whole = of_stores(lively)

    newest = of_stores(lively.model_copy(update={"learning_max_messages": 50}))

    assert len(whole.messages.at) == 90
    assert (newest.messages.at == whole.messages.at[-50:]).all()
    np.testing.assert_array_equal(newest.messages.vectors, whole.messages.vectors[-50:])
    assert newest.user_ids == whole.user_ids
    assert len(newest.signals.at) == len(whole.signals.at)


def test_a_message_without_a_vector_is_left_out(lively: Settings, stores: Stores) -> None:
    gone = [row[0] for row in stores.sql("SELECT DISTINCT message_id FROM message_intents ORDER BY 1 LIMIT 7")]
    stores.milvus.delete("messages", ids=gone)

    history = of_stores(lively)

    assert len(history.messages.at) == len(history.messages.vectors) == 90 - 7
    np.testing.assert_allclose(np.linalg.norm(history.messages.vectors, axis=1), 1, atol=1e-3)


def test_an_evaluation_is_kept_for_the_dashboard_and_a_repeat_sets_it_anew(lively: Settings) -> None:
    request = Request(task="new", weeks=3, policies=("shipped", "popularity", "random"))

    report = evaluate(lively, request)
    again = evaluate(lively, request)
    evaluate(lively, Request(task="new", weeks=2, policies=("popularity",)), run_id="later")

    assert report == again
    assert (len(report["splits"]), report["answers"]) == (3, 45)
    engine = open_read_only(lively)
    latest = latest_evaluation(engine)
    assert latest is not None
    assert (latest.evaluation_id, latest.splits) == ("later", 2)
    history = evaluation_history(engine, "new", ("shipped", "popularity"), 10)
    assert [one.policy for one in history] == ["popularity", "shipped", "popularity"]
    by_policy = {one.policy: one.mean for one in history[:2]}
    assert by_policy == {name: report["policies"][name]["ndcg@10"]["mean"] for name in by_policy}
    assert by_policy["shipped"] > report["policies"]["random"]["ndcg@10"]["mean"]
    assert [one.policy for one in evaluation_history(engine, "new", ("shipped",), 1)] == []
    assert evaluation_history(engine, "any", ("shipped",), 10) == []
    engine.dispose()


def test_the_dag_s_task_evaluates_with_the_run_s_params(
    lively: Settings, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"task": "any", "split_days": 7, "weeks": 2, "policies": ["popularity", "own_history"]}

    found = run_task(lively, params, monkeypatch)

    assert set(found) == {"popularity", "own_history"}
    assert stores.sql("SELECT DISTINCT evaluation_id, task, splits FROM evaluations") == [("manual__1", "any", 2)]


@pytest.mark.parametrize("feedback", ["none", "little"])
def test_with_too_little_feedback_the_task_is_skipped_and_says_so(
    settings: Settings, stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feedback: str
) -> None:
    if feedback == "little":
        click = {"user_id": "ann", "campaign_id": "pet_club", "event": "click", "timestamp": "2026-10-01T09:00:00Z"}
        run_pipeline(None, settings, write_rows(tmp_path / "events.jsonl", [click]))
    params = {"task": "new", "split_days": 7, "weeks": 4, "policies": None}

    with pytest.raises(AirflowSkipException) as skipped:
        run_task(settings, params, monkeypatch)

    expected = {"none": "no click and no conversion", "little": "1 clicks and conversions in 4 weeks are too few"}
    assert expected[feedback] in str(skipped.value)
    assert stores.sql("SELECT count(*) FROM evaluations") == [(0,)]


def test_campaigns_that_ended_are_too_little_to_measure_by(lively: Settings) -> None:
    content = json.loads((Path(lively.catalog_path) / "all.json").read_text())
    for one in content["campaigns"]:
        one["active_until"] = "2026-08-20"
    (Path(lively.catalog_path) / "all.json").write_text(json.dumps(content))

    with pytest.raises(TooLittleFeedbackError, match="check the windows"):
        evaluate(lively, Request(weeks=3, policies=("popularity",)))


def run_task(settings: Settings, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The task's body with the context that Airflow gives it, over the stores of the settings."""
    from personalization.settings import get_settings
    from personalization_airflow import stage, tasks

    class Instance:
        map_index, try_number = -1, 1

    context = {"params": params, "run_id": "manual__1", "ti": Instance()}
    monkeypatch.setattr("airflow.sdk.get_current_context", lambda: context)
    monkeypatch.setattr(stage, "get_current_context", lambda: context)
    monkeypatch.setattr(stage, "get_settings", lambda: settings)
    host = {"conn_type": "milvus", "host": settings.milvus_host, "port": settings.milvus_port}
    monkeypatch.setenv("AIRFLOW_CONN_MILVUS_DEFAULT", json.dumps(host))
    get_settings.cache_clear()
    return tasks.evaluate()
