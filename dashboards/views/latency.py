"""How long the stages take, and how many rows they work through."""

from statistics import median

import streamlit as st
from components import charts, store, text
from personalization.quality.reports import StageTiming

SECONDS, THROUGHPUT = "Seconds", "Rows per second"
TILES_IN_A_ROW = 5


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


engine = store.engine()
with st.container(horizontal=True, gap="large"):
    shown = st.segmented_control("Show", [SECONDS, THROUGHPUT], default=SECONDS, required=True) or SECONDS
    limit = st.segmented_control("Latest runs", [25, 50, 100, 200], default=50, required=True) or 50
timings = store.stage_timings(engine, limit)
if not timings:
    st.info("No stage has succeeded yet. Run `make demo` and reload this page.", icon=":material/rocket_launch:")
    st.stop()

st.subheader("Where the time goes" if shown == SECONDS else "How fast the slowest stages are")
figure = charts.seconds_by_stage(timings) if shown == SECONDS else charts.throughput_by_stage(timings)
st.plotly_chart(figure, alt=f"{shown} of the stages, run by run")

st.subheader("The last run, stage by stage")
stages = list(dict.fromkeys(one.stage for one in sorted(timings, key=lambda one: one.position)))
for first in range(0, len(stages), TILES_IN_A_ROW):
    row = stages[first : first + TILES_IN_A_ROW]
    for column, stage in zip(st.columns(TILES_IN_A_ROW), row, strict=False):
        with column:
            tile(stage, [one for one in timings if one.stage == stage], shown)
