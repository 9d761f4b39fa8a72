"""What surrounds every request, on an app with routes of its own and no store."""

import asyncio
import json
import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import structlog
from conftest import PROJECT, free_ports
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse
from personalization.errors import StoreError
from personalization.settings import Settings
from pydantic import BaseModel, ConfigDict

from services.api.base import base_app
from services.api.logs import configure_logs

SAID = "I want to see the sea"


class Sent(BaseModel):
    model_config = ConfigDict(extra="forbid")

    message: str
    place: int = 0


def make_app(**settings: object) -> FastAPI:
    app = base_app(Settings(_env_file=None, api_auth="off", **settings))
    app.state.held = asyncio.Event()

    @app.get("/users/{user_id}")
    async def user(user_id: int) -> int:
        return user_id

    @app.post("/messages")
    async def message(body: Sent) -> int:
        return len(body.message)

    @app.post("/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.get("/held")
    async def held() -> str:
        await app.state.held.wait()
        return "held"

    @app.get("/health")
    async def health() -> str:
        return "ok"

    app.get("/fail")(fail)
    app.get("/log")(log)
    return app


async def fail(how: str = Query()) -> Response:
    if how == "store":
        raise StoreError("redis", "does not answer (ConnectionError); is it running?")
    if how == "http":
        raise HTTPException(404, "No such campaign.")
    if how == "late":
        return StreamingResponse(broken_stream())
    raise ValueError(SAID)


async def log() -> str:
    structlog.get_logger().info("inside")
    await asyncio.create_task(log_in_a_task())
    return "logged"


async def log_in_a_task() -> None:
    structlog.get_logger().info("inside a task")


async def broken_stream() -> AsyncIterator[bytes]:
    yield b"a"
    raise ValueError(SAID)


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as captured:
        yield captured


def assert_problem(response: httpx.Response, status: int) -> str:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    told = response.json()
    assert set(told) == {"type", "title", "status", "detail"}
    assert (told["type"], told["status"]) == ("about:blank", status)
    detail: str = told["detail"]
    return detail


# --- headers


@pytest.mark.parametrize("path", ["/users/1", "/users/x", "/nothing", "/fail?how=store", "/fail?how=else", "/health"])
async def test_every_answer_has_an_id_and_the_headers_that_keep_it_private(path: str) -> None:
    async with client_of(make_app()) as client:
        response = await client.get(path)

    assert re.fullmatch(r"[0-9a-f]{24}", response.headers["x-request-id"])
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"


async def test_the_pages_of_the_document_are_there_without_keys_only() -> None:
    off = make_app()
    on = base_app(Settings(_env_file=None, api_auth="keys"))
    async with client_of(off) as client:
        page = await client.get("/docs")
        assert page.is_success
        assert "content-security-policy" not in page.headers
    async with client_of(on) as client:
        assert (await client.get("/docs")).status_code == 404
        assert (await client.get("/redoc")).status_code == 404


async def test_the_request_s_id_is_on_every_line_of_its_log(lines: list[Any]) -> None:
    async with client_of(make_app()) as client:
        asked = [client.get("/log", headers={"X-Request-ID": f"request-{n}"}) for n in range(5)]
        answers = await asyncio.gather(*asked)

    assert [one.headers["x-request-id"] for one in answers] == [f"request-{n}" for n in range(5)]
    told = sorted((line["request_id"], line["event"]) for line in lines)
    assert told == [(f"request-{n}", event) for n in range(5) for event in ("inside", "inside a task")]


async def test_pages_of_other_origins_may_not_ask_unless_they_are_named() -> None:
    preflight = {"Origin": "https://shop.example", "Access-Control-Request-Method": "GET"}
    async with client_of(make_app()) as client:
        assert "access-control-allow-origin" not in (await client.get("/users/1", headers=preflight)).headers
        assert (await client.options("/users/1", headers=preflight)).status_code == 405
    async with client_of(make_app(cors_origins="https://shop.example, https://other.example")) as client:
        allowed = await client.options("/users/1", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://shop.example"
        assert "x-request-id" in allowed.headers
        refused = await client.options("/users/1", headers=preflight | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers


# --- bounds


@pytest.mark.parametrize("size", [0, 1, 1024])
async def test_a_body_up_to_the_bound_is_taken(size: int) -> None:
    async with client_of(make_app(max_body_bytes=1024)) as client:
        assert (await client.post("/raw", content=b"x" * size)).json() == size


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    async with client_of(make_app(max_body_bytes=1024)) as client:
        for length in ("1025", "9" * 30):
            response = await client.post("/raw", content=body(), headers={"Content-Length": length})
            assert "1,024" in assert_problem(response, 413)
            assert response.headers["connection"] == "close"


@pytest.mark.parametrize("path", ["/raw", "/messages"])
async def test_a_body_that_turns_out_too_large_is_read_no_further(path: str) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 100
            yield b"x" * 100

    async with client_of(make_app(max_body_bytes=1024)) as client:
        response = await client.post(path, content=body(), headers={"Content-Type": "application/json"})

    assert_problem(response, 413)
    assert read <= 1200


async def test_more_requests_than_fit_are_refused_at_once_and_later_ones_are_not() -> None:
    app = make_app(max_in_flight=3)
    async with client_of(app) as client:
        waiting = [asyncio.create_task(client.get("/held")) for _ in range(3)]
        await asyncio.sleep(0.05)
        refused = await client.get("/users/1")
        assert_problem(refused, 503)
        assert refused.headers["retry-after"] == "1"
        assert (await client.get("/health")).is_success
        app.state.held.set()
        assert all(one.is_success for one in await asyncio.gather(*waiting))
        assert (await client.get("/users/1")).is_success
    assert "shed_requests_total 1.0" in app.state.metrics.page().decode()


async def test_requests_that_are_given_up_make_room() -> None:
    app = make_app(max_in_flight=1)
    async with client_of(app) as client:
        waiting = asyncio.create_task(client.get("/held"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (await client.get("/users/1")).is_success
    assert 'status="499"' in app.state.metrics.page().decode()


# --- errors


@pytest.mark.parametrize(
    ("method", "path", "status", "detail"),
    [
        ("GET", "/nothing/maria", 404, "There is nothing at this path."),
        ("POST", "/users/maria", 405, "This path does not take this method; `Allow` says which."),
        ("GET", "/fail?how=http", 404, "No such campaign."),
        ("GET", "/fail?how=store", 503, "The redis store does not answer, or no run has been published yet."),
        ("GET", "/users/maria", 422, "user_id: Input should be a valid integer, unable to parse string as an integer"),
    ],
)
async def test_every_error_is_a_problem_that_repeats_nothing(method: str, path: str, status: int, detail: str) -> None:
    async with client_of(make_app()) as client:
        response = await client.request(method, path)

    assert assert_problem(response, status) == detail
    if status == 405:
        assert response.headers["allow"] == "GET"
    if status == 503:
        assert response.headers["retry-after"] == "5"


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b'{"message": 7}', 422, "message: Input should be a valid string"),
        (b"{}", 422, "message: Field required"),
        (b'{"message": "m", "%s": 1}' % SAID.encode(), 422, "another field: Extra inputs are not permitted"),
        (b'{"message": "m", "place": "%s"}' % SAID.encode(), 422, "place: Input should be a valid integer, unable to"),
        (b'{"message": "%s"' % SAID.encode(), 400, "The body is not JSON."),
        (SAID.encode(), 400, "The body is not JSON."),
        (b"\xff" + SAID.encode(), 400, "There was an error parsing the body"),
        (b"[" * 100_000 + SAID.encode(), 400, "There was an error parsing the body"),
        (b"", 422, "body: Field required"),
    ],
)
async def test_a_body_that_is_not_valid_is_not_repeated(
    body: bytes, status: int, detail: str, lines: list[Any]
) -> None:
    async with client_of(make_app()) as client:
        response = await client.post("/messages", content=body, headers={"Content-Type": "application/json"})

    assert detail in assert_problem(response, status)
    assert SAID not in response.text + repr(lines)


async def test_of_many_problems_some_are_named() -> None:
    class Many(BaseModel):
        numbers: list[int]

    app = make_app()

    @app.post("/many")
    async def many(body: Many) -> int:
        return len(body.numbers)

    async with client_of(app) as client:
        response = await client.post("/many", json={"numbers": ["x"] * 500})

    detail = assert_problem(response, 422)
    assert detail.startswith("numbers.0: Input should be a valid integer")
    assert detail.endswith("and 490 more")


async def test_what_nobody_foresaw_is_a_500_without_its_words_in_answer_or_log(lines: list[Any]) -> None:
    async with client_of(make_app()) as client:
        response = await client.get("/fail?how=else", headers={"X-Request-ID": "the-request"})

    assert "the-request" in assert_problem(response, 500)
    assert SAID not in response.text + repr(lines)
    [error, request] = lines
    assert error["error"] == "ValueError"
    assert error["where"][-1].startswith(__file__)
    assert error["request_id"] == "the-request"
    assert (request["status"], request["log_level"]) == (500, "warning")


async def test_an_answer_that_breaks_off_does_not_end_as_if_it_were_whole(lines: list[Any]) -> None:
    async with client_of(make_app()) as client:
        with pytest.raises(RuntimeError, match="broke off"):
            await client.get("/fail?how=late")
    assert SAID not in repr(lines)


# --- the log


async def test_requests_that_went_well_leave_no_line_and_others_one_without_the_path(lines: list[Any]) -> None:
    async with client_of(make_app()) as client:
        for path in ("/users/1", "/health", "/nothing/maria"):
            await client.get(path)
        assert lines == []
        await client.get("/users/maria?top=secret")

    [line] = lines
    assert line.pop("seconds") < 1
    assert re.fullmatch(r"[0-9a-f]{24}", line.pop("request_id"))
    assert line == {
        "event": "request",
        "log_level": "info",
        "method": "GET",
        "route": "/users/{user_id}",
        "status": 422,
        "caller": None,
        "client": "127.0.0.1",
    }


async def test_a_slow_request_leaves_a_line(lines: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.api.shell._SLOW_S", 0.01)
    app = make_app()
    asyncio.get_running_loop().call_later(0.05, app.state.held.set)
    async with client_of(app) as client:
        await client.get("/held")

    assert [(line["route"], line["log_level"]) for line in lines] == [("/held", "warning")]


def test_the_log_of_platform_server_and_drivers_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    loggers = [logging.getLogger(name) for name in ("", "uvicorn", "uvicorn.error", "pymilvus")]
    before = [(one, one.handlers, one.propagate, one.level) for one in loggers]
    try:
        for one in loggers:  # Airflow, where another test imported it, has set some
            one.handlers, one.propagate = [], True
        configure_logs()
        structlog.contextvars.bind_contextvars(request_id="the-request")
        structlog.get_logger("x").warning("told", store="redis")
        structlog.get_logger("x").debug("not told")
        logging.getLogger("uvicorn.error").error("Started %s", "well")
        logging.getLogger("neo4j").warning("notified")
        logging.getLogger("pymilvus.decorators").error("id in ['maria']")
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("uvicorn.error").exception("failed")
    finally:
        structlog.contextvars.clear_contextvars()
        for one, handlers, propagate, level in before:
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)

    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in told] == ["told", "Started well", "notified", "failed"]
    assert all({"timestamp", "level", "request_id"} <= set(line) for line in told)
    assert told[0]["store"] == "redis"
    assert told[1]["logger"] == "uvicorn.error"
    assert "ValueError: broken" in told[3]["exception"]


def test_the_server_refuses_to_start_without_keys_and_says_how_to_make_one(tmp_path: Any) -> None:
    [port] = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "services.api.main:app", "--port", str(port)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode != 0
    assert "API_KEYS is empty" in done.stdout + done.stderr
    assert "python -m personalization keys new --name shop" in done.stdout + done.stderr
