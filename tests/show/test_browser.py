"""The page in a real Chromium: nothing on its console, nothing asked of another machine, nothing wider than a phone."""

import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from made_nights import write_night, write_run
from pages import NASTY

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="the extra `show` is not installed")

import uvicorn
from playwright.sync_api import sync_playwright

from xmc_ray.show.app import address, application
from xmc_ray.show.server import HOST, listening

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
QUIET = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
QUIET += ["disable-component-update", "disable-sync"]
SLOW = 120_000  # milliseconds for a page on a busy machine


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a page over a run and nights with hostile texts."""
    root = tmp_path_factory.mktemp("browsed")
    write_run(root / "run")
    texts = [text.replace("\ud83d", "?") or "nothing" for text in NASTY.values()]
    for day in ("2026-11-24", "2026-11-25"):
        write_night(root / "shop", day, [(f"{n}{text}", text * 3, {text: 0.9, "plain": 0.2}) for n, text in enumerate(texts)])
    with listening(0) as listener:
        server = uvicorn.Server(uvicorn.Config(application(str(root)), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://{HOST}:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[f"--{each}" for each in QUIET], timeout=SLOW)
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_are_quiet_fit_and_ask_nobody_else(site: str, browser: Any, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme="dark")
    page.set_default_timeout(SLOW)
    said, asked = list[str](), list[str]()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append("a dialog"))
    page.on("request", lambda request: asked.append(request.url))
    here, text = {"at": "shop", "day": "2026-11-24"}, NASTY["script"]
    paths = ["/", address("/run", at="run"), address("/nights", at="shop")]
    paths += [address(path, here, label=text, id=f"0{text}") for path in ("/night", "/labels", "/label", "/document")]
    paths += [address("/documents", here)]
    for path in paths:
        page.goto(site + path)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, path
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 24)"  # dark, as asked for
    assert said == [] and {url[: len(site)] for url in asked} == {site}
    page.close()


def test_a_search_by_keyboard_alone(site: str, browser: Any) -> None:
    page = browser.new_page()
    page.set_default_timeout(SLOW)
    page.goto(site + address("/documents", at="shop", day="2026-11-24"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.get_by_label("Label", exact=True).focus()
    page.keyboard.type(NASTY["quotes"])
    page.keyboard.press("Enter")
    page.wait_for_url("**/documents?*label=*")
    assert page.get_by_role("status").inner_text().startswith("1 document on this page")
    page.close()
