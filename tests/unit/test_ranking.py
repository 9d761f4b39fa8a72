"""Rankers: what they make of the sources' scores, and how each score is split into what the sources gave."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from knowledge_data import DAY_MS, NOW, some_campaigns, some_history, some_users
from personalization.learning.training import fit_ranker, past_examples
from personalization.recommend import ranking
from personalization.recommend.ranking import (
    DEFAULT_FUSION,
    FUSION_DEPTH,
    FUSIONS,
    NAMED_RANKERS,
    Evidence,
    LearnedRanker,
    RankFusion,
    SimilarUsers,
    all_features,
    feature_matrix,
    monotone,
    source_of,
)
from personalization.recommend.sources import LIFTED, SOURCES

worlds = given(seed=st.integers(0, 2**32), users=st.integers(0, 4), candidates=st.integers(0, 7))


@pytest.fixture(scope="module")
def learned() -> LearnedRanker:
    """Fitted to a small history, in which a user's taste tells what they engage with."""
    history = some_history(np.random.default_rng(3), users=80, campaigns=12, messages=1500, events=2500)
    ranker = fit_ranker(past_examples(history, NOW, 7 * DAY_MS, "any"))
    assert ranker is not None
    return ranker


def evidence(seed: int, users: int = 3, candidates: int = 6) -> Evidence:
    rng = np.random.default_rng(seed)
    campaigns = some_campaigns(rng, candidates)
    return Evidence.of(campaigns, some_users(rng, users, campaigns))


def scores(*rows: list[float], source: Any = "own_intents") -> Evidence:
    """Evidence in which one source speaks."""
    matrix = np.asarray(rows, dtype=np.float32)
    return Evidence({one: matrix if one == source else np.zeros_like(matrix) for one in SOURCES}, {})


def check(ranker: Any, known: Evidence) -> None:
    """What holds for every ranker and all evidence."""
    shape = known.sources["popularity"].shape
    score = ranker.score(known)
    names, shares = ranker.shares(known)

    assert score.shape == shape
    assert shares.shape == (*shape, len(names))
    assert len(set(names)) == len(names)
    assert set(names) <= set(SOURCES)
    assert np.isfinite(score).all()
    assert ((score >= 0) & (score <= 1 + 1e-6)).all()
    assert (shares >= 0).all()
    np.testing.assert_allclose(shares.sum(axis=2), score, atol=1e-6)
    some = np.arange(shape[1])[::-2]
    names_of_some, shares_of_some = ranker.shares(known, np.broadcast_to(some, (shape[0], len(some))))
    assert names_of_some == names
    np.testing.assert_allclose(shares_of_some, shares[:, some], atol=1e-7)


# --- ranks


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([3, 1, 2], [1, 0, 0.5]),
        ([0, 0, 0], [0.5, 0.5, 0.5]),
        ([5, 5, 1], [0.75, 0.75, 0]),
        ([-1, 0, 0, 9], [0, 0.5, 0.5, 1]),
        ([7], [0]),
        ([], []),
    ],
)
def test_a_rank_is_the_share_of_candidates_one_is_ahead_of(row: list[float], expected: list[float]):
    np.testing.assert_allclose(scores(row).ranks["own_intents"], [expected])


@worlds
def test_ranks_lie_between_nothing_and_one_and_follow_the_scores(seed: int, users: int, candidates: int):
    known = evidence(seed, users, candidates)

    for source, ranks in known.ranks.items():
        assert ranks.shape == (users, candidates)
        assert ((ranks >= 0) & (ranks <= 1)).all()
        for row, ranked in zip(known.sources[source], ranks, strict=True):
            higher = row[:, None] > row[None, :]
            assert (ranked[:, None] > ranked[None, :])[higher].all()
            if candidates > 1:
                assert ranked.mean() == pytest.approx(0.5)


def test_ranks_of_what_is_alike_for_all_users_are_those_of_one_user():
    """Popularity and recency are broadcast; their ranks are taken once."""
    known = evidence(1, users=3)

    assert known.sources["popularity"].strides[0] == 0
    one_by_one = replace(known, sources={one: np.array(rows) for one, rows in known.sources.items()})
    for source in SOURCES:
        np.testing.assert_array_equal(known.ranks[source], one_by_one.ranks[source])


# --- rank fusion


