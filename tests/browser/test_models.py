"""The tab Models, in a real browser."""

from __future__ import annotations

import json

import httpx
from playwright.sync_api import Page, expect

from cellserve.models.signature import SAMPLES_BYTES
from tests.server import Server


def test_the_list_leads_to_what_a_model_is_and_how_it_was_proved(page: Page, server: Server) -> None:
    page.goto("/")
    told = httpx.get(f"{server.url}/models/vowels").json()
    page.get_by_role("link", name="vowels", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("vowels")
    main = page.locator("main")
    for text in (
        told["description"], told["form"], "classification", f"{told['metrics']['accuracy']:.4f}", told["digest"],
        "speaker 9", "Proved", f"{told['parity']['whole']:.1e}".replace("e-0", "e-"), "serving", "LSTM",
    ):  # fmt: skip
        expect(main).to_contain_text(text)
    drawing = page.get_by_role("img")
    name = drawing.get_attribute("aria-label") or ""
    for layer in told["drawing"]:
        assert f"{layer['name']} ({layer['label']}" in name
        assert all(state in name for state in layer["states"])
        expect(drawing).to_contain_text(layer["name"])
    page.get_by_role("link", name="1", exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("vowels:1")
    page.get_by_role("link", name="Play with it").click()
    expect(page).to_have_title("Play · Cellserve")


def test_samples_are_of_every_class_and_small(server: Server) -> None:
    told = httpx.get(f"{server.url}/models/vowels").json()
    assert [sample["label"] for sample in told["samples"][:9]] == told["labels"]
    for name in ("vowels", "sunspots", "characters"):
        samples = httpx.get(f"{server.url}/models/{name}").json()["samples"]
        assert samples and len(json.dumps(samples, separators=(",", ":"))) <= SAMPLES_BYTES
        predicted = httpx.post(f"{server.url}/predict", json={"model": name, "sequences": [x["x"] for x in samples]})
        assert predicted.status_code == 200, predicted.text


def test_a_problem_is_reported_and_can_be_dismissed(page: Page, errors: list[str]) -> None:
    page.goto("/#/models/nothing")
    alert = page.get_by_role("alert").first
    expect(alert).to_contain_text("nothing")
    page.get_by_role("button", name="Dismiss").click()
    expect(alert).to_be_hidden()
    assert errors and all("404" in error for error in errors)
    errors.clear()


def test_what_a_model_is_named_is_text(page: Page) -> None:
    page.route("**/models/vowels", lambda route: route.fulfill(json=hostile(route.fetch().json())))
    page.goto("/#/models/vowels")
    expect(page.locator("main")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator("main img, main script").count() == 0


def hostile(told: dict[str, object]) -> dict[str, object]:
    evil = "<img src=x onerror=alert(1)>"
    return {**told, "description": evil, "form": evil, "labels": [evil] * 9, "provenance": {evil: evil}, "drawing": []}
