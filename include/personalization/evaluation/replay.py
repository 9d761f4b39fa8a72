"""Replay: at each split, what would each policy have shown, and what did the users then engage with?

A strict split in time: a policy sees what lies before the split and nothing else; a ranker learns from
moments whose whole horizon lies before it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import structlog

from personalization.evaluation.policies import ABLATIONS, BASELINES, FUSED, TRAINED, Moment, Trained
from personalization.learning.history import History
from personalization.learning.metrics import (
    METRICS,
    calibration_error,
    interval,
    novelty,
    top_places,
    user_metrics,
)
from personalization.learning.training import Example, Task, choose_ranker, fit_ranker, past_moments, take_examples
from personalization.recommend.ranking import LearnedRanker, Ranker, all_features
from personalization.recommend.sources import Matrix, Vector, Whole
from personalization.resampling import Interval
from personalization.schemas import DAY_MS

REFERENCE = "shipped"
MIN_ANSWERS = 20
"""Fewest answers to tell policies by."""
_COLD_MESSAGES = 1
_CALIBRATION_PAIRS = 100_000  # of each part of a split, drawn at random

Flags = np.ndarray[Any, np.dtype[np.bool_]]

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """When to split, and what counts."""

    split_at: int
    """Epoch milliseconds of the first split."""
    every_ms: int
    horizon_ms: int
    until: int
    """No horizon ends behind it."""
    task: Task = "new"

    @property
    def splits(self) -> list[int]:
        """The first split, and every later one whose horizon ends by `until`."""
        last = max(self.until - self.horizon_ms, self.split_at)
        return list(range(self.split_at, last + 1, self.every_ms))


@dataclass
class Outcome:
    """What a policy achieved, a row for each user and split."""

    owners: list[Whole] = field(default_factory=list)
    cold: list[Flags] = field(default_factory=list)
    values: dict[str, list[Vector]] = field(default_factory=lambda: {name: [] for name in (*METRICS, "novelty@10")})
    shown: set[tuple[int, int]] = field(default_factory=set)
    probabilities: list[Vector] = field(default_factory=list)
    outcomes: list[Vector] = field(default_factory=list)

    def column(self, metric: str) -> Vector:
        """Of all splits, in order."""
        return np.concatenate(self.values[metric])


class Replay:
    """Runs policies over the splits of a plan. Evidence is drawn once a moment, whatever the policies."""

    def __init__(self, history: History, plan: Plan) -> None:
        self._history = history
        self._plan = plan
        self._examples: dict[tuple[int, int], Example | None] = {}
        self._fitted: dict[tuple[int, str], Ranker] = {}
        self.candidates: dict[int, int] = {}
        """Campaigns that could be shown at each split."""
        self.rankers: dict[int, str] = {}
        """Version of the ranker that the shipped policy used at each split."""

    def run(self, policies: Sequence[str], progress: Callable[[int], object]) -> dict[str, Outcome]:
        """Outcome of each policy over all splits."""
        outcomes = {name: Outcome() for name in policies}
        for done, split in enumerate(self._plan.splits, start=1):
            past = self._past(split)
            for example in self._examples_of(split):
                self._run_example(example, past, outcomes)
            progress(done)
        return outcomes

    def _run_example(self, example: Example, past: list[Example], outcomes: dict[str, Outcome]) -> None:
        moment = Moment(example, self._history.before(example.moment))
        total = max(len(self._history.user_ids), 1)
        popularity = np.expm1(example.evidence.context["engaged_users"][0]) / total
        is_cold = np.expm1(example.evidence.context["user_messages"][:, 0]) <= _COLD_MESSAGES
        is_cold &= example.evidence.context["user_engagement"][:, 0] == 0
        scored: dict[int, Matrix] = {}
        for name, outcome in outcomes.items():
            ranker = self._ranker(name, past, example.moment)
            if ranker is None:
                scores = BASELINES[name](moment)
            elif id(ranker) in scored:  # such as the shipped one, when it is the learned one
                scores = scored[id(ranker)]
            else:
                scores = scored[id(ranker)] = ranker.score(example.evidence)
            _keep(outcome, example, scores, popularity, is_cold)
            if isinstance(ranker, LearnedRanker):
                pairs = np.flatnonzero(example.allowed)
                drawn = np.random.default_rng(0).permutation(pairs)[:_CALIBRATION_PAIRS]
                outcome.probabilities.append(scores.ravel()[drawn])
                outcome.outcomes.append(example.truth.ravel()[drawn].astype(np.float32))

    def _ranker(self, name: str, past: list[Example], moment: int) -> Ranker | None:
        if name in FUSED:
            return FUSED[name]
        trained = TRAINED.get(name) or ABLATIONS.get(name)
        if trained is None:
            return None
        if (moment, name) not in self._fitted:
            self._fitted[moment, name] = self._fit(trained, past, moment)
        return self._fitted[moment, name]

    def _fit(self, trained: Trained, past: list[Example], moment: int) -> Ranker:
        if trained.gated:
            chosen = choose_ranker(past).ranker
            self.rankers[moment] = chosen.version
            return chosen
        if not trained.without and isinstance(known := self._fitted.get((moment, REFERENCE)), LearnedRanker):
            return known  # fitted to the same examples
        return fit_ranker(past, all_features(trained.without)) or FUSED["fusion"]

    def _past(self, split: int) -> list[Example]:
        """Examples whose horizon ends by the split, oldest first. Those that no later split needs are forgotten."""
        moments, horizon_ms = past_moments(self._history, split, self._plan.horizon_ms)
        self._examples = {key: one for key, one in self._examples.items() if key[0] >= min(moments, default=split)}
        for moment in moments:
            if (moment, horizon_ms) not in self._examples:
                drawn = next(take_examples(self._history, moment, horizon_ms, self._plan.task), None)
                self._examples[moment, horizon_ms] = drawn
        found = (self._examples[moment, horizon_ms] for moment in moments)
        return [one for one in found if one is not None]

    def _examples_of(self, split: int) -> Iterator[Example]:
        """All who engage behind the split; the first part is kept to be learned from later."""
        key = (split, self._plan.horizon_ms)
        for place, example in enumerate(take_examples(self._history, *key, self._plan.task)):
            if place == 0:
                self._examples[key] = example
                self.candidates[split] = len(example.columns)
            yield example


def _keep(outcome: Outcome, example: Example, scores: Matrix, popularity: Vector, is_cold: Flags) -> None:
    outcome.owners.append(example.users)
    outcome.cold.append(is_cold)
    for metric, values in user_metrics(scores, example.allowed, example.truth).items():
        outcome.values[metric].append(values)
    top = top_places(scores, example.allowed)[:, :10]
    outcome.values["novelty@10"].append(novelty(top, popularity))
    outcome.shown |= {(example.moment, int(column)) for column in np.unique(example.columns[top])}


def summarise(replay: Replay, plan: Plan, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Every metric of every policy with its interval, and the paired differences from the shipped one.

    Raises nothing where no user engaged: then there is nothing to report, and `users` is 0.
    """
    first = next(iter(outcomes.values()))
    answers = sum(len(part) for part in first.owners)
    report: dict[str, Any] = {
        "task": plan.task,
        "splits": [_iso(split) for split in plan.splits],
        "horizon_days": plan.horizon_ms / DAY_MS,
        "answers": answers,
        "users": len(np.unique(np.concatenate(first.owners))) if answers else 0,
        "policies": {},
        "differences": {},
        "segment_differences": {},
    }
    if not answers:
        return report
    candidates = sum(replay.candidates.values())
    owners = np.concatenate(first.owners)
    cold = np.concatenate(first.cold)
    segments = [(segment, chosen) for segment, chosen in (("cold", cold), ("warm", ~cold)) if chosen.any()]
    report["candidates_per_split"] = candidates / len(replay.candidates)
    for name, outcome in outcomes.items():
        entry: dict[str, Any] = {metric: _shown(interval(outcome.column(metric), owners)) for metric in outcome.values}
        entry["coverage@10"] = round(len(outcome.shown) / max(candidates, 1), 4)
        entry["segments"] = {
            segment: {
                "answers": int(chosen.sum()),
                "ndcg@10": _shown(interval(outcome.column("ndcg@10")[chosen], owners[chosen])),
            }
            for segment, chosen in segments
        }
        if outcome.probabilities:
            probabilities, truths = np.concatenate(outcome.probabilities), np.concatenate(outcome.outcomes)
            entry["calibration"] = {
                "expected_calibration_error": round(calibration_error(probabilities, truths), 5),
                "brier": round(float(np.mean((probabilities - truths) ** 2)), 5),
                "mean_probability": round(float(probabilities.mean()), 5),
                "engaged": round(float(truths.mean()), 5),
            }
        report["policies"][name] = entry
    if REFERENCE in outcomes:
        best = outcomes[REFERENCE]
        for name, outcome in outcomes.items():
            if name != REFERENCE:
                report["differences"][f"{REFERENCE} - {name}"] = {
                    metric: _shown(interval(best.column(metric) - outcome.column(metric), owners)) for metric in METRICS
                }
                ahead = best.column("ndcg@10") - outcome.column("ndcg@10")
                report["segment_differences"][f"{REFERENCE} - {name}"] = {
                    segment: {"ndcg@10": _shown(interval(ahead[chosen], owners[chosen]))}
                    for segment, chosen in segments
                }
    if replay.rankers:
        report["rankers"] = {_iso(split): version for split, version in replay.rankers.items()}
    return report


def _shown(one: Interval) -> dict[str, float]:
    return {name: round(value, 5) for name, value in one._asdict().items()}


def _iso(moment: int) -> str:
    return datetime.fromtimestamp(moment / 1000, UTC).isoformat().replace("+00:00", "Z")
