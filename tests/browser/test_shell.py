"""The frame of the page, in a real browser: tabs, the key, problems."""

from __future__ import annotations

from playwright.sync_api import Page, expect


def test_tabs_are_links_that_keyboard_and_history_reach(page: Page) -> None:
    page.goto("/")
    expect(page).to_have_title("Models · Cellserve")
    expect(page.get_by_role("heading", level=1)).to_have_text("Models")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    for name in ("Play", "Sessions", "Server"):
        page.get_by_role("navigation").get_by_role("link", name=name).click()
        expect(page).to_have_title(f"{name} · Cellserve")
        expect(page.locator("nav [aria-current=page]")).to_have_text(name)
    page.go_back()
    expect(page).to_have_title("Sessions · Cellserve")
