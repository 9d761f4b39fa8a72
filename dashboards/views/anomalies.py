"""Everything that was wrong with the latest runs; what recurs is shown once."""

from itertools import groupby

import streamlit as st
from components import cards, charts, store

engine = store.engine()
limit = st.segmented_control("Latest runs", [25, 50, 100, 200], default=50, required=True) or 50
found = store.find_anomalies(engine, limit)
runs = store.latest_runs(engine, limit)
if not found:
    st.success(f"Nothing is wrong with the {len(runs)} latest runs.", icon=":material/check_circle:")
    st.stop()

columns = st.columns(3)
columns[0].metric("Errors", sum(one.severity == "error" for one in found), border=True)
columns[1].metric("Warnings", sum(one.severity == "warning" for one in found), border=True)
columns[2].metric("Runs with an anomaly", f"{len({one.run_id for one in found})} of {len(runs)}", border=True)

stages = [one.stage for one in store.stages_of_run(engine, runs[0].run_id)]
st.plotly_chart(charts.anomalies(found, runs, stages), alt="Anomalies by run and stage")

kinds = sorted(found, key=lambda one: (one.severity, one.stage, one.title))
for _, group in groupby(kinds, key=lambda one: (one.severity, one.stage, one.title)):
    newest, *others = group
    cards.anomaly(newest, runs=1 + len(others))
