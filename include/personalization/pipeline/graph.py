"""Graph: what users expressed and engaged with, to Neo4j."""

from personalization.pipeline.lineage import StageReport
from personalization.schemas import Ref
from personalization.settings import Settings
from personalization.staging import read
from personalization.stores.analytics import AnalyticsStore
from personalization.stores.mongo import MongoStore
from personalization.stores.neo4j import GraphStore

_USERS_AT_ONCE = 500


def build_graph(
    report: StageReport,
    user_page: Ref,
    *,
    mongo: MongoStore,
    analytics: AnalyticsStore,
    graph: GraphStore,
    settings: Settings,
) -> None:
    """Set the edges of a page of users from the source of truth. Pages share no user, so they may run at once.

    Three reads and one write transaction for 500 users. Users who were erased meanwhile are left out.
    """
    user_ids = read(user_page).column("user_id").to_pylist()
    report.rows_in = len(user_ids)
    edges = {"expressed": 0, "expressed_count": 0, "engaged": 0}
    for start in range(0, len(user_ids), _USERS_AT_ONCE):
        some = user_ids[start : start + _USERS_AT_ONCE]
        expressed = analytics.expressed_intents(some, settings.profile_half_life_days)
        engagement = analytics.engagement(some, settings.profile_half_life_days)
        engaged = [row for row in engagement if row.signals]
        erased = mongo.erased_among(some)
        some = [one for one in some if one not in erased]
        expressed = [row for row in expressed if row.user_id not in erased]
        engaged = [row for row in engaged if row.user_id not in erased]
        graph.write_users(some, expressed, engaged)
        edges["expressed"] += len(expressed)
        edges["expressed_count"] += sum(row.count for row in expressed)
        edges["engaged"] += len(engaged)
        report.rows_out += len(some)
        report.skipped += len(erased)
    report.totals = edges
