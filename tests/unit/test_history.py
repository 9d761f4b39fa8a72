"""What was known at a moment: nothing of later, faded as it should be, and as naive loops over what happened say."""

import math
from collections import defaultdict
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knowledge_data import DAY_MS, DIMS, NOW, some_history
from personalization.learning.history import (
    HALF_LIFE_DAYS,
    MIN_SIMILARITY,
    RECENT_MESSAGES,
    SAID_BEFORE_MS,
    CatalogArrays,
    History,
    Intents,
    Messages,
    Snapshot,
    in_order,
    interests_of,
    signals_of_events,
    signals_of_messages,
    take_snapshot,
    unit,
)
from personalization.recommend.ranking import Evidence
from personalization.recommend.sources import TREND_HALF_LIVES_DAYS
from personalization.schemas import INTERESTS_PER_USER, Campaign
from scipy import sparse

few = settings(max_examples=25)
seeds = given(seed=st.integers(0, 2**32))


def faded(age_ms: float, half_life_days: float = HALF_LIFE_DAYS) -> float:
    return 2.0 ** (-age_ms / (half_life_days * DAY_MS))


def history(seed: int, **changes: Any) -> History:
    return some_history(np.random.default_rng(seed), **changes)


def everything(snapshot: Snapshot) -> dict[str, Any]:
    """All that is known at a moment, of campaigns and of all users."""
    users = snapshot.users(np.arange(len(snapshot._past.user_ids)))
    evidence = Evidence.of(snapshot.campaigns, users)
    found = {f.name: getattr(snapshot.campaigns, f.name) for f in fields(snapshot.campaigns)}
    found |= {f"user {f.name}": getattr(users, f.name) for f in fields(users)}
    found |= {f"source {name}": matrix for name, matrix in (evidence.sources | evidence.context).items()}
    return {name: one.toarray() if sparse.issparse(one) else one for name, one in found.items()}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


# --- the arrow of time


@few
@given(seed=st.integers(0, 2**32), day=st.integers(5, 55))
def test_nothing_at_or_after_a_moment_is_known_at_it(seed: int, day: int):
    whole = history(seed)
    moment = int(whole.signals.at[0]) + day * DAY_MS
    earlier = {
        name: replace(part, **{each: column[part.at < moment] for each, column in vars(part).items()})
        for name, part in (("messages", whole.messages), ("intents", whole.intents), ("signals", whole.signals))
    }

    assert_same(everything(take_snapshot(whole, moment)), everything(take_snapshot(replace(whole, **earlier), moment)))


def test_what_happens_at_the_very_moment_is_not_known_and_a_millisecond_later_is():
    past = history(1)
    at = int(past.signals.at[-1])

    before, after = (take_snapshot(past, moment).campaigns for moment in (at, at + 1))

    assert before.last_at.max() < at
    assert after.last_at.max() == at


def test_a_cut_history_is_a_view_and_keeps_how_it_is_read():
    past = replace(history(2), half_life_days=7.0, neighbours=3, profile_messages=9)
    cut = past.before(NOW - 20 * DAY_MS)

    assert np.shares_memory(cut.messages.vectors, past.messages.vectors)
    assert (cut.half_life_days, cut.neighbours, cut.profile_messages) == (7.0, 3, 9)
    assert 0 < len(cut.signals.at) < len(past.signals.at)
    for part in (cut.messages, cut.intents, cut.signals):
        assert len({len(column) for column in vars(part).values()}) == 1


def test_candidates_are_those_that_run_or_are_about_to():
    past = history(3, campaigns=4)
    past.catalog.active_from[:] = [0, NOW, NOW + 1, NOW + 2 * DAY_MS]
    past.catalog.active_until[:] = [NOW, NOW + 1, NOW + DAY_MS, NOW + 9 * DAY_MS]

    assert take_snapshot(past, NOW).campaigns.ids == ["c1"]
    assert take_snapshot(past, NOW, upcoming_ms=DAY_MS).campaigns.ids == ["c1", "c2"]
    assert take_snapshot(past, NOW - 1).campaigns.ids == ["c0"]


# --- against naive loops


