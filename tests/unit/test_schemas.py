"""The vocabulary: which messages, campaigns and catalogs are valid, and how ids come about."""

import json
import uuid
from datetime import UTC, date, datetime, timedelta
from time import process_time
from typing import Any

import pytest
from personalization.schemas import Audience, Campaign, Catalog, Event, Intent, Message, Recommendation
from pydantic import ValidationError

GOOD = {"user_id": "ann", "message": "I want to fly to Lisbon", "timestamp": "2026-10-01T09:00:00Z"}


def message(**changes: Any) -> Message:
    return Message.model_validate(GOOD | changes)


def problems(model: Any, content: dict[str, Any]) -> dict[str, str]:
    """Field to reason."""
    with pytest.raises(ValidationError) as refused:
        model.model_validate(content)
    return {
        ".".join(map(str, error["loc"])): error["msg"].removeprefix("Value error, ") for error in refused.value.errors()
    }


# --- messages

NAMES = "must be 1 to 128 letters, digits or any of . : @ + = | ~ - _"
NO_TIME = "is not an ISO 8601 date and time such as 2026-01-31T09:00:00Z"
NO_STRING = "must be an ISO 8601 string such as 2026-01-31T09:00:00Z"
NO_TEXT = "Input should be a valid string"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("user_id", "", NAMES),
        ("user_id", "x" * 129, NAMES),
        ("user_id", "two words", NAMES),
        ("user_id", "ann\n", NAMES),
        ("user_id", "a/b", NAMES),
        ("user_id", "a\\b", NAMES),
        ("user_id", "o'neil", NAMES),
        ("user_id", 'an"n', NAMES),
        ("user_id", "a\0b", NAMES),
        ("user_id", "a\ud800", NAMES),
        ("user_id", 7, NO_TEXT),
        ("user_id", None, NO_TEXT),
        ("user_id", ["ann"], NO_TEXT),
        ("message", "", "is blank"),
        ("message", " \t\r\n\u3000", "is blank"),
        ("message", "a\0b", "holds a NUL character"),
        ("message", "a\ud83d", "is not valid UTF-8 (a lone surrogate or an undecodable byte)"),
        ("message", "caf\udce9", "is not valid UTF-8 (a lone surrogate or an undecodable byte)"),
        ("message", 5, NO_TEXT),
        ("message", None, NO_TEXT),
        ("message", {"text": "hi"}, NO_TEXT),
        ("timestamp", "", NO_TIME),
        ("timestamp", "yesterday", NO_TIME),
        ("timestamp", "2026-02-30T09:00:00Z", NO_TIME),
        ("timestamp", "2026-10-01T25:00:00Z", NO_TIME),
        ("timestamp", "2026-10-01T09:00:00+99:00", NO_TIME),
        ("timestamp", "01.10.2026 09:00", NO_TIME),
        ("timestamp", "0001-01-01T00:00:00+14:00", NO_TIME),
        ("timestamp", "9999-12-31T23:59:59-12:00", NO_TIME),
        ("timestamp", "1969-12-31T23:59:59Z", "is before 1970"),
        ("timestamp", "1970-01-01T00:30:00+01:00", "is before 1970"),
        ("timestamp", 1_790_000_000, NO_STRING),
        ("timestamp", 1.5, NO_STRING),
        ("timestamp", None, NO_STRING),
        ("timestamp", True, NO_STRING),
        ("message_id", "", NAMES),
        ("message_id", "m 1", NAMES),
        ("message_id", 1, NO_TEXT),
    ],
)
def test_a_bad_field_is_refused_with_its_reason(field: str, value: Any, reason: str):
    assert problems(Message, GOOD | {field: value}) == {field: reason}


@pytest.mark.parametrize("field", GOOD)
def test_a_missing_field_is_refused(field: str):
    rest = {name: value for name, value in GOOD.items() if name != field}

    assert problems(Message, rest) == {field: "Field required"}


def test_all_bad_fields_are_named_at_once():
    found = problems(Message, {"user_id": "", "message": " ", "timestamp": "now", "message_id": ""})

    assert set(found) == {"user_id", "message", "timestamp", "message_id"}


@pytest.mark.parametrize(
    "name", ["a", "x" * 128, "ann@example.org", "+49-170:5=x|~_.", "Zoë", "用户1", "00000000-0000"]
)
def test_names_of_all_usual_kinds_are_taken(name: str):
    assert message(user_id=name, message_id=name).user_id == name


def test_text_is_taken_as_it_is():
    text = '  "Grüße" from 東京 😀\n\tend \u200b '

    assert message(message=text).message == text


