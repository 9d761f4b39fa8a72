"""Every setting of the platform, read from the environment.

Later sources win: the defaults below, `.env`, `.local/stack.env` (there only while the embedded
stack is up, with what `.env` says of it taken over), the process environment.
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import URL, make_url

STACK_ENV_FILE = Path(".local/stack.env")


class Settings(BaseSettings):
    """Configuration shared by the pipeline, the API and the dashboard.

    Only these values tell the embedded local stack from production.
    """

    model_config = SettingsConfigDict(
        env_file=(".env", STACK_ENV_FILE),
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
    )

    # --- stores
    mongodb_uri: SecretStr = SecretStr("mongodb://127.0.0.1:27017/?directConnection=true")
    mongodb_database: str = "personalization"
    milvus_host: str = "127.0.0.1"
    milvus_port: int = Field(default=19530, ge=1, le=65535)
    milvus_token: SecretStr = Field(
        default=SecretStr(""), description="`user:password` or an API key; empty where Milvus asks for none."
    )
    neo4j_uri: str = "bolt://127.0.0.1:7687"
    neo4j_user: str = "neo4j"
    neo4j_password: SecretStr = SecretStr("")
    neo4j_database: str = "neo4j"
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    sqlite_path: Path = Field(
        default=Path(".local/data/analytics.db"),
        description="Analytics database, unless ANALYTICS_URL is set.",
    )
    analytics_url: SecretStr | None = Field(
        default=None, description="SQLAlchemy URL of the analytics database, such as PostgreSQL's."
    )
    store_timeout_s: float = Field(default=5.0, gt=0, description="Connect and query timeout of every store.")

    # --- embedding
    embedding_model: str = "sentence-transformers/all-roberta-large-v1"
    embedding_dim: int = Field(default=1024, ge=8, le=32768, description="Smaller models are zero-padded to it.")
    vector_cache_days: int = Field(
        default=30, ge=0, description="Days for which Redis keeps the vectors of messages; 0: it keeps none."
    )
    embedding_url: str = Field(
        default="http://127.0.0.1:8001",
        description="The embedding service, which the API asks for vectors of messages.",
    )

    # --- pipeline
    staging_uri: str = Field(default=".local/staging", description="Folder or object-store URI of staged files.")
    staging_retention_days: int = Field(default=7, ge=0)
    inbox_uri: str = Field(default=".local/inbox", description="Where scheduled runs look for new files.")
    catalog_path: Path = Path("include/catalog")
    shard_rows: int = Field(default=5000, ge=1, description="Messages in a staged shard; bounds a task's memory.")
    max_message_chars: int = Field(default=8192, ge=1)
    max_reject_ratio: float = Field(default=0.5, ge=0, le=1)
    intent_keep: float = Field(
        default=0.94,
        ge=0.5,
        lt=1,
        description="Share of messages that express an intent of the catalog to keep; the others become `other`. "
        "Lower refuses more.",
    )
    profile_half_life_days: float = Field(default=30.0, gt=0)
    profile_max_messages: int = Field(default=200, ge=1, description="Newest messages that make a user's vector.")
    learning_max_messages: int = Field(
        default=200_000, ge=1, description="Newest messages whose vectors are learned from and evaluated on."
    )

    # --- serving
    answer_timeout_s: float = Field(default=2.0, gt=0, description="Longest that an answer of the API may take.")
    answer_store_timeout_s: float = Field(
        default=0.5, gt=0, description="Longest that one store may take for it; after that it is left out and named."
    )
    cache_ttl_s: int = Field(default=300, ge=1)
    neighbours: int = Field(default=20, ge=0, le=1000, description="Similar users that are asked for campaigns.")
    ranker: Literal["auto", "fusion", "similar_users"] = Field(
        default="auto",
        description="auto: the learned ranker where it has proved better; fusion or similar_users: that one.",
    )
    exploration_share: float = Field(
        default=0.05, ge=0, le=0.5, description="Share of users whose last place is drawn from all that is left."
    )
    experiment_name: str = Field(default="", max_length=64, description="Names the A/B split; a new name draws anew.")
    experiment_ranker: Literal["", "auto", "fusion", "similar_users"] = ""
    experiment_share: float = Field(default=0.1, ge=0, le=1, description="Share of users who get EXPERIMENT_RANKER.")

    # --- what people see of it
    dashboard_url: str = Field(
        default="http://127.0.0.1:8501", description="Where people reach the dashboard, which Airflow's UI links to."
    )
    code_commit: str = Field(default="", description="The commit that is run, which lineage keeps with the version.")

    # --- the API's surface
    api_auth: Literal["keys", "off"] = Field(
        default="keys", description="off: no key is asked for, and only clients of this machine are served."
    )
    api_keys: SecretStr = Field(
        default=SecretStr(""), description="name:scopes:sha256hex, by comma; `personalization keys new` makes one."
    )
    rate_limit: str = Field(
        default="600/second",
        pattern=r"^[1-9]\d*/(second|minute|hour|day)$",
        description="Requests of one key that a process of the API takes.",
    )
    max_body_bytes: int = Field(default=1_048_576, ge=1024, description="Largest body of a request.")
    max_in_flight: int = Field(
        default=256, ge=1, description="Requests answered at once; beyond them the API says 503 at once."
    )
    cors_origins: str = Field(
        default="", description="Origins, by comma, whose pages may ask from a browser, such as https://shop.example."
    )

    # --- the dashboard
    api_url: str = Field(default="http://127.0.0.1:8000", description="The API, which the dashboard asks about users.")
    api_key: SecretStr = Field(
        default=SecretStr(""), description="Key with the scope `read`; empty where the API asks for none."
    )
    dashboard_auth: Literal["password", "off"] = Field(
        default="password", description="off: no password is asked for, and only clients of this machine are served."
    )
    dashboard_password: SecretStr = SecretStr("")

    @property
    def analytics_database(self) -> URL:
        """SQLAlchemy URL of the analytics database, without a driver for async use."""
        if self.analytics_url is not None:
            return make_url(self.analytics_url.get_secret_value())
        return URL.create("sqlite", database=str(self.sqlite_path))

    @property
    def milvus_uri(self) -> str:
        """Address the Milvus clients take."""
        return f"http://{self.milvus_host}:{self.milvus_port}"


@lru_cache
def get_settings() -> Settings:
    """The process's settings, read once."""
    return Settings()
