"""The tab Play on the example models, in a real browser; numbers are compared with the API's."""

from __future__ import annotations

import math
from typing import Any

import httpx
from playwright.sync_api import FilePayload, Page, expect

from tests.helpers import until
from tests.server import Server


def model(server: Server, name: str) -> Any:
    found = httpx.get(f"{server.url}/models/{name}").json()
    assert found["samples"], f"{name} is of an earlier export: remove artifacts/ and run `make setup`"
    return found


def predict(server: Server, name: str, sequence: Any) -> Any:
    body = {"model": name, "sequences": [sequence], "outputs": "all"}
    return httpx.post(f"{server.url}/predict", json=body).json()["outputs"][0]


def short(value: float) -> str:
    """A number as the page writes it, of 0.1 and more."""
    return f"{float(f'{value:.4g}' if abs(value) < 1 else f'{value:.6g}'):g}"


def play_to_the_end(page: Page) -> None:
    page.get_by_label("Speed").fill("7")
    page.get_by_role("button", name="Play", exact=True).click()
    expect(page.get_by_role("button", name="Play", exact=True)).to_be_disabled()


def test_a_forecaster_draws_its_test_data_and_rolls_it_out(page: Page, server: Server) -> None:
    series = model(server, "sunspots")["samples"][0]["x"]
    predicted = predict(server, "sunspots", series)
    page.goto("/#/play/sunspots")
    page.get_by_role("button", name="Step", exact=True).click()
    status = page.locator("#status")
    expect(status).to_contain_text(f"Step 1 of {len(series)}: given {short(series[0][0])}")
    play_to_the_end(page)
    error = math.sqrt(sum((x[0] - y[0]) ** 2 for x, y in zip(series[1:], predicted, strict=False)) / (len(series) - 1))
    expect(page.get_by_text(f"Root mean square error so far: {short(error)};")).to_be_visible()
    chart = page.get_by_role("img", name="The series and its forecast")
    assert f"given {short(series[-1][0])} at step {len(series) - 1}" in (chart.get_attribute("aria-label") or "")

    page.get_by_label("Roll out from here").fill("120")
    body = {"model": "sunspots"}
    with server.client() as client:
        id = client.post("/sessions", json=body).json()["session"]
        client.post(f"/sessions/{id}/step", json={"x": series})
        rolled = client.post(f"/sessions/{id}/rollout", json={"x": [predicted[-1]], "steps": 119}).json()["y"]
        client.delete(f"/sessions/{id}")
    expect(status).to_have_text(f"Rolled out 120 steps: the last is {short(rolled[-1][0])}.")
    chart.focus()
    page.keyboard.press("End")
    expect(page.get_by_text(f"step {len(series) + 119}: rolled out {short(rolled[-1][0])}")).to_be_visible()
    # With the tab the session is left.
    address = "/sessions/" + (page.get_by_text("Look into this session").get_attribute("href") or "").split("/")[-1]
    assert httpx.get(server.url + address).json()["position"] == len(series)
    page.get_by_role("link", name="Models").click()
    expect(page.get_by_role("heading", name="Models")).to_be_visible()
    until(lambda: httpx.get(server.url + address).status_code == 410)


def test_a_forecaster_takes_a_csv_that_is_pasted_or_dropped(page: Page, server: Server) -> None:
    page.goto("/#/play/sunspots")
    page.get_by_text("Your own: paste or drop a CSV").click()
    page.get_by_label("CSV", exact=True).fill("month;number\n2020-01;6,5\n2020-02;7,25\n")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_text("number, 2 steps")).to_be_visible()
    play_to_the_end(page)
    predicted = predict(server, "sunspots", [[6.5], [7.25]])
    expect(page.locator("#status")).to_have_text(
        f"Step 2 of 2: given 7.25, next is predicted {short(predicted[-1][0])}."
    )
    file = FilePayload(name="mine.csv", mimeType="text/csv", buffer=b"1,2\n3,4\n5,6\n")
    page.get_by_label("or a file").set_input_files(file)
    page.get_by_label("Column").select_option("column 1")
    expect(page.get_by_text("column 1, 3 steps")).to_be_visible()
    page.get_by_label("CSV", exact=True).fill("1,2\n3\n")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_text("Row 2 has")).to_be_visible()


