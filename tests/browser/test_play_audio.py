"""The tab Play on Silero VAD, in a real browser: a file, and a microphone that hears a file."""

from __future__ import annotations

import re

import numpy as np
import pytest
from playwright.sync_api import FilePayload, Page, expect

from tests.silero import RATE, in_a_plain_loop, wav


def test_a_sound_file_gives_what_the_plain_loop_gives(page: Page, voice: np.ndarray) -> None:
    heard = in_a_plain_loop(voice)[:, 0]
    page.goto("/#/play/vad")
    file = page.get_by_label("A sound file")
    file.set_input_files(FilePayload(name="voice.wav", mimeType="audio/wav", buffer=wav(voice, RATE)))
    status = page.locator("#status")
    expect(status).to_contain_text("voice.wav: 90 steps")
    chart = page.get_by_role("img", name="The model's output")
    chart.focus()
    page.keyboard.press("End")
    readout = page.locator(".readout").first
    for step in range(89, 0, -11):
        found = re.search(r"probability (\S+),", readout.text_content() or "")
        assert found and float(found[1]) == pytest.approx(float(heard[step]), rel=2e-3, abs=1e-4), step
        for _ in range(11):
            page.keyboard.press("ArrowLeft")
    assert heard.max() > 0.5

    # At another rate it is resampled: the same voice is heard.
    slow = np.interp(np.arange(int(len(voice) * 44100 / RATE)) * RATE / 44100, np.arange(len(voice)), voice)
    file.set_input_files(FilePayload(name="other.wav", mimeType="audio/wav", buffer=wav(slow, 44100)))
    expect(status).to_contain_text("other.wav: 90 steps")
    largest = float(re.findall(r"[\d.]+(?=\.$)", status.text_content() or "")[0])
    assert largest == pytest.approx(float(heard.max()), abs=0.15)
    file.set_input_files(FilePayload(name="none.wav", mimeType="audio/wav", buffer=b"RIFF"))
    expect(page.get_by_text("none.wav is no sound")).to_be_visible()


def test_the_microphone_is_heard_live(page: Page) -> None:
    page.goto("/#/play/vad")
    page.get_by_role("button", name="Listen to the microphone").click()
    verdict = page.locator(".verdict")
    expect(verdict).to_contain_text(re.compile(r"microphone, [3-9]\.\d s: probability"), timeout=20_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Listen")).to_be_visible()
    chart = page.get_by_role("img", name="The model's output")
    chart.focus()
    page.keyboard.press("Home")
    heard = []
    for _ in range(90):
        found = re.search(r"probability (\S+),", page.locator(".readout").first.text_content() or "")
        heard.append(float(found[1]) if found else 0.0)
        page.keyboard.press("ArrowRight")
    assert max(heard) > 0.5 > min(heard)
    # Another tab ends the stream, and with it the microphone.
    page.get_by_role("button", name="Listen").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.get_by_role("link", name="Models").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Models")
    page.wait_for_function(NO_SESSIONS)


def test_without_https_the_page_says_why_there_is_no_microphone(page: Page) -> None:
    page.add_init_script("Object.defineProperty(window, 'isSecureContext', { value: false })")
    page.goto("/#/play/vad")
    expect(page.get_by_text("A browser gives the microphone only to pages from HTTPS or localhost")).to_be_visible()
    expect(page.get_by_role("button", name="Listen")).to_be_disabled()


def test_resampling_in_chunks_keeps_a_tone(page: Page) -> None:
    page.goto("/")
    for rate in (48000, 44100, 8000):
        check_tone(page, rate)


def check_tone(page: Page, rate: int) -> None:
    times = np.arange(rate // 10) / rate
    tone = np.sin(2 * np.pi * 440 * times)
    resampled = page.evaluate(
        """async ([tone, rate]) => {
            const { Resampler } = await import("./ui/resample.js");
            const resampler = new Resampler(rate, 16000);
            const chunks = [];
            for (let at = 0; at < tone.length; at += 128) chunks.push(...resampler.push(tone.slice(at, at + 128)));
            return chunks;
        }""",
        [tone.tolist(), rate],
    )
    wanted = np.sin(2 * np.pi * 440 * np.arange(len(resampled)) / 16000)
    assert 1500 < len(resampled) <= 1600
    np.testing.assert_allclose(resampled[100:], wanted[100:], atol=5e-3)


NO_SESSIONS = """() => fetch("sessions").then((answer) => answer.json())
    .then(({ sessions }) => !sessions.some(({ model }) => model === "vad"))"""
