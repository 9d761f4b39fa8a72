"""Check a catalog: what in it keeps campaigns from users, or messages from their intents."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from personalization.catalog.loading import load_catalog
from personalization.encoder import Vectors, get_encoder
from personalization.errors import CatalogError
from personalization.schemas import Campaign, Catalog
from personalization.settings import Settings
from personalization.understanding.classifier import IntentClassifier

FEW_EXAMPLES = 5
_NEAR_DUPLICATE = 0.95
"""Least cosine of two utterances that say the same in other words."""
_CONFUSED_SHARE = 0.2
_CONFUSED_EXAMPLES = 2
_STRAYS_SHOWN = 2
_FOLDS = 5
_SLICE = 1024
_SHOWN = 10
"""Findings of a kind, and intents, in the tables; all are in the report."""

Kind = Literal[
    "catalog",
    "same example",
    "alike examples",
    "overlapping intents",
    "few examples",
    "no campaign",
    "unreachable campaign",
    "audience",
    "pinned place",
]


class Finding(BaseModel):
    """Something to mend, and how."""

    severity: Literal["error", "warning"]
    kind: Kind
    text: str


class IntentQuality(BaseModel):
    """How well an intent's examples are recognised where they are held out as messages."""

    intent_id: str
    examples: int
    recognised: int
    taken_for: dict[str, int]
    """Examples that would get another intent, by that intent, most first."""


class CatalogReport(BaseModel):
    """What a check found."""

    intents: int = 0
    campaigns: int = 0
    examples: int = 0
    accuracy: float | None = None
    """Share of the examples that get their intent where they are messages and the rest the catalog."""
    findings: list[Finding] = []
    quality: list[IntentQuality] = []
    """Worst first."""

    def count(self, severity: str) -> int:
        """Findings of a severity."""
        return sum(one.severity == severity for one in self.findings)


def check_folder(folder: Path, settings: Settings) -> CatalogReport:
    """Read and check a catalog; one that is refused makes a report of why."""
    try:
        catalog = load_catalog(folder)
    except CatalogError as error:
        lines = str(error).splitlines()
        return CatalogReport(findings=[Finding(severity="error", kind="catalog", text=line) for line in lines])
    return check_catalog(
        catalog,
        lambda texts: get_encoder(settings.embedding_model, settings.embedding_dim).encode(texts),
    )


def check_catalog(
    catalog: Catalog, encode: Callable[[list[str]], Vectors], now: datetime | None = None
) -> CatalogReport:
    """Check a catalog that `load_catalog` took. `encode` is called once, where there are examples."""
    now = now or datetime.now(UTC)
    examples = _Examples(catalog, encode)
    findings = [
        *examples.same(),
        *examples.alike(),
        *examples.overlaps(),
        *_few_examples(catalog),
        *_untargeted_intents(catalog, now),
        *_unreachable_campaigns(catalog, now),
        *_audiences(catalog),
        *_pinned_places(catalog),
    ]
    return CatalogReport(
        intents=len(catalog.intents),
        campaigns=len(catalog.campaigns),
        examples=len(examples.texts),
        accuracy=examples.accuracy(),
        findings=sorted(findings, key=lambda one: one.severity),
        quality=examples.quality(),
    )


