"""What users do with campaigns: over time, step by step, and whether they come back."""

from datetime import UTC, datetime, timedelta

import streamlit as st
from components import charts, download, store, text
from personalization.quality.engagement import share
from personalization.quality.reports import CampaignEngagement

IN_CHART = 15
IN_TABLE = 500
TOP_USERS = 10
WEEKS = 12
ALL = "All campaigns"

engine = store.engine()
now = datetime.now(UTC)
campaigns = store.campaign_engagement(engine, IN_TABLE)
if not any(one.messages or one.impressions or one.clicks for one in campaigns):
    st.info(
        "No message speaks to a campaign yet. Run `make demo`, or add campaigns to the catalog and run the pipeline.",
        icon=":material/rocket_launch:",
    )
    st.stop()


def totals() -> None:
    """All campaigns in four figures."""
    shown, clicked = sum(one.shown_to for one in campaigns), sum(one.clicked_by for one in campaigns)
    clicks = share(clicked, shown)
    columns = st.columns([2, 2, 2, 3])
    columns[0].metric("Campaigns", f"{len(campaigns):,}", border=True)
    columns[1].metric("Active today", f"{sum(one.state(now) == 'active' for one in campaigns):,}", border=True)
    columns[2].metric(
        "Clicked, where shown",
        f"{clicks.mean:.1%}" if clicks else "—",
        border=True,
        help="Of the users who saw a campaign, taken for each campaign on its own.",
    )
    last = max((one.last_at for one in campaigns if one.last_at), default=None)
    columns[3].metric("Last message", f"{text.local_ms(last):%d %b %Y}" if last else "—", border=True)


def over_time() -> None:
    """Events by day, of all campaigns or one. `?days=` and `?campaign=` say which."""
    names = {one.campaign_id: one.name for one in campaigns}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        days = st.segmented_control("Days", [30, 90, 365], default=30, required=True, key="days", bind="query-params")
        chosen = st.selectbox(
            "Campaign",
            [ALL, *names],
            format_func=lambda one: names.get(one, one),
            key="campaign",
            bind="query-params",
        )
    # By whole days, for the answer to be kept.
    since = datetime.combine(now.date() - timedelta(days=int(days or 30) - 1), datetime.min.time(), UTC)
    events = store.events_by_day(engine, since, None if chosen == ALL else chosen)
    if not events:
        st.info("No event in these days. Events come in files or by the API.", icon=":material/event_busy:")
        return
    st.plotly_chart(charts.events_by_day(events, since.date(), now.date()), alt="Events of each kind by day")
    st.caption("Days are UTC's.")


def funnel() -> None:
    """From seeing to clicking to converting, by campaign."""
    shown = sorted((one for one in campaigns if one.shown_to), key=lambda one: -one.shown_to)[:IN_CHART]
    if not shown:
        st.info("Nothing was shown yet, as far as events tell.", icon=":material/visibility_off:")
        return
    st.plotly_chart(charts.funnel(shown), alt="Shares of users who clicked and who converted, with intervals")
    st.caption(
        f"Of the users who saw a campaign, those who clicked; of these, those who converted. The {len(shown)} that "
        "most users saw, with 95 % intervals by Wilson's score: where they overlap, chance may explain the difference."
    )


def cohorts() -> None:
    """Who came back, by the week of their first message or event."""
    found = store.cohorts(engine, WEEKS, datetime.combine(now.date(), datetime.min.time(), UTC))
    if not found:
        st.info(f"No user came new in the last {WEEKS} weeks.", icon=":material/group_off:")
        return
    st.plotly_chart(charts.cohorts(found), alt="Share of the users of each first week who were active in later weeks")
    st.caption("Active: spoke, clicked, converted or dismissed something. Weeks begin on Monday, in UTC.")


def mentions() -> None:
    """Campaigns and categories by what users say, and who says most."""
    some = [one for one in campaigns if one.messages][:IN_CHART]
    if not some:
        st.caption("No message speaks to a campaign yet.")
        return
    st.caption(f"The {len(some)} with most users. Hatched: not active today.")
    st.plotly_chart(charts.campaigns(some, now), alt="Users and messages of each campaign")
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown("**Categories**")
        st.caption("A message that speaks to two campaigns counts for both.")
        st.plotly_chart(charts.categories(store.category_engagement(engine, IN_CHART)), alt="Messages of each category")
    with right:
        st.markdown("**Most engaged users**")
        campaign = st.selectbox("Campaign", some, format_func=lambda one: one.name, label_visibility="collapsed")
        users = store.top_users(engine, campaign.campaign_id, TOP_USERS)
        st.plotly_chart(charts.users(users), alt="Messages of the most engaged users")
        with st.container(horizontal=True, gap="small"):
            for one in users[:5]:
                st.page_link(
                    "views/explore.py", label=one.user_id.translate(text.MARKDOWN), query_params={"user": one.user_id}
                )


def rows(some: list[CampaignEngagement]) -> list[dict[str, object]]:
    """The campaigns as a table has them."""
    return [
        {
            "Campaign": one.name,
            "Category": one.category,
            "State": one.state(now),
            "Users": one.users,
            "Messages": one.messages,
            "Shown to": one.shown_to,
            "Clicked by": one.clicked_by,
            "Converted by": one.converted_by,
            "Dismissed": one.dismisses,
            "Last message": text.local_ms(one.last_at) if one.last_at else None,
        }
        for one in some
    ]


totals()
st.header("Over time")
over_time()
st.header("From seen to converted")
funnel()
st.header("Who comes back")
cohorts()
st.header("What users speak about")
mentions()
st.header("All campaigns")
st.dataframe(
    [row | {"State": [row["State"]]} for row in rows(campaigns)],
    hide_index=True,
    placeholder="",
    column_config={
        "State": st.column_config.MultiselectColumn(
            options=["active", "upcoming", "ended"], color=["green", "blue", "gray"]
        ),
        "Last message": st.column_config.DatetimeColumn(format="D MMM YYYY, HH:mm"),
    },
    alt="All campaigns",
)
download.button("Campaigns as CSV", "campaigns.csv", lambda: rows(campaigns))
