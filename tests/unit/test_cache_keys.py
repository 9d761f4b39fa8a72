"""Keys of cached answers are as different as what was asked, and no id is more than an id to any store."""

import sys
import unicodedata
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from personalization.recommend.service import Ask, Recommender
from personalization.schemas import Event, Message, erasure_id, is_identifier
from personalization.settings import Settings
from personalization.stores.cache import answer_key
from pydantic import ValidationError
from redis.crc import key_slot

PUNCTUATION = "_.:@+=|~-"
IDS = st.from_regex(r"\A[\w.:@+=|~-]{1,128}\Z").filter(is_identifier)

# Few of each and alike, so that a key that leaves something out, or mixes two up, is seen.
ODD = ["a", "b", "a, b", "a', 'b", "None", "True", "5", "a:5", "", "é", "e\u0301", "x" * 64]
ASKS = st.builds(
    Ask,
    st.sampled_from(["a", "b", "ab", "a:5", "a:b", "a|b", "answer:a", "None", "x" * 128]),
    st.integers(1, 50) | st.sampled_from([5, 50]),
    st.none() | st.sampled_from(ODD) | st.text(max_size=64),
    st.frozensets(st.sampled_from(ODD) | st.text(max_size=3), max_size=4),
    st.booleans(),
)


@pytest.fixture(scope="module")
def recommender() -> Recommender:
    """One that is never asked, so it connects to nothing."""
    return Recommender.from_settings(Settings(_env_file=None))


def key(recommender: Recommender, ask: Ask) -> str:
    return answer_key(ask.user_id, recommender.variant(ask))


@given(asks=st.lists(ASKS, min_size=2, max_size=30))
@example(asks=[Ask("a", 5), Ask("a", 5, None, frozenset(), explain=False), Ask("a:5", 5), Ask("a", 55)])
@example(asks=[Ask("a", 5, "b"), Ask("a", 5, None, frozenset({"b"})), Ask("a", 5, "b", frozenset({"b"}))])
@example(asks=[Ask("a", 5, None, frozenset({"a, b"})), Ask("a", 5, None, frozenset({"a", "b"}))])
@example(asks=[Ask("a", 5, None, frozenset({"a', 'b"})), Ask("a", 5, None, frozenset({"a", "b"}))])
@example(asks=[Ask("a", 5, "None"), Ask("a", 5), Ask("a", 5, explain=True), Ask("a", 5, "", explain=True)])
def test_another_ask_has_another_key_and_the_same_the_same(recommender: Recommender, asks: list[Ask]) -> None:
    keys = {ask: key(recommender, ask) for ask in asks}

    assert len(set(keys.values())) == len(keys)
    for ask in asks:
        again = ask._replace(exclude=frozenset(sorted(ask.exclude, reverse=True)))
        assert key(recommender, again) == keys[ask]


@pytest.fixture(scope="module")
def twin(recommender: Recommender) -> Recommender:
    """Of another process with the same settings."""
    return Recommender.from_settings(recommender.settings.model_copy())


@given(ask=ASKS)
def test_a_key_is_short_and_the_same_in_every_process(recommender: Recommender, twin: Recommender, ask: Ask) -> None:
    assert key(twin, ask) == key(recommender, ask)
    assert len(recommender.variant(ask)) <= 40
    assert recommender.variant(ask).isascii()


@pytest.mark.parametrize(
    "change",
    [
        {"ranker": "fusion"},
        {"exploration_share": 0.1},
        {"experiment_name": "autumn"},
        {"experiment_ranker": "fusion"},
        {"experiment_share": 0.2},
        {"neighbours": 21},
        {"profile_half_life_days": 31},
    ],
)
@pytest.mark.parametrize("ask", [Ask("a"), Ask("a", 5, "b", frozenset({"c"}), explain=True)])
def test_processes_that_answer_otherwise_share_no_answers(
    recommender: Recommender, change: dict[str, Any], ask: Ask
) -> None:
    other = Recommender.from_settings(recommender.settings.model_copy(update=change))

    assert key(other, ask) != key(recommender, ask)


@given(one=IDS, other=IDS, variant=st.from_regex(r"\A[0-9a-f]{8}:[0-9]{1,2}(:[0-9a-f]{24})?\Z"))
@example(one="a", other="a:b", variant="00000000:5")
@example(one="a", other="answer:a", variant="00000000:5")
def test_an_erased_user_s_keys_are_theirs_alone_and_in_one_slot(one: str, other: str, variant: str) -> None:
    found = answer_key(one, variant)

    assert found.startswith(answer_key(one, ""))
    assert found.startswith(answer_key(other, "")) == (one == other)
    assert key_slot(found.encode()) == key_slot(f"touched:{{{one}}}".encode())
    assert not set("*?[]^\\") & set(answer_key(one, ""))  # it is a pattern there
    assert (erasure_id(one) == erasure_id(other)) == (one == other)


def test_an_id_is_made_of_letters_digits_and_some_punctuation_of_all_unicode() -> None:
    taken = {chr(at) for at in range(sys.maxunicode + 1) if is_identifier(f"a{chr(at)}")}

    others = {one for one in taken if unicodedata.category(one)[0] not in "LN"}
    assert others == set(PUNCTUATION)
    assert {"a", "Z", "9", "é", "名", "ا", "ａ", "९"} <= taken
    assert not any(one.isspace() or unicodedata.combining(one) for one in taken)


@pytest.mark.parametrize(
    "refused",
    [
        "",
        ".",
        "..",
        "." * 128,
        "x" * 129,
        "x" * 10_240,
        "名" * 10_240,
        "a\n",
        "\na",
        "a\r\nDEL *",
        "a\0",
        "a b",
        "a\u00a0b",
        "a\u2028b",
        "a\u200bb",
        "a\u202eb",
        "a\ufeff",
        "e\u0301",
        "\ud800",
        "a\udfff",
        "＂a＂",
        "ａ＇",
        "a／b",
        "a/b",
        "../a",
        "a\\b",
        "a{b}",
        "a*",
        "a?",
        "[a]",
        "a'",
        'a"',
        "`a`",
        "a%00",
        "a$",
        "a,b",
        "a;b",
        "a(b)",
        "a<b>",
        "a#b",
        "a&b",
        None,
        7,
        b"a",
        ["a"],
        {"$ne": ""},
    ],
)
def test_what_could_be_more_than_an_id_is_none(refused: Any) -> None:
    assert not is_identifier(refused)
    row = {"user_id": refused, "message": "hello", "timestamp": "2026-01-01T00:00:00Z"}
    with pytest.raises(ValidationError, match="user_id"):
        Message.model_validate(row)
    with pytest.raises(ValidationError, match="user_id"):
        Event.model_validate({**row, "campaign_id": "c", "event": "click"})


PATTERN = jsonschema_rs.Draft202012Validator(Event.model_json_schema()["properties"]["user_id"])


# JSON and UTF-8 hold no surrogates, and what is assigned depends on the version of Unicode.
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=140) | IDS)
@example(text="...")
@example(text="a\n")
@example(text="x" * 129)
def test_the_document_s_pattern_of_an_id_is_the_rule(text: str) -> None:
    assert PATTERN.is_valid(text) == is_identifier(text)
