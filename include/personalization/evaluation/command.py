"""The command `evaluate`: from files and words to a report."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
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
from personalization.evaluation.pictures import headline, write_report
from personalization.evaluation.policies import STANDARD, check_policies
from personalization.evaluation.replay import MIN_ANSWERS, REFERENCE, Plan, Replay, summarise
from personalization.learning.training import Task
from personalization.schemas import DAY_MS, ENGAGEMENT_STRENGTH, Catalog, Event, parse_moment
from personalization.settings import Settings, get_settings

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(m|h|d|w)")
_MAX_SPLITS = 400
_BRIEF = ("recall@5", "recall@10", "mrr", "hit_rate@10", "novelty@10")
_WIDTH = 110
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
    output: Path | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Load, replay and summarise; the report is what `--json` prints, and is drawn into the folder `output`.

    Raises:
        InputError: a file, moment, duration, task or policy that cannot be used; says what to write instead.
        CatalogError: the catalog does not hold together.
    """
    chosen = check_policies(policies or STANDARD)
    if task not in get_args(Task):
        raise InputError(f"--task {task}: must be one of {', '.join(get_args(Task))}")
    refused = Refused()
    loaded = load_catalog(catalog)
    said, done = load_messages(UPath(messages), refused), load_events(UPath(events), refused)
    if refused.count:
        log.warning(f"{refused.count:,} rows were refused; first: {'; '.join(refused.first)}")
    plan = _plan(done, loaded, split_at, every, horizon, until, task)  # type: ignore[arg-type]
    history = build_history(said, done, loaded, settings or get_settings())
    replay = Replay(history, plan)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("splits", total=len(plan.splits))
        outcomes = replay.run(chosen, lambda done: progress.update(bar, completed=done))
    report = summarise(replay, plan, outcomes)
    report["refused"] = {"rows": refused.count, "first": refused.first}
    if not report["answers"]:
        raise InputError(
            f"no user engages with a running campaign between {report['splits'][0]} and the end of the horizon; "
            f"move --split-at, or check the campaigns' windows"
        )
    if output is not None:
        log.info(f"written: {', '.join(map(str, write_report(report, output)))}")
    return report


def print_report(report: dict[str, Any], console: Console) -> None:
    """The report as tables; the first by NDCG@10 with its interval, the other metrics as means."""
    policies = sorted(report["policies"].items(), key=lambda one: (-one[1]["ndcg@10"]["mean"], one[0]))
    differences = report["differences"]
    console.width = max(console.width, _WIDTH)  # wrapped by a narrower terminal, not cut off here
    console.print(f"{headline(report)}\n", highlight=False, soft_wrap=True)
    _print_table(
        console,
        ["policy", "ndcg@10 (95 %)", *_BRIEF, "coverage@10"],
        [
            [
                policy,
                _interval(entry["ndcg@10"]),
                *(f"{entry[name]['mean']:.3f}" for name in _BRIEF),
                f"{entry['coverage@10']:.3f}",
            ]
            for policy, entry in policies
        ],
    )
    _print_table(
        console,
        ["policy", f"ndcg@10 {REFERENCE} is ahead by", "of the cold", "of the warm"],
        [
            [
                policy,
                _interval(differences[pair]["ndcg@10"], "+")
                if (pair := f"{REFERENCE} - {policy}") in differences
                else "",
                *(_interval(entry["segments"].get(segment, {}).get("ndcg@10")) for segment in ("cold", "warm")),
            ]
            for policy, entry in policies
        ],
    )
    calibrated = [(policy, entry["calibration"]) for policy, entry in policies if "calibration" in entry]
    if calibrated:
        names = list(calibrated[0][1])
        rows = [[policy, *(f"{entry[name]:.4f}" for name in names)] for policy, entry in calibrated]
        _print_table(console, ["policy", *(name.replace("_", " ") for name in names)], rows)
    if report["answers"] < MIN_ANSWERS:
        console.print(f"Fewer than {MIN_ANSWERS} answers say little about the order of the policies.", highlight=False)


def _print_table(console: Console, header: list[str], rows: list[list[str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for at, name in enumerate(header):
        # In two lines, so that all columns fit.
        table.add_column(
            name.replace("@10", "\n@10").replace("@5", "\n@5"), justify="right" if at else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*row)
    console.print(table, "")


def _interval(one: dict[str, float] | None, sign: str = "") -> str:
    return f"{one['mean']:{sign}.3f} [dim]{one['low']:{sign}.3f}…{one['high']:{sign}.3f}[/]" if one else ""


def _plan(
    events: Sequence[Event],
    catalog: Catalog,
    split_at: str,
    every: str | None,
    horizon: str | None,
    until: str | None,
    task: Task,
) -> Plan:
    campaign_ids = {one.id for one in catalog.campaigns}
    known = [one for one in events if one.campaign_id in campaign_ids]
    if events and not known:
        raise InputError("no event is of a campaign of the catalog; is it the right catalog?")
    last = max((one.timestamp_ms for one in known if one.event in ENGAGEMENT_STRENGTH), default=None)
    if last is None:
        raise InputError("no click and no conversion among the events: nothing to measure by")
    first = _moment("--split-at", split_at)
    end = _moment("--until", until) if until else last + 1
    if first > last:
        newest = datetime.fromtimestamp(last / 1000, UTC)
        raise InputError(f"--split-at {split_at}: the last click or conversion is of {newest:%Y-%m-%dT%H:%M:%SZ}")
    if first >= end:
        raise InputError(f"--until {until}: must lie behind --split-at {split_at}")
    whole = end - first
    every_ms = _duration("--every", every) if every else whole
    horizon_ms = _duration("--horizon", horizon) if horizon else min(every_ms, whole)
    every_ms = every_ms if every else max(whole, horizon_ms)
    if until and horizon_ms > whole:
        raise InputError(f"--until {until}: lies within the first horizon of {horizon}; set it later or --horizon less")
    if (splits := (end - first) // every_ms) > _MAX_SPLITS:
        raise InputError(f"--every {every}: makes {splits:,} splits, and {_MAX_SPLITS} are the most; split less often")
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
    return max(int(float(match[1]) * _UNITS_MS[match[2]]), 1)
