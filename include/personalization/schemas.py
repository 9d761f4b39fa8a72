"""The vocabulary that stages, stores and serving share."""

import hashlib
import re
import uuid
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal, NamedTuple, Self, TypedDict

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

# Ids are literals in Milvus expressions, path segments and cache keys: no quote, backslash, slash,
# white space or control character may be in one.
_IDENTIFIER = re.compile(r"(?!\.+$)[\w.:@+=|~-]{1,128}")  # dots alone would be a path's


def _identifier(value: str) -> str:
    if not is_identifier(value):
        raise ValueError("must be 1 to 128 letters, digits or any of . : @ + = | ~ - _")
    return value


# The API's document says the same in ECMA's regular expressions, where \w is of ASCII alone.
_IDENTIFIER_SCHEMA = {"type": "string", "pattern": r"^(?!\.+$)[\p{L}\p{N}_.:@+=|~\-]{1,128}$"}

Identifier = Annotated[str, AfterValidator(_identifier), WithJsonSchema(_IDENTIFIER_SCHEMA)]
GivenOrDerived = Annotated[Identifier, WithJsonSchema({"anyOf": [_IDENTIFIER_SCHEMA, {"type": "null"}]})]
"""An id that a row may lack, or leave empty: it is then derived from what the row says."""


def is_identifier(value: Any) -> bool:
    """Whether it may be a user's, message's or event's id."""
    return isinstance(value, str) and _IDENTIFIER.fullmatch(value) is not None


CatalogId = Annotated[str, StringConstraints(pattern=r'^[^\s\p{C}"`\\]([^\p{C}"`\\]{0,126}[^\s\p{C}"`\\])?$')]
"""An intent's or campaign's id: 1 to 128 printable characters, no quotation mark, backtick or backslash."""

OTHER_INTENT = "other"
"""What a message expresses when no intent of the catalog is near enough."""

_CLOCK_SKEW = timedelta(days=1)
_MESSAGE_NAMESPACE = uuid.UUID("6f2f3c1e-58a5-5d0f-9a53-0c6f1f6d2b7a")
_EVENT_NAMESPACE = uuid.UUID("0d5a3f0e-4c7b-5a6e-8f21-3b9a1d2c4e5f")
_FOREVER_MS = 253_402_300_799_999  # 9999-12-31, the end of an open active window


def erasure_id(user_id: str) -> str:
    """What is kept of an erased user: a digest that tells whether an id is theirs, and from which no id can be read."""
    return hashlib.blake2b(user_id.encode(), digest_size=16, person=b"erasure").hexdigest()


def _readable_text(text: str) -> str:
    if not text.strip():
        raise ValueError("is blank")
    if "\0" in text:
        raise ValueError("holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid UTF-8 (a lone surrogate or an undecodable byte)") from None
    return text


# As the API's document says it.
_in_document = Field(json_schema_extra={"pattern": r"^[^\x00]*[^\s\x00\x1c-\x1f\x85][^\x00]*$"})

MessageText = Annotated[str, AfterValidator(_readable_text), _in_document]
"""What somebody said: not blank, no NUL, valid UTF-8."""


def parse_moment(value: Any) -> datetime:
    """Aware UTC from an ISO 8601 string; one without a zone is UTC."""
    if not isinstance(value, str):
        raise ValueError("must be an ISO 8601 string such as 2026-01-31T09:00:00Z")
    try:
        if len(value) <= len("2026-01-31"):
            raise ValueError("a day without a time")
        moment = datetime.fromisoformat(value)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("is not an ISO 8601 date and time such as 2026-01-31T09:00:00Z") from None


def _past(moment: datetime) -> datetime:
    if moment.year < 1970:
        raise ValueError("is before 1970")
    if moment > datetime.now(UTC) + _CLOCK_SKEW:
        raise ValueError("is in the future")
    return moment


