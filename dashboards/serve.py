"""The dashboard as it is served, with the login before app.py: `streamlit run dashboards/serve.py`."""

import sys

# What the pages import takes a second: not the first who looks waits for it.
from components import cards, store  # noqa: F401
from components.login import Login, guard
from personalization.errors import SettingsError
from personalization.settings import get_settings
from starlette.middleware import Middleware
from streamlit.starlette import App

settings = get_settings()
try:
    middleware = [Middleware(Login, settings=settings)] if guard(settings) else []
except SettingsError as error:
    sys.exit(f"error: {error}")
app = App("app.py", middleware=middleware)
