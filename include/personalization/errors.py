"""Errors whose message a person can act on: what is wrong, where, and what to do next."""


class PersonalizationError(Exception):
    """Base of every error the platform raises on purpose."""


class InputError(PersonalizationError):
    """An input file cannot be taken as a whole (missing, empty, not JSON, truncated …)."""


class RejectRatioExceededError(InputError):
    """More rows were quarantined than `max_reject_ratio` allows."""


class TooLittleFeedbackError(PersonalizationError):
    """Too few clicks and conversions to tell one policy from another."""


class NoSupportError(PersonalizationError):
    """The log of one policy says nothing of what another would have earned."""


class CatalogError(PersonalizationError):
    """The campaign catalog does not hold together."""


class EmbeddingError(PersonalizationError):
    """The embedding model cannot be used as configured."""


class MigrationError(PersonalizationError):
    """A migration to another embedding model cannot be made, or its outcome is not good enough to be served."""


class StagingError(PersonalizationError):
    """A staged file is missing or is not what its reference says."""


class SettingsError(PersonalizationError):
    """A setting is missing, or cannot be what it says. Repeats no secret."""


class StoreError(PersonalizationError):
    """A store is down, refuses the credentials, or refuses the operation.

    The message names the store and never holds a credential.
    """

    def __init__(self, store: str, problem: str) -> None:
        super().__init__(f"{store}: {problem}")
        self.store = store


class ErasureError(PersonalizationError):
    """Some users could not be erased from every store yet."""


class LocalStackError(PersonalizationError):
    """The embedded stack cannot be started or a process of it has died."""
