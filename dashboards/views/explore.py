"""One user: what is shown to them and why, what is not, and what they said. `?user=` names them."""

from datetime import UTC, datetime
from typing import Any

import streamlit as st
from components import api, charts, store, text
from personalization.errors import StoreError
from personalization.schemas import is_identifier

SHOWN = 5
RANKED = 50
SIMILAR = 6
IN_PICTURE = 8
CAMPAIGNS = 500
ON_PAGE = 20
SHOWS, HELD_BACK, NEIGHBOURS, SAID = "Recommendations", "Why not?", "Neighbourhood", "Messages"

engine = store.engine()


def choose_user() -> str:
    """The user of the URL, who can be typed in; explains itself where there is none."""
    user_id = (
        st.text_input("User", placeholder="the id of a user", key="user", bind="query-params", max_chars=128) or ""
    ).strip()
    if not user_id:
        st.info("Type the id of a user to see what is shown to them, and why.", icon=":material/person_search:")
        campaigns = store.campaign_engagement(engine, 1)
        known = store.top_users(engine, campaigns[0].campaign_id, 6) if campaigns else []
        if known:
            st.caption("Some who engage most:")
            with st.container(horizontal=True):
                for one in known:
                    st.page_link(
                        "views/explore.py",
                        label=one.user_id.translate(text.MARKDOWN),
                        icon=":material/person:",
                        query_params={"user": one.user_id},
                    )
        st.stop()
    if not is_identifier(user_id):
        st.warning(
            "No user has such an id: ids are 1 to 128 letters, digits or any of . : @ + = | ~ - _",
            icon=":material/person_off:",
        )
        st.stop()
    return user_id


def summary(profile: dict[str, Any]) -> None:
    """The user in four figures."""
    columns = st.columns([2, 3, 2, 2])
    columns[0].metric("Messages", text.count(profile["messages"]), border=True)
    last = _moment(profile["last_message_at"])
    columns[1].metric("Last message", f"{text.local(last):%d %b %Y}" if last else "—", border=True)
    columns[2].metric(
        "Campaigns engaged with", text.count(sum(one["weight"] > 0 for one in profile["engagement"])), border=True
    )
    columns[3].metric("Runs that took something", text.count(len(profile["runs"])), border=True)


def show_recommendations(user_id: str) -> None:
    """Today's list, each campaign with its reasons and where they come from."""
    answer = _answer(user_id, SHOWN)
    if answer["strategy"] == "popular":
        st.info("Nothing is known that would make this list personal: it is what is popular.", icon=":material/groups:")
    if degraded := answer.get("degraded"):
        st.warning(f"Without what is in {', '.join(degraded)}, which did not answer.", icon=":material/cloud_off:")
    if not answer["recommendations"]:
        st.info("Nothing is shown to this user. *Why not?* says what is held back.", icon=":material/block:")
        return
    st.plotly_chart(charts.reasons(answer["recommendations"]), alt="How much each source speaks for each campaign")
    st.caption(f"Ranked by {_plain(answer['policy'])}. The lengths are shares of the score.")
    for one in answer["recommendations"]:
        with st.expander(
            f"{one['position']}. {_plain(one['name'])} · {one['score']:.2f}",
            key=f"reasons of {one['position']}",
            on_change="rerun",
        ) as part:
            if part.open:
                show_reasons(user_id, one)