def test_a_classifier_plays_an_example_and_its_classes_run(page: Page, server: Server) -> None:
    told = model(server, "vowels")
    place, sample = next((place, one) for place, one in enumerate(told["samples"]) if one["label"] == "speaker 4")
    said = predict(server, "vowels", sample["x"])
    page.goto("/#/play/vowels")
    page.get_by_label("From the model's test data").select_option(str(place))
    page.get_by_role("button", name="Step", exact=True).click()
    bars = page.get_by_role("list", name="Classes").get_by_role("listitem")
    for value, label, bar in zip(said[0], told["labels"], bars.all(), strict=True):
        expect(bar).to_have_text(f"{label}{value:.3f}")
    play_to_the_end(page)
    steps = len(sample["x"])
    expect(page.get_by_text(f"step {steps} of {steps}: speaker 4, {short(max(said[-1]))}").first).to_be_visible()
    strip = page.get_by_role("img", name="What it says")
    strip.focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    expect(page.get_by_text(f"step {steps}, speaker 4: {short(said[-1][3])}")).to_be_visible()
    page.get_by_role("button", name="Start over").click()
    expect(bars.first).to_have_text("speaker 10.000")
    # Another sequence, taken while one plays, begins at its first step; a closed page leaves no session.
    page.get_by_label("Speed").fill("2")
    page.get_by_role("button", name="Play", exact=True).click()
    expect(page.get_by_text("step 2 of")).to_be_visible()
    page.get_by_label("From the model's test data").select_option("1")
    page.get_by_role("button", name="Step", exact=True).click()
    expect(page.locator(".verdict")).to_contain_text("step 1 of")
    address = "/sessions/" + (page.get_by_text("Look into this session").get_attribute("href") or "").split("/")[-1]
    assert httpx.get(server.url + address).json()["position"] == 1
    page.goto("about:blank")
    until(lambda: httpx.get(server.url + address).status_code == 410)


def test_a_text_model_says_what_comes_next_and_writes_on(page: Page, server: Server) -> None:
    told = model(server, "characters")
    page.goto("/#/play/characters")
    text = page.get_by_label("Type, and let the model write on")
    text.fill("Alice wasé")
    expect(page.get_by_text('The model does not know "é"')).to_be_visible()
    text.fill("Alice was")
    said = predict(server, "characters", [told["labels"].index(one) for one in "Alice was"])[-1]
    best = page.get_by_role("list", name="Next characters").get_by_role("listitem").first
    assert told["labels"][said.index(max(said))] == " "
    expect(best).to_have_text(f"space{100 * max(said):.1f} %")
    page.keyboard.press("End")
    text.press_sequentially(" v")
    said = predict(server, "characters", [told["labels"].index(one) for one in "Alice was v"])[-1]
    expect(best).to_have_text(f"{told['labels'][said.index(max(said))]}{100 * max(said):.1f} %")

    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top k").fill("5")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Characters", exact=True).fill("300")
    with server.client() as client:
        id = client.post("/sessions", json={"model": "characters"}).json()["session"]
        options = {"text": "Alice was v", "temperature": 0.5, "top_k": 5, "seed": 7}
        whole = client.post(f"/sessions/{id}/rollout", json={**options, "steps": 600}).json()["text"]
    page.get_by_role("button", name="Write on").click()
    expect(page.get_by_role("button", name="Write on")).to_be_visible()
    expect(text).to_have_value("Alice was v" + whole[:300])
    # Stopped at some place, it goes on as it would have.
    page.get_by_label("Characters", exact=True).fill("4000")
    page.get_by_role("button", name="Write on").click()
    page.wait_for_function("() => document.querySelector('.writing').value.length > 320")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Write on")).to_be_visible()
    stopped = len(text.input_value())
    page.get_by_label("Characters", exact=True).fill("20")
    page.get_by_role("button", name="Write on").click()
    page.wait_for_function(f"() => document.querySelector('.writing').value.length === {stopped + 20}")
    known = min(stopped + 20, len("Alice was v" + whole))
    assert text.input_value()[:known] == ("Alice was v" + whole)[:known]


def test_a_model_of_an_earlier_export_is_played_with_a_csv(page: Page) -> None:
    def earlier(told: dict[str, Any]) -> dict[str, Any]:
        return {**told, "samples": [], "drawing": []}

    page.route("**/models/sunspots", lambda route: route.fulfill(json=earlier(route.fetch().json())))
    page.goto("/#/play/sunspots")
    page.get_by_label("CSV", exact=True).fill("6.5\n7.25\n")
    page.get_by_role("button", name="Use it").click()
    page.get_by_role("button", name="Step", exact=True).click()
    expect(page.locator("#status")).to_contain_text("Step 1 of 2: given 6.5")


def test_each_view_fits_narrow_and_wide_windows_and_names_its_controls(page: Page) -> None:
    for path in ("models", "models/vowels", "play/sunspots", "play/vowels", "play/characters", "play/vowels/table"):
        page.goto(f"/#/{path}")
        page.wait_for_load_state("networkidle")
        for width in (400, 1600):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), (path, width)
        assert page.evaluate(UNNAMED) == [], path


UNNAMED = """() => [...document.querySelectorAll("button, input, select, textarea, a, [role=img], [role=group]")]
    .filter((each) => each.checkVisibility() && !(each.labels?.length || each.ariaLabel || each.textContent.trim()))
    .map((each) => each.outerHTML)"""
