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

columns = st.columns(4)
if totals:
    columns[0].metric("Messages", text.count(totals.messages), border=True, help="In MongoDB.")
    columns[1].metric("Vectors", text.count(totals.vectors), border=True, help="In Milvus.")
    columns[2].metric("Users", text.count(totals.users), border=True, help="In the graph.")
columns[3].metric(
    "Rows read by the last run",
    text.count(last.rows_read),
    border=True,
    chart_data=[one.rows_read for one in reversed(runs)],
    chart_type="bar",
)
if totals:
    st.caption(f"Totals as published {text.moment(totals.published_at)}, generation {totals.generation}.")
else:
    st.caption("Totals appear once a run is published.")

current = [one for one in found if one.run_id in {last.run_id, totals and totals.run_id}]
st.subheader("What needs attention")
for one in current:
    cards.anomaly(one)
if not current:
    st.success("Nothing is wrong with the last run.", icon=":material/check_circle:")
if earlier := len(found) - len(current):
    st.page_link(
        "views/anomalies.py",
        label=f"{earlier} in the {len(runs)} latest runs before it",
        icon=":material/history:",
    )

st.subheader("The last run")
cards.run_chart(store.stages_of_run(engine, last.run_id))

st.subheader("Rows by run")
st.plotly_chart(charts.rows_by_run(runs), alt="Rows staged, skipped and rejected by each of the latest runs")
