"""PNG: every bit depth and color type, transparency, levels of 16 bits, damage and harmless damage."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data.drawn import PNG_MAGIC, chunk, encoded, exif, flat_png, packed, png, scene
from topwork.data.images import decode
from topwork.errors import ImageError

SCENE = scene(37, 29)
PLAIN = png(SCENE, bits=8, color=2)
RNG = np.random.default_rng(0)


def rejected(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return str(caught.value)


def parts(data: bytes) -> list[tuple[bytes, bytes]]:
    """Name and whole bytes of each chunk."""
    found, at = [], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at:end]))
        at = end
    return found


# ---- every layout


@pytest.mark.parametrize("is_interlaced", [False, True])
@pytest.mark.parametrize(
    ("color", "bits"),
    [
        *((0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8)),
        *((4, 8), (4, 16), (6, 8), (6, 16)),
    ],
)
def test_every_bit_depth_and_color_type(color: int, bits: int, is_interlaced: bool) -> None:
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
    assert found.facts.is_gray == (color in (0, 4))
    assert found.facts.mode == {(0, 1): "1", (0, 16): "I;16"}.get(
        (color, bits), {0: "L", 2: "RGB", 4: "LA", 6: "RGBA"}[color]
    )


@pytest.mark.parametrize(("maximum", "factor"), [(255, 1), (4095, 255 / 4095), (8191, 255 / 8191), (8192, 255 / 65535)])
def test_gray_of_fewer_than_16_bits_in_16_is_not_black(maximum: int, factor: float) -> None:
    samples = np.linspace(0, maximum, 600).astype(int).reshape(20, 30)
    pixels = decode(png(samples, bits=16, color=0)).pixels
    assert np.abs(pixels[..., 0] - samples * factor).max() <= 0.5


# ---- transparency


def test_alpha_of_a_palette() -> None:
    palette = np.array([[200, 0, 0], [0, 100, 0], [0, 0, 50]], np.uint8)
    extra = chunk(b"PLTE", palette.tobytes()) + chunk(b"tRNS", bytes([0, 128]))
    pixels = decode(png(np.array([[0, 1, 2]]), bits=2, color=3, extra=extra)).pixels
    assert pixels.tolist() == [[[255, 255, 255], [127, 177, 127], [0, 0, 50]]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_gray(bits: int) -> None:
    top = (1 << bits) - 1
    pixels = decode(png(np.array([[0, top]]), bits=bits, color=0, extra=chunk(b"tRNS", struct.pack(">H", 0)))).pixels
    assert pixels[0, :, 0].tolist() == [255, 255]
    key = struct.pack(">H", top)
    assert decode(png(np.array([[0, top]]), bits=bits, color=0, extra=chunk(b"tRNS", key))).pixels[0, 0, 0] == 0


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_color(bits: int) -> None:
    samples = np.array([[[10, 20, 30], [10, 20, 31]]]) * (1 if bits == 8 else 257)
    key = struct.pack(">HHH", *samples[0, 0])
    pixels = decode(png(samples, bits=bits, color=2, extra=chunk(b"tRNS", key))).pixels
    assert pixels.tolist() == [[[255, 255, 255], [10, 20, 31]]]


def test_broken_transparency_does_no_harm() -> None:
    for body in (b"", b"\0", bytes(5), bytes(300)):
        assert decode(png(SCENE, bits=8, color=2, extra=chunk(b"tRNS", body))).pixels.shape == SCENE.shape
    wrong = chunk(b"tRNS", struct.pack(">HHH", *map(int, SCENE[0, 0])), checksum=0)
    assert np.array_equal(decode(png(SCENE, bits=8, color=2, extra=wrong)).pixels, SCENE)


# ---- lost pixels


@pytest.mark.parametrize("is_interlaced", [False, True])
def test_a_stream_that_ends_early_is_noticed(is_interlaced: bool) -> None:
    """Sound chunks and a sound stream of too few rows: Pillow leaves the rest black and says nothing."""
    whole = zlib.decompress(parts(png(SCENE, bits=8, color=2, is_interlaced=is_interlaced))[1][1][8:-4])
    for n_bytes in (0, 1, len(whole) // 2, len(whole) - 112, len(whole) - 1):
        short = png(SCENE, bits=8, color=2, is_interlaced=is_interlaced, stream=zlib.compress(whole[:n_bytes]))
        assert rejected(short)


def test_a_black_last_row_is_no_missing_row() -> None:
    pixels = SCENE.copy()
    pixels[-1] = 0
    assert np.array_equal(decode(png(pixels, bits=8, color=2)).pixels, pixels)
    assert decode(flat_png(50, 40, bits=1, color=0)).pixels.max() == 0


def test_damaged_pixels_are_noticed_by_their_checksum() -> None:
    names = parts(PLAIN)
    for number, (name, body) in enumerate(names):
        broken = body[:-4] + bytes([body[-4] ^ 1]) + body[-3:]
        data = PNG_MAGIC + b"".join(broken if n == number else other for n, (_, other) in enumerate(names))
        assert "checksum" in rejected(data), name


def test_what_pixels_need_must_be_there() -> None:
    chunks = dict(parts(PLAIN))
    assert "header" in rejected(PNG_MAGIC + chunks[b"IDAT"] + chunks[b"IEND"])
    assert "no image data" in rejected(PNG_MAGIC + chunks[b"IHDR"] + chunks[b"IEND"])
    assert "end of the PNG" in rejected(PNG_MAGIC + chunks[b"IHDR"] + chunks[b"IDAT"])
    assert "palette" in rejected(png(SCENE[..., 0], bits=8, color=3))
    assert "not supported" in rejected(png(SCENE, bits=8, color=2, extra=chunk(b"CgBI", bytes(4))))


@pytest.mark.parametrize(
    "header", [(1, 1, 3, 0, 0, 0, 0), (1, 1, 8, 5, 0, 0, 0), (1, 1, 8, 2, 1, 0, 0), (0, 9, 8, 2, 0, 0, 0)]
)
def test_impossible_headers_are_rejected(header: tuple[int, ...]) -> None:
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", *header)) + chunk(b"IDAT", zlib.compress(bytes(99)))
    assert rejected(PNG_MAGIC + body + chunk(b"IEND", b""))


# ---- harmless


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"tEXt", b"Comment\0text", checksum=1),
        chunk(b"iCCP", b"name\0\0not a profile"),
        chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(50_000_000))),
        chunk(b"zTXt", b"name\0\0" + zlib.compress(bytes(50_000_000))) * 20,
        chunk(b"iTXt", b"\xff" * 9),
        chunk(b"gAMA", b"\0"),
        chunk(b"pHYs", b""),
        chunk(b"cHRM", b"\1\2"),
        chunk(b"eXIf", b"broken"),
        chunk(b"acTL", b"\0"),
        chunk(b"fcTL", b"\0\0\0\x09"),
        chunk(b"vpAg", bytes(9)),
    ],
)
def test_broken_or_bloated_metadata_do_no_harm(extra: bytes) -> None:
    assert np.array_equal(decode(png(SCENE, bits=8, color=2, extra=extra)).pixels, SCENE)
    late = PLAIN[:-12] + extra + PLAIN[-12:]
    assert np.array_equal(decode(late).pixels, SCENE)


def test_pixels_may_come_in_any_number_of_chunks() -> None:
    header, body, end = (data for _, data in parts(PLAIN))
    stream = body[8:-4]
    for size in (1, 7, 100):
        pieces = b"".join(
            chunk(b"IDAT", stream[at : at + size]) + chunk(b"IDAT", b"") for at in range(0, len(stream), size)
        )
        assert np.array_equal(decode(PNG_MAGIC + header + pieces + end).pixels, SCENE)
    assert "too many chunks" in rejected(PNG_MAGIC + header + chunk(b"IDAT", b"") * 600_000 + body + end)


def test_exif_may_follow_the_pixels() -> None:
    data = PLAIN[:-12] + chunk(b"eXIf", exif(6)) + PLAIN[-12:]
    assert decode(data).pixels.shape == (37, 29, 3)


def test_a_short_palette_is_black_beyond_its_end() -> None:
    extra = chunk(b"PLTE", bytes([9, 8, 7]))
    assert decode(png(np.array([[0, 3]]), bits=2, color=3, extra=extra)).pixels.tolist() == [[[9, 8, 7], [0, 0, 0]]]


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.fromarray(SCENE), Image.new("RGB", (37, 29)), Image.new("RGB", (37, 29), "red")]
    for options in ({}, {"default_image": True}):
        found = decode(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], **options))
        assert found.facts.is_animated
        assert np.array_equal(found.pixels, SCENE)


def test_packed_is_the_inverse_of_unpacking() -> None:
    assert packed(np.array([1, 2, 3]), 4) == b"\x12\x30"
    assert packed(np.array([0x123, 0x456]), 12) == b"\x12\x34\x56"
