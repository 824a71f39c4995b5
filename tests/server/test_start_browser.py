"""topwork app in Chromium: two folders chosen, scanned, trained, a webcam frame answered, without the terminal."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report.test_browser import FAINT_TEXT

from drawing import draw_folders

from .serving import Served, serving

pytestmark = pytest.mark.browser


def drop(page: Any, paths: list[Path]) -> None:
    """Drops files or folders on the page as a person does: by the browser's own drag events."""
    box = page.locator("#drop").bounding_box()
    event = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    event |= {"data": {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **event})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("app"), verb="app", ready="/state") as served:
        yield served


def test_folders_dropped_on_the_page_are_its_classes(browser: Any, served: Served, tmp_path: Path) -> None:
    data = draw_folders(tmp_path / "shapes", n_each=3, shapes=("disc", "square"))
    (data / "disc" / "more").mkdir()
    page = browser.new_page()
    for paths in ([data / "disc", data / "square"], [data]):
        page.goto(f"http://127.0.0.1:{served.port}/")
        drop(page, paths)
        page.wait_for_selector("#scanned:not([hidden])", timeout=60_000)
        assert "6 images in 2 classes" in page.locator("#scan-summary").inner_text()
    page.close()


def test_from_two_folders_to_an_answer_on_a_webcam_frame(browser: Any, served: Served, tmp_path: Path) -> None:
    data = draw_folders(tmp_path / "figures", n_each=9, shapes=("disc", "square"))
    context = browser.new_context(permissions=["camera"])
    page = context.new_page()
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda m: trouble.append(m.text) if m.type == "error" else None)
    page.goto(f"http://127.0.0.1:{served.port}/")
    started = time.monotonic()
    page.set_input_files("#folders", str(data))
    page.wait_for_selector("#scanned:not([hidden])", timeout=60_000)
    assert "18 images in 2 classes" in page.locator("#scan-summary").inner_text()
    page.click("#train")
    page.wait_for_selector("#try:not([hidden])", timeout=150_000)
    assert "accuracy" in page.locator("#runs").inner_text()
    page.click("#webcam")
    page.wait_for_selector("#top li", timeout=60_000)
    seconds = time.monotonic() - started
    print(f"from two folders to an answer on a webcam frame: {seconds:.1f} s")  # noqa: T201 - the figure, under -s
    assert page.locator("#video").is_visible()
    page.click("#stop")
    page.set_input_files("#file", str(next(data.glob("disc/*.jpg"))))
    page.wait_for_selector("#picture:not([hidden])", timeout=60_000)
    assert page.locator("#picture").get_attribute("src").startswith("data:image/jpeg")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(FAINT_TEXT) == []
        if folder := os.environ.get("TOPWORK_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/app-{width}.png", full_page=True)
    with context.expect_page() as opened:
        page.get_by_role("link", name="Report").click()
    opened.value.wait_for_selector("h1")
    page.reload()
    page.wait_for_selector("#runs li")
    assert trouble == []
    context.close()
