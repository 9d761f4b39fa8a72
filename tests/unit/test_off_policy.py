"""Off-policy estimates against worlds whose truth is known."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from personalization.errors import InputError, NoSupportError
from personalization.evaluation.exploration import compare_explored, impressions_of, targets_of
from personalization.evaluation.off_policy import Estimates, check_support, estimate
from personalization.recommend.exploration import explore
from personalization.schemas import DAY_MS, Event

from benchmarks.generator import EXPLORATION, Config, World, examination, generate

# --- a bandit of two kinds of users, six campaigns and three places

KINDS, CAMPAIGNS, PLACES = 2, 6, 3


@dataclass(frozen=True)
class Bandit:
    """Chances by kind of user, place and campaign."""

    reward: np.ndarray
    logging: np.ndarray
    other: np.ndarray

    def value(self, policy: np.ndarray) -> float:
        return float((policy * self.reward).sum(axis=2).mean())

    def estimate(self, seed: int, users: int = 300, model_error: float = 0.2, **changes: np.ndarray) -> Estimates:
        rng = np.random.default_rng(seed)
        user = np.arange(users).repeat(4 * PLACES)
        kind, place = rng.integers(KINDS, size=users)[user], np.tile(np.arange(PLACES), users * 4)
        chances = self.logging[kind, place]
        shown = (chances.cumsum(axis=1) < rng.random((len(user), 1))).sum(axis=1)
        model = self.reward * (1 - model_error) + 0.02
        what = kind, place, shown
        given = {
            "reward": (rng.random(len(user)) < self.reward[what]).astype(float),
            "propensity": self.logging[what],
            "target": self.other[what],
            "predicted": model[what],
            "expected": (self.other * model).sum(axis=2)[kind, place],
        }
        return estimate(user=user, **(given | changes), draws=300)


@pytest.fixture(scope="module")
def bandit() -> Bandit:
    rng = np.random.default_rng(1)
    liked = rng.uniform(0.02, 0.4, (KINDS, 1, CAMPAIGNS))
    favoured = np.broadcast_to(liked**2 / (liked**2).sum(axis=2, keepdims=True), (KINDS, PLACES, CAMPAIGNS))
    mixes = [0.9 * one + 0.1 / CAMPAIGNS for one in (favoured, rng.dirichlet(np.ones(CAMPAIGNS), (KINDS, PLACES)))]
    return Bandit(liked * np.array([1, 0.6, 0.4])[None, :, None], *mixes)


def test_the_intervals_hold_the_truth_about_as_often_as_they_say_and_what_was_earned_does_not(bandit: Bandit):
    truth, runs = bandit.value(bandit.other), [bandit.estimate(seed) for seed in range(150)]
    spread = np.std([one.logged.mean for one in runs])

    assert abs(bandit.value(bandit.logging) - truth) > 5 * spread
    for method in ("ips", "snips", "dr"):
        values = [one.values[method] for one in runs]
        held = np.mean([one.low <= truth <= one.high for one in values])
        error = np.mean([one.mean for one in values]) - truth
        assert 0.89 <= held <= 0.99, method
        assert abs(error) < 4 * np.std([one.mean for one in values]) / np.sqrt(len(runs)), method
    assert np.mean([one.logged.low <= truth <= one.logged.high for one in runs]) < 0.1


def test_what_is_gained_over_the_log_has_an_interval_of_its_own(bandit: Bandit):
    gain = bandit.value(bandit.other) - bandit.value(bandit.logging)
    runs = [bandit.estimate(seed) for seed in range(100)]

    for method in ("ips", "snips", "dr"):
        held = np.mean([one.gains[method].low <= gain <= one.gains[method].high for one in runs])
        assert held >= 0.88, method


def test_a_reward_model_makes_the_estimate_steadier_and_a_wrong_one_does_not_shift_it(bandit: Bandit):
    truth = bandit.value(bandit.other)
    good = [bandit.estimate(seed, model_error=0.0).values for seed in range(60)]
    wrong = [bandit.estimate(seed, model_error=0.9).values["dr"].mean for seed in range(60)]

    assert np.std([one["dr"].mean for one in good]) < np.std([one["ips"].mean for one in good])
    assert np.mean(wrong) == pytest.approx(truth, abs=4 * np.std(wrong) / np.sqrt(60))


def test_with_wrong_propensities_the_weights_say_so_and_a_right_model_still_holds(bandit: Bandit):
    size = 300 * 4 * PLACES
    one = bandit.estimate(3, model_error=0.0, propensity=np.full(size, 0.4))

    assert any("instead of 1" in caveat for caveat in one.caveats)


def test_the_policy_that_ran_is_worth_what_it_earned(bandit: Bandit):
    log = {"user": np.arange(4), "reward": np.array([1.0, 0, 0, 1]), "propensity": np.array([0.5, 0.2, 0.9, 0.1])}
    one = estimate(**log, target=log["propensity"])

    assert one.values["ips"].mean == one.values["snips"].mean == one.logged.mean == 0.5
    assert one.gains["ips"] == (0, 0, 0)
    assert one.effective_size == pytest.approx(4)


def test_each_formula_by_hand():
    one = estimate(
        user=np.array([0, 0, 1]),
        reward=np.array([1.0, 0.0, 1.0]),
        propensity=np.array([0.5, 0.25, 0.8]),
        target=np.array([1.0, 0.5, 0.4]),
        predicted=np.array([0.5, 0.1, 0.9]),
        expected=np.array([0.4, 0.3, 0.6]),
        clip=10,
    )

    assert one.values["ips"].mean == pytest.approx((2 + 0 + 0.5) / 3)
    assert one.values["snips"].mean == pytest.approx((2 + 0 + 0.5) / (2 + 2 + 0.5))
    assert one.values["dr"].mean == pytest.approx(((0.4 + 2 * 0.5) + (0.3 - 2 * 0.1) + (0.6 + 0.5 * 0.1)) / 3)
    assert one.effective_size == pytest.approx(4.5**2 / (4 + 4 + 0.25))
    assert (one.clip, one.clipped_weight) == (10, 0)


def test_large_weights_are_cut_and_that_is_said():
    log = {
        "user": np.arange(100),
        "reward": np.ones(100),
        "propensity": np.full(100, 0.02),
        "target": np.full(100, 0.5),
    }

    cut = estimate(**log)

    assert cut.clip == 10
    assert cut.clipped_weight == pytest.approx(1 - 10 / 25)
    assert cut.values["ips"].mean == pytest.approx(10)
    assert any("above 10.0 were cut, 60.0% of all weight" in caveat for caveat in cut.caveats)
    assert estimate(**log, clip=100).clipped_weight == 0


@pytest.mark.parametrize(
    ("propensity", "words"),
    [
        pytest.param([], "no impression", id="nothing"),
        pytest.param([np.nan, np.nan], "no impression carries its propensity", id="none logged"),
        pytest.param([1.0, 1.0, np.nan], "every impression was certain", id="nothing explored"),
        pytest.param([0.5, 0.0], "above 0", id="impossible"),
        pytest.param([0.5, 1.5], "at most at 1", id="beyond certainty"),
    ],
)
def test_a_log_that_cannot_tell_policies_apart_says_so(propensity: list[float], words: str):
    logged = np.array(propensity)

    with pytest.raises(NoSupportError, match=words):
        check_support(logged)
    with pytest.raises(NoSupportError, match=words):
        estimate(
            user=np.arange(len(logged)), reward=np.ones(len(logged)), propensity=logged, target=np.ones(len(logged))
        )


def test_nothing_is_said_of_a_policy_that_shows_nothing_of_the_log():
    with pytest.raises(NoSupportError, match="nothing of what was logged"):
        estimate(user=np.arange(2), reward=np.ones(2), propensity=np.full(2, 0.5), target=np.zeros(2))


def test_impressions_without_a_propensity_are_left_out_and_counted():
    one = estimate(
        user=np.arange(3),
        reward=np.array([0.0, 1.0, 1.0]),
        propensity=np.array([0.5, 0.5, np.nan]),
        target=np.array([0.5, 0.5, 0.5]),
    )

    assert (one.impressions, one.without_propensity, one.logged.mean) == (2, 1, 0.5)
    assert any("without a propensity" in caveat for caveat in one.caveats)


# --- the simulated world: popular shelves were logged, what would uniform slates have earned?


@pytest.fixture(scope="module")
def world(shared_data: Path) -> World:
    return generate(
        Config(users=900, weeks=6, campaigns_per_week=6, seed=3, slates_per_user=12.0, messages_per_user=1.0, base=-4.5)
    )


@dataclass(frozen=True)
class Logged:
    """Impressions of the world as arrays, and the true chance of a click on a uniform slate."""

    user: np.ndarray
    clicked: np.ndarray
    propensity: np.ndarray
    target: np.ndarray
    truth: np.ndarray
    examined: np.ndarray


@pytest.fixture(scope="module")
def logged(world: World) -> Logged:
    events, mechanics = world.events, world.mechanics
    shown = events.take(events.event == "impression")
    clicks = events.take((events.event == "click") & (events.policy != ""))
    clicked_at = {
        (user, campaign, position): set()
        for user, campaign, position in zip(clicks.user, clicks.campaign, clicks.position, strict=True)
    }
    for user, campaign, position, at in zip(clicks.user, clicks.campaign, clicks.position, clicks.seconds, strict=True):
        clicked_at[user, campaign, position].add(int(at))
    keys = zip(shown.user, shown.campaign, shown.position, shown.seconds, strict=True)
    clicked = np.array(
        [any(0 < at - now < 90 for at in clicked_at.get((user, one, place), ())) for user, one, place, now in keys]
    )
    campaigns, day = mechanics.campaigns, shown.seconds // 86_400
    target, truth = np.empty(len(day)), np.empty(len(day))
    examined = examination(shown.position)
    for one in np.unique(day):
        at = np.flatnonzero(day == one)
        live = np.flatnonzero((campaigns.starts <= one * 86_400) & (campaigns.ends >= (one + 1) * 86_400))
        relevance = mechanics.relevance(mechanics.utility(shown.user[at], live, shown.seconds[at]))
        target[at], truth[at] = 1 / len(live), relevance.mean(axis=1) * examined[at]
    return Logged(shown.user, clicked.astype(float), shown.propensity, target, truth, examined)


def of_users(logged: Logged, which: np.ndarray) -> tuple[Estimates, float]:
    clicked = logged.clicked
    rate = clicked[~which].mean() if (~which).any() else 0.5 * clicked.mean()
    predicted = 0.5 * rate * logged.examined / logged.examined.mean()  # rough, and of other users
    found = estimate(
        user=logged.user[which],
        reward=clicked[which],
        propensity=logged.propensity[which],
        target=logged.target[which],
        predicted=predicted[which],
        expected=predicted[which],
        draws=300,
    )
    return found, float(logged.truth[which].mean())


def test_uniform_slates_of_the_world_are_estimated_from_its_popular_shelves(logged: Logged):
    found, truth = of_users(logged, np.ones(len(logged.user), dtype=bool))

    assert found.logged.low > truth * 1.1, "the popular shelves earn more, so what was earned says nothing of others"
    for method, value in found.values.items():
        assert value.low <= truth <= value.high, method
        assert abs(value.mean - truth) < 0.5 * abs(found.logged.mean - truth), method
    assert not [caveat for caveat in found.caveats if "instead of 1" in caveat]
    assert logged.propensity.min() == pytest.approx(EXPLORATION * logged.target.min(), rel=0.5)


def test_of_most_parts_of_the_users_the_intervals_hold_the_truth(logged: Logged):
    parts = np.random.default_rng(0).integers(24, size=logged.user.max() + 1)[logged.user]
    runs = [of_users(logged, parts == part) for part in range(24)]

    for method in ("ips", "snips", "dr"):
        held = [one.values[method].low <= truth <= one.values[method].high for one, truth in runs]
        assert np.mean(held) >= 0.8, method


# --- the platform's own exploration, read back from its events

SHARE, OTHERS = 0.3, 8
WORTH = np.array([0.30, 0.25, 0.20, 0.12, 0.10, 0.05, 0.04, 0.04, 0.03, 0.02])
"""Chance of a click on each campaign; the ranker's order is the right one."""


