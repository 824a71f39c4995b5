"""The promises of the one decoder, over all formats. JPEG alone is tested further in ``test_jpeg.py``."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from data.drawn import (
    PNG_MAGIC,
    bmp,
    chunk,
    encoded,
    exif,
    files,
    flat_png,
    packed,
    png,
    scene,
    stored,
    tall_jpeg,
    tiff,
    tiff_tags,
    with_segment,
)
from topwork.data import images
from topwork.data.images import (
    BACKGROUND,
    FORMATS,
    MAX_PIXELS,
    NO_HEIC,
    OUT_OF_MEMORY,
    Decoded,
    check_size,
    decode,
    gray_levels,
    sniff,
    upright,
)
from topwork.data.loader import FactsStore, load_images
from topwork.data.samples import Entry
from topwork.errors import ImageError
from topwork.export import standalone

SCENE = scene()
FILES = files(SCENE)
EMBEDDED = ("JPEG arithmetic", "JPEG odd sampling", "JPEG three scans")  # these show a smaller scene
SOURCE = Path(__file__).parents[2] / "src"


def reason(data: bytes, **options: int) -> str:
    """Why a file is rejected; fails if it is not."""
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    text = str(caught.value)
    assert 0 < len(text) < 200
    assert "\n" not in text
    return text


def distance(found: Decoded, expected: np.ndarray) -> float:
    """Mean difference of two images, 0..255."""
    assert found.pixels.shape == expected.shape
    return float(np.abs(found.pixels.astype(int) - expected.astype(int)).mean())


# ---- what comes out


@pytest.mark.parametrize("name", FILES)
def test_every_format_shows_the_drawing(name: str) -> None:
    found = decode(FILES[name])
    facts = found.facts
    expected = scene(40, 32) if name in EMBEDDED else SCENE
    assert found.pixels.dtype == np.uint8
    assert found.pixels.flags.c_contiguous
    assert facts.format == name.split()[0] == sniff(FILES[name][:32])
    assert (facts.width, facts.height, facts.orientation) == (expected.shape[1], expected.shape[0], 1)
    assert facts.is_animated == name.endswith(("animated", "pages"))
    if facts.is_gray:
        assert (found.pixels == found.pixels[..., :1]).all()
        if name == "TIFF fax":
            return
        channel = expected[..., :1] if "interlaced" in name else Image.fromarray(expected).convert("L")
        expected = np.broadcast_to(np.asarray(channel).reshape(*expected.shape[:2], 1), expected.shape)
    if name in ("PNG alpha", "WEBP lossless"):
        alpha = np.asarray(Image.fromarray(SCENE).convert("L"))[..., None] / 255
        expected = np.rint(SCENE * alpha + 255 * (1 - alpha)).astype(np.uint8)
    exact = name.startswith(("PNG", "BMP", "TIFF")) and "palette" not in name and "JPEG" not in name
    assert distance(found, expected) <= (0.5 if exact else 12)


@pytest.mark.parametrize("min_side", [1, 12, 13, 24, 25, 48, 1000])
@pytest.mark.parametrize("name", FILES)
def test_a_smaller_image_keeps_the_short_side_and_the_facts(name: str, min_side: int) -> None:
    full = decode(FILES[name])
    small = decode(FILES[name], min_side=min_side)
    assert small.facts == full.facts
    assert min(min_side, *full.pixels.shape[:2]) <= min(small.pixels.shape[:2])
    factor = full.pixels.shape[0] / small.pixels.shape[0]
    assert factor in (1, 2, 4, 8)
    assert distance(small, np.asarray(Image.fromarray(full.pixels).reduce(int(factor)))) <= 6


def test_large_images_of_every_format_come_smaller() -> None:
    pixels = scene(400, 300)
    for name, data in files(pixels).items():
        if name not in EMBEDDED:
            assert decode(data, min_side=64).pixels.shape == (75, 100, 3), name


def test_facts_say_how_colors_are_stored() -> None:
    modes = {name: decode(data).facts.mode for name, data in FILES.items()}
    assert modes["JPEG"] == modes["PNG"] == modes["WEBP"] == modes["BMP"] == modes["TIFF"] == "RGB"
    assert modes["JPEG gray"] == modes["PNG gray"] == modes["PNG interlaced"] == "L"
    assert modes["PNG palette"] == modes["GIF"] == modes["BMP palette"] == "P"
    assert modes["PNG alpha"] == modes["WEBP lossless"] == "RGBA"
    assert (modes["JPEG CMYK"], modes["PNG 16 bit"], modes["TIFF fax"]) == ("CMYK", "I;16", "1")


# ---- upright


def oriented(format: str, orientation: int, order: str) -> bytes:
    pixels = Image.fromarray(stored(orientation, SCENE))
    block = exif(orientation, order)
    if format == "JPEG":
        return with_segment(encoded(pixels, "JPEG", quality=95), 0xE1, b"Exif\0\0" + block)
    if format == "TIFF":
        tags = tiff_tags(pixels.width, pixels.height, [8, 8, 8], 2) | {274: (3, [orientation])}
        return tiff(tags, [pixels.tobytes()], order=order)
    return encoded(pixels, format, exif=block, **({"lossless": True} if format == "WEBP" else {}))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(format: str, orientation: int, order: str) -> None:
    data = oriented(format, orientation, order)
    found = decode(data)
    assert found.facts.orientation == orientation
    assert (found.facts.width, found.facts.height) == (64, 48)
    assert found.pixels.flags.c_contiguous
    assert distance(found, SCENE) <= (3 if format == "JPEG" else 0)
    small = decode(data, min_side=32 if format == "JPEG" else 24)
    assert small.pixels.shape[0] <= 48
    assert distance(small, np.asarray(Image.fromarray(SCENE).reduce(48 // small.pixels.shape[0]))) <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_agrees_with_pillow(orientation: int) -> None:
    image = Image.fromarray(SCENE)
    image.getexif()[0x0112] = orientation
    assert np.array_equal(upright(SCENE, orientation), np.asarray(ImageOps.exif_transpose(image)))


# ---- brightness


def test_transparent_pixels_show_the_background() -> None:
    empty = np.zeros((8, 8, 4), np.uint8)
    for name in ("PNG", "WEBP", "TIFF"):
        assert (decode(encoded(empty, name)).pixels == BACKGROUND).all(), name


@pytest.mark.parametrize(
    "data",
    [
        encoded(np.full((4, 4), 7, np.int32), "TIFF"),
        encoded(np.full((4, 4), 0.5, np.float32), "TIFF"),
        tiff(tiff_tags(4, 4, [16], 1) | {339: (3, [2])}, [bytes(32)]),
        tiff(tiff_tags(4, 4, [8], 1) | {339: (3, [2])}, [bytes(16)]),
        tiff(tiff_tags(4, 4, [64], 1), [bytes(128)]),
    ],
    ids=["int32", "float32", "int16", "int8", "uint64"],
)
def test_samples_without_an_agreed_brightness_are_rejected(data: bytes) -> None:
    assert "no standard mapping to brightness" in reason(data)


# ---- layouts of the formats

RNG = np.random.default_rng(0)
GRAY = SCENE[..., 1].copy()


@pytest.mark.parametrize("is_interlaced", [False, True])
@pytest.mark.parametrize(
    ("color", "bits"),
    [
        *((0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8)),
        *((4, 8), (4, 16), (6, 8), (6, 16)),
    ],
)
def test_png_of_every_bit_depth_and_color_type(color: int, bits: int, is_interlaced: bool) -> None:
    shape = (29, 37) if color in (0, 3) else (29, 37, {2: 3, 4: 2, 6: 4}[color])
    samples = RNG.integers(0, 1 << bits, shape)
    samples[0, 0], samples[-1, -1] = (1 << bits) - 1, 0  # the whole range occurs
    palette = RNG.integers(0, 256, (1 << min(bits, 8), 3), np.uint8)
    extra = chunk(b"PLTE", palette.tobytes()) if color == 3 else b""
    found = decode(png(samples, bits=bits, color=color, extra=extra, is_interlaced=is_interlaced))
    if color == 3:
        assert np.array_equal(found.pixels, palette[samples])
        return
    values = samples * 255 / ((1 << bits) - 1)
    if color in (4, 6):
        alpha = values[..., -1:] / 255
        values = values[..., :-1] * alpha + 255 * (1 - alpha)
    expected = np.broadcast_to(values.reshape(29, 37, -1), (29, 37, 3))
    assert np.abs(found.pixels - expected).max() <= (0.5 if color == 0 else 3)  # Pillow takes the upper byte of each


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_a_transparent_gray(bits: int) -> None:
    top = (1 << bits) - 1
    pixels = decode(png(np.array([[0, top]]), bits=bits, color=0, extra=chunk(b"tRNS", struct.pack(">H", 0)))).pixels
    assert pixels[0, :, 0].tolist() == [255, 255]


def test_a_transparent_color_and_a_palette_with_alpha() -> None:
    samples = np.array([[[10, 20, 30], [10, 20, 31]]])
    key = chunk(b"tRNS", struct.pack(">HHH", 10, 20, 30))
    assert decode(png(samples, bits=8, color=2, extra=key)).pixels.tolist() == [[[255, 255, 255], [10, 20, 31]]]
    palette = np.array([[200, 0, 0], [0, 100, 0], [0, 0, 50]], np.uint8)
    extra = chunk(b"PLTE", palette.tobytes()) + chunk(b"tRNS", bytes([0, 128]))
    pixels = decode(png(np.array([[0, 1, 2]]), bits=2, color=3, extra=extra)).pixels
    assert pixels.tolist() == [[[255, 255, 255], [127, 177, 127], [0, 0, 50]]]


def test_exif_may_follow_the_pixels_of_a_png() -> None:
    plain = png(SCENE, bits=8, color=2)
    assert decode(plain[:-12] + chunk(b"eXIf", exif(6)) + plain[-12:]).pixels.shape == (64, 48, 3)


def rows(values: np.ndarray, bits: int, order: str = "<") -> bytes:
    """Uncompressed rows, each filled up to a byte."""
    return b"".join(packed(row, bits, order) for row in values)


@pytest.mark.parametrize(
    ("bits", "color", "order"),
    [*itertools.product([1, 2, 4, 8], [0, 1], "<>"), (12, 1, "<"), (16, 1, "<"), (16, 1, ">"), (16, 0, "<")],
)
@pytest.mark.parametrize("is_deflated", [False, True])
def test_gray_tiff_of_every_depth(bits: int, color: int, order: str, is_deflated: bool) -> None:
    top = (1 << bits) - 1
    values = GRAY.astype(int) * top // 255
    values[0, 0], values[-1, -1] = 0, top
    strip = rows(values, bits, order)
    tags = tiff_tags(64, 48, [bits], color, 8 if is_deflated else 1)
    found = decode(tiff(tags, [zlib.compress(strip) if is_deflated else strip], order=order))
    expected = values * 255 / top
    assert np.abs(found.pixels[..., 0] - (expected if color == 1 else 255 - expected)).max() <= 0.5
    assert found.facts.is_gray
    assert found.facts.mode == {1: "1", 12: "I;16", 16: "I;16"}.get(bits, "L")


@pytest.mark.parametrize("color", [0, 1])
def test_twelve_bits_in_sixteen_are_not_black(color: int) -> None:
    values = GRAY.astype(int) * 4095 // GRAY.max()
    pixels = decode(tiff(tiff_tags(64, 48, [16], color), [rows(values, 16)])).pixels[..., 0]
    expected = values * 255 / 4095
    assert np.abs(pixels - (expected if color == 1 else 255 - expected)).max() <= 0.5


def test_the_whole_image_decides_its_levels() -> None:
    """The bright rows come in a later band than the dark ones."""
    values = np.zeros((3000, 3000), np.uint16)
    values[:2900] = 1000
    values[2999] = 65535
    data = tiff(tiff_tags(3000, 3000, [16], 1), [values.tobytes()])
    assert decode(data).pixels[0, 0].tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("maximum", "end"),
    [(65535, 65535), (8192, 65535), (8191, 8191), (4095, 4095), (4096, 8191), (1000, 1023), (255, 255), (0, 255)],
)
def test_gray_of_16_bits_follows_one_rule(maximum: int, end: int) -> None:
    levels = gray_levels(maximum)
    for value in (0, end // 3, end // 2, end):
        assert levels[value] == round(value * 255 / end)
    assert (np.diff(levels[: end + 1].astype(int)) >= 0).all()


@pytest.mark.parametrize("color", [0, 1, 2])
@pytest.mark.parametrize("bits", [8, 16])
def test_three_bands_are_red_green_and_blue_whatever_the_color_tag_says(color: int, bits: int) -> None:
    values = (SCENE.astype(int) * (257 if bits == 16 else 1)).reshape(48, -1)
    assert np.array_equal(decode(tiff(tiff_tags(64, 48, [bits] * 3, color), [rows(values, bits)])).pixels, SCENE)


@pytest.mark.parametrize(("is_planar", "bits"), [(False, 8), (False, 16), (True, 8)])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("order", ["<", ">"])
def test_colors_of_a_tiff_together_and_in_planes(order: str, compression: int, is_planar: bool, bits: int) -> None:
    values = SCENE.astype(int) * (257 if bits == 16 else 1)
    planes = [values[..., n] for n in range(3)] if is_planar else [values.reshape(48, -1)]
    strips = [rows(part[top : top + 10], bits, order) for part in planes for top in range(0, 48, 10)]
    tags = tiff_tags(64, 48, [bits] * 3, 2, compression) | {278: (4, [10]), 284: (3, [2 if is_planar else 1])}
    data = tiff(tags, [zlib.compress(strip) for strip in strips] if compression == 8 else strips, order=order)
    assert np.array_equal(decode(data).pixels, SCENE)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("side", [16, 64])
def test_tiles(side: int, compression: int) -> None:
    padded = np.zeros((64, 64, 3), np.uint8)
    padded[:48] = SCENE
    tiles = [
        padded[top : top + side, left : left + side].tobytes()
        for top, left in itertools.product(range(0, 48, side), range(0, 64, side))
    ]
    tags = tiff_tags(64, 48, [8, 8, 8], 2, compression) | {322: (3, [side]), 323: (3, [side])}
    tags.pop(278)
    data = tiff(tags, [zlib.compress(tile) for tile in tiles] if compression == 8 else tiles)
    assert np.array_equal(decode(data).pixels, SCENE)


@pytest.mark.parametrize(("extra", "alpha_counts"), [((2,), True), ((0,), False), (None, True)])
def test_a_fourth_sample_of_a_tiff(extra: tuple[int, ...] | None, alpha_counts: bool) -> None:
    values = np.dstack([SCENE, np.full((48, 64), 51, np.uint8)])
    tags = tiff_tags(64, 48, [8] * 4, 2) | ({338: (3, extra)} if extra is not None else {})
    found = decode(tiff(tags, [values.tobytes()]))
    assert np.abs(found.pixels - (SCENE * 0.2 + 255 * 0.8 if alpha_counts else SCENE)).max() <= 1
    assert found.facts.mode == ("RGBA" if alpha_counts else "RGB")


@pytest.mark.parametrize(("value", "expected"), [(2, GRAY * 0.2 + 255 * 0.8), (0, GRAY), (1, GRAY * 0.2 + 255 * 0.8)])
def test_gray_with_alpha(value: int, expected: np.ndarray) -> None:
    gray = GRAY if value != 1 else (GRAY * 0.2).astype(np.uint8)  # 1: already multiplied by alpha
    pixels = np.dstack([gray, np.full_like(GRAY, 51)])
    data = tiff(tiff_tags(64, 48, [8, 8], 1) | {338: (3, [value])}, [pixels.tobytes()])
    assert np.abs(decode(data).pixels[..., 0] - expected).max() <= 3


def test_inks_palettes_and_lab() -> None:
    inks = np.dstack([255 - SCENE, np.full((48, 64), 0, np.uint8)])
    assert np.array_equal(decode(tiff(tiff_tags(64, 48, [8] * 4, 5), [inks.tobytes()])).pixels, SCENE)
    colors = np.random.default_rng(0).integers(0, 256, (3, 256))
    for unit in (1, 257):  # some writers leave the palette at 8 bits
        data = tiff(tiff_tags(64, 48, [8], 3) | {320: (3, (colors * unit).ravel().tolist())}, [GRAY.tobytes()])
        assert np.array_equal(decode(data).pixels, colors.T[GRAY])
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.fromarray(SCENE), to_lab)
    assert lab is not None
    assert np.abs(decode(encoded(lab, "TIFF")).pixels.astype(int) - SCENE).mean() < 2


@pytest.mark.parametrize("compression", ["packbits", "tiff_lzw", "tiff_adobe_deflate", "lzma", "zstd"])
@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "I;16"])
def test_codings_of_a_tiff_agree_with_no_coding(compression: str, mode: str) -> None:
    drawn = Image.fromarray(GRAY.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(SCENE).convert(mode)
    expected = decode(encoded(drawn, "TIFF"))
    found = decode(encoded(drawn, "TIFF", compression=compression))
    assert found.facts == expected.facts
    assert np.array_equal(found.pixels, expected.pixels)


def test_a_large_tiff_comes_in_bands() -> None:
    """More than a band of pixels, in strips whose height fits neither the bands nor the shrinking."""
    pixels = scene(2500, 2100)
    strips = [zlib.compress(pixels[top : top + 37].tobytes(), 1) for top in range(0, 2100, 37)]
    data = tiff(tiff_tags(2500, 2100, [8, 8, 8], 2, 8) | {278: (4, [37])}, strips)
    assert np.array_equal(decode(data).pixels, pixels)
    assert np.array_equal(decode(data, min_side=262).pixels, np.asarray(Image.fromarray(pixels).reduce(8)))


def test_missing_strips_are_noticed() -> None:
    strips = [SCENE[top : top + 10].tobytes() for top in range(0, 48, 10)]
    tags = tiff_tags(64, 48, [8, 8, 8], 2) | {278: (4, [10])}
    for compression in (1, 8):
        tags[259] = (3, [compression])
        coded = [zlib.compress(strip) for strip in strips] if compression == 8 else strips
        assert decode(tiff(tags, coded))
        assert "missing" in reason(tiff(tags, coded[:4]))
        assert reason(tiff(tags | {273: (4, [8, 9, 10, 11, 2**31])}, coded))
    assert reason(tiff(tags | {259: (3, [8])}, [*map(zlib.compress, strips[:4]), zlib.compress(strips[4][:-20])]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({262: (3, [32_803])}, "camera raw"),
        ({50_706: (1, [1, 4, 0, 0])}, "camera raw"),
        ({258: (3, [8, 8, 4])}, "not supported"),
        ({277: (3, [9]), 258: (3, [8] * 9)}, "9 bands"),
        ({277: (3, [4]), 258: (3, [8] * 4), 262: (3, [1])}, "4 bands"),
        ({258: (3, [16] * 3), 284: (3, [2])}, "separate planes"),
        ({262: (3, [6]), 530: (3, [2, 2])}, "half resolution"),
        ({258: (3, [32, 32, 32])}, "no standard mapping to brightness"),
        ({256: (4, [0])}, "no pixels"),
    ],
)
def test_what_cannot_be_read_rightly_is_named(changes: dict[int, tuple[int, list[int]]], text: str) -> None:
    assert text in reason(tiff(tiff_tags(64, 48, [8, 8, 8], 2) | changes, [SCENE.tobytes() * 4]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_bmp(mode: str) -> None:
    drawn = Image.fromarray(SCENE).convert(mode)
    found = decode(encoded(drawn, "BMP"))
    assert np.array_equal(found.pixels, np.asarray(drawn.convert("RGB")))
    assert found.facts.is_gray == (mode in ("1", "L"))


def test_bmp_runs_and_masks() -> None:
    palette = np.random.default_rng(1).integers(0, 256, (256, 4), np.uint8)
    found = decode(bmp(4, 2, 8, b"\4\7\0\0\4\x09\0\0\0\1", palette=palette.tobytes(), compression=1))
    assert np.array_equal(found.pixels, palette[np.array([[9] * 4, [7] * 4]), 2::-1])
    top_down = decode(bmp(64, -48, 24, SCENE[..., ::-1].tobytes())).pixels
    assert np.array_equal(top_down, SCENE)
    green = np.full((2, 2), 0x7E0, "<u2").tobytes()
    assert decode(bmp(2, 2, 16, green, compression=3, masks=(0xF800, 0x7E0, 0x1F))).pixels[0, 0].tolist() == [0, 255, 0]


def test_gif_transparency_and_first_frame() -> None:
    few = Image.fromarray(SCENE).quantize(16)
    index = int(np.asarray(few)[0, 0])
    found = decode(encoded(few, "GIF", transparency=index))
    expected = np.where((np.asarray(few) == index)[..., None], 255, np.asarray(few.convert("RGB")))
    assert np.array_equal(found.pixels, expected)
    frames = [Image.fromarray(scene(seed=seed)).quantize(64) for seed in range(4)]
    found = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert found.facts.is_animated
    assert np.array_equal(found.pixels, np.asarray(frames[0].convert("RGB")))


def test_webp_alpha_and_first_frame() -> None:
    alpha = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    found = decode(encoded(np.dstack([SCENE, alpha]), "WEBP", lossless=True, exact=True))
    share = alpha[..., None] / 255
    assert np.abs(found.pixels - (SCENE * share + 255 * (1 - share))).max() <= 1
    frames = [Image.fromarray(SCENE), Image.new("RGB", (64, 48), "red")]
    found = decode(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert found.facts.is_animated
    assert np.array_equal(found.pixels, SCENE)


# ---- the script beside an export


@pytest.mark.parametrize("name", [*FILES, "16 bit white is zero", "12 bits in 16", "turned", "palette with alpha"])
def test_the_script_beside_an_export_reads_the_same_pixels(name: str, tmp_path: Path) -> None:
    values = GRAY.astype(int) * 4095 // 255
    few = Image.fromarray(SCENE).quantize(16)
    extra = {
        "16 bit white is zero": lambda: tiff(tiff_tags(64, 48, [16], 0), [rows(GRAY.astype(int) * 257, 16)]),
        "12 bits in 16": lambda: tiff(tiff_tags(64, 48, [16], 1), [rows(values, 16)]),
        "turned": lambda: oriented("TIFF", 6, "<"),
        "palette with alpha": lambda: encoded(few, "PNG", transparency=bytes(range(0, 256, 16))),
    }
    data = FILES[name] if name in FILES else extra[name]()
    if name == "PNG":
        data = encoded(scene(300, 201), "PNG")
    path = tmp_path / "image"
    path.write_bytes(data)
    for min_side in (1000, 33):
        found = decode(data, min_side=min_side)
        assert distance(found, np.asarray(standalone.decode(path, min_side))) <= (1 if "JPEG" in name else 0)


def test_the_script_beside_an_export_refuses_what_has_no_agreed_brightness(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(encoded(np.full((4, 4), 7, np.int32), "TIFF"))
    with pytest.raises(ValueError, match="no standard mapping to brightness"):
        standalone.decode(path, 64)


# ---- content decides


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"  <svg width='3'/>", "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\0\0\1\0\1\0\x10\x10", "icon"),
        (b"\0\0\0\x18ftypmsf1\0\0\0\0", "HEIF sequence"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "AVIF"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "video"),
        (b"8BPS\0\1", "Photoshop"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\3\4", "ZIP"),
        (b"BMW drivers are not bitmaps, whatever the first two letters say", "format"),
        (b"II*\0\x10\0\0\0CR\2\0 is a camera raw file", "format"),
        (b"not an image", "format"),
        (b"P6 1 1 255 abc", "PPM"),
        (b"P5\n# made by hand\n1 1 255 a", "PGM"),
        (b"P66 is a road", "format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
        (b"\xff\xd8", "format"),
    ],
)
def test_other_formats_are_rejected(data: bytes, name: str) -> None:
    text = reason(data)
    assert text.startswith("not an image of a supported format")
    assert all(supported in text for supported in FORMATS)
    assert name in text
    assert sniff(data[:32]) is None


def test_formats_that_pillow_would_read_are_rejected() -> None:
    image = Image.fromarray(SCENE)
    for other in ("PPM", "TGA", "ICO", "ICNS", "JPEG2000", "AVIF", "PCX", "SGI", "DDS", "EPS", "PDF", "MSP"):
        drawn = image.convert("1") if other == "MSP" else image
        assert reason(encoded(drawn, other)).startswith("not an image"), other


def test_an_empty_file_is_named() -> None:
    assert reason(b"") == "the file is empty"
    assert sniff(b"") is None


# ---- decoded to the last row, or rejected


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("name", [name for name in FILES if name != "TIFF pages"])
def test_truncated_files_are_rejected_unless_every_pixel_is_there(name: str, share: float) -> None:
    data = FILES[name]
    cut = data[: int(len(data) * share)]
    if name.startswith(("PNG", "GIF")) and share >= (0.5 if "animated" in name else 0.95):
        with contextlib.suppress(
            ImageError
        ):  # a PNG without its last chunk is whole, an animation without later frames
            assert np.array_equal(decode(cut).pixels, decode(data).pixels)
        return
    reason(cut)


def test_of_several_tiff_pages_only_the_first_need_be_whole() -> None:
    data = FILES["TIFF pages"]
    assert distance(decode(data[: int(len(data) * 0.8)]), SCENE) == 0
    reason(data[: int(len(data) * 0.4)])


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("JPEG")])
@pytest.mark.parametrize("share", [0.75, 0.9, 0.97])
def test_a_truncated_jpeg_with_an_end_mark_is_rejected(name: str, share: float) -> None:
    data = FILES[name]
    start = data.index(b"\xff\xda")
    assert "truncated" in reason(data[: start + int((len(data) - start) * share)] + b"\xff\xd9")


def test_bytes_after_the_image_do_no_harm() -> None:
    for name, data in FILES.items():
        found = decode(data + b"\0\0 and more \xff\xd8\xff\xd9" * 3)
        assert np.array_equal(found.pixels, decode(data).pixels), name


# ---- cost


@pytest.mark.parametrize(
    "data",
    [
        flat_png(60_000, 60_000, bits=1, color=0),
        flat_png(12_000, 10_001, bits=1, color=0),
        FILES["JPEG"].replace(b"\x00\x30\x00\x40", b"\xff\x00\xff\x00", 1),
        FILES["GIF"][:6] + b"\xff\xff\xff\xff" + FILES["GIF"][10:],
        FILES["WEBP"].replace(b"\x9d\x01\x2a\x40\x00\x30\x00", b"\x9d\x01\x2a\xff\x3f\xff\x3f"),
        bmp(2**31 - 1, 2**31 - 1, 24, b""),
        bmp(200_000, -200_000, 1, b""),
        tiff(tiff_tags(100_000, 100_000, [1], 1), [b"\0"]),
        flat_png(2_000_000, 10, bits=1, color=0),
    ],
    ids=["PNG", "PNG just above", "JPEG", "GIF", "WEBP", "BMP", "BMP top-down", "TIFF", "PNG wide"],
)
def test_too_many_pixels_are_rejected_before_decoding(data: bytes) -> None:
    start = time.process_time()
    assert reason(data).startswith("too large")
    assert time.process_time() - start < 0.5


def test_memory_is_counted_with_the_finished_pixels() -> None:
    data = tiff(tiff_tags(11_000, 10_900, [8, 8, 8], 2, 8), [zlib.compress(b"")])
    assert "GB of memory" in reason(data)
    assert "GB of memory" not in reason(data, min_side=224)


@pytest.mark.parametrize(
    "data",
    [
        PNG_MAGIC + chunk(b"teSt", b"") * 600_000,
        tiff(tiff_tags(100, 600_000, [8], 1, 8) | {278: (4, [1])}, [b"x"]),
        tiff(tiff_tags(64, 48, [8] * 3, 2) | {322: (4, [60_000]), 323: (4, [60_000])}, [b"x"]),
        bmp(4000, 4000, 8, b"\1\1" * 3_000_000, palette=bytes(1024), compression=1),
    ],
    ids=["chunks", "strips", "tiles", "runs"],
)
def test_files_that_would_take_too_long_are_refused_at_once(data: bytes) -> None:
    start = time.process_time()
    assert "too costly" in reason(data)
    assert time.process_time() - start < 2


def test_sizes_are_checked() -> None:
    check_size(12_000, 10_000)
    for width, height in ((0, 5), (5, 0), (12_000, 10_001), (MAX_PIXELS, 2), (2_000_000, 1)):
        with pytest.raises(ImageError):
            check_size(width, height)


MEASURE = """
import json, resource, sys, time
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from topwork.data.images import decode
from topwork.errors import ImageError
start, shape, reason = time.process_time(), None, None
try:
    shape = decode(data, min_side=json.loads(sys.argv[2])).pixels.shape
