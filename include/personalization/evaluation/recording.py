"""The evaluation of what the stores hold, kept for the dashboard."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import structlog

from personalization.errors import TooLittleFeedbackError
from personalization.evaluation.policies import STANDARD, check_policies
from personalization.evaluation.replay import REFERENCE, Plan, Replay, summarise
from personalization.learning.loading import load_history
from personalization.learning.training import Task
from personalization.recommend.sources import Matrix
from personalization.schemas import DAY_MS, Catalog, parse_moment
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import VectorSpace, VectorStore

MIN_ANSWERS = 20
"""Fewest answers to tell policies by."""

log = structlog.get_logger(__name__)


def plan_last_weeks(analytics: AnalyticsStore, task: Task, split_days: int, weeks: int) -> Plan:
    """Splits every `split_days` over the last `weeks` with feedback, each with the horizon to the next.

    Two queries, nothing else is read.

    Raises:
        TooLittleFeedbackError: there are too few clicks and conversions in these weeks.
    """
    last = analytics.last_feedback_at()
    if last is None:
        raise TooLittleFeedbackError(
            "there is no click and no conversion to measure by; send events to the pipeline or to POST /events"
        )
    until = (last // DAY_MS + 1) * DAY_MS
    first = until - weeks * 7 * DAY_MS
    found = analytics.count_feedback(first)
    if found < MIN_ANSWERS:
        raise TooLittleFeedbackError(
            f"{found} clicks and conversions in the last {weeks} weeks are too few to tell policies apart, which "
            f"takes {MIN_ANSWERS}; set more weeks, or wait for more"
        )
    return Plan(first, split_days * DAY_MS, split_days * DAY_MS, until, task)


def evaluate_stores(
    evaluation_id: str,
    plan: Plan,
    policies: Sequence[str] | None,
    *,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    space: VectorSpace,
    catalog: Catalog,
    campaign_vectors: Matrix,
    settings: Settings,
) -> dict[str, Any]:
    """Replay the stores' history by the plan, keep the figures under the id, and return the report.

    Costs what `load_history` does, and at each split and at the twelve moments before it a snapshot and rankers.

    Raises:
        TooLittleFeedbackError: too few users engaged with what they could be shown.
        InputError: a policy is not known.
    """
    chosen = check_policies(policies or STANDARD)
    history = load_history(
        analytics=analytics,
        vectors=vectors,
        space=space,
        catalog=catalog,
        campaign_vectors=campaign_vectors,
        settings=settings,
    )
    replay = Replay(history, plan)
    outcomes = replay.run(chosen, lambda done: log.info(f"{done} of {len(plan.splits)} splits replayed"))
    report = summarise(replay, plan, outcomes)
    if report["answers"] < MIN_ANSWERS:
        raise TooLittleFeedbackError(
            f"{report['answers']} users engaged with a campaign that they could be shown, which takes {MIN_ANSWERS}; "
            f"set more weeks, or check the windows of the catalog's campaigns"
        )
    analytics.record_evaluation(result_rows(evaluation_id, report))
    return report


def result_rows(evaluation_id: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The report as rows of `evaluations`."""
    common = {
        "evaluation_id": evaluation_id,
        "task": report["task"],
        "split_at": parse_moment(report["splits"][0]),
        "splits": len(report["splits"]),
        "users": report["users"],
        "horizon_days": report["horizon_days"],
        "created_at": datetime.now(UTC),
    }
    return [
        {**common, "policy": policy, **row}
        for policy, entry in report["policies"].items()
        for row in _rows(entry, report["differences"].get(f"{REFERENCE} - {policy}", {}), report["answers"])
    ]


def _rows(entry: dict[str, Any], differences: dict[str, dict[str, float]], answers: int) -> Iterator[dict[str, Any]]:
    for metric, value in entry.items():
        if metric == "segments":
            for segment, of_segment in value.items():
                yield _row("ndcg@10", segment, of_segment["ndcg@10"], of_segment["answers"], {})
        elif metric == "calibration":
            for name, figure in value.items():
                yield _row(name, "all", {"mean": figure}, answers, {})
        else:
            shown = value if isinstance(value, dict) else {"mean": value}
            yield _row(metric, "all", shown, answers, differences.get(metric, {}))


def _row(
    metric: str, segment: str, shown: dict[str, float], answers: int, difference: dict[str, float]
) -> dict[str, Any]:
    return {
        "metric": metric,
        "segment": segment,
        "answers": answers,
        **{name: shown.get(name) for name in ("mean", "low", "high")},
        **{f"diff_{name}": difference.get(name) for name in ("mean", "low", "high")},
    }