def show_reasons(user_id: str, shown: dict[str, Any]) -> None:
    """Every reason, and the user's own messages and events behind it, back to their source."""
    st.dataframe(
        [
            {"Share": one["share"], "Reason": one["text"], "Source": one["source"].replace("_", " ")}
            for one in shown["reasons"]
        ],
        hide_index=True,
        column_config={
            "Share": st.column_config.ProgressColumn(
                format="%.2f", min_value=0, max_value=max(one["share"] for one in shown["reasons"])
            ),
            "Reason": st.column_config.TextColumn(width="large"),
        },
        alt=f"Reasons for {shown['campaign_id']}",
    )
    message_ids = {
        message_id for one in shown["reasons"] for message_id in (one.get("data") or {}).get("message_ids", [])
    }
    try:
        trace = store.trace(user_id, shown["campaign_id"], tuple(sorted(message_ids)))
    except StoreError as error:
        st.error(f"Where this comes from cannot be read now: {error}", icon=":material/cloud_off:")
        return
    if not (trace.messages or trace.events):
        st.caption("Nothing of the user's own speaks for it: it rests on what others do.")
        return
    st.caption(
        f"{trace.messages_in_all:,} messages and {trace.events_in_all:,} events of the user stand behind it"
        f"{', the newest of them here' if trace.messages_in_all + trace.events_in_all > 100 else ''}."
    )
    st.dataframe(
        [
            {
                "When": text.local(one.said_at),
                "What": one.text,
                "Because of": ", ".join(intent.intent_id for intent in one.intents),
                **_source(one.source, one.run_id),
            }
            for one in trace.messages
        ]
        + [
            {"When": text.local(done.at), "What": f"({done.event})", **_source(done.source, done.run_id)}
            for done in trace.events
        ],
        hide_index=True,
        placeholder="",
        column_config={
            "When": st.column_config.DatetimeColumn(format="D MMM YYYY, HH:mm"),
            "What": st.column_config.TextColumn(width="large"),
            "Run": st.column_config.LinkColumn(display_text=r"run=(.*)"),
        },
        alt="The messages and events behind it, with the rows of the files they came in",
    )


def show_held_back(user_id: str) -> None:
    """Each campaign of the catalog that is not in the list, with what speaks against it."""
    answer, ranked = _answer(user_id, SHOWN), _answer(user_id, RANKED)
    now = datetime.now(UTC)
    shown = {one["campaign_id"] for one in answer["recommendations"]}
    excluded = {one["campaign_id"]: one for one in answer.get("excluded") or []}
    below = {one["campaign_id"]: one for one in ranked["recommendations"]}
    rows = []
    for one in store.campaign_engagement(engine, CAMPAIGNS):
        if one.campaign_id in shown:
            continue
        if held := excluded.get(one.campaign_id):
            why, rule = held["text"], held["rule"].replace("_", " ")
        elif (state := one.state(now)) != "active":
            moment = text.moment(text.local_ms(one.active_from if state == "upcoming" else one.active_until))
            why, rule = f"starts on {moment}" if state == "upcoming" else f"ended on {moment}", state
        elif lower := below.get(one.campaign_id):
            why = f"ranked at place {lower['position']}, and {SHOWN} are shown"
            rule = "ranked below"
        else:
            why, rule = f"not among the {RANKED} that rank highest, or nothing speaks for it", "ranked below"
        rows.append({"Campaign": one.name, "Rule": rule, "Why it is not shown": why, "Id": one.campaign_id})
    if not rows:
        st.success("Every campaign of the catalog is shown.", icon=":material/check_circle:")
        return
    rows.sort(key=lambda row: (row["Rule"] == "ranked below", row["Rule"]))
    st.dataframe(
        rows,
        hide_index=True,
        column_config={"Why it is not shown": st.column_config.TextColumn(width="large")},
        alt="Campaigns that are not shown to the user, and why",
    )