except ImageError as error:
    reason = str(error)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kilo = 1 if sys.platform == "darwin" else 1024
print(json.dumps([shape, reason, time.process_time() - start, (after - before) * kilo + len(data)]))
"""


def cost(data: bytes, folder: Path, min_side: int | None = 224) -> tuple[list[int] | None, str | None, float, int]:
    """Shape or reason, processor seconds, and bytes of memory that decoding takes in a process of its own."""
    path = folder / "image"
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, json.dumps(min_side)],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        check=True,
        text=True,
    )
    shape, text, seconds, n_bytes = json.loads(done.stdout)
    return shape, text, seconds, n_bytes


measured = pytest.mark.skipif(sys.platform == "win32", reason="the memory of a process cannot be measured here")
LARGE = (10_500, 10_480)  # 110 million pixels


@measured
@pytest.mark.parametrize(
    ("bits", "color"),
    [
        pytest.param(8, 6, id="RGBA"),
        pytest.param(16, 0, id="16 bit gray", marks=pytest.mark.slow),
        pytest.param(8, 2, id="RGB", marks=pytest.mark.slow),
        pytest.param(8, 3, id="palette", marks=pytest.mark.slow),
    ],
)
def test_a_large_png_costs_less_than_promised(bits: int, color: int, tmp_path: Path) -> None:
    shape, _, seconds, n_bytes = cost(flat_png(*LARGE, bits=bits, color=color), tmp_path)
    assert shape == [328, 329, 3]
    assert seconds < 10
    assert n_bytes < 1e9


@measured
def test_a_large_jpeg_costs_less_than_promised(tmp_path: Path) -> None:
    data = tall_jpeg(*LARGE)
    for min_side, shape in ((224, [1310, 1313, 3]), (None, [10_480, 10_500, 3])):
        found, _, seconds, n_bytes = cost(data, tmp_path, min_side)
        assert found == shape
        assert seconds < 10
        assert n_bytes < 1e9


@measured
@pytest.mark.slow
@pytest.mark.parametrize("format", ["WEBP", "WEBP lossless", "GIF", "BMP", "TIFF", "TIFF 16 bit", "JPEG progressive"])
def test_large_files_of_other_formats_cost_less_than_promised(format: str, tmp_path: Path) -> None:
    drawn = Image.fromarray(scene(*LARGE) if not format.startswith("WEBP") else scene(7500, 7000))
    options: dict[str, object] = {
        "WEBP": {"method": 0},
        "WEBP lossless": {"lossless": True, "quality": 0, "method": 0},
    }.get(format, {})
    if format == "TIFF 16 bit":
        data = encoded(np.asarray(drawn.convert("L")).astype(np.uint16) * 257, "TIFF")
    elif format == "JPEG progressive":
        data = encoded(drawn, "JPEG", progressive=True, subsampling=0)
    else:
        data = encoded(drawn.quantize(64) if format == "GIF" else drawn, format.split()[0], **options)
    shape, text, seconds, n_bytes = cost(data, tmp_path)
    assert shape is not None, text
    assert seconds < 10
    assert n_bytes < 1e9


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process cannot be limited here")
def test_no_memory_left_is_a_reason_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(flat_png(10_000, 10_000, bits=8, color=2))
    program = """
