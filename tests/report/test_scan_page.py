"""The page of a scan: whole, without network, and nothing from the data runs or breaks it."""

from __future__ import annotations

import json
import re

import pytest
from PIL import Image

from data.drawn import encoded, scene
from drawing import draw_folders
from terminal import topwork
from topwork.commands.scan import survey
from topwork.errors import UsageError
from topwork.report.page import write_page
from topwork.report.scan_page import scan_page
from topwork.settings import ScanSettings

from .test_page import Page

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("scan")
    root = draw_folders(place / "data", n_each=12, shapes=("disc", "square", "cross"))
    lines = ["path,label,split"]
    for number, path in enumerate(sorted(root.glob("*/*.jpg"))):
        label = {"disc": f'"{EVIL}"', "square": '"../x"'}.get(path.parent.name, '"a ""quoted"" & \'odd\' name"')
        lines.append(f"{path.relative_to(root)},{label},{'test' if number % 3 == 0 else 'train'}")
    lines.append("broken <img src=x onerror=alert(1)>.jpg,x,train")
    Image.open(root / "disc" / "disc_0.jpg").point(lambda v: v // 40).save(root / "dark.jpg")
    lines += ["dark.jpg,../x,test", "cross/cross_1.jpg,../x,train"]
    (root / "data.csv").write_text("\n".join(lines))
    (root / "broken <img src=x onerror=alert(1)>.jpg").write_bytes(b"no")
    surveyed = survey(root / "data.csv", ScanSettings(quick=True))
    write_page(place / "out" / "scan.html", scan_page(surveyed, "trivial"))
    return (place / "out" / "scan.html").read_text(encoding="utf-8")


def test_nothing_from_the_data_runs_or_breaks_the_page(page) -> None:
    parsed = Page(page)
    assert parsed.count("script") == 1
    assert all(not name.startswith("on") and name != "style" for _, attributes in parsed.tags for name in attributes)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "broken &lt;img src=x onerror=alert(1)&gt;.jpg" in page
    assert "&#34;quoted&#34; &amp;" in page


def test_it_loads_nothing(page) -> None:
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "data", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith(("data:", "#")), (tag, value[:50])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    assert "default-src &#39;none&#39;" in policy[1]
    assert "url(" not in page.split("</style>")[0]


def test_it_shows_every_part_of_the_overview(page) -> None:
    for text in (
        "Check before training",
        "Shortcuts",
        "Image sizes",
        "--augment trivial",
        "../x",
        "--resize squash",
    ):
        assert text in page
    images = [attributes for tag, attributes in Page(page).tags if tag == "img"]
    assert len(images) >= 3 * 6  # the grid: prediction and five views of each class
    assert all("alt" in attributes for attributes in images)


def test_a_thousand_classes_stay_one_page(tmp_path) -> None:
    picture = encoded(scene(16, 12), "PNG")
    for number in range(1005):
        path = tmp_path / "data" / f"class {number}" / "0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(picture + bytes([number % 256, number // 256]))
    surveyed = survey(tmp_path / "data", ScanSettings(quick=True))
    write_page(tmp_path / "scan.html", scan_page(surveyed))
    text = (tmp_path / "scan.html").read_text()
    assert "The first 1,000 of 1,005 classes" in text
    assert len(text) < 3_000_000


def test_an_unknown_augmentation_is_named_and_nothing_is_written(tmp_path) -> None:
    surveyed = survey(draw_folders(tmp_path / "data"), ScanSettings(quick=True))
    with pytest.raises(UsageError, match="no such augmentation: 'mixup'"):
        scan_page(surveyed, "mixup")
    assert not (tmp_path / "scan.html").exists()


def test_the_command(tmp_path) -> None:
    root = draw_folders(tmp_path / "data", n_each=12)
    (root / "disc" / "bad.jpg").write_text("no")
    done = topwork("scan", root, "--quick", "--report", tmp_path / "x.html", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["classes"] == {"disc": 12, "square": 12}
    assert answer["n_used"] == 24
    assert answer["rejects"][0]["path"] == "disc/bad.jpg"
    assert answer["duplicates"] == []
    assert answer["near_duplicates"] is None
    assert {"shortcuts", "suggested_fit", "outliers", "class_facts", "digest", "findings"} < set(answer)
    assert (tmp_path / "x.html").stat().st_size > 20_000
