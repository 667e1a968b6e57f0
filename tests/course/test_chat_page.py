"""The server's chat page, in a browser without a window."""

import json
import re
import shutil
from collections.abc import Iterator

import pytest

from course.running import ServerProcess

playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install -r requirements-browser.txt tries the chat page"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")
# Nothing of it asks another host for anything.
FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update"]
KEY = "a key of this test"


@pytest.fixture(scope="module")
def model(make_checkpoint) -> str:
    return make_checkpoint(max_position_embeddings=256)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


def opened(browser, server: ServerProcess, key: str | None = None):
    """Open the page; returns it, and the hosts that it has asked for something."""
    page = browser.new_page()
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.on("dialog", lambda dialog: dialog.accept(key or ""))
    page.goto(server.url)
    page.wait_for_function("document.getElementById('model').textContent != ''")
    return page, hosts


def send(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def shorten(route) -> None:
    """Ask for 8 tokens: random weights go on up to the end of the context."""
    route.continue_(post_data=json.dumps(route.request.post_data_json | {"max_tokens": 8}))


def wait_for_answer(page) -> None:
    page.wait_for_function("document.getElementById('stop').hidden")


def test_a_conversation_is_streamed_and_its_speed_shown(browser, model, tmp_path):
    with ServerProcess(model, "tiny", "--kv-gb", "0.002") as server:
        page, hosts = opened(browser, server)
        page.route("**/v1/chat/completions", shorten)
        assert page.inner_text("#model") == "tiny"
        send(page, "Hello, <b>you</b>")
        wait_for_answer(page)
        turns = page.locator(".turn")
        assert turns.count() == 2
        assert turns.nth(0).inner_text() == "Hello, <b>you</b>" and page.locator("b").count() == 0
        assert turns.nth(1).inner_text() != "" and page.locator(".error").count() == 0
        pattern = r"first token after \d+\.\d\d s, then \d+\.\d tokens/s; \d+ tokens of prompt"
        assert re.search(pattern, page.inner_text("#speed"))
        send(page, "And again")
        wait_for_answer(page)
        assert turns.count() == 4
        assert hosts == {server.url.removeprefix("http://")}
        page.screenshot(path=tmp_path / "chat.png")
        page.close()


def test_an_answer_can_be_stopped(browser, model):
    with ServerProcess(model, "tiny", "--kv-gb", "0.002") as server:
        page, _ = opened(browser, server)
        page.route("**/v1/chat/completions", lambda route: None)  # no answer comes
        send(page, "Hello")
        page.wait_for_function("!document.getElementById('stop').hidden")
        page.click("#stop")
        wait_for_answer(page)
        assert page.locator(".error").count() == 0
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", shorten)
        send(page, "Hello")
        wait_for_answer(page)
        assert page.locator(".turn").last.inner_text() != ""
        page.close()
        server.wait_until_idle()


def test_the_page_asks_for_the_key_and_shows_what_is_refused(browser, model):
    words = ("--kv-gb", "0.002", "--api-key", KEY)
    with ServerProcess(model, "tiny", *words) as server:
        page, _ = opened(browser, server, KEY)
        send(page, "x" * 300)
        page.wait_for_selector(".error")
        assert "the context is 256 tokens" in page.inner_text(".error")
        page.close()