class _Examples:
    """All example utterances, and what each would be taken for."""

    def __init__(self, catalog: Catalog, encode: Callable[[list[str]], Vectors]) -> None:
        self.ids = [intent.id for intent in catalog.intents]
        pairs = [(at, text) for at, intent in enumerate(catalog.intents) for text in intent.examples]
        self.texts = [text for _, text in pairs]
        self.owners = np.asarray([owner for owner, _ in pairs], dtype=np.int64)
        sizes = np.bincount(self.owners, minlength=len(self.ids))
        self._comparable = len(self.ids) > 1
        self._known_by_others = sizes[self.owners] > 1
        """Examples whose intent has another one; nothing is left to know the rest by."""
        self._taken_for = np.full(len(self.texts), -1)
        if self._comparable:
            self._vectors = encode(self.texts)
            self._take_for()

    def _take_for(self) -> None:
        """What each example would be taken for if it were a message, by cross-validation."""
        place = {intent_id: at for at, intent_id in enumerate(self.ids)}
        first = np.searchsorted(self.owners, self.owners)  # owners ascend
        # Shifted from intent to intent, so that small intents do not all lose an example to the same fold.
        folds = (np.arange(len(self.owners)) - first + self.owners) % _FOLDS
        for fold in range(_FOLDS):
            held, rest = np.flatnonzero((folds == fold) & self._known_by_others), folds != fold
            if len(held):
                classifier = IntentClassifier.fit([self.ids[one] for one in self.owners[rest]], self._vectors[rest])
                readings = classifier.classify(self._vectors[held], keep=1.0)
                self._taken_for[held] = [place[reading.top[0][0]] for reading in readings]

    def same(self) -> Iterator[Finding]:
        """Utterances that stand twice."""
        places = defaultdict(list)
        for at, text in enumerate(self.texts):
            places[_plain(text)].append(at)
        for found in places.values():
            owners = sorted({self.ids[self.owners[at]] for at in found})
            if len(owners) > 1:
                text = f"“{self.texts[found[0]]}” is an example of {_listed(owners)}; keep it in one of them"
                yield Finding(severity="error", kind="same example", text=text)
            elif len(found) > 1:
                text = f"“{self.texts[found[0]]}” stands {len(found)} times in {_listed(owners)}; keep one"
                yield Finding(severity="warning", kind="same example", text=text)

    def alike(self) -> Iterator[Finding]:
        """Utterances of two intents that say nearly the same."""
        for start in range(0, len(self.texts) if self._comparable else 0, _SLICE):
            cosines = self._vectors[start : start + _SLICE] @ self._vectors.T
            for row, other in zip(*np.nonzero(cosines >= _NEAR_DUPLICATE), strict=True):
                one = start + row
                left, right = self.texts[one], self.texts[other]
                if one < other and self.owners[one] != self.owners[other] and _plain(left) != _plain(right):
                    owners = f"`{self.ids[self.owners[one]]}` and “{right}” of `{self.ids[self.owners[other]]}`"
                    text = f"“{left}” of {owners} say nearly the same; reword one"
                    yield Finding(severity="warning", kind="alike examples", text=text)

    def overlaps(self) -> Iterator[Finding]:
        """Pairs of intents of which one takes a good part of the other's examples."""
        sizes = np.bincount(self.owners, minlength=len(self.ids))
        strays = defaultdict(list)
        for at in np.flatnonzero((self._taken_for != self.owners) & (self._taken_for >= 0)):
            strays[int(self.owners[at]), int(self._taken_for[at])].append(int(at))
        for (owner, other), found in sorted(strays.items(), key=lambda one: -len(one[1])):
            if len(found) >= max(_CONFUSED_EXAMPLES, _CONFUSED_SHARE * sizes[owner]):
                shown = "; ".join(
                    f"“{self.texts[at]}” (near “{self._nearest(at, other)}”)" for at in found[:_STRAYS_SHOWN]
                )
                text = (
                    f"{len(found)} of {sizes[owner]} examples of `{self.ids[owner]}` would be taken for "
                    f"`{self.ids[other]}`: {shown}; move or reword them, or make the two one intent"
                )
                yield Finding(severity="warning", kind="overlapping intents", text=text)

    def _nearest(self, at: int, owner: int) -> str:
        """The example of an intent that is nearest to another example."""
        theirs = np.flatnonzero(self.owners == owner)
        return self.texts[int(theirs[(self._vectors[theirs] @ self._vectors[at]).argmax()])]

    def accuracy(self) -> float | None:
        """Share of the examples that would get their own intent."""
        known = self._taken_for >= 0
        return float(np.mean(self._taken_for[known] == self.owners[known])) if known.any() else None

    def quality(self) -> list[IntentQuality]:
        """Of each intent that has two examples or more, worst first."""
        rows = []
        for at, intent_id in enumerate(self.ids):
            counts = Counter(self._taken_for[(self.owners == at) & (self._taken_for >= 0)].tolist())
            if counts:
                examples, recognised = counts.total(), counts.pop(at, 0)
                taken_for = {self.ids[other]: count for other, count in counts.most_common()}
                rows.append(
                    IntentQuality(intent_id=intent_id, examples=examples, recognised=recognised, taken_for=taken_for)
                )
        return sorted(rows, key=lambda one: one.recognised / one.examples)


def _plain(text: str) -> str:
    """An utterance without what makes no difference."""
    return " ".join(text.casefold().split()).strip(" .!?")


# Rules that need no vectors.


def _few_examples(catalog: Catalog) -> Iterator[Finding]:
    for intent in catalog.intents:
        if len(intent.examples) < FEW_EXAMPLES:
            text = f"`{intent.id}` has {len(intent.examples)}; write {FEW_EXAMPLES} or better 10, in users' words"
            yield Finding(severity="warning", kind="few examples", text=text)


