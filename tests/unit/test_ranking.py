"""Ranking and its explanations: which campaigns come out of the evidence, in which order, and why."""

import random
from datetime import UTC, datetime
from typing import Any

import pytest
from personalization.recommend.candidates import Evidence
from personalization.recommend.explanation import explain
from personalization.recommend.ranking import WEIGHTS, Ranked, rank, rank_popular
from personalization.schemas import Recommendation
from personalization.stores.milvus import Neighbour
from personalization.stores.neo4j import CampaignRow, NeighbourCampaignRow, OwnIntentRow

NOW = 1_790_000_000_000
DAY = 86_400_000


def campaign(campaign_id: str) -> CampaignRow:
    return CampaignRow(campaign_id=campaign_id, name=campaign_id.title(), description="", category="x")


def own(campaign_id: str, intent: str = "flights", **changes: Any) -> OwnIntentRow:
    known = {"count": 1, "last_seen": NOW, "confidence": 0.8} | changes
    return OwnIntentRow(campaign_id=campaign_id, intent_id=intent, intent_name=intent.title(), **known)


def engaged(campaign_id: str, user_id: str, count: int = 1) -> NeighbourCampaignRow:
    return NeighbourCampaignRow(campaign_id=campaign_id, user_id=user_id, count=count)


def near(**similarities: float) -> list[Neighbour]:
    return [Neighbour(user_id=user_id, similarity=value) for user_id, value in similarities.items()]


def evidence(
    active: str,
    *,
    own_intents: tuple[OwnIntentRow, ...] = (),
    neighbours: list[Neighbour] | None = None,
    theirs: tuple[NeighbourCampaignRow, ...] = (),
    users: dict[str, int] | None = None,
) -> Evidence:
    """Evidence over the campaigns named by the letters of `active`."""
    return Evidence([campaign(one) for one in active], [*own_intents], neighbours or [], [*theirs], users or {})


def order(ranked: list[Ranked]) -> str:
    return ">".join(one.campaign["campaign_id"] for one in ranked)


def shares(ranked: list[Ranked]) -> dict[str, dict[str, float]]:
    return {one.campaign["campaign_id"]: dict(one.shares) for one in ranked}


# --- own intents


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        pytest.param({"count": 5}, {"count": 4}, id="said more often"),
        pytest.param({"confidence": 0.9}, {"confidence": 0.8}, id="said more clearly"),
        pytest.param({"last_seen": NOW}, {"last_seen": NOW - 7 * DAY}, id="said later"),
        pytest.param(
            {"count": 2, "last_seen": NOW}, {"count": 3, "last_seen": NOW - 60 * DAY}, id="later over oftener"
        ),
    ],
)
def test_what_the_user_said_more_often_more_clearly_or_later_counts_more(better: dict[str, Any], worse: dict[str, Any]):
    ranked = rank(evidence("ab", own_intents=(own("a", **worse), own("b", **better))))

    assert order(ranked) == "b>a"
    assert ranked[0].score > ranked[1].score > 0


def test_what_was_said_a_half_life_earlier_counts_half():
    ranked = rank(evidence("ab", own_intents=(own("a", last_seen=NOW - 30 * DAY), own("b", last_seen=NOW))))

    assert shares(ranked) == {"b": {"own_intents": 0.6}, "a": {"own_intents": 0.3}}


def test_time_that_passes_changes_nothing_for_a_user_who_is_silent():
    now, later = (
        rank(evidence("ab", own_intents=(own("a", last_seen=at), own("b", last_seen=at - 9 * DAY))))
        for at in (NOW, NOW - 1000 * DAY)
    )

    assert shares(now) == shares(later)


def test_a_campaign_gathers_all_of_its_intents():
    ranked = rank(evidence("ab", own_intents=(own("a"), own("b", "films"), own("b", "books"))))

    assert order(ranked) == "b>a"
    assert ranked[1].score == pytest.approx(ranked[0].score / 2, abs=1e-4)


def test_own_intents_beat_any_popularity():
    ranked = rank(evidence("abc", own_intents=(own("a"),), users={"a": 0, "b": 10_000_000, "c": 5}, neighbours=[]))

    assert order(ranked) == "a"
    assert shares(ranked) == {"a": {"own_intents": 0.6}}


def test_own_intents_beat_similar_users_and_popularity_together():
    ranked = rank(
        evidence(
            "ab",
            own_intents=(own("a"),),
            neighbours=near(u1=0.99, u2=0.98),
            theirs=(engaged("b", "u1", 100), engaged("b", "u2", 100)),
            users={"b": 10_000_000},
        )
    )

    assert order(ranked) == "a>b"


# --- similar users


