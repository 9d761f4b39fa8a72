"""What every task of the pipeline has in common."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow.sdk import get_current_context
from airflow.sdk.exceptions import AirflowFailException
from personalization.catalog.loading import load_catalog
from personalization.errors import CatalogError, InputError, MigrationError
from personalization.pipeline.lineage import StageReport, reported
from personalization.schemas import Catalog, VectorSpace
from personalization.settings import Settings, get_settings
from personalization.staging import Staging, write_atomically

from personalization_airflow.datasets import tell_datasets

if TYPE_CHECKING:
    from personalization.migration.scene import Scene

_CATALOG = "catalog.json"
_SPACE = "space.json"


@dataclass(frozen=True)
class Stage:
    """One task at work: its report, the run's staging folder, and the settings with the run's params."""

    report: StageReport
    staging: Staging
    settings: Settings

    def take_space(self, space: VectorSpace) -> VectorSpace:
        """Keep the vector space of the run for its other tasks."""
        write_atomically(self.staging.root / _SPACE, json.dumps(space).encode())
        return space

    @property
    def space(self) -> VectorSpace:
        """The vector space of the run, as its first task took it, whatever is live by now."""
        return _space_of(self.staging, self.settings)

    def take_catalog(self) -> Catalog:
        """Read and check the catalog, and keep it for the other tasks of the run."""
        return self.keep_catalog(load_catalog(self.settings.catalog_path))

    def keep_catalog(self, catalog: Catalog) -> Catalog:
        """Keep the catalog for the other tasks of the run."""
        write_atomically(self.staging.root / _CATALOG, catalog.model_dump_json().encode())
        return catalog

    @property
    def catalog(self) -> Catalog:
        """The catalog as `prepare` took it, whatever became of its files since."""
        return Catalog.model_validate_json((self.staging.root / _CATALOG).read_bytes())


@contextmanager
def stage(name: str) -> Iterator[Stage]:
    """Run the block as stage `name` of the current DAG run, keeping its report.

    What no retry can mend (bad input, a bad catalog, a check that does not hold) fails at once.
    """
    context = get_current_context()
    instance = context["ti"]
    settings = run_settings()
    run_id = str(context["run_id"])
    staging = Staging(settings.staging_uri, run_id)
    shard = max(instance.map_index or 0, 0)
    try:
        space = _space_of(staging, settings)
        with reported(
            staging, run_id, name, shard=shard, attempt=instance.try_number, settings=settings, model=space.model
        ) as report:
            tell_datasets(name, space, settings)
            try:
                yield Stage(report, staging, settings)
            finally:
                # Rendered by the task's `map_index_template`.
                is_mapped = instance.map_index is not None and instance.map_index >= 0
                told = f"{shard}: {report.summary}" if is_mapped else report.summary
                context["summary"] = told  # type: ignore[typeddict-unknown-key]
    except (InputError, CatalogError, MigrationError) as error:
        raise AirflowFailException(str(error)) from error


@contextmanager
def migration(name: str) -> Iterator[tuple[Stage, "Scene"]]:
    """Run the block as a stage of a migration, on all stores."""
    from personalization.migration.scene import Scene

    from personalization_airflow.stores import all_stores

    with stage(name) as s, all_stores(s.settings) as stores:
        yield s, Scene(stores, s.staging, s.settings)


def _space_of(staging: Staging, settings: Settings) -> VectorSpace:
    """As the run's first task took it; the settings' until then."""
    try:
        model, dim = json.loads((staging.root / _SPACE).read_bytes())
    except FileNotFoundError:
        return VectorSpace(settings.embedding_model, settings.embedding_dim)
    return VectorSpace(model, dim)


def failed_tasks(context: Any) -> list[tuple[str, int]]:
    """The run's tasks that Airflow knows to have failed, by stage and shard. One request."""
    instance, dag_run = context["ti"], context["dag_run"]
    ended = instance.get_task_breadcrumbs(dag_run.dag_id, dag_run.run_id)
    return [(one["task_id"], max(one["map_index"], 0)) for one in ended if one["state"] == "failed"]


def run_settings() -> Settings:
    """The settings, with what the run's params override."""
    params = get_current_context()["params"]
    names = ("catalog_path", "max_reject_ratio")
    overrides = {name: params[name] for name in names if params.get(name) not in (None, "")}
    settings = get_settings()
    return Settings.model_validate(settings.model_dump(exclude_unset=True) | overrides) if overrides else settings
