"""Whether what is shown is worth more than what anybody would show, as replayed on the past."""

import streamlit as st
from components import charts, store, text
from personalization.quality.reports import SHIPPED

BASELINE = "popularity"
EVALUATIONS = 52
METRICS = ("ndcg@10", "recall@5", "recall@10", "mrr", "hit_rate@10", "novelty@10", "coverage@10")
CALIBRATION = ("expected_calibration_error", "brier", "mean_probability", "engaged")

engine = store.engine()
latest = store.latest_evaluation(engine)
if latest is None:
    st.info(
        "Nothing has been evaluated yet. Trigger the DAG `offline_evaluation` in Airflow once there are clicks and "
        "conversions, then reload this page. `make evaluate` compares the rankers on files, without the platform.",
        icon=":material/leaderboard:",
    )
    st.stop()

ranking = latest.of("ndcg@10")
shipped = next((one for one in ranking if one.policy == SHIPPED), None)
best = next((one for one in ranking if one.kind == "baseline"), None)

columns = st.columns(4)
if shipped:
    columns[0].metric("NDCG@10 of what is shown", f"{shipped.mean:.3f}", border=True)
if best:
    ahead = "—" if best.diff_mean is None else f"{best.diff_mean:+.3f}"
    columns[1].metric(f"Ahead of {best.policy}", ahead, border=True, help="The best of what anybody would show.")
columns[2].metric("Answers", text.count(latest.answers), border=True, help="Lists that a user then acted on.")
columns[3].metric("Users", text.count(latest.users), border=True)
if best and best.diff_low is not None and best.diff_high is not None:
    if best.diff_high < 0:
        st.warning(f"`{best.policy}` is ahead of what is shown, by more than chance.", icon=":material/trending_down:")
    elif best.diff_low <= 0:
        st.info(
            f"Chance may explain the difference to `{best.policy}`: more weeks or more feedback would tell.",
            icon=":material/balance:",
        )
task = "campaigns new to the user" if latest.task == "new" else "all campaigns"
st.caption(
    f"Replayed on {text.moment(latest.created_at)}, over {task}. Splits: {latest.splits}, from "
    f"{text.moment(latest.split_at)} on, each with the {latest.horizon_days:g} days behind it. Bars are 95 % intervals "
    f"over users."
)

st.header("Policies")
st.plotly_chart(charts.policies(ranking), alt="NDCG@10 of each policy, and how far the shipped one is ahead")

st.header("Cold and warm users")
st.caption("Cold: at most one message and no engagement were known.")
st.plotly_chart(
    charts.segments(latest.of("ndcg@10", "cold"), latest.of("ndcg@10", "warm")),
    alt="NDCG@10 of each policy for cold and for warm users",
)

st.header("Over time")
st.caption(f"Beside *{BASELINE}*, for weeks differ in how hard they are: what counts is the gap.")
history = store.evaluation_history(engine, latest.task, (SHIPPED, BASELINE), EVALUATIONS)
st.plotly_chart(charts.evaluations(history), alt="NDCG@10 over the evaluations")

figures = {metric: {one.policy: one for one in latest.of(metric)} for metric in (*METRICS, *CALIBRATION)}
calibrated = [one.policy for one in ranking if one.policy in figures["brier"]]
if calibrated:
    st.header("Calibration")
    st.caption("How far the learned rankers' probabilities are from what then happened.")
    st.dataframe(
        [
            {"Policy": policy} | {name.replace("_", " "): figures[name][policy].mean for name in CALIBRATION}
            for policy in calibrated
        ],
        hide_index=True,
        column_config={name.replace("_", " "): st.column_config.NumberColumn(format="%.4f") for name in CALIBRATION},
        alt="Calibration of the learned rankers",
    )

st.header("All metrics")
st.dataframe(
    [{"Policy": one.policy} | {metric: figures[metric][one.policy].mean for metric in METRICS} for one in ranking],
    hide_index=True,
    placeholder="",
    column_config={metric: st.column_config.NumberColumn(format="%.3f") for metric in METRICS},
    alt="The means of every metric",
)