PastMoment = Annotated[
    datetime,
    BeforeValidator(parse_moment),
    AfterValidator(_past),
    Field(json_schema_extra={"description": "Not before 1970 and not in the future; UTC where it names no zone."}),
]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


whole_of_float = BeforeValidator(_whole)
"""JSON has one kind of number, and tables with gaps write 3 as 3.0."""


class Message(BaseModel):
    """One thing a user said. Validation is strict: nothing is guessed or cut."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    user_id: Identifier
    message: MessageText
    timestamp: PastMoment
    message_id: GivenOrDerived = Field(default=None, validate_default=True)

    @field_validator("message_id", mode="before")
    @classmethod
    def _derive_message_id(cls, value: Any, info: ValidationInfo) -> Any:
        """Give a row without `message_id` the UUIDv5 over `user_id|timestamp|message`."""
        if value is not None:
            return value
        key = [info.data.get(field) for field in ("user_id", "timestamp", "message")]
        if None in key:  # the row is refused for that field; this value is never seen
            return "-"
        return str(uuid.uuid5(_MESSAGE_NAMESPACE, "|".join(map(str, key))))

    @property
    def timestamp_ms(self) -> int:
        """Milliseconds since the epoch, the unit of every store but MongoDB."""
        return _epoch_ms(self.timestamp)

    @property
    def content_hash(self) -> str:
        """128-bit digest of all that a change of which makes the message another one."""
        return _digest(self.user_id, self.timestamp_ms, self.message)


EventKind = Literal["impression", "click", "conversion", "dismiss"]
PolicyName = Annotated[
    str, StringConstraints(min_length=1, max_length=64), AfterValidator(_readable_text), _in_document
]

ENGAGEMENT_STRENGTH: dict[str, float] = {"mention": 0.25, "click": 1.0, "conversion": 2.0}
"""How much a signal says for a campaign when it is new. A mention is a message that speaks to it."""

DAY_MS = 86_400_000
LATENCY_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the buckets that the API counts its answers in, by seconds; a last one has none."""
INTERESTS_PER_USER = 4
"""Topics of a user that are kept apart."""


class Event(BaseModel):
    """What a user did with a campaign. Validation is strict: nothing is guessed or cut."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    user_id: Identifier
    campaign_id: CatalogId
    event: EventKind
    timestamp: PastMoment
    event_id: GivenOrDerived = Field(default=None, validate_default=True)
    position: Annotated[int, Field(ge=1, le=1000), whole_of_float] | None = None
    """Place in the list that was shown, from 1."""
    propensity: float | None = Field(default=None, gt=0, le=1)
    """Probability with which the policy showed the campaign at that place."""
    policy: PolicyName | None = None
    """The policy that chose the list."""

    @field_validator("event_id", mode="before")
    @classmethod
    def _derive_event_id(cls, value: Any, info: ValidationInfo) -> Any:
        """Give a row without `event_id` the UUIDv5 over `user_id|campaign_id|event|timestamp`."""
        if value is not None:
            return value
        key = [info.data.get(field) for field in ("user_id", "campaign_id", "event", "timestamp")]
        if None in key:  # the row is refused for that field; this value is never seen
            return "-"
        return str(uuid.uuid5(_EVENT_NAMESPACE, "|".join(map(str, key))))

    @classmethod
    def of_row(cls, values: dict[str, Any], *, of_strings: bool) -> Self:
        """Validate a row. A CSV cell has no type and may be padded."""
        if of_strings:
            cells = {name: cell.strip() for name, cell in values.items()}
            values = {name: cell for name, cell in cells.items() if cell}
            for name in values.keys() & {"position", "propensity"}:
                with suppress(ValueError):  # then it is refused as the text it is
                    values[name] = float(values[name])
        return cls.model_validate(values)

    @property
    def timestamp_ms(self) -> int:
        """Milliseconds since the epoch."""
        return _epoch_ms(self.timestamp)

    @property
    def content_hash(self) -> str:
        """128-bit digest of all that a change of which makes the event another one."""
        what = (self.user_id, self.campaign_id, self.event, self.timestamp_ms)
        return _digest(*what, self.position, self.propensity, self.policy)


class Acknowledgement(BaseModel):
    """Somebody has seen an anomaly, and says what it was."""

    model_config = ConfigDict(frozen=True, str_strip_whitespace=True)

    anomaly_id: str = Field(pattern=r"^[0-9a-f]{24}$")
    who: Annotated[str, Field(min_length=1, max_length=100)]
    note: Annotated[str, Field(max_length=1000)] = ""
    at: AwareDatetime


class Intent(BaseModel):
    """Something users want, known by utterances that express it."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    id: CatalogId
    name: str = Field(min_length=1)
    description: str = ""
    examples: list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]] = Field(min_length=1)


