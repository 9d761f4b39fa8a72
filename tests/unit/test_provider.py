"""Airflow's `milvus` connection: Airflow knows the type, and the hook takes the client's arguments from it."""

import json
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from personalization.stores.milvus import GRPC_OPTIONS


@pytest.fixture(scope="module", autouse=True)
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Airflow keeps off anybody's AIRFLOW_HOME."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))
        yield


@pytest.fixture
def module() -> ModuleType:
    """The hook's module."""
    import personalization_airflow.milvus

    return personalization_airflow.milvus


@pytest.fixture
def arguments(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the hook gives the client for a connection; connecting is a matter of the integration tests."""
    monkeypatch.setattr(module, "MilvusClient", lambda **given: given)

    def arguments(connection: str | dict[str, Any], conn_id: str = "milvus_default") -> dict[str, Any]:
        text = connection if isinstance(connection, str) else json.dumps({"conn_type": "milvus"} | connection)
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", text)
        given: dict[str, Any] = module.MilvusHook(conn_id).get_conn()
        assert given.pop("grpc_options") == GRPC_OPTIONS
        return given

    return arguments


# --- the provider


@pytest.fixture(scope="module")
def providers() -> Any:
    from airflow.providers_manager import ProvidersManager

    return ProvidersManager()


def test_airflow_finds_the_provider_by_its_entry_point(providers: Any):
    provider = providers.providers["personalization-platform"]

    assert provider.data["name"] == "Milvus"
    assert [one["connection-type"] for one in provider.data["connection-types"]] == ["milvus"]


@pytest.mark.filterwarnings("ignore:.*ProvidersManager.hooks is deprecated")
def test_airflow_takes_the_hook_for_connections_of_type_milvus(providers: Any, module: ModuleType):
    hook = providers.hooks["milvus"]

    assert hook.hook_class_name == f"{module.__name__}.{module.MilvusHook.__name__}"
    assert hook.hook_name == module.MilvusHook.hook_name
    assert hook.connection_id_attribute_name == module.MilvusHook.conn_name_attr
    assert hook.package_name == "personalization-platform"
    assert hook.connection_testable


def test_the_provider_tells_of_the_hook_what_the_hook_says_itself(module: ModuleType):
    from personalization_airflow.provider import get_provider_info

    [told] = get_provider_info()["connection-types"]

    assert told["hook-class-name"] == f"{module.__name__}.MilvusHook"
    assert told["connection-type"] == module.MilvusHook.conn_type
    assert told["hook-name"] == module.MilvusHook.hook_name


def test_the_form_offers_every_extra_that_the_hook_reads(arguments: Any):
    from personalization_airflow.provider import get_provider_info

    [told] = get_provider_info()["connection-types"]
    plain = arguments({"host": "milvus"})

    assert set(told["conn-fields"]) == {"secure", "timeout"}
    for name, value in {"secure": True, "timeout": 3}.items():
        assert arguments({"host": "milvus", "extra": {name: value}}) != plain, name
    for field in told["conn-fields"].values():
        assert field["label"]
        assert field["description"]
        assert "null" in field["schema"]["type"]


# --- the hook


@pytest.mark.parametrize(
    ("connection", "changed"),
    [
        pytest.param({}, {}, id="host only"),
        pytest.param({"port": 19531}, {"uri": "http://milvus:19531"}, id="port"),
        pytest.param({"schema": "shop"}, {"db_name": "shop"}, id="database"),
        pytest.param({"login": "ann", "password": "s3cret"}, {"token": "ann:s3cret"}, id="user and password"),
        pytest.param({"login": "ann"}, {"token": "ann:"}, id="user without password"),
        pytest.param({"password": "api-key"}, {"token": "api-key"}, id="API key"),
        pytest.param({"password": "p:w@/%?"}, {"token": "p:w@/%?"}, id="any password"),
        pytest.param({"extra": {"secure": True}}, {"uri": "https://milvus:19530"}, id="TLS"),
        pytest.param({"extra": {"secure": False}}, {}, id="TLS off"),
        pytest.param({"extra": {"timeout": 2.5}}, {"timeout": 2.5}, id="timeout"),
        pytest.param({"extra": {"timeout": "3"}}, {"timeout": 3.0}, id="timeout as text"),
        pytest.param({"extra": {"secure": None, "timeout": None}}, {}, id="form left empty"),
    ],
)
def test_the_client_gets_what_the_connection_says(arguments: Any, connection: dict[str, Any], changed: dict[str, Any]):
    default = {"uri": "http://milvus:19530", "token": "", "db_name": "", "timeout": 10.0}

    assert arguments({"host": "milvus"} | connection) == default | changed


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (
            "milvus://ann:p%40ss@milvus:19531/shop?timeout=4",
            {"uri": "http://milvus:19531", "token": "ann:p@ss", "db_name": "shop", "timeout": 4.0},
        ),
        (
            "milvus://milvus?secure=true",
            {"uri": "https://milvus:19530", "token": "", "db_name": "", "timeout": 10.0},
        ),
        (
            "milvus://milvus?secure=false",
            {"uri": "http://milvus:19530", "token": "", "db_name": "", "timeout": 10.0},
        ),
    ],
)
def test_a_connection_may_be_a_uri(arguments: Any, uri: str, expected: dict[str, Any]):
    assert arguments(uri) == expected


def test_another_connection_may_be_named(arguments: Any):
    assert arguments({"host": "elsewhere"}, conn_id="milvus_other")["uri"] == "http://elsewhere:19530"


def test_a_missing_connection_is_named(module: ModuleType, monkeypatch: pytest.MonkeyPatch):
    from airflow.sdk.exceptions import AirflowNotFoundException

    monkeypatch.delenv("AIRFLOW_CONN_MILVUS_DEFAULT", raising=False)

    with pytest.raises(AirflowNotFoundException, match="milvus_default"):
        module.MilvusHook().get_conn()


def test_the_stack_s_connection_is_one_that_the_hook_takes(
    arguments: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
):
    from personalization.local.config import StackConfig

    monkeypatch.chdir(tmp_path)
    env = StackConfig(milvus_port=40_001).process_env

    assert arguments(env["AIRFLOW_CONN_MILVUS_DEFAULT"])["uri"] == "http://127.0.0.1:40001"


def test_the_test_button_says_why_it_does_not_connect(module: ModuleType, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        connection = {"conn_type": "milvus", "host": "127.0.0.1", "port": port, "extra": {"timeout": 0.5}}
        monkeypatch.setenv("AIRFLOW_CONN_MILVUS_DEFAULT", json.dumps(connection))

        connected, words = module.MilvusHook().test_connection()

    assert connected is False
    assert "connect" in words.lower()
