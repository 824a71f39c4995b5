"""The facts of a scan: what stands out is named, what does not is not, and the advice follows the shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from data.drawn import encoded, scene
from drawing import draw_folders
from topwork.commands.scan import survey
from topwork.data.manifest import Manifest, scan
from topwork.data.split import join_groups
from topwork.evaluation.dataset_summary import FACTS, ShortcutCheck, advise_fit, check_shortcuts
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
    assert [outlier["path"] for outlier in found.outliers["dark"]] == ["disc/dark.jpg"]
    assert [outlier["path"] for outlier in found.outliers["bright"]] == ["disc/bright.jpg"]
    assert found.outliers["blurred"][0]["path"] == "disc/blurred.jpg"
    assert len(found.outliers["blurred"]) <= 2
    assert (found.n_gray, found.n_turned_by_exif, found.n_smaller_than_input) == (1, 1, 45)  # all are 96 pixels wide
    assert found.formats == {"JPEG": 45}
    assert found.near_duplicates is None
    assert found.imbalance == 1.25
    assert found.class_facts["disc"].n == 25
    assert found.class_facts["square"].width == (96, 96, 96)


def test_alike_images_have_no_outliers(data) -> None:
    found = survey(data, QUICK).overview
    assert found.outliers["dark"] == found.outliers["bright"] == []
    assert len(found.outliers["blurred"]) <= 1


def test_near_duplicates_and_leaks_across_a_given_split(tmp_path) -> None:
    draw_folders(tmp_path / "train", n_each=12, seed=1)
    draw_folders(tmp_path / "test", n_each=6, seed=2)
    picture = Image.fromarray(scene(200, 160, seed=5))
    picture.save(tmp_path / "train" / "disc" / "a.jpg")
    picture.resize((120, 96)).save(tmp_path / "test" / "disc" / "b.jpg", quality=60)
    surveyed = survey(tmp_path, ScanSettings(backbone="random:test_efficientnet"))
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


# ---- shortcuts


def check(path: Path) -> ShortcutCheck:
    manifest = scan(path)
    return check_shortcuts(manifest, manifest.traits(), join_groups(manifest))


def picture(rng: np.random.Generator) -> Image.Image:
    """A smooth random picture of random size."""
    size = tuple(int(side) for side in rng.integers(60, 120, 2))
    return Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def data_set(root: Path, n_classes: int = 3, n_each: int = 30) -> Path:
    """Classes that differ in nothing."""
    rng = np.random.default_rng(0)
    for number in range(n_classes):
        (root / f"c{number}").mkdir(parents=True)
        for n in range(n_each):
            (root / f"c{number}" / f"{n}.jpg").write_bytes(
                encoded(picture(rng), "JPEG", quality=int(rng.integers(80, 96)))
            )
    return root


def test_classes_that_differ_in_nothing_give_no_warning(tmp_path) -> None:
    found = check(data_set(tmp_path / "data"))
    assert [family.family for family in found.families].sort() == list(FACTS).sort()
    assert found.warnings == ()
    for family in found.families:
        assert family.chance == pytest.approx(1 / 3)
        assert family.low <= family.balanced_accuracy <= family.high
        assert family.low < 0.45
        assert family.given_away == ()


PLANTS = {
    "compression": lambda image: encoded(image, "JPEG", quality=40),
    "border": lambda image: encoded(ImageOps.expand(image, 4, (128, 128, 128)), "JPEG", quality=90),
    "format": lambda image: encoded(image, "PNG"),
    "camera": lambda image: encoded(image, "JPEG", quality=90, exif=exif("Maker", "Phone 3")),
}


def exif(maker: str, model: str) -> Image.Exif:
    block = Image.Exif()
    block[0x010F], block[0x0110] = maker, model
    return block


def test_a_class_with_a_mark_of_its_own_is_named(tmp_path) -> None:
    root = data_set(tmp_path / "data", n_classes=7, n_each=20)
    rng = np.random.default_rng(1)
    for number, plant in enumerate(PLANTS.values()):
        for path in (root / f"c{number}").iterdir():
            path.write_bytes(plant(picture(rng)))
    found = check(root)
    by_name = {one.family: one for one in found.families}
    for number, family in enumerate(PLANTS):
        assert f"c{number}" in by_name[family].given_away, family
        assert f"c{number}" in str(by_name[family].warning)
    assert not {name for one in found.families for name in one.given_away} & {"c4", "c5", "c6"}
    assert found.families[0].warning is not None  # warnings come first


def test_two_classes_told_by_size_alone(tmp_path) -> None:
    root = data_set(tmp_path / "data", n_classes=2)
    for path in (root / "c1").iterdir():
        image = Image.open(path)
        image.resize((2 * image.width, 2 * image.height)).save(path, quality=90)
    found = {one.family: one for one in check(root).families}
    assert "can be predicted from dimensions alone" in str(found["dimensions"].warning)
    assert found["dimensions"].low > 0.8
    assert found["mean color"].warning is None


def test_copies_do_not_make_a_shortcut(tmp_path) -> None:
    """Forty copies of one image a class would be recognized by anything, were they divided over the folds."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for n in range(12):
            data = encoded(picture(rng), "JPEG", quality=90)
            for copy in range(5):
                (tmp_path / name / f"{n}-{copy}.jpg").write_bytes(data)
    found = check(tmp_path)
    assert found.n_images == 24
    assert found.warnings == ()


def test_too_few_images_and_several_labels_are_said(tmp_path) -> None:
    few = check(data_set(tmp_path / "data", n_each=5))
    assert few.families == ()
    assert "10 different images" in str(few.reason)
    manifest = scan(tmp_path / "data")
    several = Manifest(manifest.root, "table", manifest.samples, manifest.classes, (), multi_label=True)
    assert check_shortcuts(several, manifest.traits(), join_groups(manifest)).reason is not None


def test_the_answer_does_not_depend_on_order_or_layout(tmp_path) -> None:
    root = data_set(tmp_path / "data", n_each=15)
    moved = tmp_path / "moved"
    for number, path in enumerate(sorted(root.glob("*/*"))):
        (moved / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / path.parent.name / f"{97 * number % 45}.jpg")
    assert check(root).as_dict() == check(moved).as_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ants-bees", "caltech-mini"])
def test_real_data_as_they_are_give_no_warning_and_planted_marks_do(name, shared_data, tmp_path) -> None:
    assert check(shared_data / name).warnings == ()
    marked = {"ants-bees": "bees", "caltech-mini": "beaver"}[name]
    changes = {
        "compression": lambda image: encoded(image, "JPEG", quality=60),
        "border": lambda image: encoded(
            ImageOps.expand(image, max(3, min(image.size) // 33), (128,) * 3), "JPEG", quality=90
        ),
    }
    for family, change in changes.items():
        root = tmp_path / family
        shutil.copytree(shared_data / name, root)
        for path in root.glob(f"**/{marked}/*.jpg"):
            path.parent.chmod(0o755)
            path.chmod(0o644)
            path.write_bytes(change(Image.open(path).convert("RGB")))
        assert any(one.family == family and one.warning for one in check(root).families)