def lists(seed: int = 0, users: int = 250, epochs: int = 5, share: float = SHARE) -> list[Event]:
    """Events of lists of three that explore: the third place is the ranker's choice or one of eight."""
    rng = np.random.default_rng(seed)
    ids = [f"c{number}" for number in range(len(WORTH))]
    events = []
    for user in range(users):
        for epoch in range(epochs):
            shown, propensities = explore(ids, 3, user_id=f"{seed}-{user}", epoch=str(epoch), share=share)
            for place, (one, propensity) in enumerate(zip(shown, propensities, strict=True), start=1):
                common = {"position": place, "propensity": round(propensity, 6), "policy": "fusion"}
                events.append(event(f"{seed}-{user}", one, "impression", epoch * 100 + place, **common))
                if rng.random() < WORTH[ids.index(one)]:
                    events.append(event(f"{seed}-{user}", one, "click", epoch * 100 + place + 5, policy="fusion"))
    return events


def event(user: str, campaign: str, kind: str, minute: int, **more: object) -> Event:
    moment = f"2026-01-{1 + minute // 1440:02}T{minute // 60 % 24:02}:{minute % 60:02}:00Z"
    return Event.model_validate({"user_id": user, "campaign_id": campaign, "event": kind, "timestamp": moment, **more})


