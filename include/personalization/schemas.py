"""The vocabulary that stages, stores and serving share."""

import hashlib
import re
import uuid
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

# Ids are literals in Milvus expressions, path segments and cache keys: no quote, backslash, slash,
# white space or control character may be in one.
_IDENTIFIER = re.compile(r"(?!\.+$)[\w.:@+=|~-]{1,128}")  # dots alone would be a path's


def _identifier(value: str) -> str:
    if not _IDENTIFIER.fullmatch(value):
        raise ValueError("must be 1 to 128 letters, digits or any of . : @ + = | ~ - _")
    return value


Identifier = Annotated[str, AfterValidator(_identifier)]
CatalogId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{1,63}$")]

OTHER_INTENT = "other"
"""What a message expresses when no intent of the catalog is near enough."""

_CLOCK_SKEW = timedelta(days=1)
_MESSAGE_NAMESPACE = uuid.UUID("6f2f3c1e-58a5-5d0f-9a53-0c6f1f6d2b7a")
_FOREVER_MS = 253_402_300_799_999  # 9999-12-31, the end of an open active window


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


class Message(BaseModel):
    """One thing a user said. Validation is strict: nothing is guessed or cut."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    user_id: Identifier
    message: Annotated[str, AfterValidator(_readable_text)]
    timestamp: datetime
    message_id: Identifier = Field(default=None, validate_default=True)

    @field_validator("timestamp", mode="before")
    @classmethod
    def _parse_timestamp(cls, value: Any) -> datetime:
        """Take an ISO 8601 string; one without a zone is UTC."""
        if not isinstance(value, str):
            raise ValueError("must be an ISO 8601 string such as 2026-01-31T09:00:00Z")
        try:
            if len(value) <= len("2026-01-31"):
                raise ValueError("a day without a time")
            moment = datetime.fromisoformat(value)
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        except (ValueError, OverflowError):
            raise ValueError("is not an ISO 8601 date and time such as 2026-01-31T09:00:00Z") from None
        if moment.year < 1970:
            raise ValueError("is before 1970")
        if moment > datetime.now(UTC) + _CLOCK_SKEW:
            raise ValueError("is in the future")
        return moment

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
        return int(self.timestamp.timestamp() * 1000)

    @property
    def content_hash(self) -> str:
        """128-bit digest of all that a change of which makes the message another one."""
        content = f"{self.user_id}\0{self.timestamp_ms}\0{self.message}"
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class Intent(BaseModel):
    """Something users want, known by utterances that express it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: CatalogId
    name: str = Field(min_length=1)
    description: str = ""
    examples: list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]] = Field(min_length=1)


class Campaign(BaseModel):
    """Something worth showing to users who express one of its intents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: CatalogId
    name: str = Field(min_length=1)
    description: str = ""
    category: str = Field(default="general", min_length=1, max_length=64)
    intents: list[CatalogId] = Field(min_length=1)
    active_from: date | None = None
    active_until: date | None = None

    @field_validator("intents")
    @classmethod
    def _intents_are_different(cls, intents: list[str]) -> list[str]:
        if len(set(intents)) < len(intents):
            raise ValueError("an intent is named twice")
        return intents

    @model_validator(mode="after")
    def _window_is_ordered(self) -> Self:
        if self.active_from and self.active_until and self.active_from >= self.active_until:
            raise ValueError("active_until must be after active_from")
        return self

    @property
    def active_from_ms(self) -> int:
        """First millisecond (UTC) in which the campaign may be shown."""
        return _midnight_ms(self.active_from) if self.active_from else 0

    @property
    def active_until_ms(self) -> int:
        """First millisecond (UTC) in which it may not be shown any more."""
        return _midnight_ms(self.active_until) if self.active_until else _FOREVER_MS


class Catalog(BaseModel):
    """The intents and campaigns a marketer edits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    intents: list[Intent] = Field(min_length=1)
    campaigns: list[Campaign] = Field(min_length=1)

    @model_validator(mode="after")
    def _ids_agree(self) -> Self:
        intent_ids = [intent.id for intent in self.intents]
        campaign_ids = [campaign.id for campaign in self.campaigns]
        for kind, ids in (("intent", intent_ids), ("campaign", campaign_ids)):
            if repeated := sorted({one for one in ids if ids.count(one) > 1}):
                raise ValueError(f"{kind} ids must be unique: {', '.join(repeated)}")
        if OTHER_INTENT in intent_ids:
            raise ValueError(f"the intent id `{OTHER_INTENT}` is reserved for messages that match no intent")
        for campaign in self.campaigns:
            if unknown := sorted(set(campaign.intents) - set(intent_ids)):
                raise ValueError(f"campaign {campaign.id} targets unknown intents: {', '.join(unknown)}")
        return self

    @property
    def intents_version(self) -> str:
        """Digest of what decides a message's intent; campaigns may change without it."""
        digest = hashlib.blake2b(digest_size=8)
        for intent in sorted(self.intents, key=lambda one: one.id):
            digest.update("\0".join([intent.id, *intent.examples, ""]).encode())
        return digest.hexdigest()


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
    """Mean cosine to the nearest example utterance."""


class Engagement(BaseModel):
    """How much of what a user said speaks to a campaign."""

    user_id: str
    campaign_id: str
    count: int
    last_at: int
    """Epoch milliseconds."""


class Reason(BaseModel):
    """One source's part in a recommendation. Shares of a recommendation add up to its score."""

    source: Literal["own_intents", "similar_users", "popularity"]
    text: str
    share: float


class Recommendation(BaseModel):
    """A campaign worth showing, with the reasons."""

    campaign_id: str
    name: str
    description: str
    category: str
    score: float = Field(ge=0, le=1)
    reasons: list[Reason]


class Recommendations(BaseModel):
    """Answer of `GET /recommendations/{user_id}`."""

    user_id: str
    strategy: Literal["personalized", "popular"]
    """`popular` marks the default for a user nothing is known of."""
    recommendations: list[Recommendation]


def _midnight_ms(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000)
