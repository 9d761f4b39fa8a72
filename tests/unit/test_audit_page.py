"""The page Audit, and the reports behind it, without a browser."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from dashboard_data import NOW, open_store, run_rows
from personalization.audit.command import record
from personalization.audit.findings import KINDS, AuditReport, Finding, Sample
from personalization.settings import get_settings
from streamlit.testing.v1 import AppTest

APP = Path(__file__).parents[2] / "dashboards" / "app.py"
COMPARED = {"mongodb": {"messages": 1200}, "redis": {"answers": 7}}


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path the dashboard reads, where a run is recorded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANALYTICS_URL", raising=False)
    monkeypatch.setenv("SQLITE_PATH", str(tmp_path / "analytics.db"))
    get_settings.cache_clear()
    st.cache_data.clear()
    st.cache_resource.clear()
    store = open_store(tmp_path / "analytics.db")
    store.record_runs(run_rows("r"))
    store.engine.dispose()
    yield tmp_path / "analytics.db"
    get_settings.cache_clear()


def keep(path: Path, audit_id: str, status: Any, days_ago: int, *findings: Finding) -> None:
    store = open_store(path)
    began = NOW - timedelta(days=days_ago)
    ended = began + timedelta(seconds=90)
    record(AuditReport(audit_id, began, ended, status, status == "repaired", COMPARED, 3, findings), store)
    store.engine.dispose()


def open_page(**query: str) -> AppTest:
    app = AppTest.from_file(APP, default_timeout=60).run()
    for key, value in query.items():
        app.query_params[key] = value
    app.switch_page("views/audit.py").run()
    assert not app.exception
    return app


def test_before_the_first_audit_the_page_says_how_to_start_one():
    assert "personalization audit" in open_page().info[0].value


def test_drift_is_shown_with_its_evidence_and_what_to_do_and_an_older_audit_by_its_link(database: Path):
    vectors = Finding(KINDS["message_without_vector"], 12_345, [Sample("m-1", "maria", "maria at noon", None)])
    edges = Finding(KINDS["expressed_differs"], 1, [Sample("maria → travel", "maria", "count 2", "count 77")], left=0)
    keep(database, "good", "clean", 2)
    keep(database, "bad", "drift", 1, edges, vectors)

    app = open_page()

    assert "12,345 cases are left" in app.error[0].value
    metrics = {one.label: one.value for one in app.metric}
    assert (metrics["Cases found"], metrics["Cases left"], metrics["Took"]) == ("12,346", "12,345", "1 min 30 s")
    titles = [one.value for one in app.markdown if one.value.startswith("**")]
    assert [one.split("**")[1] for one in titles] == [vectors.kind.title, edges.kind.title]  # what is left comes first
    assert any("embedded again" in one.value for one in app.markdown)
    assert list(app.dataframe[0].value["Id"]) == ["m-1"]
    assert "3 messages of a run at work" in app.info[0].value

    older = open_page(audit="good")

    assert "The stores agree" in older.success[0].value
    assert older.selectbox[0].value == "good"
    assert len(open_page(audit="gone").error) == 1
