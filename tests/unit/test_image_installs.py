"""What the Dockerfiles install is enough to start, and no more: installed here as they would."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AIRFLOW = ROOT / "Dockerfile.airflow"
API = ROOT / "services" / "api" / "Dockerfile"
EMBEDDING = ROOT / "services" / "embedding" / "Dockerfile"
DASHBOARD = ROOT / "dashboards" / "Dockerfile"


class Image:
    """A Dockerfile's Python environment and files, without the container."""

    def __init__(self, dockerfile: Path, folder: Path) -> None:
        self.text = re.sub(r"\\\n\s*", " ", dockerfile.read_text(encoding="utf-8"))
        self.venv = folder / "venv"
        self.app = folder / "app"
        self.python = self.venv / ("Scripts" if os.name == "nt" else "bin") / "python"
        self._run([_uv(), "venv", "--quiet", "--python", sys.executable, str(self.venv)])

    @property
    def requirements(self) -> list[str]:
        """Arguments of the `pip install` that installs the project."""
        (arguments,) = re.findall(r"pip install .*?-c requirements\.lock (.+)$", self.text, re.MULTILINE)
        return shlex.split(arguments)

    @property
    def command(self) -> list[str]:
        """The container's command."""
        command: list[str] = json.loads(re.findall(r"^CMD (.+)$", self.text, re.MULTILINE)[-1])
        return command

    def install(self) -> set[str]:
        """Install; return the names of the installed distributions."""
        self._pip("install", "--quiet")
        listed = self._run([_uv(), "pip", "list", "--python", str(self.python), "--format", "json"])
        return {one["name"] for one in json.loads(listed.stdout)}

    def would_install(self) -> set[str]:
        """Resolve only; return the names of what an install would bring."""
        resolved = self._pip("install", "--dry-run")
        return set(re.findall(r"^ \+ ([\w-]+)", resolved.stderr, re.MULTILINE))

    def copy_app(self) -> None:
        """Lay out the last stage's files."""
        last_stage = self.text[self.text.rindex("\nFROM ") :]
        for source, target in re.findall(r"^COPY ([\w.]+) ([\w.]+)$", last_stage, re.MULTILINE):
            shutil.copytree(ROOT / source, self.app / target, ignore=shutil.ignore_patterns("__pycache__"))

    def run_python(self, *statements: str) -> None:
        """Run the image's Python in the image's folder."""
        self._run([str(self.python), "-c", "\n".join(statements)], cwd=self.app)

    def _pip(self, *command: str) -> subprocess.CompletedProcess[str]:
        fixed = ["--python", str(self.python), "--constraint", "requirements.lock"]
        return self._run([_uv(), "pip", *command, *fixed, *self.requirements])

    @staticmethod
    def _run(command: Sequence[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done


def import_all(folder: Path) -> str:
    """A statement that imports every module that the Python files below `folder` name, wherever they do."""
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    return f"import importlib; [importlib.import_module(name) for name in {sorted(names)!r}]"


def run_app(script: Path) -> str:
    """Statements that run a Streamlit app as `streamlit run` would, but for the server."""
    return f"""
import sys
sys.path.insert(0, {str(script.parent)!r})
from streamlit.testing.v1 import AppTest
app = AppTest.from_file({str(script)!r}, default_timeout=60).run()
assert not app.exception, app.exception
"""


RANKING = """
import numpy as np, lightgbm
from personalization.recommend.ranking import LearnedRanker, all_features
features = all_features()
rows = np.random.default_rng(0).random((200, len(features)))
model = lightgbm.train({"verbose": -1, "objective": "binary"}, lightgbm.Dataset(rows, rows[:, 0] > 0.5), 3)
ranker = LearnedRanker.from_json(LearnedRanker(model.model_to_string(), features, "test").to_json())
assert ranker.booster.predict(rows).shape == (200,)
"""


def test_api_image_starts_and_ranks_without_torch_scikit_learn_airflow_or_streamlit(tmp_path: Path):
    image = Image(API, tmp_path)

    installed = image.install()
    image.copy_app()

    assert {"fastapi", "uvicorn", "personalization-platform"} <= installed
    assert not {"torch", "apache-airflow", "apache-airflow-core", "streamlit"} & installed
    assert not {"scikit-learn", "implicit", "matplotlib", "networkx", "sentence-transformers"} & installed
    module, _, application = image.command[1].partition(":")
    image.run_python(f"from {module} import {application}", import_all(image.app / "services" / "api"))
    image.run_python(RANKING)


def test_embedding_image_resolves_to_an_encoder_without_airflow_or_what_only_the_pipeline_needs(tmp_path: Path):
    image = Image(EMBEDDING, tmp_path)

    installed = image.would_install()

    assert {"fastapi", "uvicorn", "torch", "sentence-transformers", "personalization-platform"} <= installed
    assert not {"apache-airflow", "apache-airflow-core", "streamlit", "pyarrow", "pymongo"} & installed


def test_dashboard_image_starts_without_torch_or_airflow(tmp_path: Path):
    image = Image(DASHBOARD, tmp_path)

    installed = image.install()
    image.copy_app()

    assert {"streamlit", "personalization-platform"} <= installed
    assert not {"torch", "apache-airflow", "apache-airflow-core"} & installed
    served = image.app / image.command[2]
    script = served.with_name("app.py")
    assert served.exists()
    image.run_python(run_app(script), import_all(script.parent))


def test_airflow_image_resolves_within_the_lock(tmp_path: Path):
    image = Image(AIRFLOW, tmp_path)

    installed = image.would_install()

    assert {"apache-airflow", "apache-airflow-providers-fab", "torch", "sentence-transformers"} <= installed
    assert not {"streamlit", "pytest", "milvus-lite"} & installed


def _uv() -> str:
    beside_python = Path(sys.executable).parent / "uv"
    path = str(beside_python) if beside_python.exists() else shutil.which("uv")
    if path is None:
        pytest.skip("uv is not installed")
    return path
