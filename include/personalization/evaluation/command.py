"""The command `evaluate`: from files and words to a report."""

import re
from pathlib import Path
from typing import Any, get_args

import structlog
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from upath import UPath

from personalization.catalog.loading import load_catalog
from personalization.errors import InputError
from personalization.evaluation.dataset import Refused, build_history, load_events, load_messages
from personalization.evaluation.policies import STANDARD, check_policies
from personalization.evaluation.replay import REFERENCE, Plan, Replay, summarise
from personalization.learning.history import History
from personalization.learning.training import Task
from personalization.schemas import DAY_MS, parse_moment
from personalization.settings import get_settings

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(m|h|d|w)")
_UNITS_MS = {"m": 60_000, "h": DAY_MS // 24, "d": DAY_MS, "w": 7 * DAY_MS}

log = structlog.get_logger(__name__)


def evaluate_files(
    *,
    messages: Path,
    events: Path,
    catalog: Path,
    split_at: str,
    every: str | None,
    horizon: str | None,
    until: str | None,
    task: str,
    policies: list[str] | None,
) -> dict[str, Any]:
    """Load, replay and summarise; the report is what `--json` prints.

    Raises:
        InputError: a file, moment, duration, task or policy that cannot be used; says what to write instead.
        CatalogError: the catalog does not hold together.
    """
    chosen = check_policies(policies or STANDARD)
    if task not in get_args(Task):
        raise InputError(f"--task {task}: must be one of {', '.join(get_args(Task))}")
    refused = Refused()
    loaded = load_catalog(catalog)
    history = build_history(
        load_messages(UPath(messages), refused), load_events(UPath(events), refused), loaded, get_settings()
    )
    plan = _plan(history, split_at, every, horizon, until, task)  # type: ignore[arg-type]
    replay = Replay(history, plan)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("splits", total=len(plan.splits))
        outcomes = replay.run(chosen, lambda done: progress.update(bar, completed=done))
    report = summarise(replay, plan, outcomes)
    report["refused"] = {"rows": refused.count, "first": refused.first}
    if refused.count:
        log.warning(f"{refused.count:,} rows were refused; first: {'; '.join(refused.first)}")
    if not report["answers"]:
        raise InputError(
            f"no user engages with a running campaign between {report['splits'][0]} and the end of the horizon; "
            f"move --split-at, or check the campaigns' windows"
        )
    return report


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as tables."""
    splits = f"{len(report['splits'])} splits from {report['splits'][0]}, horizon {report['horizon_days']:g} days"
    title = f"{report['users']:,} users, {report['answers']:,} answers, {splits}, task `{report['task']}`"
    table = Table(title=title, box=None)
    table.add_column("policy")
    names = ("ndcg@10", "recall@5", "recall@10", "mrr", "hit_rate@10", "novelty@10")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("coverage@10", justify="right")
    for policy, entry in sorted(report["policies"].items(), key=lambda one: -one[1]["ndcg@10"]["mean"]):
        cells = [_cell(entry[name]) for name in names]
        table.add_row(policy, *cells, f"{entry['coverage@10']:.3f}")
    console.print(table)
    if report["differences"]:
        differences = Table(title=f"NDCG@10 that `{REFERENCE}` is ahead of …", box=None)
        differences.add_column("policy")
        differences.add_column("by [95 % interval]", justify="right")
        for pair, entry in report["differences"].items():
            differences.add_row(pair.removeprefix(f"{REFERENCE} - "), _cell(entry["ndcg@10"]))
        console.print(differences)


def _cell(one: dict[str, float]) -> str:
    return f"{one['mean']:.3f} [dim]{one['low']:.3f}…{one['high']:.3f}[/]"


def _plan(
    history: History, split_at: str, every: str | None, horizon: str | None, until: str | None, task: Task
) -> Plan:
    events = history.signals.at[history.signals.is_event]
    if not len(events):
        raise InputError("no click and no conversion among the events: nothing to measure by")
    last = int(events[-1])
    first = _moment("--split-at", split_at)
    end = _moment("--until", until) if until else last + 1
    if first >= end:
        raise InputError("--split-at must lie before --until and before the last event")
    horizon_ms = _duration("--horizon", horizon) if horizon else end - first
    every_ms = _duration("--every", every) if every else max(end - first, horizon_ms)
    return Plan(first, every_ms, horizon_ms, end, task)


def _moment(option: str, text: str) -> int:
    try:
        return int(parse_moment(text if "T" in text or " " in text else f"{text}T00:00:00Z").timestamp() * 1000)
    except ValueError as error:
        raise InputError(f"{option} {text}: {error}") from error


def _duration(option: str, text: str) -> int:
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise InputError(f"{option} {text}: must be a length of time such as 7d, 12h or 2w")
    return int(float(match[1]) * _UNITS_MS[match[2]])
