"""The prediction page in a real browser: upload, drop, keyboard, unknown object, broken file, phone width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.report.test_browser import FAINT_TEXT

from drawing import draw, draw_folders
from topwork.commands.fit import fit
from topwork.settings import FitSettings

from .serving import Served, serving

pytestmark = pytest.mark.browser
HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the real backbone, one class name that would like to be code, and images to ask about."""
    root = tmp_path_factory.mktemp("page")
    draw_folders(root / "data", n_each=12, shapes=("disc", "square", "cross"))
    (root / "data" / "cross").rename(root / "data" / HOSTILE)
    fit(root / "data", root / "run", FitSettings(near_duplicates=False))
    draw("disc", 999, size=300).save(root / "disc.jpg")
    draw("cross", 999).save(root / "cross.png")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(root / "noise.png")
    (root / "broken.jpg").write_bytes((root / "disc.jpg").read_bytes()[:2000])
    return root


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[Served]:
    with serving(place / "run") as server:
        yield server


@pytest.fixture
def open_page(browser: Any, served: Served) -> Iterator[Any]:
    """``open_page(**options of the context)``; the test fails if the page logs or asks for anything unexpected."""
    trouble: list[str] = []
    contexts = []

    def open_it(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        # A browser itself logs every answer of 4xx; what the page makes of it is tested below.
        page.on("console", lambda m: trouble.append(m.text) if "status of 4" not in m.text else None)
        page.on(
            "request",
            lambda r: (
                trouble.append(r.url)
                if f"127.0.0.1:{served.port}" not in r.url and r.url[:5] not in ("data:", "blob:")
                else None
            ),
        )
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.wait_for_selector("#about:has-text('3 classes')")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert trouble == []


def ask(page: Any, path: Path) -> None:
    page.set_input_files("#file", str(path))
    page.wait_for_selector("#answer:not([hidden]), #error:not([hidden])")


def test_an_image_is_answered_with_bars_and_where_the_model_looked(open_page: Any, place: Path) -> None:
    page = open_page()
    ask(page, place / "disc.jpg")
    assert page.locator("#top li").count() == 3
    first = page.locator("#top li").first
    assert "disc" in first.inner_text()
    widths = [bar.bounding_box()["width"] for bar in page.locator("#top .bar i").all()]
    assert widths == sorted(widths, reverse=True)
    assert page.locator("#badge").inner_text() in ("Label", "Ambiguous", "Unknown")
    assert page.locator("#picture").get_attribute("src").startswith("data:image/jpeg")
    assert page.evaluate("document.querySelector('#picture').naturalWidth") == 300
    page.uncheck("#evidence")
    assert page.locator("#picture").get_attribute("src").startswith("blob:")
    said = page.locator("#status").inner_text()
    assert page.locator("#badge").inner_text() in said
    assert page.locator("#decision").inner_text() in said


def test_class_names_are_text(open_page: Any, place: Path) -> None:
    page = open_page()
    ask(page, place / "cross.png")
    assert HOSTILE in page.locator("#top").inner_text()
    assert page.title() != "1"
    assert page.locator("#top img").count() == 0


def test_something_unknown_is_called_so(open_page: Any, place: Path) -> None:
    page = open_page()
    ask(page, place / "noise.png")
    assert page.locator("#badge").inner_text() == "Unknown"
    assert page.locator("#decision").inner_text() == "None of the known classes"


def test_a_broken_file_is_named_and_the_next_one_works(open_page: Any, place: Path) -> None:
    page = open_page()
    ask(page, place / "broken.jpg")
    assert page.locator("#error").inner_text().startswith("broken.jpg: truncated")
    assert page.locator("#answer").is_hidden()
    ask(page, place / "disc.jpg")
    assert page.locator("#error").is_hidden()
    assert page.locator("#answer").is_visible()


def test_the_keyboard_is_enough(open_page: Any, place: Path) -> None:
    page = open_page()
    # Listened for from the start: interception that is asked for with the key may come after it, and no chooser opens.
    page.on("filechooser", lambda chooser: chooser.set_files(str(place / "disc.jpg")))
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "file":
            break
    assert page.evaluate("document.activeElement.id") == "file"
    outline = page.evaluate("getComputedStyle(document.querySelector('[for=file]')).outlineStyle")
    assert outline == "solid", "one can see where one is"
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer:not([hidden])")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert not page.is_checked("#evidence")


DROP = """([name, bytes]) => {
  const data = new DataTransfer();
  if (name) data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/jpeg'}));
  else data.setData('text/uri-list', 'http://127.0.0.1:1/x.jpg');
  for (const kind of ['dragenter', 'dragover', 'drop'])
    document.body.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: data}));
}"""


def test_an_image_can_be_dropped_anywhere_and_a_link_is_not_opened(open_page: Any, place: Path) -> None:
    page = open_page()
    page.evaluate(DROP, ["a.jpg", list((place / "disc.jpg").read_bytes())])
    page.wait_for_selector("#answer:not([hidden])")
    assert page.locator("#name").inner_text() == "a.jpg"
    page.evaluate(DROP, ["", []])
    assert "not supported" in page.locator("#error").inner_text()


@pytest.mark.parametrize(("widths", "scheme"), [((390, 320), "dark"), ((1400, 768), "light")])
def test_it_fits_every_width_and_can_be_read(open_page: Any, place: Path, widths: tuple[int, ...], scheme: str) -> None:
    is_phone = widths[0] < 500
    page = open_page(
        viewport={"width": widths[0], "height": 800}, color_scheme=scheme, has_touch=is_phone, is_mobile=is_phone
    )
    assert page.locator("[for=camera]").is_visible() == is_phone
    for name in ("disc.jpg", "broken.jpg", "noise.png"):
        ask(page, place / name)
        for width in widths:
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_timeout(50)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(FAINT_TEXT) == []
    if is_phone:
        for box in [page.locator(f"[for={name}]").bounding_box() for name in ("file", "camera")]:
            assert box["height"] >= 44, "a thumb can hit it"


def test_the_page_for_programs_fits_a_phone(open_page: Any) -> None:
    page = open_page(viewport={"width": 360, "height": 700})
    page.click("text=API")
    page.wait_for_selector("text=curl")
    page.wait_for_load_state("load")  # the text is there before its style
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate(FAINT_TEXT) == []


def test_several_images_at_once_and_examples_and_other_models(browser: Any, place: Path, tmp_path: Path) -> None:
    token = "0123456789abcdef-token"
    (tmp_path / "token").write_text(token)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "one.jpg").write_bytes((place / "disc.jpg").read_bytes())
    options = {"token_file": tmp_path / "token", "examples": tmp_path / "examples"}
    with serving(place / "run", f"other={place / 'run'}", **options) as served:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{served.port}/")
        page.fill("#token", "wrong-token-wrong")
        page.click("#token-form button")
        page.wait_for_selector("#error:has-text('Wrong token')")
        page.fill("#token", token)
        page.click("#token-form button")
        page.wait_for_selector("#about:has-text('3 classes')")
        page.set_input_files("#file", [str(place / name) for name in ("disc.jpg", "broken.jpg", "cross.png")])
        page.wait_for_selector("#answer:not([hidden])")
        assert page.locator("#all button").count() == 3
        assert page.locator("#name").inner_text() == "disc.jpg"
        page.wait_for_selector("#others li")
        assert page.locator("#others li").inner_text().startswith("other")
        page.locator("#all button").nth(1).click()
        assert page.locator("#error").inner_text().startswith("broken.jpg")
        page.locator("#all button").nth(2).click()
        assert page.locator("#name").inner_text() == "cross.png"
        page.locator("#examples button").first.click()
        page.wait_for_selector("#name:has-text('example 1')")
        page.close()
