"""HEIC, the photographs of phones: read by libheif, where the optional part ``topwork[heic]`` is installed.

In: the bytes of a file that starts like a HEIC. Out: a :class:`~topwork.data.raster.Raster`: the primary image, turned as
the file says (libheif applies the turns itself; the EXIF orientation repeats them and is not applied again), 10 and 12
bits brought to 8, transparent pixels over the background color.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from topwork.data.raster import Raster, check_size, flat
from topwork.errors import ImageError

_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"mif1"})
# The planes of the decoder, the interleaved pixels that it makes of them, and the copy that Python sees.
_BYTES_PER_PIXEL = 16


def is_heic(head: bytes) -> bool:
    """Whether a file that starts so is a HEIC (an AVIF, which has the same container, names its own brand)."""
    return head[4:8] == b"ftyp" and head[8:12] in _BRANDS and b"avif" not in head[8:32]


def read(data: bytes) -> Raster:
    """Reads the boxes of a HEIC; see :func:`topwork.data.images.decode`."""
    try:
        import pillow_heif
    except ImportError:
        from topwork.data.images import NO_HEIC

        raise ImageError(NO_HEIC) from None
    try:
        file = pillow_heif.open_heif(data)
        found = file[file.primary_index]
    except (ValueError, IndexError, SyntaxError, EOFError) as error:
        raise ImageError("damaged or truncated HEIC") from error
    width, height = found.size
    check_size(width, height)
    return Raster(
        format="HEIC",
        width=width,
        height=height,
        mode=str(found.mode),
        bands=lambda n_rows: _bands(found, n_rows),
        working_bytes=2 * len(data) + _BYTES_PER_PIXEL * width * height,
        is_animated=len(file) > 1,
        is_gray=str(found.mode) in ("L", "LA"),
    )


def _bands(found: Any, n_rows: int) -> Iterator[Image.Image]:
    try:
        pixels = np.asarray(found)
    except (ValueError, RuntimeError, EOFError, SyntaxError) as error:
        raise ImageError("damaged or truncated image data") from error
    if pixels.shape[:2] != found.size[::-1]:
        raise ImageError("damaged: the HEIC names two sizes")
    for top in range(0, len(pixels), n_rows):
        band = Image.fromarray(np.ascontiguousarray(pixels[top : top + n_rows]))
        yield flat(band) if band.mode in ("RGBA", "LA") else band
