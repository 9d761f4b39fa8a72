"""A report as a picture and as a table."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from personalization.evaluation.policies import BASELINES
from personalization.evaluation.replay import REFERENCE

# Okabe-Ito, which the colour-blind tell apart; the markers differ as well.
_KINDS = {"shipped": ("#0072B2", "D"), "variant": ("#E69F00", "o"), "baseline": ("#8A8F98", "s")}
_METRICS = ("ndcg@10", "recall@5", "recall@10", "mrr", "hit_rate@10", "novelty@10")


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write `report.json`, `policies.md` and `policies.png` into the folder, which is made; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"report.json": json.dumps(report, indent=2) + "\n", "policies.md": markdown(report)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    picture = folder / "policies.png"
    draw(report).savefig(picture, dpi=150)
    return [*(folder / name for name in texts), picture]


def headline(report: dict[str, Any]) -> str:
    """What was measured, in a line."""
    splits = report["splits"]
    count = f"{len(splits)} splits from {splits[0]}" if len(splits) > 1 else f"split at {splits[0]}"
    horizon = f"horizon {round(report['horizon_days'], 1):g} days"
    return f"{report['users']:,} users, {report['answers']:,} answers, {count}, {horizon}, task {report['task']}"


def markdown(report: dict[str, Any]) -> str:
    """The policies by NDCG@10, each mean with its 95 % interval."""
    header = ["policy", *_METRICS, "coverage@10", f"{REFERENCE} ahead by"]
    lines = [f"{headline(report)}.", "", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
    for policy, entry in _best_first(report):
        ahead = report["differences"].get(f"{REFERENCE} - {policy}")
        difference = _interval(ahead["ndcg@10"], "+") if ahead else ""
        cells = [policy, *(_interval(entry[name]) for name in _METRICS), f"{entry['coverage@10']:.3f}", difference]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any]) -> Figure:
    """NDCG@10 of the policies with 95 % intervals, and how far the shipped one is ahead of each, user by user."""
    policies = _best_first(report)[::-1]
    figure = Figure(figsize=(11, 1.9 + 0.32 * len(policies)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (policy, entry) in enumerate(policies):
        color, marker = _KINDS[_kind(policy)]
        style = {"color": color, "marker": marker, "capsize": 3, "markersize": 6}
        left.errorbar(**_point(entry["ndcg@10"], place), **style)
        if ahead := report["differences"].get(f"{REFERENCE} - {policy}"):
            right.errorbar(**_point(ahead["ndcg@10"], place), **style)
    left.set_yticks(range(len(policies)), [policy for policy, _ in policies])
    left.set_title("NDCG@10")
    left.set_xlim(left=0)
    right.set_title(f"NDCG@10 that {REFERENCE} is ahead by")
    right.axvline(0, color="#444444", linewidth=1)
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(headline(report), fontsize=10)
    figure.supxlabel("mean with 95 % bootstrap interval over users", fontsize=9)
    return figure


def _best_first(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(report["policies"].items(), key=lambda one: (-one[1]["ndcg@10"]["mean"], one[0]))


def _kind(policy: str) -> str:
    if policy == REFERENCE:
        return "shipped"
    return "baseline" if policy in BASELINES else "variant"


def _point(one: dict[str, float], place: int) -> dict[str, Any]:
    # Rounding may leave the mean a hair outside its interval.
    reach = [[max(one["mean"] - one["low"], 0)], [max(one["high"] - one["mean"], 0)]]
    return {"x": [one["mean"]], "y": [place], "xerr": reach}


def _interval(one: dict[str, float], sign: str = "") -> str:
    return f"{one['mean']:{sign}.3f} ({one['low']:{sign}.3f} … {one['high']:{sign}.3f})"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
