"""What the analytics database knows of messages, and of what campaigns target."""

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import Engine, select

from personalization.stores.analytics import analytics_errors
from personalization.stores.tables import CampaignTarget, MessageIntent


def intents_of_messages(engine: Engine, message_ids: Sequence[str]) -> dict[str, list[tuple[str, float]]]:
    """(intent, confidence) of each message, surest first. One look-up by key."""
    query = (
        select(MessageIntent.message_id, MessageIntent.intent_id, MessageIntent.confidence)
        .where(MessageIntent.message_id.in_(message_ids))
        .order_by(MessageIntent.message_id, MessageIntent.confidence.desc())
    )
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    with analytics_errors(), engine.connect() as connection:
        for message_id, intent_id, confidence in connection.execute(query):
            found[message_id].append((intent_id, confidence))
    return dict(found)


def targets_of(engine: Engine, campaign_ids: Sequence[str]) -> list[tuple[str, str]]:
    """(campaign, intent it targets) of the campaigns. One look-up by key."""
    query = select(CampaignTarget.campaign_id, CampaignTarget.intent_id).where(
        CampaignTarget.campaign_id.in_(campaign_ids)
    )
    with analytics_errors(), engine.connect() as connection:
        return [(campaign_id, intent_id) for campaign_id, intent_id in connection.execute(query)]
