"""What the explored places say: is the ranker's choice worth more than chance, and what does exploring cost?

`recommend.exploration.explore` gives the last place of a list, for a share of the users, to one of the n campaigns
that are left, the ranker's choice among them. So such a place carries the propensity share / n, and 1 - share more
where it holds the ranker's choice; n and the choice can be read off it, and with them two other policies for that
place: always the ranker's choice, and always one of the n by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from personalization.errors import InputError, NoSupportError
from personalization.evaluation.off_policy import Estimates, Flags, check_support, estimate
from personalization.quality.experiments import family
from personalization.recommend.sources import Vector, Whole
from personalization.schemas import Event

Reward = Literal["click", "conversion"]
TargetName = Literal["ranker alone", "chance"]

_ROUNDED = 1e-6
"""Of a propensity, as it is served."""


@dataclass(frozen=True)
class Impressions:
    """What was shown, by time, and what came of it."""

    user: Whole
    """Places in no list: the same number is the same user."""
    propensity: Vector
    """NaN where it was not logged."""
    clicked: Flags
    converted: Flags


def impressions_of(events: Sequence[Event], policy: str | None = None) -> Impressions:
    """The impressions of a policy, or of all. A click or conversion is laid to the newest impression of its user,
    campaign and policy before it; one pass over the events in order of time.
    """
    users: dict[str, int] = {}
    newest: dict[tuple[str, str, str | None], int] = {}
    rows: list[tuple[int, float]] = []
    came: dict[str, list[bool]] = {"click": [], "conversion": []}
    for one in sorted(events, key=lambda event: (event.timestamp_ms, event.event != "impression")):
        if policy is not None and (one.policy is None or policy not in (one.policy, family(one.policy))):
            continue
        pair = one.user_id, one.campaign_id, one.policy
        if one.event == "impression":
            newest[pair] = len(rows)
            propensity = np.nan if one.propensity is None else one.propensity
            rows.append((users.setdefault(one.user_id, len(users)), propensity))
            for flags in came.values():
                flags.append(False)
        elif one.event in came and pair in newest:
            came[one.event][newest[pair]] = True
    return Impressions(
        user=np.asarray([user for user, _ in rows], dtype=np.int64),
        propensity=np.asarray([propensity for _, propensity in rows]),
        clicked=np.asarray(came["click"], dtype=bool),
        converted=np.asarray(came["conversion"], dtype=bool),
    )


def targets_of(propensity: Vector, share: float) -> dict[TargetName, Vector]:
    """(N,) probability of what was shown at explored places, had only the ranker or only chance decided.

    Raises:
        NoSupportError: the propensities do not come from exploring with that share.
    """
    choice = propensity >= 1 - share - _ROUNDED
    by_chance = np.where(choice, propensity - (1 - share), propensity) / share  # 1 / n
    # n is 2 at least. What is left of a rounded propensity may be off by the rounding, over the share.
    if (by_chance > 0.5 + _ROUNDED / share).any() or (by_chance < -_ROUNDED / share).any():
        raise NoSupportError(
            f"the propensities are not those of exploring with a share of {share:g}; name the EXPLORATION_SHARE that "
            f"was set when the lists were shown"
        )
    return {"ranker alone": choice.astype(float), "chance": np.maximum(by_chance, 0)}


def compare_explored(
    events: Sequence[Event], *, share: float, reward: Reward, policy: str | None = None
) -> dict[TargetName, Estimates]:
    """What the ranker alone and chance alone would have earned at the places that are explored.

    Raises:
        InputError: `share` is not above 0 and at most 0.5.
        NoSupportError: the log cannot tell policies apart.
    """
    if not 0 < share <= 0.5:
        raise InputError(f"an exploration share of {share:g} cannot be read back; it must be above 0 and at most 0.5")
    shown = impressions_of(events, policy)
    check_support(shown.propensity)
    explored = shown.propensity != 1  # NaN too: `estimate` leaves it out and counts it
    propensity = shown.propensity[explored]
    came = shown.clicked if reward == "click" else shown.converted
    return {
        name: estimate(user=shown.user[explored], reward=came[explored], propensity=propensity, target=target)
        for name, target in targets_of(propensity, share).items()
    }