def repeated(ids: Iterable[str]) -> list[str]:
    """Those that come more than once, sorted."""
    return sorted(one for one, times in Counter(ids).items() if times > 1)


def _moment(value: Any) -> Any:
    """A day is its first moment; a moment without a zone is UTC."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value.strip())
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        if isinstance(value, date):
            return datetime(value.year, value.month, value.day, tzinfo=UTC)
    except (ValueError, OverflowError) as error:  # its own words say which part no calendar has
        raise ValueError(f"is no day or moment ({error}); write 2026-01-31 or 2026-01-31T09:00:00Z") from None
    raise ValueError("is no day or moment; write 2026-01-31 or 2026-01-31T09:00:00Z")


Moment = Annotated[datetime, BeforeValidator(_moment)]


class Audience(BaseModel):
    """Who may see a campaign. Empty lists ask for nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    include_users: list[Identifier] = []
    """Only these users."""
    exclude_users: list[Identifier] = []
    include_intents: list[CatalogId] = []
    """Only users who expressed one of these."""
    exclude_intents: list[CatalogId] = []
    """No user who expressed one of these."""


class FrequencyCap(BaseModel):
    """Shown to a user at most so often."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    impressions: int = Field(ge=1)
    days: float = Field(gt=0, le=365)


class NotAgain(BaseModel):
    """Days for which a campaign is not shown again; 0 for never holding it back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after_conversion_days: float = Field(default=90, ge=0, le=3650)
    after_dismiss_days: float = Field(default=30, ge=0, le=3650)


class Campaign(BaseModel):
    """Something worth showing to users who express one of its intents, or whose words are near its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)

    id: CatalogId
    name: str = Field(min_length=1)
    description: str = ""
    category: str = Field(default="general", min_length=1, max_length=64)
    intents: list[CatalogId] = []
    active_from: Moment | None = None
    active_until: Moment | None = None
    audience: Audience = Field(default_factory=Audience)
    frequency_cap: FrequencyCap | None = None
    not_again: NotAgain = Field(default_factory=NotAgain)
    boost: float = Field(default=1.0, ge=0.1, le=10)
    """Factor on the score."""
    pinned: int | None = Field(default=None, ge=1, le=50)
    """Place it takes in every list it may be in."""

    @field_validator("intents")
    @classmethod
    def _intents_are_different(cls, intents: list[str]) -> list[str]:
        if len(set(intents)) < len(intents):
            raise ValueError(f"names {', '.join(repeated(intents))} more than once; name each intent once")
        return intents

    @field_validator("active_until")
    @classmethod
    def _window_is_ordered(cls, until: datetime | None, info: ValidationInfo) -> datetime | None:
        start = info.data.get("active_from")
        if start and until and start >= until:
            raise ValueError(
                "is not after active_from; write the moment from which the campaign is over, such as the day after "
                "its last"
            )
        return until

    @property
    def named_intents(self) -> set[str]:
        """All intents it names, to target, include or exclude."""
        return {*self.intents, *self.audience.include_intents, *self.audience.exclude_intents}

    @property
    def active_from_ms(self) -> int:
        """First millisecond (UTC) in which the campaign may be shown."""
        return _epoch_ms(self.active_from) if self.active_from else 0

    @property
    def active_until_ms(self) -> int:
        """First millisecond (UTC) in which it may not be shown any more."""
        return _epoch_ms(self.active_until) if self.active_until else _FOREVER_MS

    @property
    def text(self) -> str:
        """What the campaign says, as it is embedded."""
        return f"{self.name}. {self.description}" if self.description else self.name


class CatalogRules(BaseModel):
    """Rules over whole lists."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_per_category: int | None = Field(default=None, ge=1)
    """Campaigns of one category in a list at most, as long as others are left to fill it."""