def test_fields_nobody_knows_are_left_out():
    assert "channel" not in message(channel="app").model_dump()


def test_a_message_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        message().message = "something else"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2026-10-01T09:00:00Z", datetime(2026, 10, 1, 9, tzinfo=UTC)),
        ("2026-10-01T09:00:00", datetime(2026, 10, 1, 9, tzinfo=UTC)),
        ("2026-10-01 09:00", datetime(2026, 10, 1, 9, tzinfo=UTC)),
        ("20261001T090000Z", datetime(2026, 10, 1, 9, tzinfo=UTC)),
        ("2026-10-01T11:00:00+02:00", datetime(2026, 10, 1, 9, tzinfo=UTC)),
        ("2026-09-30T23:30:00-09:30", datetime(2026, 10, 1, 9, tzinfo=UTC)),
        ("2026-10-01T09:00:00.123456Z", datetime(2026, 10, 1, 9, 0, 0, 123456, tzinfo=UTC)),
        ("1970-01-01T00:00:00Z", datetime(1970, 1, 1, tzinfo=UTC)),
        ("1969-12-31T23:00:00-01:00", datetime(1970, 1, 1, tzinfo=UTC)),
    ],
)
def test_instants_are_utc_however_they_are_written(written: str, meant: datetime):
    instant = message(timestamp=written).timestamp

    assert instant == meant
    assert instant.utcoffset() == timedelta(0)


@pytest.mark.parametrize("moment", ["1970-01-01T00:00:00", "2026-10-01T09:00:07", "2001-12-31T23:59:59"])
def test_no_millisecond_is_lost_in_the_unit_of_the_stores(moment: str):
    start = message(timestamp=moment).timestamp_ms

    counted = [message(timestamp=f"{moment}.{ms:03}").timestamp_ms - start for ms in range(1000)]

    assert counted == list(range(1000))


# --- ids and digests


def test_a_given_id_stays():
    assert message(message_id="m-1").message_id == "m-1"


@pytest.mark.parametrize("given", [{}, {"message_id": None}])
def test_an_id_is_derived_where_there_is_none(given: dict[str, None]):
    # Fixed for all time: another id would make every stored message new again.
    assert message(**given).message_id == "b0ad3e7c-6a46-53ef-871c-395bb77b3a8b"
    assert uuid.UUID(message(**given).message_id).version == 5


@pytest.mark.parametrize(
    "written", ["2026-10-01T09:00:00", "2026-10-01T11:00:00+02:00", "2026-10-01T04:30:00.000-04:30"]
)
def test_the_same_instant_in_another_offset_is_the_same_message(written: str):
    assert message(timestamp=written).message_id == message().message_id
    assert message(timestamp=written).content_hash == message().content_hash


@pytest.mark.parametrize(
    "change",
    [
        {"user_id": "bob"},
        {"message": "I want to fly to Lisbon!"},
        {"message": "I want to fly to Lisbon "},
        {"message": "i want to fly to Lisbon"},
        {"timestamp": "2026-10-01T09:00:01Z"},
        {"timestamp": "2026-10-01T09:00:00.001Z"},
    ],
)
def test_any_change_of_content_makes_another_id_and_another_hash(change: dict[str, str]):
    assert message(**change).message_id != message().message_id
    assert message(**change).content_hash != message().content_hash


def test_the_hash_is_of_the_content_alone():
    assert message(message_id="m-1").content_hash == message(message_id="m-2").content_hash
    assert len(bytes.fromhex(message().content_hash)) == 16


def test_what_stands_in_one_field_cannot_pass_for_another():
    left = message(user_id="ann|b", message="hello")
    right = message(user_id="ann", message="b|hello")

    assert left.message_id != right.message_id
    assert left.content_hash != right.content_hash


# --- campaigns

CAMPAIGN = {"id": "city_breaks", "name": "City breaks", "intents": ["flight_booking"]}


def test_a_campaign_runs_from_its_first_day_until_the_day_after_its_last():
    campaign = Campaign.model_validate(CAMPAIGN | {"active_from": "2026-01-01", "active_until": "2026-01-02"})

    assert datetime.fromtimestamp(campaign.active_from_ms / 1000, UTC) == datetime(2026, 1, 1, tzinfo=UTC)
    assert campaign.active_until_ms - campaign.active_from_ms == 86_400_000


def test_a_campaign_without_a_window_runs_always():
    campaign = Campaign.model_validate(CAMPAIGN)

    assert campaign.active_from_ms <= message(timestamp="1970-01-01T00:00:00Z").timestamp_ms
    assert campaign.active_until_ms > datetime(9999, 12, 31, tzinfo=UTC).timestamp() * 1000