@pytest.mark.parametrize("places", [[0], [1, 2], [0, 1, 2, 3], [3, 1], [2, 2]])
def test_some_users_of_a_batch_have_their_own_rows(places: list[int]):
    known = evidence(5, users=4)

    rows = known.rows(places)

    for name, matrix in known.sources.items():
        assert np.array_equal(rows.sources[name], matrix[places]), name
        assert np.allclose(rows.ranks[name], known.ranks[name][places]), name
    for name, matrix in known.context.items():
        assert np.array_equal(rows.context[name], matrix[places]), name


@pytest.mark.parametrize("ranker", [*FUSIONS, "learned"], ids=lambda one: getattr(one, "version", one))
def test_the_shares_of_some_columns_are_those_of_all(ranker: Any, learned: LearnedRanker):
    ranker = learned if ranker == "learned" else ranker
    known, columns = evidence(6), np.asarray([[0, 3], [5, 2], [1, 1]])

    names, whole = ranker.shares(known)
    same, some = ranker.shares(known, columns)

    assert names == same
    assert np.allclose(some, np.take_along_axis(whole, columns[:, :, None], axis=1))


def test_a_vote_halves_at_the_depth_of_fusion():
    row = list(np.arange(100, 100 - FUSION_DEPTH - 1, -1.0))
    _, shares = RankFusion({"own_intents": 3.0}).shares(scores(row))

    assert shares[0, 0, 0] == pytest.approx(1)
    assert shares[0, FUSION_DEPTH, 0] == pytest.approx(0.5)
    assert shares[0, 3, 0] == pytest.approx(FUSION_DEPTH / (FUSION_DEPTH + 3))


@pytest.mark.parametrize(
    "row", [[0, 0, 0], [0.4, 0.4, 0.4], [-1, -2, -3], [-1, -1, -1], [0.0]], ids=lambda row: f"{row}"
)
def test_a_source_that_says_nothing_or_the_same_of_all_has_no_vote(row: list[float]):
    assert not RankFusion({"own_intents": 1.0}).score(scores(row)).any()


def test_an_only_candidate_has_every_vote_of_what_speaks_for_it():
    assert RankFusion({"own_intents": 1.0}).score(scores([0.7])).tolist() == [[1.0]]


def test_a_candidate_a_source_says_nothing_of_gets_nothing_from_it():
    [row] = RankFusion({"own_intents": 1.0}).score(scores([0, 2, 0, 1, -0.5]))

    assert row[1] > row[3] > 0
    assert not row[[0, 2, 4]].any()


def test_ties_share_a_place():
    [row] = RankFusion({"own_intents": 1.0}).score(scores([2, 2, 1]))

    assert row[0] == row[1] == pytest.approx(FUSION_DEPTH / (FUSION_DEPTH + 0.5))


def test_weights_are_relative_and_decide():
    both = scores([1, 2])
    both.sources["recency"] = np.asarray([[2, 1]], dtype=np.float32)
    known = Evidence(both.sources, {})

    likes = RankFusion({"own_intents": 2.0, "recency": 1.0}).score(known)[0]
    news = RankFusion({"own_intents": 1.0, "recency": 2.0}).score(known)[0]

    assert likes[1] > likes[0]
    assert news[0] > news[1]
    np.testing.assert_allclose(RankFusion({"own_intents": 20.0, "recency": 10.0}).score(known)[0], likes, atol=1e-7)


def test_the_default_hears_every_source_and_may_reach_one():
    assert set(DEFAULT_FUSION.weights) == set(SOURCES)
    row = np.asarray([[1, 2, 3]], dtype=np.float32)
    assert DEFAULT_FUSION.score(Evidence(dict.fromkeys(SOURCES, row), {}))[0, 2] == pytest.approx(1)


@worlds
def test_fusion_adds_up_whatever_the_evidence(seed: int, users: int, candidates: int):
    known = evidence(seed, users, candidates)
    drawn = np.random.default_rng(seed).exponential(1, len(SOURCES))

    for ranker in NAMED_RANKERS.values():
        check(ranker, known)
    check(RankFusion(dict(zip(SOURCES, drawn, strict=True))), known)


@worlds
def test_more_of_a_source_never_lowers_a_fused_score(seed: int, users: int, candidates: int):
    known = evidence(seed, max(users, 1), max(candidates, 2))
    before = DEFAULT_FUSION.score(known)
    for source in SOURCES:
        after = DEFAULT_FUSION.score(raised(known, source))
        assert after[0, 0] >= before[0, 0] - 1e-6


def raised(known: Evidence, source: Any) -> Evidence:
    """The same, with more of the source for the first candidate of the first user, and of its lift."""
    sources = {one: np.array(rows) for one, rows in known.sources.items()}
    context = {one: np.array(rows) for one, rows in known.context.items()}
    sources[source][0, 0] += 1 + abs(sources[source]).max()
    if source in LIFTED:
        context[f"{source}_lift"][0, 0] += 1
    return Evidence(sources, context)


