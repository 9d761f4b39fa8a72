"""What Prometheus is told."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI
from personalization.keys import new_key
from personalization.settings import Settings
from prometheus_client.parser import text_string_to_metric_families

from services.api.base import base_app
from services.api.metrics import Metrics, PoolUse
from services.api.routes import operations


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[str]], float]:
    """(name, values of its labels) → value, without buckets and when it began."""
    found = {}
    for family in text_string_to_metric_families(metrics.page().decode()):
        for one in family.samples:
            if "le" not in one.labels and not one.name.endswith("_created"):
                found[one.name, frozenset(one.labels.values())] = one.value
    return found


# --- metrics


def test_what_the_recommender_tells_is_counted_by_store_and_outcome() -> None:
    metrics = Metrics()
    metrics.store_call("neo4j", 0.002, failed=False)
    metrics.store_call("neo4j", 0.5, failed=True)
    metrics.answered("hit", ())
    metrics.answered("hit", [])
    metrics.answered("miss", ["neo4j", "milvus"])

    found = samples(metrics)
    assert found["store_request_duration_seconds_count", frozenset({"neo4j"})] == 2
    assert found["store_request_duration_seconds_sum", frozenset({"neo4j"})] == pytest.approx(0.502)
    assert found["store_errors_total", frozenset({"neo4j"})] == 1
    assert found["answers_total", frozenset({"hit"})] == 2
    assert found["answers_total", frozenset({"miss"})] == 1
    assert found["degraded_answers_total", frozenset({"milvus"})] == 1


def test_apps_do_not_share_their_counts() -> None:
    one, other = Metrics(), Metrics()
    one.shed()

    assert samples(one)["shed_requests_total", frozenset()] == 1
    assert samples(other)["shed_requests_total", frozenset()] == 0


def test_pools_and_generation_are_read_when_prometheus_asks() -> None:
    metrics = Metrics()
    use = [PoolUse("redis", 2, 3)]
    metrics.watch_pools(lambda: use)
    metrics.watch_generation(lambda: 17)
    use.append(PoolUse("analytics", 1, 0))

    found = samples(metrics)
    assert found["store_connections", frozenset({"redis", "in_use"})] == 2
    assert found["store_connections", frozenset({"redis", "idle"})] == 3
    assert found["store_connections", frozenset({"analytics", "in_use"})] == 1
    assert found["serving_generation", frozenset()] == 17
    assert found["process_resident_memory_bytes", frozenset()] > 0


# --- through the app


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    app.include_router(operations.router, prefix="/v1")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield client


async def test_metrics_ask_for_a_key_and_health_for_none() -> None:
    secret, key = new_key("prometheus", ["read"])
    async with client_of(base_app(Settings(_env_file=None, api_keys=str(key)))) as client:
        assert (await client.get("/v1/health")).json() == {"status": "ok"}
        assert (await client.get("/v1/metrics")).status_code == 401
        page = await client.get("/v1/metrics", headers={"Authorization": f"Bearer {secret}"})

    assert page.headers["content-type"].startswith("text/plain")
    assert 'route="/v1/health"' in page.text
    assert "in_flight_requests 1.0" in page.text


async def test_requests_are_timed_by_template_method_and_status_and_nothing_a_client_sent_is_a_label() -> None:
    app = base_app(Settings(_env_file=None, api_auth="off"))
    async with client_of(app) as client:
        for path in ("/v1/health", "/v1/health?maria", "/wp-admin.php", "/v1/users/maria"):
            await client.get(path, headers={"User-Agent": "maria", "X-Request-ID": "maria-maria"})
        await client.request("MARIA", "/v1/health")

    found = samples(app.state.metrics)
    name = "http_request_duration_seconds_count"
    assert found[name, frozenset({"/v1/health", "GET", "200"})] == 2
    assert found[name, frozenset({"/v1/health", "other", "405"})] == 1
    assert found[name, frozenset({"unmatched", "GET", "404"})] == 2
    assert not re.search(r"maria|wp-admin", app.state.metrics.page().decode(), re.IGNORECASE)
