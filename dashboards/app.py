"""Dashboard of the platform: `streamlit run dashboards/app.py`."""

import streamlit as st
from components import store
from personalization.errors import StoreError

st.set_page_config(page_title="Personalization Platform", page_icon=":material/campaign:", layout="wide")
page = st.navigation(
    [
        st.Page("views/overview.py", title="Overview", icon=":material/dashboard:", default=True),
        st.Page("views/runs.py", title="Runs", icon=":material/account_tree:"),
        st.Page("views/latency.py", title="Latency", icon=":material/timer:"),
        st.Page("views/anomalies.py", title="Anomalies", icon=":material/warning:"),
        st.Page("views/engagement.py", title="Engagement", icon=":material/favorite:"),
    ]
)
st.title(page.title)
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
