"""The state of the platform at a glance: what is wrong first."""

import streamlit as st
from components import cards, charts, store, text

RUNS = 30

engine = store.engine()
runs = store.latest_runs(engine, RUNS)
totals = store.latest_totals(engine)
found = store.find_anomalies(engine, RUNS)
last = runs[0]

with st.container(horizontal=True, vertical_alignment="center"):
    cards.status(last.status)
    st.markdown(
        f"The last run started {text.moment(last.started_at)} and worked for {text.duration(last.seconds)}.",
        width="content",
    )

tiles: dict[str, int | None] = {}
if totals:
    tiles["Messages in MongoDB"] = totals.messages
    tiles["Vectors in Milvus"] = totals.vectors
    tiles["Users in the graph"] = totals.users
tiles["Rows read by the last run"] = last.rows_read
for column, (label, value) in zip(st.columns(4), tiles.items(), strict=False):
    column.metric(label, text.count(value), border=True)
if totals:
    st.caption(f"Stores as of {text.moment(totals.published_at)}, when a run was last published.")
else:
    st.caption("What the stores hold appears here once a run is published.")

current = [one for one in found if one.run_id in {last.run_id, totals and totals.run_id}]
st.subheader("What needs attention")
for one in current:
    cards.anomaly(one)
if not current:
    st.success("Nothing is wrong with the last run.", icon=":material/check_circle:")
if earlier := len(found) - len(current):
    st.page_link(
        "views/anomalies.py",
        label=f"{earlier} more anomalies in the {len(runs)} latest runs",
        icon=":material/history:",
    )

st.subheader("The last run")
cards.run_chart(store.stages_of_run(engine, last.run_id))

st.subheader("Rows by run")
st.plotly_chart(charts.rows_by_run(runs), alt="Rows staged, skipped and rejected by each of the latest runs")
