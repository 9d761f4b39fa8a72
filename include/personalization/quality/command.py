"""The command `anomalies`."""

from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape

from personalization.quality.anomalies import anomalies_since, to_row
from personalization.quality.reports import has_runs
from personalization.settings import Settings
from personalization.stores.analytics import analytics_store

_MOST = 1000
_COLOURS = {"error": "red", "warning": "yellow"}


def recent(settings: Settings, days: int) -> list[dict[str, Any]]:
    """The anomalies of so many days, the newest first, at most 1,000."""
    with analytics_store(settings) as analytics:
        if not has_runs(analytics.engine):
            return []
        since = datetime.now(UTC) - timedelta(days=days)
        return [to_row(one) for one in anomalies_since(analytics.engine, since, _MOST)]


def show(found: list[dict[str, Any]], console: Console) -> None:
    """As people read them."""
    for one in found:
        when = f"{one['run_started_at']:%Y-%m-%d %H:%M} UTC" if one["run_started_at"] else "no time"
        colour = _COLOURS[one["severity"]]
        title = f"[{colour}]{one['severity']}[/] [bold]{escape(one['title'])}[/] in {escape(one['stage'])}"
        console.print(f"{title}, {when} [dim]{escape(one['run_id'] or '')}[/]", highlight=False)
        console.print(f"  {escape(one['evidence'])}", highlight=False)
        console.print(f"  [dim]{escape(one['advice'])}[/]", highlight=False)
    if not found:
        console.print("nothing odd")
