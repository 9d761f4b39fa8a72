"""Who may import whom, read from the source, and what the API loads, seen in a process of its own."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT

CORE = PROJECT / "include" / "personalization"
PARTS = {
    "personalization": PROJECT / "include",
    "personalization_airflow": PROJECT / "plugins",
    "services": PROJECT,
    "dashboards": PROJECT,
}

BOTTOM = ("settings", "schemas", "errors")


@dataclass(frozen=True)
class Import:
    """One module that a file imports."""

    file: Path
    line: int
    module: str
    """In full; `from a import b` counts as `a.b`, as `b` may be a module."""
    at_top: bool
    """Whether it is loaded with the file, not within a function."""

    def __str__(self) -> str:
        return f"{self.file.relative_to(PROJECT)}:{self.line} imports {self.module}"

    def is_of(self, *packages: str) -> bool:
        return any(self.module == one or self.module.startswith(f"{one}.") for one in packages)


def imports(*places: Path) -> list[Import]:
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*.py")))]
    assert files, f"no Python file in {places}"
    return [found for file in files for found in _imports_of(file)]


def _imports_of(file: Path) -> Iterator[Import]:
    def walk(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(file, child.lineno, one.name, at_top) for one in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join([*["" for _ in range(child.level)], child.module or ""])
                yield from (Import(file, child.lineno, f"{base}.{one.name}", at_top) for one in child.names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_top and not inside)

    yield from walk(ast.parse(file.read_text(encoding="utf-8")), at_top=True)


def breaches(found: list[Import]) -> list[str]:
    return [str(one) for one in found]


def own_imports(*places: Path) -> list[Import]:
    """Those of the platform's core."""
    return [one for one in imports(*places) if one.is_of("personalization")]


# --- the arrows


def test_the_core_knows_nothing_of_what_runs_it():
    outside = ("airflow", "fastapi", "uvicorn", "starlette", "streamlit", "dags", "plugins")
    outside += ("personalization_airflow", "services", "dashboards", "benchmarks", "tests")

    assert breaches([one for one in imports(CORE) if one.is_of(*outside)]) == []


SERVED = ("recommend", "stores", "quality")


@pytest.mark.parametrize(
    ("place", "parts"),
    [("services/api", ("keys", "erasure", *SERVED)), ("services/embedding", ("encoder",)), ("dashboards", SERVED)],
)
def test_what_serves_imports_only_what_is_there_to_be_served(place: str, parts: tuple[str, ...]):
    allowed = [f"personalization.{part}" for part in (*parts, *BOTTOM)]
    found = own_imports(PROJECT / place)

    assert found
    assert breaches([one for one in found if not one.is_of(*allowed)]) == []
    others = {"services", "dashboards", "dags", "plugins", "personalization_airflow", "airflow"}
    others -= {place.partition("/")[0]}
    assert breaches([one for one in imports(PROJECT / place) if one.is_of(*others)]) == []


def test_services_share_what_surrounds_a_request_and_nothing_else():
    shared = [f"services.api.{one}" for one in ("logs", "metrics", "problems", "shell")]
    found = [one for one in imports(PROJECT / "services" / "embedding") if one.is_of("services.api")]

    assert found
    assert breaches([one for one in found if not one.is_of(*shared)]) == []
    assert breaches([one for one in imports(PROJECT / "services" / "api") if one.is_of("services.embedding")]) == []