def test_a_message_from_the_future_is_refused_but_for_a_clock_that_is_ahead():
    now = datetime.now(UTC)

    assert message(timestamp=(now + timedelta(hours=20)).isoformat())
    with pytest.raises(ValidationError, match="is in the future"):
        message(timestamp=(now + timedelta(days=2)).isoformat())


@pytest.mark.parametrize("last", ["2026-01-01", "2025-12-31", "2025-12-31T23:59:59Z", "2026-01-01T01:00:00+02:00"])
def test_a_window_that_ends_before_it_begins_is_refused(last: str):
    found = problems(Campaign, CAMPAIGN | {"active_from": "2026-01-01", "active_until": last})

    assert list(found) == ["active_until"]
    assert found["active_until"].startswith("is not after active_from; ")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        (date(2026, 1, 31), datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T09:30:00", datetime(2026, 1, 31, 9, 30, tzinfo=UTC)),
        ("2026-01-31T09:30:00+02:00", datetime(2026, 1, 31, 7, 30, tzinfo=UTC)),
        (datetime(2026, 1, 31, 9, 30), datetime(2026, 1, 31, 9, 30, tzinfo=UTC)),
    ],
)
def test_a_window_is_of_days_or_moments(written: Any, meant: datetime):
    campaign = Campaign.model_validate(CAMPAIGN | {"active_from": written})

    assert campaign.active_from == meant
    assert Campaign.model_validate_json(campaign.model_dump_json()) == campaign


@pytest.mark.parametrize("one", ["a", "119144", "Été 2026 (Größe: XL, 20 %)", "x" * 128, "夏", "a/b|c"])
def test_ids_of_all_printable_kinds_are_taken(one: str):
    assert Campaign(id=one, name="A campaign").id == one
    assert Intent(id=one, name="An intent", examples=["x"]).id == one


def test_numbers_become_ids():
    assert Campaign.model_validate({"id": 119144, "name": 7, "intents": [1]}).intents == ["1"]
    assert Intent.model_validate({"id": 1, "name": "One", "examples": [5]}).id == "1"
    assert Audience.model_validate({"include_users": [42], "exclude_intents": [1]}).include_users == ["42"]


def test_a_campaign_needs_no_more_than_an_id_and_a_name():
    campaign = Campaign(id="sale", name="Sale")

    assert campaign.text == "Sale"
    assert campaign.named_intents == set()
    assert (campaign.boost, campaign.pinned, campaign.frequency_cap) == (1.0, None, None)
    assert (campaign.not_again.after_conversion_days, campaign.not_again.after_dismiss_days) == (90, 30)


def test_a_campaign_names_the_intents_it_targets_includes_and_excludes():
    campaign = Campaign(
        id="sale", name="Sale", intents=["a"], audience=Audience(include_intents=["b"], exclude_intents=["c", "a"])
    )

    assert campaign.named_intents == {"a", "b", "c"}


NUL_BYTE = "a\0b"


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        *(
            ({"id": one}, "id", "match pattern")
            for one in ("", " ", " a", "a ", "a\n", "a\tb", NUL_BYTE, 'a"b', "a`b", "a\\b", "x" * 129, "a\u200bb")
        ),
        ({"id": None}, "id", "valid string"),
        ({"name": ""}, "name", "at least 1 character"),
        ({"category": ""}, "category", "at least 1 character"),
        ({"category": "x" * 65}, "category", "at most 64 characters"),
        ({"intents": "flight_booking"}, "intents", "valid list"),
        ({"intents": ["a", "b", "a"]}, "intents", "names a more than once"),
        ({"active_from": "soon"}, "active_from", "is no day or moment"),
        ({"active_from": 20260101}, "active_from", "is no day or moment"),
        ({"active_from": "0001-01-01T00:00:00+14:00"}, "active_from", "is no day or moment"),
        ({"active_until": "2026-13-01"}, "active_until", "month must be in 1..12"),
        ({"active_til": "2026-12-01"}, "active_til", "not permitted"),
        ({"boost": 0}, "boost", "greater than or equal to 0.1"),
        ({"boost": 11}, "boost", "less than or equal to 10"),
        ({"boost": "nan"}, "boost", "than or equal to"),
        ({"pinned": 0}, "pinned", "greater than or equal to 1"),
        ({"pinned": 51}, "pinned", "less than or equal to 50"),
        ({"pinned": 1.5}, "pinned", "valid integer"),
        ({"frequency_cap": {"impressions": 3}}, "frequency_cap.days", "required"),
        ({"frequency_cap": {"impressions": 0, "days": 7}}, "frequency_cap.impressions", "greater than or equal to 1"),
        ({"frequency_cap": {"impressions": 1, "days": 0}}, "frequency_cap.days", "greater than 0"),
        ({"frequency_cap": {"impressions": 1, "days": 366}}, "frequency_cap.days", "less than or equal to 365"),
        ({"not_again": {"after_dismiss_days": -1}}, "not_again.after_dismiss_days", "greater than or equal to 0"),
        ({"not_again": {"after_click_days": 1}}, "not_again.after_click_days", "not permitted"),
        ({"audience": {"include_users": ["two words"]}}, "audience.include_users.0", NAMES),
        ({"audience": {"exclude_intents": ["a`b"]}}, "audience.exclude_intents.0", "match pattern"),
        ({"audience": {"users": ["ann"]}}, "audience.users", "not permitted"),
    ],
)
def test_a_bad_campaign_is_refused(change: dict[str, Any], field: str, words: str):
    found = problems(Campaign, CAMPAIGN | change)

    assert set(found) == {field}
    assert words in found[field]