@few
@given(seed=st.integers(0, 2**32), half_life=st.sampled_from([3.0, HALF_LIFE_DAYS]))
def test_campaigns_are_known_as_naive_loops_know_them(seed: int, half_life: float):
    past = replace(history(seed), half_life_days=half_life)
    signals = list(zip(*vars(past.signals).values(), strict=True))
    engaged: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for user, campaign, at, strength, *_ in signals:
        engaged[user][campaign] += strength * faded(NOW - at, half_life)

    known = take_snapshot(past, NOW).campaigns

    assert known.ids == past.catalog.ids
    for at, campaign_id in enumerate(known.ids):
        of_it = [one for one in signals if one[1] == at]
        trend = [sum(one[3] * faded(NOW - one[2], days) for one in of_it) for days in TREND_HALF_LIVES_DAYS]
        assert known.trend[at] == pytest.approx(trend, rel=1e-4)
        assert known.last_at[at] == max((one[2] for one in of_it), default=0)
        assert known.users[at] == len({one[0] for one in of_it})
        assert (campaign_id in known.engaged_ids) == bool(of_it)
        said = np.zeros(DIMS)
        for user, _, moment, strength, *_ in of_it:
            if (message := latest_before(past.messages, user, moment)) is not None:
                said += strength * faded(NOW - moment, half_life) * past.messages.vectors[message]
        np.testing.assert_allclose(known.audience[at], said / max(np.linalg.norm(said), 1e-9), atol=1e-4)
        for hub, hub_id in enumerate(known.engaged_ids):
            together = 0.0
            for of_user in engaged.values():
                weights = {campaign: math.log1p(weight) for campaign, weight in of_user.items()}
                length = math.sqrt(sum(one**2 for one in weights.values()))
                together += weights.get(int(hub_id[1:]), 0) / length * weights.get(at, 0)
            assert known.co_engagement[hub, at] == pytest.approx(together, rel=1e-3, abs=1e-5)


def latest_before(messages: Messages, user: int, moment: int) -> int | None:
    """The user's last message at or before a moment, at most a week old."""
    fit = [
        at
        for at in range(len(messages.at))
        if messages.user[at] == user and moment - SAID_BEFORE_MS <= messages.at[at] <= moment
    ]
    return max(fit, key=lambda at: (messages.at[at], at), default=None)


@few
@given(seed=st.integers(0, 2**32), neighbours=st.sampled_from([0, 1, 2, 50]), newest=st.sampled_from([1, 3, 200]))
def test_users_are_known_as_naive_loops_know_them(seed: int, neighbours: int, newest: int):
    past = replace(history(seed), neighbours=neighbours, profile_messages=newest)
    snapshot = take_snapshot(past, NOW)
    places = np.random.default_rng(seed).permutation(len(past.user_ids))[:4]

    known = snapshot.users(places)

    profiles = [profile(past.messages, user, newest) for user in range(len(past.user_ids))]
    engaged = past.engaged(NOW).toarray()
    for row, user in enumerate(places):
        assert known.ids[row] == past.user_ids[user]
        assert known.messages[row] == (past.messages.user == user).sum()
        np.testing.assert_allclose(known.profile[row], profiles[user], atol=1e-4)
        expressed = np.zeros(len(past.catalog.intent_ids))
        for who, at, intent, confidence, _ in zip(*vars(past.intents).values(), strict=True):
            expressed[intent] += (who == user) * confidence * faded(NOW - at)
        np.testing.assert_allclose(known.intents.toarray()[row], expressed, rtol=1e-4)
        hubs = [int(one[1:]) for one in snapshot.campaigns.engaged_ids]
        np.testing.assert_allclose(known.engaged.toarray()[row], engaged[user, hubs], rtol=1e-4)
        near = sorted(
            ((profiles[user] @ profiles[one], one) for one in range(len(profiles)) if one != user), reverse=True
        )
        near = [(cosine, one) for cosine, one in near[:neighbours] if cosine >= MIN_SIMILARITY]
        expected = sum((cosine * np.log1p(engaged[one]) for cosine, one in near), np.zeros(engaged.shape[1]))
        np.testing.assert_allclose(known.neighbours_engaged[row], expected, atol=1e-3)
        assert known.neighbours[row].tolist() == [sum(engaged[one, at] > 0 for _, one in near) for at in range(5)]


