"""Exploration and experiments: a small share of users sees something else, always the same, and it is logged."""

import hashlib
from collections.abc import Sequence

_RESOLUTION = 2**64


def sticky(user_id: str, purpose: str) -> float:
    """A number in [0, 1) that is the same for the user and purpose every time, and even over users."""
    digest = hashlib.blake2b(f"{purpose}\0{user_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / _RESOLUTION


def explore(
    campaign_ids: Sequence[str], top: int, *, user_id: str, epoch: str, share: float
) -> tuple[list[str], list[float]]:
    """The first `top` of the ranked campaigns with the propensity of each at its place.

    For a `share` of the users the last place goes to one of all the others, evenly: the same in all of an
    epoch. The places before it are certain, so no list loses more than its weakest campaign.
    """
    best, others = list(campaign_ids[:top]), list(campaign_ids[max(top - 1, 0) :])
    propensities = [1.0] * len(best)
    if len(best) < top or len(others) < 2 or share <= 0:
        return best, propensities
    chosen = 0
    if sticky(user_id, f"explore:{epoch}") < share:
        chosen = int(sticky(user_id, f"explore-what:{epoch}") * len(others))
        best[-1] = others[chosen]
    propensities[-1] = share / len(others) + (1 - share) * (chosen == 0)
    return best, propensities


def arm(user_id: str, experiment: str, share: float) -> bool:
    """Whether the user is of the experiment's treated `share`."""
    return bool(experiment) and sticky(user_id, f"experiment:{experiment}") < share
