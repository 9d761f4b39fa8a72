"""Whether the stores agree: the last audit, what it found and what to do, and the audits before it."""

import streamlit as st
from components import store, text
from personalization.quality.audits import Audit, Finding

HISTORY = 100
STATES = {
    "clean": ("The stores agree", ":material/check_circle:", "green"),
    "repaired": ("Mended: the stores agree", ":material/build_circle:", "green"),
    "drift": ("The stores do not agree", ":material/cancel:", "red"),
}
STORES = {"mongodb": "MongoDB", "milvus": "Milvus", "neo4j": "Neo4j", "analytics": "SQL", "redis": "Redis"}


def finding(shown: Finding) -> None:
    """A kind of drift with its evidence."""
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            if not shown.is_left:
                st.badge("mended", icon=":material/check_circle:", color="green")
            elif shown.severity == "error":
                st.badge("error", icon=":material/error:", color="red")
            else:
                st.badge("warning", icon=":material/warning:", color="orange")
            st.markdown(f"**{shown.title}** in {STORES.get(shown.store, shown.store)}", width="content")
            st.badge(f"{text.count(shown.count)} found", color="gray")
            if shown.left:
                st.badge(f"{text.count(shown.left)} left", color="red")
        st.markdown(shown.meaning)
        if shown.is_left:
            st.markdown(f":material/build: {shown.advice}.".replace("..", "."))
        st.dataframe(
            [{"Id": one.item, "Should be": one.expected, "Is": one.found} for one in shown.cases],
            hide_index=True,
            placeholder="—",
            alt=f"Some of the cases: {shown.title}",
        )
        if shown.count > len(shown.cases):
            st.caption(f"The first {len(shown.cases)} of {text.count(shown.count)}.")


def name(audit: Audit) -> str:
    """What an audit is called in the list."""
    return f"{text.moment(audit.started_at)}: {STATES[audit.status][0].lower()}"


engine = store.engine()
audits = {one.audit_id: one for one in store.latest_audits(engine, HISTORY)}
if not audits:
    st.info(
        "The stores have not been compared yet. The DAG `store_audit` does so after each run, and "
        "`python -m personalization audit` at once.",
        icon=":material/fact_check:",
    )
    st.stop()

asked = st.query_params.get("audit")  # a link may name an audit that is gone
chosen = st.selectbox(
    "Audit",
    list(audits),
    index=list(audits).index(asked) if asked in audits else 0,
    format_func=lambda audit_id: name(audits[audit_id]),
)
st.query_params["audit"] = chosen
shown = audits[chosen]
title, icon, _ = STATES[shown.status]
if shown.status == "drift":
    st.error(f"{title}: {text.count(shown.left)} {'case is' if shown.left == 1 else 'cases are'} left.", icon=icon)
else:
    st.success(f"{title}.", icon=icon)

columns = st.columns(4)
columns[0].metric("Took", text.duration(shown.seconds), border=True)
columns[1].metric("Kinds of drift", text.count(shown.findings), border=True)
columns[2].metric("Cases found", text.count(shown.drift), border=True)
columns[3].metric("Cases left", text.count(shown.left), border=True)
if shown.in_flux:
    st.info(
        f"{text.count(shown.in_flux)} messages of a run at work were not compared; the next audit does.",
        icon=":material/hourglass_top:",
    )

for one in store.findings_of_audit(engine, shown.audit_id):
    finding(one)

st.header("What was compared")
st.caption("Ids, edges and vectors that were read, each once.")
st.dataframe(
    [
        {"Store": STORES.get(name, name), "What": what, "Read": rows}
        for name, kinds in shown.compared.items()
        for what, rows in kinds.items()
    ],
    hide_index=True,
    height="content",
    column_config={"Read": st.column_config.NumberColumn(format="localized")},
    alt="Rows read, by store",
)

st.header("Audits before")
st.dataframe(
    [
        {
            "Started": text.local(one.started_at),
            "State": STATES[one.status][0],
            "Repair": "yes" if one.repair else "no",
            "Found": one.drift,
            "Left": one.left,
            "Seconds": one.seconds,
        }
        for one in audits.values()
    ],
    hide_index=True,
    column_config={
        "Started": st.column_config.DatetimeColumn(format="D MMM YYYY, HH:mm"),
        "Found": st.column_config.NumberColumn(format="localized"),
        "Left": st.column_config.NumberColumn(format="localized"),
        "Seconds": st.column_config.NumberColumn(format="%.1f"),
    },
    alt=f"The latest {len(audits)} audits",
)
