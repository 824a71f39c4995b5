"""WebP: lossy, lossless, alpha, animations, and the decoder for large images."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from data.drawn import encoded, exif, scene
from topwork.data import webp
from topwork.data.images import decode
from topwork.errors import ImageError

SCENE = scene(37, 29)
RGBA = Image.fromarray(np.dstack([SCENE, np.tile(np.linspace(0, 255, 37).astype(np.uint8), (29, 1))]))
LOSSLESS = encoded(SCENE, "WEBP", lossless=True)
LOSSY = encoded(SCENE, "WEBP", quality=80)


def rejected(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data)
    return str(caught.value)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def test_lossless_pixels_are_exact() -> None:
    assert np.array_equal(decode(LOSSLESS).pixels, SCENE)


@pytest.mark.parametrize("options", [{"lossless": True, "exact": True}, {"quality": 100}])
def test_alpha_lies_over_the_background(options: dict[str, object]) -> None:
    found = decode(encoded(RGBA, "WEBP", **options))
    values = np.asarray(RGBA).astype(float)
    alpha = values[..., 3:] / 255
    assert np.abs(found.pixels - (values[..., :3] * alpha + 255 * (1 - alpha))).mean() < (
        1 if "lossless" in options else 6
    )
    assert found.facts.mode == "RGBA"


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.fromarray(SCENE), Image.new("RGB", (37, 29), "red")]
    found = decode(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True))
    assert found.facts.is_animated
    assert np.array_equal(found.pixels, SCENE)
    assert not decode(LOSSLESS).facts.is_animated


@pytest.mark.parametrize("data", [LOSSY, LOSSLESS, encoded(RGBA, "WEBP"), encoded(RGBA, "WEBP", lossless=True)])
def test_the_decoder_for_large_images_gives_the_same_pixels(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = decode(data).pixels
    monkeypatch.setattr(webp, "_SPARE_BYTES", 10**9)
    assert np.array_equal(decode(data).pixels, expected)
    for share in (0.5, 0.9):
        n_bytes = int(len(data) * share)
        cut = data[:4] + struct.pack("<I", n_bytes - 8) + data[8:n_bytes]
        assert "damaged or truncated" in rejected(cut)


@pytest.mark.parametrize("data", [LOSSY, LOSSLESS])
def test_missing_data_are_noticed_whatever_the_header_says(data: bytes) -> None:
    for share in (0.3, 0.6, 0.9):
        n_bytes = int(len(data) * share)
        assert "truncated" in rejected(data[:n_bytes])
        assert "truncated" in rejected(data[:4] + struct.pack("<I", n_bytes - 8) + data[8:n_bytes])
        kept = data[20:n_bytes]
        assert rejected(riff((data[12:16], kept)))


def test_broken_metadata_do_no_harm() -> None:
    still = LOSSLESS[20 : 20 + struct.unpack("<I", LOSSLESS[16:20])[0]]
    header = struct.pack("<I", 0x2C) + (36).to_bytes(3, "little") + (28).to_bytes(3, "little")
    for extra in ((b"EXIF", b"broken"), (b"EXIF", b""), (b"ICCP", b"no profile"), (b"XMP ", b"<"), (b"what", b"ever")):
        found = decode(riff((b"VP8X", header), (b"VP8L", still), extra))
        assert np.array_equal(found.pixels, SCENE)
        assert found.facts.orientation == 1
    assert decode(riff((b"VP8X", header), (b"VP8L", still), (b"EXIF", b"Exif\0\0" + exif(8)))).facts.orientation == 8


def test_two_sizes_in_one_file_are_rejected() -> None:
    still = LOSSLESS[20:]
    header = struct.pack("<I", 0) + (99).to_bytes(3, "little") + (99).to_bytes(3, "little")
    assert rejected(riff((b"VP8X", header), (b"VP8L", still)))


def test_headers_that_say_nothing_are_rejected() -> None:
    for name in (b"VP8 ", b"VP8L", b"VP8X", b"JUNK"):
        assert "header" in rejected(riff((name, bytes(4))))
    assert rejected(b"RIFF\4\0\0\0WEBP")
