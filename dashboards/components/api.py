"""The API as the pages ask it: with the dashboard's own key, which may only read."""

from typing import Any

import httpx
import streamlit as st
from personalization.errors import StoreError
from personalization.settings import get_settings


@st.cache_resource(show_spinner=False)
def _client() -> httpx.Client:
    settings = get_settings()
    key = settings.api_key.get_secret_value()
    return httpx.Client(
        base_url=settings.api_url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=settings.store_timeout_s,
        trust_env=False,
    )


@st.cache_data(ttl="10s", max_entries=200, show_spinner=False)
def ask(path: str, **parameters: str | int | bool) -> dict[str, Any] | None:
    """What the API says; None where it knows nothing of it.

    Raises:
        StoreError: it does not answer, or refuses to.
    """
    try:
        response = _client().get(path, params=parameters)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StoreError("api", f"does not answer ({type(error).__name__}); check API_URL") from error
    if response.status_code == httpx.codes.NOT_FOUND:
        return None
    if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise StoreError("api", f"refused the dashboard ({response.status_code}); check API_KEY")
    if not response.is_success:
        raise StoreError("api", f"cannot answer now ({response.status_code})")
    answer: dict[str, Any] = response.json()
    return answer