def profile(messages: Messages, user: int, newest: int) -> Any:
    said = sum(
        (faded(NOW - messages.at[at]) * messages.vectors[at] for at in np.flatnonzero(messages.user == user)[-newest:]),
        np.zeros(DIMS),
    )
    return said / max(np.linalg.norm(said), 1e-9)


def test_a_user_is_never_their_own_neighbour():
    """Three who say the same: each sees what the two others engaged with, not what they did themselves."""
    campaigns = [Campaign(id=one, name=one) for one in ("a", "b", "c")]
    arrays = CatalogArrays.of(campaigns, [], unit(np.eye(3)))
    said = Messages(np.arange(3), np.full(3, NOW - DAY_MS), unit(np.ones((3, 3))))
    nothing = np.zeros(0, dtype=np.int64)
    intents = Intents(nothing, nothing, nothing, nothing.astype(np.float32), nothing)
    clicks = signals_of_events((user, user, "click", NOW - 1) for user in range(3))

    known = take_snapshot(History(["x", "y", "z"], arrays, said, intents, clicks), NOW).users(np.arange(3))

    assert known.neighbours.tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]
    np.testing.assert_allclose(known.neighbours_engaged, (1 - np.eye(3)) * math.log(2), atol=1e-4)


def test_what_was_said_before_is_the_latest_within_a_week():
    times = [NOW - 9 * DAY_MS, NOW - 3 * DAY_MS, NOW - 3 * DAY_MS, NOW - DAY_MS, NOW]
    messages = Messages(np.asarray([0, 0, 1, 0, 2]), np.asarray(times), unit(np.ones((5, 2))))
    asked = [
        (0, NOW - 9 * DAY_MS, 0),  # at the same moment
        (0, NOW - 9 * DAY_MS + SAID_BEFORE_MS, 1),
        (0, NOW - 2 * DAY_MS, 1),
        (1, NOW - 2 * DAY_MS, 2),
        (1, NOW - 3 * DAY_MS + SAID_BEFORE_MS, 2),
        (1, NOW - 3 * DAY_MS + SAID_BEFORE_MS + 1, -1),
        (0, NOW - 9 * DAY_MS - 1, -1),
        (2, NOW - 1, -1),
        (3, NOW, -1),
    ]
    past = history(0)
    for user, at, expected in asked:
        clicks = signals_of_events([(user, 0, "click", at)])
        assert replace(past, messages=messages, signals=clicks).said_before.tolist() == [expected]
        none = Messages(*(column[:0] for column in vars(messages).values()))
        assert replace(past, messages=none, signals=clicks).said_before.tolist() == [-1]


def test_what_was_said_before_is_found_among_millions_of_users():
    messages = Messages(np.asarray([10_000_000]), np.asarray([NOW - 5]), np.ones((1, 2), dtype=np.float32))
    clicks = signals_of_events([(10_000_000, 0, "click", NOW), (9_999_999, 0, "click", NOW)])

    assert replace(history(0), messages=messages, signals=clicks).said_before.tolist() == [0, -1]


# --- signals


def test_signals_fade_by_half_in_a_half_life():
    one = replace(history(0), signals=signals_of_events([(2, 3, "click", NOW - 30 * DAY_MS)]))

    assert one.engaged(NOW)[2, 3] == pytest.approx(0.5)
    assert replace(one, half_life_days=15.0).engaged(NOW)[2, 3] == pytest.approx(0.25)
    assert one.engaged(NOW - 30 * DAY_MS)[2, 3] == pytest.approx(1)


def test_only_clicks_and_conversions_are_engagement():
    events = [
        (0, 1, "impression", 1),
        (0, 1, "click", 2),
        (0, 2, "click", 4),
        (1, 1, "conversion", 5),
        (0, 1, "dismiss", 6),
    ]

    signals = signals_of_events(events)

    assert signals.at.tolist() == [2, 4, 5]
    assert signals.strength.tolist() == [1, 1, 2]
    assert signals.is_event.all()


