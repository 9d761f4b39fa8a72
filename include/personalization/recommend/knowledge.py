"""What is served: the campaigns' knowledge, the ranker, the intents' reader and the catalog, as one published whole."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Self

import numpy as np

from personalization.errors import StoreError
from personalization.recommend.ranking import DEFAULT_FUSION, LearnedRanker
from personalization.recommend.sources import CampaignKnowledge
from personalization.schemas import Audience, Campaign, Catalog, VectorSpace
from personalization.understanding.reader import IntentReader

NO_SPACE = VectorSpace("", 0)
FORMAT = 3
"""To be raised with every change of what `to_bytes` writes that its entries' names do not show."""
_ARRAYS = frozenset(
    one.name for one in fields(CampaignKnowledge) if one.name not in ("at", "ids", "intent_ids", "engaged_ids")
)
_WORDS = ("catalog", "ranker", "fusion", "model", "ids", "intent_ids", "engaged_ids")
_ENTRIES = {"format", "at", "dim", "classifier", *_WORDS, *_ARRAYS}


@dataclass(frozen=True)
class ServedKnowledge:
    """Everything about campaigns that an answer needs: read once a generation, then kept in the process."""

    catalog: Catalog
    campaigns: CampaignKnowledge
    learned: LearnedRanker | None
    """None while there is too little feedback, or where rank fusion is better."""
    fusion: str = DEFAULT_FUSION.version
    """The rank fusion that serves then."""
    space: VectorSpace = NO_SPACE
    """That of all its vectors: those of users are asked for in this one, and a message's must be of it, too."""
    classifier_content: bytes = field(default=b"", repr=False)
    """The intents' classifier as it writes itself; none where the catalog has no intents."""
    _running: dict[bytes, CampaignKnowledge] = field(default_factory=dict, init=False, repr=False, compare=False)

    def running(self, now_ms: int) -> CampaignKnowledge:
        """The knowledge of those that run: only they are ranked, as they were where the ranker was fitted."""
        active = self.campaigns.active(now_ms)
        key = active.tobytes()
        if key not in self._running:
            self._running.clear()
            self._running[key] = self.campaigns.only(active)
        return self._running[key]

    @cached_property
    def campaign_of(self) -> dict[str, Campaign]:
        """The catalog's campaigns by id."""
        return {one.id: one for one in self.catalog.campaigns}

    @cached_property
    def with_audience(self) -> frozenset[str]:
        """Ids of the campaigns that are not for everyone."""
        return frozenset(one.id for one in self.catalog.campaigns if one.audience != Audience())

    @cached_property
    def intent_names(self) -> dict[str, str]:
        """Names of the intents by id."""
        return {one.id: one.name for one in self.catalog.intents}

    @cached_property
    def classifier(self) -> IntentReader | None:
        """Reads from a message's vector what it expresses. Taken apart when first asked for."""
        return IntentReader.from_bytes(self.classifier_content) if self.classifier_content else None

    def to_bytes(self) -> bytes:
        """One compressed NumPy archive. Grows with candidates x (dimensions + engaged campaigns) and with examples.

        An example takes 4 bytes a dimension.
        """
        buffer = io.BytesIO()
        words = {
            "catalog": self.catalog.model_dump_json(),
            "ranker": self.learned.to_json() if self.learned else "",
            "fusion": self.fusion,
            "model": self.space.model,
            "ids": json.dumps(self.campaigns.ids),
            "intent_ids": json.dumps(self.campaigns.intent_ids),
            "engaged_ids": json.dumps(self.campaigns.engaged_ids),
        }
        arrays = {name: getattr(self.campaigns, name) for name in _ARRAYS}
        arrays["classifier"] = np.frombuffer(self.classifier_content, dtype=np.uint8)
        numbers = {
            "format": np.int64(FORMAT),
            "at": np.int64(self.campaigns.at),
            "dim": np.int64(self.space.dim),
        }
        np.savez_compressed(buffer, **numbers, **words, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Back from the store. No pickled object is ever loaded.

        Raises:
            StoreError: another version of the platform published it.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            if not _is_of_this_version(stored):
                raise StoreError("analytics", "what is served was published by another version; run the pipeline")
            campaigns = CampaignKnowledge(
                at=int(stored["at"]),
                ids=json.loads(str(stored["ids"])),
                intent_ids=json.loads(str(stored["intent_ids"])),
                engaged_ids=json.loads(str(stored["engaged_ids"])),
                **{name: stored[name] for name in _ARRAYS},
            )
            ranker = str(stored["ranker"])
            return cls(
                Catalog.model_validate_json(str(stored["catalog"])),
                campaigns,
                LearnedRanker.from_json(ranker) if ranker else None,
                str(stored["fusion"]),
                VectorSpace(str(stored["model"]), int(stored["dim"])),
                stored["classifier"].tobytes(),
            )


def is_current(content: bytes) -> bool:
    """Whether this version of the platform can serve what `to_bytes` of some version made. Unpacks almost nothing."""
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        return _is_of_this_version(stored)


def _is_of_this_version(stored: Mapping[str, np.ndarray[Any, Any]]) -> bool:
    return set(stored) == _ENTRIES and int(stored["format"]) == FORMAT
