"""The page in headless Chromium, at phone and desktop width, light and dark."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.space_app import SpaceApp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)
pytest.importorskip("gradio")
webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = pytest.mark.slow

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
PHONE, DESKTOP = (390, 844), (1280, 900)


class Browser:
    """One window."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, size: tuple[int, int], theme: str = "light") -> None:
        """The page as a new visitor sees it."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(f"{self.url}?__theme={theme}")
        self.wait(lambda: self.one("#merge-go").is_displayed())

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return [element for element in self.driver.find_elements("css selector", selector) if element.is_displayed()]

    def click(self, selector: str) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.one(selector))
        self.one(selector).click()

    def tab(self, name: str) -> None:
        next(tab for tab in self.all("button[role=tab]") if tab.text.strip() == name).click()

    def wait(self, condition: Callable[[], Any], seconds: float = 40) -> Any:
        from selenium.common.exceptions import WebDriverException

        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if found := condition():
                    return found
            except WebDriverException:
                pass
            time.sleep(0.05)
        raise AssertionError(f"waited in vain; the page says: {self.one('body').text[:2000]}")

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def fits(self) -> bool:
        """Whether nothing sticks out to the side."""
        width = self.ask("innerWidth")
        if self.ask("document.documentElement.scrollWidth") > width:
            return False
        boxes = "[...document.querySelectorAll('.ep-table, .ep-bars, .ep-card, .ep-matrix, .ep-lines, button, h3')]"
        return bool(self.ask(f"Math.max(...{boxes}.map(e => e.getBoundingClientRect().right)) <= {width + 1}"))


@pytest.fixture(scope="module")
def browser(page_at_home: SpaceApp, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile: Path = tmp_path_factory.mktemp("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Browser(driver, page_at_home.url)
    finally:
        driver.quit()


def test_cancel_brings_the_button_back(browser: Browser) -> None:
    browser.open(DESKTOP)
    browser.click("#merge-go")
    browser.wait(lambda: browser.one("#merge-stop").is_displayed())
    assert browser.one("#merge-status .ep-progress").is_displayed()
    browser.click("#merge-stop")
    browser.wait(lambda: "Cancelled" in browser.one("#merge-status").text)
    browser.wait(lambda: browser.one("#merge-go").is_displayed())
    assert not browser.all("#merge-result table")


def test_the_first_click_on_a_phone_gives_a_merge_that_fits(browser: Browser) -> None:
    browser.open(PHONE)
    assert browser.ask("document.getElementById('merge-go').getBoundingClientRect().bottom") < PHONE[1] + 60
    assert browser.fits()
    browser.click("#merge-go")
    rows = browser.wait(lambda: browser.all("#merge-result tbody tr"))
    assert [row.text.split()[0] for row in rows] == ["shapes", "digits", "textures", "signs", "average", "worst"]
    assert len(browser.all("#merge-result .ep-bar")) == 20
    assert browser.fits()
    assert browser.wait(lambda: browser.one("#merge-go").is_displayed())
    browser.wait(lambda: browser.ask("scrollY > 300"))  # the result came into sight by itself


def test_a_picture_is_one_click_away(browser: Browser) -> None:
    browser.open(PHONE, "dark")
    browser.tab("Try it")
    picture = browser.wait(lambda: browser.all("#try-gallery img"))[20]
    heights = [browser.one(f"#try-gallery{inside}").rect["height"] for inside in ("", " .grid-container")]
    assert heights[0] - heights[1] < 40  # no empty space below the pictures
    browser.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    picture.click()
    names = browser.wait(lambda: [card.text.split()[0] for card in browser.all("#try-result .ep-card h4")])
    assert names == ["base", "shapes", "digits", "textures", "signs", "merged"]
    assert browser.fits()


def test_diagnosis_and_a_slider_that_answers_at_once(browser: Browser) -> None:
    browser.open(PHONE)
    browser.tab("Diagnosis")
    browser.click("#diagnose-go")
    browser.wait(lambda: len(browser.all("#diagnose-result .ep-matrix")) == 2)
    assert browser.fits()
    browser.tab("Sweep")
    browser.click("#sweep-go")
    before = browser.wait(lambda: browser.one("#sweep-table table").text and browser.one("#sweep-table").text)
    assert browser.fits()
    box = browser.one("#sweep-alpha input[type=number]")
    other = "0.25" if "alpha 0.25" not in before else "1.5"
    browser.driver.execute_script(
        "const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set; set.call(arguments[0], "
        "arguments[1]); for (const n of ['input', 'change', 'blur']) arguments[0].dispatchEvent(new Event(n, "
        "{bubbles: true}))",
        box,
        other,
    )
    browser.wait(lambda: f"alpha {other}" in browser.one("#sweep-table").text, 3)


def test_an_error_is_a_sentence_and_dark_is_dark(browser: Browser) -> None:
    browser.open(DESKTOP, "dark")
    ground = "getComputedStyle(document.querySelector('.gradio-container')).backgroundColor"
    assert max(browser.ask(f"{ground}.match(/\\d+/g).slice(0, 3).map(Number)")) < 60
    next(label for label in browser.all("label") if label.text.strip() == "Hugging Face Hub").click()
    browser.wait(lambda: browser.all(".ep-typed textarea"))[0].send_keys("org/one")
    browser.click("#merge-go")
    browser.wait(lambda: "at least two checkpoints" in browser.one("#merge-status .ep-bad").text)
    assert "Traceback" not in browser.one("body").text
    complaints = [entry["message"] for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in complaints if "favicon" not in message]
