"""The dashboard: how long until a page is there, with 10,000 runs, 1,000,000 rows of engagement and as many events.

The database is filled by bulk SQL, as the pipeline would leave it. Each page is opened in headless Chromium, each time
with an empty browser cache: first by a server that has cached nothing, then by the same one again. Three moments count:
the browser's first contentful paint; the page's own heading, which comes from the server; and that its first picture or
table is drawn too and nothing on it is marked as unfinished.

    python -m benchmarks dashboard
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

from personalization.audit.command import KEPT, record
from personalization.audit.findings import KINDS, AuditReport, Finding, Sample
from personalization.evaluation.recording import result_rows
from personalization.quality.anomalies import to_row
from personalization.quality.anomaly import Anomaly
from personalization.schemas import DAY_MS, Campaign, Catalog, Intent
from personalization.settings import Settings
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.tables import PipelineRun
from playwright.sync_api import Browser, sync_playwright
from sqlalchemy import insert, text

from benchmarks import api_history

RUNS, ENGAGEMENT, EVENTS, USERS = 10_000, 1_000_000, 1_000_000, 100_000
CAMPAIGNS, ANOMALIES = 40, 5000
PAGES = {
    "Overview": "",
    "Runs": "runs",
    "Runs, the oldest page": "runs?page=400",
    "Runs, the failed": "runs?status=failed",
    "Runs, two side by side": "runs?run=scheduled__00000&with=scheduled__00007&part=Compare",
    "Latency": "latency",
    "Latency of the API": "latency?of=API",
    "Latency of the API, 90 days": "latency?of=API&over=90+days",
    "Anomalies": "anomalies",
    "Anomalies, a year": "anomalies?since=a+year",
    "Audit": "audit",
    "Engagement": "engagement",
    "Engagement, a year": "engagement?days=365",
    "Explore a user": "explore",
    "Evaluation": "evaluation",
}
TARGET_S = 2.0

_ROOT = Path(__file__).parents[1]
_ROUNDS = 2
_PATIENCE_MS = 60_000
_STAGES = (
    *("prepare", "ingest", "ingest_events", "embed_catalog", "embed", "upsert_vectors", "detect_intents"),
    *("build_graph", "roll_up_engagement", "refresh_profiles", "learn", "publish"),
)
_POLICIES = ("shipped", "fusion", "learned", "popularity", "popularity_recency", "item_knn", "als", "random")
_FAILED_EVERY = 97
_ENGAGEMENT = """
    INSERT INTO user_engagement (
        user_id, campaign_id, count, last_at, impressions, clicks, conversions, dismisses, last_event_at,
        weight, weight_at
    )
    WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < :rows)
    SELECT printf('user-%06d', n / 10), 'campaign_' || ((n + n / 10) % :campaigns), n % 4, :now - n * 1000,
           n % 6, n % 5 = 0, n % 25 = 0, n % 50 = 1, :now - n * 3000, 1.0, :now - n * 1000
    FROM numbers
"""
# The multiplier shares no factor with the number of users: neighbours in time are users far apart.
_EVENTS = """
    INSERT INTO events (event_id, user_id, campaign_id, event, timestamp, run_id)
    WITH RECURSIVE numbers(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < :events)
    SELECT printf('%08d-0000-4000-8000-000000000000', n), printf('user-%06d', (n * 7919) % :users),
           'campaign_' || (n % :campaigns),
           CASE n % 9 WHEN 0 THEN 'click' WHEN 4 THEN CASE n % 4 WHEN 0 THEN 'conversion' ELSE 'click' END
                      WHEN 7 THEN 'dismiss' ELSE 'impression' END,
           :now - n * :step, printf('scheduled__%05d', n / 100)
    FROM numbers
"""
_WEEKS = """
    INSERT INTO user_weeks (user_id, week, first_week)
    SELECT user_id, week, min(week) OVER (PARTITION BY user_id)
    FROM (SELECT DISTINCT user_id, (timestamp + 3 * :day) / (7 * :day) AS week FROM events WHERE event <> 'impression')
"""
# A page of Streamlit is ready when nothing on it waits to be drawn or drawn anew.
_READY = """() => document.querySelector('h1')
    && document.querySelector('.js-plotly-plot .main-svg, [data-testid=stDataFrame] canvas, [data-testid=stAlert]')
    && !document.querySelector('[data-stale=true], [data-testid=stSkeleton], [data-testid=stStatusWidget]')"""


_WATCH = """new MutationObserver((_, watcher) => {
    if (document.querySelector('h1')) { window.headingAt = performance.now(); watcher.disconnect(); }
}).observe(document, { childList: true, subtree: true })"""
_MOMENTS = """() => [
    performance.getEntriesByName('first-contentful-paint')[0].startTime, window.headingAt, performance.now()
]"""


class Moments(NamedTuple):
    """Seconds from asking for a page."""

    paint: float
    """Until the browser's first contentful paint."""
    heading: float
    """Until what the page is called was there."""
    whole: float
    """Until nothing on it was unfinished."""


