"""What an answer says: shares that add up to the score, plain and true words, data where they are asked for."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from knowledge_data import DAY_MS, NOW, catalog_of, know, some_campaigns, some_history, some_known
from personalization.learning.training import fit_ranker, past_examples
from personalization.recommend.candidates import Known
from personalization.recommend.explanation import reasons
from personalization.recommend.knowledge import ServedKnowledge
from personalization.recommend.ranking import LearnedRanker
from personalization.recommend.rules import PastEvent
from personalization.recommend.service import Ask, decide
from personalization.recommend.sources import SOURCES
from personalization.schemas import CatalogRules, Event, Recommendations
from personalization.settings import Settings
from personalization.stores.milvus import Neighbour
from personalization.stores.neo4j import LinkRow

RANKERS = ["auto", "fusion", "similar_users"]
PLAIN = re.compile(r"[\w“(][^{}\[\]_<>]*[\w)”×]")
"""A phrase: no braces, no underscores, no Python."""


@pytest.fixture(scope="module")
def learned() -> LearnedRanker:
    history = some_history(np.random.default_rng(3), users=60, campaigns=8, messages=900, events=1500)
    ranker = fit_ranker(past_examples(history, NOW, 7 * DAY_MS, "any"))
    assert ranker is not None
    return ranker


def configured(**changes: Any) -> Settings:
    return Settings(_env_file=None, **{"exploration_share": 0.0} | changes)


def answer(known: Known, top: int = 5, *, explain: bool = False, **changes: Any) -> Recommendations:
    [found] = decide([known], [Ask(known.viewer.user_id, top, explain=explain)], NOW, configured(**changes))
    return found


def link(kind: str, campaign_id: str, **changes: Any) -> LinkRow:
    known = {"user_id": "ann", "kind": kind, "id": campaign_id, "name": campaign_id.title(), "count": 2}
    return LinkRow(**known, weight=1.0, last_at=NOW, **changes)


def share_of(known: Known, source: Any, campaign_id: str = "c0") -> tuple[str, dict[str, Any]]:
    """Words and data of one source's reason."""
    [reason] = reasons(known, campaign_id, {source: 0.5}, with_data=True)
    assert reason.data is not None
    return reason.text, reason.data


# --- any answer


@examples(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    candidates=st.integers(0, 7),
    ranker=st.sampled_from(RANKERS),
    silent=st.booleans(),
    explain=st.booleans(),
    boost=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_any_answer_adds_up_and_speaks_plainly(
    learned: LearnedRanker, seed: int, candidates: int, ranker: str, silent: bool, explain: bool, boost: float
):
    known = some_known(seed, candidates, learned=learned, silent=silent)
    boosted = {one: {"boost": boost} for one in known.served.campaigns.ids[::2]}
    known = some_known(
        seed, candidates, learned=learned, silent=silent, catalog=catalog_of(known.served.campaigns, **boosted)
    )

    found = answer(known, explain=explain, ranker=ranker, exploration_share=0.5)

    assert found.strategy == ("popular" if silent else "personalized")
    assert len(found.recommendations) == min(candidates, 5)
    for place, one in enumerate(found.recommendations, 1):
        assert one.position == place
        assert 0 <= one.score <= 1
        assert sum(each.share for each in one.reasons) == pytest.approx(one.score, abs=1e-9)
        shares = [each.share for each in one.reasons]
        assert shares == sorted(shares, reverse=True)
        assert all(each.share > 0 for each in one.reasons)
        assert len({each.source for each in one.reasons}) == len(one.reasons)
        for each in one.reasons:
            assert PLAIN.fullmatch(each.text), each.text
            assert (each.data is not None) == explain
        Event(
            user_id="ann",
            campaign_id=one.campaign_id,
            event="impression",
            timestamp="2026-09-21T00:00:00Z",
            position=one.position,
            propensity=one.propensity,
            policy=found.policy,
        )
    assert (found.excluded is not None) == explain
    if not explain:
        assert '"data"' not in found.model_dump_json(exclude_none=True)
        assert '"excluded"' not in found.model_dump_json(exclude_none=True)


@given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=9), total=st.floats(0, 1))
def test_rounded_shares_add_up_to_the_rounded_score(shares: list[float], total: float):
    known = some_known(0)
    scale = total / max(sum(shares), 1e-9)
    given_shares: dict[Any, float] = {source: one * scale for source, one in zip(SOURCES, shares, strict=False)}

    told = reasons(known, "c0", given_shares, with_data=False)

    assert sum(one.share for one in told) == pytest.approx(sum(given_shares.values()), abs=5.1e-5)
    assert round(sum(one.share for one in told), 4) <= 1
    for one in told:
        assert one.share == pytest.approx(given_shares[one.source], abs=1e-4)
        assert one.share == round(one.share, 4)


