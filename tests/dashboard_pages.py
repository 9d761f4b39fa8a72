"""The dashboard's pages for tests that need no browser."""

from pathlib import Path

import pytest
import streamlit as st
from personalization.settings import get_settings
from streamlit import config
from streamlit.testing.v1 import AppTest

_APP = Path(__file__).parents[1] / "dashboards" / "app.py"
_TITLES = {"explore": "Explore a user"}


def forget() -> None:
    """Have the pages read settings and stores anew."""
    get_settings.cache_clear()
    st.cache_data.clear()
    st.cache_resource.clear()


def look_at(environment: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """Have the pages show the stores of this environment, asking for no password."""
    for name, value in (environment | {"DASHBOARD_AUTH": "off"}).items():
        patch.setenv(name, value)
    forget()


def open_page(name: str, /, **query: str) -> AppTest:
    """A page as somebody sees it who follows a link to it."""
    config.set_option("server.address", "127.0.0.1")  # as the local stack serves it, without a password
    app = AppTest.from_file(_APP, default_timeout=120).run()
    for key, value in query.items():
        app.query_params[key] = value
    app.switch_page(f"views/{name}.py").run()
    assert not app.exception
    assert app.title[0].value == _TITLES.get(name, name.capitalize())
    return app


def words(app: AppTest) -> str:
    """All text of a page but its tables, a line each."""
    texts = (*app.markdown, *app.text, *app.caption, *app.error, *app.warning, *app.info, *app.success)
    return "\n".join(str(one.value) for one in texts)


def metrics(app: AppTest) -> dict[str, str]:
    """The tiles of a page."""
    return {metric.label: metric.value for metric in app.metric}
