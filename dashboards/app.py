"""Dashboard of the platform: `streamlit run dashboards/app.py`."""

from pathlib import Path

import streamlit as st
from components import login, store, text
from personalization.errors import StoreError

NAME = "Personalization Platform"

# A file, for the icons that Streamlit knows by name are fetched from the internet.
st.set_page_config(page_title=NAME, page_icon=Path(__file__).with_name("icon.svg"), layout="wide")
page = st.navigation(
    {
        NAME: [
            st.Page("views/overview.py", title="Overview", icon=":material/dashboard:", default=True),
            st.Page("views/runs.py", title="Runs", icon=":material/account_tree:"),
            st.Page("views/latency.py", title="Latency", icon=":material/timer:"),
            st.Page("views/anomalies.py", title="Anomalies", icon=":material/warning:"),
            st.Page("views/audit.py", title="Audit", icon=":material/fact_check:"),
            st.Page("views/engagement.py", title="Engagement", icon=":material/favorite:"),
            st.Page("views/explore.py", title="Explore a user", icon=":material/person_search:"),
        ],
        "Recommendations": [
            st.Page("views/evaluation.py", title="Evaluation", icon=":material/leaderboard:"),
        ],
    }
)
st.sidebar.caption(f"Times are in {text.zone()}.")
if login.is_guarded():
    st.sidebar.html(f'<a href="{login.LOGOUT}" target="_self">Log out</a>')
st.title(page.title)
if login.is_open_to_others():
    st.error(
        "Served to other machines, the dashboard asks for a password: start it by "
        "`streamlit run dashboards/serve.py`, as the README says.",
        icon=":material/lock:",
    )
    st.stop()
try:
    if store.is_empty():
        st.info(
            "Nothing has run yet. Run `make demo` to send example conversations through the pipeline, "
            "then reload this page.",
            icon=":material/rocket_launch:",
        )
    else:
        page.run()
except StoreError as error:
    st.error(f"The analytics database cannot be read: {error}", icon=":material/database_off:")
