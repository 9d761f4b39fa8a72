"""The API's own counters over HTTP, a run of the pipeline judged, and anomalies acknowledged in the real MongoDB."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import streamlit as st
import uvicorn
from conftest import Stores, environment, free_ports
from dashboard_data import NOW, open_store, run_rows
from dashboard_pages import forget, look_at, open_page, words
from personalization.__main__ import app as command
from personalization.errors import StoreError
from personalization.keys import new_key
from personalization.quality.anomalies import load_runs, record_anomalies
from personalization.quality.scrape import keep, read_api
from personalization.quality.traffic import WINDOW_MS, counts_over_time, record_bursts, traffic_over_time
from personalization.schemas import Acknowledgement
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore, analytics_store
from personalization.stores.mongo import AcknowledgementStore
from pydantic import SecretStr, ValidationError
from streamlit.testing.v1 import AppTest
from typer.testing import CliRunner

from services.api.main import create_app

ROUTE = "/v1/recommendations/{user_id}"


@contextmanager
def served(settings: Settings) -> Iterator[Settings]:
    """The real API on a port of its own, and settings that point there."""
    [port] = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(create_app(settings), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield settings.model_copy(update={"api_url": f"http://127.0.0.1:{port}/"})
    finally:
        server.should_exit = True
        thread.join(30)


# --- the API


def test_the_counters_of_the_real_api_become_a_history(published: Settings, tmp_path: Path):
    secret, key = new_key("watch", ["read"])
    guarded = published.model_copy(update={"api_auth": "keys", "api_keys": SecretStr(str(key))})
    store = open_store(tmp_path / "history.db")
    now = datetime.now(UTC)
    with served(guarded) as settings:
        with pytest.raises(StoreError, match="API_KEY"):
            read_api(settings)
        watching = settings.model_copy(update={"api_key": SecretStr(secret)})
        keep(store, read_api(watching), now)
        with httpx.Client(base_url=settings.api_url, headers={"Authorization": f"Bearer {secret}"}) as client:
            for _ in range(3):
                assert client.get("/v1/recommendations/quiet").is_success
            client.get("/v1/nowhere")
        requests = keep(store, read_api(watching), now)
        assert record_bursts(store, now) == []
        settled = keep(store, read_api(watching), now)

    assert requests == 5  # with the reading before
    assert settled == 1
    [steps] = traffic_over_time(store.engine, 0, WINDOW_MS, ROUTE)
    assert (steps.requests, steps.errors) == (3, 0)
    middle = steps.quantile(0.5)
    assert middle is not None
    assert 0 < middle < 5
    assert sum(one.count for one in counts_over_time(store.engine, 0, WINDOW_MS) if ":" not in one.name) == 3
    with pytest.raises(StoreError, match="API_URL"):
        read_api(watching)


# --- a run


def test_a_run_keeps_a_sketch_of_its_vectors_and_is_judged(published: Settings):
    with analytics_store(published) as analytics:
        assert record_anomalies(analytics) == record_anomalies(analytics)
        [run] = load_runs(analytics.engine, 10)

    assert run.succeeded
    assert run.sketch is not None
    assert run.model == published.embedding_model
    assert run.busiest["messages"] >= 1


# --- people


@pytest.fixture
def odd(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnalyticsStore]:
    """Two runs: of the first half the rows were rejected, the second failed."""
    with analytics_store(settings) as analytics:
        analytics.ensure_schema()
        published = {"details": {"messages": 5, "vectors": 5, "users": 2, "users_without_intent": 0}}
        half = {"rows_in": 1000, "rejected": 500}
        broken = {"status": "failed", "error_type": "StoreError", "error": "neo4j: does not answer"}
        analytics.record_runs(run_rows("half", NOW - timedelta(days=2), ingest=half, publish=published))
        analytics.record_runs(run_rows("broken", NOW - timedelta(hours=1), build_graph=broken))
        record_anomalies(analytics, ["half", "broken"])
        look_at(environment(settings), monkeypatch)
        yield analytics
    forget()


def page(**query: str) -> AppTest:
    return open_page("anomalies", **query)


def test_planted_faults_are_on_the_page_with_their_evidence_and_the_filters_are_in_the_url(odd: AnalyticsStore):
    everything = words(page())
    assert "Many rejected rows" in everything
    assert "500 of 1,000 rows (50%)." in everything
    assert "neo4j: does not answer" in everything

    errors = words(page(severity="error"))
    assert "neo4j: does not answer" in errors
    assert "Many rejected rows" not in errors
    assert "Many rejected rows" not in words(page(stage="build_graph"))
    assert "No anomaly matches" in words(page(state="acknowledged"))


def test_an_anomaly_is_acknowledged_with_a_note_that_others_see(
    odd: AnalyticsStore, settings: Settings, stores: Stores
):
    app = page(severity="warning")
    app.text_input[0].set_value(" Ada *L* ")
    app.text_area[0].set_value("An old export; the supplier was told.")
    next(one for one in app.button if one.label == "Acknowledge").click().run()
    assert not app.exception

    [kept] = stores.mongo.acknowledgements.find()
    assert (kept["who"], kept["note"]) == ("Ada *L*", "An old export; the supplier was told.")
    st.cache_data.clear()
    seen = words(page(state="acknowledged"))
    assert "Ada \\*L\\*" in seen
    assert "An old export; the supplier was told." in seen
    assert "Many rejected rows" not in words(page(state="open"))


def test_nobody_acknowledges_without_a_name(odd: AnalyticsStore, stores: Stores):
    app = page(severity="warning")
    app.text_input[0].set_value("  ")
    next(one for one in app.button if one.label == "Acknowledge").click().run()

    assert "Say who you are." in app.error[0].value
    assert stores.mongo.acknowledgements.count_documents({}) == 0


def test_without_mongodb_the_anomalies_are_shown_and_the_page_says_what_is_missing(
    odd: AnalyticsStore, monkeypatch: pytest.MonkeyPatch
):
    [port] = free_ports(1)
    monkeypatch.setenv("MONGODB_URI", f"mongodb://127.0.0.1:{port}/")
    forget()

    app = page()

    assert "mongodb" in app.warning[0].value
    assert "Many rejected rows" in words(app)
    assert not app.button


def test_an_acknowledgement_is_replaced_by_the_next_and_refused_where_it_is_none(settings: Settings, stores: Stores):
    store = AcknowledgementStore.from_settings(settings)
    first = Acknowledgement(anomaly_id="a" * 24, who="Ada", note="?", at=NOW)
    store.acknowledge([first])
    store.acknowledge([first.model_copy(update={"note": "It was the disk."})])

    assert {key: one.note for key, one in store.of(["a" * 24, "b" * 24]).items()} == {"a" * 24: "It was the disk."}
    store.client.close()
    for change in ({"anomaly_id": "$where"}, {"who": " "}, {"who": "x" * 101}, {"note": "x" * 1001}):
        with pytest.raises(ValidationError):
            Acknowledgement.model_validate(first.model_dump() | change)


def test_the_command_lists_them_and_fails_where_there_are_errors(odd: AnalyticsStore):
    done = CliRunner().invoke(command, ["anomalies", "--json"])

    assert done.exit_code == 1
    found: list[dict[str, Any]] = json.loads(done.stdout)
    assert [(one["severity"], one["stage"]) for one in found] == [("error", "build_graph"), ("warning", "ingest")]
    assert "nothing odd" not in CliRunner().invoke(command, ["anomalies"]).stdout