def test_a_message_speaks_once_to_a_campaign_however_many_of_its_intents_it_expresses():
    """As a mention in the analytics database does; two messages at one moment are two."""
    campaigns = [
        Campaign(id="both", name="x", intents=["a", "b"]),
        Campaign(id="one", name="x", intents=["b"]),
        Campaign(id="over", name="x", intents=["a"], active_until="2026-01-01"),
    ]
    arrays = CatalogArrays.of(campaigns, ["a", "b"], unit(np.eye(3)))
    moment = np.full(4, NOW, dtype=np.int64)
    intents = Intents(
        user=np.asarray([7, 7, 7, 8]),
        at=moment,
        intent=np.asarray([0, 1, 1, 0]),
        confidence=np.ones(4, dtype=np.float32),
        message=np.asarray([5, 5, 6, 9]),
    )

    found = signals_of_messages(intents, arrays)

    pairs = sorted(zip(found.user.tolist(), found.campaign.tolist(), strict=True))
    assert pairs == [(7, 0), (7, 0), (7, 1), (7, 1), (8, 0)]
    assert set(found.strength.tolist()) == {0.25}
    assert not found.is_event.any()
    assert in_order(found, signals_of_events([(1, 1, "click", NOW - 1)])).at.tolist() == [NOW - 1, *[NOW] * 5]


# --- interests


def test_topics_are_kept_apart_and_the_heaviest_come_first():
    axes = np.eye(DIMS, dtype=np.float32)
    [near] = unit(axes[:1] + 0.3 * axes[1])
    said = np.stack([axes[0], axes[1], near, axes[2]]).astype(np.float32)

    found = interests_of(said, np.asarray([1, 3, 1, 0.5], dtype=np.float32))

    np.testing.assert_allclose(found, [axes[1], unit((axes[0] + near)[None])[0], axes[2]], atol=1e-6)


@few
@given(seed=st.integers(0, 2**32), count=st.integers(0, 30))
def test_any_messages_make_few_topics_of_unit_length(seed: int, count: int):
    rng = np.random.default_rng(seed)
    found = interests_of(unit(rng.normal(size=(count, DIMS))), rng.uniform(0.1, 1, count).astype(np.float32))

    assert found.shape[1] == DIMS
    assert min(count, 1) <= len(found) <= INTERESTS_PER_USER
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_interests_are_drawn_from_the_newest_messages_only():
    axes = np.eye(DIMS, dtype=np.float32)
    count = RECENT_MESSAGES + 1
    said = Messages(np.zeros(count, dtype=np.int64), np.arange(count) + NOW - count, np.tile(axes[1], (count, 1)))
    said.vectors[0] = axes[0]

    [interests] = take_snapshot(replace(history(0), messages=said), NOW).users(np.asarray([0])).interests

    np.testing.assert_allclose(interests, np.stack([axes[1], *[np.zeros(DIMS)] * (INTERESTS_PER_USER - 1)]), atol=1e-6)
    said.vectors[-1] = axes[2]
    short = replace(history(0), messages=said, profile_messages=1)
    [[first, *others]] = take_snapshot(short, NOW).users(np.asarray([0])).interests
    np.testing.assert_allclose(first, axes[2], atol=1e-6)
    assert not np.any(others)


# --- nothing there


@pytest.mark.parametrize("what", ["users", "campaigns", "messages", "signals", "running"])
def test_a_history_without_something_is_no_error(what: str):
    past = history(4)
    nothing = {"messages": past.messages, "signals": past.signals, "intents": past.intents}
    empty = {name: type(one)(**{k: v[:0] for k, v in vars(one).items()}) for name, one in nothing.items()}
    if what == "users":
        past = replace(past, user_ids=[], **empty)
    elif what == "campaigns":
        arrays = CatalogArrays.of([], past.catalog.intent_ids, np.zeros((0, DIMS), dtype=np.float32))
        past = replace(past, catalog=arrays, signals=empty["signals"])
    elif what == "messages":
        past = replace(past, messages=empty["messages"], intents=empty["intents"])
    elif what == "signals":
        past = replace(past, signals=empty["signals"])
    else:
        past.catalog.active_until[:] = NOW

    found = everything(take_snapshot(past, NOW))

    assert len(found["user ids"]) == (0 if what == "users" else 6)
    assert len(found["ids"]) == (0 if what in ("campaigns", "running") else 5)
