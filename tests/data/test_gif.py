"""GIF: the first frame on its screen, transparency, and files that are not whole."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from data.drawn import encoded, scene
from topwork.data.images import decode
from topwork.errors import ImageError

FEW = Image.fromarray(scene(37, 29)).quantize(16)
PLAIN = encoded(FEW, "GIF")
COLORS = np.asarray(FEW.convert("RGB"))


def rejected(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return str(caught.value)


def frame_at(data: bytes) -> int:
    """Where the first frame of a GIF without extensions begins."""
    return 13 + 3 * (2 << (data[10] & 7))


def on_screen(width: int, height: int, left: int, top: int) -> bytes:
    """The drawing as a frame somewhere on a larger screen."""
    at = frame_at(PLAIN)
    return (
        PLAIN[:6]
        + struct.pack("<HH", width, height)
        + PLAIN[10 : at + 1]
        + struct.pack("<HH", left, top)
        + PLAIN[at + 5 :]
    )


def gif_extension(label: int, body: bytes) -> bytes:
    return bytes([0x21, label, len(body)]) + body + b"\0"


def with_extension(extension: bytes) -> bytes:
    at = frame_at(PLAIN)
    return PLAIN[:at] + extension + PLAIN[at:]


@pytest.mark.parametrize("is_interlaced", [0, 1])
def test_pixels(is_interlaced: int) -> None:
    found = decode(encoded(FEW, "GIF", interlace=is_interlaced))
    assert np.array_equal(found.pixels, COLORS)
    assert not found.facts.is_animated


def test_grays_are_said_to_be_gray() -> None:
    facts = decode(encoded(Image.fromarray(scene()).convert("L"), "GIF")).facts
    assert facts.is_gray
    assert facts.mode == "L"


@pytest.mark.parametrize("min_side", [None, 32])
def test_a_frame_smaller_than_the_screen_stands_on_the_background(min_side: int | None) -> None:
    found = decode(on_screen(80, 64, 10, 20), min_side=min_side)
    expected = np.full((64, 80, 3), 255, np.uint8)
    expected[20:49, 10:47] = COLORS
    if min_side:
        expected = np.asarray(Image.fromarray(expected).reduce(2))
    assert np.array_equal(found.pixels, expected)


def test_a_frame_beyond_the_screen_widens_it() -> None:
    found = decode(on_screen(10, 10, 5, 7))
    assert found.pixels.shape == (36, 42, 3)
    assert np.array_equal(found.pixels[7:, 5:], COLORS)


def test_the_transparent_color_shows_the_background() -> None:
    index = int(np.asarray(FEW)[0, 0])
    data = with_extension(gif_extension(0xF9, bytes([1, 0, 0, index])))
    expected = np.where((np.asarray(FEW) == index)[..., None], 255, COLORS)
    assert np.array_equal(decode(data).pixels, expected)


def test_the_first_of_many_frames() -> None:
    frames = [Image.fromarray(scene(37, 29, seed)).quantize(64) for seed in range(4)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    found = decode(data)
    assert found.facts.is_animated
    assert np.array_equal(found.pixels, np.asarray(frames[0].convert("RGB")))


def test_no_palette_means_grays() -> None:
    data = bytearray(encoded(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), "GIF"))
    plain = bytes(data[:10]) + bytes([data[10] & 0x7F]) + bytes(data[11:13]) + bytes(data[13 + 768 :])
    assert decode(plain).pixels[..., 0].ravel().tolist() == list(range(256))


# ---- harmless


@pytest.mark.parametrize(
    "extension",
    [
        gif_extension(0xFE, b"a comment"),
        gif_extension(0xFF, b"NETSCAPE2.0"),
        gif_extension(0xF9, b"\0"),
        gif_extension(0x77, b"unknown"),
        b"\x21\xfe" + b"\1c" * 1000 + b"\0",
        b"\0\0\0",
    ],
)
def test_odd_blocks_do_no_harm(extension: bytes) -> None:
    assert np.array_equal(decode(with_extension(extension)).pixels, COLORS)


def test_the_closing_byte_may_be_missing() -> None:
    assert np.array_equal(decode(PLAIN[:-1]).pixels, COLORS)


# ---- not whole


def test_every_block_must_be_whole() -> None:
    frames = [FEW, FEW.rotate(90), FEW.rotate(180)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], optimize=False)
    for share in (0.2, 0.5, 0.8, 0.98):
        assert rejected(data[: int(share * len(data))])


def test_data_that_end_early_are_noticed_though_all_blocks_are_whole() -> None:
    """A frame that says it is twice as high, with or without another frame after it."""
    at = frame_at(PLAIN)
    taller = PLAIN[: at + 7] + struct.pack("<H", 58) + PLAIN[at + 9 :]
    assert "truncated" in rejected(taller)
    assert "truncated" in rejected(taller[:-1] + PLAIN[at:])
    assert Image.open(io.BytesIO(PLAIN)).height == 29


def test_too_many_blocks_are_refused() -> None:
    assert "too many blocks" in rejected(with_extension(b"\x21\xfe" + b"\1c" * 2_100_000 + b"\0"))


def test_nothing_to_show_is_rejected() -> None:
    at = frame_at(PLAIN)
    assert "no frame" in rejected(PLAIN[:at] + b";")
    assert "no frame" in rejected(PLAIN[:at] + b"what is this")
    assert "no pixels" in rejected(PLAIN[: at + 5] + bytes(4) + PLAIN[at + 9 :])
    assert "code size" in rejected(PLAIN[: at + 10] + b"\x0d" + PLAIN[at + 11 :])