# --- events

EVENT = {"user_id": "ann", "campaign_id": "Sale 2026", "event": "click", "timestamp": "2026-10-01T09:00:00Z"}


def event(**changes: Any) -> Event:
    return Event.model_validate(EVENT | changes)


def test_an_event_says_what_was_done_where_and_by_which_policy():
    one = event(position=3, propensity=0.25, policy="bandit", channel="app")

    assert (one.position, one.propensity, one.policy) == (3, 0.25, "bandit")
    assert one.timestamp_ms == message().timestamp_ms
    assert "channel" not in one.model_dump()


def test_an_event_without_an_id_is_known_by_what_was_done_when():
    # Fixed for all time: another id would make every stored event new again.
    assert event().event_id == "1e4399f9-40bf-541d-a1c5-562f61e564bf"
    assert event(timestamp="2026-10-01T11:00:00+02:00", position=2).event_id == event().event_id
    assert event(event_id=None).event_id == event().event_id
    assert event(event_id="e-1").event_id == "e-1"


@pytest.mark.parametrize(
    "change",
    [{"user_id": "bob"}, {"campaign_id": "Sale"}, {"event": "impression"}, {"timestamp": "2026-10-01T09:00:00.001Z"}],
)
def test_any_other_deed_makes_another_event(change: dict[str, str]):
    assert event(**change).event_id != event().event_id


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("user_id", "two words", NAMES),
        ("campaign_id", "a`b", "match pattern"),
        ("campaign_id", 7, NO_TEXT),
        ("event", "purchase", "'impression', 'click', 'conversion' or 'dismiss'"),
        ("event", None, "'impression', 'click', 'conversion' or 'dismiss'"),
        ("timestamp", "now", NO_TIME),
        ("timestamp", "2999-01-01T00:00:00Z", "is in the future"),
        ("event_id", "e 1", NAMES),
        ("position", 0, "greater than or equal to 1"),
        ("position", 1001, "less than or equal to 1000"),
        ("position", "1", "valid integer"),
        ("propensity", 0, "greater than 0"),
        ("propensity", 1.01, "less than or equal to 1"),
        ("propensity", "0.5", "valid number"),
        ("policy", "", "at least 1 character"),
        ("policy", "x" * 65, "at most 64 characters"),
    ],
)
def test_a_bad_field_of_an_event_is_refused_with_its_reason(field: str, value: Any, words: str):
    found = problems(Event, EVENT | {field: value})

    assert set(found) == {field}
    assert words in found[field]


@pytest.mark.parametrize("field", EVENT)
def test_a_missing_field_of_an_event_is_refused(field: str):
    rest = {name: value for name, value in EVENT.items() if name != field}

    assert problems(Event, rest) == {field: "Field required"}


# --- the catalog

INTENTS = [
    {"id": "flight_booking", "name": "Flights", "examples": ["I want to fly to Lisbon"]},
    {"id": "film_suggestion", "name": "Films", "examples": ["Which film should I watch?", "A good film?"]},
]


