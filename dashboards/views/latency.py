"""How long the pipeline's stages take, and how fast and how well the API answers."""

from datetime import UTC, datetime, timedelta
from statistics import median

import streamlit as st
from components import charts, store, text, timelines
from personalization.quality.reports import StageTiming
from personalization.quality.traffic import Traffic
from plotly.graph_objects import Figure

PIPELINE, API = "Pipeline", "API"
SECONDS, THROUGHPUT = "Seconds", "Rows per second"
TILES_IN_A_ROW = 5
# How far back, and in what steps. (Not a docstring: Streamlit would show it.)
SPANS = {
    "3 hours": (timedelta(hours=3), timedelta(minutes=5)),
    "24 hours": (timedelta(hours=24), timedelta(minutes=15)),
    "7 days": (timedelta(days=7), timedelta(hours=1)),
    "90 days": (timedelta(days=90), timedelta(hours=12)),
}
EVERY_ROUTE = "all routes"


def tile(stage: str, timings: list[StageTiming], shown: str) -> None:
    """A stage's latest value, beside its usual one and its course."""
    values = [
        value for one in timings if (value := one.seconds if shown == SECONDS else one.rows_per_second) is not None
    ]
    if not values:
        st.metric(
            stage,
            "—",
            border=True,
            height="stretch",
            help="No rows went through this stage.",
        )
        return
    usual = median(values)
    st.metric(
        stage,
        text.duration(values[-1]) if shown == SECONDS else f"{values[-1]:,.0f} /s",
        delta=f"{values[-1] / usual - 1:+.0%}" if usual else None,
        delta_color="off",
        delta_arrow="off",
        delta_description="to the median",
        border=True,
        height="stretch",
        chart_data=values,
        chart_type="area",
    )


def pipeline() -> None:
    """The stages, run by run."""
    with st.container(horizontal=True, gap="large"):
        shown = st.segmented_control("Show", [SECONDS, THROUGHPUT], default=SECONDS, required=True) or SECONDS
        limit = st.segmented_control("Latest runs", [25, 50, 100, 200], default=50, required=True) or 50
    timings = store.stage_timings(engine, limit)
    if not timings:
        st.info("No stage has succeeded yet. Run `make demo` and reload this page.", icon=":material/rocket_launch:")
        return
    st.header("Where the time goes" if shown == SECONDS else "How fast the slowest stages are")
    figure = charts.seconds_by_stage(timings) if shown == SECONDS else charts.throughput_by_stage(timings)
    st.plotly_chart(figure, alt=f"{shown} of the stages, run by run")

    st.header("The last run, stage by stage")
    stages = list(dict.fromkeys(one.stage for one in sorted(timings, key=lambda one: one.position)))
    for first in range(0, len(stages), TILES_IN_A_ROW):
        row = stages[first : first + TILES_IN_A_ROW]
        for column, stage in zip(st.columns(TILES_IN_A_ROW), row, strict=False):
            with column:
                tile(stage, [one for one in timings if one.stage == stage], shown)


def api() -> None:
    """The API's answers over time, as its counters were read every five minutes."""
    if not store.has_traffic(engine):
        st.info(
            "The API has not been read yet. Airflow's DAG `api_health` does so every five minutes; see that it is "
            "switched on, and that `API_URL` and, where keys are asked for, `API_KEY` are right.",
            icon=":material/monitor_heart:",
        )
        return
    with st.container(horizontal=True, gap="large", vertical_alignment="bottom"):
        name = st.segmented_control(
            "Over", list(SPANS), default="24 hours", required=True, key="over", bind="query-params"
        )
        span, step = SPANS[name or "24 hours"]
        step_ms = step // timedelta(milliseconds=1)
        since_ms = int((datetime.now(UTC) - span).timestamp() * 1000) // step_ms * step_ms
        known = [EVERY_ROUTE, *store.routes(engine, since_ms)]
        route = st.selectbox("Route", known, key="route", bind="query-params") or EVERY_ROUTE
    steps = store.traffic_over_time(engine, since_ms, step_ms, None if route == EVERY_ROUTE else route)
    if not steps:
        st.info(f"Nobody asked the API in the last {name}.", icon=":material/hourglass_empty:")
        return
    counts = store.counts_over_time(engine, since_ms, step_ms)
    now = datetime.now(UTC)

    def show(figure: Figure, alt: str) -> None:
        st.plotly_chart(timelines.within(figure, since_ms, now, step_ms), alt=alt)

    tiles(steps, {one: sum(each.count for each in counts if each.name == one) for one in ("hit", "stale", "miss")})

    st.header("How long answers took")
    st.caption("Percentiles, interpolated within the API's buckets as Prometheus does. The scale is logarithmic.")
    show(timelines.latency(steps), "Percentiles of the time that the API took to answer")
    left, right = st.columns(2, gap="large")
    with left:
        st.header("Requests")
        show(timelines.requests(steps, step_ms, now), "Requests per second")
    with right:
        st.header("Failed requests")
        show(timelines.errors(steps), "Share of the requests that failed")
    with left:
        st.header("Where answers came from")
        show(timelines.answers(counts), "Answers from the cache and made anew, in percent")
    with right:
        st.header("Answers that lacked a store")
        lacking = [one for one in counts if one.name.startswith("degraded:")]
        if lacking:
            show(timelines.degraded(lacking), "Degraded answers by the store that was missing")
        else:
            st.caption("None.")


def tiles(steps: list[Traffic], answers: dict[str, int]) -> None:
    """The whole span in five figures."""
    requests, errors = sum(one.requests for one in steps), sum(one.errors for one in steps)
    buckets = tuple(sum(some) for some in zip(*(one.buckets for one in steps), strict=True))
    whole = Traffic(steps[0].moment_ms, "", requests, errors, buckets)
    figures = {"Requests": text.large(requests)}
    for label, share in (("p50", 0.5), ("p95", 0.95)):
        seconds = whole.quantile(share)
        figures[label] = "—" if seconds is None else f"{seconds * 1000:,.1f} ms"
    figures["Failed"] = f"{errors / requests:.2%}" if requests else "—"
    given = sum(answers.values())
    figures["From the cache"] = f"{(answers['hit'] + answers['stale']) / given:.0%}" if given else "—"
    for column, (label, value) in zip(st.columns(5), figures.items(), strict=True):
        column.metric(label, value, border=True)


engine = store.engine()
of = st.segmented_control("Of the", [PIPELINE, API], default=PIPELINE, required=True, key="of", bind="query-params")
if of == API:
    api()
else:
    pipeline()
