"""The commands `experiment report` and `experiment compare`: from events to figures and words."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import structlog
from rich.console import Console
from rich.table import Table
from upath import UPath

from personalization.errors import InputError
from personalization.evaluation.dataset import Refused, load_events
from personalization.evaluation.exploration import Reward, TargetName, compare_explored
from personalization.evaluation.off_policy import Estimates
from personalization.quality.experiments import Experiment, Request, compare_events, compare_stored
from personalization.resampling import Interval
from personalization.schemas import Event, parse_moment
from personalization.settings import Settings
from personalization.stores.analytics import open_read_only

_LATEST = 2**62
_WIDTH = 110
_COUNTS = ("users", "impressions", "clicks", "conversions")

log = structlog.get_logger(__name__)


def report(
    path: Path | None, settings: Settings, request: Request, *, since: str | None = None, until: str | None = None
) -> Experiment:
    """Compare two policies by the events of a file, or of the stores where none is named.

    Raises:
        InputError: the file, a moment or the share cannot be used.
        StoreError: the stores' events cannot be read.
        TooLittleFeedbackError: there are not two policies, each with enough users.
    """
    if request.share is not None and not 0 < request.share < 1:
        raise InputError(f"--share {request.share:g}: must be between 0 and 1")
    first, end = _moment("--since", since, 0), _moment("--until", until, _LATEST)
    if path is None:
        return compare_stored(open_read_only(settings), settings, first, end, request)
    events = [(one.user_id, one.event, one.policy) for one in _events(path, first, end)]
    return compare_events(events, settings, request)


def compare_file(
    path: Path,
    settings: Settings,
    *,
    reward: str = "click",
    share: float | None = None,
    policy: str | None = None,
    since: str | None = None,
    until: str | None = None,
) -> dict[TargetName, Estimates]:
    """What the ranker alone and chance alone would have earned at the places that were explored.

    Raises:
        InputError: the file, a moment, the reward or the share cannot be used.
        NoSupportError: the log cannot tell policies apart.
    """
    if reward not in get_args(Reward):
        raise InputError(f"--reward {reward}: must be one of {', '.join(get_args(Reward))}")
    share = settings.exploration_share if share is None else share
    events = _events(path, _moment("--since", since, 0), _moment("--until", until, _LATEST))
    return compare_explored(events, share=share, reward=reward, policy=policy)  # type: ignore[arg-type]


def _events(path: Path, first: int, end: int) -> list[Event]:
    refused = Refused()
    events = load_events(UPath(path), refused)
    if refused.count:
        log.warning(f"{refused.count:,} rows were refused; first: {'; '.join(refused.first)}")
    return [one for one in events if first <= one.timestamp_ms < end]


def _moment(option: str, text: str | None, otherwise: int) -> int:
    if text is None:
        return otherwise
    try:
        return int(parse_moment(text if "T" in text or " " in text else f"{text}T00:00:00Z").timestamp() * 1000)
    except ValueError as error:
        raise InputError(f"{option} {text}: {error}") from error


def plain(value: Any) -> Any:
    """Figures as JSON takes them."""
    if isinstance(value, Interval):
        return {name: round(figure, 6) for name, figure in value._asdict().items()}
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, Experiment):
        return {name: plain(one) for name, one in asdict(value).items()}
    if isinstance(value, Estimates):
        return {name: plain(one) for name, one in asdict(value).items()} | {"caveats": value.caveats}
    return [plain(one) for one in value] if isinstance(value, list) else value


def print_experiment(found: Experiment, console: Console) -> None:
    """The two policies as a table, and what it means in words."""
    arms = (found.control, found.treated)
    rows = [[name, *(f"{getattr(arm, name):,}" for arm in arms), ""] for name in _COUNTS]
    for one in found.differences:
        levels = [_interval(arm.metrics[one.metric]) for arm in arms]
        rows.append([one.metric, *levels, _interval(one.difference, "+")])
    _print_table(console, ["", *(arm.policy for arm in arms), "difference (95 %)"], rows)
    for one in found.differences:
        better = f"{found.treated.policy} is better with probability {one.treated_is_better:.0%}"
        console.print(f"{one.verdict} ({better})", highlight=False, soft_wrap=True)
    for warning in found.warnings:
        console.print(f"[yellow]note:[/] {warning}", highlight=False, soft_wrap=True)


def print_estimates(found: dict[TargetName, Estimates], reward: str, console: Console) -> None:
    """What the log earned at its explored places, and what other policies would have."""
    first = next(iter(found.values()))
    console.print(f"{first.impressions:,} impressions of {first.users:,} users at explored places\n", highlight=False)
    rows = [["as logged", f"{first.impressions:,}", _interval(first.logged), ""]]
    for name, one in found.items():
        rows.append([name, f"{one.effective_size:,.0f}", _interval(one.values["snips"]), _interval(one.values["ips"])])
    _print_table(console, ["policy", "effective size", f"{reward}s per impression, SNIPS (95 %)", "IPS (95 %)"], rows)
    for name, one in found.items():
        for caveat in one.caveats:
            console.print(f"[yellow]note:[/] {name}: {caveat}", highlight=False, soft_wrap=True)


def _print_table(console: Console, header: list[str], rows: list[list[str]]) -> None:
    console.width = max(console.width, _WIDTH)  # wrapped by a narrower terminal, not cut off here
    table = Table(box=None, padding=(0, 2, 0, 0))
    for at, name in enumerate(header):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table, "")


def _interval(one: Interval, sign: str = "") -> str:
    return f"{one.mean:{sign}.4f} ({one.low:{sign}.4f} … {one.high:{sign}.4f})"
