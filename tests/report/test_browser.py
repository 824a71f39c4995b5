"""Pages in a real browser: widths, themes, keyboard, filters, contrast, accessibility, and no word from the console."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from topwork.blocks import Picture, Section
from topwork.report.page import render_page, write_page
from topwork.report.run_page import write_report

from .conftest import HOSTILE_CLASSES, HOSTILE_FILES, MakeRun, add_insights, build_run
from .test_page import every_block

pytestmark = pytest.mark.browser
MAX_WORDS = 1200  # that a reader sees of the report of two classes

# Every visible piece of text whose contrast with the ground behind it is below WCAG AA.
FAINT_TEXT = """() => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
    .getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const paint = (colors) => {
    const key = colors.join();
    if (!known.has(key)) known.set(key, painted(colors));
    return known.get(key);
  };
  const painted = (colors) => {
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
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rejects = ["bad <script>window.pwned=1.jpg", *(f"other {number}.jpg" for number in range(9))]
    return write_report(
        add_insights(build_run(folder, HOSTILE_CLASSES, n_each=10, names=HOSTILE_FILES, rejects=rejects))
    )


def faults(page: Any) -> list[str]:
    """What axe-core calls serious or critical."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:200]}" for one in found if one["impact"] in ("serious", "critical")
    ]


def open_all(page: Any) -> None:
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")


def test_fits_reads_well_and_is_harmless(open_page: Any, report: Path) -> None:
    page = open_page(report, 390)
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    assert page.evaluate("window.pwned") is None
    assert faults(page) == []
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate(FAINT_TEXT) == []
    assert len(set(grounds)) == 2
    for ground in grounds:
        page.locator("#theme").click()  # light, then dark
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground


def test_a_report_of_two_classes_is_short(open_page: Any, make_run: MakeRun) -> None:
    page = open_page(write_report(add_insights(make_run(n_each=60, n_wrong=4))))
    assert page.evaluate("document.body.innerText.split(/\\s+/).filter(Boolean).length") <= MAX_WORDS
    assert page.locator("details[open]").count() == 0


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
    before = box.locator(".cell-title").inner_text()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.cell") == "1,1"
    assert box.locator(".cell-title").inner_text() == before  # moving alone chooses nothing
    page.keyboard.press("Enter")
    assert box.locator(".cell-title").inner_text() != before
    assert box.locator(".cell-images img").count() > 0
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # stays inside
    assert page.evaluate("document.activeElement.dataset.cell") == "0,1"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.cell") == "0,7"
    assert box.locator("td[tabindex='0']").count() == 1  # one stop of the Tab key
    page.locator("tr[data-key] button").first.click()
    chosen = page.locator("tr[data-key]").first.get_attribute("data-key")
    assert box.locator("td[aria-selected=true]").get_attribute("data-cell") == chosen


def test_filters_and_sorting(open_page: Any, report: Path) -> None:
    page = open_page(report)
    cards = page.locator("#mistakes-test .card:not([hidden])")
    n_all = cards.count()
    bar = page.locator("[data-filters=mistakes-test]")
    bar.locator("select[data-key=true]").select_option("0")
    assert 0 < cards.count() < n_all
    bar.locator("select[data-key=true]").select_option("")
    bar.locator("input").fill("nothing is called so")
    assert cards.count() == 0
    assert bar.locator("[role=status]").inner_text() == f"0 of {n_all}"
    open_all(page)
    page.locator("[data-filter=rejects]").fill("bad")
    assert page.locator("#rejects tbody tr:not([hidden])").count() == 1
    table = page.locator("#errors table.sortable").first
    by_class = table.locator("thead button", has_text="Class")
    by_class.click()
    ascending = table.locator("tbody th").all_inner_texts()
    assert table.locator("th[aria-sort=ascending]").inner_text().startswith("Class")
    by_class.click()
    assert table.locator("tbody th").all_inner_texts() == ascending[::-1]
    assert table.locator("th[aria-sort]").count() == 1


def test_images_enlarge_by_click_and_key(open_page: Any, report: Path) -> None:
    page = open_page(report)
    images = page.locator("#mistakes-test .tile img")
    images.first.click()
    zoom = page.locator("#zoom")
    assert zoom.is_visible()
    assert zoom.locator("img").get_attribute("src") == images.first.get_attribute("src")
    assert zoom.locator("img").bounding_box()["width"] > 2 * images.first.bounding_box()["width"]
    page.keyboard.press("ArrowRight")
    assert zoom.locator("img").get_attribute("src") == images.nth(1).get_attribute("src")
    page.keyboard.press("Escape")
    assert zoom.is_hidden()
    images.nth(1).press("Enter")
    assert zoom.is_visible()


def test_points_have_tooltips(open_page: Any, report: Path) -> None:
    page = open_page(report)
    point = page.locator("#confidence svg.chart circle[data-tip]").first
    point.scroll_into_view_if_needed()
    point.hover()
    tip = page.locator(".tip")
    assert tip.is_visible()
    assert tip.inner_text() == point.get_attribute("data-tip")
    page.mouse.move(5, 5)
    assert tip.is_hidden()


def test_commands_are_copied(open_page: Any, report: Path) -> None:
    page = open_page(report)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    box = page.locator("#settings .code").first
    box.locator("button").click()
    box.get_by_text(re.compile("^(Copied|Selected)$")).wait_for()  # a file may not have a clipboard
    assert "topwork predict" in box.locator("code").inner_text()


def test_numbers_without_script(open_page: Any, report: Path) -> None:
    page = open_page(report, script=False)
    assert page.locator(".matrix td[data-cell='1,1']").first.is_visible()
    assert page.locator("#errors table.sortable").first.is_visible()
    assert page.locator("#mistakes-test .card").first.is_visible()
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


def test_every_kind_of_block_is_accessible(open_page: Any, tmp_path: Path) -> None:
    blocks = every_block("a name")
    page = open_page(
        write_page(tmp_path / "page.html", render_page("Title", "test", [Section("one", "One", blocks)], pictures={0: Picture(None, problem="gone")}))
    )  # fmt: skip
    open_all(page)
    assert faults(page) == []
