"""Keys, scopes and rates, on an app with routes of its own and no store."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import structlog
from fastapi import APIRouter, FastAPI, Response
from hypothesis import given
from hypothesis import strategies as st
from personalization.__main__ import app as command_line
from personalization.errors import SettingsError
from personalization.keys import ApiKey, new_key, parse_keys
from personalization.settings import Settings
from pydantic import BaseModel
from typer.testing import CliRunner

from services.api.base import base_app
from services.api.security import GuardedRoute, Rate, needs


class Posted(BaseModel):
    event_id: str


class CachedRoute(GuardedRoute):
    async def at_once(self, scope: Any) -> Response | None:
        return Response("at once") if scope["path_params"]["user_id"] == "cached" else None


def make_app(**settings: object) -> FastAPI:
    app = base_app(Settings(_env_file=None, **settings))
    reading, erasing = APIRouter(route_class=needs("read")), APIRouter(route_class=needs("erase"))
    writing, cached = APIRouter(route_class=needs("write")), APIRouter(route_class=CachedRoute)

    @reading.get("/things/{thing}")
    async def read(thing: int) -> int:
        return thing

    @writing.post("/things")
    async def write(body: Posted) -> Posted:
        return body

    @erasing.delete("/things/{thing}")
    async def erase(thing: int) -> int:
        return thing

    @cached.get("/cached/{user_id}")
    async def get(user_id: str) -> str:
        return user_id

    for router in (reading, writing, erasing, cached):
        app.include_router(router, prefix="/v1")
    return app


@asynccontextmanager
async def client_of(app: FastAPI, address: str = "127.0.0.1", **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, client=(address, 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", **options) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


# --- keys


async def test_a_key_opens_what_its_scopes_say_and_nothing_else(lines: list[Any]) -> None:
    reader, read_key = new_key("shop", ["read"])
    eraser, erase_key = new_key("office", ["read", "erase"])
    async with client_of(make_app(api_keys=f"{read_key},{erase_key}")) as client:
        assert (await client.get("/v1/things/1", headers=bearer(reader))).json() == 1
        assert (await client.delete("/v1/things/1", headers=bearer(eraser))).json() == 1
        refused = await client.delete("/v1/things/1", headers=bearer(reader))
        assert (await client.post("/v1/things", headers=bearer(eraser), json={})).status_code == 403

    assert refused.status_code == 403
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="erase"'
    assert refused.json() == {
        "type": "about:blank",
        "title": "Forbidden",
        "status": 403,
        "detail": "This key lacks the scope `erase`.",
    }
    assert lines[0]["caller"] == "shop"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer wrong")],
        [("Authorization", "Basic {secret}")],
        [("Authorization", "{secret}")],
        [("Authorization", "Bearer {secret}x")],
        [("Authorization", "Bearer {digest}")],
        [("Authorization", "Bearer {secret}"), ("Authorization", "Bearer {secret}")],
        [("X-API-Key", "{secret}")],
    ],
)
async def test_who_bears_no_key_is_told_how(headers: list[tuple[str, str]], lines: list[Any]) -> None:
    secret, key = new_key("shop", ["read", "write", "erase"])
    sent = [(name, value.format(secret=secret, digest=key.digest.hex())) for name, value in headers]
    async with client_of(make_app(api_keys=str(key))) as client:
        response = await client.get("/v1/things/1", headers=httpx.Headers(sent))

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["title"] == "Unauthorized"
    assert [line["status"] for line in lines] == [401]
    assert secret not in response.text + repr(lines)


async def test_the_scheme_may_be_written_as_one_likes() -> None:
    secret, key = new_key("shop", ["read"])
    async with client_of(make_app(api_keys=str(key))) as client:
        for scheme in ("Bearer", "bearer", "BEARER"):
            assert (await client.get("/v1/things/1", headers={"Authorization": f"{scheme} {secret}"})).is_success


async def test_while_a_key_is_exchanged_both_are_good_and_share_a_rate() -> None:
    (old, old_key), (new, key) = new_key("shop", ["read"]), new_key("shop", ["read"])
    async with client_of(make_app(api_keys=f"{old_key}, {key},", rate_limit="3/hour")) as client:
        answers = [await client.get("/v1/things/1", headers=bearer(one)) for one in (old, new, old, new)]

    assert [one.status_code for one in answers] == [200, 200, 200, 429]


async def test_a_body_is_not_read_before_the_key_is_known() -> None:
    _, key = new_key("shop", ["write"])

    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("read")
        yield b""

    async with client_of(make_app(api_keys=str(key))) as client:
        assert (await client.post("/v1/things", content=body())).status_code == 401


async def test_a_route_may_answer_before_fastapi_does_but_not_before_the_gate() -> None:
    secret, key = new_key("shop", ["read"])
    async with client_of(make_app(api_keys=str(key))) as client:
        assert (await client.get("/v1/cached/cached")).status_code == 401
        assert (await client.get("/v1/cached/cached", headers=bearer(secret))).text == "at once"
        assert (await client.get("/v1/cached/other", headers=bearer(secret))).json() == "other"
        assert (await client.post("/v1/cached/cached", headers=bearer(secret))).status_code == 405


def test_an_app_that_nobody_could_ask_does_not_start() -> None:
    with pytest.raises(SettingsError, match="keys new --name shop"):
        make_app().state.gate.check()
    make_app(api_auth="off").state.gate.check()
    make_app(api_keys=str(new_key("shop", ["read"])[1])).state.gate.check()


async def test_without_keys_only_this_machine_is_served() -> None:
    app = make_app(api_auth="off", rate_limit="1/day")
    for address in ("127.0.0.1", "127.8.8.8", "::1"):
        async with client_of(app, address) as client:
            assert (await client.delete("/v1/things/1")).is_success
    for address in ("10.0.0.7", "2001:db8::1", "0.0.0.0", "testclient", ""):
        async with client_of(app, address) as client:
            response = await client.get("/v1/things/1")
            assert response.status_code == 403
            assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("api", 200),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.168.1.7", 403),
        ("[2001:db8::1]", 403),
    ],
)
async def test_without_keys_a_page_of_the_web_cannot_pose_as_this_machine(host: str, status: int) -> None:
    async with client_of(make_app(api_auth="off")) as client:
        assert (await client.get("/v1/things/1", headers={"Host": host})).status_code == status


# --- rates


async def test_a_key_is_held_to_its_rate_and_others_are_not(lines: list[Any]) -> None:
    (busy, busy_key), (calm, calm_key) = new_key("busy", ["read"]), new_key("calm", ["read"])
    async with client_of(make_app(api_keys=f"{busy_key},{calm_key}", rate_limit="5/minute")) as client:
        answers = [await client.get("/v1/things/1", headers=bearer(busy)) for _ in range(8)]
        assert (await client.get("/v1/things/1", headers=bearer(calm))).is_success

    assert [one.status_code for one in answers] == [200] * 5 + [429] * 3
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 12
    assert answers[-1].headers["content-type"] == "application/problem+json"
    assert lines == []  # a flood is counted, not logged


async def test_guessing_keys_is_slow_and_does_not_fill_the_log(lines: list[Any]) -> None:
    secret, key = new_key("shop", ["read"])
    app = make_app(api_keys=str(key))
    async with client_of(app, "10.0.0.1") as client:
        guesses = [(await client.get("/v1/things/1", headers=bearer(f"guess{n}"))).status_code for n in range(50)]
        assert (await client.get("/v1/things/1", headers=bearer(secret))).is_success  # who shares the address
    async with client_of(app, "10.0.0.2") as client:
        assert (await client.get("/v1/things/1")).status_code == 401

    assert guesses == [401] * 30 + [429] * 20
    assert len(lines) == 31


@pytest.mark.parametrize("header", ["X-Forwarded-For", "Forwarded", "Via", "X-Real-IP", "x-forwarded-proto"])
async def test_without_keys_what_comes_by_a_proxy_is_refused(header: str) -> None:
    async with client_of(make_app(api_auth="off")) as client:
        assert (await client.get("/v1/things/1")).is_success
        assert (await client.get("/v1/things/1", headers={header: "127.0.0.1"})).status_code == 403


def test_a_rate_is_so_many_at_once_and_then_evenly_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("throttled.utils.time.monotonic", lambda: now)
    rate = Rate("4/second")
    assert [rate.wait("a") for _ in range(4)] == [0] * 4
    assert rate.wait("a") == pytest.approx(0.25)
    assert rate.wait("b") == 0
    now += 0.25
    assert rate.wait("a") == 0
    assert rate.wait("a") == pytest.approx(0.25)
    now += 3600
    assert [rate.wait("a") for _ in range(4)] == [0] * 4
    assert rate.wait("a") > 0


# --- what is sent is never told


APP, APP_WITHOUT_KEYS = make_app(api_keys=str(new_key("shop", ["read"])[1])), make_app(api_auth="off")
MARK = "Zq7"
"""In nothing that the app says by itself."""


@given(st.binary(max_size=300), st.sampled_from([b"", b"Bearer ", b"bearer\t", b"Basic ", b"\xff"]))
async def test_whatever_is_sent_as_a_key_is_refused_and_never_told(raw: bytes, scheme: bytes) -> None:
    with structlog.testing.capture_logs() as lines:
        sent = [(b"authorization", scheme + MARK.encode() + raw), (b"x-request-id", MARK.encode() + b"!" + raw)]
        status, headers, body = await ask_raw(APP, sent)

    assert status in (401, 429)
    assert MARK not in repr((lines, headers, body))


@given(st.binary(max_size=300) | st.from_regex(rb"[A-Za-z0-9_-]{0,80}", fullmatch=True))
async def test_a_request_id_is_taken_over_or_made_and_never_an_error(raw: bytes) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        status, headers, _ = await ask_raw(APP_WITHOUT_KEYS, [(b"x-request-id", raw)], path="/v1/things/none")

    assert status == 422
    answered = dict(headers)[b"x-request-id"]
    strict = re.fullmatch(rb"[A-Za-z0-9_-]{8,64}", raw)
    assert (answered == raw) == bool(strict)
    assert re.fullmatch(rb"[A-Za-z0-9_-]{8,64}", answered)
    assert [line["request_id"] for line in lines] == [answered.decode()]


async def ask_raw(
    app: FastAPI, headers: list[tuple[bytes, bytes]], path: str = "/v1/things/1"
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """As a server would, with bytes that httpx would not send."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), *headers],
        "client": ("127.0.0.1", 4711),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return sent[0]["status"], sent[0]["headers"], b"".join(one.get("body", b"") for one in sent[1:])


