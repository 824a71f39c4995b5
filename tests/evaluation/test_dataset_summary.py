"""The facts of a scan: what stands out is named, what does not is not, and the advice follows the shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data.drawn import encoded, scene
from drawing import draw_folders
from topwork.commands.scan import survey
from topwork.evaluation.dataset_summary import advise_fit
from topwork.settings import ScanSettings

QUICK = ScanSettings(quick=True)


@pytest.fixture
def data(tmp_path):
    return draw_folders(tmp_path / "data", n_each=20)


def test_dark_bright_blurred_turned_gray_and_small_images_are_found(data) -> None:
    picture = Image.open(data / "disc" / "disc_3.jpg")
    picture.point(lambda value: value // 30).save(data / "disc" / "dark.jpg")
    picture.point(lambda value: 253 + value // 120).save(data / "disc" / "bright.jpg")
    picture.filter(ImageFilter.GaussianBlur(9)).save(data / "disc" / "blurred.jpg")
    picture.convert("L").save(data / "disc" / "gray.jpg")
    exif = picture.getexif()
    exif[0x0112] = 3
    picture.save(data / "disc" / "turned.jpg", exif=exif)
    found = survey(data, QUICK).overview
    assert [outlier.path for outlier in found.dark] == ["disc/dark.jpg"]
    assert [outlier.path for outlier in found.bright] == ["disc/bright.jpg"]
    assert found.blurred[0].path == "disc/blurred.jpg"
    assert len(found.blurred) <= 2
    assert (found.n_gray, found.n_turned, found.n_small) == (1, 1, 45)  # all are 96 pixels wide
    assert found.formats == {"JPEG": 45}
    assert found.near_duplicates is None
    assert found.imbalance == 1.25
    assert found.classes["disc"].n == 25
    assert found.classes["square"].width == (96, 96, 96)


def test_alike_images_have_no_outliers(data) -> None:
    found = survey(data, QUICK).overview
    assert found.dark == found.bright == []
    assert len(found.blurred) <= 1


def test_near_duplicates_and_leaks_across_a_given_split(tmp_path) -> None:
    draw_folders(tmp_path / "train", n_each=12, seed=1)
    draw_folders(tmp_path / "test", n_each=6, seed=2)
    picture = Image.fromarray(scene(200, 160, seed=5))
    picture.save(tmp_path / "train" / "disc" / "a.jpg")
    picture.resize((120, 96)).save(tmp_path / "test" / "disc" / "b.jpg", quality=60)
    surveyed = survey(tmp_path)
    manifest, found = surveyed.manifest, surveyed.overview
    names = [sorted(manifest.samples[row].path for row in pair) for pair in found.leaks]
    assert names == [["test/disc/b.jpg", "train/disc/a.jpg"]]
    assert found.near_duplicates is not None
    assert "1 image of valid or test" in surveyed.findings[0]
    values = json.loads(json.dumps(found.as_dict(manifest)))
    assert ["test/disc/b.jpg", "train/disc/a.jpg"] in values["near_duplicates"]
    assert values["suggested_fit"]["fit"] == "squash"


@pytest.mark.parametrize(
    ("aspects", "fit"),
    [
        (np.ones(50), "squash"),
        (np.linspace(0.95, 1.05, 50), "crop"),
        (np.full(50, 1.33), "squash"),
        (np.full(50, 3.0), "squash"),  # all stretched alike
        (np.concatenate([np.full(25, 0.3), np.full(25, 3.0)]), "pad"),
        (np.array([1.0]), "squash"),
    ],
)
def test_the_advice_follows_the_shapes(aspects, fit) -> None:
    assert advise_fit(aspects).fit == fit


def test_a_class_of_one_image_and_one_class(tmp_path) -> None:
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "1.png").write_bytes(encoded(scene(), "PNG"))
    surveyed = survey(tmp_path, QUICK)
    assert surveyed.overview.imbalance == 1
    assert surveyed.overview.shortcuts.reason is not None
    assert any("Only one class" in line for line in surveyed.findings)