class Catalog(BaseModel):
    """The intents and campaigns a marketer edits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intents: list[Intent] = []
    campaigns: list[Campaign] = []
    rules: CatalogRules = CatalogRules()

    @model_validator(mode="after")
    def _ids_agree(self) -> Self:
        intent_ids = [intent.id for intent in self.intents]
        campaign_ids = [campaign.id for campaign in self.campaigns]
        for kind, ids in (("intent", intent_ids), ("campaign", campaign_ids)):
            if twice := repeated(ids):
                raise ValueError(f"{kind} ids must be unique: {', '.join(twice)}")
        if OTHER_INTENT in intent_ids:
            raise ValueError(f"the intent id `{OTHER_INTENT}` is reserved for messages that match no intent")
        known = set(intent_ids)
        for campaign in self.campaigns:
            if unknown := sorted(campaign.named_intents - known):
                raise ValueError(f"campaign {campaign.id} names unknown intents: {', '.join(unknown)}")
        return self

    @property
    def intents_version(self) -> str:
        """Digest of what decides a message's intent; campaigns may change without it."""
        digest = hashlib.blake2b(digest_size=8)
        for intent in sorted(self.intents, key=lambda one: one.id):
            digest.update("\0".join([intent.id, *intent.examples, ""]).encode())
        return digest.hexdigest()


class VectorSpace(NamedTuple):
    """What makes two vectors comparable: the model and the number of dimensions, zero-padded, of unit length."""

    model: str
    dim: int

    @property
    def vector_bytes(self) -> int:
        """Of one vector of float32."""
        return self.dim * 4

    @property
    def digest(self) -> str:
        """Tells it from every other space, in eight characters."""
        return hashlib.blake2b(f"{self.model}\0{self.dim}\0l2".encode(), digest_size=4).hexdigest()

    @property
    def name(self) -> str:
        """Readable, and unique by its digest; letters, digits and underscores."""
        slug = re.sub(r"\W+", "_", self.model.rsplit("/", 1)[-1]).strip("_").lower()[:60]
        return f"{slug}_{self.dim}_{self.digest}"

    def collection(self, alias: str) -> str:
        """Name of the collection in Milvus behind `alias`."""
        return f"{alias}_{self.name}"


SpaceState = Literal["live", "filling", "kept", "behind"]
"""`live`: what is served is of it. `filling`: a migration to it is under way. `kept`: as it was live before, for a way
back. Runs keep these up to date; `behind`: one could not, so a migration to it fills it anew.
"""


class Ref(TypedDict):
    """Reference to one staged Parquet file: what travels through XCom."""

    uri: str
    rows: int
    sha256: str


class ExpressedIntent(BaseModel):
    """An intent a user expressed, summed over their messages."""

    user_id: str
    intent_id: str
    count: int
    last_seen: int
    """Epoch milliseconds."""
    confidence: float
    """Mean probability of the intent in the messages that express it."""
    weight: float
    """Sum of the confidences, each halved for every half-life by which it is older than `last_seen`."""


