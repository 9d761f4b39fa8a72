"""Rules: what the catalog forbids, caps, boosts and pins. Each exclusion says which rule, and why."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from personalization.schemas import DAY_MS, Campaign, CatalogRules, EventKind, Exclusion


@dataclass(frozen=True)
class PastEvent:
    """An event of the user, as far back as any rule looks."""

    campaign_id: str
    event: EventKind
    at: int
    """Epoch milliseconds."""


@dataclass(frozen=True)
class Viewer:
    """What rules ask about a user."""

    user_id: str
    intent_ids: frozenset[str]
    events: list[PastEvent]

    def times(self, campaign_id: str, event: EventKind) -> list[int]:
        """When it happened."""
        return [one.at for one in self.events if one.campaign_id == campaign_id and one.event == event]


@dataclass
class Chosen:
    """A list by the rules, and what was left out."""

    campaign_ids: list[str]
    excluded: list[Exclusion] = field(default_factory=list)


def exclusions(
    campaigns: Sequence[Campaign], viewer: Viewer, now_ms: int, *, category: str | None = None
) -> list[Exclusion]:
    """Campaigns the user must not be shown now, the first rule that says so for each."""
    found = []
    for campaign in campaigns:
        for rule, text in _objections(campaign, viewer, now_ms, category):
            found.append(Exclusion(campaign_id=campaign.id, rule=rule, text=text))
            break
    return found


def _objections(campaign: Campaign, viewer: Viewer, now_ms: int, category: str | None) -> Iterator[tuple[str, str]]:
    audience = campaign.audience
    if now_ms < campaign.active_from_ms:
        yield "window", f"starts on {campaign.active_from:%Y-%m-%d}"
    if now_ms >= campaign.active_until_ms:
        yield "window", f"ended on {campaign.active_until:%Y-%m-%d}"
    if category is not None and campaign.category != category:
        yield "category", f"is of the category {campaign.category}"
    if viewer.user_id in audience.exclude_users:
        yield "audience", "excludes this user"
    if audience.include_users and viewer.user_id not in audience.include_users:
        yield "audience", "is for named users only"
    if audience.include_intents and not viewer.intent_ids & set(audience.include_intents):
        yield "audience", f"is for users who expressed {', '.join(audience.include_intents)}"
    if unwanted := viewer.intent_ids & set(audience.exclude_intents):
        yield "audience", f"is not for users who expressed {', '.join(sorted(unwanted))}"
    yield from _not_again(campaign, viewer, now_ms)
    if campaign.frequency_cap is not None:
        since = now_ms - campaign.frequency_cap.days * DAY_MS
        shown = sum(at > since for at in viewer.times(campaign.id, "impression"))
        if shown >= campaign.frequency_cap.impressions:
            yield "frequency_cap", f"shown {shown} times within {campaign.frequency_cap.days:g} days"


def _not_again(campaign: Campaign, viewer: Viewer, now_ms: int) -> Iterator[tuple[str, str]]:
    for event, days, words in (
        ("conversion", campaign.not_again.after_conversion_days, "converted"),
        ("dismiss", campaign.not_again.after_dismiss_days, "dismissed it"),
    ):
        times = viewer.times(campaign.id, event)  # type: ignore[arg-type]
        if times and days and now_ms - max(times) < days * DAY_MS:
            ago = (now_ms - max(times)) // DAY_MS
            yield f"not_again_after_{event}", f"the user {words} {ago} days ago; not again for {days:g} days"


def arrange(ranked: Sequence[Campaign], rules: CatalogRules, top: int) -> Chosen:
    """The first `top` of the ranked campaigns: pinned ones at their places, categories capped.

    Those over a category's cap come back only where nothing else is left to fill the list.
    """
    pinned = sorted((one for one in ranked if one.pinned is not None), key=lambda one: one.pinned or 0)
    chosen: list[Campaign] = []
    over: list[Campaign] = []
    of_category: dict[str, int] = defaultdict(int)
    for one in [*pinned, *(one for one in ranked if one.pinned is None)]:
        if rules.max_per_category and one.pinned is None and of_category[one.category] >= rules.max_per_category:
            over.append(one)
        else:
            of_category[one.category] += 1
            chosen.append(one)
    free = [*(one for one in chosen if one.pinned is None), *over][:top]
    for one in pinned:
        free.insert((one.pinned or 1) - 1, one)
    placed = free[:top]
    kept = {one.id for one in placed}
    excluded = [
        Exclusion(
            campaign_id=one.id,
            rule="max_per_category",
            text=f"the list holds {rules.max_per_category} of the category {one.category} already",
        )
        for one in over
        if one.id not in kept
    ]
    return Chosen([one.id for one in placed], excluded)
