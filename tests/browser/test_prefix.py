"""The page behind a real nginx that publishes it under a path."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.nginx import PREFIX, published
from tests.server import Server, start_server


@pytest.fixture(scope="module")
def server(examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server under a path; its URL is the proxy's, so that the page may ask nothing else."""
    server = start_server("--models", str(examples), "--root-path", PREFIX, "--trusted-proxies", "127.0.0.1")
    with published(server.url, tmp_path_factory.mktemp("nginx")) as url:
        yield Server(server.process, url)
    assert server.stop() == 0


def test_every_tab_works_under_a_path(page: Page, errors: list[str]) -> None:
    page.goto(f"{PREFIX}/")
    links: list[str] = []
    page.on("request", lambda request: links.append(request.url))
    for name in ("Models", "Play", "Sessions", "Server"):
        page.get_by_role("navigation").get_by_role("link", name=name).click()
        expect(page.get_by_role("heading", level=1)).to_have_text(name)
        page.wait_for_load_state("networkidle")
    expect(page.get_by_text("This address does not have the server's metrics")).to_be_visible()  # the proxy keeps them
    assert "404" in errors.pop()
    page.get_by_role("link", name="Sessions").click()
    page.get_by_label("Model").select_option("sunspots")
    page.get_by_role("button", name="New session").click()
    page.get_by_role("button", name="Step", exact=True).click()
    strip = page.get_by_role("img", name=re.compile(r"^rnn\.h"))
    expect(strip).to_have_attribute("aria-label", re.compile("the latest 20"))
    assert links
    assert all(re.match(rf"http://[^/]+{PREFIX}/", link) for link in links)
