"""A real browser for the tests of the page: Debian's chromium. It and a server are there once for all of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.server import Server, start_server
from tests.silero import CHUNK, RATE, speech, wav

FLAGS = [
    "--no-sandbox",  # tests run as root in containers
    "--disable-dev-shm-usage",
    "--use-fake-ui-for-media-stream",  # the microphone is allowed without a question
    "--use-fake-device-for-media-stream",
]


@pytest.fixture(scope="package")
def voice() -> np.ndarray:
    """Three seconds of a voice at 16 kHz, as 16 bits hold it."""
    return (speech(0)[: 90 * CHUNK] * 32767).round().astype(np.float32) / 32768


@pytest.fixture(scope="package")
def browser(voice: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser; its microphone hears the voice, again and again.

    It ends with the tests here: while it is there an event loop counts as running, so that nothing else can run one.
    """
    file = tmp_path_factory.mktemp("microphone") / "voice.wav"
    file.write_bytes(wav(voice, RATE))
    program = shutil.which("chromium")
    assert program, "chromium is missing: `make servers` installs it"
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={file}"]
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server(examples: Path, vad: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the example models and Silero VAD."""
    models = tmp_path_factory.mktemp("models")
    for home in (*examples.iterdir(), *vad.iterdir()):
        shutil.copytree(home, models / home.name)
    server = start_server("--models", str(models))
    yield server
    assert server.stop() == 0


@pytest.fixture
def errors() -> list[str]:
    """What the browser's console has complained of; a test that expects complaints clears it."""
    return []


@pytest.fixture
def page(browser: Browser, server: Server, errors: list[str]) -> Iterator[Page]:
    """A page on the server; the test fails if anything is complained of, or another host is asked."""
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
