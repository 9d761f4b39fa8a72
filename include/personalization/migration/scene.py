"""What the stages of a migration work on."""

from dataclasses import dataclass

from personalization.catalog.loading import intents_version
from personalization.errors import MigrationError
from personalization.pipeline.spaces import live_space
from personalization.recommend.knowledge import ServedKnowledge
from personalization.schemas import Catalog, VectorSpace
from personalization.settings import Settings
from personalization.staging import Staging
from personalization.stores.together import Stores


@dataclass(frozen=True)
class Scene:
    """The stores, the settings, and the staging folder of the run."""

    stores: Stores
    staging: Staging
    settings: Settings

    def live(self) -> VectorSpace:
        """The space that is served.

        Raises:
            MigrationError: nothing is.
        """
        if self.stores.analytics.serving_state() is None:
            raise MigrationError(
                "nothing is published yet: set EMBEDDING_MODEL and EMBEDDING_DIM, and run the pipeline"
            )
        return live_space(self.stores.analytics, self.stores.vectors, self.settings)

    def catalog(self) -> Catalog:
        """As it is served, whatever became of its files since: the next run applies those.

        Raises:
            StoreError: it was published by another version of the platform.
        """
        return ServedKnowledge.from_bytes(self.stores.analytics.served_content() or b"").catalog

    def is_settled(self) -> bool:
        """Whether what is served is announced, and all messages were read by its classifier."""
        analytics = self.stores.analytics
        state = analytics.serving_state()
        expected = intents_version(self.catalog(), self.live(), self.settings)
        return analytics.served_at() is not None and state is not None and state.intents_version == expected
