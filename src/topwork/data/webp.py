"""WebP: the header is read here, pixels by libwebp.

In: the bytes of a file that starts like a WebP. Out: a :class:`~topwork.data.raster.Raster`: the image, or the first
frame of an animation on its canvas, over the background colour.

libwebp is called the way Pillow's own WebP plugin calls it, without that plugin, which would hold a fifth copy of the
pixels and would make the canvas before anybody could look at its size. What is left is twelve bytes a pixel, so the
memory limit is reached at about 80 million pixels. Embedded colour profiles are not applied.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image, _webp

from topwork.data.exif import orientation_of
from topwork.data.raster import Raster, check_memory, check_size, flat
from topwork.errors import ImageError

_BYTES_PER_PIXEL = 12  # libwebp's animation decoder holds two RGBA canvases and gives a copy of one


def read(data: bytes) -> Raster:
    """Reads the header of a WebP; see :func:`topwork.data.images.decode`."""
    if int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise ImageError("truncated: the end of the WebP is missing")
    width, height = _canvas(data)
    check_size(width, height)
    working_bytes = 2 * len(data) + _BYTES_PER_PIXEL * width * height
    check_memory(working_bytes)
    try:
        decoder = _webp.WebPAnimDecoder(data)
    except OSError as error:
        raise ImageError("damaged or truncated WebP") from error
    (decoded_width, decoded_height), _, _, n_frames, mode = decoder.get_info()
    if (decoded_width, decoded_height) != (width, height):
        raise ImageError("damaged: the WebP names two sizes")
    return Raster(
        format="WEBP",
        width=width,
        height=height,
        mode="RGBA" if mode == "RGBA" else "RGB",
        bands=lambda n_rows: _bands(decoder, width, height, mode, n_rows),
        working_bytes=working_bytes,
        orientation=orientation_of(decoder.get_chunk("EXIF") or b""),
        is_animated=n_frames > 1,
    )


def _canvas(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the first chunk."""
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X" and len(body) == 10:
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L" and body[:1] == b"\x2f":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise ImageError("damaged: a WebP without a readable header")


def _bands(decoder: _webp.WebPAnimDecoder, width: int, height: int, mode: str, n_rows: int) -> Iterator[Image.Image]:
    """The first frame in RGB bands."""
    frame = decoder.get_next()
    if frame is None:
        raise ImageError("damaged or truncated image data")
    rows = np.frombuffer(frame[0], np.uint8).reshape(height, width, 4)
    for top in range(0, height, n_rows):
        band = rows[top : top + n_rows]
        yield flat(Image.fromarray(band)) if mode == "RGBA" else Image.fromarray(np.ascontiguousarray(band[..., :3]))
