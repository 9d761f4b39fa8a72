"""Files and stores that cannot be used: one clear error, lineage that says so, nothing a rerun does not heal."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import free_ports
from personalization.errors import StoreError
from personalization.pipeline.run import run_pipeline
from personalization.settings import Settings
from sqlalchemy import create_engine, text

ROW = {"user_id": "ann", "message": "I want to book a flight to Lisbon", "timestamp": "2026-10-01T09:00:00Z"}
ARRAY = json.dumps([{**ROW, "message": f"{ROW['message']} on day {day}"} for day in range(50)])


def truncated_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(ARRAY.encode())[:-20])


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda _: None, "no such file"),
    "directory": (lambda path: path.mkdir(), "is a directory"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "blank": (lambda path: path.write_bytes(b" \n\n"), "white space"),
    "not_json": (lambda path: path.write_text("user,message\nann,hello\n"), "row 1: not valid JSON"),
    "truncated": (lambda path: path.write_text(ARRAY[:-30]), "row 50"),
    "truncated_gzip": (truncated_gzip, "truncated"),
    "wrong_schema": (
        lambda path: path.write_text(json.dumps([{"who": "ann", "said": "hi"}])),
        "user_id: Field required",
    ),
    "utf16": (lambda path: path.write_bytes(ARRAY.encode("utf-16")), "UTF-16"),
}


def lineage(settings: Settings) -> dict[str, tuple[str, str | None]]:
    engine = create_engine(f"sqlite:///{settings.sqlite_path}")
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT stage, status, error FROM pipeline_runs"))
        found = {row.stage: (row.status, row.error) for row in rows}
    engine.dispose()
    return found


@pytest.mark.parametrize("case", FILES)
def test_an_unusable_file_ends_in_one_clear_error(case: str, settings: Settings, tmp_path: Path) -> None:
    write, problem = FILES[case]
    path = tmp_path / f"{case}.json"
    write(path)

    summary = run_pipeline(path, settings)

    assert summary["status"] == "failed"
    assert str(path) in summary["error"]
    assert problem in summary["error"]
    status, error = lineage(settings)["ingest"]
    assert status == "failed"
    assert error == summary["error"]


def test_a_file_that_was_cut_off_heals_when_it_comes_whole(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(ARRAY[:-30])
    assert run_pipeline(path, settings)["status"] == "failed"
    path.write_text(ARRAY)

    summary = run_pipeline(path, settings)

    assert summary["status"] == "success"
    published = next(one for one in summary["stages"] if one["stage"] == "publish")["details"]
    assert published["messages"] == published["vectors"] == 50


DOWN: dict[str, tuple[dict[str, str], str]] = {
    "mongodb": ({"mongodb_uri": "mongodb://127.0.0.1:{port}/?directConnection=true"}, "ingest"),
    "milvus": ({"milvus_port": "{port}"}, "prepare"),
    "neo4j": ({"neo4j_uri": "bolt://127.0.0.1:{port}"}, "prepare"),
    "redis": ({"redis_url": "redis://127.0.0.1:{port}/0"}, "publish"),
}


@pytest.mark.parametrize("store", DOWN)
def test_a_store_that_is_down_is_named_and_the_next_run_heals(store: str, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(ARRAY)
    change, failing_stage = DOWN[store]
    [port] = free_ports(1)
    moved = {name: value.format(port=port) for name, value in change.items()}
    down = Settings(_env_file=None, **{**settings.model_dump(), **moved, "store_timeout_s": 2})

    summary = run_pipeline(path, down)

    assert summary["status"] == "failed"
    assert summary["error"].startswith(f"{store}: does not answer")
    assert lineage(settings)[failing_stage] == ("failed", summary["error"])
    assert run_pipeline(path, settings)["status"] == "success"


@pytest.mark.parametrize(
    ("store", "change"),
    [
        ("neo4j", {"neo4j_password": "not-the-password"}),
        ("redis", {"redis_url": "redis://:wrong@{address}/0"}),
    ],
)
def test_a_store_that_refuses_the_password_is_named_and_the_password_is_not(
    store: str, change: dict[str, str], settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(ARRAY)
    address = settings.redis_url.get_secret_value().split("@")[1].split("/")[0]
    change = {name: value.format(address=address) for name, value in change.items()}

    summary = run_pipeline(path, Settings(_env_file=None, **{**settings.model_dump(), **change}))

    assert summary["status"] == "failed"
    assert summary["error"].startswith(f"{store}: refused the")
    assert "not-the-password" not in json.dumps(summary)
    assert "wrong" not in json.dumps(summary)


def test_an_unwritable_analytics_database_is_named(settings: Settings, tmp_path: Path) -> None:
    occupied = tmp_path / "analytics.db"
    occupied.write_bytes(b"this is not a database, but long enough to be read as the header of one" * 20)

    with pytest.raises(StoreError, match=r"analytics: .*SQLITE_PATH"):
        run_pipeline(tmp_path / "missing.json", settings)
