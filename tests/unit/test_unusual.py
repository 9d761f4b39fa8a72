"""What is unusual beside the history, over a real SQLite file: planted faults show, quiet months do not."""

import shutil
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dashboard_data import NOW, open_store, run_rows
from personalization.quality.anomalies import anomalies_since, find_anomalies, record_anomalies
from personalization.quality.anomaly import Anomaly
from personalization.quality.baselines import expect_effort, expect_level
from personalization.sketches import Sketch, distances, sketch
from personalization.stores.analytics import AnalyticsStore

DAYS = 60
WEDNESDAY = NOW - timedelta(days=(NOW.weekday() - 2) % 7)
"""Of the run behind the quiet months, so that no test depends on the day it runs on."""
PUBLISHED = {"details": {"messages": 100, "vectors": 100, "users": 50, "users_without_intent": 0}}
BASE = {"ingest": 4.0, "embed": 30.0, "upsert_vectors": 12.0, "detect_intents": 8.0, "build_graph": 15.0}


@pytest.fixture
def store(tmp_path: Path) -> AnalyticsStore:
    return open_store(tmp_path / "analytics.db")


@pytest.fixture(scope="module")
def two_months(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of two quiet months, made once."""
    path = tmp_path_factory.mktemp("history") / "analytics.db"
    store = open_store(path)
    for day in range(DAYS):
        record(store, day)
    store.engine.dispose()
    return path


@pytest.fixture
def history(two_months: Path, tmp_path: Path) -> AnalyticsStore:
    """Two quiet months of the test's own."""
    shutil.copy(two_months, tmp_path / "history.db")
    return open_store(tmp_path / "history.db")


def vectors(seed: int, centre: int = 0, rows: int = 400) -> Any:
    """Unit vectors around a direction."""
    random = np.random.default_rng(seed)
    direction = np.random.default_rng(1000 + centre).standard_normal(32)
    drawn = direction / np.linalg.norm(direction) + random.standard_normal((rows, 32)) * 0.15
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def record(
    store: AnalyticsStore, day: int, *, rows: int | None = None, prefix: str = "scheduled", **changes: Any
) -> str:
    """A run of that day: fewer rows on weekends, all with some noise. `changes` are factors on seconds by stage, or
    columns of a stage.
    """
    random = np.random.default_rng(day)
    moment = (WEDNESDAY - timedelta(days=DAYS - day)).replace(hour=1)
    usual = 2000 * (0.5 if moment.weekday() >= 5 else 1.0) * np.exp(random.normal(0, 0.05))
    rows = int(usual) if rows is None else rows
    rejected = int(random.binomial(rows, 0.02))
    others = int(random.binomial(rows - rejected, 0.25))
    staged = rows - rejected
    columns: dict[str, dict[str, Any]] = {"publish": dict(PUBLISHED)}
    for stage in run_rows("x"):
        name = stage["stage"]
        seconds = (1 + BASE.get(name, 2.0) * rows / 2000) * np.exp(random.normal(0, 0.08))
        columns.setdefault(name, {})
        columns[name] |= {"seconds": seconds, "rows_in": staged, "rows_out": staged}
    columns["ingest"] |= {"rows_in": rows, "rejected": rejected}
    columns["ingest_events"] |= {"rows_in": 300, "rows_out": 300, "seconds": np.exp(random.normal(0, 0.08))}
    columns["detect_intents"] |= {"rows_out": staged - others, "skipped": others}
    columns["embed"]["details"] = {"model": "m", "sketch": sketch(vectors(day)).to_details()}
    for name, change in changes.items():
        for stage in columns if name == "all_stages" else [name]:
            if isinstance(change, dict):
                columns[stage] |= change
            else:
                columns[stage]["seconds"] *= change
    run_id = f"{prefix}__{moment.isoformat()}"
    store.record_runs(run_rows(run_id, moment, rows, **columns))
    return run_id


def planted(store: AnalyticsStore, **changes: Any) -> list[Anomaly]:
    """What is found in a run after those of the store."""
    record(store, DAYS, **changes)
    return record_anomalies(store)


def test_two_quiet_months_and_the_weeks_behind_them_have_no_anomaly(history: AnalyticsStore):
    for day in range(DAYS, DAYS + 21):
        record(history, day)
        assert record_anomalies(history) == [], day


def test_a_run_that_takes_five_times_as_long_is_one_slow_run(history: AnalyticsStore):
    [found] = planted(history, all_stages=5.0)

    assert (found.title, found.stage) == ("The run was slower than usual", "all stages")
    assert found.observed is not None
    assert found.expected is not None
    assert 4 < found.observed / found.expected < 6
    assert f"{found.observed:,.0f} s of work, usually {found.expected:,.0f} s" in found.evidence


def test_a_stage_that_takes_three_times_as_long_is_named_alone(history: AnalyticsStore):
    [found] = planted(history, build_graph=3.0)

    assert (found.title, found.stage) == ("Slower than usual", "build_graph")
    assert found.score is not None
    assert found.score > 5
    assert "robust standard deviations" in found.evidence


def test_half_the_rows_rejected_is_told_once_by_the_rule(history: AnalyticsStore):
    [found] = planted(history, ingest={"rejected": 1000, "rows_in": 2000})

    assert found.title == "Many rejected rows"
    assert found.evidence == "1,000 of 2,000 rows (50%)."


def test_more_rejects_than_ever_are_told_though_no_rule_is_broken(history: AnalyticsStore):
    [found] = planted(history, ingest={"rejected": 180, "rows_in": 2000})

    assert (found.title, found.stage) == ("More rejected rows than usual", "ingest")
    assert "180 of 2,000 rows (9.0%), usually " in found.evidence
    assert found.expected == pytest.approx(0.02, abs=0.005)


def test_a_silent_empty_stage_is_told(history: AnalyticsStore):
    found = planted(history, build_graph={"rows_out": 0})

    assert [(one.title, one.stage) for one in found] == [("Wrote nothing", "build_graph")]


@pytest.mark.parametrize(
    ("rows", "title"),
    [(200, "Fewer rows than usual"), (0, "Fewer rows than usual"), (9000, "More rows than usual")],
)
def test_a_volume_that_no_weekday_has_is_told(history: AnalyticsStore, rows: int, title: str):
    found = planted(history, rows=rows)

    assert [(one.title, one.stage) for one in found] == [(title, "ingest")]
    assert f"{rows:,} rows, usually" in found[0].evidence


def test_a_holiday_as_quiet_as_a_sunday_is_none(history: AnalyticsStore):
    assert planted(history, rows=1000) == []


@pytest.mark.parametrize("prefix", ["manual", "backfill"])
def test_a_file_taken_by_hand_may_be_of_any_size(history: AnalyticsStore, prefix: str):
    assert planted(history, rows=20_000, prefix=prefix) == []


@pytest.mark.parametrize(("share", "more"), [(0.7, "More"), (0.02, "Fewer")])
def test_another_share_of_messages_without_intent_is_told(history: AnalyticsStore, share: float, more: str):
    others = {"rows_in": 2000, "skipped": int(2000 * share), "rows_out": int(2000 * (1 - share))}

    [found] = planted(history, detect_intents=others)

    assert found.title == f"{more} messages of no intent than usual"
    assert f"({share:.1%}) expressed no intent, usually 2" in found.evidence


def test_messages_from_elsewhere_are_drift(history: AnalyticsStore):
    some = np.concatenate([vectors(7, rows=200), vectors(8, centre=1, rows=200)])
    drifted = {"details": {"model": "m", "sketch": sketch(some).to_details()}}

    [found] = planted(history, embed=drifted)

    assert (found.title, found.stage) == ("Messages unlike those before", "embed")
    assert found.observed is not None
    assert found.expected is not None
    assert found.observed > 0.2 > found.expected


def test_vectors_of_another_model_are_not_compared(history: AnalyticsStore):
    other = {"details": {"model": "another", "sketch": sketch(vectors(8, centre=1)).to_details()}}

    assert planted(history, embed=other) == []


def test_a_user_who_writes_ten_times_as_much_as_the_busiest_is_named_and_erased_with(history: AnalyticsStore):
    run_id = record(history, DAYS)
    with sqlite3.connect(str(history.engine.url.database)) as connection:
        runs = [row[0] for row in connection.execute("SELECT DISTINCT run_id FROM pipeline_runs")]
    for one in runs:
        said(history, one, "somebody", 20)
        said(history, one, "quiet", 3)
    said(history, run_id, "robot", 240)

    [found] = record_anomalies(history)

    assert (found.title, found.stage, found.user_id) == ("A user is unusually busy", "ingest", "robot")
    assert "robot left 240 on one day" in found.evidence
    assert "usually 20" in found.evidence
    assert "robot" not in found.anomaly_id
    assert history.erase_user("robot")["anomalies"] == 1
    assert find_anomalies(history.engine, 5) == []


def said(store: AnalyticsStore, run_id: str, user_id: str, messages: int) -> None:
    rows = [
        {
            "message_id": f"{run_id} {user_id} {at}",
            "intent_id": "other",
            "user_id": user_id,
            "timestamp": 1_790_000_000_000,
            "confidence": 1.0,
            "run_id": run_id,
        }
        for at in range(messages)
    ]
    store.replace_message_intents([row["message_id"] for row in rows], rows)


def test_what_became_the_new_normal_is_told_twice_at_most(history: AnalyticsStore):
    told = []
    for day in range(DAYS, DAYS + 8):
        record(history, day, build_graph=4.0)
        told.append(len(record_anomalies(history)))

    assert told == [1, 1, 0, 0, 0, 0, 0, 0]


def test_recording_again_changes_nothing_and_a_mended_run_loses_its_anomalies(history: AnalyticsStore):
    run_id = record(history, DAYS, build_graph=3.0)
    record_anomalies(history)
    with sqlite3.connect(str(history.engine.url.database)) as connection:
        before = list(connection.iterdump())

    record_anomalies(history)
    record_anomalies(history, [run_id])

    with sqlite3.connect(str(history.engine.url.database)) as connection:
        assert sorted(connection.iterdump()) == sorted(before)
    record(history, DAYS)
    assert record_anomalies(history, [run_id]) == []
    assert find_anomalies(history.engine, 5) == []


def test_the_anomalies_of_a_run_stay_when_later_ones_are_recorded(history: AnalyticsStore):
    odd = record(history, DAYS, build_graph=3.0)
    record_anomalies(history)
    record(history, DAYS + 1)
    record_anomalies(history)

    assert [one.run_id for one in anomalies_since(history.engine, NOW - timedelta(days=30), 100)] == [odd]
    assert anomalies_since(history.engine, NOW + timedelta(days=5), 100) == []


def test_few_runs_are_no_history(store: AnalyticsStore):
    for day in range(9):
        record(store, day)
    record(store, 10, all_stages=10.0)

    assert record_anomalies(store) == []


def test_a_database_of_before_there_were_anomalies_has_none(store: AnalyticsStore):
    store.record_runs(run_rows("run", publish=PUBLISHED))
    with sqlite3.connect(str(store.engine.url.database)) as connection:
        connection.execute("DROP TABLE anomalies")

    assert find_anomalies(store.engine, 5) == []


# --- the arithmetic


def test_a_level_follows_its_weekday_and_its_trend():
    days = np.arange(20_000.0, 20_056.0)
    weekend = np.isin(np.floor(days) % 7, [2, 3])  # the epoch was a Thursday
    values = 8 + 0.01 * (days - days[0]) - 0.7 * weekend

    expected = [expect_level(days, values, day, floor=0.1).high for day in (20_056.0, 20_060.0)]

    truth = [8 + 0.01 * 56 - 0.7 * (20_056 % 7 in (2, 3)), 8 + 0.01 * 60 - 0.7 * (20_060 % 7 in (2, 3))]
    assert expected == pytest.approx(truth, abs=0.1)
    lowest = expect_level(days, values, 20_056.0, floor=0.1, quiet_days=True).low
    assert lowest == pytest.approx(8.56 - 0.7, abs=0.1)


def test_effort_of_far_more_rows_may_be_anything_up_to_in_proportion():
    random = np.random.default_rng(1)
    sizes = np.log(random.uniform(900, 1100, 60))
    efforts = np.log(5 + 0.01 * np.exp(sizes)) + random.normal(0, 0.02, 60)

    expected = expect_effort(sizes, efforts, float(np.log(10_000)), floor=0.05)

    assert expected.distance(float(np.log(5 + 0.01 * 10_000))) == 0
    assert expected.distance(float(np.log(4 * (5 + 0.01 * 10_000)))) > 0.5


def test_one_odd_run_of_before_does_not_widen_what_is_usual():
    values = np.random.default_rng(2).normal(0, 0.1, 60)
    days = np.arange(60.0)
    calm = expect_level(days, values, 60.0, floor=0.05)
    values[[10, 30]] = 8.0

    assert expect_level(days, values, 60.0, floor=0.05).scale == pytest.approx(calm.scale, rel=0.25)


def test_a_sketch_tells_apart_what_was_drawn_apart_and_nothing_else():
    means = [sketch(vectors(seed)) for seed in range(20)]
    centre = np.mean([one.mean for one in means], axis=0)
    alike, other = sketch(vectors(99)), sketch(vectors(99, centre=1))

    def apart(one: Sketch) -> float:
        return float(distances(one.mean[None], np.array([float(one.vectors)]), centre)[0])

    assert abs(apart(alike)) < 0.005
    assert apart(other) > 0.3
    kept = Sketch.from_details(alike.to_details())
    assert kept is not None
    assert apart(kept) == pytest.approx(apart(alike), abs=1e-4)
    assert sketch(vectors(1)[:0]) is None
    assert Sketch.from_details({"mean": [0.1], "vectors": 3}) is None
    assert Sketch.from_details(None) is None


def test_an_anomaly_keeps_its_id_whatever_its_figures():
    one = Anomaly("warning", None, datetime(2026, 5, 4, 3, 2, tzinfo=UTC), "/v1/x", "Slow", "1 s", "Look.")

    later = replace(one, run_started_at=datetime(2026, 5, 4, 23, 0, tzinfo=UTC), evidence="2 s", observed=2.0)
    assert later.anomaly_id == one.anomaly_id
    assert replace(one, run_started_at=datetime(2026, 5, 5, tzinfo=UTC)).anomaly_id != one.anomaly_id
    assert replace(one, user_id="u").anomaly_id != one.anomaly_id
