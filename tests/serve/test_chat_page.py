"""The page at / in a real browser: by keyboard; watch turns leave and come back; phone and laptop, light and dark."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from serving import loaded, make_service, served

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FACT, QUESTION = "my cat is called Zephyr", "how is my CAT called?"
OTHERS = ["one two three four five", "red green blue yellow", "monday and tuesday", "bread, butter, jam"]
LOOKS = {"laptop": (1366, 768, "light"), "phone": (390, 844, "dark")}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or importlib.util.find_spec("playwright") is None, reason="no Chromium, or no playwright"
    ),
]


@pytest.fixture(scope="module")
def address():
    service = make_service(loaded(), cap=160, recall="lexical", recall_slots=48, max_tokens=8)
    with served(service) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def say(tab, text: str) -> None:
    tab.fill("#text", text)
    tab.press("#text", "Enter")
    _expect(tab.locator("#send")).to_be_enabled(timeout=60_000)


def _expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


@pytest.mark.parametrize("look", LOOKS)
def test_a_conversation_by_keyboard(address, browser, look):
    width, height, scheme = LOOKS[look]
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    errors, asked = [], []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    tab.click("summary")
    tab.fill("#temperature", "0")
    tab.click("summary")
    for text in [FACT, *OTHERS]:
        say(tab, text)
    assert tab.locator("article.user").count() == 1 + len(OTHERS) and tab.locator("article.error").count() == 0
    assert 2 <= tab.locator("article.evicted").count() < 2 * (1 + len(OTHERS)), "turns are greyed in place"
    assert tab.locator("article.recalled").count() == 0
    figures = tab.inner_text("#figures")
    assert "of 160 slots" in figures and "tokens forgotten" in figures and "tokens/s" in figures
    say(tab, QUESTION)
    assert tab.locator("article.recalled .who").all_inner_texts() == ["you", "model"], "the turn that came back"
    assert FACT in tab.inner_text("article.recalled.user")
    assert tab.inner_text("article:last-of-type .from") == f"recalled turn 1 ({FACT})"
    assert tab.evaluate("document.activeElement.id") == "text", "the next message can be typed"
    talk = "(talk => talk.scrollHeight - talk.scrollTop - talk.clientHeight)(document.getElementById('talk'))"
    assert tab.evaluate(talk) < 40, "the latest reply is in sight"
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    red, green, blue = tab.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert (int(red) + int(green) + int(blue) < 200) == (scheme == "dark")
    if folder := os.environ.get("SINKSTREAM_SCREENSHOTS"):
        tab.screenshot(path=str(Path(folder) / f"chat-{look}.png"))
    count, figures = tab.locator("article").count(), tab.inner_text("#figures")
    tab.click("#undo")
    _expect(tab.locator("article")).to_have_count(count - 2)
    _expect(tab.locator("#figures")).not_to_have_text(figures)
    assert "of 160 slots" in tab.inner_text("#figures") and " sent" not in tab.inner_text("#figures")
    tab.click("#reset")
    assert tab.locator("article").count() == 0
    assert not errors and all(url.startswith(address) for url in asked), "nobody but this server is asked"
    tab.close()