def test_six_even_shares_of_a_full_score_do_not_exceed_it():
    """Each alone would round up, to 1.0002 in all."""
    even: dict[Any, float] = dict.fromkeys(SOURCES[:6], 1 / 6)

    told = reasons(some_known(0), "c0", even, with_data=False)

    assert sum(one.share for one in told) == pytest.approx(1, abs=1e-12)


# --- words


def test_own_intents_are_told_the_strongest_first():
    known = some_known(1)
    known.served.campaign_of["c0"] = known.served.campaign_of["c0"].model_copy(update={"intents": ["i0", "i1"]})
    midnight = 1_788_307_200_000  # 2026-09-02
    links = [
        LinkRow(kind="intent", id="i0", name="-", count=2, weight=1.5, last_at=midnight - 1),
        LinkRow(kind="intent", id="i1", name="-", count=5, weight=3.5, last_at=midnight - 9 * DAY_MS),
        LinkRow(kind="intent", id="i2", name="-", count=9, weight=9.0, last_at=midnight),
    ]

    text, data = share_of(replace(known, expressed=links), "own_intents")

    assert text == "expressed “Intent i1” (5×), “Intent i0” (2×), last on 1 Sep 2026"
    assert [one["intent_id"] for one in data["intents"]] == ["i1", "i0"]
    assert data["path"] == ["User ann", "Intent i1", "Campaign c0"]
    assert 0 < len(data["message_ids"]) <= 5


def test_what_was_engaged_with_is_told_with_its_day():
    known = some_known(1)
    [engaged] = [{**link("campaign", "c0"), "count": 3, "last_at": 1_788_307_200_000}]

    text, data = share_of(replace(known, engaged=[engaged]), "own_engagement")

    assert text == "engaged with it 3×, last on 2 Sep 2026"
    assert data["count"] == 3
    other = replace(known, engaged=[link("campaign", "c1")])
    kinds = other.served.campaign_of
    kinds["c0"], kinds["c1"] = (kinds[one].model_copy(update={"category": "travel"}) for one in ("c0", "c1"))
    assert share_of(other, "own_engagement")[0] == "engages with travel campaigns"
    kinds["c1"] = kinds["c1"].model_copy(update={"category": "films"})
    assert share_of(other, "own_engagement")[0] == "has not engaged with it yet"


def test_similar_users_are_counted():
    known = some_known(1)
    near = [Neighbour(user_id=f"u{at}", similarity=0.9) for at in range(7)]
    known.evidence.context["neighbours"][0, 0] = 3

    assert share_of(replace(known, neighbours=near), "similar_users") == (
        "3 of 7 similar users engaged with it",
        {"similar_users": 7, "engaged": 3},
    )
    assert share_of(replace(known, neighbours=[]), "similar_users")[0] == "no user is similar enough yet"


def test_walks_start_at_what_the_user_is_linked_to_and_co_engagement_at_campaigns_only():
    strong = {"weight": 9.0}
    known = replace(
        some_known(1),
        expressed=[link("intent", "i0") | strong],
        engaged=[link("campaign", "c0"), link("campaign", "c1")],
    )

    assert share_of(known, "graph_walk") == ("is close in the graph to “I0”, “C1”", {"from": ["i0", "c1"]})
    assert share_of(known, "co_engagement") == (
        "users who engaged with “C1” engaged with it, too",
        {"from": ["c1"]},
    )
    alone = replace(known, expressed=[], engaged=[link("campaign", "c0")])
    assert share_of(alone, "co_engagement")[0] == "the user has engaged with no other campaign"
    assert share_of(alone, "graph_walk")[0] == "nothing else in the graph is linked to the user"


def test_nothing_untrue_is_said_of_a_user_who_said_and_did_nothing():
    """A learned ranker may find that silence speaks for a campaign."""
    silent = some_known(1, silent=True)

    for source in SOURCES:
        text, data = share_of(silent, source)
        untrue = r"expressed|what the user talks about$|talks like|engages with|too$|is close"
        assert not re.search(untrue, text.replace("nothing is known yet of what the user talks about", "")), text
        assert not any(data.get(each) for each in ("intents", "from", "message_ids", "engaged", "count"))


