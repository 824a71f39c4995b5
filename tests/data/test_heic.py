"""HEIC with its optional part: pixels, turns, alpha, damage; and what is said without it."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from data.drawn import scene
from topwork.data import raster
from topwork.data.images import NO_HEIC, decode
from topwork.data.loader import FactsStore, load_images
from topwork.data.samples import Entry
from topwork.errors import ImageError

pillow_heif = pytest.importorskip("pillow_heif")

SCENE = scene(96, 64)


def heic(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


DATA = heic(Image.fromarray(SCENE), quality=95)


def test_pixels_and_facts() -> None:
    found = decode(DATA)
    assert (found.facts.format, found.facts.width, found.facts.height) == ("HEIC", 96, 64)
    assert np.abs(found.pixels.astype(float) - SCENE).mean() < 8
    assert min(decode(heic(Image.fromarray(scene(800, 640))), min_side=64).pixels.shape[:2]) < 200


def test_a_turned_photo_is_upright_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = pillow_heif.from_pillow(Image.fromarray(SCENE))
    file.info["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    file.save(buffer, quality=95)
    found = decode(buffer.getvalue())
    assert found.pixels.shape == (96, 64, 3)
    assert np.abs(found.pixels.astype(float) - np.rot90(SCENE, -1)).mean() < 8


def test_alpha_lies_over_the_background_and_gray_is_gray() -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert decode(heic(clear)).pixels.min() > 245
    assert decode(heic(Image.new("L", (64, 64), 100))).facts.is_gray


@pytest.mark.parametrize("kept", [20, 100, 300, -400, -5])
def test_what_is_cut_off_is_named(kept: int) -> None:
    with pytest.raises(ImageError, match=r"damaged|truncated|not an image"):
        decode(DATA[:kept])


def test_bytes_that_flipped_never_crash() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        wrong = bytearray(DATA)
        for place in rng.integers(8, len(wrong), 4).tolist():
            wrong[place] ^= 1 << int(rng.integers(8))
        try:
            decode(bytes(wrong))
        except ImageError:
            continue


def test_size_is_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(ImageError, match="too large"):
        decode(DATA)


def test_without_the_part_it_is_named_and_not_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    facts = FactsStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        (loaded,) = load_images([Entry("a.heic", "a")], lambda _: DATA, facts)
    assert loaded.reason == NO_HEIC
    (loaded,) = load_images([Entry("a.heic", "a")], lambda _: DATA, facts)
    assert loaded.facts is not None
