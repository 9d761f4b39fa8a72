"""The page Audit, and the reports behind it, without a browser."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from dashboard_data import NOW, open_store, run_rows
from dashboard_pages import forget, metrics, open_page
from personalization.audit.command import record
from personalization.audit.findings import KINDS, AuditReport, Finding, Sample

COMPARED = {"mongodb": {"messages": 1200}, "redis": {"answers": 7}}


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path the dashboard reads, where a run is recorded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ANALYTICS_URL", raising=False)
    monkeypatch.setenv("SQLITE_PATH", str(tmp_path / "analytics.db"))
    forget()
    store = open_store(tmp_path / "analytics.db")
    store.record_runs(run_rows("r"))
    store.engine.dispose()
    yield tmp_path / "analytics.db"
    forget()


def keep(path: Path, audit_id: str, status: Any, days_ago: int, *findings: Finding) -> None:
    store = open_store(path)
    began = NOW - timedelta(days=days_ago)
    ended = began + timedelta(seconds=90)
    record(AuditReport(audit_id, began, ended, status, status == "repaired", COMPARED, 3, findings), store)
    store.engine.dispose()


def test_before_the_first_audit_the_page_says_how_to_start_one():
    assert "personalization audit" in open_page("audit").info[0].value


def test_drift_is_shown_with_its_evidence_and_what_to_do_and_an_older_audit_by_its_link(database: Path):
    vectors = Finding(KINDS["message_without_vector"], 12_345, [Sample("m-1", "maria", "maria at noon", None)])
    edges = Finding(KINDS["expressed_differs"], 1, [Sample("maria → travel", "maria", "count 2", "count 77")], left=0)
    keep(database, "good", "clean", 2)
    keep(database, "bad", "drift", 1, edges, vectors)

    app = open_page("audit")

    assert "12,345 cases are left" in app.error[0].value
    shown = metrics(app)
    assert (shown["Cases found"], shown["Cases left"], shown["Took"]) == ("12,346", "12,345", "1 min 30 s")
    titles = [one.value for one in app.markdown if one.value.startswith("**")]
    assert [one.split("**")[1] for one in titles] == [vectors.kind.title, edges.kind.title]  # what is left comes first
    assert any("embedded again" in one.value for one in app.markdown)
    assert list(app.dataframe[0].value["Id"]) == ["m-1"]
    assert "3 messages of a run at work" in app.info[0].value

    older = open_page("audit", audit="good")

    assert "The stores agree" in older.success[0].value
    assert older.selectbox[0].value == "good"
    assert len(open_page("audit", audit="gone").error) == 1
