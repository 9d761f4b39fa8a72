"""The API does what its OpenAPI document says, and nothing else: schemathesis over every operation.

SCHEMATHESIS_EXAMPLES says how many requests are made of an operation in a phase, or how many sequences of requests;
some hundreds find more than the few of a usual run.
"""

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import httpx
import pytest
from conftest import PROJECT, SAMPLE, EmbeddingService, empty_settings, environment, free_ports, with_quiet_user
from personalization.keys import SCOPES, new_key
from personalization.local.stack import Stack
from personalization.pipeline.run import run_pipeline
from personalization.settings import Settings
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from services.api.main import create_app
from services.api.security import SCHEME

EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "20")


@dataclass(frozen=True)
class Api:
    """The API as a process."""

    url: str
    log: Path
    secret: str
    """Of a key that may do everything."""

    def statuses(self) -> dict[tuple[str, str], set[int]]:
        """What was answered so far, by method and route."""
        page = httpx.get(f"{self.url}/v1/metrics", headers={"Authorization": f"Bearer {self.secret}"}).text
        found = defaultdict(set)
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == "http_request_duration_seconds_count":
                    found[sample.labels["method"], sample.labels["route"]].add(int(sample.labels["status"]))
        return found


@pytest.fixture(scope="module")
def api(
    store_stack: Stack, embedding_service: EmbeddingService, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    """The API with the sample in its stores."""
    folder = tmp_path_factory.mktemp("openapi")
    settings = empty_settings(store_stack, folder)
    assert run_pipeline(SAMPLE, settings, with_quiet_user(folder))["status"] == "success"
    secret, key = new_key("all", SCOPES)
    given = {
        "api_auth": "keys",
        "api_keys": SecretStr(str(key)),
        "embedding_url": embedding_service.url,
        "answer_timeout_s": 20,  # a busy machine is not what is tried here
        "answer_store_timeout_s": 20,
    }
    [port] = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "services.api.main:app", "--port", str(port), "--log-level", "warning"]
    api = Api(f"http://127.0.0.1:{port}", folder / "api.log", secret)
    with api.log.open("wb") as log:
        env = environment(settings.model_copy(update=given))
        process = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(api, process)
        yield api
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(api: Api, process: subprocess.Popen[bytes]) -> None:
    deadline = monotonic() + 120
    while monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{api.url}/v1/ready").json()["status"] == "ready":
                return
        assert process.poll() is None, api.log.read_text()
        sleep(0.1)
    raise AssertionError(api.log.read_text())


def conforms(api: Api, *arguments: str) -> None:
    """Let schemathesis ask, with every check it has.

    Raises:
        AssertionError: it found something; the message says what, and the request as a line of curl.
    """
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        "--config-file=tests/integration/schemathesis.toml",
        "run",
        f"{api.url}/openapi.json",
        "--no-color",
        f"--max-examples={EXAMPLES}",
        f"--header=Authorization: Bearer {api.secret}",
        *arguments,
    ]
    tried = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert tried.returncode == 0, tried.stdout + tried.stderr


# Requests of every operation are made from its document: its examples, every bound of its parameters and bodies just
# met and just missed, and what Hypothesis thinks of. Erasure comes last: the others need somebody to ask about.


SEEN_BEFORE = "--exclude-checks=ignored_auth"
"""Once an operation is enough: an address that comes without a key too often is told 429."""


def test_every_operation_answers_as_documented(api: Api) -> None:
    conforms(api, "--phases=examples,coverage,fuzzing", "--exclude-method=DELETE")

    statuses = api.statuses()
    assert 200 in statuses["GET", "/v1/users/{user_id}/profile"]
    assert 200 in statuses["GET", "/v1/users/{user_id}/similar"]
    assert {202, 422} <= statuses["POST", "/v1/events"]
    assert {202, 207, 422} <= statuses["POST", "/v1/events:batch"]


# Schemathesis would begin at the campaigns alone if they were among the others.
@pytest.mark.parametrize("operations", ["--exclude-path=/v1/campaigns", "--include-path=/v1/campaigns"])
def test_what_an_answer_links_to_is_there(api: Api, operations: str) -> None:
    conforms(api, "--phases=stateful", operations, SEEN_BEFORE)


def test_erasure_answers_as_documented(api: Api) -> None:
    conforms(api, "--phases=examples,coverage,fuzzing", "--include-method=DELETE", SEEN_BEFORE)


async def test_only_health_is_told_without_a_key_and_only_what_its_scope_says_with_one() -> None:
    """Every other answer here is a refusal, so no store is needed."""
    reader, key = new_key("reader", ["read"])
    app = create_app(Settings(api_auth="keys", api_keys=SecretStr(str(key))))
    paths = app.openapi()["paths"]
    opened = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as client:
        for path, operations in paths.items():
            for method, operation in operations.items():
                if "security" not in operation:
                    opened.append(path)
                    continue
                [scope] = operation["security"][0][SCHEME]
                for secret in ("", "pp_wrong", reader):
                    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
                    if (secret, scope) == (reader, "read"):
                        continue
                    refused = await client.request(method, path.replace("{user_id}", "maria"), headers=headers)
                    assert refused.status_code == (403 if secret == reader else 401)
                    assert list(operation["responses"][str(refused.status_code)]["content"]) == [
                        refused.headers["content-type"]
                    ]
    assert opened == ["/health", "/v1/health", "/v1/ready"]


def test_nothing_of_all_this_was_unforeseen(api: Api) -> None:
    unforeseen = {place: found for place, found in api.statuses().items() if max(found) >= 500}

    assert not unforeseen
    assert "unexpected error" not in api.log.read_text()