@pytest.mark.parametrize(
    ("place", "forbidden"),
    [
        ("pipeline", ["quality", "local", "evaluation"]),
        ("recommend", ["pipeline", "quality", "local", "staging", "learning", "evaluation"]),
        ("learning", ["pipeline", "quality", "local", "staging", "evaluation"]),
        ("evaluation", ["local"]),
        ("quality", ["pipeline", "recommend", "local", "staging", "learning", "evaluation"]),
        ("local", ["recommend", "quality", "learning", "evaluation"]),
        ("understanding", ["pipeline", "recommend", "quality", "local", "stores", "staging", "learning", "evaluation"]),
        ("catalog", ["pipeline", "recommend", "quality", "local", "stores", "staging", "learning", "evaluation"]),
    ],
)
def test_parts_of_the_core_that_do_not_know_each_other(place: str, forbidden: list[str]):
    packages = [f"personalization.{one}" for one in forbidden]

    assert own_imports(CORE / place)
    assert breaches([one for one in own_imports(CORE / place) if one.is_of(*packages)]) == []


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("recommend", [*BOTTOM, "recommend", "stores", "understanding.reader"]),
        ("learning", [*BOTTOM, "learning", "recommend.sources", "recommend.ranking", "stores", "resampling"]),
        (
            "pipeline",
            [
                *BOTTOM,
                *("pipeline", "learning", "recommend.knowledge", "recommend.ranking", "recommend.sources"),
                *("understanding", "catalog", "encoder", "reading", "sketches", "staging", "stores"),
            ],
        ),
        (
            "evaluation",
            [
                *BOTTOM,
                *("evaluation", "learning", "recommend", "understanding", "catalog", "encoder", "reading", "stores"),
                # Its task in Airflow reports as a stage does; campaigns' vectors are those that the pipeline staged.
                *("pipeline.lineage", "pipeline.embed", "staging", "quality.experiments", "resampling"),
            ],
        ),
        ("erasure", [*BOTTOM, "erasure", "pipeline.lineage", "staging", "stores"]),  # lineage says who is at work
        (
            "audit",  # a repair is a run of the pipeline; what is served says how messages were read
            [
                *BOTTOM,
                "audit",
                "pipeline",
                "erasure",
                "recommend.knowledge",
                "understanding",
                "catalog",
                "staging",
                "stores",
            ],
        ),
        (
            "migration",  # its last stages are the pipeline's; it compares as audits and replays do
            [
                *BOTTOM,
                *("migration", "pipeline", "learning", "catalog", "encoder", "staging", "stores"),
                *("audit.scratch", "evaluation.recording", "evaluation.replay"),
                *("recommend.knowledge", "recommend.sources"),
            ],
        ),
        ("stores", [*BOTTOM, "stores"]),
        ("catalog", ["schemas", "errors", "settings", "encoder", "understanding", "reading", "catalog"]),
        # Its command reads a catalog; all else in it knows none.
        (
            "understanding",
            ["schemas", "errors", "settings", "encoder", "reading", "staging", "understanding", "catalog.loading"],
        ),
        ("staging.py", ["schemas", "errors"]),
        ("keys.py", ["errors"]),
        ("sketches.py", []),
        ("settings.py", []),
        ("schemas.py", []),
        ("errors.py", []),
    ],
)
def test_a_part_imports_only_what_is_below_it(place: str, allowed: list[str]):
    packages = [f"personalization.{one}" for one in allowed]

    assert breaches([one for one in own_imports(CORE / place) if not one.is_of(*packages)]) == []


def test_only_the_command_line_knows_the_embedded_stack():
    others = [path for path in CORE.iterdir() if path.name not in ("local", "__main__.py", "__pycache__")]
    found = own_imports(*others, *(PROJECT / one for one in ("services", "dashboards", "dags", "plugins")))

    assert breaches([one for one in found if one.is_of("personalization.local")]) == []


def test_no_import_is_relative():
    places = (CORE, *(PROJECT / one for one in ("services", "dashboards", "dags", "plugins")))

    assert breaches([one for one in imports(*places) if one.module.startswith(".")]) == []


def test_every_own_module_that_is_imported_exists():
    places = (CORE, *(PROJECT / one for one in ("services", "dashboards", "dags", "plugins")))
    missing = []
    for one in imports(*places):
        root = one.module.partition(".")[0]
        if root in PARTS:
            path = PARTS[root].joinpath(*one.module.split("."))
            if not any(step.with_suffix(".py").exists() or step.is_dir() for step in (path, path.parent)):
                missing.append(one)

    assert breaches(missing) == []


