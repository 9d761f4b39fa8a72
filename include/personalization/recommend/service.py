"""The recommender: cache, evidence, ranking, rules and explanation put together."""

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import structlog

from personalization.errors import StoreError
from personalization.recommend.batching import Batcher
from personalization.recommend.candidates import Known, Lookup, gather, imagine
from personalization.recommend.explanation import reasons
from personalization.recommend.exploration import arm, explore
from personalization.recommend.guard import Guard, Observer
from personalization.recommend.knowledge import ServedKnowledge
from personalization.recommend.ranking import NAMED_RANKERS, Ranker
from personalization.recommend.rules import Chosen, arrange, exclusions
from personalization.schemas import Campaign, Exclusion, ExpressedNow, Preview, Recommendation, Recommendations, Source
from personalization.settings import Settings
from personalization.stores.analytics import AsyncAnalyticsReader
from personalization.stores.cache import AsyncCache, LookedUp
from personalization.stores.embedding import AsyncEmbedder
from personalization.stores.milvus import AsyncVectorReader, Vectors
from personalization.stores.mongo import AsyncEventStore
from personalization.stores.neo4j import AsyncGraphReader

_AGAIN_S = 5.0
"""How long knowledge that could not be read anew is not asked for again."""
_UNSURE_S = 30.0
"""How long knowledge is trusted while Redis cannot say which generation is served."""
NOBODY = "-"
"""Stands for a user where a store is asked only to see that it answers."""
_CLOSING_S = 5.0
_REFRESHES = 32
"""Old answers that are made anew at a time: those who wait come first."""
_BATCH = 32
_BATCHES = 2
"""One waits for the stores while the other is ranked."""

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Ask(NamedTuple):
    """What is asked about a user."""

    user_id: str
    top: int = 5
    category: str | None = None
    exclude: frozenset[str] = frozenset()
    """Campaigns that are not wanted."""
    explain: bool = False


class Answer(NamedTuple):
    """An answer, ready to be sent."""

    body: bytes
    """JSON of `schemas.Recommendations`."""
    outcome: Literal["hit", "stale", "miss"]
    """From the cache and fresh, from the cache and not, or made now."""
    degraded: tuple[str, ...] = ()
    """Stores that could not be asked."""


class _Wanted(NamedTuple):
    """An answer to be made. What was published or done since makes it another one."""

    ask: Ask
    generation: bytes
    touched: bytes


