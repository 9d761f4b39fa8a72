"""The dashboard as a person sees it: served as documented, opened in a browser."""

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import ARTIFACTS, chromium, needs_browser
from conftest import environment, free_ports
from dashboard_data import open_store, seed_everything
from personalization.settings import Settings
from playwright.sync_api import Browser, Page, expect

ROOT = Path(__file__).parents[2]
PAGES = {
    "Overview": "",
    "Runs": "runs",
    "Runs, compared": "runs?part=Compare",
    "Latency": "latency",
    "Latency, the API": "latency?of=API",
    "Anomalies": "anomalies",
    "Audit": "audit",
    "Engagement": "engagement",
    "Explore a user": "explore",
    "Evaluation": "evaluation",
}
PATIENCE_MS = 60_000
SIZES = {"wide": {"width": 1360, "height": 1600}, "narrow": {"width": 390, "height": 1600}}
KNOWN = {
    # Of Streamlit itself, which no page can change.
    "list": "the sidebar's navigation puts its sections' names into one list with the pages",
    "listitem": "the same",
    "svg-img-alt": "the course in a tile names its marks as graphics; the tile says the figure in text",
}
PASSWORD = "a password, with ünusual characters"

pytestmark = needs_browser


@contextmanager
def served(folder: Path, **env: str) -> Iterator[str]:
    """A dashboard as the README starts it; yields its address."""
    [port] = free_ports(1)
    command = [
        *(Path(sys.executable).with_name("streamlit"), "run", "dashboards/serve.py", "--server.headless", "true"),
        *("--server.address", "127.0.0.1", "--server.port", str(port)),
    ]
    nowhere = {"API_URL": "http://127.0.0.1:9", "MONGODB_URI": "mongodb://127.0.0.1:9", "STORE_TIMEOUT_S": "0.3"}
    log = folder / "streamlit.log"
    with log.open("w") as output:
        given = os.environ | nowhere | {"DASHBOARD_AUTH": "off"} | env
        server = subprocess.Popen(command, cwd=ROOT, env=given, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}/_stcore/health", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dashboard") / "analytics.db"
    seed_everything(path)
    return path


@pytest.fixture(scope="module")
def dashboard(seeded: Path) -> Iterator[str]:
    """Address of a dashboard over a seeded database, and no other store."""
    with served(seeded.parent, SQLITE_PATH=str(seeded)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize(("scheme", "size"), [("light", "wide"), ("dark", "wide"), ("light", "narrow")])
def test_each_page_is_readable_accessible_and_without_errors(
    dashboard: str, browser: Browser, scheme: str, size: str
) -> None:
    for name, path in PAGES.items():
        with looking(browser, f"{dashboard}/{path}", name.split(",")[0], scheme, size) as page:
            if name == "Audit":
                expect(page.get_by_text("Messages without a vector")).to_be_visible(timeout=PATIENCE_MS)
            elif name != "Explore a user":
                expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=PATIENCE_MS)
            page.screenshot(path=ARTIFACTS / f"dashboard-{file_name(name)}-{scheme}-{size}.png")
            assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth"), name
            assert violations(page) == [], name


@pytest.mark.parametrize("state", ["empty", "broken"])
def test_a_store_without_runs_and_one_that_is_broken_are_told(browser: Browser, tmp_path: Path, state: str) -> None:
    database = tmp_path / "analytics.db"
    if state == "empty":
        open_store(database)
    else:
        database.write_text("this is no database, " * 100)
    told = {"empty": "Nothing has run yet", "broken": "The analytics database cannot be read"}[state]
    with (
        served(tmp_path, SQLITE_PATH=str(database)) as address,
        looking(browser, address, "Overview", "light", "wide") as page,
    ):
        expect(page.get_by_text(told)).to_be_visible(timeout=PATIENCE_MS)
        page.screenshot(path=ARTIFACTS / f"dashboard-{state}.png", clip={"x": 0, "y": 0, "width": 1360, "height": 500})
        assert violations(page) == []


def test_an_anomaly_leads_to_its_run(dashboard: str, browser: Browser) -> None:
    with looking(browser, f"{dashboard}/anomalies", "Anomalies") as page:
        # The cards move down once the chart is drawn.
        expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=PATIENCE_MS)
        page.get_by_test_id("stPageLink").first.click()

        _expect_page(page, "Runs")
        expect(page.get_by_text("failed with StoreError")).to_be_visible(timeout=PATIENCE_MS)
        assert "run=" in page.url


def test_the_pages_are_reached_by_keyboard(dashboard: str, browser: Browser) -> None:
    with looking(browser, dashboard, "Overview") as page:
        link = page.get_by_test_id("stSidebarNav").get_by_role("link", name="Engagement")
        for _ in range(20):
            page.keyboard.press("Tab")
            if link.evaluate("one => one === document.activeElement"):
                break
        page.keyboard.press("Enter")

        _expect_page(page, "Engagement")


def test_a_filter_is_kept_in_the_address(dashboard: str, browser: Browser) -> None:
    with looking(browser, f"{dashboard}/runs", "Runs") as page:
        page.get_by_test_id("stButtonGroup").get_by_text("failed").click()
        page.wait_for_url("**/runs?status=failed")