@pytest.mark.parametrize(
    "theirs",
    [
        pytest.param((engaged("a", "far"), engaged("b", "close")), id="the more similar user"),
        pytest.param((engaged("a", "far", 2), engaged("b", "far", 3)), id="engaged more often"),
        pytest.param((engaged("a", "close"), engaged("b", "close"), engaged("b", "far")), id="more users"),
    ],
)
def test_similar_users_speak_by_similarity_count_and_number(theirs: tuple[NeighbourCampaignRow, ...]):
    ranked = rank(evidence("ab", neighbours=near(close=0.9, far=0.6), theirs=theirs))

    assert order(ranked) == "b>a"
    assert set(ranked[0].shares) == {"similar_users"}
    assert ranked[0].score == 0.25


def test_similar_users_speak_for_a_user_of_whom_no_intent_is_known():
    ranked = rank(evidence("abc", neighbours=near(u1=0.7), theirs=(engaged("b", "u1"),), users={"a": 900, "b": 3}))

    assert order(ranked) == "b"


# --- popularity


def test_popularity_decides_between_equals_only():
    rows = (own("a"), own("b"))

    assert order(rank(evidence("ab", own_intents=rows, users={"a": 1, "b": 2}))) == "b>a"
    assert order(rank(evidence("ab", own_intents=rows, users={"a": 2, "b": 1}))) == "a>b"


def test_a_user_nothing_is_known_of_gets_no_personal_campaign_but_popular_ones():
    nothing = evidence("abcd", users={"a": 3, "b": 0, "c": 70, "d": 3, "gone": 9})

    assert rank(nothing) == []
    assert order(rank_popular(nothing)) == "c>a>d>b"
    assert set(shares(rank_popular(nothing))["c"]) == {"popularity"}
    assert shares(rank_popular(nothing))["b"] == {}


def test_where_nobody_engaged_yet_all_active_campaigns_are_offered_by_id():
    ranked = rank_popular(evidence("cab", users={"a": 0, "b": 0, "c": 0}))

    assert [(one.campaign["campaign_id"], one.score) for one in ranked] == [("a", 0), ("b", 0), ("c", 0)]


def test_a_campaign_newer_than_the_last_run_has_no_popularity_yet():
    assert order(rank_popular(evidence("ab", users={"b": 5}))) == "b>a"
    assert rank(evidence("a", own_intents=(own("a"),)))[0].score == 0.6


# --- what may not appear


def test_what_is_not_active_does_not_appear_whatever_speaks_for_it():
    over = evidence(
        "a",
        own_intents=(own("over", count=99), own("a")),
        neighbours=near(u1=0.9),
        theirs=(engaged("over", "u1", 99),),
        users={"over": 10_000, "a": 1},
    )

    assert order(rank(over)) == "a"
    assert order(rank_popular(over)) == "a"


def test_no_active_campaign_means_no_recommendation():
    assert rank(evidence("", own_intents=(own("a"),))) == []
    assert rank_popular(evidence("", users={"a": 1})) == []


# --- order


def test_equal_scores_are_ordered_by_id_however_the_stores_answer():
    rows = [own(one, "flights") for one in "edcba"]
    for seed in range(10):
        shuffled = random.Random(seed).sample(rows, len(rows))

        assert order(rank(evidence("daecb", own_intents=(*shuffled,)))) == "a>b>c>d>e"


# --- properties of any evidence


def random_evidence(seed: int) -> Evidence:
    draw = random.Random(seed)
    known = [f"c{number:02}" for number in range(draw.randint(1, 25))]
    active = draw.sample(known, draw.randint(0, len(known)))
    users = [f"u{number}" for number in range(draw.choice([0, 0, 1, 5, 50]))]
    return Evidence(
        campaigns=[campaign(one) for one in active],
        own_intents=[
            own(
                draw.choice(known),
                f"i{number}",
                count=draw.choice([1, 2, 10, 100_000]),
                last_seen=NOW - draw.randint(0, 900 * DAY),
                confidence=draw.uniform(0.01, 1),
            )
            for number in range(draw.choice([0, 1, 3, 40]))
        ],
        neighbours=[Neighbour(user_id=user, similarity=draw.uniform(0.5, 1)) for user in users],
        neighbours_campaigns=[
            engaged(one, user, draw.choice([1, 3, 5000]))
            for user in users
            for one in draw.sample(known, draw.randint(0, min(4, len(known))))
        ],
        engaged_users={one: draw.choice([0, 1, draw.randint(2, 10**7)]) for one in known if draw.random() < 0.9},
    )


SEEDS = range(400)


@pytest.mark.parametrize("ranking", [rank, rank_popular])
def test_every_score_is_the_sum_of_its_shares_and_lies_between_nothing_and_one(ranking: Any):
    scores = set()
    for seed in SEEDS:
        for one in ranking(random_evidence(seed)):
            scores.add(one.score)
            assert 0 <= one.score <= 1
            assert one.score == pytest.approx(sum(one.shares.values()), abs=1e-9)
            for source, share in one.shares.items():
                assert 0 < share <= WEIGHTS[source]
    assert len(scores) > 20


