"""A simulated world with known truth: who says what, which campaigns run, who engages with them, and why.

The words are those of real customers (clinc150, banking77); people, campaigns and engagement are drawn. Each
intent's messages are split into parts that share none: what users say, what campaigns are described with, and
the catalog's examples. All of it follows from one seed.

    python -m benchmarks.generator OUT_DIR --users 2000 --weeks 26 --campaigns-per-week 20 --seed 1
"""

import argparse
import csv
import gzip
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Strings = NDArray[np.object_]
Bools = NDArray[np.bool_]
Feedback = Literal["logged", "full"]
Corpus = Literal["clinc150", "banking77", "both"]

DATA = Path(os.environ.get("PERSONALIZATION_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "intents"
END = datetime(2026, 11, 1, tzinfo=UTC)
"""No message and no event is at or after this."""
POSITIONS = 5
"""Campaigns on a logged slate."""
EVENT_COLUMNS = ("user_id", "campaign_id", "event", "timestamp", "event_id", "position", "propensity", "policy")
EXPLORATION = 0.1
"""Share of logged slates that are drawn uniformly."""

_DAY = 86_400
_WEEK = 7 * _DAY
_COMMUNITIES = 12
_MAX_WEEKS_ACTIVE = 5
_SHELVES = 8
_SPEECH, _COPY = 0.6, 0.2  # shares of an intent's messages; the rest are examples
_OFF_TOPIC_DOMAINS = ("small_talk", "meta")
_OUT_OF_SCOPE = 0.3  # of what is off topic; the rest is small talk
_EXAMPLES_PER_INTENT = 12
_BANKING_DOMAINS = {"top_up": "top_ups", "topping_up": "top_ups", "transfer": "transfers", "beneficiary": "transfers"}
_BANKING_DOMAINS |= {"cash": "cash", "atm": "cash", "card": "cards", "pin": "cards", "contactless": "cards"}


@dataclass(frozen=True)
class Config:
    """What world to make. The same configuration makes the same world."""

    users: int = 2_000
    weeks: int = 26
    campaigns_per_week: int = 20
    seed: int = 1
    feedback: Feedback = "logged"
    """`full` shows all that is active on every slate and lets all of it be examined."""
    with_intents: bool = True
    """Whether campaigns come with intents and category, or with name and description alone."""
    corpus: Corpus = "clinc150"
    messages_per_user: float = 18.0
    engagements_per_user: float = 10.0
    """Organic ones."""
    slates_per_user: float = 1.2
    off_topic: float = 0.4
    """Share of messages that say nothing of what their user wants."""
    truth_users: int = 300
    """Users whose truth is written."""
    interest: float = 12.0
    community: float = 3.0
    quality: float = 1.2
    freshness: float = 0.4
    """Weights of the utility."""
    base: float = -7.0
    """With the utility, the log-odds of a click on what is examined."""

    def __post_init__(self) -> None:
        if min(self.users, self.weeks, self.campaigns_per_week) < 1:
            raise ValueError("users, weeks and campaigns a week must be at least 1")

    @property
    def start(self) -> datetime:
        """First moment of week 0."""
        return END - timedelta(weeks=self.weeks)


class Pool:
    """Texts by intent, to draw from."""

    def __init__(self, texts: Sequence[Sequence[str]]) -> None:
        self._sizes = np.array([len(some) for some in texts])
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._texts = np.array([text for some in texts for text in some], dtype=object)

    def draw(self, rng: np.random.Generator, intents: Ints) -> Strings:
        """A text of each intent, with replacement; any shape."""
        picked: Strings = self._texts[self._starts[intents] + rng.integers(self._sizes[intents])]
        return picked

    def of(self, intent: int) -> list[str]:
        """All texts of an intent."""
        start = self._starts[intent]
        return list(self._texts[start : start + self._sizes[intent]])


@dataclass(frozen=True)
class Texts:
    """Real messages, each in one part only."""

    intents: list[str]
    domains: list[str]
    domain_of: Ints
    """(intents)"""
    speech: Pool
    copy: Pool
    examples: Pool
    off_topic: Pool
    """Its two "intents" are small talk and out of scope."""


def load_texts(corpus: Corpus, rng: np.random.Generator) -> Texts:
    """Read the labelled messages and split each intent's."""
    with gzip.open(DATA / "clinc150_train_val.json.gz", "rt", encoding="utf-8") as stream:
        clinc = json.load(stream)
    domains = json.loads((DATA / "clinc150_domains.json").read_text(encoding="utf-8"))
    clinc_domain = {intent: domain for domain, intents in domains.items() for intent in intents}
    labelled = [(text, intent, clinc_domain[intent]) for part in ("train", "val") for text, intent in clinc[part]]
    small_talk = [text for text, _, domain in labelled if domain in _OFF_TOPIC_DOMAINS]
    rows = [row for row in labelled if row[2] not in _OFF_TOPIC_DOMAINS] if corpus != "banking77" else []
    if corpus != "clinc150":
        rows += _banking_rows()

    words: set[str] = set()
    by_intent: dict[tuple[str, str], list[str]] = {}
    for text, intent, domain in rows:
        same = " ".join(re.findall(r"\w+", text.casefold()))
        if same not in words:
            words.add(same)
            by_intent.setdefault((intent, domain), []).append(" ".join(text.split()))
    labels = sorted(by_intent, key=lambda label: label[::-1])
    parts: list[list[list[str]]] = [[], [], []]
    for label in labels:
        texts = by_intent[label]
        shuffled = [texts[place] for place in rng.permutation(len(texts))]
        cuts = np.cumsum([round(share * len(texts)) for share in (_SPEECH, _COPY)])
        for part, some in zip(parts, np.split(np.array(shuffled, dtype=object), cuts), strict=True):
            part.append(list(some))
    names = sorted({domain for _, domain in labels})
    return Texts(
        intents=[intent for intent, _ in labels],
        domains=names,
        domain_of=np.array([names.index(domain) for _, domain in labels]),
        speech=Pool(parts[0]),
        copy=Pool(parts[1]),
        examples=Pool(parts[2]),
        off_topic=Pool([small_talk, [text for part in ("oos_train", "oos_val") for text, _ in clinc[part]]]),
    )


def _banking_rows() -> list[tuple[str, str, str]]:
    with (DATA / "banking77_train.csv").open(encoding="utf-8", newline="") as stream:
        return [
            (row["text"], "b77_" + re.sub(r"\W", "", row["category"]).lower(), _banking_domain(row["category"]))
            for row in csv.DictReader(stream)
        ]


def _banking_domain(category: str) -> str:
    return next((domain for word, domain in _BANKING_DOMAINS.items() if word in category), "accounts")


@dataclass(frozen=True)
class Campaigns:
    """All campaigns; `C` of them, times in seconds since the world's start."""

    ids: Strings
    targets: Floats
    """(C, intents), rows sum to 1."""
    domain: Ints
    affinity: Floats
    """(C, communities)"""
    log_quality: Floats
    starts: Ints
    ends: Ints
    names: list[str]
    descriptions: list[str]


def make_campaigns(config: Config, texts: Texts, popularity: Floats, rng: np.random.Generator) -> Campaigns:
    """Draw the campaigns; those of the weeks before the first are there so that it starts with a full shelf."""
    weeks = np.repeat(np.arange(-_MAX_WEEKS_ACTIVE, config.weeks), config.campaigns_per_week)
    starts = weeks * _WEEK + rng.integers(7 * 24, size=len(weeks)) * 3_600
    ends = starts + rng.integers(7, 7 * _MAX_WEEKS_ACTIVE + 1, size=len(weeks)) * _DAY
    in_time = ends > 0
    starts, ends = starts[in_time], ends[in_time]
    order = np.argsort(starts, kind="stable")
    starts, ends, count = starts[order], ends[order], int(in_time.sum())

    attraction = np.sqrt(popularity)
    main = rng.choice(len(texts.intents), size=count, p=attraction / attraction.sum())
    domain = texts.domain_of[main]
    targets = np.zeros((count, len(texts.intents)))
    names, descriptions = [], []
    for campaign in range(count):
        mates = np.flatnonzero(texts.domain_of == domain[campaign])
        chosen = [int(main[campaign])]
        more = int(rng.choice(3, p=(0.4, 0.35, 0.25)))
        chosen += [int(rng.choice(mates if rng.random() < 0.9 else len(texts.intents))) for _ in range(more)]
        targets[campaign, chosen] = 1.0
        name, *sentences = _copy(texts, chosen, mates, rng)
        names.append(name)
        descriptions.append(" ".join(f"{sentence.rstrip('.?! ')}." for sentence in sentences))
    loved = rng.random((count, _COMMUNITIES)) < 0.15
    return Campaigns(
        ids=np.array([f"c{number:04d}" for number in range(1, count + 1)], dtype=object),
        targets=targets / targets.sum(axis=1, keepdims=True),
        domain=domain,
        affinity=loved * rng.uniform(0.7, 1.3, loved.shape),
        log_quality=rng.normal(size=count),
        starts=starts,
        ends=ends,
        names=names,
        descriptions=descriptions,
    )


def _copy(texts: Texts, intents: list[int], mates: Ints, rng: np.random.Generator) -> list[str]:
    """A name and two or three sentences about the intents; one in six is about another of the domain."""
    about = np.array([intents[0], *rng.choice(intents, size=rng.integers(2, 4))])
    astray = rng.random(len(about)) < 1 / 6
    about[astray] = rng.choice(mates, size=int(astray.sum()))
    return [text[0].upper() + text[1:] for text in texts.copy.draw(rng, about)]


@dataclass(frozen=True)
class Users:
    """All users; `U` of them."""

    ids: Strings
    membership: Floats
    """(U, communities), rows of length 1."""
    first_week: Ints
    last_week: Ints
    talk: Floats
    """Expected messages in a week."""
    engage: Floats
    """The same of engagements, with a mean of 1 over the users' total."""
    off_topic: Floats


def make_users(config: Config, rng: np.random.Generator) -> Users:
    """Draw the users: two in five are there at the start, the others come all through."""
    count = config.users
    first = np.where(rng.random(count) < 0.4, 0, rng.integers(config.weeks, size=count))
    last = np.minimum(first + np.ceil(rng.exponential(20.0, count)).astype(np.int64), config.weeks) - 1
    log_talk = rng.normal(size=count)
    log_engage = 0.6 * log_talk + 0.8 * rng.normal(size=count)
    stays = last - first + 1
    talk = np.exp(np.clip(1.2 * log_talk, None, 3.3))
    engage = np.exp(np.clip(1.0 * log_engage, None, 3.0))
    membership = np.zeros((count, _COMMUNITIES))
    rows = np.arange(count)
    share = np.where(rng.random(count) < 0.6, 1.0, rng.uniform(0.7, 0.9, count))
    homes = np.argsort(rng.random((count, _COMMUNITIES)), axis=1)[:, :2]
    membership[rows, homes[:, 0]] = share
    membership[rows, homes[:, 1]] = np.sqrt(1 - share**2)
    return Users(
        ids=np.array([f"u{number:05d}" for number in range(1, count + 1)], dtype=object),
        membership=membership,
        first_week=first,
        last_week=last,
        talk=talk * config.messages_per_user * count / (talk * stays).sum(),
        engage=engage * count / (engage * stays).sum(),
        off_topic=rng.beta(8 * config.off_topic, 8 * (1 - config.off_topic), count),
    )


class Interests:
    """What each user wants, week after week: a mix of domains, and in each a mix of its intents.

    Gamma variables in proportion to which the mixes are keep their distribution while they drift, so that
    a mix is Dirichlet distributed in every week.
    """

    _DOMAIN_ALPHA = 0.3
    _INTENT_ALPHA = 0.2

    def __init__(self, users: int, domain_of: Ints, popularity: Floats, rng: np.random.Generator) -> None:
        self._rng = rng
        self._domain_of = domain_of
        of_domain = np.bincount(domain_of, popularity)
        self._alphas = (
            np.broadcast_to(self._DOMAIN_ALPHA * of_domain / of_domain.mean(), (users, len(of_domain))),
            np.broadcast_to(self._INTENT_ALPHA * popularity / popularity.mean(), (users, len(popularity))),
        )
        self._restless = rng.random(users) < 0.3
        self._gammas = [rng.gamma(alpha) for alpha in self._alphas]

    def step(self) -> None:
        """Go on by a week: everyone drifts a little, a restless few change their mind."""
        changed = self._restless & (self._rng.random(len(self._restless)) < 0.06)
        for place, (gamma, alpha) in enumerate(zip(self._gammas, self._alphas, strict=True)):
            kept = np.where(changed[:, None], 0.02, 0.97)
            gamma = gamma * self._rng.beta(kept * alpha, (1 - kept) * alpha)
            self._gammas[place] = gamma + self._rng.gamma((1 - kept) * alpha)

    def mixes(self) -> tuple[Floats, Floats]:
        """Share of each intent's domain in what a user wants, and of the intent in its domain; (users, intents)."""
        domains, intents = (gamma + 1e-9 for gamma in self._gammas)
        totals = np.stack([intents[:, self._domain_of == one].sum(axis=1) for one in range(domains.shape[1])], axis=1)
        shares = domains / domains.sum(axis=1, keepdims=True)
        return shares[:, self._domain_of], intents / totals[:, self._domain_of]


@dataclass(frozen=True)
class Mechanics:
    """What decides how much a campaign is worth to a user at a moment; places of both, seconds since the start."""

    config: Config
    users: Users
    campaigns: Campaigns
    interest: NDArray[np.float32]
    """(weeks, users, intents), from 0 to 1."""

    def utility(self, users: Ints, campaigns: Ints, seconds: Ints) -> Floats:
        """Utility of every campaign for each user at that user's moment; (users, campaigns)."""
        known, config = self.campaigns, self.config
        weeks = seconds // _WEEK
        match = self.interest[weeks, users] @ known.targets[campaigns].T
        ties = self.users.membership[users] @ known.affinity[campaigns].T
        age = np.maximum(seconds[:, None] - known.starts[campaigns], 0) / _WEEK
        utility: Floats = (
            config.interest * match
            + config.community * ties
            + config.quality * known.log_quality[campaigns]
            + config.freshness * np.exp(-age)
        )
        return utility

    def relevance(self, utility: Floats) -> Floats:
        """Probability that a user clicks what they examine."""
        odds: Floats = np.exp(self.config.base + utility)
        return odds / (1 + odds)

    def active(self, campaigns: Ints, seconds: Ints) -> Bools:
        """Which campaigns run at which moment; (seconds, campaigns)."""
        moment = seconds[:, None]
        return (self.campaigns.starts[campaigns] <= moment) & (moment < self.campaigns.ends[campaigns])


class Visits(NamedTuple):
    """Who is there when, by time."""

    user: Ints
    seconds: Ints

    def take(self, which: Ints | Bools) -> "Visits":
        """Some of them."""
        return Visits(self.user[which], self.seconds[which])


class Messages(NamedTuple):
    """What was said, by time."""

    user: Ints
    seconds: Ints
    intent: Ints
    """Place of the intent meant, -1 for none."""
    text: Strings


class Events(NamedTuple):
    """What happened with campaigns, by time."""

    user: Ints
    campaign: Ints
    seconds: Ints
    position: Ints
    """From 1; 0 where there was none."""
    propensity: Floats
    """NaN where there was none."""
    policy: Strings
    """Blank where nothing was shown."""
    event: Strings

    def take(self, which: Ints | Bools) -> "Events":
        """Some of them."""
        return Events(
            self.user[which],
            self.campaign[which],
            self.seconds[which],
            self.position[which],
            self.propensity[which],
            self.policy[which],
            self.event[which],
        )

    def followed_by(self, event: str, delay: Ints) -> "Events":
        """The same with another event, seconds later."""
        return self._replace(event=_filled(event, self.event.shape), seconds=self.seconds + delay)


def _filled(value: str, shape: tuple[int, ...]) -> Strings:
    return np.full(shape, value, dtype=object)


class Score(NamedTuple):
    """Means over users, by the true probabilities."""

    users: int
    ndcg: float
    expected_clicks: float
    """On a slate of `k` that is examined as the logged ones are."""


class Truth:
    """True probability of a click, for some users and each campaign active at the first moment of a week."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        """user_id, campaign_id, week, utility, probability; the rows of a user and week lie together."""
        names = ("user_id", "week", "campaign_id", "probability")
        users, weeks, campaigns, probabilities = (table[name].to_numpy() for name in names)
        cuts = np.flatnonzero((users[1:] != users[:-1]) | (weeks[1:] != weeks[:-1])) + 1
        self._known = {
            (users[start], int(weeks[start])): (campaigns[start:end], probabilities[start:end])
            for start, end in itertools.pairwise([0, *cuts, len(users)])
            if start < end
        }

    @classmethod
    def load(cls, folder: Path) -> "Truth":
        """Read the truth of the world that was written to `folder`."""
        return cls(pq.read_table(folder / "truth.parquet"))

    def users(self, week: int) -> list[str]:
        """Users whose truth in a week is known."""
        return [user for user, known in self._known if known == week]

    def relevance(self, user_id: str, week: int) -> dict[str, float]:
        """Probability of a click on each campaign active at the week's start."""
        campaigns, probabilities = self._known[user_id, week]
        return dict(zip(campaigns, probabilities.tolist(), strict=True))

    def score(
        self,
        rankings: Mapping[str, Sequence[str]],
        week: int,
        k: int = 10,
        seen: Mapping[str, Collection[str]] | None = None,
    ) -> Score:
        """Score rankings made at a week's start; what a user has `seen` is neither ideal nor counted.

        Users whose truth is not known are left out; a campaign that is not active is worth nothing.
        """
        discounts = 1 / np.log2(np.arange(2, k + 2))
        examined = examination(np.arange(1, k + 1))
        gains, clicks = [], []
        for user, ranking in rankings.items():
            if (user, week) not in self._known:
                continue
            worth = self.relevance(user, week)
            for campaign in (seen or {}).get(user, ()):
                worth.pop(campaign, None)
            got = np.array([worth.get(campaign, 0.0) for campaign in ranking[:k]])
            ideal = np.sort(list(worth.values()))[::-1][:k]
            if ideal.any():
                gains.append(got @ discounts[: len(got)] / (ideal @ discounts[: len(ideal)]))
                clicks.append(got @ examined[: len(got)])
        if not gains:
            raise ValueError(f"the truth of week {week} is known of none of the {len(rankings)} ranked users")
        return Score(len(gains), float(np.mean(gains)), float(np.mean(clicks)))


def examination(positions: Ints) -> Floats:
    """Probability that a position, from 1, is looked at."""
    chance: Floats = 1 / positions**0.8
    return chance


@dataclass(frozen=True)
class World:
    """All that was drawn."""

    config: Config
    texts: Texts
    mechanics: Mechanics
    messages: Messages
    events: Events
    truth: Truth

    def write(self, folder: Path) -> None:
        """Write messages, events, catalog and truth."""
        (folder / "catalog").mkdir(parents=True, exist_ok=True)
        self._write_messages(folder / "messages.jsonl")
        self._write_events(folder / "events.csv")
        _write_yaml(folder / "catalog" / "intents.yaml", {"intents": self._intents()})
        _write_yaml(folder / "catalog" / "campaigns.yaml", {"campaigns": self._campaigns()})
        pq.write_table(self.truth.table, folder / "truth.parquet")
        about = {"config": asdict(self.config), "start": self.config.start.isoformat(), "end": END.isoformat()}
        (folder / "world.json").write_text(json.dumps(about | {"rows": self.counts()}, indent=2) + "\n")

    def counts(self) -> dict[str, int]:
        """Rows of each kind."""
        kinds, counts = np.unique(self.events.event, return_counts=True)
        rows = {"messages": len(self.messages.user), "campaigns": len(self.mechanics.campaigns.ids)}
        organic = int(((self.events.event == "click") & (self.events.policy == "")).sum())
        return rows | dict(zip(kinds.tolist(), counts.tolist(), strict=True)) | {"organic_click": organic}

    def _write_messages(self, path: Path) -> None:
        users = self.mechanics.users.ids[self.messages.user]
        rows = zip(users, self.messages.text, self._iso(self.messages.seconds), strict=True)
        with path.open("w", encoding="utf-8") as stream:
            for number, (user, text, moment) in enumerate(rows, 1):
                row = {"user_id": user, "message": text, "timestamp": moment, "message_id": f"m{number:07d}"}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _write_events(self, path: Path) -> None:
        events = self.events
        columns: list[Iterable[Any]] = [
            self.mechanics.users.ids[events.user],
            self.mechanics.campaigns.ids[events.campaign],
            events.event,
            self._iso(events.seconds),
            (f"e{number:07d}" for number in range(1, len(events.user) + 1)),
            (position or "" for position in events.position.tolist()),
            ("" if value != value else f"{value:.6g}" for value in events.propensity.tolist()),
            events.policy,
        ]
        with path.open("w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream, lineterminator="\n")
            rows.writerow(EVENT_COLUMNS)
            rows.writerows(zip(*columns, strict=True))

    def _intents(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one,
                "name": one.removeprefix("b77_").replace("_", " ").capitalize(),
                "examples": self.texts.examples.of(place)[:_EXAMPLES_PER_INTENT],
            }
            for place, one in enumerate(self.texts.intents)
        ]

    def _campaigns(self) -> list[dict[str, Any]]:
        campaigns = self.mechanics.campaigns
        rows = []
        for place, (start, end) in enumerate(zip(self._iso(campaigns.starts), self._iso(campaigns.ends), strict=True)):
            row = {
                "id": campaigns.ids[place],
                "name": campaigns.names[place],
                "description": campaigns.descriptions[place],
            }
            if self.config.with_intents:
                row["category"] = self.texts.domains[campaigns.domain[place]]
                row["intents"] = [self.texts.intents[one] for one in np.flatnonzero(campaigns.targets[place])]
            rows.append(row | {"active_from": start, "active_until": end})
        return rows

    def _iso(self, seconds: Ints) -> list[str]:
        moments = np.datetime64(self.config.start.replace(tzinfo=None), "s") + seconds.astype("timedelta64[s]")
        return [f"{moment}Z" for moment in np.datetime_as_string(moments).tolist()]


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    path.write_text(yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")


def generate(config: Config) -> World:
    """Draw a world. What is drawn for one part does not depend on how much is drawn for another."""
    text_rng, campaign_rng, user_rng, interest_rng, talk_rng, event_rng, truth_rng = np.random.default_rng(
        config.seed
    ).spawn(7)
    texts = load_texts(config.corpus, text_rng)
    popularity = text_rng.lognormal(sigma=0.5, size=len(texts.intents))
    campaigns = make_campaigns(config, texts, popularity, campaign_rng)
    users = make_users(config, user_rng)
    interests = Interests(config.users, texts.domain_of, popularity, interest_rng)
    interest = np.empty((config.weeks, config.users, len(texts.intents)), dtype=np.float32)
    said = []
    for week in range(config.weeks):
        if week:
            interests.step()
        of_domain, of_intent = interests.mixes()
        interest[week] = np.sqrt(of_domain) * (0.3 + 0.7 * np.sqrt(of_intent))
        said.append(_say(week, users, of_domain * of_intent, texts, talk_rng))
    mechanics = Mechanics(config, users, campaigns, interest)
    messages = Messages(
        np.concatenate([part.user for part in said]),
        np.concatenate([part.seconds for part in said]),
        np.concatenate([part.intent for part in said]),
        np.concatenate([part.text for part in said]),
    )
    events = Simulation(mechanics, event_rng).run()
    present = np.union1d(messages.user, events.user)
    sampled = np.sort(truth_rng.permutation(present)[: config.truth_users])
    return World(config, texts, mechanics, messages, events, truth_table(mechanics, sampled))


def _say(week: int, users: Users, mixes: Floats, texts: Texts, rng: np.random.Generator) -> Messages:
    """The messages of a week; `mixes` is (users, intents) and its rows sum to 1."""
    visits = _visits(week, users, users.talk, rng)
    count = len(visits.user)
    cumulated = np.cumsum(mixes, axis=1)[visits.user]
    intent = (cumulated < rng.random((count, 1)) * cumulated[:, -1:]).sum(axis=1)
    astray = rng.random(count) < users.off_topic[visits.user]
    kind = (rng.random(count) < _OUT_OF_SCOPE).astype(np.int64)
    text = np.where(astray, texts.off_topic.draw(rng, kind), texts.speech.draw(rng, intent))
    return Messages(visits.user, visits.seconds, np.where(astray, -1, intent), text)


def _visits(week: int, users: Users, rates: Floats, rng: np.random.Generator) -> Visits:
    """The visits of a week at so many a user on average: much in some weeks, little or nothing in others."""
    here = (users.first_week <= week) & (week <= users.last_week)
    counts = rng.poisson(rates * rng.gamma(0.7, 1 / 0.7, len(rates)) * here)
    user = np.repeat(np.arange(len(rates)), counts)
    day = week * 7 + rng.integers(7, size=len(user))
    of_day = np.minimum(rng.beta(3, 2, len(user)) * _DAY, _DAY - 1).astype(np.int64)
    visits = Visits(user, day * _DAY + of_day)
    return visits.take(np.argsort(visits.seconds, kind="stable"))


class Simulation:
    """Engagement day by day, because what was engaged with before draws more of it."""

    _HERDING = 0.3
    _SHELF_NOISE = 1.0
    _DISMISSED = 0.15  # of what is examined, not clicked and of no use

    def __init__(self, mechanics: Mechanics, rng: np.random.Generator) -> None:
        self._world = mechanics
        self._rng = rng
        self._engaged = np.zeros(len(mechanics.campaigns.ids))
        nothing = np.zeros(0, dtype=np.int64)
        none = _filled("", (0,))
        self._events = [Events(nothing, nothing, nothing, nothing, nothing.astype(np.float64), none, none)]

    def run(self) -> Events:
        """All events, by time."""
        config, users = self._world.config, self._world.users
        show = self._show_all if config.feedback == "full" else self._show_slates
        for week in range(config.weeks):
            organic = _visits(week, users, users.engage * config.engagements_per_user, self._rng)
            slates = _visits(week, users, users.engage * config.slates_per_user, self._rng)
            for day in range(week * 7, week * 7 + 7):
                self._engage(organic.take(organic.seconds // _DAY == day), day)
                show(slates.take(slates.seconds // _DAY == day), day)
        return self._all_events()

    def _all_events(self) -> Events:
        parts = self._events
        events = Events(
            np.concatenate([part.user for part in parts]),
            np.concatenate([part.campaign for part in parts]),
            np.concatenate([part.seconds for part in parts]),
            np.concatenate([part.position for part in parts]),
            np.concatenate([part.propensity for part in parts]),
            np.concatenate([part.policy for part in parts]),
            np.concatenate([part.event for part in parts]),
        )
        in_time = events.take(events.seconds < self._world.config.weeks * _WEEK)
        return in_time.take(np.argsort(in_time.seconds, kind="stable"))

    def _engage(self, visits: Visits, day: int) -> None:
        """Engagement without being shown anything: a softmax over utility and herding."""
        campaigns = self._world.campaigns
        live = np.flatnonzero((campaigns.starts < (day + 1) * _DAY) & (campaigns.ends > day * _DAY))
        active = self._world.active(live, visits.seconds)
        some = np.flatnonzero(active.any(axis=1))
        visits, active = visits.take(some), active[some]
        if not len(visits.user):
            return
        utility = self._world.utility(visits.user, live, visits.seconds)
        noisy = utility + self._HERDING * np.log1p(self._engaged[live]) + self._rng.gumbel(size=utility.shape)
        choice = np.where(active, noisy, -np.inf).argmax(axis=1)
        shape = choice.shape
        clicks = Events(
            visits.user,
            live[choice],
            visits.seconds,
            np.zeros(shape, dtype=np.int64),
            np.full(shape, np.nan),
            _filled("", shape),
            _filled("click", shape),
        )
        self._click(clicks, self._world.relevance(utility[np.arange(len(choice)), choice]))

    def _show_slates(self, visits: Visits, day: int) -> None:
        """Slates of the logging policy: one of the day's shelves, or for a few a random one."""
        live = self._all_day(day)
        size, slates = min(POSITIONS, len(live)), len(visits.user)
        if not size or not slates:
            return
        popularity = np.log1p(self._engaged[live])
        noise = self._SHELF_NOISE * self._rng.gumbel(size=(_SHELVES, len(live)))
        shelves = np.argsort(-(popularity + noise), axis=1)[:, :size]
        random = np.argsort(self._rng.random((slates, len(live))), axis=1)[:, :size]
        explored = self._rng.random(slates) < EXPLORATION
        shown = np.where(explored[:, None], random, shelves[self._rng.integers(_SHELVES, size=slates)])
        on_shelf = (shelves[:, None, :] == shown).mean(axis=0)
        propensity = EXPLORATION / len(live) + (1 - EXPLORATION) * on_shelf
        self._show(visits, live, shown, np.tile(np.arange(1, size + 1), (slates, 1)), propensity, "popularity")

    def _show_all(self, visits: Visits, day: int) -> None:
        """Slates of everything, in no order, all of it examined."""
        live = self._all_day(day)
        shown = np.tile(np.arange(len(live)), (len(visits.user), 1))
        if shown.size:
            self._show(visits, live, shown, np.zeros_like(shown), np.ones(shown.shape), "everything")

    def _show(self, visits: Visits, live: Ints, shown: Ints, position: Ints, propensity: Floats, policy: str) -> None:
        """Impressions and what follows; `shown` (places in `live`), `position`, `propensity` are (slates, places)."""
        size = shown.shape[1]
        impressions = Events(
            np.repeat(visits.user, size),
            live[shown].ravel(),
            np.repeat(visits.seconds, size),
            position.ravel(),
            propensity.ravel(),
            _filled(policy, (shown.size,)),
            _filled("impression", (shown.size,)),
        )
        utility = np.take_along_axis(self._world.utility(visits.user, live, visits.seconds), shown, axis=1).ravel()
        relevance = self._world.relevance(utility)
        chances = self._rng.random((3, shown.size))
        examined = chances[0] < examination(np.maximum(impressions.position, 1))
        clicked = examined & (chances[1] < relevance)
        dismissed = examined & ~clicked & (chances[2] < self._DISMISSED * np.exp(-np.maximum(utility, 0) / 4))
        delay = self._rng.integers(2, 90, size=shown.size)
        self._events += [impressions, impressions.take(dismissed).followed_by("dismiss", delay[dismissed])]
        self._click(impressions.take(clicked).followed_by("click", delay[clicked]), relevance[clicked])

    def _click(self, clicks: Events, relevance: Floats) -> None:
        """Clicks, and the conversions that follow some of them within hours."""
        converted = self._rng.random(len(relevance)) < 0.05 + 0.25 * relevance
        delay = 30 + self._rng.exponential(3 * 3_600, len(relevance)).astype(np.int64)
        self._events += [clicks, clicks.take(converted).followed_by("conversion", delay[converted])]
        np.add.at(self._engaged, clicks.campaign, 1)

    def _all_day(self, day: int) -> Ints:
        """Campaigns active from the first to the last moment of a day: what slates are made of."""
        campaigns = self._world.campaigns
        return np.flatnonzero((campaigns.starts <= day * _DAY) & (campaigns.ends >= (day + 1) * _DAY))


def truth_table(mechanics: Mechanics, users: Ints) -> Truth:
    """The truth of these users in the weeks from their first to their last."""
    parts = []
    everything = np.arange(len(mechanics.campaigns.ids))
    for week in range(mechanics.config.weeks):
        here = users[(mechanics.users.first_week[users] <= week) & (week <= mechanics.users.last_week[users])]
        moment = np.full(len(here), week * _WEEK)
        live = everything[mechanics.active(everything, np.array([week * _WEEK]))[0]]
        utility = mechanics.utility(here, live, moment)
        parts.append(
            pa.table(
                {
                    "user_id": pa.array(np.repeat(mechanics.users.ids[here], len(live)), pa.string()),
                    "campaign_id": pa.array(np.tile(mechanics.campaigns.ids[live], len(here)), pa.string()),
                    "week": pa.array(np.full(utility.size, week), pa.int32()),
                    "utility": pa.array(utility.ravel(), pa.float32()),
                    "probability": pa.array(mechanics.relevance(utility).ravel(), pa.float32()),
                }
            )
        )
    return Truth(pa.concat_tables(parts))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a world to a folder and print what it holds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generator", description=main.__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--users", type=int, default=Config.users)
    parser.add_argument("--weeks", type=int, default=Config.weeks)
    parser.add_argument("--campaigns-per-week", type=int, default=Config.campaigns_per_week)
    parser.add_argument("--seed", type=int, default=Config.seed)
    parser.add_argument("--feedback", choices=get_args(Feedback), default=Config.feedback)
    parser.add_argument("--no-intents", dest="with_intents", action="store_false")
    parser.add_argument("--corpus", choices=get_args(Corpus), default=Config.corpus)
    parser.add_argument("--messages-per-user", type=float, default=Config.messages_per_user)
    options = vars(parser.parse_args(arguments))
    folder = options.pop("out_dir")
    if not DATA.is_dir():
        parser.error(f"{DATA} is not here; PERSONALIZATION_TEST_DATA may name the folder of the real data sets")
    world = generate(Config(**options))
    world.write(folder)
    print(json.dumps(world.counts()))


if __name__ == "__main__":
    main()
