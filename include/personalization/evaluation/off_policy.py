"""Off-policy evaluation: what another policy would have earned, from the log of the one that ran.

Item-position model (Li et al. 2018): what an impression earns depends on the user, the campaign and the place,
not on what is shown beside it. So each impression counts by itself, with the probability of its campaign at its
place under the policy that was logged (`propensity`) and under the other one (`target`). Values are the mean
reward of an impression.

Open Bandit Pipeline (`obp`) has these estimators and more, but brings torch and seaborn for what are three means here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from personalization.errors import NoSupportError
from personalization.resampling import Floats, Interval, Numbers, Whole, around, resample

Flags = np.ndarray[Any, np.dtype[np.bool_]]

_ROUNDING = 1e-3
"""Of the mean weight, as propensities are logged with six digits."""
_FEW_REWARDS = 20
"""Below so many rewards an interval is too narrow more often than it says."""


@dataclass(frozen=True)
class Estimates:
    """What the other policy would have earned, by each method, with 95 % intervals over users."""

    impressions: int
    users: int
    explored: int
    """Impressions that the logged policy might not have shown."""
    without_propensity: int
    """Impressions left out."""
    logged: Interval
    """Mean reward of the policy that ran."""
    values: dict[str, Interval]
    """`ips`, `snips`, and `dr` where there is a reward model."""
    gains: dict[str, Interval]
    """Value less `logged`, both over the same users drawn."""
    effective_size: float
    """Impressions without weights that would tell as much (Kish 1965)."""
    clip: float
    """Largest weight; larger ones were cut to it."""
    clipped_weight: float
    """Share of the weight that was cut off: IPS and DR are that much too low at most, relative to the reward."""
    mean_weight: Interval
    """1 where the log shows all that the other policy would."""
    rewards: int
    """Impressions of positive weight that were rewarded."""

    @property
    def caveats(self) -> list[str]:
        """What speaks against trusting the figures, in words."""
        found = []
        mean, low, high = self.mean_weight
        if abs(mean - 1) > max(2 * (high - mean), 2 * (mean - low), _ROUNDING):  # four standard errors
            found.append(
                f"the weights average {mean:.2f} instead of 1: the other policy shows what the log "
                f"does not, or the propensities are not those of the log"
            )
        if self.clipped_weight > 0:
            found.append(f"weights above {self.clip:,.1f} were cut, {self.clipped_weight:.1%} of all weight")
        if self.rewards < _FEW_REWARDS:
            found.append(f"only {self.rewards} rewarded impressions count; the intervals are rough")
        if self.without_propensity:
            found.append(f"{self.without_propensity:,} impressions without a propensity were left out")
        return found


def check_support(propensity: Floats) -> None:
    """Whether the log says anything about another policy than its own.

    Args:
        propensity: (N,) probability of each impression, NaN where it was not logged.

    Raises:
        NoSupportError: it does not; says why and what to do.
    """
    if not len(propensity):
        raise NoSupportError("there is no impression; send back an event for each campaign that is shown")
    known = propensity[~np.isnan(propensity)]
    if not len(known):
        raise NoSupportError(
            "no impression carries its propensity, so the log cannot tell policies apart; send back the `propensity` "
            "of each recommendation with its impression"
        )
    if known.min() <= 0 or known.max() > 1:
        raise NoSupportError("propensities must lie above 0 and at most at 1")
    if known.min() == 1:
        raise NoSupportError(
            "every impression was certain (propensity 1), so the log cannot tell policies apart: what was not shown "
            "earned nothing to compare with; let EXPLORATION_SHARE be above 0 and log for a while"
        )


def importance_weights(propensity: Floats, target: Floats, clip: float | None = None) -> tuple[Floats, float]:
    """(N,) target / propensity, cut at `clip`, and where that lies.

    Without a `clip` it is √N: the bias of cutting vanishes as the log grows (Ionides 2008).
    """
    limit = float(np.sqrt(len(propensity))) if clip is None else clip
    return np.minimum(target / propensity, limit), limit


def estimate(
    *,
    user: Whole,
    reward: Numbers,
    propensity: Floats,
    target: Floats,
    predicted: Floats | None = None,
    expected: Floats | None = None,
    clip: float | None = None,
    draws: int = 1000,
) -> Estimates:
    """Estimate the mean reward of an impression under the other policy.

    * IPS (Horvitz and Thompson 1952): Σ w·r / N, with w = target / propensity. Unbiased before clipping.
    * SNIPS (Swaminathan and Joachims 2015): Σ w·r / Σ w. A little biased, and steadier.
    * DR (Dudík, Langford and Li 2011): Σ (expected + w·(r - predicted)) / N. Unbiased where either the propensities
      or the reward model are right; the model must not have seen the rewards that it predicts.

    Args:
        user: (N,) whose impression it was: users are drawn whole for the intervals.
        reward: (N,) what it earned, such as 1 for a click.
        propensity: (N,) probability of the campaign at its place under the policy that ran; NaN is left out.
        target: (N,) the same under the other policy.
        predicted: (N,) the reward model's expectation for the campaign that was shown.
        expected: (N,) the same for the other policy: Σ over campaigns of target · expectation.
        clip: Largest weight; √N if none.
        draws: Of the bootstrap.

    Raises:
        NoSupportError: the log cannot tell policies apart.
    """
    check_support(propensity)
    known: Flags = ~np.isnan(propensity)
    user, reward, propensity, target = user[known], reward[known].astype(float), propensity[known], target[known]
    weights, limit = importance_weights(propensity, target, clip)
    columns = {"count": np.ones(len(reward)), "reward": reward, "weight": weights, "weighted": weights * reward}
    if predicted is not None and expected is not None:
        columns["dr"] = expected[known] + weights * (reward - predicted[known])
    names, owners = list(columns), np.unique(user, return_inverse=True)[1]
    sums = np.stack([np.bincount(owners, columns[name]) for name in names], axis=1)
    total = dict(zip(names, sums.sum(axis=0), strict=True))
    drawn = dict(zip(names, resample(sums, draws=draws).T, strict=True))
    if not total["weight"]:
        raise NoSupportError("the other policy shows nothing of what was logged, so nothing can be said of it")
    ratios = {"ips": ("weighted", "count"), "snips": ("weighted", "weight")}
    if "dr" in columns:
        ratios["dr"] = ("dr", "count")
    drawn["weight"] = np.maximum(drawn["weight"], np.finfo(float).tiny)  # a draw without any weight: 0 / 0 is 0
    values = {
        name: around(total[over] / total[under], drawn[over] / drawn[under]) for name, (over, under) in ratios.items()
    }
    own, own_drawn = total["reward"] / total["count"], drawn["reward"] / drawn["count"]
    gains = {
        name: around(total[over] / total[under] - own, drawn[over] / drawn[under] - own_drawn)
        for name, (over, under) in ratios.items()
    }
    whole = float((target / propensity).sum())
    return Estimates(
        impressions=len(reward),
        users=len(sums),
        explored=int((propensity < 1).sum()),
        without_propensity=int((~known).sum()),
        logged=around(own, own_drawn),
        values=values,
        gains=gains,
        effective_size=float(weights.sum() ** 2 / (weights**2).sum()),
        clip=limit,
        clipped_weight=1 - float(weights.sum()) / whole,
        mean_weight=around(total["weight"] / total["count"], drawn["weight"] / drawn["count"]),
        rewards=int((weights * reward > 0).sum()),
    )
