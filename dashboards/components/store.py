"""The stores as the pages read them: read-only, with answers kept for some seconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import streamlit as st
from personalization.errors import StoreError
from personalization.quality import anomalies, audits, engagement, provenance, reports, traffic, users
from personalization.quality.provenance import Trace
from personalization.schemas import Acknowledgement
from personalization.settings import get_settings
from personalization.stores.analytics import analytics_errors, open_read_only
from personalization.stores.mongo import AcknowledgementStore, MongoReader
from sqlalchemy import Engine

_cached = st.cache_data(ttl="10s", show_spinner=False, hash_funcs={Engine: lambda engine: str(engine.url)})
find_anomalies = _cached(anomalies.find_anomalies)
anomalies_since = _cached(anomalies.anomalies_since)
has_traffic = _cached(traffic.has_traffic)
routes = _cached(traffic.routes)
traffic_over_time = _cached(traffic.traffic_over_time)
counts_over_time = _cached(traffic.counts_over_time)
latest_runs = _cached(reports.latest_runs)
count_runs = _cached(reports.count_runs)
stages_of_run = _cached(reports.stages_of_run)
attempts_of_run = _cached(reports.attempts_of_run)
stage_timings = _cached(reports.stage_timings)
latest_totals = _cached(reports.latest_totals)
campaign_engagement = _cached(reports.campaign_engagement)
category_engagement = _cached(reports.category_engagement)
top_users = _cached(reports.top_users)
latest_evaluation = _cached(reports.latest_evaluation)
evaluation_history = _cached(reports.evaluation_history)
latest_audits = _cached(audits.latest_audits)
findings_of_audit = _cached(audits.findings_of)
intents_of_messages = _cached(users.intents_of_messages)
targets_of = _cached(users.targets_of)

# What only a run changes, and takes longer where there is much.
_kept = st.cache_data(ttl="5m", show_spinner=False, hash_funcs={Engine: lambda engine: str(engine.url)})
events_by_day = _kept(engagement.events_by_day)
cohorts = _kept(engagement.cohorts)


# Kept for a minute, for a SQLite file may be deleted and made anew while the dashboard is up.
@st.cache_resource(ttl="1m", show_spinner=False, on_release=Engine.dispose)
def engine() -> Engine:
    """The database, which refuses every write."""
    with analytics_errors():
        return open_read_only(get_settings())


@st.cache_resource(show_spinner=False)
def mongo() -> MongoReader:
    """Messages and refused rows."""
    return MongoReader.from_settings(get_settings())


@st.cache_resource(show_spinner=False)
def _said() -> AcknowledgementStore:
    return AcknowledgementStore.from_settings(get_settings())


@st.cache_data(ttl="10s", max_entries=20, show_spinner=False)
def acknowledgements(anomaly_ids: tuple[str, ...]) -> dict[str, Acknowledgement] | str:
    """Who has seen which of the anomalies; or why that is not known, which is remembered as long."""
    try:
        return _said().of(anomaly_ids)
    except StoreError as error:
        return str(error)


def acknowledge(some: Sequence[Acknowledgement]) -> None:
    """Keep that somebody has seen anomalies."""
    _said().acknowledge(some)
    acknowledgements.clear()


@st.cache_data(ttl="10s", show_spinner=False)
def refusal_reasons(run_id: str, rows: int, limit: int) -> list[dict[str, Any]]:
    """See `MongoReader`."""
    return mongo().refusal_reasons(run_id, rows, limit)


@st.cache_data(ttl="10s", max_entries=20, show_spinner=False)
def refused_rows(run_id: str, limit: int, offset: int) -> list[dict[str, Any]]:
    """See `MongoReader`."""
    return mongo().refused_rows(run_id, limit, offset)


@st.cache_data(ttl="10s", max_entries=100, show_spinner=False)
def messages_of(user_id: str, limit: int, offset: int) -> list[dict[str, Any]]:
    """See `MongoReader`."""
    return mongo().messages_of(user_id, limit, offset)


@st.cache_data(ttl="10s", max_entries=100, show_spinner=False)
def trace(user_id: str, campaign_id: str, message_ids: tuple[str, ...]) -> Trace:
    """Where a recommendation comes from."""
    return provenance.trace(user_id, campaign_id, engine=engine(), mongo=mongo(), message_ids=message_ids)


def is_empty() -> bool:
    """Whether there is no run to show yet: no file, no tables or no rows."""
    with analytics_errors():
        url = get_settings().analytics_database
    # Connecting would leave an empty file behind.
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
        return True
    return not reports.has_runs(engine())
