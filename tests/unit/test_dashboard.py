"""Every page of the dashboard over stores in every state, without a browser."""

import re
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from dashboard_data import NOW, evaluation_rows, open_store, run_rows, seed
from dashboard_pages import forget, metrics, open_page, words
from personalization.quality.anomalies import record_anomalies
from personalization.stores.tables import StageAttempt
from sqlalchemy import insert

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
PAGES = ["overview", "runs", "latency", "anomalies", "audit", "engagement", "evaluation", "explore"]


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dashboard") / "analytics.db"
    seed(path)
    return path


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path the dashboard reads; nothing is there yet."""
    monkeypatch.chdir(tmp_path)  # away from the .env files of a working copy
    monkeypatch.delenv("ANALYTICS_URL", raising=False)
    # Nobody listens there.
    monkeypatch.setenv("API_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MONGODB_URI", "mongodb://127.0.0.1:9/?directConnection=true")
    monkeypatch.setenv("STORE_TIMEOUT_S", "0.3")
    _use(tmp_path / "analytics.db", monkeypatch)
    yield tmp_path / "analytics.db"
    forget()


def _use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQLITE_PATH", str(path))
    forget()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("audit", "explore")])
def test_a_page_over_data_shows_a_chart(page: str, seeded: Path, monkeypatch: pytest.MonkeyPatch):
    _use(seeded, monkeypatch)

    app = open_page(page)

    assert not app.error
    assert app.get("plotly_chart")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_over_a_missing_file_says_what_to_do_and_makes_no_file(page: str, database: Path):
    app = open_page(page)

    assert "make demo" in app.info[0].value
    assert not database.exists()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_over_a_file_without_tables_says_what_to_do(page: str, database: Path):
    database.touch()

    app = open_page(page)

    assert "make demo" in app.info[0].value


@pytest.mark.parametrize("page", PAGES)
def test_a_page_over_tables_without_rows_says_what_to_do(page: str, database: Path):
    open_store(database)

    app = open_page(page)

    assert "make demo" in app.info[0].value


@pytest.mark.parametrize("page", PAGES)
def test_a_page_over_a_broken_store_says_so_in_one_line(page: str, database: Path):
    database.write_text("this is no database, " * 100)

    app = open_page(page)

    assert len(app.error) == 1
    assert "analytics" in app.error[0].value
    assert "\n" not in app.error[0].value


@pytest.mark.parametrize("page", ["overview", "runs", "anomalies"])
def test_a_page_over_a_single_failed_run_shows_the_failure(page: str, database: Path):
    broken = {"status": "failed", "error_type": "CatalogError", "error": "campaign ids must be unique"}
    open_store(database).record_runs(run_rows("first", prepare=broken))

    app = open_page(page)

    shown = [*app.text, *app.code]
    assert any("campaign ids must be unique" in element.value for element in shown)


def test_latency_without_a_stage_that_succeeded_says_so(database: Path):
    open_store(database).record_runs(run_rows("first", prepare={"status": "failed"}))

    assert "No stage has succeeded" in open_page("latency").info[0].value


def test_engagement_before_any_campaign_says_what_to_do(database: Path):
    open_store(database).record_runs(run_rows("first"))

    assert "make demo" in open_page("engagement").info[0].value


def test_the_evaluation_page_before_any_evaluation_says_what_to_do(database: Path):
    open_store(database).record_runs(run_rows("first"))

    said = open_page("evaluation").info[0].value
    assert "offline_evaluation" in said
    assert "make evaluate" in said


def test_the_evaluation_page_survives_a_store_of_before_there_were_evaluations(database: Path):
    open_store(database).record_runs(run_rows("first"))
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TABLE evaluations")

    assert "offline_evaluation" in open_page("evaluation").info[0].value


def test_the_evaluation_page_shows_the_latest_and_what_it_is_ahead_of(database: Path):
    store = open_store(database)
    store.record_runs(run_rows("first"))
    store.record_evaluation(evaluation_rows("new"))
    store.record_evaluation(evaluation_rows("old", NOW - timedelta(days=7), drift=0.2))

    app = open_page("evaluation")

    shown = metrics(app)
    assert shown["NDCG@10 of what is shown"] == "0.340"
    assert shown["Ahead of popularity"] == "+0.120"
    assert shown["Answers"] == "800"
    assert not app.warning
    assert len(app.get("plotly_chart")) == 3


def test_the_evaluation_page_warns_where_a_baseline_is_ahead(database: Path):
    store = open_store(database)
    store.record_runs(run_rows("first"))
    rows = evaluation_rows("worse")
    for row in rows:
        if (row["policy"], row["metric"], row["segment"]) == ("popularity", "ndcg@10", "all"):
            row |= {"mean": 0.5, "diff_mean": -0.16, "diff_low": -0.2, "diff_high": -0.1}
    store.record_evaluation(rows)

    assert "`popularity` is ahead" in open_page("evaluation").warning[0].value


def test_an_evaluation_of_baselines_alone_is_shown(database: Path):
    store = open_store(database)
    store.record_runs(run_rows("first"))
    rows = [row for row in evaluation_rows("some") if row["policy"] in ("popularity", "random")]
    rows = [row for row in rows if row["segment"] != "cold"]
    store.record_evaluation([row | {"diff_mean": None, "diff_low": None, "diff_high": None} for row in rows])

    app = open_page("evaluation")

    assert metrics(app)["Ahead of popularity"] == "—"


def test_the_overview_shows_what_the_stores_held_at_the_last_publish(database: Path):
    store = open_store(database)
    details = {"messages": 12_345, "vectors": 12_340, "users": 678, "users_without_intent": 0}
    store.record_runs(run_rows("run", publish={"details": details}))

    app = open_page("overview")

    shown = metrics(app)
    assert shown["Messages in MongoDB"] == "12,345"
    assert shown["Vectors in Milvus"] == "12,340"
    assert shown["Users in the graph"] == "678"
    assert any("Messages without a vector" in one.value for one in app.markdown)


def test_the_overview_of_a_clean_run_says_that_nothing_is_wrong(database: Path):
    details = {"messages": 5, "vectors": 5, "users": 2, "users_without_intent": 0}
    open_store(database).record_runs(run_rows("run", publish={"details": details}))

    assert "Nothing is wrong" in open_page("overview").success[0].value


def test_a_link_to_a_run_opens_that_run(database: Path):
    store = open_store(database)
    broken = {"status": "failed", "error_type": "StoreError", "error": "neo4j: does not answer"}
    store.record_runs(run_rows("older", NOW - timedelta(days=300), embed=broken))
    store.record_runs(run_rows("newer"))

    assert open_page("runs").code[0].value == "newer"
    app = open_page("runs", run="older")
    assert app.code[0].value == "older"
    assert app.code[1].value == "neo4j: does not answer"


def test_a_link_to_a_run_that_is_gone_says_so(database: Path):
    open_store(database).record_runs(run_rows("run"))

    assert "no such run" in open_page("runs", run="gone").info[0].value


def test_two_runs_are_compared_stage_by_stage_under_one_address(database: Path):
    store = open_store(database)
    store.record_runs(run_rows("older", NOW - timedelta(days=1), messages=500))
    store.record_runs(run_rows("newer"))

    app = open_page("runs", run="newer", part="Compare", **{"with": "older"})

    table = app.dataframe[1].value.set_index("Stage")
    assert table.loc["embed", ["Rows in", "Rows in, other"]].tolist() == [1000, 500]
    assert table.loc["embed", "Change"] > 0


def test_every_attempt_of_a_run_is_shown_with_what_failed_first(database: Path):
    store = open_store(database)
    store.record_runs(run_rows("run"))
    figures = {"rows_in": 5, "rows_out": 5, "rejected": 0, "skipped": 0, "bytes_written": 20480, "seconds": 1.0}
    whole = {"run_id": "run", "stage": "embed", "shard": 0, "started_at": NOW, "finished_at": NOW, **figures}
    told = {"error_type": "StoreError", "error": "milvus: does not answer", "model": "m", "code_version": "1.0+abc"}
    with store.engine.begin() as connection:
        for attempt, status in ((1, "failed"), (2, "success")):
            connection.execute(insert(StageAttempt).values(**whole, **told, attempt=attempt, status=status))

    app = open_page("runs", part="Attempts")

    table = app.dataframe[1].value
    assert table["Attempt"].tolist() == [1, 2]
    assert table["Error"][0] == "StoreError: milvus: does not answer"
    assert any(one.value.startswith("1 failed; 2 in all") for one in app.caption)


def test_runs_are_shown_by_pages_and_by_how_they_ended(database: Path):
    store = open_store(database)
    for number in range(30):
        broken = {"embed": {"status": "failed"}} if number % 10 == 0 else {}
        store.record_runs(run_rows(f"run {number:02}", NOW - timedelta(hours=number), **broken))

    assert open_page("runs", page="2").dataframe[0].value["Run"].tolist() == [f"run {n}" for n in range(25, 30)]
    assert open_page("runs", status="failed").dataframe[0].value["Run"].tolist() == ["run 00", "run 10", "run 20"]
    assert open_page("runs", name="N 07").dataframe[0].value["Run"].tolist() == ["run 07"]
    assert "No run matches" in open_page("runs", name="none").info[0].value


def test_rejected_rows_that_cannot_be_read_spoil_no_other_part(database: Path):
    open_store(database).record_runs(run_rows("run", ingest={"rejected": 3}))

    app = open_page("runs", part="Rejected rows")

    assert "mongodb" in app.error[0].value
    assert len(app.dataframe) == 1


def test_a_user_is_asked_for_and_some_are_offered(seeded: Path, monkeypatch: pytest.MonkeyPatch):
    _use(seeded, monkeypatch)

    app = open_page("explore")

    assert "Type the id" in app.info[0].value
    assert app.get("page_link")


def test_what_is_no_id_of_a_user_is_asked_of_no_store(seeded: Path, monkeypatch: pytest.MonkeyPatch):
    _use(seeded, monkeypatch)

    app = open_page("explore", user="a/../b")

    assert "No user has such an id" in app.warning[0].value
    assert not app.error


def test_a_user_while_the_api_is_down_is_said_to_be_out_of_reach(seeded: Path, monkeypatch: pytest.MonkeyPatch):
    _use(seeded, monkeypatch)

    assert "API_URL" in open_page("explore", user="maria").error[0].value


def test_engagement_shows_intervals_and_who_comes_back(database: Path):
    seed(database)
    store = open_store(database)
    shown = {"campaign_id": "city_breaks", "run_id": "r", "position": None, "propensity": None, "policy": None}
    moment = int((NOW - timedelta(days=3)).timestamp() * 1000)
    rows = [
        {**shown, "event_id": f"{user} {event}", "user_id": f"u{user}", "event": event, "timestamp": moment}
        for user in range(8)
        for event in (("impression", "click", "conversion") if user < 2 else ("impression",))
    ]
    store.set_events(rows)
    store.roll_up_engagement([f"u{user}" for user in range(8)], half_life_days=30)
    store.refresh_campaign_totals()

    app = open_page("engagement")

    assert metrics(app)["Clicked, where shown"] == "25.0%"
    table = app.dataframe[0].value.set_index("Campaign")
    assert table.loc["City breaks", ["Shown to", "Clicked by", "Converted by"]].tolist() == [8, 2, 2]
    assert len(app.get("plotly_chart")) == 6


def test_text_that_a_spreadsheet_would_run_is_quoted_in_a_download(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(DASHBOARDS))
    download = import_module("components.download")

    assert download.as_csv([{"raw": "=1+1", "row": -2}]) == "raw,row\r\n'=1+1,-2\r\n"


def test_throughput_can_be_shown_in_place_of_seconds(seeded: Path, monkeypatch: pytest.MonkeyPatch):
    _use(seeded, monkeypatch)
    app = open_page("latency")

    next(one for one in app.segmented_control if one.label == "Show").set_value("Rows per second").run()

    assert not app.exception
    assert metrics(app)["embed"].endswith("/s")


@pytest.mark.parametrize(
    ("slower", "changes", "stage", "title", "evidence"),
    [
        (
            5,
            {},
            "all stages",
            "The run was slower than usual",
            r"1,000 messages took \d+ s of work, usually \d+ s \((4|5)\.\d ×\)",
        ),
        (
            1,
            {"ingest": {"rejected": 500, "rows_out": 500}},
            "ingest",
            "Many rejected rows",
            r"500 of 1,000 rows \(50%\)\.",
        ),
        (
            1,
            {"build_graph": {"rows_out": 0}},
            "build_graph",
            "Wrote nothing",
            r"1,000 rows in, 0 skipped, 0 rejected, 0 out\.",
        ),
    ],
    ids=["a run 5 x slower", "half the rows rejected", "a silent empty stage"],
)
def test_a_planted_fault_of_a_run_is_on_the_dashboard_with_its_evidence(
    database: Path, slower: int, changes: dict[str, dict[str, Any]], stage: str, title: str, evidence: str
):
    store = open_store(database)
    for day in range(30):
        started_at = NOW - timedelta(days=30 - day)
        store.record_runs(run_rows(f"scheduled__{day:02}", started_at, 900 + day * 37 % 200))
    quiet = record_anomalies(store, ["scheduled__29"])
    rows = run_rows("scheduled__30", NOW, 1000, **changes)
    store.record_runs([row | {"seconds": row["seconds"] * slower} for row in rows])
    record_anomalies(store, ["scheduled__30"])

    page, overview = open_page("anomalies"), open_page("overview")

    assert quiet == []
    assert metrics(page)["Errors"] == "0"
    assert metrics(page)["Warnings"] == "1"
    for shown in (page, overview):
        said = words(shown)
        assert f"**{title}** in `{stage}`" in said
        assert re.search(evidence, said)
    assert [one.proto.query_string for one in page.get("page_link")] == ["run=scheduled__30"]
    assert "1 warning" in words(overview)


def test_an_anomaly_that_recurs_is_shown_once(database: Path):
    store = open_store(database)
    for number in range(3):
        store.record_runs(run_rows(f"run {number}", ingest={"rows_in": 100, "rejected": 50}))

    app = open_page("anomalies")

    titles = [one.value for one in app.markdown if "Many rejected rows" in one.value]
    assert len(titles) == 1
    assert any("3 runs" in one.value for one in app.markdown)


def test_looking_at_every_page_changes_nothing(seeded: Path, monkeypatch: pytest.MonkeyPatch):
    _use(seeded, monkeypatch)
    with sqlite3.connect(seeded) as connection:
        before = list(connection.iterdump())

    for page in PAGES:
        open_page(page)

    with sqlite3.connect(seeded) as connection:
        assert list(connection.iterdump()) == before
