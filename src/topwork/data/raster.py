"""What a file format reader hands over, the limits it keeps, and how rows become the finished pixels.

In: a :class:`Raster` from ``png.py``, ``gif.py``, ``webp.py``, ``bmp.py`` or ``tiff.py``: the header of a file, and its
rows on demand. Out: :class:`Decoded`, upright RGB. Bytes of files are not read here, and JPEG comes here only to be
turned upright, because its decoder makes RGB by itself.

Rows travel in bands of a few megapixels, so that converting, flattening and shrinking never hold a second full image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from topwork.errors import ImageError

if TYPE_CHECKING:  # JPEG needs no Pillow, and a shipped model answers its first JPEG without importing it
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
Bands = Callable[[int], "Iterator[Image]"]

MAX_PIXELS = 120_000_000  # width × height as the header says; more is rejected before anything is decoded
MAX_SIDE = 1_000_000  # pixels; keeps one row, the smallest band there is, at a few megabytes
MAX_MEMORY_BYTES = 1_000_000_000  # what one file may cost, its own bytes and the finished pixels included
MAX_PARTS = 500_000  # chunks, blocks or strips of one file; each costs about a microsecond of Python
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
_BAND_PIXELS = 4_000_000
_BAND_BYTES_PER_PIXEL = 12  # a band, the same over the background, and its bytes
_MIN_SHRUNK_SIDE = 32  # pixels; a band is as many rows as one shrunk row takes, so they must not be too many
_INVERSE_TURN = {6: 8, 8: 6}  # the other six orientations are their own inverses


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What a file says about its image.

    Attributes:
        format: ``JPEG``, ``PNG``, ``WEBP``, ``GIF``, ``BMP`` or ``TIFF``, by content.
        width, height: pixels as displayed: upright, and before any shrinking.
        mode: colors as stored, in Pillow's words: ``1 L LA I;16 P RGB RGBA CMYK YCbCr LAB``.
        orientation: EXIF orientation 1..8; 1 where there is none or it is broken.
        is_animated: the file holds further frames or pages; the first is the image.
        is_gray: stored as gray: one color channel, or a palette of nothing but grays.
    """

    format: str
    width: int
    height: int
    mode: str
    orientation: int
    is_animated: bool
    is_gray: bool


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """An image as a person sees it: ``pixels`` uint8 (H, W, 3) RGB, C-contiguous, upright, over ``BACKGROUND``."""

    pixels: Pixels
    facts: ImageFacts


@dataclass(frozen=True)
class Raster:
    """A file whose header was read and checked; its rows are decoded when asked for.

    Attributes:
        width, height: pixels as stored, before turning.
        bands: called with a number of rows, yields Pillow images of mode ``L`` or ``RGB`` from top to bottom, each with
            that many rows, except that the last may have fewer.
        working_bytes: largest memory that decoding holds beside the finished pixels, the file's own bytes included.
    """

    format: str
    width: int
    height: int
    mode: str
    bands: Bands
    working_bytes: int
    orientation: int = 1
    is_animated: bool = False
    is_gray: bool = False

    @property
    def facts(self) -> ImageFacts:
        """The facts of the file, as displayed."""
        width, height = (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)
        return ImageFacts(self.format, width, height, self.mode, self.orientation, self.is_animated, self.is_gray)