# --- the document


def test_the_document_names_the_key_the_scope_and_the_errors_of_each_route() -> None:
    document = make_app().openapi()

    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, method, scope in (
        ("/v1/things/{thing}", "get", "read"),
        ("/v1/things", "post", "write"),
        ("/v1/things/{thing}", "delete", "erase"),
        ("/v1/cached/{user_id}", "get", "read"),
    ):
        operation = document["paths"][path][method]
        assert operation["security"] == [{"key": [scope]}]
        for status in ("401", "403", "413", "429", "503"):
            [content] = operation["responses"][status]["content"].items()
            assert content == ("application/problem+json", {"schema": {"$ref": "#/components/schemas/Problem"}})
    assert "Problem" in document["components"]["schemas"]


def test_the_document_of_an_app_without_keys_asks_for_none() -> None:
    document = make_app(api_auth="off").openapi()

    assert "securitySchemes" not in document["components"]
    assert all("security" not in one for path in document["paths"].values() for one in path.values())


# --- the setting and the command


@pytest.mark.parametrize("scopes", [["read"], ["erase", "read"], ["read", "write", "erase"]])
def test_a_key_is_read_as_it_was_made(scopes: list[str]) -> None:
    secret, key = new_key("shop-1.a_b", scopes)

    assert parse_keys(str(key)) == [key]
    assert key.scopes == set(scopes)
    assert secret.startswith("pp_")
    assert secret not in str(key)
    assert len({new_key("shop", ["read"])[0] for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "entry",
    [
        "shop",
        "shop:read",
        "shop:read:",
        "shop:reed:" + "0" * 64,
        "shop::" + "0" * 64,
        "shop:read+:" + "0" * 64,
        "shop:read:" + "0" * 63,
        "shop:read:" + "0" * 65,
        "shop:read:" + "A" * 64,
        "shop:read:" + "g" * 64,
        "the shop:read:" + "0" * 64,
        ":read:" + "0" * 64,
        "s" * 65 + ":read:" + "0" * 64,
    ],
)
def test_what_is_no_key_is_refused_by_its_place_and_not_repeated(entry: str) -> None:
    _, good = new_key("good", ["read"])
    with pytest.raises(SettingsError, match="entry 2 of API_KEYS") as refused:
        parse_keys(f"{good},{entry}")

    assert entry not in str(refused.value)


def test_the_same_key_twice_is_refused() -> None:
    key = ApiKey("shop", frozenset({"read"}), b"\0" * 32)
    with pytest.raises(SettingsError, match="twice"):
        parse_keys(f"{key},{key}")


@pytest.mark.parametrize("rate", ["", "600", "0/second", "600/fortnight", "600 / second", "-1/second", "6e2/second"])
def test_what_is_no_rate_is_refused(rate: str) -> None:
    with pytest.raises(ValueError, match="rate_limit"):
        Settings(_env_file=None, rate_limit=rate)


async def test_the_command_draws_a_key_that_opens_the_api() -> None:
    done = CliRunner().invoke(command_line, ["keys", "new", "--name", "shop", "--scopes", "read, write"])

    assert done.exit_code == 0
    [secret] = re.findall(r"^  (pp_[\w-]{43})$", done.stdout, re.MULTILINE)
    [line] = re.findall(r"^  API_KEYS=(\S+)$", done.stdout, re.MULTILINE)
    assert line.startswith("shop:read+write:")
    async with client_of(make_app(api_keys=line)) as client:
        assert (await client.get("/v1/things/1", headers=bearer(secret))).is_success
        assert (await client.post("/v1/things", headers=bearer(secret), json={"event_id": "1"})).is_success
        assert (await client.delete("/v1/things/1", headers=bearer(secret))).status_code == 403


def test_the_command_refuses_a_scope_that_is_none() -> None:
    done = CliRunner().invoke(command_line, ["keys", "new", "--name", "shop", "--scopes", "reed"])

    assert isinstance(done.exception, SettingsError)
    assert done.stdout == ""