def test_the_weights_leave_room_for_a_full_score_and_put_the_user_first():
    assert sum(WEIGHTS.values()) == pytest.approx(1)
    assert WEIGHTS["own_intents"] > WEIGHTS["similar_users"] + WEIGHTS["popularity"]
    best = evidence("a", own_intents=(own("a"),), neighbours=near(u=0.9), theirs=(engaged("a", "u"),), users={"a": 1})
    assert rank(best)[0].score == 1


@pytest.mark.parametrize("ranking", [rank, rank_popular])
def test_every_campaign_is_active_appears_once_and_in_order(ranking: Any):
    for seed in SEEDS:
        known = random_evidence(seed)
        ranked = ranking(known)
        ids = [one.campaign["campaign_id"] for one in ranked]

        assert len(ids) == len(set(ids))
        assert set(ids) <= {one["campaign_id"] for one in known.campaigns}
        keys = [(-one.score, one.campaign["campaign_id"]) for one in ranked]
        assert keys == sorted(keys)


def test_the_order_of_the_evidence_does_not_matter():
    for seed in SEEDS:
        known = random_evidence(seed)
        draw = random.Random(seed)
        shuffled = Evidence(
            *(
                draw.sample(rows, len(rows))
                for rows in (known.campaigns, known.own_intents, known.neighbours, known.neighbours_campaigns)
            ),
            engaged_users=dict(draw.sample(list(known.engaged_users.items()), len(known.engaged_users))),
        )

        assert order(rank(shuffled)) == order(rank(known))
        assert order(rank_popular(shuffled)) == order(rank_popular(known))


def test_more_of_the_same_intent_never_lowers_a_campaign():
    for seed in SEEDS:
        known = random_evidence(seed)
        for row in known.own_intents[:1]:
            louder = [one | {"count": one["count"] * 3} if one is row else one for one in known.own_intents]
            more = Evidence(known.campaigns, louder, known.neighbours, known.neighbours_campaigns, known.engaged_users)
            before, after = (order_of(row["campaign_id"], rank(one)) for one in (known, more))

            assert after <= before


def order_of(campaign_id: str, ranked: list[Ranked]) -> int:
    ids = [one.campaign["campaign_id"] for one in ranked]
    return ids.index(campaign_id) if campaign_id in ids else len(ids)


# --- reasons


def test_each_source_is_explained_in_words_the_weightiest_first():
    midnight = int(datetime(2026, 9, 3, tzinfo=UTC).timestamp() * 1000)
    known = evidence(
        "a",
        own_intents=(
            own("a", "hotels", count=2, last_seen=midnight - DAY),
            own("a", "flights", count=5, last_seen=midnight - 1),
            own("a", "cars", count=2, last_seen=midnight - 9 * DAY),
            own("b", "films", count=50),
        ),
        neighbours=near(u1=0.9, u2=0.8, u3=0.7),
        theirs=(engaged("a", "u1", 4), engaged("a", "u3"), engaged("b", "u2")),
        users={"a": 12_345, "b": 1},
    )

    reasons = explain(rank(known)[0], known)

    assert [(reason.source, reason.text) for reason in reasons] == [
        ("own_intents", "expressed “Flights” (5×), “Cars” (2×), “Hotels” (2×), last on 2 Sep 2026"),
        ("similar_users", "2 of 3 similar users engaged with it"),
        ("popularity", "12,345 users in all engaged with it"),
    ]


@pytest.mark.parametrize("ranking", [rank, rank_popular])
def test_reasons_tell_of_all_shares_and_of_nothing_else(ranking: Any):
    for seed in SEEDS:
        known = random_evidence(seed)
        for one in ranking(known):
            reasons = explain(one, known)

            assert {reason.source: reason.share for reason in reasons} == one.shares
            assert all(reason.text for reason in reasons)
            weights = [reason.share for reason in reasons]
            assert weights == sorted(weights, reverse=True)
            Recommendation(**one.campaign, score=one.score, reasons=reasons)


def test_a_score_of_nothing_has_no_reasons():
    known = evidence("a", users={"a": 0})

    assert explain(rank_popular(known)[0], known) == []


def test_a_cosine_below_nothing_is_no_reason_for_a_score_beyond_the_range():
    ranked = rank(evidence("ab", own_intents=(own("a", confidence=-0.1), own("b", confidence=-0.4))))

    assert all(0 <= one.score <= 1 for one in ranked)


def test_every_personal_recommendation_has_a_reason():
    ranked = rank(evidence("ab", own_intents=(own("a"), own("b", last_seen=NOW - 3 * 365 * DAY))))

    assert all(one.shares for one in ranked)