def test_a_user_is_explained_from_the_reasons_back_to_the_rows(
    published: Settings, browser: Browser, tmp_path: Path
) -> None:
    [port] = free_ports(1)
    env = environment(published) | {"API_AUTH": "off", "API_URL": f"http://127.0.0.1:{port}", "DASHBOARD_AUTH": "off"}
    command = [sys.executable, "-m", "uvicorn", "services.api.main:app", "--port", str(port)]
    log = tmp_path / "api.log"
    with ExitStack() as stack:
        output = stack.enter_context(log.open("w"))
        api = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT)
        stack.callback(api.wait, 30)
        stack.callback(api.terminate)
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", api, log)
        address = stack.enter_context(served(tmp_path, **env))
        for scheme, size in (("light", "wide"), ("dark", "wide"), ("light", "narrow")):
            with looking(browser, f"{address}/explore?user=maria", "Explore a user", scheme, size) as page:
                expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=PATIENCE_MS)
                page.get_by_text("1. Weekend city breaks").last.click()
                expect(page.get_by_text("stand behind it")).to_be_visible(timeout=PATIENCE_MS)
                _expect_page(page, "Explore a user")
                page.screenshot(path=ARTIFACTS / f"dashboard-user-{scheme}-{size}.png")
                assert violations(page) == []
        part = f"{address}/explore?user=maria&part=Neighbourhood"
        with looking(browser, part, "Explore a user", "light", "wide") as page:
            expect(page.locator(".js-plotly-plot .main-svg").first).to_be_visible(timeout=PATIENCE_MS)
            page.screenshot(path=ARTIFACTS / "dashboard-neighbourhood.png")
            assert violations(page) == []
        for part in ("Why not%3F", "Messages"):
            with looking(browser, f"{address}/explore?user=maria&part={part}", "Explore a user") as page:
                expect(page.get_by_test_id("stDataFrame").first).to_be_visible(timeout=PATIENCE_MS)
        with looking(browser, f"{address}/explore?user=nobody", "Explore a user") as page:
            expect(page.get_by_text("Nothing is known of this user")).to_be_visible(timeout=PATIENCE_MS)


def test_a_password_is_asked_for_and_leads_to_the_page_that_was_wanted(
    seeded: Path, browser: Browser, tmp_path: Path
) -> None:
    guarded = {"SQLITE_PATH": str(seeded), "DASHBOARD_AUTH": "password", "DASHBOARD_PASSWORD": PASSWORD}
    with served(tmp_path, **guarded) as address:
        for path in ("_stcore/host-config", "_stcore/stream", "media/x", "static/x", "_stcore/metrics"):
            with pytest.raises(HTTPError) as refused:
                urlopen(f"{address}/{path}")
            assert refused.value.code == 401
        with pytest.raises(HTTPError) as refused:
            urlopen(Request(f"{address}/login", data=b"password=x", headers={"Origin": "https://evil.example"}))
        assert refused.value.code == 403

        page = browser.new_page()
        page.goto(f"{address}/runs?status=failed")
        assert violations(page, known=()) == []
        page.get_by_label("Password").fill("guess")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_be_visible()
        page.screenshot(path=ARTIFACTS / "dashboard-login.png")
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Log in").click()
        _expect_page(page, "Runs")
        assert page.url == f"{address}/runs?status=failed"

        page.get_by_role("link", name="Log out").click()
        expect(page.get_by_label("Password")).to_be_visible()
        page.goto(address)
        expect(page.get_by_label("Password")).to_be_visible()
        page.goto(f"{address}/login?next=//evil.example")
        assert "evil" not in page.content()
        page.close()


@pytest.mark.parametrize(
    ("address", "env", "told"),
    [
        ("127.0.0.1", {"DASHBOARD_AUTH": "password", "DASHBOARD_PASSWORD": ""}, "DASHBOARD_PASSWORD is empty"),
        ("0.0.0.0", {"DASHBOARD_AUTH": "off"}, "DASHBOARD_AUTH=off serves this machine alone"),
    ],
)
def test_the_dashboard_does_not_start_open_to_everybody_or_closed_to_all(
    address: str, env: dict[str, str], told: str
) -> None:
    [port] = free_ports(1)
    command = [
        *(Path(sys.executable).with_name("streamlit"), "run", "dashboards/serve.py", "--server.headless", "true"),
        *("--server.address", address, "--server.port", str(port)),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode != 0
    assert told in done.stdout + done.stderr


@contextmanager
def looking(browser: Browser, url: str, name: str, scheme: str = "light", size: str = "wide") -> Iterator[Page]:
    """The page at the address, all there; nothing may go wrong in it."""
    page = browser.new_page(viewport=SIZES[size], color_scheme=scheme, timezone_id="Europe/Zurich")
    problems: list[str] = []
    # Streamlit asks below the page's own path first, and then at the root.
    page.on("response", lambda one: problems.append(one.url) if one.status >= 400 and _is_ours(one.url) else None)
    page.on(
        "console",
        lambda one: problems.append(one.text) if one.type == "error" and "Failed to load" not in one.text else None,
    )
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    _expect_page(page, name)
    expect(page.get_by_test_id("stException")).to_have_count(0)
    yield page
    assert problems == [], url
    page.close()


def file_name(name: str) -> str:
    """What a page's picture is called."""
    return name.lower().replace(",", "").replace(" ", "-")


def violations(page: Page, known: Collection[str] = frozenset(KNOWN)) -> list[str]:
    """What axe finds, but for what is known of Streamlit itself."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']} {[node['html'][:200] for node in one['nodes'][:3]]}"
        for one in found
        if one["id"] not in known
    ]


def _is_ours(url: str) -> bool:
    return not url.endswith(("/_stcore/health", "/_stcore/host-config"))


def _expect_page(page: Page, name: str) -> None:
    heading = page.get_by_role("heading", name=name, exact=True, level=1)
    expect(heading).to_be_visible(timeout=PATIENCE_MS)
    for unfinished in ("[data-stale=true]", "[data-testid=stSkeleton]", "[data-testid=stStatusWidget]"):
        expect(page.locator(unfinished)).to_have_count(0, timeout=PATIENCE_MS)


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urlopen(url):
                return
        except URLError:
            time.sleep(0.2)
    pytest.fail(f"it did not start:\n{log.read_text()}")
