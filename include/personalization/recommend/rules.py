"""Rules: what the catalog forbids, caps, boosts and pins. Each exclusion says which rule, and why."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
    intents_known: bool = True
    """Not where the store that knows them could not be asked."""

    def times(self, campaign_id: str, event: EventKind) -> list[int]:
        """When it happened."""
        return self._times.get((campaign_id, event), [])

    @cached_property
    def campaign_ids(self) -> frozenset[str]:
        """Campaigns that the events are of."""
        return frozenset(one.campaign_id for one in self.events)

    @cached_property
    def _times(self) -> dict[tuple[str, EventKind], list[int]]:
        times: dict[tuple[str, EventKind], list[int]] = defaultdict(list)
        for one in self.events:
            times[one.campaign_id, one.event].append(one.at)
        return times


@dataclass
class Chosen:
    """A list by the rules, what could stand in for its last, and what was left out."""

    campaign_ids: list[str]
    spare: list[str] = field(default_factory=list)
    """The ranked others that may take the last place instead; none where that is pinned."""
    excluded: list[Exclusion] = field(default_factory=list)


def exclusions(
    campaigns: Sequence[Campaign],
    viewer: Viewer,
    now_ms: int,
    *,
    category: str | None = None,
    unwanted: Collection[str] = (),
) -> list[Exclusion]:
    """Campaigns the user must not be shown now, the first rule that says so for each."""
    found = []
    for campaign in campaigns:
        if campaign.id in unwanted:
            found.append(Exclusion(campaign_id=campaign.id, rule="exclude", text="was not wanted by who asked"))
            continue
        for rule, text in _objections(campaign, viewer, now_ms, category):
            found.append(Exclusion(campaign_id=campaign.id, rule=rule, text=text))
            break
    return found


def _objections(campaign: Campaign, viewer: Viewer, now_ms: int, category: str | None) -> Iterator[tuple[str, str]]:
    if now_ms < campaign.active_from_ms:
        yield "window", f"starts on {campaign.active_from:%Y-%m-%d}"
    if now_ms >= campaign.active_until_ms:
        yield "window", f"ended on {campaign.active_until:%Y-%m-%d}"
    if category is not None and campaign.category != category:
        yield "category", f"is of the category {campaign.category}"
    yield from _outside(campaign, viewer)
    yield from _not_again(campaign, viewer, now_ms)
    if campaign.frequency_cap is not None:
        since = now_ms - campaign.frequency_cap.days * DAY_MS
        shown = sum(at > since for at in viewer.times(campaign.id, "impression"))
        if shown >= campaign.frequency_cap.impressions:
            yield "frequency_cap", f"shown {shown}× within {_days(campaign.frequency_cap.days)}"


def _outside(campaign: Campaign, viewer: Viewer) -> Iterator[tuple[str, str]]:
    audience = campaign.audience
    if viewer.user_id in audience.exclude_users:
        yield "audience", "excludes this user"
    if audience.include_users and viewer.user_id not in audience.include_users:
        yield "audience", "is for named users only"
    if audience.include_intents and not viewer.intent_ids & set(audience.include_intents):
        yield "audience", f"is for users who expressed {', '.join(audience.include_intents)}"
    if audience.exclude_intents and not viewer.intents_known:
        yield "audience", "is not for all users, and what this one expressed cannot be looked up now"
    if unwanted := viewer.intent_ids & set(audience.exclude_intents):
        yield "audience", f"is not for users who expressed {', '.join(sorted(unwanted))}"


def _not_again(campaign: Campaign, viewer: Viewer, now_ms: int) -> Iterator[tuple[str, str]]:
    for event, days, words in (
        ("conversion", campaign.not_again.after_conversion_days, "converted"),
        ("dismiss", campaign.not_again.after_dismiss_days, "dismissed it"),
    ):
        times = viewer.times(campaign.id, event)  # type: ignore[arg-type]
        if times and days and now_ms - max(times) < days * DAY_MS:
            ago = max(now_ms - max(times), 0) // DAY_MS
            when = f"{_days(ago)} ago" if ago else "within the last day"
            yield f"not_again_after_{event}", f"the user {words} {when}; not again for {_days(days)}"


def _days(days: float) -> str:
    return f"{days:g} day{'' if days == 1 else 's'}"


def arrange(ranked: Sequence[Campaign], rules: CatalogRules, top: int) -> Chosen:
    """The first `top` of the ranked campaigns: pinned ones at their places, categories capped.

    Those over a category's cap come back only where nothing else is left to fill the list. Of two pinned to
    one place, the better ranked gets it. A place behind the end of a short list is its last.
    """
    pinned = sorted((one for one in ranked if one.pinned is not None), key=_place)
    free = [one for one in ranked if one.pinned is None]
    within, over = _capped(free, rules, Counter(one.category for one in pinned if _place(one) <= top))
    shown = _listed([*within, *over], pinned, top)
    kept = {one.id for one in shown}
    by_rank = {one.id for one in _listed(free, pinned, top)}
    excluded = [
        Exclusion(
            campaign_id=one.id,
            rule="max_per_category",
            text=f"the list holds {rules.max_per_category} of the category {one.category} already",
        )
        for one in over
        if one.id in by_rank - kept
    ]
    spare: list[str] = []
    if len(shown) == top and shown and shown[-1].pinned is None:
        rest = [one for one in free if one.id not in kept]
        fitting, unfitting = _capped(rest, rules, Counter(one.category for one in shown[:-1]), each=True)
        # Where the list is filled up from beyond the caps, they no longer bind.
        spare = [one.id for one in (unfitting if shown[-1] in over else fitting)]
    return Chosen([one.id for one in shown], spare, excluded)


def _place(campaign: Campaign) -> int:
    return campaign.pinned or 0


def _capped(
    ranked: Sequence[Campaign], rules: CatalogRules, of_category: Counter[str], *, each: bool = False
) -> tuple[list[Campaign], list[Campaign]]:
    """Those within the cap of their category and those over it; with `each`, as if it were the only one to join."""
    if not rules.max_per_category:
        return list(ranked), []
    within: list[Campaign] = []
    over: list[Campaign] = []
    for one in ranked:
        if of_category[one.category] >= rules.max_per_category:
            over.append(one)
        else:
            of_category[one.category] += not each
            within.append(one)
    return within, over


def _listed(free: Sequence[Campaign], pinned: Sequence[Campaign], top: int) -> list[Campaign]:
    """The first `top` with the pinned at their places."""
    listed, last = list(free), -1
    for one in pinned:
        last = max(_place(one) - 1, last + 1)
        listed.insert(last, one)
    return listed[:top]
