"""Rules: what is held back and why, and the list that is left."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from personalization.recommend.rules import Chosen, PastEvent, Viewer, arrange, exclusions
from personalization.schemas import DAY_MS, Campaign, CatalogRules

NOW = 1_790_000_000_000
DAY = datetime(2026, 9, 21, tzinfo=UTC)  # the day of NOW


def campaign(campaign_id: str = "c", **changes: Any) -> Campaign:
    return Campaign(id=campaign_id, name=campaign_id.title(), **changes)


def viewer(*events: tuple[str, float], intents: str = "", user_id: str = "ann") -> Viewer:
    """Someone with events of campaign `c`, each so many days ago."""
    past = [PastEvent("c", kind, NOW - int(days * DAY_MS)) for kind, days in events]  # type: ignore[arg-type]
    return Viewer(user_id, frozenset(intents.split()), past)


def objection(one: Campaign, who: Viewer | None = None, **changes: Any) -> tuple[str, str] | None:
    """Rule and text, where there is one."""
    found = exclusions([one], who or viewer(), NOW, **changes)
    assert {each.campaign_id for each in found} <= {one.id}
    return (found[0].rule, found[0].text) if found else None


# --- windows


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({}, None),
        ({"active_from": "2026-09-21"}, None),
        ({"active_from": "2026-09-22"}, ("window", "starts on 2026-09-22")),
        ({"active_until": "2026-09-22"}, None),
        ({"active_until": "2026-09-21"}, ("window", "ended on 2026-09-21")),
    ],
)
def test_a_campaign_is_shown_in_its_window_only(window: dict[str, str], expected: tuple[str, str] | None):
    assert objection(campaign(**window)) == expected


def test_a_window_holds_its_first_millisecond_and_not_its_end():
    moment = datetime.fromtimestamp(NOW / 1000, UTC).isoformat()

    assert objection(campaign(active_from=moment)) is None
    assert objection(campaign(active_until=moment)) is not None


# --- category and audience


def test_a_category_that_is_asked_for_leaves_the_others_out():
    assert objection(campaign(category="travel"), category="travel") is None
    assert objection(campaign(category="films"), category="travel") == ("category", "is of the category films")


@pytest.mark.parametrize(
    ("audience", "expected"),
    [
        ({"include_users": ["ann", "bob"]}, None),
        ({"include_users": ["bob"]}, "is for named users only"),
        ({"exclude_users": ["ann"]}, "excludes this user"),
        ({"exclude_users": ["bob"]}, None),
        ({"include_users": ["ann"], "exclude_users": ["ann"]}, "excludes this user"),
        ({"include_intents": ["flights", "hotels"]}, None),
        ({"include_intents": ["hotels", "cars"]}, "is for users who expressed hotels, cars"),
        ({"exclude_intents": ["hotels"]}, None),
        ({"exclude_intents": ["hotels", "flights", "films"]}, "is not for users who expressed films, flights"),
        ({"include_intents": ["flights"], "exclude_intents": ["films"]}, "is not for users who expressed films"),
    ],
)
def test_an_audience_is_kept_to(audience: dict[str, list[str]], expected: str | None):
    found = objection(campaign(audience=audience), viewer(intents="flights films"))

    assert found == (("audience", expected) if expected else None)


# --- frequency caps


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([], None),
        ([0.1, 6], None),
        ([0.1, 6, 6.9], "shown 3× within 7 days"),
        ([0.1, 6, 7.1], None),
        ([0.1, 0.2, 0.3, 0.4], "shown 4× within 7 days"),
    ],
)
def test_a_campaign_is_shown_so_often_within_the_days_of_its_cap(shown: list[float], expected: str | None):
    capped = campaign(frequency_cap={"impressions": 3, "days": 7})

    found = objection(capped, viewer(*(("impression", days) for days in shown), ("click", 1)))

    assert found == (("frequency_cap", expected) if expected else None)


def test_a_cap_of_one_day_is_told_as_such():
    capped = campaign(frequency_cap={"impressions": 1, "days": 1})

    assert objection(capped, viewer(("impression", 0.5))) == ("frequency_cap", "shown 1× within 1 day")
    assert objection(campaign("other", frequency_cap=capped.frequency_cap), viewer(("impression", 0.5))) is None


# --- not again


@pytest.mark.parametrize(
    ("kind", "words", "default"), [("conversion", "converted", 90), ("dismiss", "dismissed it", 30)]
)
def test_what_was_answered_is_not_shown_again_for_its_days(kind: str, words: str, default: int):
    def told(*days: float, **not_again: float) -> tuple[str, str] | None:
        return objection(campaign(not_again=not_again), viewer(*((kind, one) for one in days)))

    rule = f"not_again_after_{kind}"
    name = f"after_{kind}_days"
    assert told(3) == (rule, f"the user {words} 3 days ago; not again for {default} days")
    assert told(default + 0.1) is None
    assert told(default + 9, 1.5) == (rule, f"the user {words} 1 day ago; not again for {default} days")
    assert told(0.2, **{name: 1}) == (rule, f"the user {words} within the last day; not again for 1 day")
    assert told(1.1, **{name: 1}) is None
    assert told(1000, **{name: 3650}) is not None
    assert told(0, **{name: 0}) is None  # 0 never holds it back
    assert told() is None


def test_a_moment_ahead_of_the_clock_counts_as_now():
    assert objection(campaign(), viewer(("dismiss", -0.5))) is not None


def test_what_was_clicked_or_seen_may_be_shown_again():
    assert objection(campaign(), viewer(("click", 0), ("impression", 0))) is None


def test_each_campaign_is_told_once_by_the_first_rule_that_speaks():
    ended = campaign("c", active_until="2026-01-01", audience={"exclude_users": ["ann"]})
    fine = campaign("fine")

    found = exclusions([ended, fine], viewer(("dismiss", 1)), NOW)

    assert [(one.campaign_id, one.rule) for one in found] == [("c", "window")]


# --- the list


def arranged(ranked: str, top: int = 50, cap: int | None = None, **pins: int) -> Chosen:
    """Campaigns named by category and number: `a1 a2 b1`, best first."""
    campaigns = [campaign(one, category=one[0], pinned=pins.get(one)) for one in ranked.split()]
    return arrange(campaigns, CatalogRules(max_per_category=cap), top)


def shown(*args: Any, **kwargs: Any) -> str:
    return " ".join(arranged(*args, **kwargs).campaign_ids)


def test_without_rules_a_list_is_the_best_in_order():
    found = arranged("a1 b1 a2 c1", 3)

    assert found == Chosen(["a1", "b1", "a2"], ["c1"], [])
    assert arranged("", 3) == Chosen([], [], [])
    assert arranged("a1 a2", 3) == Chosen(["a1", "a2"], [], [])


@pytest.mark.parametrize(
    ("pins", "top", "expected"),
    [
        ({"d1": 1}, 3, "d1 a1 b1"),
        ({"d1": 2}, 3, "a1 d1 b1"),
        ({"d1": 3}, 3, "a1 b1 d1"),
        ({"d1": 4}, 3, "a1 b1 c1"),
        ({"a1": 3}, 3, "b1 c1 a1"),
        ({"d1": 1, "e1": 2}, 3, "d1 e1 a1"),
        ({"d1": 2, "e1": 1}, 3, "e1 d1 a1"),
        ({"d1": 1, "e1": 3}, 3, "d1 a1 e1"),
        ({"d1": 2, "e1": 2}, 4, "a1 d1 e1 b1"),  # of two at one place the better ranked has it
        ({"a1": 2, "d1": 2, "e1": 3}, 5, "b1 a1 d1 e1 c1"),
        ({"e1": 9}, 3, "a1 b1 c1"),
        ({"e1": 9}, 9, "a1 b1 c1 d1 e1"),  # behind the end of a short list is its last place
        ({"a1": 1, "b1": 2, "c1": 3, "d1": 4, "e1": 5}, 2, "a1 b1"),
    ],
)
def test_pinned_campaigns_take_their_places(pins: dict[str, int], top: int, expected: str):
    assert shown("a1 b1 c1 d1 e1", top, **pins) == expected


def test_a_category_is_capped_while_others_are_left():
    found = arranged("a1 a2 a3 b1 a4 c1", 4, cap=2)

    assert found.campaign_ids == ["a1", "a2", "b1", "c1"]
    [one] = found.excluded
    assert (one.campaign_id, one.rule) == ("a3", "max_per_category")
    assert one.text == "the list holds 2 of the category a already"


def test_a_list_that_would_be_short_is_filled_up_with_the_best_of_those_over():
    found = arranged("a1 a2 a3 a4 b1", 4, cap=1)

    assert found.campaign_ids == ["a1", "b1", "a2", "a3"]
    assert [one.campaign_id for one in found.excluded] == ["a4"]
    assert arranged("a1 a2 b1", 4, cap=1).excluded == []


def test_only_what_a_cap_moved_out_is_told_as_held_back():
    """Not what would not have been in the list without the cap either."""
    assert [one.campaign_id for one in arranged("a1 a2 b1 c1 a3 a4", 3, cap=1).excluded] == ["a2"]


def test_pinned_campaigns_fill_their_category_first_and_are_never_over_it():
    assert shown("a1 a2 b1 a3", 3, cap=1, a3=2) == "b1 a3 a1"
    assert shown("a1 a2 a3 b1", 3, cap=1, a2=1, a3=2) == "a2 a3 b1"
    assert shown("a1 a2 b1 b2", 2, cap=1, a2=9) == "a1 b1"  # pinned behind the list: does not count


def test_what_may_stand_in_for_the_last_place_keeps_the_rules():
    assert arranged("a1 a2 b1 b2 c1", 3).spare == ["b2", "c1"]
    assert arranged("a1 b1 a2 b2 c1", 2, cap=1).spare == ["b2", "c1"]  # no second of a
    assert arranged("a1 b1 a2 b2 c1", 2, c1=2).spare == []  # the last place is pinned
    assert arranged("a1 b1 c1 d1", 2, d1=4).spare == ["c1"]  # not what has a place of its own
    assert arranged("a1 a2 a3 a4", 2, cap=1).spare == ["a3", "a4"]  # filled up: the cap no longer binds
    assert arranged("a1 a2 b1", 3).spare == []


campaigns = st.lists(
    st.tuples(st.sampled_from("abc"), st.one_of(st.none(), st.none(), st.integers(1, 8))), max_size=9
).map(lambda drawn: [campaign(f"{kind}{at}", category=kind, pinned=pin) for at, (kind, pin) in enumerate(drawn)])


@given(ranked=campaigns, cap=st.one_of(st.none(), st.integers(1, 3)), top=st.integers(1, 10))
def test_any_list_is_full_without_repeats_and_keeps_pins_and_caps(ranked: list[Campaign], cap: int | None, top: int):
    found = arrange(ranked, CatalogRules(max_per_category=cap), top)
    by_id = {one.id: one for one in ranked}
    held_back = {one.campaign_id for one in found.excluded}

    assert len(found.campaign_ids) == min(top, len(ranked)) == len(set(found.campaign_ids))
    assert set(found.campaign_ids) <= set(by_id)
    assert not held_back & set(found.campaign_ids)
    assert not set(found.spare) & set(found.campaign_ids)
    taken: set[int] = set()
    for one in ranked:
        if one.pinned and one.pinned <= len(found.campaign_ids) and one.pinned not in taken:
            places = [place for place, shown in enumerate(found.campaign_ids, 1) if by_id[shown].pinned]
            assert one.pinned in places
            taken.add(one.pinned)
    free = [by_id[one] for one in found.campaign_ids if by_id[one].pinned is None]
    for kind in "abc":
        of_kind = sum(by_id[one].category == kind for one in found.campaign_ids)
        over = [one for one in free if one.category == kind] if cap and of_kind > cap else []
        # More than the cap only where every free one of another category is shown or capped itself.
        if over:
            outside = [one for one in ranked if one.id not in found.campaign_ids and not one.pinned]
            counts = {one.category: 0 for one in ranked}
            for shown_id in found.campaign_ids:
                counts[by_id[shown_id].category] += 1
            assert all(counts[one.category] >= (cap or 0) for one in outside)
    for stand_in in found.spare:
        assert by_id[stand_in].pinned is None
