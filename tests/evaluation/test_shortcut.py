"""Shortcuts: planted ones are named, images that differ only in what they show give none, chance is chance."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.drawn import encoded
from topwork.data.manifest import Manifest, scan
from topwork.data.split import join_groups
from topwork.evaluation.shortcut import FACTS, ShortcutCheck, check_shortcuts


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
