"""topwork app: dropped folders become a model; only the page itself can write; a killed app loses nothing."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from drawing import draw_folders
from topwork.server.start import Start

from .serving import Served, serving, wait_until


class Page:
    """The page as a client of its server."""

    def __init__(self, served: Served, root: Path) -> None:
        self.served, self.root = served, root
        found = re.search('topwork-token" content="([^"]+)"', served.ask("GET", "/")[1])
        assert found is not None
        self.token = found[1]

    def post(self, address: str, body: Any = b"", **headers: str | None) -> tuple[int, Any]:
        own = {"Origin": f"http://127.0.0.1:{self.served.port}", "X-Topwork-Token": self.token}
        own |= {key.replace("_", "-"): value for key, value in headers.items()}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, answer, _ = self.served.ask("POST", address, data, {k: v for k, v in own.items() if v is not None})
        return status, answer

    def keep(self, path: Path, images: str = "shapes", label: str | None = None, file: str | None = None) -> Any:
        label, file = label or path.parent.name, file or path.name
        return self.post(f"/keep?images={quote(images)}&label={quote(label)}&file={quote(file)}", path.read_bytes())

    def job(self, seconds: float = 120) -> dict[str, Any]:
        wait_until(lambda: self.served.ask("GET", "/job")[1]["state"] != "running", seconds)
        job: dict[str, Any] = self.served.ask("GET", "/job")[1]
        return job


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folders(tmp_path_factory.mktemp("app") / "shapes", n_each=9, shapes=("disc", "square"))


@contextlib.contextmanager
def starting(folder: Path) -> Iterator[Page]:
    with serving(folder, verb="app", ready="/state") as served:
        yield Page(served, folder)


def test_the_page_names_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Start(Path(), 8000).state()["folder"] == str(tmp_path)


def test_from_dropped_images_to_an_answer_and_after_a_kill_nothing_is_lost(drawn: Path, tmp_path: Path) -> None:
    paths = sorted(drawn.glob("*/*.jpg"))
    with starting(tmp_path) as page:
        for path in paths:
            assert page.keep(path)[0] == 200
        assert page.keep(paths[0])[0] == 200, "the same image again changes nothing"
        assert page.post("/scan", {"images": "shapes"})[0] == 200
        assert page.job()["scan"]["classes"] == {"disc": 9, "square": 9}
        assert page.post("/train", {"images": "shapes", "mode": "probe"})[0] == 200
        assert page.post("/train", {"images": "shapes"})[0] == 409, "one job at a time"
        page.served.process.kill()
    with starting(tmp_path) as page:
        served = page.served
        state = served.ask("GET", "/state")[1]
        assert state["images"] == [{"name": "shapes", "classes": {"disc": 9, "square": 9}}]
        if state["runs"]:  # the kill may have come before the first file of the run
            assert state["runs"][0]["is_finished"] is False
            assert page.post("/resume", {"run": "shapes"})[0] == 200
        else:
            assert page.post("/train", {"images": "shapes"})[0] == 200
        assert page.job()["state"] == "done", page.job()
        run = served.ask("GET", "/state")[1]["runs"][0]
        assert (run["name"], run["is_finished"]) == ("shapes", True)
        assert "<html" in served.ask("GET", "/report/shapes")[1]
        status, answer = page.post("/predict?run=shapes", paths[0].read_bytes())
        assert status == 200
        assert answer["top"][0][0] in ("disc", "square")
        assert answer["map"].startswith("data:image/jpeg")
        assert page.post("/predict?run=shapes", b"no image")[1]["outcome"] == "error"
        status, answer = page.post("/review", {"run": "shapes"})
        assert (status, answer["url"].startswith("http://127.0.0.1:")) == (200, True)
        assert page.post("/export", {"run": "shapes", "to": "onnx"})[0] == 200
        assert page.job()["export"].endswith("model.onnx")
        assert (tmp_path / "runs" / "shapes" / "export" / "predict.py").is_file()
        assert served.end() == 0


WRITES = (
    "/keep?images=a&label=b&file=c.jpg",
    "/scan",
    "/train",
    "/resume",
    "/predict?run=a",
    "/review",
    "/export",
    "/forget",
)
OTHERS = ({"Origin": "http://evil.example"}, {"Origin": None}, {"X_Topwork_Token": "guess"}, {"X_Topwork_Token": None})


def test_only_the_page_itself_can_write(drawn: Path, app: Page) -> None:
    data, before = next(drawn.glob("disc/*.jpg")).read_bytes()[:3000], sorted(app.root.rglob("*"))
    assert {app.post(address, data, **headers)[0] for headers in OTHERS for address in WRITES} == {403}
    assert app.served.ask("GET", "/state", headers={"Host": "evil.example"})[0] == 421
    _, _, names = app.served.ask("GET", "/", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in names
    assert (names["x-frame-options"], "unsafe" in names["content-security-policy"]) == ("DENY", False)
    assert sorted(app.root.rglob("*")) == before


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../x", ".hidden", "a\0b", "a\nb", "", "x" * 300])
def test_names_that_lead_outside_are_refused(drawn: Path, tmp_path: Path, name: str, app: Page) -> None:
    path = next(drawn.glob("disc/*.jpg"))
    before = sorted(app.root.rglob("*"))
    for place in ("images", "label", "file"):
        names = {"images": "a", "label": "b", "file": "c.jpg"} | {place: name}
        query = "&".join(f"{key}={quote(value)}" for key, value in names.items())
        assert app.post(f"/keep?{query}", path.read_bytes())[0] == 422
    assert app.post("/resume", {"run": name})[0] == 404
    assert app.post("/scan", {"images": name})[0] == 422
    assert app.served.ask("GET", f"/report/{quote(name, safe='')}")[0] == 404
    assert sorted(app.root.rglob("*")) == before


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with starting(tmp_path_factory.mktemp("names")) as page:
        yield page


def test_wrong_requests_and_failed_jobs_are_named(app: Page, tmp_path: Path) -> None:
    assert app.post("/scan", {"path": str(tmp_path / "missing")})[0] == 422
    assert app.post("/train", {"path": str(tmp_path), "mode": "magic"})[0] == 422
    assert app.post("/export", {"run": "none", "to": "onnx"})[0] == 404
    assert app.post("/scan", b"[]")[0] == 400
    assert app.post("/scan", {"path": str(tmp_path)})[0] == 200
    job = app.job()
    assert job["state"] == "failed"
    assert str(tmp_path) in job["error"]


def test_an_image_of_the_same_name_never_replaces_another(app: Page, drawn: Path) -> None:
    first, second = sorted(drawn.glob("disc/*.jpg"))[:2]
    assert app.keep(first, "twice", "disc", "a.jpg")[0] == 200
    assert app.keep(second, "twice", "disc", "a.jpg")[0] == 200
    folder = app.root / "images" / "twice" / "disc"
    assert {path.read_bytes() for path in folder.iterdir()} == {first.read_bytes(), second.read_bytes()}
    assert app.post("/forget", {"images": "twice"})[0] == 200
    assert not folder.exists()