# --- the learned ranker


def test_a_fitted_ranker_puts_a_user_s_taste_first(learned: LearnedRanker):
    history = some_history(np.random.default_rng(4), users=80, campaigns=12, messages=1500, events=2500)
    [example, *_] = past_examples(history, NOW, 7 * DAY_MS, "any")
    score = learned.score(example.evidence)

    assert score[example.truth].mean() > 1.5 * score[~example.truth].mean()


@settings(max_examples=40)
@worlds
def test_the_learned_ranker_adds_up_whatever_the_evidence(
    learned: LearnedRanker, seed: int, users: int, candidates: int
):
    check(learned, evidence(seed, users, candidates))


@settings(max_examples=40)
@worlds
def test_more_of_a_source_never_lowers_a_learned_score(learned: LearnedRanker, seed: int, users: int, candidates: int):
    known = evidence(seed, max(users, 1), max(candidates, 2))
    before = learned.score(known)
    for source in SOURCES:
        assert learned.score(raised(known, source))[0, 0] >= before[0, 0] - 1e-6


def test_only_scores_ranks_and_lifts_are_bound_to_rise():
    features = all_features()

    rising = {feature for feature, bound in zip(features, monotone(features), strict=True) if bound}
    assert rising == {
        *(f"{kind}:{source}" for source in SOURCES for kind in ("score", "rank")),
        *(f"context:{source}_lift" for source in LIFTED),
    }
    assert set(monotone(features)) == {0, 1}


def test_every_feature_belongs_to_a_source_and_goes_with_it():
    known = evidence(0)

    assert {source_of(one) for one in all_features()} == set(SOURCES)
    assert {f"context:{name}" for name in known.context} == {one for one in all_features() if one[:4] == "cont"}
    for source in SOURCES:
        left = all_features([source])
        assert left
        assert source not in {source_of(one) for one in left}
    assert feature_matrix(known, all_features()).shape == (3, 6, len(all_features()))


def test_the_learned_ranker_comes_back_from_json_as_it_was(learned: LearnedRanker):
    text = learned.to_json()
    back = LearnedRanker.from_json(text)

    assert set(json.loads(text)) == {"model", "features", "version"}
    assert (back.version, back.features) == (learned.version, learned.features)
    assert back.version.startswith("learned-")
    known = evidence(2)
    np.testing.assert_array_equal(back.score(known), learned.score(known))
    np.testing.assert_array_equal(back.shares(known)[1], learned.shares(known)[1])


def test_the_same_history_gives_the_same_ranker(learned: LearnedRanker):
    history = some_history(np.random.default_rng(3), users=80, campaigns=12, messages=1500, events=2500)

    again = fit_ranker(past_examples(history, NOW, 7 * DAY_MS, "any"))

    assert again is not None
    assert again.version == learned.version


def test_nothing_is_pickled():
    assert not {"pickle", "joblib", "marshal"} & set(vars(ranking))


# --- the seed recipe


def test_the_recipe_counts_similar_users_and_lets_popularity_break_ties():
    known = Evidence(
        {},
        {
            "neighbours": np.asarray([[0, 3, 3, 1]], dtype=np.float32),
            "engaged_users": np.log1p(np.asarray([[900, 2, 5, 10_000]], dtype=np.float32)),
        },
    )
    [row] = SimilarUsers().score(known)

    assert list(np.argsort(-row)) == [2, 1, 3, 0]
    names, shares = SimilarUsers().shares(known)
    assert names == ["similar_users", "popularity"]
    assert (shares[0, :, 1] < 1 / 4).all()  # popularity weighs less than one similar user


@worlds
def test_the_recipe_adds_up_whatever_the_evidence(seed: int, users: int, candidates: int):
    known = evidence(seed, users, candidates)

    check(NAMED_RANKERS["similar_users"], known)
    order = SimilarUsers().score(known)
    counts = known.context["neighbours"]
    for user in range(users):
        more = counts[user][:, None] > counts[user][None, :]
        assert (order[user][:, None] > order[user][None, :])[more].all()


def test_rankers_are_told_apart_by_their_versions(learned: LearnedRanker):
    assert {"fusion", "similar_users"} <= set(NAMED_RANKERS)
    assert all(one.version == name for name, one in NAMED_RANKERS.items())
    assert learned.version not in NAMED_RANKERS
