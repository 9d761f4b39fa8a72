"""Engagement: what each user said and did that speaks for or against each campaign, to the analytics database."""

from personalization.pipeline.lineage import StageReport
from personalization.schemas import Ref
from personalization.settings import Settings
from personalization.staging import read_column
from personalization.stores.analytics import AnalyticsStore


def roll_up_engagement(
    report: StageReport, user_pages: list[Ref], *, analytics: AnalyticsStore, settings: Settings
) -> None:
    """Set `user_engagement` of the users and the campaigns' totals, inside the database."""
    for user_ids in read_column(user_pages, "user_id"):
        report.rows_in += len(user_ids)
        report.rows_out += analytics.roll_up_engagement(user_ids, settings.profile_half_life_days)
    if user_pages:
        analytics.refresh_campaign_totals()
