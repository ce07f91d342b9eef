"""The tab of sessions, in a real browser: every button does what it says, on real models."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
from playwright.sync_api import Locator, Page, expect

from tests.server import Server

# The server is the browser tests' own, so its first session may be minutes old.
DURATION = re.compile(r"^\d+(\.\d)? (second|minute)s?$")


@pytest.fixture
def client(server: Server) -> Any:
    with server.client() as client:
        yield client


def create(client: httpx.Client, model: str) -> str:
    return str(client.post("/sessions", json={"model": model}).json()["session"])


def state(client: httpx.Client, session: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load(client.get(f"/sessions/{session}/state").content)


def opened(page: Page, session: str) -> Locator:
    """Opens a session and returns its panel."""
    page.goto(f"/#/sessions/{session}")
    panel = page.get_by_role("region", name="Session", exact=True)
    expect(panel).to_be_visible()
    return panel


def fact(panel: Locator, name: str) -> Locator:
    return panel.locator("dl div").filter(has=panel.page.get_by_text(name, exact=True)).locator("dd")


def step(panel: Locator, count: int, source: str = "random") -> None:
    panel.get_by_label("Input").select_option(source)
    panel.get_by_label("Time steps").fill(str(count))
    panel.get_by_role("button", name="Step", exact=True).click()


def test_the_list_has_pages_and_opens_sessions(page: Page, client: httpx.Client, errors: list[str]) -> None:
    made = {create(client, "sunspots") for _ in range(51)}
    page.goto("/#/sessions")
    links = page.get_by_role("table").get_by_role("link")
    expect(links).to_have_count(50)
    seen = set(links.all_inner_texts())
    expect(page.get_by_role("columnheader", name="Age")).to_be_visible()
    expect(page.get_by_role("row").nth(1).get_by_role("cell").last).to_have_text(DURATION)
    page.get_by_role("button", name="Next page").click()
    expect(page.get_by_role("button", name="First page")).to_be_visible()
    seen |= set(links.all_inner_texts())
    assert made <= seen
    for session in made:
        client.delete(f"/sessions/{session}")
    page.get_by_role("button", name="First page").click()
    page.get_by_label("Model").select_option("vowels")
    page.get_by_role("button", name="New session").click()
    panel = page.get_by_role("region", name="Session", exact=True)
    expect(fact(panel, "Model")).to_have_text("vowels")
    expect(fact(panel, "Position")).to_have_text("0")
    expect(fact(panel, "Durable")).to_have_text("none")
    expect(fact(panel, "Age")).to_have_text(DURATION)
    expect(fact(panel, "Ends when idle for")).to_have_text("1 hour")
    page.get_by_role("link", name="All sessions").click()
    page.get_by_label("Session's id").fill("nobody")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="there is no session of that id")).to_be_visible()
    assert "404" in errors.pop()


def test_the_state_is_drawn_as_it_moves_whoever_steps(page: Page, client: httpx.Client) -> None:
    session = create(client, "vowels")
    panel = opened(page, session)
    strip = panel.get_by_role("img", name=re.compile(r"^lstm\.h"))
    expect(strip).to_have_attribute("aria-label", re.compile("128 values over 1 steps, the latest 0"))
    step(panel, 5)
    expect(fact(panel, "Position")).to_have_text("5")
    expect(strip).to_have_attribute("aria-label", re.compile("128 values over 6 steps, the latest 5"))
    expect(panel.get_by_text("The latest: speaker")).to_be_visible()
    client.post(f"/sessions/{session}/step", json={"x": [0.5] * 12})
    expect(fact(panel, "Position")).to_have_text("6")
    expect(strip).to_have_attribute("aria-label", re.compile("the latest 6"))
    values = state(client, session)["lstm.h"]
    readout = panel.locator("figure", has=page.get_by_role("img", name=re.compile(r"^lstm\.h"))).locator(".readout")

    def read() -> tuple[int, int]:
        found = re.fullmatch(r"step (\d+), lstm\.h\[(\d+)\]: (\S+)", readout.inner_text())
        assert found
        step, row, value = int(found[1]), int(found[2]), float(found[3])
        assert value == pytest.approx(values[row], rel=1e-3)
        return step, row

    strip.focus()
    page.keyboard.press("ArrowDown")  # from the first value of the latest step
    assert read() == (6, 1)
    box = strip.bounding_box()
    assert box
    strip.hover(position={"x": box["width"] * 6.5 / 25, "y": box["height"] * 64.3 / 128})
    assert read() == (6, 64)
    panel.get_by_label("Follow it").uncheck()
    client.post(f"/sessions/{session}/step", json={"x": [0.5] * 12})
    panel.get_by_label("Follow it").check()
    expect(fact(panel, "Position")).to_have_text("7")


def test_a_fork_has_another_future(page: Page, client: httpx.Client) -> None:
    session = create(client, "characters")
    panel = opened(page, session)
    panel.get_by_label("Input").select_option("typed")
    panel.get_by_label("Text", exact=True).fill("Alice was")
    panel.get_by_role("button", name="Step", exact=True).click()
    expect(fact(panel, "Position")).to_have_text("9")
    expect(panel.get_by_label("The text that it was fed")).to_have_text("Alice was")
    panel.get_by_role("button", name="Fork and compare").press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Two futures")
    expect(page.locator("main")).to_be_focused()  # the button is gone
    one, other = (page.get_by_role("region", name=name, exact=True) for name in "AB")
    apart = page.get_by_role("region", name="How far apart").get_by_role("img")
    expect(apart).to_have_attribute("aria-label", re.compile(r"lstm\.0\.h 0 at position 9"))
    for panel, seed in ((one, "1"), (other, "2")):
        panel.get_by_label("Input").select_option("itself")
        panel.get_by_label("Time steps").fill("12")
        panel.get_by_label("Seed").fill(seed)
    page.get_by_role("button", name="Step both").click()
    for panel in (one, other):
        expect(fact(panel, "Position")).to_have_text("21")
    texts = [panel.get_by_label("The text that it was fed").inner_text() for panel in (one, other)]
    assert texts[0] != texts[1]
    assert texts[0].startswith("Alice was")
    assert texts[1].startswith("Alice was")
    expect(apart).to_have_attribute("aria-label", re.compile(r"lstm\.0\.h (?!0 )\S+ at position 21"))
    rolled = create(client, "characters")
    body = {"text": "Alice was", "steps": 12, "seed": 1, "temperature": 0.8}
    answer = client.post(f"/sessions/{rolled}/rollout", json=body).json()
    assert ("Alice was" + answer["text"]) == texts[0]  # step by step as in one rollout


def test_a_forecast_rolls_out_until_it_is_stopped(page: Page, client: httpx.Client) -> None:
    session = create(client, "sunspots")
    panel = opened(page, session)
    step(panel, 3, "itself")
    expect(fact(panel, "Position")).to_have_text("3")
    chart = panel.get_by_role("img", name=re.compile("The outputs of the steps made here"))
    expect(chart).to_have_attribute("aria-label", re.compile("at step 3"))
    step(panel, 1000, "itself")
    panel.get_by_role("button", name="Stop").click()
    expect(panel.get_by_role("button", name="Step", exact=True)).to_be_visible()
    assert 3 <= client.get(f"/sessions/{session}").json()["position"] < 1003
    panel.get_by_label("Input").select_option("typed")
    panel.get_by_label("x, in JSON").fill("[[1], [2], 3")
    panel.get_by_role("button", name="Step", exact=True).click()
    expect(page.get_by_role("alert").filter(has_text="This is no JSON. One time step looks like [0]")).to_be_visible()


def test_a_state_is_rewound_downloaded_uploaded_and_reset(
    page: Page, client: httpx.Client, tmp_path: Path, errors: list[str]
) -> None:
    session = create(client, "vowels")
    panel = opened(page, session)
    step(panel, 4)
    expect(fact(panel, "Position")).to_have_text("4")
    moved = state(client, session)
    with page.expect_download() as waiting:
        panel.get_by_role("button", name="Download its state").click()
    assert waiting.value.suggested_filename == "vowels-1-at-4.safetensors"
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)
    saved = safetensors.numpy.load(file.read_bytes())
    assert all((tensor == moved[name]).all() for name, tensor in saved.items())
    slider = panel.get_by_role("slider", name="Rewind to")
    expect(panel.get_by_role("button", name="Put back")).to_be_disabled()
    slider.focus()
    page.keyboard.press("Home")
    expect(slider).to_have_attribute("aria-valuetext", "position 0")
    panel.get_by_role("button", name="Put back the state of position 0").click()
    expect(fact(panel, "Position")).to_have_text("5")
    assert not any(tensor.any() for tensor in state(client, session).values())
    panel.get_by_label("Upload a state").set_input_files(file)
    expect(fact(panel, "Position")).to_have_text("6")
    assert all((tensor == moved[name]).all() for name, tensor in state(client, session).items())
    panel.get_by_role("button", name="Reset to zeros").click()
    expect(fact(panel, "Position")).to_have_text("7")
    expect(page.locator("#status")).to_have_text("Reset to zeros, at position 7.")
    assert not any(tensor.any() for tensor in state(client, session).values())
    (tmp_path / "none.safetensors").write_bytes(b"nothing")
    panel.get_by_label("Upload a state").set_input_files(tmp_path / "none.safetensors")
    expect(page.locator("#problem")).to_contain_text("send what safetensors.numpy.save returns")
    expect(page.locator("#problem")).to_be_in_viewport()  # although it stands at the top of a long page
    assert "400" in errors.pop()


def test_a_session_is_deleted_after_a_question(page: Page, client: httpx.Client) -> None:
    session = create(client, "sunspots")
    panel = opened(page, session)
    delete = panel.get_by_role("button", name="Delete…")
    delete.click()
    dialog = page.get_by_role("dialog", name=f"Delete session {session}?")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert client.get(f"/sessions/{session}").status_code == 200
    delete.click()
    dialog.get_by_role("button", name="Delete it").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Sessions")
    assert client.get(f"/sessions/{session}").status_code == 410


def test_a_session_that_ends_elsewhere_is_reported(page: Page, client: httpx.Client, errors: list[str]) -> None:
    session = create(client, "sunspots")
    opened(page, session)
    client.delete(f"/sessions/{session}")
    expect(page.locator("#problem")).to_contain_text("the session was deleted at position 0")
    assert "410" in errors.pop()


def test_the_lines_to_copy_do_what_the_buttons_do(page: Page, client: httpx.Client, tmp_path: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for name in ("With curl", "In Python"):
        session = create(client, "vowels")
        panel = opened(page, session)
        panel.get_by_label("Follow it").uncheck()  # to its end
        panel.get_by_text("The same with curl and in Python").click()
        panel.get_by_role("button", name=f"Copy: {name}").click()
        expect(page.locator("#status")).to_have_text(f"{name}: copied.")
        lines = page.evaluate("navigator.clipboard.readText()")
        shell = ["bash", "-ec", lines.replace("curl ", "curl -sS --fail ")]
        command = shell if name == "With curl" else [sys.executable, "-c", lines]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert client.get(f"/sessions/{session}").json()["detail"] == (
            "the session was deleted at position 3: create another"  # a step, a state, a reset
        )
        page.goto("about:blank")


def test_every_control_has_a_name(page: Page, client: httpx.Client) -> None:
    session = create(client, "characters")
    opened(page, session).get_by_role("button", name="Fork and compare").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Two futures")
    for address in (page.url, "/#/sessions", "/#/server"):
        page.goto(address)
        page.get_by_role("heading", level=1).wait_for()
        unnamed = page.locator("main :is(input, select, textarea):not([aria-label])").evaluate_all(
            "all => all.filter(one => !one.labels.length).map(one => one.outerHTML)"
        )
        assert unnamed == []