def test_the_ranker_s_choice_and_chance_are_told_apart_at_the_explored_place():
    ranker, chance = WORTH[2], WORTH[2:].mean()
    runs = [compare_explored(lists(seed), share=SHARE, reward="click") for seed in range(16)]

    assert {one["chance"].impressions for one in runs} == {1250}
    for name, truth in (("ranker alone", ranker), ("chance", chance)):
        for method in ("ips", "snips"):
            values = [run[name].values[method] for run in runs]
            assert np.mean([one.mean for one in values]) == pytest.approx(truth, rel=0.1)
            assert sum(one.low <= truth <= one.high for one in values) >= 13
    assert not any("instead of 1" in caveat for run in runs for one in run.values() for caveat in one.caveats)


def test_another_share_than_the_one_that_was_set_is_noticed():
    with pytest.raises(NoSupportError, match=r"not those of exploring with a share of 0\.05"):
        compare_explored(lists(), share=0.05, reward="click")
    for share in (0.0, 0.7):
        with pytest.raises(InputError, match="exploration share"):
            compare_explored(lists(), share=share, reward="click")


def test_lists_without_a_propensity_are_left_out_of_the_comparison_and_counted():
    events = [*lists(users=60), *(event("x", "c0", "impression", minute, policy="fusion") for minute in range(5))]

    found = compare_explored(events, share=SHARE, reward="click")

    assert (found["chance"].impressions, found["chance"].without_propensity) == (300, 5)
    assert not compare_explored(events, share=SHARE, reward="conversion")["chance"].rewards