# --- what is heavy or local


def test_torch_is_loaded_for_the_encoder_and_only_when_it_encodes():
    places = (CORE, *(PROJECT / one for one in ("services", "dashboards", "dags", "plugins")))
    heavy = [one for one in imports(*places) if one.is_of("torch", "sentence_transformers", "transformers")]

    assert {one.file for one in heavy} == {CORE / "encoder.py", CORE / "packed.py"}
    assert breaches([one for one in heavy if one.at_top and one.file.name != "packed.py"]) == []
    packed = [one for one in imports(*places) if one.is_of("personalization.packed")]
    assert {(one.file, one.at_top) for one in packed} == {(CORE / "encoder.py", False)}


def test_the_tasks_of_airflow_load_no_driver_when_the_dag_is_parsed():
    plugins = PROJECT / "plugins" / "personalization_airflow"
    names = ("assets", "defaults", "notifications", "tasks")
    found = imports(PROJECT / "dags", *(plugins / f"{name}.py" for name in names))
    allowed = ("airflow.sdk", "airflow.providers.standard", "personalization.schemas", "personalization.errors")
    allowed += tuple(f"personalization_airflow.{name}" for name in names)
    allowed += ("collections", "datetime", "typing")

    assert breaches([one for one in found if one.at_top and not one.is_of(*allowed)]) == []


def test_the_mongodb_server_of_the_embedded_stack_is_never_imported():
    """It is started as a process, which MongoDB itself may replace."""
    places = [PROJECT / one for one in ("include", "services", "dashboards", "dags", "plugins", "tests")]

    assert breaches([one for one in imports(*places) if "secantus" in one.module.lower()]) == []
    command = (CORE / "local" / "services.py").read_text(encoding="utf-8")
    assert '_executable("secantusd-py")' in command


# --- the API's process


def python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_api_loads_nothing_of_the_pipeline_of_airflow_or_of_the_dashboard():
    # pandas comes with pymilvus and takes pyarrow along where that is installed, LightGBM scikit-learn; so both are
    # hidden here.
    loaded = python(
        "import sys; sys.modules['pyarrow'] = sys.modules['sklearn'] = None\n"
        "import services.api.main\n"
        "print(*sorted(name for name, module in sys.modules.items() if module))\n"
    ).split()

    assert "services.api.main" in loaded
    unwanted = {"torch", "transformers", "sentence_transformers", "airflow", "streamlit"}
    unwanted |= {"pyarrow", "sklearn", "networkx", "implicit", "matplotlib", "threadpoolctl", "yaml"}
    unwanted |= {"personalization_airflow", "supervisor", "typer"}
    assert {name for name in loaded if name.partition(".")[0] in unwanted} == set()
    ours = {name.split(".")[1] for name in loaded if name.startswith("personalization.")}
    assert ours == {"recommend", "stores", "understanding", "keys", "settings", "schemas", "errors"}


def test_the_embedding_service_loads_no_driver_and_its_model_not_before_it_answers():
    loaded = python("import sys, services.embedding.main; print(*sorted(sys.modules))").split()

    unwanted = {"torch", "transformers", "sentence_transformers", "airflow", "pymongo", "pymilvus", "neo4j", "redis"}
    assert {name for name in loaded if name.partition(".")[0] in unwanted} == set()
    ours = {name.split(".")[1] for name in loaded if name.startswith("personalization.")}
    assert ours == {"encoder", "settings", "schemas", "errors"}


def test_the_dashboard_s_store_loads_nothing_of_the_pipeline_of_airflow_or_of_the_api():
    loaded = python(
        "import sys\n"
        "import personalization.quality.anomalies, personalization.quality.reports\n"
        "print(*sorted(sys.modules))\n"
    ).split()

    unwanted = {"torch", "sentence_transformers", "airflow", "fastapi", "pymongo", "pymilvus", "neo4j"}
    assert {name for name in loaded if name.partition(".")[0] in unwanted} == set()
