"""The history of runs, and one run in full."""

import streamlit as st
from components import cards, store, text

ROWS = st.column_config.NumberColumn(format="localized")

engine = store.engine()
limit = st.segmented_control("Latest runs", [25, 100, 500], default=25, required=True) or 25
runs = store.latest_runs(engine, limit)
run_ids = [one.run_id for one in runs]
wanted = st.query_params.get("run", run_ids[0])

chosen = st.dataframe(
    [
        {
            "Started": one.started_at and text.local(one.started_at),
            "Status": [one.status],
            "Failed stage": one.failed_stages,
            "Seconds": one.seconds,
            "Rows read": one.rows_read,
            "Staged": one.staged,
            "Unchanged or repeated": one.skipped,
            "Rejected": one.rejected,
            "Run": one.run_id,
        }
        for one in runs
    ],
    height=320,
    hide_index=True,
    placeholder="",
    column_config={
        "Started": st.column_config.DatetimeColumn(format="D MMM YYYY, HH:mm:ss"),
        "Seconds": st.column_config.NumberColumn(format="%.1f", help="Work time of all stages"),
        **dict.fromkeys(["Rows read", "Staged", "Unchanged or repeated", "Rejected"], ROWS),
        "Status": st.column_config.MultiselectColumn(options=["success", "failed"], color=["green", "red"]),
    },
    on_select="rerun",
    selection_mode="single-row",
    selection_default={"selection": {"rows": [run_ids.index(wanted)] if wanted in run_ids else []}},
    alt="The latest runs",
)
if rows := chosen.selection.rows:
    wanted = run_ids[rows[0]]

stages = store.stages_of_run(engine, wanted)
st.subheader("One run")
if not stages:
    st.info("There is no such run. Select one above.", icon=":material/search_off:")
    st.stop()

st.code(wanted, language=None)
for stage in stages:
    if stage.status == "failed":
        st.error(f"`{stage.stage}` failed with {stage.error_type or 'an unknown error'}.", icon=":material/error:")
        st.code(stage.error or "No message was recorded.", language=None, wrap_lines=True)
cards.run_chart(stages)
st.dataframe(
    [
        {
            "Stage": one.stage,
            "Status": [one.status],
            "Rows in": one.rows_in,
            "Rows out": one.rows_out,
            "Skipped": one.skipped,
            "Rejected": one.rejected,
            "Seconds": one.seconds,
            "Rows/s": one.rows_per_second,
            "Shards": one.shards,
            "Attempt": one.attempt,
            "Error": one.error_type,
        }
        for one in stages
    ],
    hide_index=True,
    placeholder="",
    column_config={
        **dict.fromkeys(["Rows in", "Rows out", "Skipped", "Rejected"], ROWS),
        "Status": st.column_config.MultiselectColumn(
            options=["success", "failed", "skipped", "not_run"], color=["green", "red", "gray", "gray"]
        ),
        "Seconds": st.column_config.NumberColumn(format="%.2f"),
        "Rows/s": st.column_config.NumberColumn(format="%.0f"),
    },
    alt="The stages of the run",
)
with st.expander("Details that the stages recorded"):
    st.json({one.stage: one.details for one in stages if one.details})
