"""The page of ``topwork review``: who may write, what is served, what a kill leaves, and the page in a real browser."""

from __future__ import annotations

import contextlib
import json
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.report.test_browser import FAINT_TEXT

from drawing import draw, draw_folders
from topwork.commands.fit import fit
from topwork.data.corrections import read_corrections
from topwork.settings import FitSettings

from .serving import Served, serving

HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shapes; one class name that would like to be code; two discs among the squares."""
    root = tmp_path_factory.mktemp("review-page")
    draw_folders(root / "data", n_each=16, shapes=("disc", "square", "cross"))
    (root / "data" / "cross").rename(root / "data" / HOSTILE)
    for number in range(2):
        draw("disc", 900 + number).save(root / "data" / "square" / f"wrong_{number}.jpg", quality=92)
    fit(root / "data", root / "run", FitSettings(backbone="random:test_efficientnet", near_duplicates=False))
    return root / "run"


class Page:
    """A review that runs, and what its page knows."""

    def __init__(self, served: Served, corrections: Path) -> None:
        self.served, self.corrections = served, corrections
        self.origin = f"http://127.0.0.1:{served.port}"
        self.token = self._token()
        self.doubts: list[dict[str, Any]] = served.ask("GET", "/items")[1]["doubts"]

    def _token(self) -> str:
        found = re.search('topwork-token" content="([^"]+)"', self.served.ask("GET", "/")[1])
        assert found is not None
        return found[1]

    def post(self, value: Any, address: str = "/decide", **headers: str | None) -> tuple[int, Any]:
        names = {"Origin": self.origin, "X-Topwork-Token": self.token} | {
            key.replace("_", "-"): text for key, text in headers.items()
        }
        body = value if isinstance(value, bytes) else json.dumps(value)
        sent = {key: text for key, text in names.items() if text is not None}
        return self.served.ask("POST", address, body, sent)[:2]

    def decision(self, n: int = 0, **changes: Any) -> dict[str, Any]:
        return {"row": self.doubts[n]["row"], "decision": "keep", "label": None, "version": 0} | changes


@contextlib.contextmanager
def reviewing(run: Path, corrections: Path) -> Iterator[Page]:
    with serving(run, verb="review", ready="/items", corrections=corrections) as served:
        yield Page(served, corrections)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """For tests that leave no decision standing."""
    with reviewing(run, tmp_path_factory.mktemp("shared-page") / "c.csv") as page:
        yield page


@pytest.fixture
def own_page(run: Path, tmp_path: Path) -> Iterator[Page]:
    with reviewing(run, tmp_path / "c.csv") as page:
        yield page


def test_only_the_page_itself_can_write(page: Page) -> None:
    refused = [
        page.post(page.decision(), Origin="http://evil.example"),
        page.post(page.decision(), Origin=None),
        page.post(page.decision(), Origin="null"),
        page.post(page.decision(), Origin=f"https://127.0.0.1:{page.served.port}"),
        page.post(page.decision(), X_Topwork_Token=None),
        page.post(page.decision(), X_Topwork_Token="guess"),
        page.post({}, "/fit", X_Topwork_Token="guess"),
    ]
    assert [status for status, _ in refused] == [403] * len(refused)
    assert read_corrections(page.corrections).standing == {}
    assert page.served.ask("GET", "/fit")[1] == {"state": "none"}
    for host in ("evil.example", f"evil.example:{page.served.port}", "127.0.0.1", f"127.0.0.1:{page.served.port}.evil"):
        for address in ("/", "/items", f"/image/{page.doubts[0]['row']}"):
            assert page.served.ask("GET", address, headers={"Host": host})[0] == 421, host
    status, answer = page.post(page.decision())
    assert (status, answer["decision"], answer["tally"]["kept"]) == (200, "keep", 1)
    assert page.post(page.decision(decision="undo", version=1))[0] == 200


def test_no_other_site_may_read_or_frame_it(page: Page) -> None:
    _, _, headers = page.served.ask("GET", "/", headers={"Origin": "http://evil.example"})
    assert not [name for name in headers if name.startswith("access-control")]
    assert headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert page.served.ask("OPTIONS", "/decide", headers={"Origin": "http://evil.example"})[0] == 405


def test_images_of_the_run_are_served_as_jpeg_and_nothing_else(page: Page, run: Path) -> None:
    shown = {row for doubt in page.doubts for row in (doubt["row"], *(near["row"] for near in doubt["neighbors"]))}
    for row in shown:
        status, body, headers = page.served.fetch(f"/image/{row}?size=small")
        assert status == 200
        assert headers["content-type"] == "image/jpeg"
        assert headers["x-content-type-options"] == "nosniff"
        assert body[:3] == b"\xff\xd8\xff"
    n_images = sum(1 for _ in (run.parent / "data").rglob("*.jpg"))
    hidden = sorted(set(range(n_images)) - shown)
    for address in (f"/image/{hidden[0]}", "/image/-1", f"/image/{10**30}", "/image/..%2f..%2fetc%2fpasswd", "/static/../app.py",
                    "/static/..%2fapp.py", "/static/report.css", "/corrections.csv"):  # fmt: skip
        assert page.served.ask("GET", address)[0] == 404, address


def test_a_file_that_is_no_image_any_more_is_not_served(page: Page, run: Path) -> None:
    doubt = page.doubts[0]
    path = run.parent / "data" / doubt["path"]
    content = path.read_bytes()
    try:
        path.write_bytes(b"<script>alert(1)</script>")
        status, answer, headers = page.served.ask("GET", f"/image/{doubt['row']}")
        assert (status, answer) == (404, {"error": "file has changed"})
        assert headers["content-type"] == "application/json"
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 422), (b"[]", 400), (b"{", 400), (b"\xff\xfe", 400), (b"x" * 5000, 413), ({"row": "0"}, 422), ({"row": True}, 422),
     ({"row": 10**30}, 422), ({"decision": 5}, 422), ({"label": "disc"}, 422), ({"label": 10**30, "decision": "relabel"}, 422)],
)  # fmt: skip
def test_a_wrong_request_is_named(body: Any, status: int, page: Page) -> None:
    found, answer = page.post(page.decision(**body) if isinstance(body, dict) else body)
    assert found == status
    assert answer["error"]
    assert read_corrections(page.corrections).standing == {}


def test_the_second_of_two_people_sees_what_stands(page: Page) -> None:
    assert page.post(page.decision(1, decision="relabel", label=0))[0] == 200
    status, answer = page.post(page.decision(1))
    assert status == 409
    assert (answer["decision"], answer["label"], answer["version"]) == ("relabel", 0, 1)
    assert page.post(page.decision(1, decision="undo", version=1))[1]["decision"] is None


def test_what_was_confirmed_survives_a_kill(own_page: Page, run: Path) -> None:
    for n in range(len(own_page.doubts)):
        assert own_page.post(own_page.decision(n, decision="remove"))[0] == 200
    own_page.served.process.kill()
    own_page.served.process.wait()
    with reviewing(run, own_page.corrections) as again:
        assert [doubt["now_decision"] for doubt in again.doubts] == ["remove"] * len(own_page.doubts)
        assert again.post(again.decision(), X_Topwork_Token=own_page.token)[0] == 403  # a page of the earlier start
        assert again.served.end() == 0


def test_a_decision_on_a_full_disk_is_refused_and_the_next_one_counts(own_page: Page) -> None:
    page = own_page
    pid, size = page.served.process.pid, page.corrections.stat().st_size
    for n_free in (0, 10):  # nothing fits, half a line fits
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + n_free, resource.RLIM_INFINITY))
        status, answer = page.post(page.decision())
        assert (status, page.corrections.stat().st_size) == (507, size)
        assert "c.csv: cannot be written" in answer["error"]
        assert page.served.ask("GET", "/items")[0] == 200
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    status, answer = page.post(page.decision(1))
    assert (status, answer["tally"]["kept"]) == (200, 1)
    assert len(read_corrections(page.corrections).standing) == 1


@pytest.mark.browser
def test_a_person_goes_through_the_labels_and_fits_again(browser: Any, own_page: Page, run: Path) -> None:
    page = own_page
    trouble: list[str] = []
    contexts = [browser.new_context(viewport={"width": 1280, "height": 900})]
    contexts.append(browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark"))
    wide, phone = (context.new_page() for context in contexts)
    for tab in (wide, phone):
        tab.on("console", lambda message: trouble.append(message.text))
        tab.on("pageerror", lambda error: trouble.append(str(error)))
        tab.goto(page.origin)
        tab.wait_for_selector("#doubt:not([hidden])")
    assert wide.title() == "topwork – label errors"
    likely = [doubt for doubt in page.doubts if doubt["is_confident"]]
    insights = json.loads((run / "insights.json").read_text())
    assert len(likely) == insights["n_suspects"]  # as many as the report says
    rows = [n for n, doubt in enumerate(likely) if "wrong" in doubt["path"]]
    for n in range(len(likely)):
        heading = wide.inner_text("#question")
        wide.keyboard.press("s" if n in rows else "k")
        if n + 1 < len(likely):
            wide.wait_for_selector(f"#place:text-is('{n + 2} of {len(likely)}')")
        else:
            wide.wait_for_selector("#stands:not([hidden])")
        assert HOSTILE in heading or "Labeled" in heading
    wide.wait_for_selector(f"#tally:has-text('{len(rows)} relabeled')")
    assert {c.label for c in read_corrections(page.corrections).standing.values() if c.decision == "relabel"} == {
        "disc"
    }
    # the phone's page is older than the decisions: it is told, and sees what stands
    phone.click("#remove")
    phone.wait_for_selector("#error:has-text('someone else has decided')")
    assert phone.is_visible("#stands")
    for tab in (wide, phone):
        assert tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        tab.wait_for_timeout(100)
    wide.keyboard.press("u")
    wide.wait_for_selector("#stands", state="hidden")
    wide.keyboard.press("k")
    wide.wait_for_selector("#stands:not([hidden])")
    # right after a decision, undo goes back to it
    for n in range(len(likely) - 1, 0, -1):
        wide.keyboard.press("ArrowLeft")
        wide.wait_for_selector(f"#place:text-is('{n} of {len(likely)}')")
    if len(likely) > 1:
        before = wide.inner_text("#stands")
        wide.keyboard.press("x")
        wide.wait_for_selector(f"#place:text-is('2 of {len(likely)}')")
        wide.evaluate("doubts[1].now_decision = null; show()")  # as if nobody had decided about the next one yet
        wide.keyboard.press("u")
        wide.wait_for_selector(f"#place:text-is('1 of {len(likely)}')")
        wide.wait_for_selector(f"#stands:has-text('{before}')")
    wide.keyboard.press("s")
    wide.wait_for_selector("#fit:not([disabled])")
    wide.click(".picture")
    assert wide.evaluate("document.querySelector('#zoom img').getBoundingClientRect().width") >= 400
    wide.keyboard.press("Escape")
    wide.click("#fit")
    wide.wait_for_selector("#outcome:has-text('On the same')", timeout=60_000)
    assert (run.with_name("run-corrected") / "report.html").exists()
    with wide.context.expect_page() as opened:
        wide.click("#report a")
    opened.value.wait_for_selector(".hero")
    assert opened.value.evaluate("document.documentElement.classList.contains('js')")
    for tab in (wide, phone):
        assert tab.evaluate(FAINT_TEXT) == []
    assert [text for text in trouble if "409" not in text] == []
    for context in contexts:
        context.close()