def _untargeted_intents(catalog: Catalog, now: datetime) -> Iterator[Finding]:
    served = {intent for one in catalog.campaigns if not _is_over(one, now) for intent in one.intents}
    for intent in catalog.intents:
        if intent.id not in served:
            text = f"no campaign that runs or is to come targets `{intent.id}`; name it in one's `intents`, or leave it"
            yield Finding(severity="warning", kind="no campaign", text=text)


def _unreachable_campaigns(catalog: Catalog, now: datetime) -> Iterator[Finding]:
    for one in catalog.campaigns:
        if _is_over(one, now):
            text = f"`{one.id}` ended on {one.active_until:%d %b %Y}; move its active_until, or remove it"
            yield Finding(severity="warning", kind="unreachable campaign", text=text)
        if not one.intents and not one.description.strip():
            text = f"`{one.id}` has neither intents nor a description, so its name alone finds users; add one of them"
            yield Finding(severity="warning", kind="unreachable campaign", text=text)


def _audiences(catalog: Catalog) -> Iterator[Finding]:
    for one in catalog.campaigns:
        audience = one.audience
        for what, include, exclude in (
            ("users", audience.include_users, audience.exclude_users),
            ("intents", audience.include_intents, audience.exclude_intents),
        ):
            both = sorted(set(include) & set(exclude))
            if both and set(include) <= set(exclude):
                text = f"`{one.id}` excludes all {what} it includes, so nobody sees it; take them out of exclude_{what}"
                yield Finding(severity="error", kind="audience", text=text)
            elif both:
                text = f"`{one.id}` includes and excludes {_listed(both)}, who do not see it; take them out of one list"
                yield Finding(severity="warning", kind="audience", text=text)
        if one.intents and set(one.intents) <= set(audience.exclude_intents):
            text = f"`{one.id}` excludes whoever expressed the intents it targets; take them out of exclude_intents"
            yield Finding(severity="warning", kind="audience", text=text)


def _pinned_places(catalog: Catalog) -> Iterator[Finding]:
    by_place = defaultdict(list)
    for one in catalog.campaigns:
        if one.pinned is not None:
            by_place[one.pinned].append(one)
    for place, campaigns in sorted(by_place.items()):
        holder: Campaign | None = None  # of those seen, the one that runs longest
        for one in sorted(campaigns, key=lambda one: one.active_from_ms):
            if holder is not None and one.active_from_ms < holder.active_until_ms:
                text = f"`{holder.id}` and `{one.id}` are both pinned to place {place}; move one, or part their windows"
                yield Finding(severity="warning", kind="pinned place", text=text)
            if holder is None or one.active_until_ms > holder.active_until_ms:
                holder = one


def _is_over(campaign: Campaign, now: datetime) -> bool:
    return campaign.active_until is not None and campaign.active_until <= now


def _listed(ids: Iterable[str]) -> str:
    return ", ".join(f"`{one}`" for one in ids)


# For people.


def show(report: CatalogReport, console: Console) -> None:
    """Print a report as tables."""
    by_kind = defaultdict(list)
    for finding in report.findings:
        by_kind[finding.severity, finding.kind].append(finding)
    table = Table("", "what", "finding", box=None, padding=(0, 2, 0, 0))
    for (severity, kind), found in by_kind.items():
        colour = "red" if severity == "error" else "yellow"
        for finding in found[:_SHOWN]:
            table.add_row(f"[{colour}]{severity}[/]", kind, escape(finding.text))
        if (more := len(found) - _SHOWN) > 0:
            table.add_row("", kind, f"and {more:,} more")
    if report.findings:
        console.print(table)
    worst = [one for one in report.quality if one.recognised < one.examples][:_SHOWN]
    if worst:
        console.print(f"\nEach example as a new message: {report.accuracy:.0%} get their intent. The worst intents:")
        table = Table("intent", "recognised", "taken for", box=None, padding=(0, 2, 0, 0))
        for one in worst:
            others = ", ".join(f"{other} ({count})" for other, count in one.taken_for.items())
            table.add_row(escape(one.intent_id), f"{one.recognised} of {one.examples}", escape(others))
        console.print(table)
    console.print(
        f"\n{report.intents:,} intents with {report.examples:,} examples, {report.campaigns:,} campaigns: "
        f"{report.count('error'):,} errors, {report.count('warning'):,} warnings"
    )
