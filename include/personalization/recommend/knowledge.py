"""What is served: the campaigns' knowledge, the ranker and the catalog's rules, as one published whole."""

import io
import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Self

import numpy as np

from personalization.recommend.ranking import DEFAULT_FUSION, LearnedRanker
from personalization.recommend.sources import CampaignKnowledge
from personalization.schemas import Campaign, Catalog

_ARRAYS = frozenset(
    one.name for one in fields(CampaignKnowledge) if one.name not in ("at", "ids", "intent_ids", "engaged_ids")
)


@dataclass(frozen=True)
class ServedKnowledge:
    """Everything about campaigns that an answer needs: read once a generation, then kept in the process."""

    catalog: Catalog
    campaigns: CampaignKnowledge
    learned: LearnedRanker | None
    """None while there is too little feedback, or where rank fusion is better."""
    fusion: str = DEFAULT_FUSION.version
    """The rank fusion that serves then."""
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
    def intent_names(self) -> dict[str, str]:
        """Names of the intents by id."""
        return {one.id: one.name for one in self.catalog.intents}

    def to_bytes(self) -> bytes:
        """One compressed NumPy archive. Grows with candidates x (dimensions + engaged campaigns)."""
        buffer = io.BytesIO()
        words = {
            "catalog": self.catalog.model_dump_json(),
            "ranker": self.learned.to_json() if self.learned else "",
            "fusion": self.fusion,
            "ids": json.dumps(self.campaigns.ids),
            "intent_ids": json.dumps(self.campaigns.intent_ids),
            "engaged_ids": json.dumps(self.campaigns.engaged_ids),
        }
        arrays = {name: getattr(self.campaigns, name) for name in _ARRAYS}
        np.savez_compressed(buffer, at=np.int64(self.campaigns.at), **words, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Back from the store. No pickled object is ever loaded."""
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
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
            )
