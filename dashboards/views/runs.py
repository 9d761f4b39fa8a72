"""The history of runs, one run in full, and two runs side by side. `?run=` names the run."""

from dataclasses import asdict
from typing import Literal

import streamlit as st
from components import cards, charts, download, store, text
from personalization.errors import StoreError
from personalization.quality.reports import RunSummary, StageRun, WantedRuns

ROWS = st.column_config.NumberColumn(format="localized")
STATUS = st.column_config.MultiselectColumn(
    options=["success", "failed", "skipped", "not_run"], color=["green", "red", "gray", "gray"]
)
ENDED: dict[str, Literal["success", "failed"]] = {"success": "success", "failed": "failed"}
ON_PAGE = 25
FEW = 8
REASONS = 50
REASONS_OVER = 10_000
ATTEMPTS = 500
STAGES, COMPARE, REFUSED, TRIES, DETAILS = "Stages", "Compare", "Rejected rows", "Attempts", "Details"

engine = store.engine()


def wanted_runs() -> WantedRuns:
    """The filters, which live in the URL."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        status = st.segmented_control(
            "Status", ["all", "success", "failed"], default="all", required=True, key="status", bind="query-params"
        )
        name = st.text_input("Run", placeholder="part of its id", key="name", bind="query-params", max_chars=250)
        wanted = WantedRuns(ENDED.get(status or ""), (name or "").strip())
        download.button(
            "Runs as CSV",
            "runs.csv",
            lambda: [asdict(one) for one in store.latest_runs(engine, download.ROWS, 0, wanted)],
        )
    return wanted


def history(wanted: WantedRuns) -> list[RunSummary]:
    """A page of runs; selecting one puts it into the URL."""
    total = store.count_runs(engine, wanted)
    if not total:
        st.info("No run matches these filters.", icon=":material/filter_alt_off:")
        return []
    pages = -(-total // ON_PAGE)
    if pages > 1:
        with st.container(horizontal=True, vertical_alignment="center"):
            page = st.pagination(pages, key="page", bind="query-params")
            st.caption(f"{total:,} runs", width="content")
    else:
        page = 1
    runs = store.latest_runs(engine, ON_PAGE, (page - 1) * ON_PAGE, wanted)
    run_ids = [one.run_id for one in runs]
    key = f"runs {wanted} {page}"

    def choose() -> None:
        if rows := st.session_state[key].selection.rows:
            st.query_params["run"] = run_ids[rows[0]]

    current = st.query_params.get("run", run_ids[0])
    st.dataframe(
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
        height=320 if len(runs) > FEW else "auto",
        hide_index=True,
        placeholder="",
        column_config={
            "Started": st.column_config.DatetimeColumn(format="D MMM YYYY, HH:mm:ss"),
            "Seconds": st.column_config.NumberColumn(format="%.1f", help="Work time of all stages"),
            **dict.fromkeys(["Rows read", "Staged", "Unchanged or repeated", "Rejected"], ROWS),
            "Status": STATUS,
        },
        key=key,
        on_select=choose,
        selection_mode="single-row",
        selection_default={"selection": {"rows": [run_ids.index(current)] if current in run_ids else []}},
        alt="The runs",
    )
    return runs


def stage_rows(stages: list[StageRun]) -> list[dict[str, object]]:
    """The stages as a table has them."""
    return [
        {
            "Stage": one.stage,
            "Status": one.status,
            "Rows in": one.rows_in,
            "Rows out": one.rows_out,
            "Skipped": one.skipped,
            "Rejected": one.rejected,
            "Seconds": one.seconds,
            "Rows/s": one.rows_per_second,
            "Shards": one.shards,
            "Written": one.bytes_written,
            "Retries": one.retries,
            "Error": one.error_type,
        }
        for one in stages
    ]


def show_stages(run_id: str, stages: list[StageRun]) -> None:
    """When each stage worked, and what became of its rows."""
    for stage in stages:
        if stage.status == "failed":
            st.error(f"`{stage.stage}` failed with {stage.error_type or 'an unknown error'}.", icon=":material/error:")
            st.code(stage.error or "No message was recorded.", language=None, wrap_lines=True)
    cards.run_chart(stages)
    st.dataframe(
        [row | {"Status": [row["Status"]]} for row in stage_rows(stages)],
        hide_index=True,
        height="content",
        placeholder="",
        column_config={
            **dict.fromkeys(["Rows in", "Rows out", "Skipped", "Rejected"], ROWS),
            "Status": STATUS,
            "Seconds": st.column_config.NumberColumn(format="%.2f"),
            "Rows/s": st.column_config.NumberColumn(format="%.0f"),
            "Written": st.column_config.NumberColumn(format="bytes"),
        },
        alt="The stages of the run",
    )
    for name in ("code_version", "model"):
        if known := sorted({value for one in stages if (value := getattr(one, name))}):
            st.caption(f"{name.replace('_', ' ').capitalize()}: `{'`, `'.join(known)}`")
    download.button("Stages as CSV", f"stages-{run_id}.csv", lambda: stage_rows(stages))


def show_comparison(run_id: str, stages: list[StageRun], runs: list[RunSummary]) -> None:
    """The run beside another one. `?with=` names that."""
    started = {one.run_id: one.started_at for one in runs}
    others = [one.run_id for one in runs if one.run_id != run_id]
    linked = st.query_params.get("with")
    if linked and linked not in others and linked != run_id:
        others.insert(0, linked)
    if not others:
        st.info("There is no other run to compare with.", icon=":material/compare_arrows:")
        return

    def choose() -> None:
        st.query_params["with"] = st.session_state["other"]

    other = st.selectbox(
        "Compare with",
        others,
        index=others.index(linked) if linked in others else 0,
        format_func=lambda one: f"{text.moment(started[one])} · {one}" if started.get(one) else one,
        key="other",
        on_change=choose,
    )
    others_stages = store.stages_of_run(engine, other)
    if not others_stages:
        st.info("There is no such run. Choose another one.", icon=":material/search_off:")
        return
    st.plotly_chart(charts.comparison(stages, others_stages), alt="Seconds of each stage in both runs")
    before = {one.stage: one for one in others_stages}
    st.dataframe(
        [
            {
                "Stage": one.stage,
                "Seconds": one.seconds,
                "Seconds, other": (beside := before.get(one.stage)) and beside.seconds,
                "Change": 100 * (one.seconds / beside.seconds - 1) if beside and beside.seconds else None,
                "Rows in": one.rows_in,
                "Rows in, other": beside and beside.rows_in,
                "Rejected": one.rejected,
                "Rejected, other": beside and beside.rejected,
                "Rows/s": one.rows_per_second,
                "Rows/s, other": beside and beside.rows_per_second,
            }
            for one in stages
        ],
        hide_index=True,
        height="content",
        placeholder="",
        column_config={
            **dict.fromkeys(["Rows in", "Rows in, other", "Rejected", "Rejected, other"], ROWS),
            **dict.fromkeys(["Seconds", "Seconds, other"], st.column_config.NumberColumn(format="%.2f")),
            **dict.fromkeys(["Rows/s", "Rows/s, other"], st.column_config.NumberColumn(format="%.0f")),
            "Change": st.column_config.NumberColumn(format="%+.0f %%", help="Of the seconds, to the other run"),
        },
        alt="Both runs, stage by stage",
    )


def show_refused(run_id: str, stages: list[StageRun]) -> None:
    """The rows that the run refused, and why."""
    rejected = sum(one.rejected for one in stages)
    if not rejected:
        st.success("Every row was taken.", icon=":material/check_circle:")
        return
    try:
        reasons = store.refusal_reasons(run_id, REASONS_OVER, REASONS)
        if not reasons:
            st.info(
                "These rows are not kept under this run any more: a later run met and refused them again, or their "
                "user was erased.",
                icon=":material/history:",
            )
            return
        kept = sum(one["rows"] for one in reasons)
        st.caption(f"{rejected:,} rows were refused. A row that a later run refuses again is shown with that run.")
        st.dataframe(
            [
                {
                    "Reason": one["_id"],
                    "Rows": one["rows"],
                    "For example": one["raw"],
                    "File": one["file"],
                    "Row": one["row"],
                }
                for one in reasons
            ],
            hide_index=True,
            column_config={"Rows": ROWS, "Reason": st.column_config.TextColumn(width="large")},
            alt="Why rows were refused",
        )
        pages = -(-min(kept, REASONS_OVER) // ON_PAGE)
        page = st.pagination(pages, key="rows", bind="query-params") if pages > 1 else 1
        st.dataframe(
            [
                {"Row": one["row"], "Reason": one["reason"], "Content": one["raw"], "File": one["file"]}
                for one in store.refused_rows(run_id, ON_PAGE, (page - 1) * ON_PAGE)
            ],
            hide_index=True,
            height=320,
            column_config={"Content": st.column_config.TextColumn(width="large")},
            alt="The rows that were refused",
        )
        download.button(
            "Rejected rows as CSV",
            f"rejected-{run_id}.csv",
            lambda: [
                {name: one[name] for name in ("file", "row", "kind", "reason", "raw", "quarantined_at")}
                for one in store.refused_rows(run_id, download.ROWS, 0)
            ],
        )
    except StoreError as error:
        st.error(f"The rejected rows cannot be read now: {error}", icon=":material/cloud_off:")


def show_attempts(run_id: str) -> None:
    """Every attempt of every task, what failed first."""
    attempts = store.attempts_of_run(engine, run_id, ATTEMPTS)
    if not attempts:
        st.info("No attempt of this run was kept.", icon=":material/history:")
        return
    failed = sum(one.status == "failed" for one in attempts)
    shown = f"the first {ATTEMPTS} of them" if len(attempts) == ATTEMPTS else f"{len(attempts)} in all"
    st.caption(f"{failed} failed; {shown}. A task that was retried has a row for each time.")
    st.dataframe(
        [
            {
                "Began": one.started_at and text.local(one.started_at),
                "Stage": one.stage,
                "Shard": one.shard,
                "Attempt": one.attempt,
                "Status": [one.status],
                "Error": one.error and f"{one.error_type}: {one.error}",
                "Rows in": one.rows_in,
                "Rows out": one.rows_out,
                "Skipped": one.skipped,
                "Rejected": one.rejected,
                "Written": one.bytes_written,
                "Seconds": one.seconds,
            }
            for one in attempts
        ],
        hide_index=True,
        placeholder="",
        column_config={
            **dict.fromkeys(["Rows in", "Rows out", "Skipped", "Rejected"], ROWS),
            "Began": st.column_config.DatetimeColumn(format="D MMM, HH:mm:ss"),
            "Status": STATUS,
            "Written": st.column_config.NumberColumn(format="bytes"),
            "Seconds": st.column_config.NumberColumn(format="%.2f"),
        },
        alt="The attempts of the run's tasks",
    )


runs = history(wanted_runs())
newest = store.latest_runs(engine, ON_PAGE)
run_id = st.query_params.get("run") or (runs or newest)[0].run_id
stages = store.stages_of_run(engine, run_id)
st.header("One run")
if not stages:
    st.info("There is no such run. Select one above.", icon=":material/search_off:")
    st.stop()

st.code(run_id, language=None)
parts = st.tabs([STAGES, COMPARE, REFUSED, TRIES, DETAILS], key="part", bind="query-params")
if parts[0].open:
    with parts[0]:
        show_stages(run_id, stages)
if parts[1].open:
    with parts[1]:
        show_comparison(run_id, stages, runs or newest)
if parts[2].open:
    with parts[2]:
        show_refused(run_id, stages)
if parts[3].open:
    with parts[3]:
        show_attempts(run_id)
if parts[4].open:
    with parts[4]:
        st.json({one.stage: one.details for one in stages if one.details})
