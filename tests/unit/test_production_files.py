"""The compose file, the Dockerfiles and .env.example say what production needs, and agree."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from personalization.keys import key_digest, parse_keys
from personalization.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yaml"
GPU_FILE = ROOT / "docker-compose.gpu.yaml"
ENV_EXAMPLE = ROOT / ".env.example"
DOCKERFILES = {
    "airflow": ROOT / "Dockerfile.airflow",
    "api": ROOT / "services" / "api" / "Dockerfile",
    "embedding": ROOT / "services" / "embedding" / "Dockerfile",
    "dashboard": ROOT / "dashboards" / "Dockerfile",
}

COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OUR_SERVICES = [name for name, service in SERVICES.items() if "build" in service]
ONE_SHOT = {"airflow-init"}
PUBLISHED = {"airflow-api-server", "api", "dashboard"}

# What the images of others read.
FOREIGN_VARIABLES = {
    "mongodb": r"MONGO_INITDB_ROOT_(USERNAME|PASSWORD)|MONGODB_READER_PASSWORD",  # the last is its first start's
    "neo4j": r"NEO4J_(AUTH|server_memory_\w+|dbms_\w+)",
    "redis": r"REDISCLI_AUTH",
    "milvus": r"ETCD_ENDPOINTS|MINIO_(ADDRESS|ACCESS_KEY_ID|SECRET_ACCESS_KEY)|MQ_TYPE|COMMON_SECURITY_\w+",
    "etcd": r"ETCD_(AUTO_COMPACTION_(MODE|RETENTION)|QUOTA_BACKEND_BYTES|SNAPSHOT_COUNT)",
    "minio": r"MINIO_(ROOT_USER|ROOT_PASSWORD|BROWSER)",
    "postgres": r"POSTGRES_(USER|DB|PASSWORD)",
    "airflow-init": r"AIRFLOW_ADMIN_PASSWORD",  # its own script
    "embedding": r"HF_HOME",
    "airflow-scheduler": r"HF_HOME|OPENLINEAGE_URL|AIRFLOW_CONN_(MONGO|NEO4J|REDIS|MILVUS)_DEFAULT",
}
SETTINGS = {name.upper(): field for name, field in Settings.model_fields.items()}
# Airflow takes the stores' addresses as connections; the databases keep their names. The commit is the image's own.
NOT_FOR_COMPOSE = {"MONGODB_DATABASE", "NEO4J_DATABASE", "ANALYTICS_URL", "CODE_COMMIT"}

_PLACEHOLDER = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?::(?P<how>[-?])(?P<what>[^}]*))?\}")


def environment(service: str) -> dict[str, str]:
    return SERVICES[service].get("environment", {})


def placeholders() -> dict[str, set[str]]:
    """Every variable of the compose file, with the ways it is asked for."""
    found: dict[str, set[str]] = {}
    text = re.sub(r"^\s*#.*$", "", COMPOSE_FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for match in _PLACEHOLDER.finditer(text):
        found.setdefault(match["name"], set()).add(f"{match['how'] or ''}{match['what'] or ''}")
    return found


def required() -> set[str]:
    return {name for name, ways in placeholders().items() if any(way.startswith("?") for way in ways)}


def interpolated(text: str) -> str:
    """The text as Compose sees it with an `.env` of nothing but the required values."""
    return _PLACEHOLDER.sub(lambda match: "5ec4e7" if match["how"] == "?" else match["what"] or "", text).replace(
        "$$", "$"
    )


def assignments(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Z][A-Z0-9_]*)=(.*)$", text, re.MULTILINE))


def env_example() -> tuple[dict[str, str], dict[str, str]]:
    """Variables that .env.example sets, and those that it offers in a comment."""
    text = ENV_EXAMPLE.read_text(encoding="utf-8")
    comments = "\n".join(re.findall(r"^# (.*)$", text, re.MULTILINE))
    return assignments(text), assignments(comments)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), continuation lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in lines) if name]


@cache
def airflow_options() -> dict[str, Any]:
    """Airflow's own list of its options, by section; empty where Airflow is not installed."""
    try:
        file = distribution("apache-airflow-core").locate_file("airflow/config_templates/config.yml")
    except PackageNotFoundError:
        return {}
    return yaml.safe_load(Path(str(file)).read_text(encoding="utf-8"))