@dataclass
class Recommender:
    """Answers which campaigns are worth showing to a user."""

    cache: AsyncCache
    vectors: AsyncVectorReader
    graph: AsyncGraphReader
    analytics: AsyncAnalyticsReader
    events: AsyncEventStore
    embedder: AsyncEmbedder
    settings: Settings
    observer: Observer | None = None
    guard: Guard = field(init=False)
    _served: ServedKnowledge | None = field(default=None, init=False)
    _generation: int | None = field(default=None, init=False)
    _read_at: float = field(default=0.0, init=False)
    _unread_until: float = field(default=0.0, init=False)
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)
    _refreshing: set[asyncio.Task[None]] = field(default_factory=set, init=False)
    _making_up: asyncio.Task[None] | None = field(default=None, init=False)
    _batches: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_BATCHES), init=False)

    def __post_init__(self) -> None:
        self.guard = Guard(self.settings.answer_store_timeout_s, self.observer)
        self._batcher = Batcher(self._make, _BATCH, _BATCHES, alike=StoreError)
        self._policy = _policy_digest(self.settings)

    @classmethod
    def from_settings(cls, settings: Settings, observer: Observer | None = None) -> "Recommender":
        """With a client for every store, each of which connects on first use."""
        return cls(
            cache=AsyncCache.from_settings(settings),
            vectors=AsyncVectorReader(settings),
            graph=AsyncGraphReader.from_settings(settings),
            analytics=AsyncAnalyticsReader.from_settings(settings),
            events=AsyncEventStore.from_settings(settings),
            embedder=AsyncEmbedder.from_settings(settings),
            settings=settings,
            observer=observer,
        )

    async def aclose(self) -> None:
        """Close every client at once; one that does not let go in time is given up, so that the process ends."""
        for task in [*self._refreshing, *([self._making_up] if self._making_up else [])]:
            task.cancel()
        await asyncio.gather(
            _closed("redis", self.cache.client.aclose()),
            _closed("milvus", self.vectors.close()),
            _closed("neo4j", self.graph.driver.close()),
            _closed("analytics", self.analytics.aclose()),
            _closed("mongodb", self.events.aclose()),
            _closed("embedding", self.embedder.aclose()),
        )

    def variant(self, ask: Ask) -> str:
        """What makes an answer about the same user another one: what was asked, and who ranks."""
        plain = f"{self._policy}:{ask.top}"
        if ask.category is None and not ask.exclude and not ask.explain:
            return plain
        rest = repr((ask.category, sorted(ask.exclude), ask.explain)).encode()
        return f"{plain}:{hashlib.blake2b(rest, digest_size=12).hexdigest()}"

    async def look_up(self, asked: Sequence[tuple[str, str]]) -> list[LookedUp] | None:
        """What the cache holds of each (user, variant), in one round trip; None while Redis is down."""
        try:
            return await self.guard.call("redis", partial(self.cache.look_up, asked))
        except StoreError:
            return None

    def fresh(self, before: LookedUp) -> Answer | None:
        """The answer that was looked up, where it may be given as it is."""
        if before.stored is None or not before.is_fresh:
            return None
        return self._told(Answer(before.stored.body, "hit"))

    async def answer(self, ask: Ask, before: LookedUp | None) -> Answer:
        """The answer, by what was looked up before: fresh from the cache, old while a new one is made, or new.

        Raises:
            StoreError: nothing was published yet, or nothing can be said in time.
        """
        if before is None:
            return self._told(await self._in_time(ask, before))
        if (hit := self.fresh(before)) is not None:
            return hit
        if before.stored is not None and before.is_recent:
            self._refresh(ask, before)
            return self._told(Answer(before.stored.body, "stale"))
        try:
            return self._told(await self._in_time(ask, before))
        except StoreError as error:
            return self._told(_stand_in(before, error))

    async def answers(self, asks: Sequence[Ask]) -> list[Answer]:
        """As many answers in as many round trips as one.

        Raises:
            StoreError: nothing was published yet, or nothing can be said in time.
        """
        looked_up = await self.look_up([(one.user_id, self.variant(one)) for one in asks])
        before: Sequence[LookedUp | None] = looked_up or [None] * len(asks)
        found: dict[int, Answer] = {}
        wanted: dict[int, _Wanted] = {}
        for at, (ask, known) in enumerate(zip(asks, before, strict=True)):
            if known is not None and (hit := self.fresh(known)) is not None:
                found[at] = hit
            else:
                wanted[at] = _wanted(ask, known)
        if wanted:
            try:
                made = await self._bounded(self._make_in_turn(list(wanted.values())))
            except StoreError as error:
                made = [_stand_in(before[at], error) for at in wanted]
            found.update(zip(wanted, map(self._told, made), strict=True))
        return [found[at] for at in range(len(asks))]

    async def preview(self, message: str, top: int) -> Preview:
        """What would be shown to a new user who says this.

        Raises:
            StoreError: the embedding service does not answer, or nothing was published yet.
        """
        return await self._bounded(self._preview(message, top))

    async def _preview(self, message: str, top: int) -> Preview:
        served = await self.knowledge()
        embed = partial(self.embedder.embed, [message], space=served.space)
        vector = await self.guard.call("embedding", embed, timeout_s=self.settings.answer_timeout_s)
        now_ms = _now_ms()
        intents = await asyncio.to_thread(_expressed, served, vector, self.settings.intent_keep)
        known = await imagine(vector, intents, now_ms, served=served, lookup=self._lookup(self.guard))
        settings = self.settings.model_copy(update={"exploration_share": 0.0, "experiment_ranker": ""})
        [found] = await asyncio.to_thread(decide, [known], [Ask("", top)], now_ms, settings)
        return Preview(
            intents=[
                ExpressedNow(intent_id=one, name=served.intent_names[one], confidence=round(confidence, 4))
                for one, confidence in intents
            ],
            policy=found.policy,
            recommendations=found.recommendations,
            degraded=found.degraded,
        )

    async def knowledge(self) -> ServedKnowledge:
        """What is served of campaigns.

        Raises:
            StoreError: nothing was published yet.
        """
        try:
            generation = await self.guard.call("redis", self.cache.generation)
        except StoreError:
            generation = None
        return (await self._knowledge(generation))[0]

    async def forget(self, user_ids: Collection[str]) -> None:
        """Make the cached answers of the users old, now or as soon as Redis is back."""
        self.cache.untouched.update(user_ids)
        try:
            await self.guard.call("redis", partial(self.cache.touch, user_ids))
        except StoreError:
            log.warning("cached answers are made old when Redis is back", users=len(user_ids))
            if self._making_up is None or self._making_up.done():
                self._making_up = asyncio.create_task(self._make_up())

    async def _make_up(self) -> None:
        """Tell Redis what it was not there for."""
        while self.cache.untouched:
            await asyncio.sleep(1)
            with contextlib.suppress(StoreError):
                await self.cache.touch(list(self.cache.untouched))

    async def warm_up(self) -> None:
        """Connect to every store and read what is served, so that the first user need not wait for it."""
        patient = Guard(self.settings.store_timeout_s)
        try:
            served = await self.knowledge()
        except StoreError as error:
            log.warning("not warm yet", problem=str(error))
            return
        [known] = await gather([NOBODY], _now_ms(), served=served, lookup=self._lookup(patient))
        decide([known], [Ask(NOBODY)], _now_ms(), self.settings)

    @property
    def serving(self) -> tuple[int, int] | None:
        """Generation (0 while Redis has not said it) and moment, in epoch ms, of the knowledge that answers are made
        from; None before it was first read.
        """
        return (self._generation or 0, self._served.campaigns.at) if self._served is not None else None

    def _lookup(self, guard: Guard) -> Lookup:
        settings = self.settings
        return Lookup(
            self.vectors,
            self.graph,
            self.analytics,
            self.events,
            guard,
            settings.neighbours,
            settings.profile_half_life_days,
        )

    async def _in_time(self, ask: Ask, before: LookedUp | None) -> Answer:
        return await self._bounded(self._batcher.ask(_wanted(ask, before)))

    async def _bounded(self, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(self.settings.answer_timeout_s):
                return await work
        except TimeoutError:
            raise StoreError("api", f"no answer within {self.settings.answer_timeout_s:g} s") from None

    def _refresh(self, ask: Ask, before: LookedUp) -> None:
        """Make the answer anew while the old one is given."""
        if len(self._refreshing) >= _REFRESHES:
            return
        task = asyncio.create_task(self._refreshed(ask, before))
        self._refreshing.add(task)
        task.add_done_callback(self._refreshing.discard)

    async def _refreshed(self, ask: Ask, before: LookedUp) -> None:
        try:
            await self._batcher.ask(_wanted(ask, before))
        except StoreError:
            log.debug("an old answer was not made anew")

    def _told(self, answer: Answer) -> Answer:
        if self.observer is not None:
            self.observer.answered(answer.outcome, answer.degraded)
        return answer

    async def _make_in_turn(self, wanted: Sequence[_Wanted]) -> list[Answer]:
        async with self._batches:
            return await self._make(wanted)

    async def _make(self, wanted: Sequence[_Wanted]) -> list[Answer]:
        """New answers, stored where they are whole."""
        # Of several generations the newest: `publish` came between them.
        newest = max(wanted, key=lambda one: int(one.generation or 0)).generation
        served, missing = await self._knowledge(int(newest) if newest else None)
        now_ms = _now_ms()
        user_ids = list({one.ask.user_id: None for one in wanted})
        found = await gather(user_ids, now_ms, served=served, lookup=self._lookup(self.guard))
        known = dict(zip(user_ids, found, strict=True))
        asks = [one.ask for one in wanted]
        # In a thread: what is cached need not wait behind it.
        made = await asyncio.to_thread(decide, [known[one.user_id] for one in asks], asks, now_ms, self.settings)
        answers = []
        for one in made:
            one.degraded = sorted({*(one.degraded or ()), *missing}) or None
            body = one.model_dump_json(exclude_none=True).encode()
            answers.append(Answer(body, "miss", tuple(one.degraded or ())))
        whole = [
            (one.ask.user_id, self.variant(one.ask), one.generation, one.touched, answer.body)
            for one, answer in zip(wanted, answers, strict=True)
            if one.generation and not answer.degraded
        ]
        if whole:
            try:
                await self.guard.call("redis", partial(self.cache.put, whole))
            except StoreError:
                log.debug("answers were not cached")
        return answers

    async def _knowledge(self, generation: int | None) -> tuple[ServedKnowledge, frozenset[str]]:
        """What is served, read again only for another generation, by one caller where many ask at once.

        Where it cannot be read the last stays, and the store that is missing is named.
        """
        if self._served is not None and self._is_current(generation):
            return self._served, frozenset()
        async with self._reading:
            if self._served is None or not self._is_current(generation):
                if self._served is not None and time.monotonic() < self._unread_until:
                    return self._served, frozenset({"analytics"})
                try:
                    # It is large, and read once for all.
                    patience = self.settings.store_timeout_s
                    content = await self.guard.call("analytics", self.analytics.served, timeout_s=patience)
                    self._served = await asyncio.to_thread(ServedKnowledge.from_bytes, content)
                except StoreError:
                    if self._served is None:
                        raise
                    self._unread_until = time.monotonic() + _AGAIN_S
                    return self._served, frozenset({"analytics"})
                self._generation, self._read_at = generation, time.monotonic()
            return self._served, frozenset()

    def _is_current(self, generation: int | None) -> bool:
        if generation is None:
            return time.monotonic() - self._read_at < _UNSURE_S
        return generation == self._generation


def decide(known: Sequence[Known], asks: Sequence[Ask], now_ms: int, settings: Settings) -> list[Recommendations]:
    """Rank, apply the catalog's rules, explore, explain, for each ask what is known of its user. No store is asked.

    What was gathered at one time: all of the same candidates.
    """
    ranked_by = [_ranker(one, settings) for one in known]
    answers: dict[int, Recommendations] = {}
    for version in dict.fromkeys(one.version for one in ranked_by):
        places = [at for at, one in enumerate(ranked_by) if one.version == version]
        ranker = ranked_by[places[0]]
        some = [known[at] for at in places]
        answers.update(zip(places, _by_one(ranker, some, [asks[at] for at in places], now_ms, settings), strict=True))
    return [answers[at] for at in range(len(asks))]


@dataclass(frozen=True)
class _List:
    """What is shown to a user, before it is explained."""

    shown: list[str]
    propensities: list[float]
    held_back: list[Exclusion]
    arranged: Chosen


def _by_one(
    ranker: Ranker, known: Sequence[Known], asks: Sequence[Ask], now_ms: int, settings: Settings
) -> list[Recommendations]:
    served = known[0].served
    campaigns = [served.campaign_of[one] for one in known[0].campaigns.ids]
    boosts = np.asarray([one.boost for one in campaigns], dtype=np.float32)
    evidence = known[0].together.rows([one.at for one in known])
    scores = ranker.score(evidence) * boosts
    by_id = known[0].campaigns.by_id
    best_first = by_id[np.argsort(-scores[:, by_id], axis=1, kind="stable")].tolist()  # of equals, by id
    lists = [
        _listed(one, ask, [campaigns[at] for at in order], now_ms, settings)
        for one, ask, order in zip(known, asks, best_first, strict=True)
    ]
    # Only what is shown is split into shares: that costs far more than the scores of all.
    columns = np.zeros((len(known), max(len(one.shown) for one in lists)), dtype=np.int64)
    for at, (one, chosen) in enumerate(zip(known, lists, strict=True)):
        columns[at, : len(chosen.shown)] = [one.campaigns.column[campaign_id] for campaign_id in chosen.shown]
    names, shares = ranker.shares(evidence, columns)
    # A boost lifts nothing above certainty.
    given = shares * np.take_along_axis(boosts / np.maximum(scores, 1), columns, axis=1)[:, :, None]
    found = []
    for at, (one, ask, chosen) in enumerate(zip(known, asks, lists, strict=True)):
        recommendations = []
        for place, (campaign_id, propensity) in enumerate(zip(chosen.shown, chosen.propensities, strict=True)):
            campaign = served.campaign_of[campaign_id]
            parts: dict[Source, float] = dict(zip(names, map(float, given[at, place]), strict=True))
            told = reasons(one, campaign_id, parts, with_data=ask.explain)
            recommendations.append(
                Recommendation(
                    campaign_id=campaign_id,
                    name=campaign.name,
                    description=campaign.description,
                    category=campaign.category,
                    score=round(sum(one.share for one in told), 4),
                    position=place + 1,
                    propensity=float(f"{propensity:.6g}"),  # never 0, which no event may carry
                    reasons=told,
                )
            )
        found.append(
            Recommendations(
                user_id=one.viewer.user_id,
                strategy="personalized" if one.is_personal else "popular",
                policy=ranker.version,
                recommendations=recommendations,
                excluded=[*chosen.held_back, *chosen.arranged.excluded] if ask.explain else None,
                degraded=sorted(one.missing) or None,
            )
        )
    return found


def _listed(known: Known, ask: Ask, best_first: Sequence[Campaign], now_ms: int, settings: Settings) -> _List:
    served, viewer = known.served, known.viewer
    asked: Sequence[Campaign] = best_first
    if ask.explain:  # who asks why is told of those that ended, too
        asked = served.catalog.campaigns
    elif ask.category is None:  # all that run may be shown to whom they have not met, unless they name their audience
        met = served.with_audience | viewer.campaign_ids | ask.exclude
        asked = [served.campaign_of[one] for one in met if one in known.campaigns.column]
    held_back = exclusions(asked, viewer, now_ms, category=ask.category, unwanted=ask.exclude)
    out = {one.campaign_id for one in held_back}
    ranked = [one for one in best_first if one.id not in out]
    arranged = arrange(ranked, served.catalog.rules, ask.top)
    shown, propensities = explore(
        [*arranged.campaign_ids, *arranged.spare],
        ask.top,
        user_id=known.viewer.user_id,
        epoch=datetime.fromtimestamp(now_ms / 1000, UTC).strftime("%G-%V"),
        share=settings.exploration_share,
    )
    return _List(shown, propensities, held_back, arranged)


def _ranker(known: Known, settings: Settings) -> Ranker:
    """By the switch `RANKER`; a user of the experiment's share gets its ranker instead."""
    name = settings.ranker
    if settings.experiment_ranker and arm(known.viewer.user_id, settings.experiment_name, settings.experiment_share):
        name = settings.experiment_ranker
    if name == "auto":
        return known.served.learned or NAMED_RANKERS[known.served.fusion]
    return NAMED_RANKERS[name]


def _policy_digest(settings: Settings) -> str:
    """Digest of every setting that an answer depends on: processes that are set otherwise share no answers."""
    names = (
        "ranker",
        "exploration_share",
        "experiment_name",
        "experiment_ranker",
        "experiment_share",
        "neighbours",
        "profile_half_life_days",
    )
    return hashlib.blake2b(repr([getattr(settings, one) for one in names]).encode(), digest_size=4).hexdigest()


def _expressed(served: ServedKnowledge, vector: Vectors, keep: float) -> list[tuple[str, float]]:
    """Intents of the message with this vector (1, dim), and how sure they are."""
    if served.classifier is None:
        return []
    [reading] = served.classifier.classify(vector, keep)
    return reading.expressed


async def _closed(store: str, closing: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(_CLOSING_S):
            await closing
    except TimeoutError:
        log.warning("a client was not closed in time", store=store)


def _stand_in(before: LookedUp | None, error: StoreError) -> Answer:
    """The last stored answer, where it is of what the user did last: better than none, and it says what it lacks.

    Raises:
        StoreError: there is none.
    """
    if before is None or before.stored is None or not before.is_of_user:
        raise error
    body = b'{"degraded":["%s"],' % error.store.encode() + before.stored.body[1:]
    return Answer(body, "stale", (error.store,))


def _wanted(ask: Ask, before: LookedUp | None) -> _Wanted:
    return _Wanted(ask, before.generation if before else b"", before.touched if before else b"")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