import resource, sys
import PIL.PngImagePlugin
from topwork.data.images import OUT_OF_MEMORY, decode
from topwork.errors import ImageError
data = open(sys.argv[1], "rb").read()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100_000_000,) * 2)
try:
    decode(data, min_side=224)
except ImageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == OUT_OF_MEMORY


# ---- the process is left alone


def test_a_jpeg_is_decoded_without_pillow_or_torch(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(FILES["JPEG"])
    program = (
        "import sys; from topwork.data.images import decode; decode(open(sys.argv[1], 'rb').read(), min_side=24); "
    )
    program += "print([name for name in ('PIL', 'torch', 'scipy', 'matplotlib') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.strip() == "[]"


def test_no_setting_of_the_process_is_touched_or_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these would make ``PIL.Image.open`` warn or fail over its pixel limit; broken EXIF is not even read."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000_000)
    odd = {
        "more pixels than Pillow likes": flat_png(10_000, 9_500, bits=1, color=0),
        "large strip": tiff(tiff_tags(10_000, 9_500, [1], 1, 8), [zlib.compress(bytes(1250 * 9_500))]),
        "broken EXIF": with_segment(FILES["JPEG"], 0xE1, b"Exif\0\0" + exif(1)[:8] + b"\xff\xff" * 9),
        "broken MPO": with_segment(FILES["JPEG"], 0xE2, b"MPF\0" + exif(1)[:8] + b"\xff" * 30),
        "broken EXIF in a PNG": png(SCENE, bits=8, color=2, extra=chunk(b"eXIf", exif(1)[:8] + b"\xff\xff" * 9)),
    }
    settings = [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in [*odd.values(), *FILES.values()]:
            decode(data, min_side=64)
    assert not caught
    assert settings == [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)]


def test_many_threads_decode_at_once() -> None:
    expected = {name: decode(data).pixels for name, data in FILES.items()}
    barrier = threading.Barrier(8)

    def work(seed: int) -> bool:
        names = random.Random(seed).sample(list(FILES), len(FILES)) * 3
        barrier.wait()
        return all(np.array_equal(decode(FILES[name]).pixels, expected[name]) for name in names)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


# ---- files of any bytes


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file with some bytes changed, cut out or put in, half of the time near its start."""
    found = bytearray(data)
    reach = len(found) if rng.random() < 0.5 else min(len(found), 120)
    place = rng.randrange(reach)
    match rng.randrange(5):
        case 0:
            for _ in range(rng.randrange(1, 6)):
                found[rng.randrange(reach)] = rng.randrange(256)
        case 1:
            found[place] ^= 1 << rng.randrange(8)
        case 2:
            del found[place : place + rng.randrange(1, 30)]
        case 3:
            found[place:place] = rng.randbytes(rng.randrange(1, 30))
        case 4:
            found[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\1\0\0\0"])
    return bytes(found)


@pytest.mark.parametrize("name", FILES)
def test_any_bytes_give_an_image_or_a_reason(name: str) -> None:
    rng = random.Random(name)
    for _ in range(40):
        data = mutated(FILES[name], rng)
        start = time.process_time()
        try:
            found = decode(data, min_side=rng.choice([None, 16]))
            assert found.pixels.shape[2] == 3
        except ImageError:
            pass
        assert time.process_time() - start < 5


def test_random_bytes_after_each_magic_number() -> None:
    rng = random.Random(0)
    for data in FILES.values():
        for n_kept in (4, 12, 20, 40):
            reason(data[:n_kept] + rng.randbytes(500))


def test_every_real_image_is_used(shared_data: Path) -> None:
    """The three small datasets hold one file that is no image: a placeholder GIF is one."""
    for path in sorted((shared_data / "ants-bees").rglob("*.*")):
        decode(path.read_bytes(), min_side=64)


def test_matches_pillow_on_real_photos(shared_data: Path) -> None:
    for path in sorted((shared_data / "ants-bees").rglob("*.jpg"))[::20]:
        expected = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))
        assert distance(decode(path.read_bytes()), expected) < 1


def test_the_limit_is_what_the_promise_says() -> None:
    assert MAX_PIXELS == 120_000_000


# ---- HEIC, with its optional part

pillow_heif = pytest.importorskip("pillow_heif")  # what follows is skipped without it


def heic(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, **options)
    return buffer.getvalue()


PHOTO = scene(96, 64)
HEIC = heic(Image.fromarray(PHOTO), quality=95)


def test_heic_pixels_and_facts() -> None:
    found = decode(HEIC)
    assert (found.facts.format, found.facts.width, found.facts.height) == ("HEIC", 96, 64)
    assert np.abs(found.pixels.astype(float) - PHOTO).mean() < 8
    assert min(decode(heic(Image.fromarray(scene(800, 640))), min_side=64).pixels.shape[:2]) < 200


def test_a_turned_photo_is_upright_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = pillow_heif.from_pillow(Image.fromarray(PHOTO))
    file.info["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    file.save(buffer, quality=95)
    found = decode(buffer.getvalue())
    assert found.pixels.shape == (96, 64, 3)
    assert np.abs(found.pixels.astype(float) - np.rot90(PHOTO, -1)).mean() < 8


def test_heic_alpha_lies_over_the_background_and_gray_is_gray() -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert decode(heic(clear)).pixels.min() > 245
    assert decode(heic(Image.new("L", (64, 64), 100))).facts.is_gray


@pytest.mark.parametrize("kept", [20, 100, 300, -400, -5])
def test_what_is_cut_off_a_heic_is_named(kept: int) -> None:
    with pytest.raises(ImageError, match=r"damaged|truncated|not an image"):
        decode(HEIC[:kept])


def test_flipped_bytes_in_a_heic_never_crash() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        wrong = bytearray(HEIC)
        for place in rng.integers(8, len(wrong), 4).tolist():
            wrong[place] ^= 1 << int(rng.integers(8))
        try:
            decode(bytes(wrong))
        except ImageError:
            continue


def test_the_size_of_a_heic_is_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(ImageError, match="too large"):
        decode(HEIC)


def test_without_the_part_it_is_named_and_not_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    facts = FactsStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)
        (loaded,) = load_images([Entry("a.heic", "a")], lambda _: HEIC, facts)
    assert loaded.reason == NO_HEIC
    (loaded,) = load_images([Entry("a.heic", "a")], lambda _: HEIC, facts)
    assert loaded.facts is not None
