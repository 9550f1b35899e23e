"""A family of models with its pages, and a browser's tab to look at them: a plugin of pytest."""

from __future__ import annotations

from functools import partial

import pytest
from report_pages import Made, open_tab, visited


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return Made(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with open_tab(tmp_path_factory.mktemp("tab") / "page.html") as page:
        yield page


@pytest.fixture
def visit(tab):
    return partial(visited, tab)
