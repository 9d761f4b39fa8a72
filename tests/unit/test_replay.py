"""Replay: nothing at or after a split is known at it, whatever the policy; the same history gives the same figures."""

from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from personalization.evaluation.policies import ALL, BASELINES, STANDARD
from personalization.evaluation.recording import result_rows
from personalization.evaluation.replay import Outcome, Plan, Replay, summarise
from personalization.learning.history import (
    CatalogArrays,
    History,
    Intents,
    Messages,
    in_order,
    signals_of_events,
    signals_of_messages,
    take_snapshot,
    unit,
)
from personalization.learning.training import take_examples
from personalization.recommend.ranking import Evidence
from personalization.schemas import DAY_MS, Campaign
from scipy import sparse

START = 1_767_225_600_000  # 2026-01-01
WEEK = 7 * DAY_MS
USERS, CAMPAIGNS, INTENTS, DIM = 60, 72, 4, 8
FIRST = START + 8 * WEEK
END = FIRST + 2 * WEEK
PLAN = Plan(FIRST, WEEK, WEEK, END)


def world(weeks: int = 11, intents: int = INTENTS) -> History:
    """Users with a taste, who say and click things near it; made of arrays, without a model."""
    rng = np.random.default_rng(5)
    topics = unit(rng.normal(size=(INTENTS, DIM)))
    taste = rng.integers(INTENTS, size=USERS)
    intent_ids = [f"i{at}" for at in range(intents)]
    campaigns = [
        Campaign(
            id=f"c{at}",
            name=f"c{at}",
            category=f"k{at % 3}",
            intents=intent_ids[at % INTENTS :][:1],
            active_from=datetime.fromtimestamp(START / 1000, UTC) + timedelta(weeks=at // 8 * 1.25 - 3),
            active_until=datetime.fromtimestamp(START / 1000, UTC) + timedelta(weeks=at // 8 * 1.25 + 2),
        )
        for at in range(CAMPAIGNS)
    ]
    said = np.sort(rng.integers(START, START + weeks * WEEK, size=weeks * USERS))
    of_user = rng.integers(USERS, size=len(said))
    near = unit(topics[taste[of_user]] + 0.3 * rng.normal(size=(len(said), DIM)))
    text = unit(topics[np.arange(CAMPAIGNS) % INTENTS] + 0.3 * rng.normal(size=(CAMPAIGNS, DIM)))
    arrays = CatalogArrays.of(campaigns, intent_ids, text)
    expressed = np.flatnonzero(rng.random(len(said)) < (0.7 if intents else 0))
    understood = Intents(
        user=of_user[expressed],
        at=said[expressed],
        intent=taste[of_user[expressed]],
        confidence=np.full(len(expressed), 0.8, np.float32),
        message=np.arange(len(expressed)),
    )
    moments = np.sort(rng.integers(START, START + weeks * WEEK, size=2 * weeks * USERS))
    events = []
    for at in moments.tolist():
        user = int(rng.integers(USERS))
        running = np.flatnonzero((arrays.active_from <= at) & (at < arrays.active_until))
        liked = running[running % INTENTS == taste[user]]
        campaign = int(rng.choice(liked if rng.random() < 0.8 else running))
        events.append((user, campaign, str(rng.choice(["impression", "click", "click", "conversion"])), at))
    return History(
        [f"u{at:03d}" for at in range(USERS)],
        arrays,
        Messages(of_user, said, near),
        understood,
        in_order(signals_of_events(events), signals_of_messages(understood, arrays)),
    )


def plant(history: History, at: int, *, later_user: bool = True) -> History:
    """The history with loud messages, intents, clicks and conversions from `at` on, by all users and by a new one."""
    rng = np.random.default_rng(9)
    users = np.arange(USERS + later_user, dtype=np.int64)
    times = np.full(len(users), at, dtype=np.int64)
    loud = unit(rng.normal(size=(len(users), DIM)))
    said = history.messages
    understood = history.intents
    messages = Messages(
        *(
            np.concatenate([ours, theirs])
            for ours, theirs in ((said.user, users), (said.at, times), (said.vectors, loud))
        )
    )
    intents = Intents(
        user=np.concatenate([understood.user, users]),
        at=np.concatenate([understood.at, times]),
        intent=np.concatenate([understood.intent, users % INTENTS]),
        confidence=np.concatenate([understood.confidence, np.ones(len(users), dtype=np.float32)]),
        message=np.arange(len(understood.at) + len(users)),
    )
    events = [(int(user), int(user) % CAMPAIGNS, kind, at) for user in users for kind in ("click", "conversion")]
    return History(
        [*history.user_ids, "u999"] if later_user else history.user_ids,
        history.catalog,
        _sorted(messages),
        _sorted(intents),
        in_order(history.signals, signals_of_events(events)),
    )


def _sorted(part: Any) -> Any:
    order = np.argsort(part.at, kind="stable")
    return type(part)(**{name: column[order] for name, column in vars(part).items()})


def contents(value: Any) -> Any:
    """All that a value holds, to the byte."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if sparse.issparse(value):
        whole = value.tocsr(copy=True)
        whole.sort_indices()
        return [contents(part) for part in (whole.data, whole.indices, whole.indptr)]
    if isinstance(value, dict):
        return {name: contents(one) for name, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [contents(one) for one in (sorted(value) if isinstance(value, set) else value)]
    if is_dataclass(value):
        return {one.name: contents(getattr(value, one.name)) for one in fields(value)}
    return value


def knowledge_at(history: History, moment: int) -> Any:
    """All that is drawn for all users but the planted one."""
    snapshot = take_snapshot(history, moment)
    users = snapshot.users(np.arange(USERS))
    return contents([snapshot.campaigns, users, Evidence.of(snapshot.campaigns, users)])


def run(history: History, plan: Plan = PLAN, policies: tuple[str, ...] = ALL) -> dict[str, Outcome]:
    return Replay(history, plan).run(policies, print)


@pytest.fixture(scope="module")
def history() -> History:
    return world()


@pytest.fixture(scope="module")
def outcomes(history: History) -> dict[str, Outcome]:
    return run(history)


# --- the future


@pytest.mark.parametrize("delay", [0, 1, DAY_MS, 10 * WEEK])
@pytest.mark.parametrize("later_user", [False, True])
def test_what_happens_at_a_split_or_later_changes_no_byte_of_what_is_known_at_it(
    history: History, delay: int, later_user: bool
):
    known = knowledge_at(history, FIRST)

    assert knowledge_at(plant(history, FIRST + delay, later_user=later_user), FIRST) == known


def test_a_millisecond_before_the_split_it_is_known(history: History):
    assert knowledge_at(plant(history, FIRST - 1), FIRST) != knowledge_at(history, FIRST)


def test_no_policy_scores_otherwise_for_what_happens_at_the_end_of_the_last_horizon(
    history: History, outcomes: dict[str, Outcome]
):
    """To the millisecond: it belongs to the next horizon."""
    planted = run(plant(history, END))

    assert outcomes.keys() == planted.keys() == set(ALL)
    for policy in ALL:
        ours, theirs = outcomes[policy], planted[policy]
        assert contents(ours.owners) == contents(theirs.owners)
        # Novelty counts shares of all users there ever were.
        for metric in set(ours.values) - {"novelty@10"}:
            assert contents(ours.values[metric]) == contents(theirs.values[metric]), (policy, metric)
        assert ours.shown == theirs.shown, policy
        assert contents(ours.probabilities) == contents(theirs.probabilities), policy


def test_an_earlier_split_is_blind_to_the_answers_of_a_later_one(history: History, outcomes: dict[str, Outcome]):
    planted = run(plant(history, FIRST + WEEK), policies=STANDARD)

    for policy in STANDARD:
        ours, theirs = outcomes[policy], planted[policy]
        for metric in set(ours.values) - {"novelty@10"}:
            assert contents(ours.values[metric][0]) == contents(theirs.values[metric][0]), (policy, metric)
        assert contents(ours.owners[1]) != contents(theirs.owners[1])


def test_answers_are_those_of_the_horizon_and_of_campaigns_new_to_the_user(history: History):
    example = next(take_examples(history, FIRST, WEEK, "new"))
    signals = history.signals

    clicked = signals.is_event & (signals.at >= FIRST) & (signals.at < FIRST + WEEK)
    before = signals.is_event & (signals.at < FIRST)
    seen = set(zip(signals.user[before].tolist(), signals.campaign[before].tolist(), strict=True))
    then = set(zip(signals.user[clicked].tolist(), signals.campaign[clicked].tolist(), strict=True))
    rows, columns = np.nonzero(example.truth)
    found = set(zip(example.users[rows].tolist(), example.columns[columns].tolist(), strict=True))
    assert found == then - seen
    assert found


# --- the figures


def test_the_learned_rankers_have_learned(outcomes: dict[str, Outcome]):
    """Else the tests above would say nothing of them."""
    assert outcomes["learned"].probabilities
    assert outcomes["learned"].column("ndcg@10").mean() > outcomes["random"].column("ndcg@10").mean() + 0.05


def test_the_same_history_gives_the_same_report(history: History):
    policies = ("shipped", "fusion", *BASELINES)
    reports = []
    for _ in range(2):
        replay = Replay(world(), PLAN)
        reports.append(summarise(replay, PLAN, replay.run(policies, print)))

    assert reports[0] == reports[1]
    assert reports[0]["splits"] == ["2026-02-26T00:00:00Z", "2026-03-05T00:00:00Z"]
    assert set(reports[0]["differences"]) == {f"shipped - {one}" for one in policies if one != "shipped"}


def test_a_catalog_without_intents_is_evaluated_all_the_same():
    history = world(intents=0)

    outcomes = run(history, replace(PLAN, until=FIRST + WEEK), STANDARD)

    assert len(history.intents.at) == 0
    assert all(np.isfinite(one.column("ndcg@10")).all() for one in outcomes.values())
    assert outcomes["message_similarity"].column("ndcg@10").mean() > outcomes["random"].column("ndcg@10").mean()


def test_a_split_before_everything_that_happened_is_evaluated_without_learning():
    history = world(weeks=2)
    plan = Plan(START, WEEK, WEEK, START + WEEK)

    outcomes = run(history, plan)

    assert not outcomes["shipped"].probabilities
    assert all(len(one.column("mrr")) for one in outcomes.values())


def test_every_figure_of_a_report_is_a_row_of_its_own(history: History):
    replay = Replay(history, PLAN)
    report = summarise(replay, PLAN, replay.run(("shipped", "learned", "popularity"), print))

    rows = result_rows("run", report)

    keys = [(row["policy"], row["metric"], row["segment"]) for row in rows]
    assert len(set(keys)) == len(keys)
    by_key = dict(zip(keys, rows, strict=True))
    popularity = by_key["popularity", "ndcg@10", "all"]
    assert popularity["mean"] == report["policies"]["popularity"]["ndcg@10"]["mean"]
    assert popularity["diff_low"] == report["differences"]["shipped - popularity"]["ndcg@10"]["low"]
    assert by_key["shipped", "ndcg@10", "all"]["diff_mean"] is None
    assert by_key["popularity", "coverage@10", "all"]["low"] is None
    assert ("learned", "brier", "all") in by_key
    assert {row["segment"] for row in rows} <= {"all", "cold", "warm"}
    assert {(row["splits"], row["users"], row["task"]) for row in rows} == {(2, report["users"], "new")}
