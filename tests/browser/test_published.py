"""The page behind a real nginx, under a path, of a server that wants keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.e2e.helpers import new_key
from tests.kinds import write_repository
from tests.nginx import PREFIX, published
from tests.server import Server, start_server


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file of keys, and a key in it."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    return file, new_key("alice", file)


@pytest.fixture(scope="module")
def server(keys: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What the browser sees of the server: nginx."""
    models = write_repository(tmp_path_factory.mktemp("kinds"))
    flags = ["--root-path", PREFIX, "--trusted-proxies", "127.0.0.1", "--api-keys-file", str(keys[0])]
    server = start_server("--models", str(models), *flags)
    with published(server.url, tmp_path_factory.mktemp("nginx")) as url:
        yield Server(server.process, url)
    assert server.stop() == 0


def expect_refusals(errors: list[str]) -> None:
    """The console names each refused request; here nothing else may be in it."""
    assert errors and all("401" in error for error in errors), errors
    errors.clear()


def enter(page: Page, key: str) -> None:
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use this key").click()


def test_a_key_is_asked_for_and_kept_in_memory_only(page: Page, keys: tuple[Path, str], errors: list[str]) -> None:
    page.goto(f"{PREFIX}/#/models")
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    expect(page.get_by_label("Key", exact=True)).to_be_focused()
    enter(page, "wrong")
    expect(dialog.get_by_role("alert")).not_to_be_empty()
    enter(page, keys[1])
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("link", name="symbols", exact=True)).to_be_visible()
    stored = "() => [localStorage.length, sessionStorage.length, document.cookie]"
    assert page.evaluate(stored) == [0, 0, ""]
    page.reload()
    expect(dialog).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert").first).to_be_visible()
    page.get_by_role("button", name="API key").click()
    enter(page, keys[1])
    expect(page.get_by_role("link", name="symbols", exact=True)).to_be_visible()
    # A socket carries the key in its first frame.
    stream = """async () => {
        const { openStream } = await import("./ui/api.js");
        const stream = await openStream();
        return (await stream.ask({ op: "open", model: "frames" })).op;
    }"""
    assert page.evaluate(stream) == "open"
    expect_refusals(errors)


@pytest.fixture
def opened(page: Page, keys: tuple[Path, str], errors: list[str]) -> Page:
    """The page, with the key entered."""
    page.goto(f"{PREFIX}/#/models")
    enter(page, keys[1])
    expect(page.get_by_role("link", name="symbols", exact=True)).to_be_visible()
    expect_refusals(errors)
    return page


def test_any_model_has_a_field_for_each_number_and_a_table(opened: Page) -> None:
    opened.goto(f"{PREFIX}/#/play/symbols")
    opened.get_by_label("symbol", exact=True).fill("3")
    opened.get_by_label("level 2").fill("0.5")
    opened.get_by_label("level 2").press("Enter")
    row = opened.get_by_role("row").filter(has=opened.get_by_role("rowheader", name="1", exact=True))
    expect(row).to_contain_text("symbol: 3; level: 0, 0.5")
    expect(row).to_contain_text("features: ")
    opened.get_by_label("symbol", exact=True).fill("9")
    opened.get_by_role("button", name="Step").click()
    assert not opened.get_by_label("symbol", exact=True).evaluate("(field) => field.checkValidity()")
    opened.get_by_role("button", name="Start over").click()
    expect(row).to_have_count(0)


def test_a_model_of_whole_sequences_gathers_steps_and_predicts(opened: Page) -> None:
    opened.goto(f"{PREFIX}/#/play/both-ways")
    expect(opened.get_by_text("its LSTM is bidirectional")).to_be_visible()
    for value in ("1", "-1"):
        opened.get_by_label("x 1").fill(value)
        opened.get_by_role("button", name="Add this step").click()
    expect(opened.get_by_text("2 steps to predict")).to_be_visible()
    opened.get_by_role("button", name="Predict the sequence").click()
    expect(opened.locator(".readout")).to_contain_text("2 steps give ")
    opened.goto(f"{PREFIX}/#/models/both-ways")
    drawing = opened.get_by_role("img")
    assert "x (input [3])" in (drawing.get_attribute("aria-label") or "")  # its file has no drawing