def show_neighbourhood(user_id: str, profile: dict[str, Any]) -> None:
    """The graph around the user."""
    near = api.ask(f"/v1/users/{user_id}/similar", top=SIMILAR)
    similar = near["similar"] if near else []
    engaged = [one for one in profile["engagement"] if one["weight"] > 0][:IN_PICTURE]
    intents = profile["intents"][:IN_PICTURE]
    targets = store.targets_of(engine, tuple(one["campaign_id"] for one in engaged))
    if not (intents or engaged or similar):
        st.info("Nothing joins this user to an intent, a campaign or another user.", icon=":material/scatter_plot:")
        return
    st.plotly_chart(
        charts.neighbourhood(user_id, intents, engaged, similar, targets),
        alt=f"The user, {len(similar)} similar users, {len(intents)} intents and {len(engaged)} campaigns",
    )
    st.caption("As of the last published run. The thicker a line, the more there is of it.")
    left, right = st.columns(2)
    left.dataframe(
        [
            {
                "Intent": one["name"] or one["intent_id"],
                "Messages": one["count"],
                "Weight now": one["weight"],
                "Confidence": one["confidence"],
                "Last": text.local(_moment(one["last_seen"]) or datetime.now(UTC)),
            }
            for one in profile["intents"]
        ],
        hide_index=True,
        column_config={"Last": st.column_config.DatetimeColumn(format="D MMM YYYY")},
        alt="Intents the user expressed",
    )
    right.dataframe(
        [{"Similar user": f"explore?user={one['user_id']}", "Similarity": one["similarity"]} for one in similar],
        hide_index=True,
        column_config={"Similar user": st.column_config.LinkColumn(display_text=r"user=(.*)")},
        alt="Users who say similar things",
    )


def show_messages(user_id: str, total: int | None) -> None:
    """What the user said, newest first."""
    try:
        pages = max(1, -(-(total or 0) // ON_PAGE))
        page = st.pagination(pages, key="page", bind="query-params") if pages > 1 else 1
        messages = store.messages_of(user_id, ON_PAGE, (page - 1) * ON_PAGE)
    except StoreError as error:
        st.error(f"The messages cannot be read now: {error}", icon=":material/cloud_off:")
        return
    if not messages:
        st.info("No message of this user is stored.", icon=":material/chat_bubble_outline:")
        return
    intents = store.intents_of_messages(engine, tuple(one["_id"] for one in messages))
    st.dataframe(
        [
            {
                "When": text.local(one["timestamp"]),
                "Message": one["message"],
                "Intents": ", ".join(intent for intent, _ in intents.get(one["_id"], [])),
                "File": (one["source"] or {}).get("uri"),
                "Row": (one["source"] or {}).get("row"),
                "Run": f"runs?run={one['run_id']}",
            }
            for one in messages
        ],
        hide_index=True,
        height="content",
        placeholder="",
        column_config={
            "When": st.column_config.DatetimeColumn(format="D MMM YYYY, HH:mm"),
            "Message": st.column_config.TextColumn(width="large"),
            "Run": st.column_config.LinkColumn(display_text=r"run=(.*)"),
        },
        alt="Messages of the user",
    )


def _answer(user_id: str, top: int) -> dict[str, Any]:
    return api.ask(f"/v1/recommendations/{user_id}", top=top, explain=True) or {}


def _source(source: Any, run_id: str) -> dict[str, Any]:
    return {"File": source and source.uri, "Row": source and source.row, "Run": f"runs?run={run_id}"}


def _moment(value: str | None) -> datetime | None:
    return datetime.fromisoformat(value) if value else None


def _plain(value: str) -> str:
    """Text of others as a label shows it, to the letter."""
    return value.translate(text.MARKDOWN)


user_id = choose_user()
profile, down = None, None
try:
    profile = api.ask(f"/v1/users/{user_id}/profile")
except StoreError as error:
    down = error
if profile:
    summary(profile)
elif not down:
    st.info(
        "Nothing is known of this user: what is recommended to them is what is popular.", icon=":material/person_off:"
    )
parts = st.tabs([SHOWS, HELD_BACK, NEIGHBOURS, SAID], key="part", bind="query-params")
for part, name in zip(parts, (SHOWS, HELD_BACK, NEIGHBOURS, SAID), strict=True):
    if not part.open:
        continue
    with part:
        try:
            if name == SAID:
                show_messages(user_id, profile["messages"] if profile else None)
            elif down:
                raise down
            elif name == SHOWS:
                show_recommendations(user_id)
            elif name == HELD_BACK:
                show_held_back(user_id)
            elif profile:
                show_neighbourhood(user_id, profile)
            else:
                st.info("The graph holds nothing of this user.", icon=":material/scatter_plot:")
        except StoreError as error:
            st.error(f"The API cannot be asked now: {error}", icon=":material/cloud_off:")
