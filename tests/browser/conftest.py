"""A real browser for the tests of the page: Debian's chromium, one for all tests of a module."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.server import Server, start_server

FLAGS = [
    "--no-sandbox",  # tests run as root in containers
    "--disable-dev-shm-usage",
    "--use-fake-ui-for-media-stream",  # the microphone is allowed without a question
    "--use-fake-device-for-media-stream",
]


@pytest.fixture(scope="module")
def browser_flags() -> list[str]:
    """Further flags of a module's browser."""
    return []


@pytest.fixture(scope="module")
def browser(browser_flags: list[str]) -> Iterator[Browser]:
    """A module's browser."""
    program = shutil.which("chromium")
    assert program, "chromium is missing: `make servers` installs it"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*FLAGS, *browser_flags])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(examples: Path) -> Iterator[Server]:
    """A server of the example models."""
    server = start_server("--models", str(examples))
    yield server
    assert server.stop() == 0


@pytest.fixture
def errors() -> list[str]:
    """What the browser's console has complained of; a test that expects complaints clears it."""
    return []


@pytest.fixture
def page(browser: Browser, server: Server, errors: list[str]) -> Iterator[Page]:
    """A page on the module's server; the test fails if anything is complained of, or another host is asked."""
    context = browser.new_context(base_url=server.url, viewport={"width": 1000, "height": 800})
    context.set_default_timeout(20_000)
    page = context.new_page()
    hosts: set[str] = set()

    def complain(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            errors.append(message.text)

    page.on("console", complain)
    page.on("pageerror", lambda error: errors.append(str(error)))
    context.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("websocket", lambda socket: hosts.add(urlsplit(socket.url).netloc))
    yield page
    context.close()
    hosts.discard("")  # blob: and data: addresses
    assert hosts <= {urlsplit(server.url).netloc}
    assert errors == []
