"""The analytics database as the pages read it: read-only, with answers kept for some seconds."""

from pathlib import Path

import streamlit as st
from personalization.quality import anomalies, reports
from personalization.settings import get_settings
from personalization.stores.analytics import analytics_errors, open_read_only
from sqlalchemy import Engine

_cached = st.cache_data(ttl="10s", show_spinner=False, hash_funcs={Engine: lambda engine: str(engine.url)})
find_anomalies = _cached(anomalies.find_anomalies)
latest_runs = _cached(reports.latest_runs)
stages_of_run = _cached(reports.stages_of_run)
stage_timings = _cached(reports.stage_timings)
latest_totals = _cached(reports.latest_totals)
campaign_engagement = _cached(reports.campaign_engagement)
category_engagement = _cached(reports.category_engagement)
top_users = _cached(reports.top_users)
latest_evaluation = _cached(reports.latest_evaluation)
evaluation_history = _cached(reports.evaluation_history)


# Kept for a minute, for a SQLite file may be deleted and made anew while the dashboard is up.
@st.cache_resource(ttl="1m", show_spinner=False, on_release=Engine.dispose)
def engine() -> Engine:
    """The database, which refuses every write."""
    with analytics_errors():
        return open_read_only(get_settings())


def is_empty() -> bool:
    """Whether there is no run to show yet: no file, no tables or no rows."""
    with analytics_errors():
        url = get_settings().analytics_database
    # Connecting would leave an empty file behind.
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
        return True
    return not reports.has_runs(engine())
