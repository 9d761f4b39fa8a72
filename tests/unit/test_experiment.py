"""Two policies side by side: figures, the split, what would be noticed, and what is said of it."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from personalization.__main__ import app
from personalization.errors import InputError, NoSupportError, TooLittleFeedbackError
from personalization.evaluation import experiments as commands
from personalization.quality.experiments import (
    Experiment,
    PolicyUsers,
    Request,
    Tally,
    choose_pair,
    compare,
    compare_events,
    compare_stored,
    family,
    policies_among,
    policies_of,
    tallies_among,
    tallies_of,
)
from personalization.resampling import resample
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from typer.testing import CliRunner

ALWAYS = (0, 2**62)
PLAIN = Settings(_env_file=None)
PLANNED = Settings(_env_file=None, experiment_name="autumn", experiment_ranker="auto", experiment_share=0.5)


def drawn(
    seed: int, users: int = 2000, ctr: tuple[float, float] = (0.1, 0.1), share: float = 0.5
) -> tuple[list[Tally], str, str]:
    """Tallies of users with six impressions on average, who differ in how much they click."""
    rng = np.random.default_rng(seed)
    alike: Counter[tuple[Any, ...]] = Counter()
    for policy, rate, part in (("fusion", ctr[0], 1 - share), ("learned", ctr[1], share)):
        count = round(users * part)
        impressions = 1 + rng.poisson(5, count)
        clicks = rng.binomial(impressions, np.clip(rate * rng.gamma(2, 0.5, count), 0, 1))
        conversions = rng.binomial(clicks, 0.3)
        alike.update(zip([policy] * count, impressions.tolist(), clicks.tolist(), conversions.tolist(), strict=True))
    return [Tally(*what, users) for what, users in sorted(alike.items())], "fusion", "learned"


# --- figures


def test_each_figure_by_hand():
    tallies = [
        Tally("a", 2, 1, 0, 10),
        Tally("a", 4, 0, 0, 10),
        Tally("b", 2, 2, 3, 15),
        Tally("b", 1, 0, 0, 15),
        Tally("other", 100, 100, 100, 100),
    ]

    found = compare(tallies, "a", "b")

    assert (found.control.users, found.control.impressions, found.control.clicks) == (20, 60, 10)
    assert (found.treated.users, found.treated.impressions, found.treated.conversions) == (30, 45, 45)
    means = {name: one.mean for name, one in found.treated.metrics.items()}
    assert means == pytest.approx({"ctr": 30 / 45, "clicks_per_user": 1, "conversion_rate": 0.5})
    assert {one.metric: one.difference.mean for one in found.differences} == pytest.approx(
        {"ctr": 30 / 45 - 10 / 60, "clicks_per_user": 0.5, "conversion_rate": 0.5}
    )


def test_users_who_did_the_same_may_come_as_one_row_or_as_many():
    tallies, *names = drawn(1)
    together = compare(tallies, *names)
    apart = compare([one._replace(users=1) for one in tallies for _ in range(one.users)], *names)

    for one, other in zip(together.differences, apart.differences, strict=True):
        assert one.difference.mean == pytest.approx(other.difference.mean)
        assert one.difference.low == pytest.approx(other.difference.low, abs=0.1 * one.detectable)
        assert one.detectable == pytest.approx(other.detectable, rel=0.06)


def test_resampling_in_chunks_is_the_same_as_at_once(monkeypatch: pytest.MonkeyPatch):
    sums = np.random.default_rng(0).random((50, 3))
    whole = resample(sums, draws=40)
    monkeypatch.setattr("personalization.resampling._CELLS", 333)

    assert resample(sums, draws=40) == pytest.approx(whole)
    assert whole.mean(axis=0) == pytest.approx(sums.sum(axis=0), rel=0.1)


@pytest.mark.parametrize("gain", [0.0, 0.02])
def test_the_intervals_hold_the_true_difference_about_as_often_as_they_say(gain: float):
    runs = [compare(*drawn(seed, users=600, ctr=(0.1, 0.1 + gain))).differences[0] for seed in range(150)]

    assert 0.89 <= np.mean([one.difference.low <= gain <= one.difference.high for one in runs]) <= 0.99


def test_a_detectable_difference_is_detected_with_the_power_that_is_named():
    detectable = np.mean([compare(*drawn(seed, users=800)).differences[0].detectable for seed in range(5)])
    runs = [compare(*drawn(seed, users=800, ctr=(0.1, 0.1 + detectable))).differences[0] for seed in range(150)]

    assert 0.7 <= np.mean([one.difference.low > 0 for one in runs]) <= 0.9


def test_four_times_the_users_halve_what_is_detectable():
    few, many = (compare(*drawn(3, users=users)).differences[0].detectable for users in (1000, 4000))

    assert few / many == pytest.approx(2, rel=0.15)


def test_the_probability_of_being_better_says_which_way():
    ahead, behind, alike = (
        compare(*drawn(5, ctr=(0.1, rate))).differences[0].treated_is_better for rate in (0.14, 0.06, 0.1)
    )

    assert ahead > 0.999
    assert behind < 0.001
    assert 0.01 < alike < 0.99


# --- words


def test_what_is_decided_is_said_plainly():
    ahead, behind = (compare(*drawn(5, ctr=(0.1, rate))).differences[0] for rate in (0.14, 0.06))

    assert ahead.verdict.startswith("learned is ahead by 0.0")
    assert behind.verdict.startswith("learned is behind by 0.0")
    assert ahead.more_users is behind.more_users is None


def test_what_is_not_decided_says_how_many_more_users_would():
    found = next(
        one
        for one in (compare(*drawn(seed, users=500, ctr=(0.1, 0.112))).differences[0] for seed in range(20))
        if one.more_users is not None
    )

    assert found.difference.low <= 0 <= found.difference.high
    assert found.verdict.startswith("not decided yet in clicks per impression: about")
    users = found.more_users + 500
    assert found.detectable * (500 / users) ** 0.5 == pytest.approx(abs(found.difference.mean), rel=0.01)


def test_next_to_no_difference_asks_for_no_endless_number_of_users():
    tallies = [Tally(policy, 10, clicks, 0, 50) for policy in ("a", "b") for clicks in (0, 1, 2)]
    found = compare(tallies, "a", "b").differences

    assert found[0].more_users is None
    assert "next to no difference so far; one of 0.0" in found[0].verdict
    assert found[2].verdict == "no difference in share of users who convert at all"
    assert found[2].treated_is_better == 0.5


# --- the split


@pytest.mark.parametrize(("share", "told"), [(0.5, False), (0.3, True)])
def test_a_split_that_is_not_what_was_set_is_told(share: float, told: bool):
    found = compare(*drawn(1, share=share), expected_share=0.5)

    assert found.mismatch_p is not None
    assert (found.mismatch_p < 0.001) == told
    assert any("the split is not what was set: learned has 30.0%" in one for one in found.warnings) == told


def test_an_even_split_raises_no_alarm_by_chance():
    rng = np.random.default_rng(0)
    alarms = 0
    for treated in rng.binomial(2000, 0.1, 300):
        tallies = [Tally("a", 1, 0, 0, 2000 - int(treated)), Tally("b", 1, 0, 0, int(treated))]
        alarms += len(compare(tallies, "a", "b", expected_share=0.1).warnings)

    assert alarms <= 3


def test_an_unknown_split_and_users_of_both_policies_are_mentioned():
    found = compare(*drawn(1), crossed=12)

    assert found.mismatch_p is None
    assert [one.split(":")[0] for one in found.warnings] == [
        "the split was not checked",
        "12 users were shown both policies and are left out",
    ]


# --- what is compared


def test_all_learned_rankers_are_one_policy():
    assert [family(one) for one in ("learned-0a1b2c", "learned", "fusion", "unlearned-1")] == [
        "learned",
        "learned",
        "fusion",
        "unlearned-1",
    ]


def test_named_policies_are_compared_and_else_those_with_most_users():
    shown = [PolicyUsers("similar_users", 50), PolicyUsers("fusion", 30), PolicyUsers("learned", 20)]

    assert choose_pair(shown, Request(), PLAIN) == ("similar_users", "fusion", None)
    assert choose_pair(shown, Request("learned"), PLAIN) == ("learned", "similar_users", None)
    assert choose_pair(shown, Request(None, "similar_users"), PLAIN) == ("fusion", "similar_users", None)
    assert choose_pair(shown, Request("fusion", "learned", 0.2), PLAIN) == ("fusion", "learned", 0.2)


def test_the_experiment_of_the_settings_is_compared_with_its_share():
    shown = [PolicyUsers("similar_users", 50), PolicyUsers("fusion", 30), PolicyUsers("learned", 20)]

    assert choose_pair(shown, Request(), PLANNED) == ("similar_users", "learned", 0.5)
    assert choose_pair(shown, Request("learned"), PLANNED) == ("learned", "similar_users", None)
    assert choose_pair(shown[:2], Request(), PLANNED) == ("similar_users", "fusion", None)


@pytest.mark.parametrize(
    ("policies", "request_", "words"),
    [
        ([], Request(), "the impressions name none"),
        ([PolicyUsers("fusion", 9)], Request(), "the impressions name fusion"),
        ([PolicyUsers("fusion", 9)], Request("fusion", "fusion"), "two policies are needed"),
        ([PolicyUsers("fusion", 9), PolicyUsers("learned", 9)], Request("fusio"), "no impression of the policy fusio"),
    ],
)
def test_where_there_are_not_two_policies_it_says_so(policies: list[PolicyUsers], request_: Request, words: str):
    with pytest.raises(TooLittleFeedbackError, match=words):
        choose_pair(policies, request_, PLAIN)


def test_too_few_users_are_not_compared():
    with pytest.raises(TooLittleFeedbackError, match="b was shown to 3 users who saw it alone, which takes 20"):
        compare([Tally("a", 1, 0, 0, 100), Tally("b", 1, 0, 0, 3)], "a", "b")


# --- from events


def some_events(users: int = 60) -> list[dict[str, Any]]:
    """Events of users of two policies, some of both, some without a policy, and some before there was any."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        learned = f"learned-{user % 3}"
        policies = ["fusion", learned] if user % 9 == 0 else ["fusion"] if user % 2 else [learned]
        for policy in policies:
            for shown in range(int(rng.integers(1, 6))):
                rows.append([user, shown, "impression", policy])
                if rng.random() < 0.4:
                    rows.append([user, shown, "click", policy])
                    if rng.random() < 0.4:
                        rows.append([user, shown, "conversion", policy])
        rows.append([user, 9, "click", None])
    rows.append([users, 1, "click", "fusion"])  # never shown: no user of the policy
    rows.append([users + 1, 1, "impression", None])
    rows.append([users + 2, 1, "impression", "similar_users"])
    return [
        {
            "user_id": f"u{user}",
            "campaign_id": f"c{campaign}",
            "event": kind,
            "timestamp": 1_790_000_000_000 + number * 1000,
            "event_id": f"e{number}",
            "position": None,
            "propensity": None,
            "policy": policy,
            "run_id": "r",
        }
        for number, (user, campaign, kind, policy) in enumerate(rows)
    ]


