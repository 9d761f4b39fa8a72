"""The dashboard as a person sees it: served as documented, opened in a browser."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from browser import ARTIFACTS, chromium, needs_browser
from dashboard_data import seed
from playwright.sync_api import Browser, Page, expect

ROOT = Path(__file__).parents[2]
PAGES = ["Overview", "Runs", "Latency", "Anomalies", "Engagement", "Evaluation"]
PATIENCE_MS = 60_000

pytestmark = needs_browser


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a dashboard over a seeded store."""
    folder = tmp_path_factory.mktemp("dashboard")
    seed(folder / "analytics.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [
        Path(sys.executable).with_name("streamlit"), "run", "dashboards/app.py", "--server.port", str(port),
        "--server.address", "127.0.0.1", "--server.headless", "true",
    ]  # fmt: skip
    log = folder / "streamlit.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"SQLITE_PATH": str(folder / "analytics.db")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_healthy(address, server, log)
            yield address
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_shows_its_heading_and_a_chart_without_console_errors(dashboard: str, browser: Browser, scheme: str):
    page = browser.new_page(viewport={"width": 1360, "height": 1600}, color_scheme=scheme, timezone_id="Europe/Zurich")
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(dashboard)
    for name in PAGES:
        page.get_by_test_id("stSidebarNav").get_by_role("link", name=name).click(timeout=PATIENCE_MS)

        _expect_page(page, name)
        expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=PATIENCE_MS)
        expect(page.get_by_test_id("stException")).to_have_count(0)
        page.screenshot(path=ARTIFACTS / f"dashboard-{name.lower()}-{scheme}.png")
        assert problems == [], name
    page.close()


def test_an_anomaly_leads_to_its_run(dashboard: str, browser: Browser):
    page = browser.new_page()
    page.goto(f"{dashboard}/anomalies")
    _expect_page(page, "Anomalies")
    # The cards move down once the chart is drawn.
    expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=PATIENCE_MS)
    page.get_by_test_id("stPageLink").first.click()

    _expect_page(page, "Runs")
    expect(page.get_by_text("failed with StoreError")).to_be_visible(timeout=PATIENCE_MS)
    page.close()


def _expect_page(page: Page, name: str) -> None:
    heading = page.get_by_role("heading", name=name, exact=True, level=1)
    expect(heading).to_be_visible(timeout=PATIENCE_MS)
    for unfinished in ("[data-stale=true]", "[data-testid=stSkeleton]", "[data-testid=stStatusWidget]"):
        expect(page.locator(unfinished)).to_have_count(0, timeout=PATIENCE_MS)


def _wait_until_healthy(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urlopen(f"{address}/_stcore/health"):
                return
        except URLError:
            time.sleep(0.2)
    pytest.fail(f"the dashboard did not start:\n{log.read_text()}")
