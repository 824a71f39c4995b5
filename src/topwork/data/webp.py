"""WebP: chunks are read here, pixels by the libwebp that Pillow brings.

In: the bytes of a file that starts like a WebP. Out: a :class:`~topwork.data.raster.Raster`: the image, or the first
frame of an animation on its canvas, over the background color.

libwebp is called the way Pillow's own WebP plugin calls it, without that plugin, which would hold yet another copy of
the pixels and would make the canvas before anybody could look at its size. Embedded color profiles are not applied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

import numpy as np
from PIL import Image, _webp

from topwork.data.exif import orientation_of
from topwork.data.raster import MAX_MEMORY_BYTES, MAX_PARTS, Pixels, Raster, check_size, flat
from topwork.errors import ImageError

_CHUNK = Struct("<4sI")
_ANIMATION, _ALPHA = 0x02, 0x10  # flags of an extended header
# The animation decoder, the only one Pillow offers, holds two RGBA canvases and gives a copy of one.
_ANIMATION_BYTES_PER_PIXEL = 12
_SPARE_BYTES = 100_000_000  # for the finished pixels and the file's own copy, when choosing between the decoders


@dataclass
class _Chunks:
    """What the chunks of one file say."""

    width: int = 0
    height: int = 0
    has_alpha: bool = False
    is_lossless: bool = False
    is_animation: bool = False
    n_frames: int = 0
    exif: bytes = b""


def read(data: bytes) -> Raster:
    """Reads the chunks of a WebP; see :func:`topwork.data.images.decode`."""
    chunks = _read_chunks(data)
    n_pixels = chunks.width * chunks.height
    check_size(chunks.width, chunks.height)
    working_bytes = 2 * len(data) + _ANIMATION_BYTES_PER_PIXEL * n_pixels
    is_large = working_bytes + _SPARE_BYTES > MAX_MEMORY_BYTES and not chunks.is_animation
    if is_large:
        working_bytes = len(data) + (3 + chunks.has_alpha + 4 * chunks.is_lossless) * n_pixels
    return Raster(
        format="WEBP",
        width=chunks.width,
        height=chunks.height,
        mode="RGBA" if chunks.has_alpha else "RGB",
        bands=lambda n_rows: _bands(_large_image(data, chunks) if is_large else _image(data, chunks), n_rows),
        working_bytes=working_bytes,
        orientation=orientation_of(chunks.exif),
        is_animated=chunks.n_frames > 1,
    )


def _read_chunks(data: bytes) -> _Chunks:
    end = int.from_bytes(data[4:8], "little") + 8
    if end > len(data):
        raise ImageError("truncated: the end of the WebP is missing")
    chunks, start = _Chunks(), 12
    for _ in range(MAX_PARTS):
        if start + _CHUNK.size > end:
            break
        name, length = _CHUNK.unpack_from(data, start)
        body = data[start + 8 : start + 18]
        if start == 12:
            _take_header(chunks, name, body)
        chunks.is_lossless |= name == b"VP8L"
        chunks.n_frames += name == b"ANMF"
        if name == b"EXIF":
            chunks.exif = data[start + 8 : start + 8 + length]
        start += 8 + length + length % 2
    return chunks


def _take_header(chunks: _Chunks, name: bytes, body: bytes) -> None:
    if name == b"VP8X" and len(body) == 10:
        chunks.width, chunks.height = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
        chunks.has_alpha, chunks.is_animation = bool(body[0] & _ALPHA), bool(body[0] & _ANIMATION)
    elif name == b"VP8L" and body[:1] == b"\x2f":
        bits = int.from_bytes(body[1:5], "little")
        chunks.width, chunks.height, chunks.has_alpha = (
            1 + (bits & 0x3FFF),
            1 + (bits >> 14 & 0x3FFF),
            bool(bits >> 28 & 1),
        )
    elif name == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        chunks.width = int.from_bytes(body[6:8], "little") & 0x3FFF
        chunks.height = int.from_bytes(body[8:10], "little") & 0x3FFF
    else:
        raise ImageError("damaged: a WebP without a readable header")


# ---- pixels


def _image(data: bytes, chunks: _Chunks) -> Pixels:
    """The first frame on its canvas, (H, W, 4); the fourth value is alpha only if the file has alpha."""
    try:
        decoder = _webp.WebPAnimDecoder(data)
    except OSError as error:
        raise ImageError("damaged or truncated WebP") from error
    if decoder.get_info()[0] != (chunks.width, chunks.height):
        raise ImageError("damaged: the WebP names two sizes")
    frame = decoder.get_next()
    if frame is None:
        raise ImageError("damaged or truncated image data")
    pixels = np.frombuffer(frame[0], np.uint8).reshape(chunks.height, chunks.width, 4)
    return pixels if chunks.has_alpha else pixels[..., :3]


def _large_image(data: bytes, chunks: _Chunks) -> Pixels:
    """The image, (H, W, 3 or 4), with less than half the memory: by libwebp's plain decoder.

    Pillow has it loaded but no way to call it. Where the system does not show its names, the image is refused.
    """
    library = ctypes.CDLL(_webp.__file__)
    try:
        decode = library.WebPDecodeRGBAInto if chunks.has_alpha else library.WebPDecodeRGBInto
    except AttributeError as error:
        raise ImageError("too large: decoding it would take more than 1 GB of memory") from error
    decode.restype = ctypes.c_void_p
    decode.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pixels = np.empty((chunks.height, chunks.width, 4 if chunks.has_alpha else 3), np.uint8)
    if not decode(data, len(data), pixels.ctypes.data, pixels.nbytes, pixels.strides[0]):
        raise ImageError("damaged or truncated image data")
    return pixels


def _bands(pixels: Pixels, n_rows: int) -> Iterator[Image.Image]:
    """Pixels (H, W, 3 or 4) in RGB bands."""
    for top in range(0, len(pixels), n_rows):
        band = Image.fromarray(np.ascontiguousarray(pixels[top : top + n_rows]))
        yield flat(band) if band.mode == "RGBA" else band