def test_lists_without_exploration_say_that_nothing_can_be_told():
    with pytest.raises(NoSupportError, match="every impression was certain"):
        compare_explored(lists(users=5, share=0.0), share=SHARE, reward="click")


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("others", [2, 7, 500])
def test_the_number_of_choices_can_be_read_off_a_rounded_propensity(share: float, others: int):
    by_chance, choice = share / others, share / others + 1 - share
    found = targets_of(np.round([choice, by_chance], 6), share)

    assert found["ranker alone"].tolist() == [1, 0]
    assert found["chance"] == pytest.approx(1 / others, rel=0.03)


def test_what_came_of_an_impression_is_laid_to_the_newest_before_it_of_the_same_policy():
    day = DAY_MS // 60_000
    found = impressions_of(
        [
            event("a", "x", "impression", 0, policy="fusion", propensity=0.5),
            event("a", "x", "impression", 10, policy="fusion"),
            event("a", "x", "click", 20, policy="fusion"),
            event("a", "x", "click", 30),
            event("a", "y", "impression", 40, policy="fusion"),
            event("a", "y", "click", 40, policy="learned-1"),
            event("b", "x", "conversion", 3, policy="fusion"),
            event("b", "x", "impression", 5, policy="fusion"),
            event("b", "x", "conversion", 5 + 3 * day, policy="fusion"),
            event("b", "z", "impression", 6),
        ]
    )

    assert found.user.tolist() == [0, 1, 1, 0, 0]
    assert found.clicked.tolist() == [False, False, False, True, False]
    assert found.converted.tolist() == [False, True, False, False, False]
    assert found.propensity[0] == 0.5
    assert np.isnan(found.propensity[1:]).all()


def test_one_policy_s_impressions_can_be_looked_at_alone():
    events = [event("a", "x", "impression", minute, policy=name) for minute, name in enumerate(["fusion", "learned-9"])]
    events.append(event("a", "x", "impression", 9))

    assert [len(impressions_of(events, name).user) for name in (None, "learned", "learned-9", "fusion")] == [3, 1, 1, 1]
