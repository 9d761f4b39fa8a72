"""Metrics of ranked lists agree with trec_eval's, and intervals hold what they promise."""

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, Success, nDCG
from personalization.learning.metrics import (
    METRICS,
    calibration_error,
    interval,
    novelty,
    top_places,
    user_metrics,
)

MEASURES = {
    "ndcg@10": nDCG @ 10,
    "recall@5": R @ 5,
    "recall@10": R @ 10,
    "mrr": RR,
    "hit_rate@10": Success @ 10,
}


def by_trec_eval(scores: np.ndarray, allowed: np.ndarray, truth: np.ndarray) -> dict[str, list[float]]:
    users, campaigns = scores.shape
    run = [
        ir_measures.ScoredDoc(f"u{user}", f"c{at}", float(scores[user, at]))
        for user in range(users)
        for at in range(campaigns)
        if allowed[user, at]
    ]
    judged = [
        ir_measures.Qrel(f"u{user}", f"c{at}", int(truth[user, at]))
        for user in range(users)
        for at in range(campaigns)
        if allowed[user, at]
    ]
    found = {
        (str(one.measure), one.query_id): one.value for one in ir_measures.iter_calc(MEASURES.values(), judged, run)
    }
    return {name: [found[str(measure), f"u{user}"] for user in range(users)] for name, measure in MEASURES.items()}


@pytest.mark.parametrize("campaigns", [3, 8, 10, 40])
@pytest.mark.parametrize("seed", range(3))
def test_every_metric_is_trec_eval_s(campaigns: int, seed: int):
    rng = np.random.default_rng(seed)
    # No ties: trec_eval breaks them by name.
    scores = rng.permuted(np.tile(np.arange(campaigns, dtype=np.float32), (60, 1)), axis=1)
    allowed = rng.random(scores.shape) < 0.8
    truth = (rng.random(scores.shape) < 0.15) & allowed
    known = truth.any(axis=1)
    scores, allowed, truth = scores[known], allowed[known], truth[known]
    assert len(scores)

    found = user_metrics(scores, allowed, truth)

    assert set(found) == set(METRICS) == set(MEASURES)
    for name, expected in by_trec_eval(scores, allowed, truth).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)


def test_what_is_not_allowed_is_never_in_front():
    places = top_places(np.asarray([[5.0, 4.0, 3.0]]), np.asarray([[False, True, True]]))

    assert places.tolist() == [[1, 2, 0]]


def test_the_popular_is_no_news_and_the_unknown_is():
    shown = np.asarray([[0, 1], [2, 2]])

    assert novelty(shown, np.asarray([1.0, 0.5, 0.25])).tolist() == [0.5, 2.0]


def test_a_calibrated_forecast_has_no_error_and_a_biased_one_has_its_bias():
    rng = np.random.default_rng(0)
    probabilities = rng.random(50_000) * 0.5
    outcomes = (rng.random(50_000) < probabilities).astype(float)

    assert calibration_error(probabilities, outcomes) < 0.01
    assert calibration_error(probabilities + 0.2, outcomes) == pytest.approx(0.2, abs=0.01)


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    """Users differ, and each one's values hang together: only whole users may be drawn."""
    rng = np.random.default_rng(1)
    owners = np.repeat(np.arange(120), 3)
    held = 0
    for _ in range(200):
        values = (rng.normal(0.3, 0.2, size=120)[owners] + rng.normal(0, 0.05, size=360)).astype(np.float32)
        one = interval(values, owners, draws=300)
        assert one.low <= one.mean <= one.high
        held += one.low <= 0.3 <= one.high

    assert 0.90 <= held / 200 <= 0.99


def test_an_interval_is_narrow_only_for_as_many_users_as_there_are():
    rng = np.random.default_rng(2)
    values = rng.random(50).astype(np.float32)
    repeated = np.repeat(values, 10)

    alone = interval(values, np.arange(50))
    many = interval(repeated, np.repeat(np.arange(50), 10))
    as_if_independent = interval(repeated, np.arange(500))

    assert many == pytest.approx(alone)
    assert as_if_independent.high - as_if_independent.low < 0.5 * (many.high - many.low)


def test_the_same_values_have_the_same_interval():
    values = np.random.default_rng(3).random(40).astype(np.float32)

    assert interval(values, np.arange(40)) == interval(values, np.arange(40))
