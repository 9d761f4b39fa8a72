"""Every DAG keeps the house rules, and the pipeline's tasks depend on each other as they must."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

DAGS = PROJECT / "dags"
NAMES = sorted(path.stem for path in DAGS.glob("*.py"))
PIPELINE = "personalization_pipeline"
AROUND = {"record_lineage", "complete"}  # the tasks that are no stages

HEAVY = {"torch", "sentence_transformers", "pymilvus", "pyarrow", "pymongo", "neo4j", "lightgbm", "scipy", "sklearn"}


@pytest.fixture(scope="module")
def dagbag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Airflow's own reading of the folder, without a database and away from anybody's AIRFLOW_HOME."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
        patch.setenv("AIRFLOW__CORE__LOAD_EXAMPLES", "False")
        from airflow.dag_processing.dagbag import DagBag

        yield DagBag(DAGS, known_pools={"default_pool", "embedding"})


@pytest.fixture(params=NAMES)
def dag(dagbag: Any, request: pytest.FixtureRequest) -> Any:
    """Each DAG in turn; a file makes one, named as the file."""
    return dagbag.dags[request.param]


@pytest.fixture
def pipeline(dagbag: Any) -> Any:
    return dagbag.dags[PIPELINE]


@pytest.fixture
def evaluation(dagbag: Any) -> Any:
    return dagbag.dags["offline_evaluation"]


# --- all DAGs


def test_every_file_makes_one_dag_of_its_name_without_an_error(dagbag: Any):
    assert dagbag.import_errors == {}
    assert sorted(dagbag.dags) == NAMES
    assert PIPELINE in NAMES


def test_a_dag_has_an_owner_tags_and_a_description(dag: Any):
    assert dag.owner not in ("", "airflow")
    assert dag.tags
    assert len(dag.doc_md) > 100
    assert dag.doc_md.lstrip().startswith("#")


def test_a_dag_neither_catches_up_nor_overlaps_itself(dag: Any):
    assert dag.catchup is False
    assert dag.max_active_runs == 1


def test_a_dag_says_of_every_param_what_it_is(dag: Any):
    for name in dag.params:
        param = dag.params.get_param(name)
        assert param.schema.get("title"), name
        assert param.description, name
        types = param.schema["type"]
        known = {"null", "string", "number", "integer", "boolean", "array", "object"}
        assert set([types] if isinstance(types, str) else types) <= known, name
        if name != "model":  # which a migration must be told
            param.resolve()  # the default is valid


def test_every_task_is_retried_at_growing_intervals(dag: Any):
    for task in dag.tasks:
        assert task.retries >= 2, task.task_id
        assert task.retry_delay > timedelta(0), task.task_id
        assert task.retry_exponential_backoff, task.task_id
        assert task.max_retry_delay <= timedelta(minutes=30), task.task_id


def test_no_task_runs_for_ever(dag: Any):
    for task in dag.tasks:
        assert timedelta(0) < task.execution_timeout <= timedelta(hours=6), task.task_id


def test_every_task_says_what_it_does(dag: Any):
    for task in dag.tasks:
        if work := getattr(task, "python_callable", None):
            assert task.doc_md or work.__doc__, task.task_id
        assert task.owner == dag.owner, task.task_id


def test_somebody_may_be_told_of_every_task_that_fails(dag: Any):
    from personalization_airflow.notifications import of_failure

    for task in dag.tasks:
        callbacks = task.partial_kwargs["on_failure_callback"] if task.is_mapped else task.on_failure_callback
        assert of_failure in (callbacks if isinstance(callbacks, list | tuple) else [callbacks]), task.task_id


def test_every_pool_is_one_that_the_stack_makes(dag: Any):
    assert {task.pool for task in dag.tasks} <= {"default_pool", "embedding"}


@pytest.mark.parametrize("name", NAMES)
def test_parsing_loads_no_driver_and_no_model(tmp_path: Path, name: str):
    script = (
        f"import sys; sys.path[:0] = [{str(DAGS)!r}]\n"
        f"import {name}\n"
        "print('loaded:', *{one.partition('.')[0] for one in sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"AIRFLOW_HOME": str(tmp_path), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert {"airflow", "personalization_airflow"} <= loaded
    assert loaded & HEAVY == set()


# --- the evaluation


def test_the_evaluation_is_one_task_a_week(evaluation: Any):
    assert evaluation.schedule == "@weekly"
    assert set(evaluation.params) == {"task", "split_days", "weeks", "policies"}
    assert {"personalization", "evaluation"} <= set(evaluation.tags)
    [task] = evaluation.tasks
    assert (task.task_id, task.execution_timeout) == ("evaluate", timedelta(hours=2))


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("task", "any", True),
        ("task", "old", False),
        ("task", None, False),
        ("split_days", 1, True),
        ("split_days", 0, False),
        ("split_days", 1.5, False),
        ("weeks", 52, True),
        ("weeks", 53, False),
        ("weeks", "4", False),
        ("policies", None, True),
        ("policies", ["shipped", "popularity"], True),
        ("policies", "shipped", False),
        ("policies", [7], False),
    ],
)
def test_the_conf_of_an_evaluation_is_checked(evaluation: Any, name: str, value: Any, valid: bool):
    from airflow.sdk.exceptions import ParamValidationError

    param = evaluation.params.get_param(name)

    if valid:
        assert param.resolve(value) == value
    else:
        with pytest.raises(ParamValidationError):
            param.resolve(value)


# --- the API


def test_the_api_is_watched_every_five_minutes_by_one_task(dagbag: Any):
    watch = dagbag.dags["api_health"]

    assert watch.schedule == "*/5 * * * *"
    [task] = watch.tasks
    assert (task.task_id, task.execution_timeout) == ("watch_api", timedelta(minutes=4))


# --- the audit


def test_the_audit_is_one_task_after_each_publish_and_by_hand(dagbag: Any):
    audit = dagbag.dags["store_audit"]

    assert [one.name for one in audit.timetable.asset_condition.objects] == ["personalization_serving"]
    assert audit.params["repair"] is False
    [task] = audit.tasks
    assert task.task_id == "audit_stores"


# --- the maintenance


def test_the_maintenance_is_one_task_an_hour(dagbag: Any):
    maintenance = dagbag.dags["maintenance"]

    assert maintenance.schedule == "@hourly"
    assert {"personalization", "maintenance"} <= set(maintenance.tags)
    [task] = maintenance.tasks
    assert (task.task_id, task.execution_timeout) == ("sweep_erasures", timedelta(minutes=30))


# --- another embedding model


@pytest.fixture
def reembed(dagbag: Any) -> Any:
    return dagbag.dags["reembed"]


def test_nothing_is_swapped_before_it_is_checked_and_what_reads_messages_anew_comes_behind(reembed: Any):
    follow = {task.task_id: sorted(task.downstream_task_ids - {"record_lineage"}) for task in reembed.tasks}

    assert follow == {
        "check": ["fill"],
        "fill": ["catch_up"],
        "catch_up": ["verify"],
        "verify": ["swap"],
        "swap": ["embed_catalog"],
        "embed_catalog": ["detect_intents"],
        "detect_intents": ["build_graph", "learn", "publish", "roll_up_engagement"],
        "build_graph": ["publish"],
        "roll_up_engagement": ["publish"],
        "learn": ["publish"],
        "publish": ["complete"],
        "complete": [],
        "record_lineage": [],
    }
    # A former model that is kept has nothing to fill.
    assert reembed.get_task("catch_up").trigger_rule.value == "none_failed"
    assert {task.pool for task in reembed.tasks if task.task_id in follow["fill"]} == {"embedding"}


def test_the_stages_of_a_migration_s_lineage_are_its_tasks_in_their_order(reembed: Any):
    from personalization.pipeline.lineage import MIGRATION_STAGES as STAGES

    assert set(STAGES) == set(reembed.task_ids) - {"record_lineage", "complete"}
    place = {stage: at for at, stage in enumerate(STAGES)}
    for task in reembed.tasks:
        for later in task.downstream_task_ids - {"record_lineage", "complete"}:
            assert place[task.task_id] < place[later]
    assert [task.task_id for task in reembed.teardowns] == ["record_lineage"]
    assert reembed.get_task("record_lineage").upstream_task_ids == set(STAGES)


def test_migrations_wait_for_a_trigger(dagbag: Any):
    assert [dagbag.dags[name].schedule for name in ("reembed", "reembed_finish")] == [None, None]
    assert [task.task_id for task in dagbag.dags["reembed_finish"].tasks] == ["finish"]


def test_a_migration_s_bounds_are_those_of_the_command(reembed: Any):
    from personalization.migration.verify import Bounds

    names = ("min_overlap", "max_intent_loss", "max_ndcg_loss")
    assert Bounds(**{name: reembed.params[name] for name in names}) == Bounds()


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("model", "sentence-transformers/all-mpnet-base-v2", True),
        ("model", "", False),
        ("model", None, False),
        ("dim", None, True),
        ("dim", 768, True),
        ("dim", 4, False),
        ("dim", "768", False),
        ("min_overlap", 0, True),
        ("min_overlap", 1.5, False),
        ("max_intent_loss", -0.1, False),
        ("max_ndcg_loss", 1, True),
    ],
)
def test_the_conf_of_a_migration_is_checked(reembed: Any, name: str, value: Any, valid: bool):
    from airflow.sdk.exceptions import ParamValidationError

    param = reembed.params.get_param(name)

    if valid:
        assert param.resolve(value) == value
    else:
        with pytest.raises(ParamValidationError):
            param.resolve(value)


# --- the pipeline


def is_mapped(task: Any) -> bool:
    return bool(task.is_mapped or task.get_closest_mapped_task_group())


def test_the_pipeline_s_tasks_follow_each_other_as_their_data_and_effects_demand(pipeline: Any):
    follow = {task.task_id: sorted(task.downstream_task_ids - {"record_lineage"}) for task in pipeline.tasks}
    assert follow == {
        "prepare": ["embed", "embed_catalog", "ingest_events", "mirror_vectors"],
        "ingest": ["embed", "mirror_vectors"],
        "ingest_events": ["detect_intents"],
        "embed_catalog": ["detect_intents"],
        "embed": ["detect_intents", "learn", "refresh_profiles", "upsert_vectors"],
        "upsert_vectors": ["learn", "refresh_profiles"],
        "mirror_vectors": ["refresh_profiles"],
        "detect_intents": ["build_graph", "learn", "publish", "refresh_profiles", "roll_up_engagement"],
        "build_graph": ["publish"],
        "roll_up_engagement": ["publish"],
        "refresh_profiles": ["publish"],
        "learn": ["publish"],
        "publish": ["complete"],
        "complete": [],
        "record_lineage": [],
    }


def test_nothing_is_published_before_everything_else_is_done(pipeline: Any):
    upstream = pipeline.get_task("publish").get_flat_relative_ids(upstream=True)

    assert upstream == set(pipeline.task_ids) - {"publish"} - AROUND


def test_the_stages_of_the_lineage_are_the_pipeline_s_tasks(pipeline: Any):
    from personalization.pipeline.lineage import STAGES

    assert set(STAGES) == set(pipeline.task_ids) - AROUND
    place = {stage: at for at, stage in enumerate(STAGES)}
    for task in pipeline.tasks:
        for later in task.downstream_task_ids - AROUND:
            assert place[task.task_id] < place[later], f"{task.task_id} before {later}"


def test_tasks_that_load_the_model_wait_for_the_embedding_pool_and_may_take_longer(pipeline: Any):
    pools = {task.task_id: task.pool for task in pipeline.tasks}
    timeouts = {task.task_id: task.execution_timeout for task in pipeline.tasks}

    assert {task_id for task_id, pool in pools.items() if pool == "embedding"} == {
        "embed",
        "embed_catalog",
        "mirror_vectors",
    }
    assert {timeouts[one] for one in ("embed", "embed_catalog", "mirror_vectors")} == {timedelta(hours=2)}
    short = {task_id for task_id, timeout in timeouts.items() if timeout == timedelta(minutes=30)}
    assert short == set(timeouts) - {"embed", "embed_catalog", "mirror_vectors", "ingest", "ingest_events"}


def test_shards_and_pages_are_mapped_and_few_run_at_once(pipeline: Any):
    mapped = {task.task_id: task for task in pipeline.tasks if is_mapped(task)}

    assert set(mapped) == {"embed", "upsert_vectors", "build_graph"}
    for task in mapped.values():
        assert task.max_active_tis_per_dagrun == 4


def test_a_shard_is_written_as_soon_as_it_is_embedded(pipeline: Any):
    """In one mapped group, whose tasks wait for those of the same shard alone."""
    groups = {one: pipeline.get_task(one).get_closest_mapped_task_group() for one in ("embed", "upsert_vectors")}

    assert groups["embed"] is groups["upsert_vectors"] is not None


def test_a_run_with_nothing_new_goes_through_to_its_end(pipeline: Any):
    """What follows a task that may be mapped over nothing runs all the same."""
    rules = {task.task_id: task.trigger_rule.value for task in pipeline.tasks}

    for task in pipeline.tasks:
        upstream_is_mapped = any(is_mapped(pipeline.get_task(one)) for one in task.upstream_task_ids)
        if upstream_is_mapped and not is_mapped(task) and not task.is_teardown:
            assert rules[task.task_id] == "none_failed", task.task_id
    tolerant = {task_id for task_id, rule in rules.items() if rule == "none_failed"}
    assert tolerant == {"detect_intents", "refresh_profiles", "learn", "publish"}


def test_lineage_is_recorded_whatever_happens_and_its_failure_fails_the_run(pipeline: Any):
    lineage = pipeline.get_task("record_lineage")

    assert [task.task_id for task in pipeline.teardowns] == ["record_lineage"]
    assert lineage.on_failure_fail_dagrun is True
    assert lineage.downstream_task_ids == set()
    # Directly behind each, so that it waits for those that still run when another has failed.
    assert lineage.upstream_task_ids == set(pipeline.task_ids) - AROUND


def test_a_run_is_green_only_where_its_data_were_published(pipeline: Any):
    """Leaves that are no teardowns decide how a run ends."""
    leaves = [task for task in pipeline.tasks if not task.downstream_task_ids and not task.is_teardown]

    assert [task.task_id for task in leaves] == ["complete"]
    assert leaves[0].upstream_task_ids == {"publish"}
    assert leaves[0].trigger_rule.value == "all_success"


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("input_path", None, True),
        ("input_path", "include/data/sample_conversations.json", True),
        ("input_path", "", False),
        ("input_path", "x" * 1025, False),
        ("input_path", 5, False),
        ("input_path", ["a.json", "b.json"], False),
        ("events_path", None, True),
        ("events_path", "include/data/sample_events.csv", True),
        ("events_path", "", False),
        ("events_path", "x" * 1025, False),
        ("events_path", {"path": "a.csv"}, False),
        ("max_reject_ratio", None, True),
        ("max_reject_ratio", 0, True),
        ("max_reject_ratio", 0.25, True),
        ("max_reject_ratio", 1, True),
        ("max_reject_ratio", 1.01, False),
        ("max_reject_ratio", -0.1, False),
        ("max_reject_ratio", "0.5", False),
        ("catalog_path", None, True),
        ("catalog_path", "/opt/catalog", True),
        ("catalog_path", "", False),
    ],
)
def test_a_run_s_conf_is_checked_against_the_params(pipeline: Any, name: str, value: Any, valid: bool):
    from airflow.sdk.exceptions import ParamValidationError

    param = pipeline.params.get_param(name)

    if valid:
        assert param.resolve(value) == value
    else:
        with pytest.raises(ParamValidationError):
            param.resolve(value)


def test_the_flow_of_data_is_drawn_by_assets_that_another_dag_may_wait_for(pipeline: Any, evaluation: Any):
    tasks = [*pipeline.tasks, *evaluation.tasks]
    flow = {
        task.task_id: (sorted(one.name for one in task.inlets), sorted(one.name for one in task.outlets))
        for task in tasks
        if not task.is_mapped and (task.inlets or task.outlets)
    }

    assert flow == {
        "ingest": ([], ["personalization_messages"]),
        "ingest_events": ([], ["personalization_events"]),
        "detect_intents": (["personalization_events", "personalization_messages"], []),
        "publish": ([], ["personalization_serving"]),
        "evaluate": (["personalization_serving"], ["personalization_evaluation"]),
    }


def test_every_task_shows_its_rows_where_task_instances_are_listed(pipeline: Any):
    for task in pipeline.tasks:
        template = task.partial_kwargs["map_index_template"] if task.is_mapped else task.map_index_template
        assert template == "{{ summary }}", task.task_id


def test_a_run_that_is_not_done_in_four_hours_is_told_of(pipeline: Any):
    [deadline] = pipeline.deadline

    assert deadline.interval == timedelta(hours=4)
    assert deadline.reference.reference_name == "DagRunQueuedAtDeadline"
    assert deadline.callback.path == "personalization_airflow.notifications.of_deadline"


def test_the_pipeline_runs_daily(pipeline: Any):
    assert pipeline.schedule == "@daily"
    assert set(pipeline.params) == {"input_path", "events_path", "max_reject_ratio", "catalog_path"}