class Engagement(BaseModel):
    """What speaks for or against a campaign in what a user said and did. Times are epoch milliseconds."""

    user_id: str
    campaign_id: str
    count: int = 0
    """Mentions: messages that speak to the campaign."""
    last_at: int = 0
    """The last mention; 0 where there is none."""
    impressions: int = 0
    clicks: int = 0
    conversions: int = 0
    dismisses: int = 0
    last_event_at: int | None = None
    """The last event of any kind."""
    last_impression_at: int | None = None
    last_conversion_at: int | None = None
    last_dismiss_at: int | None = None
    weight: float = 0.0
    """Sum of the positive signals' `ENGAGEMENT_STRENGTH`, each halved for every half-life by which it is
    older than `weight_at`."""
    weight_at: int | None = None
    """The last positive signal: mention, click or conversion."""

    @property
    def signals(self) -> int:
        """Positive signals."""
        return self.count + self.clicks + self.conversions


Source = Literal[
    "own_intents",
    "own_engagement",
    "similar_users",
    "co_engagement",
    "graph_walk",
    "message_similarity",
    "audience_similarity",
    "popularity",
    "recency",
]
"""What can speak for a campaign."""


class Reason(BaseModel):
    """One source's part in a recommendation. Shares of a recommendation add up to its score."""

    source: Source
    text: str
    share: float
    data: dict[str, Any] | None = None
    """The facts behind the text, where they were asked for."""


class Recommendation(BaseModel):
    """A campaign worth showing, with the reasons."""

    campaign_id: str
    name: str
    description: str
    category: str
    score: float = Field(ge=0, le=1)
    position: int
    """Place in the list, from 1; to be sent back with the events."""
    propensity: float
    """Probability that the policy puts this campaign at this place; to be sent back with the events."""
    reasons: list[Reason]


class Exclusion(BaseModel):
    """A campaign that is not shown, and the rule that says so."""

    campaign_id: str
    rule: str
    text: str


class Recommendations(BaseModel):
    """Answer of `GET /recommendations/{user_id}`."""

    user_id: str
    strategy: Literal["personalized", "popular"]
    """`popular` marks the default for a user nothing is known of."""
    policy: str
    """What ranked the list; to be sent back with the events."""
    recommendations: list[Recommendation]
    excluded: list[Exclusion] | None = None
    """Campaigns, running or about to, that a rule holds back, where that was asked for."""
    degraded: list[str] | None = None
    """Stores that could not be asked, where there are any: what they know is not in the answer."""


class ExpressedNow(BaseModel):
    """An intent that a message expresses."""

    intent_id: str
    name: str
    confidence: float


class Preview(BaseModel):
    """Answer of `POST /recommendations:preview`."""

    intents: list[ExpressedNow]
    policy: str
    recommendations: list[Recommendation]
    degraded: list[str] | None = None
    """As in `Recommendations`."""


ErasedStore = Literal["mongodb", "milvus", "neo4j", "analytics", "redis", "staging"]
"""Where something of a user may be."""


class StoreReceipt(BaseModel):
    """What became of a user in one store."""

    store: ErasedStore
    status: Literal["erased", "pending"]
    removed: dict[str, int]
    """By collection, table or kind, over all attempts; those of an attempt that broke off are missing."""
    remaining: int | None
    """Counted after the removal: 0 where it is `erased`; null where it could not be counted."""
    problem: str | None = None


class ErasureReceipt(BaseModel):
    """Answer of `DELETE /users/{user_id}`: what was removed where, and what is left to be done."""

    user_id: str
    erasure_id: str
    """All that is kept of the user: a digest of the id."""
    status: Literal["erased", "queued"]
    """`erased`: nothing is left in any store. `queued`: in some it could not be done or not be verified yet; the DAG
    `maintenance` goes on until it is."""
    requested_at: datetime
    settled_at: datetime | None = None
    """When `maintenance` found nothing again, after all that was at work at the request had ended; until then it
    looks again every hour."""
    stores: list[StoreReceipt]


def _epoch_ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _digest(*content: Any) -> str:
    return hashlib.blake2b("\0".join(map(str, content)).encode(), digest_size=16).hexdigest()