def test_the_crowd_is_counted():
    known = some_known(1)
    for users, words in ((0, "nobody has"), (1, "1 user in all"), (12_345, "12,345 users in all")):
        known.campaigns.users[0] = users
        assert share_of(known, "popularity")[0].startswith(words)
    known.campaigns.last_at[0] = 1_788_307_200_000
    assert share_of(known, "recency")[0] == "someone engaged with it on 2 Sep 2026"
    known.campaigns.last_at[0] = 0
    assert share_of(known, "recency")[0] == "is new"


def test_cosines_are_told_as_data():
    known = some_known(4)
    for source in ("message_similarity", "audience_similarity"):
        _, data = share_of(known, source)
        assert data["cosine"] == pytest.approx(float(known.evidence.sources[source][0, 0]), abs=1e-3)


# --- decisions


def test_a_boost_lifts_and_lowers():
    plain = answer(some_known(5))
    [last] = [one for one in plain.recommendations if one.position == 5]
    catalog = catalog_of(some_known(5).served.campaigns, **{last.campaign_id: {"boost": 10.0}})
    lifted = answer(some_known(5, catalog=catalog))

    [boosted] = [one for one in lifted.recommendations if one.campaign_id == last.campaign_id]
    assert boosted.position == 1
    assert boosted.score == pytest.approx(min(last.score * 10, 1), abs=1e-3)
    first = plain.recommendations[0].campaign_id
    lowered = answer(some_known(5, catalog=catalog_of(some_known(5).served.campaigns, **{first: {"boost": 0.1}})))
    assert lowered.recommendations[0].campaign_id != first


def test_the_order_is_that_of_the_scores_then_of_the_ids():
    for seed in range(20):
        found = answer(some_known(seed, 8), top=8).recommendations
        keys = [(-one.score, one.campaign_id) for one in found]
        assert [score for score, _ in keys] == sorted(score for score, _ in keys)
    nothing = some_known(0, 5, silent=True)
    for matrix in nothing.evidence.sources.values():
        matrix.setflags(write=True)
        matrix[:] = 0
    assert [one.campaign_id for one in answer(nothing).recommendations] == ["c0", "c1", "c2", "c3", "c4"]


def test_what_a_rule_holds_back_is_told_with_explain_only():
    campaigns = some_campaigns(np.random.default_rng(0), 5)
    campaigns.active_from[4] = NOW + DAY_MS
    catalog = catalog_of(
        campaigns,
        c0={"audience": {"exclude_users": ["ann"]}},
        c1={"frequency_cap": {"impressions": 1, "days": 7}},
        c4={"active_from": "2026-12-24", "active_until": "2027-01-01"},
    )
    known = know(ServedKnowledge(catalog, campaigns, None), np.random.default_rng(0))
    known.viewer.events[:] = [PastEvent("c1", "impression", NOW - 1), PastEvent("c2", "dismiss", NOW - DAY_MS)]

    found = answer(known, explain=True)

    assert [one.campaign_id for one in found.recommendations] == ["c3"]
    assert found.excluded is not None
    assert {one.campaign_id: one.rule for one in found.excluded} == {
        "c0": "audience",
        "c1": "frequency_cap",
        "c2": "not_again_after_dismiss",
        "c4": "window",
    }
    assert answer(known).excluded is None


AUDIENCES = st.fixed_dictionaries(
    {},
    optional={
        "include_users": st.sampled_from([["ann"], ["bob"]]),
        "exclude_users": st.just(["ann"]),
        "include_intents": st.sampled_from([["i0"], ["i1", "i2"]]),
        "exclude_intents": st.sampled_from([["i0"], ["i3"]]),
    },
)
CHANGES = st.fixed_dictionaries(
    {}, optional={"audience": AUDIENCES, "frequency_cap": st.just({"impressions": 1, "days": 7})}
)
EVENTS = st.builds(
    PastEvent,
    st.sampled_from([f"c{at}" for at in range(8)]),
    st.sampled_from(["impression", "click", "conversion", "dismiss"]),
    st.integers(NOW - 100 * DAY_MS, NOW),
)


@examples(max_examples=60)
@given(
    seed=st.integers(0, 50),
    changes=st.dictionaries(st.sampled_from([f"c{at}" for at in range(6)]), CHANGES),
    events=st.lists(EVENTS, max_size=5),
    unwanted=st.frozensets(st.sampled_from(["c0", "c3", "gone"])),
    category=st.sampled_from([None, "k0", "k1"]),
)
def test_an_answer_that_is_not_explained_keeps_the_same_rules(
    seed: int, changes: dict[str, Any], events: list[PastEvent], unwanted: frozenset[str], category: str | None
):
    catalog = catalog_of(some_campaigns(np.random.default_rng(seed), 6), **changes)
    known = some_known(seed, 6, catalog=catalog)
    known = replace(known, viewer=replace(known.viewer, events=events))
    asks = [Ask("ann", 5, category, unwanted, explain) for explain in (False, True)]

    plain, explained = decide([known, known], asks, NOW, configured(exploration_share=0.3))

    told = [
        [(one.campaign_id, one.score, one.propensity) for one in found.recommendations] for found in (plain, explained)
    ]
    assert told[0] == told[1]
    assert not {one.campaign_id for one in plain.recommendations} & {
        one.campaign_id for one in explained.excluded or () if one.rule != "max_per_category"
    }


