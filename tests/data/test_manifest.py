"""The manifest: every file used or named, the counts add up, odd things are said, nothing of the user's is touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.drawn import encoded, files, scene
from drawing import draw, draw_folders
from topwork.data import loader
from topwork.data.manifest import load_manifest, save_manifest, scan
from topwork.errors import UsageError

NAMES = ["new\nline.jpg", 'quo"te.jpg', "😀.jpg", "\udcff.jpg", "<b>.jpg"]


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    found = {}
    for folder, _, names in os.walk(root):
        for path in [Path(folder), *(Path(folder) / name for name in names)]:
            status = path.lstat()
            data = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
            found[str(path)] = (status.st_mtime_ns, status.st_size, status.st_mode, data)
    return found


@pytest.fixture
def messy(tmp_path) -> Path:
    """A folder with most of what can go wrong."""
    root = draw_folders(tmp_path / "messy", n_each=6)
    good = (root / "disc" / "disc_0.jpg").read_bytes()
    for number, name in enumerate(NAMES):
        (root / "disc" / name).write_bytes(encoded(scene(seed=number), "PNG"))
    (root / "disc" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (root / "disc" / "text.jpg").write_text("no image")
    (root / "disc" / "empty.jpg").write_bytes(b"")
    (root / "square" / "copy.jpg").write_bytes(good)
    (root / "square" / ".hidden.jpg").write_bytes(good)
    (root / "hollow").mkdir()
    (root / "stray.jpg").write_bytes(good)
    return root


def test_every_file_is_used_or_named(messy) -> None:
    manifest = scan(messy)
    n_files = sum(len(names) for _, _, names in os.walk(messy))
    assert len(manifest.samples) + len(manifest.rejects) == n_files
    assert {r.path for r in manifest.rejects} == {
        "disc/cut.jpg", "disc/text.jpg", "disc/empty.jpg", "square/.hidden.jpg", "stray.jpg"
    }  # fmt: skip
    assert all(reject.reason for reject in manifest.rejects)
    assert manifest.counts == {"disc": 11, "square": 7}


def test_nothing_is_written_below_the_user_s_folder(messy) -> None:
    before = snapshot(messy)
    scan(messy)
    scan(messy)
    assert snapshot(messy) == before


def test_copies_under_two_labels_and_empty_and_small_classes_are_said(messy) -> None:
    notes = "\n".join(scan(messy).notes)
    assert "disc/disc_0.jpg, square/copy.jpg" in notes
    assert "1 image is an exact copy" in notes
    assert "hollow" in notes
    assert "square (7)" in notes


def test_classes_that_differ_only_in_case_or_unicode_form_are_said(tmp_path) -> None:
    picture = encoded(scene(), "PNG")
    for name in ("Cat", "cat ", "café", "cafe\u0301", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture)
    alike = [note for note in scan(tmp_path).notes if "differ only" in note]
    assert len(alike) == 2
    assert "dog" not in "".join(alike)


def test_a_warm_scan_decodes_nothing(messy, monkeypatch) -> None:
    first = scan(messy)
    decoded: list[int] = []
    decode = loader.decode
    monkeypatch.setattr(loader, "decode", lambda data, **options: decoded.append(len(data)) or decode(data, **options))
    again = scan(messy)
    assert decoded == []
    assert again == first
    (messy / "disc" / "new.png").write_bytes(encoded(scene(seed=99), "PNG"))
    scan(messy)
    assert len(decoded) == 1


def test_threads_do_not_matter(messy) -> None:
    assert scan(messy, n_threads=1) == scan(messy, n_threads=8)


def test_facts_are_of_the_upright_image(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    turned = Image.fromarray(scene(64, 48))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a" / "1.jpg", exif=exif)
    Image.fromarray(scene(20, 30)).convert("L").save(tmp_path / "a" / "2.png")
    one, two = scan(tmp_path).samples
    assert (one.width, one.height, one.orientation, one.format, one.is_gray) == (48, 64, 6, "JPEG", False)
    assert (two.width, two.height, two.orientation, two.format, two.is_gray) == (20, 30, 1, "PNG", True)


def test_every_format_whatever_its_extension(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    for name, data in files(scene()).items():
        (tmp_path / "a" / f"{name}.txt").write_bytes(data)
    manifest = scan(tmp_path)
    assert not manifest.rejects
    assert {sample.format for sample in manifest.samples} == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}


def test_a_manifest_comes_back_from_disk_intact(messy, tmp_path) -> None:
    manifest = scan(messy)
    save_manifest(manifest, tmp_path / "manifest.parquet")
    loaded = load_manifest(tmp_path / "manifest.parquet")
    assert loaded == manifest
    assert loaded.digest == manifest.digest
    assert json.loads(json.dumps([s.path for s in loaded.samples])) == [s.path for s in manifest.samples]
    several = replace(manifest, multi_label=True)
    save_manifest(several, tmp_path / "several.parquet")
    assert load_manifest(tmp_path / "several.parquet").multi_label


def test_a_manifest_of_a_relative_folder_is_read_from_elsewhere(messy, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(messy.parent)
    save_manifest(scan(messy.name), tmp_path / "manifest.parquet")
    monkeypatch.chdir(tmp_path)
    loaded = load_manifest(tmp_path / "manifest.parquet")
    assert loaded.read_unchanged(0)
    messy.rename(messy.with_name("moved"))
    with pytest.raises(UsageError, match="the images of the run are no longer there"):
        loaded.read_unchanged(0)


def test_the_digest_names_content_and_labels_only(messy, tmp_path) -> None:
    manifest = scan(messy)
    moved = tmp_path / "moved"
    shutil.copytree(messy, moved)
    (moved / "disc" / "disc_1.jpg").rename(moved / "disc" / "another name")
    assert scan(moved).digest == manifest.digest
    (moved / "disc" / "another name").rename(moved / "square" / "moved.jpg")
    assert scan(moved).digest != manifest.digest


@pytest.mark.parametrize("ending", [".jp2", ".jxl", ".ppm", ".PGM", ".psd", ".nef"])
def test_images_that_are_not_decoded_count_as_missing(ending, tmp_path) -> None:
    root = draw_folders(tmp_path / "data", n_each=3)
    (root / "disc" / f"a{ending}").write_bytes(b"whatever")
    (root / "disc" / "notes.txt").write_text("about the discs")
    manifest = scan(root)
    assert {Path(reject.path).name: reject.expected for reject in manifest.rejects} == {
        f"a{ending}": False,
        "notes.txt": True,
    }
    assert manifest.n_failed == 1


def test_nothing_usable_is_wrong_use(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_text("no")
    with pytest.raises(UsageError, match=r"none of 1 files is a usable image.*a/1.jpg"):
        scan(tmp_path)


def test_traits_say_what_a_person_would(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    soft = Image.fromarray(noise).resize((14, 14), Image.Resampling.BOX).resize((224, 224), Image.Resampling.BICUBIC)
    framed = scene(224, 224).copy()
    framed[:20] = framed[-20:] = framed[:, :20] = framed[:, -20:] = (10, 200, 30)
    pictures = {
        "1 dark": np.full((50, 60, 3), 7, np.uint8),
        "2 noise": noise,
        "3 soft": np.asarray(soft),
        "4 framed": framed,
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / "a" / f"{name}.png")
    photo = Image.fromarray(scene(300, 200))
    exif = photo.getexif()
    exif[0x010F], exif[0x0110] = "Maker", "Model 7"
    photo.save(tmp_path / "a" / "5.jpg", quality=50, exif=exif)
    photo.save(tmp_path / "a" / "6.jpg", quality=95, subsampling=0, progressive=True)
    traits = scan(tmp_path).traits()
    dark, noisy, blurred, frame, strong, mild = range(6)
    assert traits.column("brightness")[dark] == pytest.approx(7, abs=0.5)
    assert traits.column("contrast")[dark] == pytest.approx(0, abs=0.1)
    assert traits.column("sharpness")[noisy] > 100 * traits.column("sharpness")[blurred]
    border = [traits.column(f"border_{name}")[frame] for name in ("red", "green", "blue", "spread")]
    assert border == pytest.approx([10, 200, 30, 0], abs=0.5)
    assert traits.cameras == ("", "", "", "", "Maker Model 7", "")
    assert traits.column("jpeg_level")[strong] > 3 * traits.column("jpeg_level")[mild] > 0
    assert traits.column("jpeg_subsampling").tolist() == [0, 0, 0, 0, 4, 1]
    assert traits.column("jpeg_progressive").tolist() == [0, 0, 0, 0, 0, 1]
    assert traits.thumbs.shape == (6, 32, 32)
    assert traits.colors.shape == (6, 8, 8, 3)
    assert traits.colors[dark].max() <= 8


def test_classes_that_a_given_part_lacks_are_said(tmp_path) -> None:
    for number, place in enumerate(("TRAIN/a", "TRAIN/b", "Val/a", "testing/a", "testing/d")):
        (tmp_path / place).mkdir(parents=True)
        draw("disc", number).save(tmp_path / place / "0.png")
    notes = scan(tmp_path).notes
    assert "Without an image in train, so they cannot be learned: d." in notes
    assert "Without an image in valid: b, d." in notes
    assert "Without an image in test, so they are not evaluated: b." in notes
