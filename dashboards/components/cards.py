"""Pieces that more than one page shows."""

from typing import Literal, NamedTuple

import streamlit as st
from personalization.quality.anomalies import Anomaly
from personalization.quality.reports import StageRun

from components import charts, text

RUN_PAGE = "views/runs.py"
_BADGES: dict[str, tuple[str, Literal["green", "orange", "red", "gray"]]] = {
    "good": (":material/check_circle:", "green"),
    "warn": (":material/warning:", "orange"),
    "bad": (":material/error:", "red"),
    "unknown": (":material/help:", "gray"),
}


class Verdict(NamedTuple):
    """How something is."""

    kind: Literal["good", "warn", "bad", "unknown"]
    text: str


def answer(question: str, verdict: Verdict, detail: str, page: str, query: dict[str, str]) -> None:
    """A question, its answer by sign, colour and words, and a link to where there is more."""
    icon, color = _BADGES[verdict.kind]
    with st.container(border=True, height="stretch", gap="small"):
        st.page_link(
            page, label=f"**{question}**", icon=":material/arrow_forward:", icon_position="right", query_params=query
        )
        st.badge(verdict.text, icon=icon, color=color)
        if detail:
            st.caption(detail)


def anomaly(shown: Anomaly, runs: int = 1) -> None:
    """An anomaly, the number of runs it is in, and a link to the run."""
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            if shown.severity == "error":
                st.badge("error", icon=":material/error:", color="red")
            else:
                st.badge("warning", icon=":material/warning:", color="orange")
            st.markdown(f"**{shown.title}** in `{shown.stage}`", width="content")
            if runs > 1:
                st.badge(f"{runs} runs", color="gray")
            st.space("stretch")
            if shown.run_id is None:
                st.caption(f"Since {text.moment(shown.run_started_at)}", width="content")
            else:
                st.page_link(
                    RUN_PAGE,
                    label=f"Run of {text.moment(shown.run_started_at)}",
                    icon=":material/arrow_forward:",
                    icon_position="right",
                    query_params={"run": shown.run_id},
                )
        # Not Markdown: errors hold what users and drivers wrote.
        st.text(shown.evidence)
        st.markdown(f":material/build: {shown.advice}")


def status(value: str) -> None:
    """How a run ended."""
    if value == "success":
        st.badge("success", icon=":material/check_circle:", color="green")
    else:
        st.badge(value, icon=":material/cancel:", color="red")


def run_chart(stages: list[StageRun]) -> None:
    """The stages of a run as a picture."""
    st.plotly_chart(charts.run(stages), alt="Time and rows of each stage of the run")
