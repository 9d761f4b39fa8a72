"""API keys as the setting API_KEYS holds them: `name:scopes:sha256hex`, by comma; scopes joined by `+`.

A key is 256 random bits, so a plain SHA-256 hides it: there is nothing to guess that a slow hash would protect, and
each request is spared its cost. A name may stand there twice, while its key is exchanged for another.
"""

import hashlib
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

from personalization.errors import SettingsError

KeyScope = Literal["read", "write", "erase"]
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)

_PREFIX = "pp_"
"""Lets scanners for secrets know one when it was committed."""
_ENTRY = re.compile(r"(?P<name>[A-Za-z0-9_.-]{1,64}):(?P<scopes>[a-z+]+):(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True)
class ApiKey:
    """A key, as far as a server knows it."""

    name: str
    scopes: frozenset[str]
    digest: bytes

    def __str__(self) -> str:
        ordered = [scope for scope in SCOPES if scope in self.scopes]
        return f"{self.name}:{'+'.join(ordered)}:{self.digest.hex()}"


def key_digest(secret: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(secret).digest()


def new_key(name: str, scopes: Collection[str]) -> tuple[str, ApiKey]:
    """A secret for its bearer, and what the server is told of it.

    Raises:
        SettingsError: the name or a scope is none.
    """
    secret = _PREFIX + secrets.token_urlsafe(32)
    return secret, _parsed(f"{name}:{'+'.join(scopes)}:{key_digest(secret.encode()).hex()}", place=1)


def parse_keys(text: str) -> list[ApiKey]:
    """The keys of the setting API_KEYS.

    Raises:
        SettingsError: an entry is not one, or two entries are of the same key. Repeats nothing of them.
    """
    entries = [entry.strip() for entry in text.split(",")]
    keys = [_parsed(entry, place) for place, entry in enumerate(entries, start=1) if entry]
    if len({key.digest for key in keys}) < len(keys):
        raise SettingsError("API_KEYS names the same key twice")
    return keys


def _parsed(entry: str, place: int) -> ApiKey:
    match = _ENTRY.fullmatch(entry)
    scopes = frozenset(match["scopes"].split("+")) if match else frozenset()
    if match is None or not scopes <= set(SCOPES):
        raise SettingsError(
            f"entry {place} of API_KEYS is not name:scopes:sha256hex with a name of up to 64 letters, digits or "
            f"any of _ . - and scopes out of {'+'.join(SCOPES)}; `personalization keys new` makes one"
        )
    return ApiKey(match["name"], scopes, bytes.fromhex(match["digest"]))