class Measured(NamedTuple):
    """How long a page took."""

    first: Moments
    """Of a server that has cached nothing."""
    again: Moments
    """Of the same one; the medians of some."""


def fill(path: Path) -> None:
    """Make the database: a run an hour, each user with ten campaigns, events and traffic of the API over a year."""
    store = AnalyticsStore.from_settings(Settings(sqlite_path=path, analytics_url=None))
    store.ensure_schema()
    campaigns = [
        Campaign(
            id=f"campaign_{at}", name=f"Campaign {at}", category=f"category {at % 7}", intents=[f"intent_{at % 11}"]
        )
        for at in range(CAMPAIGNS)
    ]
    intents = [Intent(id=f"intent_{at}", name=f"Intent {at}", examples=["…"]) for at in range(11)]
    store.sync_catalog(Catalog(intents=intents, campaigns=campaigns))
    now = datetime.now(UTC)
    _fill_runs(store)
    _fill_findings(store, now)
    api_history.fill(store, now, 365)
    known = {"now": int(time.time() * 1000), "campaigns": CAMPAIGNS, "users": USERS}
    known |= {"rows": ENGAGEMENT, "events": EVENTS, "step": 365 * DAY_MS // EVENTS, "day": DAY_MS}
    with store.engine.begin() as connection:
        for statement in (_ENGAGEMENT, _EVENTS, _WEEKS):
            connection.execute(text(statement), known)
    store.refresh_campaign_totals()
    store.engine.dispose()


def main(results: Path) -> None:
    """Measure every page, and write the table."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("the dashboard is measured in Chromium or Chrome, and there is none on the PATH")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        database = Path(folder) / "analytics.db"
        fill(database)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        measured = {}
        for name, page in PAGES.items():
            with served(database) as address:
                first = moments(browser, f"{address}/{page}")
                again = [moments(browser, f"{address}/{page}") for _ in range(_ROUNDS)]
            measured[name] = Measured(first, Moments(*map(median, zip(*again, strict=True))))
            print(name, *(f"{one:.2f}" for one in (*measured[name].first, *measured[name].again)), flush=True)
        browser.close()
        report(results, measured, database.stat().st_size)


def moments(browser: Browser, url: str) -> Moments:
    """When what of the page was there, in a browser that has cached nothing."""
    context = browser.new_context(viewport={"width": 1360, "height": 1000})
    context.add_init_script(_WATCH)
    page = context.new_page()
    page.goto(url, wait_until="commit")
    page.wait_for_function(_READY, timeout=_PATIENCE_MS)
    found = page.evaluate(_MOMENTS)
    context.close()
    return Moments(*(one / 1000 for one in found))


@contextmanager
def served(database: Path) -> Iterator[str]:
    """A dashboard of its own over the database, asking for no password; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "streamlit", "run", "dashboards/serve.py", "--server.headless", "true"),
        *("--server.address", "127.0.0.1", "--server.port", str(port)),
    ]
    # Nothing listens at these addresses: what asks other stores shows that at once.
    own = {"SQLITE_PATH": str(database), "DASHBOARD_AUTH": "off", "API_URL": "http://127.0.0.1:9", "ANALYTICS_URL": ""}
    server = subprocess.Popen(command, cwd=_ROOT, env=os.environ | own, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/_stcore/health"):
                    break
            except URLError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def report(results: Path, measured: dict[str, Measured], size: int) -> None:
    """Write the table."""
    rows = [
        f"| {name} | {' | '.join(f'{moment:.2f}' for moment in (*one.first, *one.again))} "
        f"| {'yes' if max(one.first.paint, one.again.paint) <= TARGET_S else '**no**'} |"
        for name, one in measured.items()
    ]
    what = (
        f"{datetime.now(UTC):%Y-%m-%d}: {RUNS:,} runs of {len(_STAGES)} stages, {ENGAGEMENT:,} rows of engagement and "
        f"{EVENTS:,} events of {USERS:,} users in SQLite ({size / 1e6:,.0f} MB), {os.cpu_count()} cores. Headless "
        "Chromium on the same machine, with an empty cache each time."
    )
    how = (
        "Seconds from asking for a page until the browser's first contentful paint, until the page's heading, and "
        "until its pictures or tables are drawn as well and nothing on it waits: by a server that has cached nothing, "
        "and by the same one again."
    )
    columns = f"page | first paint | heading | whole | again: first paint | heading | whole | paint ≤ {TARGET_S:g} s"
    head = [f"| {columns} |", "|---|---:|---:|---:|---:|---:|---:|---|"]
    lines = ["# Dashboard", "", what, "", how, "", *head, *rows]
    (results / "dashboard.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _fill_runs(store: AnalyticsStore) -> None:
    now = datetime.now(UTC)
    with store.engine.begin() as connection:
        for first in range(0, RUNS, 500):
            connection.execute(
                insert(PipelineRun),
                [row for number in range(first, first + 500) for row in _run(number, now - timedelta(hours=number))],
            )


def _fill_findings(store: AnalyticsStore, now: datetime) -> None:
    """As much as is kept: anomalies, audits, and a year of evaluations."""
    odd = [
        Anomaly(
            severity="error" if at % 10 == 0 else "warning",
            run_id=f"scheduled__{at * 2:05d}",
            run_started_at=now - timedelta(hours=at * 2),
            stage=_STAGES[at % len(_STAGES)],
            title="Slower than usual",
            evidence=f"1,{at % 1000:03d} rows took 120.0 s, usually 20.0 s (6.0 ×).",
            advice="Look at the store that this stage writes.",
        )
        for at in range(ANOMALIES)
    ]
    store.set_anomalies([to_row(one) for one in odd], [])
    found = [Finding(kind, 1000, [Sample(f"m-{at}", "maria", "a", "b") for at in range(10)]) for kind in KINDS.values()]
    for at in range(KEPT):
        moment = now - timedelta(hours=KEPT - at)
        compared = {"mongodb": {"messages": 9_000_000}, "milvus": {"vectors": 9_000_000}}
        drift = at % 50 == 49
        audited = AuditReport(
            f"audit {at}", moment, moment, "drift" if drift else "clean", False, compared, 0, found * drift
        )
        record(audited, store)
    for week in range(52):
        moment = now - timedelta(weeks=51 - week)
        store.record_evaluation([row | {"created_at": moment} for row in result_rows(f"week {week}", _evaluation())])


def _evaluation() -> dict[str, Any]:
    interval = {"mean": 0.3, "low": 0.28, "high": 0.32}
    metrics = ("ndcg@10", "recall@5", "recall@10", "mrr", "hit_rate@10", "novelty@10", "coverage@10")
    segments = {one: {"answers": 400, "ndcg@10": interval} for one in ("cold", "warm")}
    return {
        "task": "any",
        "splits": ["2026-01-01T00:00:00Z"],
        "horizon_days": 7.0,
        "users": 400,
        "answers": 800,
        "policies": {name: dict.fromkeys(metrics, interval) | {"segments": segments} for name in _POLICIES},
        "differences": {f"shipped - {name}": {"ndcg@10": interval} for name in _POLICIES[1:]},
    }


def _run(number: int, started_at: datetime) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    clock = started_at
    messages = 900 + number * 577 % 1400
    failed_at = _STAGES.index("build_graph") if number % _FAILED_EVERY == _FAILED_EVERY - 1 else len(_STAGES)
    for position, stage in enumerate(_STAGES):
        seconds = 0.5 + messages * 0.001 * (1 + position % 3)
        has_run = position <= failed_at
        rows.append(
            {
                "run_id": f"scheduled__{number:05d}",
                "stage": stage,
                "position": position,
                "status": "failed" if position == failed_at else "success" if has_run else "not_run",
                "rows_in": messages if has_run else 0,
                "rows_out": messages if position < failed_at else 0,
                "rejected": number % 7 if stage == "ingest" else 0,
                "skipped": number % 50 if stage == "ingest" else 0,
                "shards": 1,
                "attempt": 1,
                "started_at": clock if has_run else None,
                "finished_at": clock + timedelta(seconds=seconds) if has_run else None,
                "seconds": seconds if has_run else 0.0,
                "error_type": "StoreError" if position == failed_at else None,
                "error": "neo4j: does not answer (ServiceUnavailable)" if position == failed_at else None,
                "details": {"messages": 9_000_000 - number, "vectors": 9_000_000 - number, "users": USERS}
                if stage == "publish" and has_run
                else {},
            }
        )
        clock += timedelta(seconds=seconds)
    return rows
