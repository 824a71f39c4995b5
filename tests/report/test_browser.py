"""The report in a real browser: widths, themes, keyboard, filters, contrast, and no word from the console."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from topwork.report.page import write_report

from .conftest import HOSTILE_CLASSES, HOSTILE_FILES, MakeRun

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"

# Every visible piece of text whose contrast with the ground behind it is below WCAG AA.
FAINT_TEXT = """() => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
    .getContext('2d', {willReadFrequently: true});
  const paint = (colors) => {
    context.clearRect(0, 0, 1, 1);
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const faint = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || ['SCRIPT', 'STYLE'].includes(element.tagName) || !element.checkVisibility()) continue;
    const grounds = [];
    for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
    const style = getComputedStyle(element);
    const text = light(paint([...grounds, element.namespaceURI.endsWith('svg') ? style.fill : style.color]));
    const ground = light(paint(grounds));
    const ratio = (Math.max(text, ground) + .05) / (Math.min(text, ground) + .05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) faint.push([element.className, element.textContent.slice(0, 40), ratio]);
  }
  return faint;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """``open_page(path, width=..., scheme=...)``; the test fails if the page logs anything or loads anything."""
    complaints: list[str] = []
    contexts = []

    def open_one(path: Path, width: int = 1280, scheme: str = "light", script: bool = True) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def report(make_run: MakeRun) -> Path:
    rejects = ["bad <script>window.pwned=1.jpg", "other.jpg"]
    return write_report(make_run(HOSTILE_CLASSES, n_each=10, names=HOSTILE_FILES, rejects=rejects))


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_reads_well_and_is_harmless(open_page: Any, report: Path, width: int, scheme: str) -> None:
    page = open_page(report, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.pwned") is None
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert page.evaluate(FAINT_TEXT) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").click()  # light
    page.locator("#theme").click()  # dark
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == ground) == (scheme == "dark")
    assert page.evaluate(FAINT_TEXT) == []


def test_matrix_by_mouse_and_keyboard(open_page: Any, report: Path) -> None:
    page = open_page(report)
    box = page.locator(".confusion[data-part=test]")
    cell = box.locator("td[data-cell='1,2']")
    cell.click()
    assert box.locator(".cell-title").inner_text().startswith(cell.get_attribute("title").split(":")[0])
    assert box.locator(".cell-images img").count() == int(cell.get_attribute("data-n"))
    assert page.evaluate(
        "[...document.querySelectorAll('.cell-images img')].every((i) => i.complete && i.naturalWidth)"
    )
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.cell") == "1,1"
    assert "answered right" not in box.locator(".cell-title").inner_text()  # moving alone chooses nothing
    page.keyboard.press("Enter")
    assert "answered right" in box.locator(".cell-title").inner_text()
    assert box.locator(".cell-images img").count() > 0
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # stays inside
    assert page.evaluate("document.activeElement.dataset.cell") == "0,1"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.cell") == "0,7"
    assert box.locator("td[tabindex='0']").count() == 1  # one stop of the Tab key
    page.locator("tr[data-pair] button").first.click()
    chosen = page.locator("tr[data-pair]").first.get_attribute("data-pair")
    assert box.locator("td[aria-selected=true]").get_attribute("data-cell") == chosen


def test_filters_and_sorting(open_page: Any, report: Path) -> None:
    page = open_page(report)
    cards = page.locator("#mistake-cards .card:not([hidden])")
    n_all = cards.count()
    page.locator("[data-mistakes=class]").select_option("0")
    assert 0 < cards.count() < n_all
    page.locator("[data-mistakes=class]").select_option("")
    page.locator("[data-mistakes=text]").fill("nothing is called so")
    assert cards.count() == 0
    assert page.locator("[data-count=mistakes]").inner_text() == f"0 of {n_all}"
    page.locator("[data-filter=rejects]").fill("other")
    assert page.locator("#rejects tbody tr:not([hidden])").count() == 1
    table = page.locator("table.per-class").first
    by_class = table.locator("thead button", has_text="Class")
    by_class.click()
    ascending = table.locator("tbody th").all_inner_texts()
    assert table.locator("th[aria-sort=ascending]").inner_text().startswith("Class")
    by_class.click()
    assert table.locator("tbody th").all_inner_texts() == ascending[::-1]
    assert table.locator("th[aria-sort]").count() == 1


def test_numbers_without_script(open_page: Any, report: Path) -> None:
    page = open_page(report, script=False)
    assert page.locator(".matrix td[data-cell='1,1']").first.is_visible()
    assert page.locator("table.per-class").first.is_visible()
    assert page.locator("#mistake-cards .card").first.is_visible()
    assert page.locator("#theme").is_hidden()


@pytest.mark.parametrize("sizes", [{"n_wrong": 0}, {"valid": 0.0, "test": 0.0}])
def test_without_mistakes_or_parts_the_script_is_content(open_page: Any, make_run: MakeRun, sizes: Any) -> None:
    page = open_page(write_report(make_run(**sizes)))
    page.locator("#theme").click()
    assert page.locator("html.js").count() == 1


def test_prints(open_page: Any, report: Path) -> None:
    page = open_page(report, scheme="dark")
    page.emulate_media(media="print")
    assert page.locator(".rail").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf(format="A4").startswith(b"%PDF")
