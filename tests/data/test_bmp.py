"""BMP: bit depths, masks, run lengths, and files that are not whole."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from data.drawn import bmp, encoded, packed, scene
from topwork.data.images import decode
from topwork.errors import ImageError

SCENE = scene(37, 29)


def rejected(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return str(caught.value)


def rows(values: np.ndarray, bits: int) -> bytes:
    """Rows from the lowest up, each filled up to four bytes."""
    lines = [packed(row, bits) if bits < 16 else row.astype(f"<u{bits // 8}").tobytes() for row in values[::-1]]
    return b"".join(line + bytes(-len(line) % 4) for line in lines)


@pytest.mark.parametrize("is_top_down", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes(bits: int, is_top_down: bool) -> None:
    rng = np.random.default_rng(bits)
    palette = rng.integers(0, 256, (1 << bits, 4), np.uint8)
    values = rng.integers(0, 1 << bits, (29, 37))
    stored = rows(values[::-1] if is_top_down else values, bits)
    found = decode(bmp(37, -29 if is_top_down else 29, bits, stored, palette=palette.tobytes()))
    assert np.array_equal(found.pixels, palette[values][..., 2::-1])
    assert found.facts.mode == "P"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_agrees_with_pillow(mode: str) -> None:
    data = encoded(Image.fromarray(SCENE).convert(mode), "BMP")
    expected = Image.open(io.BytesIO(data))
    found = decode(data)
    assert np.array_equal(found.pixels, np.asarray(expected.convert("RGB")))
    assert found.facts.mode == expected.mode
    assert found.facts.is_gray == (mode in ("1", "L"))


@pytest.mark.parametrize(
    ("bits", "masks"),
    [
        (16, ()),
        (16, (0x7C00, 0x3E0, 0x1F)),
        (16, (0xF800, 0x7E0, 0x1F)),
        (16, (0xF00, 0xF0, 0xF, 0xF000)),
        (32, ()),
        (32, (0xFF, 0xFF00, 0xFF0000)),
        (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
        (32, (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000)),
    ],
)
def test_masks_of_any_width(bits: int, masks: tuple[int, ...]) -> None:
    used = masks or ((0x7C00, 0x3E0, 0x1F) if bits == 16 else (0xFF0000, 0xFF00, 0xFF))
    values = np.zeros((29, 37), np.int64)
    channels = []
    for n, mask in enumerate(used):
        top, shift = mask >> (mask & -mask).bit_length() - 1, (mask & -mask).bit_length() - 1
        level = (SCENE[..., n] if n < 3 else np.full((29, 37), 255)).astype(int) * top // 255
        values |= level << shift
        channels.append(level * 255 / top)
    found = decode(bmp(37, 29, bits, rows(values, bits), compression=3 if masks else 0, masks=masks))
    assert np.abs(found.pixels - np.dstack(channels[:3])).max() <= 0.5
    assert found.facts.mode == ("RGBA" if len(masks) == 4 else "RGB")


def test_alpha_counts_only_where_it_is_used() -> None:
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    half = rows(np.full((2, 2), 0x80_00_00_00, np.int64), 32)
    assert decode(bmp(2, 2, 32, half, compression=3, masks=masks)).pixels[0, 0].tolist() == [127, 127, 127]
    never = rows(np.full((2, 2), 0x0A_14_1E, np.int64), 32)
    assert decode(bmp(2, 2, 32, never, compression=3, masks=masks)).pixels[0, 0].tolist() == [10, 20, 30]


def test_the_old_header_of_os2() -> None:
    palette = bytes([3, 2, 1, 6, 5, 4])
    data = b"BM" + struct.pack("<IIIIHHHH", 0, 0, 32, 12, 2, 1, 1, 1) + palette + b"\x40\0\0\0"
    assert decode(data).pixels.tolist() == [[[1, 2, 3], [4, 5, 6]]]


# ---- run lengths

PALETTE = np.random.default_rng(1).integers(0, 256, (256, 4), np.uint8)
COLORS = PALETTE[:, 2::-1]


def coded(runs: bytes, bits: int = 8, width: int = 4, height: int = 2) -> bytes:
    return bmp(width, height, bits, runs, palette=PALETTE[: 1 << bits].tobytes(), compression=1 if bits == 8 else 2)


@pytest.mark.parametrize(
    ("runs", "indices"),
    [
        (b"\4\7\0\0\4\x09\0\0\0\1", [[9] * 4, [7] * 4]),
        (b"\4\7\0\0\4\x09", [[9] * 4, [7] * 4]),  # no end mark
        (b"\0\4\1\2\3\4\0\0\2\5\2\6\0\1", [[5, 5, 6, 6], [1, 2, 3, 4]]),  # a literal run
        (b"\0\3\1\2\3\0\1\4\0\0\4\5\0\1", [[5] * 4, [1, 2, 3, 4]]),  # and its padding
        (b"\1\1\0\2\2\0\1\2\0\0\4\5\0\1", [[5] * 4, [1, 0, 0, 2]]),  # a jump to the right
        (b"\2\1\0\2\1\1\1\2\0\1", [[0, 0, 0, 2], [1, 1, 0, 0]]),  # and up
        (b"\xff\7\0\0\xff\x09\0\1", [[9] * 4, [7] * 4]),  # runs beyond the row
        (b"\1\7\0\0\0\1", [[0] * 4, [7, 0, 0, 0]]),  # an empty last row
    ],
)
def test_runs_of_bytes(runs: bytes, indices: list[list[int]]) -> None:
    assert np.array_equal(decode(coded(runs)).pixels, COLORS[np.array(indices)])


@pytest.mark.parametrize(
    ("runs", "indices"),
    [
        (b"\4\x12\0\0\3\x34\1\5\0\1", [[3, 4, 3, 0], [1, 2, 1, 2]]),
        (b"\0\4\x12\x34\0\0\0\3\x56\x70\1\x80\0\1", [[5, 6, 7, 8], [1, 2, 3, 4]]),
    ],
)
def test_runs_of_half_bytes(runs: bytes, indices: list[list[int]]) -> None:
    assert np.array_equal(decode(coded(runs, bits=4)).pixels, COLORS[np.array(indices)])


@pytest.mark.parametrize(
    "runs", [b"", b"\4\7", b"\4\7\0\0", b"\4\7\0\0\2\x09", b"\4\7\0\1", b"\4\7\0\0\0\2\1", b"\4\7\0"]
)
def test_runs_that_end_early_are_noticed(runs: bytes) -> None:
    assert "truncated" in rejected(coded(runs))


def test_too_long_run_lengths_are_refused() -> None:
    assert "too costly" in rejected(coded(b"\1\1" * 7_000_000))


# ---- not whole


def test_missing_rows_are_noticed_but_not_missing_padding() -> None:
    data = encoded(SCENE, "BMP")  # 37 pixels: 111 bytes and one of padding
    assert np.array_equal(decode(data[:-1]).pixels, SCENE)
    assert "truncated" in rejected(data[:-2])


def test_a_palette_shorter_than_the_header_says() -> None:
    data = bmp(4, 1, 8, b"\0\1\2\3", palette=bytes([1, 1, 1, 0, 2, 2, 2, 0]), n_colors=2)
    assert decode(data).pixels[0, :, 0].tolist() == [1, 2, 2, 2]
    unsaid = bmp(4, 1, 8, b"\0\1\2\3", palette=bytes([1, 1, 1, 0, 2, 2, 2, 0]))
    assert decode(unsaid).pixels[0, :, 0].tolist() == [1, 2, 2, 2]


@pytest.mark.parametrize(("bits", "compression"), [(3, 0), (24, 1), (8, 2), (24, 3), (24, 4), (24, 5), (0, 0)])
def test_impossible_layouts_are_named(bits: int, compression: int) -> None:
    assert "not supported" in rejected(bmp(4, 4, bits, bytes(64), compression=compression))


def test_a_width_below_zero_is_rejected() -> None:
    assert "no pixels" in rejected(bmp(-4, 4, 24, bytes(64)))