def catalog(intents: list[Any] | None = None, campaigns: list[Any] | None = None) -> dict[str, Any]:
    content = {"intents": INTENTS if intents is None else intents}
    return content | {"campaigns": [CAMPAIGN] if campaigns is None else campaigns}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (catalog(intents=[*INTENTS, INTENTS[0]]), "intent ids must be unique: flight_booking"),
        (catalog(campaigns=[CAMPAIGN, CAMPAIGN]), "campaign ids must be unique: city_breaks"),
        (
            catalog(intents=[*INTENTS, INTENTS[0] | {"id": "other"}]),
            "the intent id `other` is reserved for messages that match no intent",
        ),
        (
            catalog(campaigns=[CAMPAIGN | {"intents": ["flight_booking", "cars", "boats"]}]),
            "campaign city_breaks names unknown intents: boats, cars",
        ),
        (
            catalog(campaigns=[CAMPAIGN | {"audience": {"include_intents": ["cars"], "exclude_intents": ["boats"]}}]),
            "campaign city_breaks names unknown intents: boats, cars",
        ),
    ],
)
def test_a_catalog_whose_ids_disagree_is_refused(content: dict[str, Any], words: str):
    assert problems(Catalog, content) == {"": words}


def test_a_catalog_may_come_without_intents():
    assert Catalog.model_validate({"campaigns": [{"id": 1, "name": "Sale"}]}).intents == []


def test_thousands_of_campaigns_are_checked_in_a_moment():
    campaigns = [CAMPAIGN | {"id": at} for at in range(10_000)]

    started = process_time()
    assert len(Catalog.model_validate(catalog(campaigns=campaigns)).campaigns) == 10_000
    assert process_time() - started < 5  # half a second on an idle core


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (catalog() | {"rules": {"max_per_category": 0}}, "rules.max_per_category"),
        (catalog(intents=[*INTENTS, {"id": "cars", "name": "Cars", "examples": []}]), "intents.2.examples"),
        (catalog(intents=[*INTENTS, {"id": "cars", "name": "", "examples": ["x"]}]), "intents.2.name"),
        (catalog(intents=[{"id": "cars", "name": "Cars", "examples": ["ok", "  "]}]), "intents.0.examples.1"),
        (catalog() | {"offers": []}, "offers"),
    ],
)
def test_a_bad_entry_is_named_by_its_place(content: dict[str, Any], field: str):
    assert set(problems(Catalog, content)) == {field}


def test_white_space_around_an_example_does_not_count():
    intent = Intent(id="cars", name="Cars", examples=["  my car broke down\n"])

    assert intent.examples == ["my car broke down"]


@pytest.mark.parametrize(
    "same",
    [
        catalog(intents=INTENTS[::-1]),
        catalog(intents=[INTENTS[0] | {"name": "Flying", "description": "By air"}, INTENTS[1]]),
        catalog(campaigns=[CAMPAIGN | {"name": "New name", "active_until": "2030-01-01"}]),
        catalog(campaigns=[CAMPAIGN, CAMPAIGN | {"id": "more", "intents": ["film_suggestion"]}]),
        catalog(intents=[INTENTS[0] | {"examples": [" I want to fly to Lisbon "]}, INTENTS[1]]),
    ],
    ids=["order", "names", "campaign's words", "another campaign", "white space"],
)
def test_the_intents_version_stays_where_no_message_would_get_another_intent(same: dict[str, Any]):
    before = Catalog.model_validate(catalog())

    assert Catalog.model_validate(same).intents_version == before.intents_version


@pytest.mark.parametrize(
    "other",
    [
        [INTENTS[0]],
        [INTENTS[0], INTENTS[1] | {"id": "films"}],
        [INTENTS[0], INTENTS[1] | {"examples": ["Which film should I watch?"]}],
        [INTENTS[0], INTENTS[1] | {"examples": ["Which film should I watch?A good film?"]}],
        [INTENTS[0] | {"examples": ["I want to fly to Porto"]}, INTENTS[1]],
    ],
    ids=["intent gone", "id", "example gone", "examples joined", "example changed"],
)
def test_the_intents_version_changes_with_what_decides_an_intent(other: list[Any]):
    before = Catalog.model_validate(catalog())

    assert Catalog.model_validate(catalog(intents=other)).intents_version != before.intents_version


# --- answers


@pytest.mark.parametrize(("score", "valid"), [(0, True), (1, True), (-0.01, False), (1.01, False)])
def test_a_score_lies_between_nothing_and_one(score: float, valid: bool):
    content = {"campaign_id": "c", "name": "C", "description": "", "category": "x", "reasons": []}
    content |= {"position": 1, "propensity": 1.0}

    if valid:
        assert json.loads(Recommendation(**content, score=score).model_dump_json())["score"] == score
    else:
        assert set(problems(Recommendation, content | {"score": score})) == {"score"}
