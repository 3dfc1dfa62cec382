"""Tests of downloads have a server of their own, and no proxy comes in between."""

import pytest
from web import Site


@pytest.fixture
def site(monkeypatch):
    """A server; see web.py."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("NO_PROXY", "*")
    site = Site()
    yield site
    site.close()
