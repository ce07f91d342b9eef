"""The tab of the server, in a real browser: its charts, for operators only where keys are required."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.e2e.helpers import new_key
from tests.server import Serve, Server


@pytest.fixture
def asked(page: Page) -> list[str]:
    """The requests for metrics so far."""
    found: list[str] = []
    page.on("request", lambda request: found.append(request.url) if request.url.endswith("/metrics") else None)
    return found


def test_the_charts_show_what_the_server_does(page: Page, server: Server) -> None:
    page.goto("/#/server")
    expect(page.get_by_label("Charts of")).to_have_value("")
    with server.client() as client:
        session = client.post("/sessions", json={"model": "vowels"}).json()["session"]
        steps = page.get_by_role("img", name=re.compile("^Time steps a second"))

        def until_drawn(pattern: str) -> None:
            for _ in range(60):  # steps go on until the chart has one of them
                client.post(f"/sessions/{session}/step", json={"x": [[0.5] * 12] * 20})
                if re.search(pattern, steps.get_attribute("aria-label") or ""):
                    return
                page.wait_for_timeout(250)
            raise AssertionError(steps.get_attribute("aria-label"))

        until_drawn(r"Latest: steps (?!0 )\S+ at time now")
        for title, series in (
            ("Batch size, rows", "mean 1 at"), ("Wait and run, milliseconds", r"run p50 \S+ at"),
            ("From request to answer, milliseconds", r"p99 \S+ at"), ("Requests a second", r"requests \S+ at"),
        ):  # fmt: skip
            expect(page.get_by_role("img", name=re.compile(f"^{title}"))).to_have_attribute(
                "aria-label", re.compile(series)
            )
        row = page.get_by_role("row").filter(has_text="vowels:1")
        assert int(row.get_by_role("cell").first.inner_text()) >= 20
        page.get_by_label("Charts of").select_option(label="sunspots, version 1")
        expect(steps).to_have_attribute("aria-label", re.compile(r"Latest: steps 0 at"))
        page.get_by_label("Charts of").select_option(label="vowels, version 1")
        until_drawn(r"Latest: steps (?!0 )\S+ at")
        expect(page.get_by_role("heading", name="Requests a second (all models)")).to_be_visible()


def test_nothing_is_asked_while_nobody_sees_it(page: Page, asked: list[str]) -> None:
    page.clock.install()
    page.goto("/#/server")
    expect(page.get_by_role("heading", name="By model")).to_be_visible()
    with page.expect_request("**/metrics"):
        page.clock.run_for(2_000)
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {get: () => globalThis.unseen ?? true, configurable: true})"
    )
    page.wait_for_load_state("networkidle")
    so_far = len(asked)
    page.clock.run_for(20_000)
    page.wait_for_load_state("networkidle")
    assert len(asked) == so_far
    page.evaluate("globalThis.unseen = false")
    with page.expect_request("**/metrics"):
        page.clock.run_for(2_000)
    page.get_by_role("link", name="Models").click()  # the tab is left
    expect(page.get_by_role("heading", level=1)).to_have_text("Models")
    so_far = len(asked)
    page.clock.run_for(20_000)
    page.wait_for_load_state("networkidle")
    assert len(asked) == so_far


def test_quantiles_are_those_of_what_is_new(page: Page) -> None:
    cases = [
        (0.5, [0, 0, 0], [4, 8, 8], 1),  # the end of the first bucket
        (0.75, [0, 0, 0], [4, 8, 8], 1.5),  # half of the second one
        (0.5, [4, 8, 8], [4, 12, 12], 1.5),  # the growth alone counts
        (0.99, [0, 0, 0], [0, 0, 5], 2),  # beyond all bounds: the last of them
        (0.5, [9, 9, 9], [2, 4, 4], 1),  # a new process counts from zero
        (0.5, [4, 8, 8], [4, 8, 8], None),  # nothing new
    ]

    def reading(counts: list[int], time: int) -> dict[str, Any]:
        bounds = zip(("1.0", "2.0", "+Inf"), counts, strict=True)
        return {"time": time, "metrics": {"s_bucket": [{"labels": {"le": le}, "value": n} for le, n in bounds]}}

    page.goto("/")
    found = page.evaluate(
        """async (cases) => {
          const { Reading, Span } = await import(new URL("ui/metrics.js", location));
          return cases.map(([share, ...readings]) =>
            new Span(...readings.map((one) => new Reading(one))).quantile(share, "s", {}));
        }""",
        [(share, reading(before, 0), reading(after, 2)) for share, before, after, _ in cases],
    )
    assert found == [quantile for _, _, _, quantile in cases]


def test_where_keys_are_wanted_operators_alone_see_it(
    browser: Browser, examples: Path, serve: Serve, tmp_path: Path
) -> None:
    file = tmp_path / "keys.txt"
    alice, ops = new_key("alice", file), new_key("ops", file)
    url = serve("--models", str(examples), "--api-keys-file", str(file), "--operators", "ops").url
    page = browser.new_page(base_url=url)
    page.goto("/#/server")

    def give(key: str) -> None:
        page.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")

    give(alice)
    expect(page.get_by_text("Only operators see this")).to_be_visible()
    page.get_by_role("link", name="Sessions").click()
    page.get_by_role("button", name="New session").click()
    page.get_by_text("The same with curl and in Python").click()
    lines = page.get_by_label("With curl", exact=True)
    expect(lines).to_contain_text('-H "Authorization: Bearer $CELLSERVE_API_KEY"')
    assert alice not in page.content()
    page.get_by_role("link", name="Server").click()
    page.get_by_role("button", name="API key").click()
    give(ops)
    expect(page.get_by_role("heading", name="By model")).to_be_visible()
    page.get_by_role("link", name="Sessions").click()
    expect(page.get_by_text("You have no sessions.")).to_be_visible()  # alice's are hers
    page.close()