def check_size(width: int, height: int) -> None:
    """Raises ImageError for an image that has no pixels or too many."""
    if width < 1 or height < 1:
        raise ImageError(f"has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"too large: {width} x {height} is more than {MAX_PIXELS // 10**6} million pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"too large: {width} x {height} has a side of more than {MAX_SIDE:,} pixels")


def check_memory(n_bytes: int) -> None:
    """Raises ImageError if decoding would hold more than one file may cost."""
    if n_bytes > MAX_MEMORY_BYTES:
        raise ImageError(f"too large: decoding it would take {n_bytes / 1e9:.1f} GB of memory, and the limit is 1 GB")


def finish(raster: Raster, min_side: int | None) -> Decoded:
    """Decodes, shrinks and turns a raster.

    Shrinking averages boxes of 2, 4, 8 ... pixels a side, like the scaled decoding of JPEG, while the short side keeps
    at least ``min_side`` pixels.
    """
    factor = _shrink_factor(raster, min_side)
    width, height = -(-raster.width // factor), -(-raster.height // factor)
    band_pixels = min(raster.width * raster.height, _BAND_PIXELS)
    check_memory(raster.working_bytes + _BAND_BYTES_PER_PIXEL * band_pixels + width * height * 3)
    shape = (width, height, 3) if raster.orientation >= 5 else (height, width, 3)
    pixels = np.empty(shape, np.uint8)
    as_stored = upright(pixels, _INVERSE_TURN.get(raster.orientation, raster.orientation))
    top = 0
    for band in raster.bands(max(1, _BAND_PIXELS // (raster.width * factor)) * factor):
        small = band.reduce(factor) if factor > 1 else band
        rows = np.asarray(small if small.mode == "RGB" else small.convert("RGB"))
        _copy(rows, as_stored[top : top + len(rows)])
        top += len(rows)
    if top != height:
        raise ImageError("truncated: rows are missing")
    return Decoded(pixels, raster.facts)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """A view of stored pixels (H, W, 3) as EXIF orientation 1..8 says to display them."""
    if orientation in (2, 3, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7):
        pixels = pixels[::-1]
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation == 6:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation == 8 else pixels


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """Stored pixels, C-contiguous, as EXIF orientation 1..8 says to display them."""
    if orientation == 1:
        return pixels
    view = upright(pixels, orientation)
    result = np.empty(view.shape, np.uint8)
    _copy(view, result)
    return result


def in_bands(images: Iterable[Image], n_rows: int) -> Iterator[Image]:
    """Cuts a stack of images of one width and mode into bands of ``n_rows`` rows; the last may have fewer."""
    from PIL import Image

    rest: Image.Image | None = None
    for part in images:
        image = part
        if rest is not None and rest.height == n_rows:
            yield rest
        elif rest is not None:
            image = Image.new(part.mode, (part.width, rest.height + part.height))
            image.paste(rest)
            image.paste(part, (0, rest.height))
        whole = image.height // n_rows * n_rows
        if whole == 0 or image.height == n_rows:
            rest = image
            continue
        for top in range(0, whole, n_rows):
            yield image.crop((0, top, image.width, top + n_rows))
        rest = image.crop((0, whole, image.width, image.height)) if whole < image.height else None
    if rest is not None:
        yield rest


def flat(image: Image) -> Image:
    """An image with an alpha channel, of mode ``RGBA`` or ``LA``, laid over ``BACKGROUND``: mode ``RGB``."""
    from PIL import Image

    over = Image.new("RGB", image.size, BACKGROUND)
    over.paste(image, mask=image.getchannel("A"))
    return over


def gray_levels(maximum: int, limit: int = 65535) -> NDArray[np.uint8]:
    """The 8-bit gray of each 16-bit value: a table of 65536.

    The whole range 0..``limit`` of the sample type maps to 0..255. Cameras and microscopes also put 8, 10 or 12 bits
    into 16 without scaling, which would look black: where the largest value of the image is below an eighth of the
    range, the range ends at the smallest of 255, 511, 1023 ... that holds it. A file is thus always read the same way.
    """
    if maximum < (limit + 1) // 8:
        limit = max(255, (1 << maximum.bit_length()) - 1)
    levels = np.arange(65536, dtype=np.uint32)
    return np.minimum((levels * 255 + limit // 2) // limit, 255).astype(np.uint8)


def is_gray_palette(palette: NDArray[np.uint8]) -> bool:
    """Whether a palette (n, 3) holds nothing but grays."""
    return bool((palette == palette[:, :1]).all())


def _shrink_factor(raster: Raster, min_side: int | None) -> int:
    if min_side is None:
        return 1
    factor, short = 1, min(raster.width, raster.height)
    while -(-short // (2 * factor)) >= max(min_side, _MIN_SHRUNK_SIDE):
        factor *= 2
    return factor


def _copy(source: Pixels, target: Pixels) -> None:
    """Copies channel by channel: for turned images numpy is four times faster so, 0.8 for 3.6 ms a megapixel."""
    if source.flags.c_contiguous and target.flags.c_contiguous:
        target[...] = source
        return
    for channel in range(3):
        target[:, :, channel] = source[:, :, channel]
