"""The evaluation of what the stores hold, kept for the dashboard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from personalization.errors import TooLittleFeedbackError
from personalization.evaluation.policies import STANDARD, check_policies
from personalization.evaluation.replay import MIN_ANSWERS, REFERENCE, Plan, Replay, summarise
from personalization.learning.loading import load_history
from personalization.learning.training import Task
from personalization.pipeline.embed import campaign_vectors_of, embed_campaigns
from personalization.pipeline.lineage import StageReport
from personalization.schemas import DAY_MS, Catalog, VectorSpace, parse_moment
from personalization.settings import Settings
from personalization.staging import Staging, read
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.milvus import VectorStore

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Request:
    """What to evaluate."""

    task: Task = "any"
    split_days: int = 7
    """From each split to the next, and how far behind it engagement counts."""
    weeks: int = 4
    """How long before the last click or conversion the first split lies."""
    policies: Sequence[str] = STANDARD


def evaluate_stores(
    report: StageReport,
    request: Request,
    *,
    catalog: Catalog,
    space: VectorSpace,
    analytics: AnalyticsStore,
    vectors: VectorStore,
    staging: Staging,
    settings: Settings,
) -> dict[str, Any]:
    """Replay the stores' history, keep the figures under the run's id, and return all of them.

    Two small queries where there is too little feedback. Else what `load_history` costs, and a snapshot and rankers
    for each split and the moments that are learned from.

    Raises:
        TooLittleFeedbackError: there are too few clicks and conversions to tell one policy from another.
        InputError: a policy is not known.
    """
    policies = check_policies(request.policies)
    analytics.ensure_schema()
    plan = plan_of(analytics, request)
    vectors.ensure_schema(space)
    staged = embed_campaigns(report, catalog=catalog, space=space, staging=staging)
    history = load_history(
        analytics=analytics,
        vectors=vectors,
        space=space,
        catalog=catalog,
        campaign_vectors=campaign_vectors_of(read(staged), catalog),
        settings=settings,
    )
    replay = Replay(history, plan)
    outcomes = replay.run(policies, lambda done: log.info(f"{done} of {len(plan.splits)} splits replayed"))
    figures = summarise(replay, plan, outcomes)
    if figures["answers"] < MIN_ANSWERS:
        raise TooLittleFeedbackError(
            f"{figures['answers']} users engaged with a campaign that they could be shown, which takes {MIN_ANSWERS}; "
            f"set more weeks, or check the windows of the catalog's campaigns"
        )
    analytics.record_evaluation(result_rows(report.run_id, figures))
    report.rows_in, report.rows_out = len(history.signals.at), figures["answers"]
    return figures


def plan_of(analytics: AnalyticsStore, request: Request) -> Plan:
    """The splits, back from the last click or conversion. Two small queries.

    Raises:
        TooLittleFeedbackError: there are too few clicks and conversions to tell one policy from another.
    """
    last = analytics.last_feedback_at()
    if last is None:
        raise TooLittleFeedbackError(
            "there is no click and no conversion to measure by; send events to the pipeline or the API"
        )
    until = (last // DAY_MS + 1) * DAY_MS
    first = until - request.weeks * 7 * DAY_MS
    found = analytics.count_feedback(first)
    if found < MIN_ANSWERS:
        raise TooLittleFeedbackError(
            f"{found} clicks and conversions in {request.weeks} weeks are too few to tell policies apart, which takes "
            f"{MIN_ANSWERS}; set more weeks, or wait for more"
        )
    step = request.split_days * DAY_MS
    return Plan(first, step, step, until, request.task)


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