def test_what_does_not_run_yet_moves_nothing():
    """It is ready for its day, but neither shown nor ranked among the others."""
    campaigns = some_campaigns(np.random.default_rng(7), 6)
    campaigns.active_from[3:] = NOW + DAY_MS
    running = campaigns.only(np.arange(6) < 3)
    soon, alone = (
        answer(know(ServedKnowledge(catalog_of(campaigns), one, None), np.random.default_rng(0), silent=True))
        for one in (campaigns, running)
    )

    assert soon.recommendations == alone.recommendations
    assert {one.campaign_id for one in soon.recommendations} == {"c0", "c1", "c2"}


def test_a_list_of_capped_categories_says_what_the_cap_moved_out():
    campaigns = some_campaigns(np.random.default_rng(0), 6)
    campaigns.category[:] = [0, 0, 0, 0, 1, 2]
    catalog = catalog_of(campaigns).model_copy(update={"rules": CatalogRules(max_per_category=1)})
    known = know(ServedKnowledge(catalog, campaigns, None), np.random.default_rng(0))

    found = answer(known, top=3, explain=True, exploration_share=0.5)

    assert len({one.category for one in found.recommendations}) == 3
    assert found.excluded
    assert {one.rule for one in found.excluded} == {"max_per_category"}


def test_exploring_keeps_pins_and_caps():
    campaigns = some_campaigns(np.random.default_rng(0), 8)
    campaigns.category[:] = [0, 0, 0, 0, 1, 1, 2, 2]
    pinned = catalog_of(campaigns, c7={"pinned": 3}).model_copy(update={"rules": CatalogRules(max_per_category=1)})
    served = ServedKnowledge(pinned, campaigns, None)
    explored = set()
    for at in range(300):
        known = know(served, np.random.default_rng(0))
        known = replace(known, viewer=replace(known.viewer, user_id=f"user-{at}"))
        assert answer(known, top=3, exploration_share=0.5).recommendations[2].campaign_id == "c7"
        two = answer(known, top=2, exploration_share=0.5).recommendations
        assert two[0].category != two[1].category
        explored.add((two[1].campaign_id, two[1].propensity))
    assert len(explored) > 2
    assert sum(propensity for _, propensity in explored) == pytest.approx(1, abs=1e-4)
    assert "c7" not in {campaign_id for campaign_id, _ in explored}


def test_a_tiny_propensity_is_still_one_that_an_event_may_carry():
    for at in range(200):
        known = some_known(at, 7)
        found = answer(known, top=3, exploration_share=1e-9)
        assert all(one.propensity > 0 for one in found.recommendations)


# --- which ranker


def test_the_switch_chooses_the_ranker(learned: LearnedRanker):
    taught, untaught = some_known(1, learned=learned), some_known(1)

    assert answer(taught).policy == learned.version
    assert answer(untaught).policy == "fusion"
    assert answer(taught, ranker="fusion").policy == "fusion"
    found = answer(taught, ranker="similar_users")
    assert found.policy == "similar_users"
    assert {one.source for each in found.recommendations for one in each.reasons} <= {"similar_users", "popularity"}


def test_an_experiment_gives_its_share_of_users_its_ranker(learned: LearnedRanker):
    known = some_known(1, 2, learned=learned)
    test = {"experiment_name": "autumn", "experiment_ranker": "similar_users", "experiment_share": 0.3}

    def policies(**changes: Any) -> list[str]:
        return [
            answer(replace(known, viewer=replace(known.viewer, user_id=f"user-{at}")), **changes).policy
            for at in range(150)
        ]

    drawn = policies(**test)
    assert set(drawn) == {"similar_users", learned.version}
    assert drawn.count("similar_users") == pytest.approx(45, abs=25)
    assert policies(**test) == drawn
    assert policies(**test | {"experiment_name": "winter"}) != drawn
    assert set(policies(**test | {"experiment_ranker": ""})) == {learned.version}
    assert set(policies(**test | {"experiment_name": ""})) == {learned.version}
    assert set(policies(**test | {"ranker": "fusion", "experiment_ranker": "auto"})) == {"fusion", learned.version}
