"""The state of the platform at a glance: four answers, then what is wrong first."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import streamlit as st
from components import cards, charts, store, text
from personalization.quality.anomalies import Anomaly
from personalization.quality.audits import Audit
from personalization.quality.engagement import DayOfEvents
from personalization.quality.reports import RunSummary, Totals

RUNS = 30
NEWEST = 200
SHOWN = 5
MANY = 20  # clicks in a week; of fewer a fall may be chance
LATE = timedelta(hours=36)
WEEK = timedelta(days=7)
AUDIT_PAGE = "views/audit.py"

engine = store.engine()
now = datetime.now(UTC)


def run_answer(last: RunSummary) -> None:
    """Did the last run work, and was it last night's?"""
    age = now - last.started_at if last.started_at else None
    if last.status == "failed":
        verdict = cards.Verdict("bad", f"failed in {last.failed_stages}")
    elif age is None or age > LATE:
        verdict = cards.Verdict("warn", f"none for {age.days} days" if age and age.days > 1 else "late")
    else:
        verdict = cards.Verdict("good", "worked")
    cards.answer(
        "The last run",
        verdict,
        f"Started {text.moment(last.started_at)} and worked for {text.duration(last.seconds)}.",
        "views/runs.py",
        {"run": last.run_id},
    )


def anomaly_answer(current: Sequence[Anomaly], earlier: int) -> None:
    """Is anything odd?"""
    errors = sum(one.severity == "error" for one in current)
    warnings = len(current) - errors
    counted = [
        f"{count} {name}{'s' if count > 1 else ''}"
        for count, name in ((errors, "error"), (warnings, "warning"))
        if count
    ]
    verdict = cards.Verdict("bad" if errors else "warn" if warnings else "good", ", ".join(counted) or "nothing odd")
    cards.answer(
        "Anomalies", verdict, f"{earlier} more in the {RUNS} latest runs." if earlier else "", "views/anomalies.py", {}
    )


def audit_answer(audit: Audit | None, totals: Totals | None) -> None:
    """Do the stores agree?"""
    if audit is not None:
        verdict = {
            "clean": cards.Verdict("good", "agree"),
            "repaired": cards.Verdict("good", "agree, after a repair"),
            "drift": cards.Verdict("bad", f"{audit.left:,} case{'' if audit.left == 1 else 's'} of drift"),
        }[audit.status]
        detail = f"Compared {text.moment(audit.finished_at)}."
    elif totals and totals.messages is not None and totals.messages == totals.vectors:
        verdict, detail = cards.Verdict("good", "same counts"), "Never compared by set: run the DAG *store_audit*."
    else:
        verdict, detail = cards.Verdict("unknown", "not compared"), "The DAG *store_audit* compares them."
    cards.answer("The stores", verdict, detail, AUDIT_PAGE, {})


def engagement_answer(events: Sequence[DayOfEvents]) -> None:
    """Are people engaging?"""
    start = now.date() - WEEK
    clicks = [one for one in events if one.event in ("click", "conversion")]
    latest = sum(one.count for one in clicks if one.day > start)
    before = sum(one.count for one in clicks if one.day <= start)
    if latest:
        change = f"{latest / before - 1:+.0%} to the week before" if before else "none in the week before"
        fell = before >= MANY and latest < before / 2
        verdict = cards.Verdict("warn" if fell else "good", f"{latest:,} clicks and conversions")
    else:
        verdict = cards.Verdict("warn" if before >= MANY else "unknown", "no clicks")
        change = f"{before:,} in the week before." if before else "None in the week before."
    cards.answer("Engagement, 7 days", verdict, change, "views/engagement.py", {"days": "90"})


runs = store.latest_runs(engine, RUNS)
totals = store.latest_totals(engine)
audit = next(iter(store.latest_audits(engine, 1)), None)
left = [one.title for one in store.findings_of_audit(engine, audit.audit_id) if one.is_left] if audit else []
last = runs[0]
found = store.find_anomalies(engine, RUNS)
of_api = [
    one
    for one in store.anomalies_since(engine, now.replace(minute=0, second=0, microsecond=0) - timedelta(days=1), NEWEST)
    if one.run_id is None
]
current = [*of_api, *(one for one in found if one.run_id in {last.run_id, totals and totals.run_id})]
current.sort(key=lambda one: one.severity)
fortnight = datetime.combine(now.date() - 2 * WEEK + timedelta(days=1), datetime.min.time(), UTC)

columns = st.columns(4)
with columns[0]:
    run_answer(last)
with columns[1]:
    anomaly_answer(current, len(found) + len(of_api) - len(current))
with columns[2]:
    audit_answer(audit, totals)
with columns[3]:
    engagement_answer(store.events_by_day(engine, fortnight))

st.header("What needs attention")
if left:
    st.error(f"The stores disagree: {'; '.join(left[:SHOWN])}.", icon=":material/sync_problem:")
    st.page_link(AUDIT_PAGE, label="The evidence, and what to do", icon=":material/arrow_forward:")
for one in current[:SHOWN]:
    cards.anomaly(one)
if not current and not left:
    st.success("Nothing is wrong with the last run.", icon=":material/check_circle:")
if (more := len(current) - SHOWN) > 0:
    st.page_link("views/anomalies.py", label=f"{more} more", icon=":material/arrow_forward:")

st.header("The last run")
cards.run_chart(store.stages_of_run(engine, last.run_id))

st.header("Rows by run")
st.plotly_chart(charts.rows_by_run(runs), alt="Rows staged, skipped and rejected by each of the latest runs")

st.header("What is stored")
if totals:
    tiles = {
        "Messages in MongoDB": totals.messages,
        "Vectors in Milvus": totals.vectors,
        "Users in the graph": totals.users,
        "Rows read by the last run": last.rows_read,
    }
    for column, (label, value) in zip(st.columns(4), tiles.items(), strict=True):
        column.metric(label, text.count(value), border=True)
    st.caption(f"As of {text.moment(totals.published_at)}, when a run was last published.")
else:
    st.caption("What the stores hold appears here once a run is published.")
