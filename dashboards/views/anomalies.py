"""What was odd, when, by what evidence; and who has seen it. The filters live in the URL."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby

import streamlit as st
from components import cards, store, text, timelines
from personalization.errors import StoreError
from personalization.quality.anomaly import Anomaly
from personalization.schemas import Acknowledgement
from pydantic import ValidationError

DAYS = {"7 days": 7, "30 days": 30, "90 days": 90, "a year": 365}
MOST = 1000
ON_PAGE = 20
OPEN, SEEN, ALL = "open", "acknowledged", "all"

Group = tuple[Anomaly, list[Anomaly]]


def acknowledgements(found: Sequence[Anomaly]) -> dict[str, Acknowledgement] | None:
    """Those of the anomalies; None, and a word about it, where MongoDB does not answer."""
    said = store.acknowledgements(tuple(one.anomaly_id for one in found))
    if isinstance(said, str):
        st.warning(f"Who has seen what cannot be read now, nor kept: {said}", icon=":material/database_off:")
        return None
    return said


def acknowledge(some: Sequence[Anomaly]) -> None:
    """A form that says who has seen them, and what they were."""
    first = some[0].anomaly_id
    with st.popover("Acknowledge", icon=":material/done_all:", key=f"popover {first}"), st.form(first):
        who = st.text_input("Your name", value=st.session_state.get("who", ""), max_chars=100)
        note = st.text_area("Note", max_chars=1000, placeholder="What it was, and what was done.")
        if st.form_submit_button("Acknowledge"):
            try:
                now = datetime.now(UTC)
                said = [Acknowledgement(anomaly_id=one.anomaly_id, who=who, note=note, at=now) for one in some]
            except ValidationError:
                st.error("Say who you are.")
                return
            try:
                store.acknowledge(said)
            except StoreError as error:
                st.error(f"It could not be kept: {error}")
                return
            st.session_state["who"] = who
            st.rerun()


def card(group: Group, seen: dict[str, Acknowledgement] | None) -> None:
    """An anomaly, how often it came, and who has seen it."""
    newest, others = group
    cards.anomaly(newest, runs=1 + len(others))
    if seen is None:
        return
    known = seen.get(newest.anomaly_id)
    if known is not None:
        st.caption(f"Acknowledged by {known.who.translate(text.MARKDOWN)}, {text.moment(known.at)}.")
        if known.note:
            st.text(known.note)
    else:
        acknowledge([newest, *others])


def groups(found: Sequence[Anomaly], seen: dict[str, Acknowledgement]) -> list[Group]:
    """What recurs is shown once, where its newest is; what somebody has seen apart from what nobody has."""

    def kind(one: Anomaly) -> tuple[str, str, str, str, bool]:
        return one.severity, one.stage, one.title, one.user_id or "", one.anomaly_id in seen

    order = {one.anomaly_id: at for at, one in enumerate(found)}
    gathered = [list(some) for _, some in groupby(sorted(found, key=kind), key=kind)]
    return sorted(((some[0], some[1:]) for some in gathered), key=lambda one: order[one[0].anomaly_id])


engine = store.engine()
now = datetime.now(UTC)
with st.container(horizontal=True, vertical_alignment="bottom"):
    span = st.segmented_control("Since", list(DAYS), default="30 days", required=True, key="since", bind="query-params")
    severity = st.segmented_control(
        "Severity", [ALL, "error", "warning"], default=ALL, required=True, key="severity", bind="query-params"
    )
    state = st.segmented_control(
        "State", [OPEN, SEEN, ALL], default=ALL, required=True, key="state", bind="query-params"
    )
since = now - timedelta(days=DAYS[span or "30 days"])
everything = store.anomalies_since(engine, since.replace(minute=0, second=0, microsecond=0), MOST)
stages = sorted({one.stage for one in everything})
chosen = st.pills("Stage", stages, selection_mode="multi", key="stage", bind="query-params") if stages else []
seen = acknowledgements(everything)
known = seen or {}
found = [
    one
    for one in everything
    if severity in (ALL, None, one.severity)
    and (not chosen or one.stage in chosen)
    and (state in (ALL, None) or (state == SEEN) == (one.anomaly_id in known))
]
if not everything:
    st.success(f"Nothing odd in the last {span}.", icon=":material/check_circle:")
    st.stop()
if not found:
    st.info("No anomaly matches these filters.", icon=":material/filter_alt_off:")
    st.stop()

columns = st.columns(3)
columns[0].metric("Errors", sum(one.severity == "error" for one in found), border=True)
columns[1].metric("Warnings", sum(one.severity == "warning" for one in found), border=True)
unseen = "—" if seen is None else sum(one.anomaly_id not in seen for one in found)
columns[2].metric("Not acknowledged", unseen, border=True)
st.plotly_chart(timelines.anomalies(found, set(known), since, now), alt="Anomalies by time and stage")

shown = groups(found, known)
pages = -(-len(shown) // ON_PAGE)
page = st.pagination(pages, key="page", bind="query-params") if pages > 1 else 1
for group in shown[(page - 1) * ON_PAGE : page * ON_PAGE]:
    card(group, seen)
if len(everything) == MOST:
    st.caption(f"The {MOST:,} newest.")