def is_airflow_option(name: str) -> bool:
    match = re.fullmatch(r"airflow__([a-z_]+?)__([a-z_]+)", name.lower())
    if match is None or not airflow_options():
        return match is not None or name == "AIRFLOW_CONFIG"
    return match[2] in airflow_options().get(match[1], {}).get("options", {})


def tool(name: str) -> str:
    beside_python = Path(sys.executable).parent / name
    path = str(beside_python) if beside_python.exists() else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


class TestCompose:
    @pytest.mark.parametrize("file", [COMPOSE_FILE, GPU_FILE], ids=lambda file: file.name)
    def test_follows_the_compose_specification(self, file: Path):
        compose_spec = pytest.importorskip("compose_spec")
        content = yaml.safe_load(interpolated(file.read_text(encoding="utf-8")))

        compose_spec.PyCompose.from_json(json.dumps(content)).validate()

    def test_is_accepted_by_compose_itself_with_and_without_a_gpu(self, tmp_path: Path):
        compose = tool("docker-compose")
        env_file = tmp_path / "filled.env"
        env_file.write_text("".join(f"{name}=5ec4e7\n" for name in required()), encoding="utf-8")

        for files in ([COMPOSE_FILE], [COMPOSE_FILE, GPU_FILE]):
            chosen = [argument for file in files for argument in ("--file", str(file))]
            command = [compose, "--env-file", str(env_file), *chosen, "config", "--quiet"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize("service", SERVICES)
    def test_service_is_pinned_supervised_and_bounded(self, service: str):
        spec = SERVICES[service]

        assert "build" in spec or re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", spec["image"])
        assert spec["mem_limit"]
        assert spec["logging"]["options"]["max-size"]
        assert spec["cap_drop"] == ["ALL"]
        assert spec["security_opt"] == ["no-new-privileges:true"]
        if service in ONE_SHOT:
            assert spec["restart"] == "no"
        else:
            assert spec["restart"] == "unless-stopped"
            assert spec["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}

    @pytest.mark.parametrize("service", SERVICES)
    def test_waits_until_what_it_depends_on_is_ready(self, service: str):
        for other, how in SERVICES[service].get("depends_on", {}).items():
            expected = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert how == {"condition": expected}, other

    @pytest.mark.parametrize("service", OUR_SERVICES)
    def test_our_containers_cannot_write_to_their_image(self, service: str):
        assert SERVICES[service]["read_only"] is True
        assert "/tmp" in SERVICES[service]["tmpfs"]

    def test_publishes_what_users_see_and_that_on_loopback(self):
        ports = {name: spec["ports"] for name, spec in SERVICES.items() if "ports" in spec}

        assert set(ports) == PUBLISHED
        for published in ports.values():
            assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", interpolated(port)) for port in published)
            assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in published)

    def test_stores_are_on_networks_without_a_way_out(self):
        for name, spec in SERVICES.items():
            if "build" not in spec:
                assert all(COMPOSE["networks"][network]["internal"] for network in spec["networks"]), name

    def test_every_volume_is_declared_and_used(self):
        mounts = [mount.split(":")[0] for spec in SERVICES.values() for mount in spec.get("volumes", [])]

        assert {source for source in mounts if not source.startswith(".")} == set(COMPOSE["volumes"])

    @pytest.mark.parametrize(
        ("variable", "mount"),
        [
            ("SQLITE_PATH", "analytics:/data/analytics"),
            ("CATALOG_PATH", "./include/catalog:/data/catalog:ro"),
            ("INBOX_URI", "inbox:/data/inbox"),
            ("STAGING_URI", "staging:/data/staging"),
        ],
    )
    def test_data_is_mounted_where_the_settings_point(self, variable: str, mount: str):
        for service in ("airflow-scheduler", "api", "dashboard"):
            if variable in environment(service):
                path = Path(environment(service)[variable])
                assert mount in SERVICES[service]["volumes"]
                assert Path(mount.split(":")[1]) in {path, path.parent}

    def test_all_who_open_the_analytics_database_share_one_volume(self):
        mounted_by = {name for name, spec in SERVICES.items() if "analytics:/data/analytics" in spec["volumes"]}

        assert mounted_by == {"airflow-scheduler", "api", "dashboard"}

    def test_connections_are_json_of_the_type_their_hook_takes(self):
        connections = {
            name: json.loads(interpolated(value))
            for name, value in environment("airflow-scheduler").items()
            if name.startswith("AIRFLOW_CONN_")
        }

        types = {name: connection["conn_type"] for name, connection in connections.items()}
        assert types == {f"AIRFLOW_CONN_{kind.upper()}_DEFAULT": kind for kind in types.values()}
        for connection in connections.values():
            assert connection["host"] in SERVICES
            assert connection["password"] == "5ec4e7"

    def test_settings_of_the_api_are_valid(self, monkeypatch: pytest.MonkeyPatch):
        for name, value in environment("api").items():
            monkeypatch.setenv(name, interpolated(value))

        settings = Settings(_env_file=None)

        assert settings.milvus_uri == "http://milvus:19530"
        assert settings.milvus_token.get_secret_value() == "root:5ec4e7"
        assert settings.redis_url.get_secret_value() == "redis://:5ec4e7@redis:6379/0"
        assert settings.cache_ttl_s == SETTINGS["CACHE_TTL_S"].default

    def test_what_ranks_and_what_learns_follow_the_same_settings(self):
        """What is learned with one half-life and served with another would be skewed."""
        # PROFILE_MAX_MESSAGES is the pipeline's alone.
        shared = {"PROFILE_HALF_LIFE_DAYS", "NEIGHBOURS", "INTENT_KEEP", "MAX_MESSAGE_CHARS"}

        for name in shared:
            assert environment("api")[name] == environment("airflow-scheduler")[name]

    def test_the_api_s_texts_are_embedded_as_in_the_pipeline_by_a_service_that_is_not_published(self):
        for name in ("EMBEDDING_MODEL", "EMBEDDING_DIM", "MAX_MESSAGE_CHARS", "HF_HOME"):
            assert environment("embedding")[name] == environment("airflow-scheduler")[name]
        assert "models:/data/models" in SERVICES["embedding"]["volumes"]
        assert environment("api")["EMBEDDING_URL"] == "http://embedding:8001"
        assert "ports" not in SERVICES["embedding"]
        assert {name for name, spec in SERVICES.items() if "embedding" in spec["networks"]} == {"api", "embedding"}
        assert "embedding" not in SERVICES["api"]["depends_on"]  # it does without


class TestEnvironment:
    @pytest.mark.parametrize("service", SERVICES)
    def test_every_variable_is_one_that_its_reader_knows(self, service: str):
        unknown = {
            name
            for name in environment(service)
            if not re.fullmatch(FOREIGN_VARIABLES.get(service, ""), name)
            and not ("build" in SERVICES[service] and (name in SETTINGS or is_airflow_option(name)))
        }

        assert not unknown

    def test_every_setting_can_be_set(self):
        given = {name for service in OUR_SERVICES for name in environment(service)}

        assert set(SETTINGS) - given == NOT_FOR_COMPOSE

    def test_env_example_has_what_compose_asks_for_and_nothing_else(self):
        to_fill, offered = env_example()

        assert set(to_fill) == required()
        assert set(offered) == set(placeholders()) - required()
        assert not set(to_fill) & set(offered)

    def test_env_example_carries_no_secret_and_the_true_defaults(self):
        to_fill, offered = env_example()

        assert set(to_fill.values()) == {""}
        for name, shown in offered.items():
            (how,) = placeholders()[name]
            default = how.removeprefix("-") or (str(SETTINGS[name].default) if name in SETTINGS else "")
            assert shown == default, name

    def test_filling_it_in_does_not_change_what_the_embedded_stack_reads(self):
        assert required() & set(SETTINGS) == {"API_KEYS", "DASHBOARD_PASSWORD"}  # it asks for none

    def test_the_commands_of_env_example_fill_it_in(self, tmp_path: Path):
        bash, _ = tool("bash"), tool("openssl")
        shutil.copy(ENV_EXAMPLE, tmp_path)
        commands = re.findall(r"^#   (.*)$", ENV_EXAMPLE.read_text(encoding="utf-8"), re.MULTILINE)

        command = [bash, "-euc", "\n".join(commands)]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)

        filled = assignments((tmp_path / ".env").read_text(encoding="utf-8"))
        assert set(filled) == required()
        assert len(set(filled.values())) == len(filled)
        assert re.fullmatch(r"[\w-]{43}=", filled.pop("AIRFLOW_FERNET_KEY"))
        [secret] = re.findall(r"shown this once: (\S+)", done.stdout)
        key, of_dashboard = parse_keys(filled.pop("API_KEYS"))
        assert key.digest == key_digest(secret.encode())
        assert of_dashboard.digest == key_digest(filled.pop("DASHBOARD_API_KEY").encode())
        assert of_dashboard.scopes == {"read"}
        assert all(re.fullmatch(r"[0-9a-f]{48,}", value) for value in filled.values())

    @pytest.mark.parametrize("service", SERVICES)
    def test_every_secret_comes_from_env(self, service: str):
        for name, value in environment(service).items():
            secret = re.search(r'://[^/@:]*:([^@]*)@|"password": "([^"]*)"', value)
            if name not in ("API_AUTH", "DASHBOARD_AUTH") and (
                re.search(r"(PASSWORD|SECRET|TOKEN|_KEYS?|AUTH)$", name) or secret
            ):
                asked = secret[1] or secret[2] if secret else re.sub(r"^(root:|neo4j/)", "", value)
                match = _PLACEHOLDER.fullmatch(asked)
                assert match, name
                assert match["how"] == "?", name


