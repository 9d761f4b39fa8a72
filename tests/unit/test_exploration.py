"""Exploration and experiments: sticky, as often as asked, and logged with the probability that is true."""

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from personalization.recommend.exploration import arm, explore, sticky

USERS = [f"user-{at}" for at in range(20_000)]
RANKED = [f"c{at}" for at in range(9)]


def explored(user_id: str, *, top: int = 3, epoch: str = "2026-40", share: float = 0.2, ranked: Any = None) -> Any:
    return explore(RANKED if ranked is None else ranked, top, user_id=user_id, epoch=epoch, share=share)


def within(observed: int, expected: float, draws: int = len(USERS)) -> bool:
    """Five standard deviations of a binomial: once in two million."""
    return abs(observed - expected * draws) <= 5 * math.sqrt(draws * expected * (1 - expected)) + 1


# --- the same for the same, even over users


def test_a_draw_is_the_same_every_time_and_another_by_another_name():
    assert sticky("ann", "x") == sticky("ann", "x")
    assert len({sticky("ann", "x"), sticky("ann", "y"), sticky("bob", "x"), sticky("x", "ann")}) == 4


def test_draws_are_even_over_users_and_of_two_purposes_independent():
    first, second = ([sticky(one, purpose) for one in USERS] for purpose in ("x", "y"))

    assert all(0 <= one < 1 for one in first)
    for tenth in range(10):
        assert within(sum(tenth / 10 <= one < (tenth + 1) / 10 for one in first), 0.1)
    both = sum(one < 0.3 and other < 0.3 for one, other in zip(first, second, strict=True))
    assert within(both, 0.09)


# --- exploring


def test_a_user_sees_the_same_list_all_week_and_another_draw_the_next():
    weeks = {week: [tuple(explored(one, epoch=week)[0]) for one in USERS[:500]] for week in ("2026-40", "2026-41")}

    assert weeks["2026-40"] == [tuple(explored(one)[0]) for one in USERS[:500]]
    assert weeks["2026-40"] != weeks["2026-41"]


@pytest.mark.parametrize("top", [1, 3, 8])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_frequencies_over_users_are_the_propensities_that_are_logged(top: int, share: float):
    last: Counter[str] = Counter()
    logged: dict[str, set[float]] = {}
    for user_id in USERS:
        campaign_ids, propensities = explored(user_id, top=top, share=share)
        assert campaign_ids[:-1] == RANKED[: top - 1]
        assert propensities[:-1] == [1.0] * (top - 1)
        last[campaign_ids[-1]] += 1
        logged.setdefault(campaign_ids[-1], set()).add(propensities[-1])

    others = RANKED[top - 1 :]
    assert set(last) == set(others)
    total = 0.0
    for campaign_id in others:
        [propensity] = logged[campaign_id]  # the same for all users who see it
        assert within(last[campaign_id], propensity), campaign_id
        total += propensity
    assert total == pytest.approx(1)
    assert within(len(USERS) - last[others[0]], share * (1 - 1 / len(others)))


@pytest.mark.parametrize(("ranked", "top"), [(RANKED, 9), (RANKED, 20), ([], 5), (["c0"], 1), (RANKED[:2], 3)])
def test_where_all_is_shown_there_is_nothing_to_explore(ranked: list[str], top: int):
    for user_id in USERS[:200]:
        assert explored(user_id, top=top, share=0.5, ranked=ranked) == (ranked[:top], [1.0] * len(ranked[:top]))


def test_a_share_of_nothing_explores_nothing():
    assert {tuple(explored(one, share=0)[0]) for one in USERS[:1000]} == {tuple(RANKED[:3])}
    assert explored("ann", share=0)[1] == [1.0, 1.0, 1.0]


@given(count=st.integers(0, 12), top=st.integers(1, 6), share=st.floats(0, 0.5), user_id=st.text("ab-:", min_size=1))
def test_any_list_has_no_repeats_and_a_true_probability_at_each_place(count: int, top: int, share: float, user_id: str):
    ranked = [f"c{at}" for at in range(count)]

    campaign_ids, propensities = explored(user_id, top=top, share=share, ranked=ranked)

    assert len(campaign_ids) == len(propensities) == min(top, count) == len(set(campaign_ids))
    assert all(0 < one <= 1 for one in propensities)
    assert set(campaign_ids) <= set(ranked)


# --- experiments


def test_an_arm_has_its_share_of_the_users_who_stay_in_it():
    treated = {one for one in USERS if arm(one, "autumn", 0.1)}

    assert within(len(treated), 0.1)
    assert treated == {one for one in USERS if arm(one, "autumn", 0.1)}
    assert treated < {one for one in USERS if arm(one, "autumn", 0.3)}  # a larger share keeps who is in
    assert not any(arm(one, "autumn", 0) for one in USERS)
    assert all(arm(one, "autumn", 1) for one in USERS)


def test_another_name_draws_the_users_anew():
    autumn, winter = ({one for one in USERS if arm(one, name, 0.1)} for name in ("autumn", "winter"))

    assert within(len(autumn & winter), 0.01)


def test_an_experiment_without_a_name_treats_nobody():
    assert not any(arm(one, "", 1) for one in USERS[:100])


def test_an_arm_does_not_tell_who_is_explored():
    treated = [one for one in USERS if arm(one, "autumn", 0.5)]

    assert within(sum(sticky(one, "explore:2026-40") < 0.2 for one in treated), 0.2, len(treated))
