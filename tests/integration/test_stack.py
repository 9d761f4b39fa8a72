"""The embedded stack as its user meets it: ports, crashes, restarts, leftovers."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import free_ports, stack_config
from personalization.errors import LocalStackError
from personalization.local.config import StackConfig
from personalization.local.stack import Stack
from pymongo import MongoClient


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(stack_config(tmp_path / "stack"), only_stores=True)
    yield stack
    stack.stop()


def process_of(stack: Stack, name: str) -> psutil.Process:
    state = next(one for one in stack.states() if one.name == name)
    return psutil.Process(int(state.description.split(",")[0].removeprefix("pid ")))


def test_data_survive_a_stop_and_nothing_is_left_running(stack: Stack) -> None:
    stack.start(print)
    with MongoClient(stack.config.platform_env["MONGODB_URI"]) as client:
        client.test.things.insert_one({"_id": 1})
    processes = [process_of(stack, service.name) for service in stack.services]
    families = [one for process in processes for one in [process, *process.children(recursive=True)]]

    assert stack.stop() is True
    assert not [process for process in families if process.is_running()]
    assert not stack.config.env_file.exists()
    assert stack.stop() is False

    stack.start(print)
    with MongoClient(stack.config.platform_env["MONGODB_URI"]) as client:
        assert client.test.things.find_one() == {"_id": 1}


def test_every_server_listens_on_loopback_only(stack: Stack) -> None:
    stack.start(print)

    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for service in stack.services
        for process in [process_of(stack, service.name)]
        for one in [process, *process.children(recursive=True)]
        for connection in one.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert {port for _, port in listening} >= {service.port for service in stack.services}
    assert {address for address, _ in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_crashed_process_is_seen_with_its_log_and_started_again(stack: Stack) -> None:
    stack.start(print)
    redis = process_of(stack, "redis")
    os.kill(redis.pid, signal.SIGKILL)
    redis.wait(10)

    with pytest.raises(LocalStackError, match=r"redis died .*redis\.log"):
        stack.check_alive()
    assert [one.name for one in stack.states() if one.crashed] == ["redis"]

    stack.start(print)
    stack.check_alive()


def test_a_taken_port_is_one_line_that_says_what_to_do(stack: Stack) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", stack.config.redis_port))
        squatter.listen()

        with pytest.raises(LocalStackError, match=rf"port {stack.config.redis_port} for redis .* REDIS_PORT="):
            stack.start(print)
    assert not [one for one in stack.states() if one.running]

    moved = Stack(StackConfig(**stack.config.model_dump() | {"redis_port": free_ports(1)[0]}), only_stores=True)
    moved.start(print)
    with pytest.raises(LocalStackError, match="make stop"):
        stack.start(print)
