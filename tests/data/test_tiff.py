"""TIFF: sample layouts, codings, and files that are not whole."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.drawn import encoded, packed, scene, tiff, tiff_tags
from topwork.data.images import decode
from topwork.errors import ImageError

SCENE = scene(45, 37)
GRAY = SCENE[..., 1].copy()


def rejected(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return str(caught.value)


def rows(values: np.ndarray, bits: int, order: str = "<") -> bytes:
    """Uncompressed rows, each filled up to a byte."""
    return b"".join(packed(row, bits, order) for row in values)


# ---- gray


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("color", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("is_deflated", [False, True])
def test_gray_of_every_depth(bits: int, color: int, order: str, is_deflated: bool) -> None:
    top = (1 << bits) - 1
    values = GRAY.astype(int) * top // 255
    values[0, 0], values[-1, -1] = 0, top
    strip = rows(values, bits, order)
    data = tiff(
        tiff_tags(45, 37, [bits], color, 8 if is_deflated else 1),
        [zlib.compress(strip) if is_deflated else strip],
        order=order,
    )
    found = decode(data)
    expected = values * 255 / top
    assert np.abs(found.pixels[..., 0] - (expected if color == 1 else 255 - expected)).max() <= 0.5
    assert found.facts.is_gray
    assert found.facts.mode == {1: "1", 12: "I;16", 16: "I;16"}.get(bits, "L")


@pytest.mark.parametrize("color", [0, 1])
def test_twelve_bits_in_sixteen_are_not_black(color: int) -> None:
    values = GRAY.astype(int) * 4095 // GRAY.max()
    pixels = decode(tiff(tiff_tags(45, 37, [16], color), [rows(values, 16)])).pixels[..., 0]
    expected = values * 255 / 4095
    assert np.abs(pixels - (expected if color == 1 else 255 - expected)).max() <= 0.5


def test_the_whole_image_decides_its_levels() -> None:
    """The bright rows come in a later band than the dark ones."""
    values = np.zeros((3000, 3000), np.uint16)
    values[:2900] = 1000
    values[2999] = 65535
    data = tiff(tiff_tags(3000, 3000, [16], 1), [values.tobytes()])
    assert decode(data).pixels[0, 0].tolist() == [4, 4, 4]


# ---- colors


def test_strips_tiles_and_pages_of_any_height() -> None:
    for n_rows in (1, 2, 7, 36, 37, 100):
        strips = [SCENE[top : top + n_rows].tobytes() for top in range(0, 37, n_rows)]
        for compression in (1, 8):
            tags = tiff_tags(45, 37, [8, 8, 8], 2, compression) | {278: (4, [n_rows])}
            pieces = [zlib.compress(strip) for strip in strips] if compression == 8 else strips
            assert np.array_equal(decode(tiff(tags, pieces)).pixels, SCENE), n_rows


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("side", [16, 32, 64])
def test_tiles(side: int, compression: int) -> None:
    padded = np.zeros((64, 64, 3), np.uint8)
    padded[:37, :45] = SCENE
    tiles = [
        padded[top : top + side, left : left + side].tobytes()
        for top, left in itertools.product(range(0, 37, side), range(0, 45, side))
    ]
    tags = tiff_tags(45, 37, [8, 8, 8], 2, compression) | {322: (3, [side]), 323: (3, [side])}
    tags.pop(278)
    data = tiff(tags, [zlib.compress(tile) for tile in tiles] if compression == 8 else tiles)
    assert np.array_equal(decode(data).pixels, SCENE)
    assert decode(data, min_side=18).pixels.shape == (37, 45, 3)


def test_a_large_image_comes_in_bands() -> None:
    """More than a band of pixels, in strips whose height fits neither the bands nor the shrinking."""
    pixels = scene(2500, 2100)
    strips = [zlib.compress(pixels[top : top + 37].tobytes(), 1) for top in range(0, 2100, 37)]
    data = tiff(tiff_tags(2500, 2100, [8, 8, 8], 2, 8) | {278: (4, [37])}, strips)
    assert np.array_equal(decode(data).pixels, pixels)
    small = decode(data, min_side=262).pixels
    assert np.array_equal(small, np.asarray(Image.fromarray(pixels).reduce(8)))
    raw = tiff(
        tiff_tags(2500, 2100, [8, 8, 8], 2) | {278: (4, [37])},
        [pixels[t : t + 37].tobytes() for t in range(0, 2100, 37)],
    )
    assert np.array_equal(decode(raw, min_side=262).pixels, small)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("is_planar", [False, True])
def test_colors_together_and_in_planes(is_planar: bool, compression: int, bits: int, order: str) -> None:
    values = SCENE.astype(int) * (257 if bits == 16 else 1)
    planes = [values[..., n] for n in range(3)] if is_planar else [values.reshape(37, -1)]
    strips = [rows(part[top : top + 10], bits, order) for part in planes for top in range(0, 37, 10)]
    tags = tiff_tags(45, 37, [bits] * 3, 2, compression) | {278: (4, [10]), 284: (3, [2 if is_planar else 1])}
    data = tiff(tags, [zlib.compress(strip) for strip in strips] if compression == 8 else strips, order=order)
    assert np.array_equal(decode(data).pixels, SCENE)


@pytest.mark.parametrize("is_planar", [False, True])
@pytest.mark.parametrize(("extra", "alpha_counts"), [((2,), True), ((0,), False), (None, True)])
def test_a_fourth_sample(extra: tuple[int, ...] | None, alpha_counts: bool, is_planar: bool) -> None:
    alpha = np.full((37, 45), 51, np.uint8)
    values = np.dstack([SCENE, alpha])
    tags = tiff_tags(45, 37, [8] * 4, 2) | {284: (3, [2 if is_planar else 1])}
    if extra is not None:
        tags |= {338: (3, extra)}
    strips = [values[..., n].tobytes() for n in range(4)] if is_planar else [values.tobytes()]
    found = decode(tiff(tags, strips))
    expected = SCENE * 0.2 + 255 * 0.8 if alpha_counts else SCENE
    assert np.abs(found.pixels - expected).max() <= 1
    assert found.facts.mode == ("RGBA" if alpha_counts else "RGB")


def test_alpha_that_is_already_multiplied_in() -> None:
    values = np.dstack([(SCENE * 0.2).astype(np.uint8), np.full((37, 45), 51, np.uint8)])
    found = decode(tiff(tiff_tags(45, 37, [8] * 4, 2) | {338: (3, [1])}, [values.tobytes()]))
    assert np.abs(found.pixels - (SCENE * 0.2 + 255 * 0.8)).max() <= 2


def test_gray_with_alpha() -> None:
    for value, expected in ((2, GRAY * 0.2 + 255 * 0.8), (0, GRAY)):
        data = tiff(
            tiff_tags(45, 37, [8, 8], 1) | {338: (3, [value])}, [np.dstack([GRAY, np.full_like(GRAY, 51)]).tobytes()]
        )
        assert np.abs(decode(data).pixels[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("is_planar", [False, True])
def test_inks(is_planar: bool) -> None:
    inks = np.dstack([255 - SCENE, np.full((37, 45), 0, np.uint8)])
    strips = [inks[..., n].tobytes() for n in range(4)] if is_planar else [inks.tobytes()]
    data = tiff(tiff_tags(45, 37, [8] * 4, 5) | {284: (3, [2 if is_planar else 1])}, strips)
    assert np.array_equal(decode(data).pixels, SCENE)


@pytest.mark.parametrize("unit", [1, 257])
def test_palettes_of_16_bits_and_of_8(unit: int) -> None:
    colors = np.random.default_rng(0).integers(0, 256, (3, 256))
    data = tiff(tiff_tags(45, 37, [8], 3) | {320: (3, (colors * unit).ravel().tolist())}, [GRAY.tobytes()])
    assert np.array_equal(decode(data).pixels, colors.T[GRAY])
    assert "palette" in rejected(tiff(tiff_tags(45, 37, [8], 3), [GRAY.tobytes()]))


def test_colors_at_half_resolution_without_compression() -> None:
    """Blocks of two by two brightnesses and one color: Pillow alone would read them as plain triples."""
    ycc = np.asarray(Image.new("RGB", (46, 38), (200, 40, 90)).convert("YCbCr"))
    block = bytes([*[ycc[0, 0, 0]] * 4, ycc[0, 0, 1], ycc[0, 0, 2]])
    data = tiff(tiff_tags(46, 38, [8, 8, 8], 6) | {530: (3, [2, 2])}, [block * (23 * 19)])
    assert np.abs(decode(data).pixels - np.array([200, 40, 90])).max() <= 3


def test_lab() -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.fromarray(SCENE), to_lab)
    assert lab is not None
    assert np.abs(decode(encoded(lab, "TIFF")).pixels.astype(int) - SCENE).mean() < 2


@pytest.mark.parametrize("compression", ["packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "lzma", "zstd"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_codings_agree_with_no_coding(compression: str, mode: str) -> None:
    drawn = Image.fromarray(GRAY.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(SCENE).convert(mode)
    expected = decode(encoded(drawn, "TIFF"))
    found = decode(encoded(drawn, "TIFF", compression=compression))
    assert found.facts == expected.facts
    assert np.array_equal(found.pixels, expected.pixels)


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_ccitt"])
def test_fax(compression: str) -> None:
    drawn = Image.fromarray(SCENE).convert("1")
    assert np.array_equal(
        decode(encoded(drawn, "TIFF", compression=compression)).pixels[..., 0], np.asarray(drawn) * 255
    )


def test_bits_from_the_low_end() -> None:
    values = (GRAY > 99).astype(np.uint8)
    strip = b"".join(np.packbits(row, bitorder="little").tobytes() for row in values)
    data = tiff(tiff_tags(45, 37, [1], 1) | {266: (3, [2])}, [strip])
    assert np.array_equal(decode(data).pixels[..., 0], values * 255)


# ---- metadata


def test_a_missing_or_wrong_size_of_plain_strips_does_no_harm() -> None:
    tags = tiff_tags(45, 37, [8, 8, 8], 2)
    for sizes in ([1], [2**31], [0]):
        assert np.array_equal(decode(tiff(tags | {279: (4, sizes)}, [SCENE.tobytes()])).pixels, SCENE)


@pytest.mark.parametrize("orientation", [0, 9, 60_000])
def test_a_broken_orientation_does_no_harm(orientation: int) -> None:
    data = tiff(tiff_tags(45, 37, [8, 8, 8], 2) | {274: (3, [orientation])}, [SCENE.tobytes()])
    assert np.array_equal(decode(data).pixels, SCENE)


def test_odd_tags_do_no_harm() -> None:
    odd = {
        270: (2, list(b"text without an end")),
        282: (4, [1]),
        305: (3, [1] * 50),
        33_432: (1, [255]),
        65_000: (7, [1, 2]),
    }
    data = tiff(tiff_tags(45, 37, [8, 8, 8], 2) | odd, [SCENE.tobytes()])
    assert np.array_equal(decode(data).pixels, SCENE)


# ---- not whole, not supported, too costly


def test_missing_strips_are_noticed() -> None:
    strips = [SCENE[top : top + 10].tobytes() for top in range(0, 37, 10)]
    tags = tiff_tags(45, 37, [8, 8, 8], 2) | {278: (4, [10])}
    for compression in (1, 8):
        tags[259] = (3, [compression])
        coded = [zlib.compress(strip) for strip in strips] if compression == 8 else strips
        assert decode(tiff(tags, coded))
        assert "missing" in rejected(tiff(tags, coded[:3]))
        assert rejected(tiff(tags, [*coded[:3], b""]))
        assert "beyond" in rejected(tiff(tags | {273: (4, [8, 9, 10, 2**31])}, coded))
    assert rejected(
        tiff(tags | {259: (3, [8])}, [*[zlib.compress(s) for s in strips[:3]], zlib.compress(strips[3][:-20])])
    )
    assert rejected(tiff(tags | {259: (3, [5])}, strips)) == "damaged or truncated image data"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({259: (3, [6])}, "compression 6"),
        ({259: (3, [50_001])}, "compression 50001"),
        ({259: (3, [0])}, "compression 0"),
        ({262: (3, [9])}, "color type 9"),
        ({262: (3, [32_803])}, "camera raw"),
        ({50_706: (1, [1, 4, 0, 0])}, "camera raw"),
        ({258: (3, [8, 8, 4])}, "not supported"),
        ({258: (3, [5, 5, 5])}, "not supported"),
        ({277: (3, [9]), 258: (3, [8] * 9)}, "9 samples"),
        ({277: (3, [0])}, "damaged"),
        ({258: (3, [0, 0, 0])}, "damaged"),
        ({258: (3, [32, 32, 32])}, "no agreed brightness"),
        ({278: (4, [0])}, "strips or tiles without pixels"),
        ({322: (3, [16]), 323: (3, [0])}, "strips or tiles without pixels"),
        ({322: (4, [60_000]), 323: (4, [60_000])}, "too costly"),
        ({256: (4, [0])}, "no pixels"),
        ({256: (2, [65])}, "size"),
    ],
)
def test_what_cannot_be_decoded_is_named(changes: dict[int, tuple[int, list[int]]], text: str) -> None:
    assert text in rejected(tiff(tiff_tags(45, 37, [8, 8, 8], 2) | changes, [SCENE.tobytes()]))


def test_too_many_strips_are_refused() -> None:
    tags = tiff_tags(100, 600_000, [8], 1, 8) | {278: (4, [1])}
    assert "too many strips" in rejected(tiff(tags, [b"x"]))


def test_a_directory_beyond_the_end_is_noticed() -> None:
    for start in (b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\7\0\0\0", b"\xff\xff\xff\xff"):
        assert rejected(b"II*\0" + start + bytes(30))
    assert rejected(b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(60))
