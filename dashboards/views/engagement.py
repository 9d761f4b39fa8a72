"""Which campaigns users speak about."""

from datetime import UTC, datetime

import streamlit as st
from components import charts, store, text

IN_CHART = 15
IN_TABLE = 500
TOP_USERS = 10

engine = store.engine()
now = datetime.now(UTC)
campaigns = store.campaign_engagement(engine, IN_TABLE)
if not any(one.messages for one in campaigns):
    st.info(
        "No message speaks to a campaign yet. Run `make demo`, or add campaigns to the catalog and run the pipeline.",
        icon=":material/rocket_launch:",
    )
    st.stop()

categories = store.category_engagement(engine, IN_CHART)
columns = st.columns([2, 2, 3])
columns[0].metric("Campaigns", f"{len(campaigns):,}", border=True)
columns[1].metric("Active today", f"{sum(one.state(now) == 'active' for one in campaigns):,}", border=True)
columns[2].metric(
    "Last activity",
    text.moment(text.local_ms(max(one.last_at for one in campaigns if one.last_at))),
    border=True,
)

st.subheader("Campaigns")
st.caption(f"The {IN_CHART} with most users. Hatched: not active today.")
st.plotly_chart(charts.campaigns(campaigns[:IN_CHART], now), alt="Users and messages of each campaign")

left, right = st.columns(2, gap="large")
with left:
    st.subheader("Categories")
    st.caption("Messages by category; one that speaks to two campaigns counts for both.")
    st.plotly_chart(charts.categories(categories), alt="Messages of each category")
with right:
    st.subheader("Most engaged users")
    campaign = st.selectbox("Campaign", campaigns, format_func=lambda one: one.name, label_visibility="collapsed")
    if users := store.top_users(engine, campaign.campaign_id, TOP_USERS):
        st.plotly_chart(charts.users(users), alt="Messages of the most engaged users")
    else:
        st.caption("Nobody yet.")

st.subheader("All campaigns")
st.dataframe(
    [
        {
            "Campaign": one.name,
            "Category": one.category,
            "State": [one.state(now)],
            "Users": one.users,
            "Messages": one.messages,
            "Last activity": text.local_ms(one.last_at) if one.last_at else None,
        }
        for one in campaigns
    ],
    hide_index=True,
    placeholder="",
    column_config={
        "State": st.column_config.MultiselectColumn(
            options=["active", "upcoming", "ended"], color=["green", "blue", "gray"]
        ),
        "Last activity": st.column_config.DatetimeColumn(format="D MMM YYYY, HH:mm"),
    },
    alt="All campaigns",
)