@pytest.fixture
def store(tmp_path: Path) -> AnalyticsStore:
    store = AnalyticsStore.from_settings(Settings(_env_file=None, sqlite_path=tmp_path / "analytics.db"))
    store.ensure_schema()
    store.set_events(some_events())
    return store


def test_the_stores_and_a_file_tell_the_same(store: AnalyticsStore):
    events = [(row["user_id"], row["event"], row["policy"]) for row in some_events()]
    tallies, crossed = tallies_among(events, "fusion", "learned")

    assert policies_of(store.engine, *ALWAYS) == policies_among(events)
    assert [one.policy for one in policies_among(events)] == ["fusion", "learned", "similar_users"]
    assert tallies_of(store.engine, "fusion", "learned", *ALWAYS) == (tallies, crossed)
    assert crossed == 7
    assert sum(one.users for one in tallies) == 60 - crossed
    found = compare_stored(store.engine, PLANNED, *ALWAYS)
    assert found == compare_events(events, PLANNED)
    assert (found.control.policy, found.treated.policy, found.expected_share) == ("fusion", "learned", 0.5)


def test_only_events_of_the_time_that_is_asked_for_count(store: AnalyticsStore):
    rows = some_events()
    middle = rows[len(rows) // 2]["timestamp"]
    early = [(row["user_id"], row["event"], row["policy"]) for row in rows if row["timestamp"] < middle]

    assert tallies_of(store.engine, "fusion", "learned", 0, middle) == tallies_among(early, "fusion", "learned")
    assert policies_of(store.engine, middle, middle) == []


# --- the commands


@pytest.fixture
def events_file(tmp_path: Path) -> Path:
    rows = [
        {name: value for name, value in row.items() if name not in ("run_id", "timestamp")}
        | {"timestamp": np.datetime_as_string(np.datetime64(row["timestamp"], "ms")) + "Z"}
        for row in some_events()
    ]
    path = tmp_path / "events.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["experiment", *map(str, arguments)], catch_exceptions=False)


def test_the_report_of_a_file_is_a_table_with_words_or_json(events_file: Path):
    told = run("report", "--events", events_file, "--policy-a", "fusion", "--policy-b", "learned", "--share", 0.5)
    figures = json.loads(
        run("report", "--events", events_file, "--policy-a", "fusion", "--policy-b", "learned", "--json").stdout
    )

    assert told.exit_code == 0
    assert "conversion_rate" in told.stdout
    assert "learned is better with probability" in told.stdout
    assert "users were shown both policies" in told.stdout
    assert figures["control"]["policy"] == "fusion"
    assert set(figures["treated"]["metrics"]["ctr"]) == {"mean", "low", "high"}
    assert [one["metric"] for one in figures["differences"]] == ["ctr", "clicks_per_user", "conversion_rate"]
    assert figures["warnings"][0].startswith("the split was not checked")


def test_without_a_file_the_report_reads_the_stores(store: AnalyticsStore, tmp_path: Path):
    settings = PLANNED.model_copy(update={"sqlite_path": tmp_path / "analytics.db"})

    found = commands.report(None, settings, Request())

    assert isinstance(found, Experiment)
    assert found == compare_stored(store.engine, PLANNED, *ALWAYS)
    with pytest.raises(TooLittleFeedbackError):
        commands.report(None, settings, Request(), until="2026-01-01")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"request": Request(share=1.0)}, "--share 1: must be between 0 and 1"),
        ({"since": "yesterday"}, "--since yesterday"),
        ({"until": "2026-02-30"}, "--until 2026-02-30"),
    ],
)
def test_what_cannot_be_used_is_named(events_file: Path, changes: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        commands.report(events_file, PLAIN, changes.pop("request", Request()), **changes)


def test_a_log_without_propensities_is_not_compared_with_other_policies(events_file: Path):
    with pytest.raises(NoSupportError, match="no impression carries its propensity"):
        commands.compare_file(events_file, PLAIN)
    with pytest.raises(InputError, match="--reward views: must be one of click, conversion"):
        commands.compare_file(events_file, PLAIN, reward="views")


def test_what_exploration_says_is_a_table_or_json(tmp_path: Path):
    path = tmp_path / "events.ndjson"
    rng = np.random.default_rng(0)
    lines = []
    for user in range(300):
        explored = rng.random() < 0.2
        choice = not explored or rng.random() < 0.25
        common = {"user_id": f"u{user}", "campaign_id": "a" if choice else "b", "policy": "fusion", "position": 5}
        propensity = 0.2 / 4 + (0.8 if choice else 0)
        lines.append(
            common | {"event": "impression", "timestamp": "2026-10-01T09:00:00Z", "propensity": round(propensity, 6)}
        )
        if rng.random() < 0.3:
            lines.append(common | {"event": "click", "timestamp": "2026-10-01T09:05:00Z"})
    path.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["compare", "--events", path, "--exploration-share", 0.2]

    told = run(*arguments)
    figures = json.loads(run(*arguments, "--json").stdout)

    assert told.stdout.startswith("300 impressions of 300 users at explored places")
    assert "ranker alone" in told.stdout
    assert set(figures) == {"ranker alone", "chance"}
    assert figures["chance"]["values"]["snips"]["mean"] == pytest.approx(0.3, abs=0.15)
    assert figures["ranker alone"]["mean_weight"]["mean"] == pytest.approx(1, abs=0.1)
    assert isinstance(figures["chance"]["caveats"], list)