class TestDockerfiles:
    @pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
    def test_hadolint_finds_nothing(self, dockerfile: Path):
        result = subprocess.run(
            [tool("hadolint"), "--no-color", str(dockerfile)], capture_output=True, text=True, check=False
        )

        assert result.returncode == 0, result.stdout + result.stderr

    @pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
    def test_bases_are_pinned(self, dockerfile: Path):
        bases = [rest.split()[0] for name, rest in instructions(dockerfile) if name == "FROM"]

        assert bases
        assert all(re.search(r":[\w.-]*\d+\.\d+\.\d+", base) for base in bases)

    def test_all_run_as_the_user_who_owns_the_analytics_database(self):
        last = {
            name: [rest for instruction, rest in instructions(dockerfile) if instruction == "USER"][-1]
            for name, dockerfile in DOCKERFILES.items()
        }

        assert {user.split(":")[0] for user in last.values()} == {"50000"}

    @pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
    def test_installs_within_the_lock(self, dockerfile: Path):
        installs = [rest for name, rest in instructions(dockerfile) if name == "RUN" and " install " in rest]
        of_project = [rest for rest in installs if "'.[" in rest]

        assert len(of_project) == 1
        assert "-c requirements.lock" in of_project[0]

    @pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
    def test_openmp_is_there_for_lightgbm_whose_wheel_brings_none(self, dockerfile: Path):
        """In the stage that runs, as its owner."""
        stages = re.split(r"^FROM ", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)

        assert "apt-get install --yes --no-install-recommends libgomp1" in stages[-1]
        assert "rm -rf /var/lib/apt/lists/*" in stages[-1]
        before = stages[-1].partition("apt-get")[0]
        assert re.findall(r"^USER (\S+)", before, re.MULTILINE)[-1:] in ([], ["0"])

    @pytest.mark.parametrize("name", ["api", "dashboard"])
    def test_serving_images_carry_neither_torch_nor_airflow(self, name: str):
        runs = " ".join(rest for instruction, rest in instructions(DOCKERFILES[name]) if instruction == "RUN")

        assert f"'.[{name}]'" in runs
        assert not re.search(r"torch|airflow|pipeline", runs)

    @pytest.mark.parametrize("name", ["api", "dashboard", "embedding"])
    def test_serving_images_start_by_exec_form_and_check_their_health(self, name: str):
        by_name = dict(instructions(DOCKERFILES[name]))

        assert json.loads(by_name["CMD"])[0] in {"uvicorn", "streamlit"}
        probe = json.loads(by_name["HEALTHCHECK"].partition("CMD ")[2])
        assert probe == SERVICES[name]["healthcheck"]["test"][1:]

    def test_images_follow_the_versions_of_the_project(self):
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

        for pattern, names in (
            (r"apache-airflow==([\d.]+)", ["airflow"]),
            (r"torch==([\d.]+)", ["airflow", "embedding"]),
        ):
            [version] = set(re.findall(pattern, project))
            for name in names:
                dockerfile = DOCKERFILES[name].read_text(encoding="utf-8")
                assert re.search(rf"(airflow:|torch==){re.escape(version)}\b", dockerfile), (pattern, name)

    def test_build_context_holds_what_the_dockerfiles_copy(self):
        ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8")
        allowed = set(re.findall(r"^!(\S+)$", ignore, re.MULTILINE))
        copied = {
            source
            for dockerfile in DOCKERFILES.values()
            for name, rest in instructions(dockerfile)
            if name == "COPY" and "--from=" not in rest
            for source in re.sub(r"--\S+ ", "", rest).split()[:-1]
        }

        assert copied == allowed
