"""Thumbnails for pages: JPEG data URIs of bounded size and number.

Sections request images from an :class:`Album`, which creates them in threads, the most important ones first. An image
that is gone, has changed since the run, or does not fit the page becomes a :class:`Picture` with the reason.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import simplejpeg

from topwork.blocks import Picture
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.manifest import Manifest
from topwork.data.transforms import Pixels, smaller
from topwork.errors import ImageError

SIDES = ((120, 320), (400, 208), (10**9, 120))  # long side in pixels of each picture, by how many there are
QUALITY = 70
MISTAKE, EXAMPLE, RIGHT_ANSWER = 0, 1, 2  # importance
GONE = Picture(None, problem="file not found")
MAX_CHARACTERS = 6_000_000  # of all data URIs together: a page stays below 10 MB


@dataclass
class Album:
    """The pictures a page asks for.

    Attributes:
        uses: how often the HTML shows each row; 0 if only the script does.
        order: rows by importance (lower is more important).
    """

    uses: dict[int, int] = field(default_factory=dict)
    order: dict[int, int] = field(default_factory=dict)

    def want(self, row: int, importance: int, in_page: bool = True) -> int:
        """Requests one row, and returns it.

        Args:
            importance: rows with a lower number are kept if the page would be too large.
        """
        self.order[row] = min(importance, self.order.get(row, importance))
        self.uses[row] = self.uses.get(row, 0) + in_page
        return row

    def make(self, manifest: Manifest, max_characters: int = MAX_CHARACTERS) -> dict[int, Picture]:
        """Every requested picture, by row."""
        rows = sorted(self.order, key=lambda row: (self.order[row], row))
        side = next(side for n, side in SIDES if len(rows) <= n)
        pictures = dict.fromkeys(rows, Picture(None, problem="omitted to keep this page small"))
        n_characters = 0
        for row, picture in zip(rows, make_pictures(manifest, rows, side), strict=True):
            n_characters += len(picture.source or "") * max(1, self.uses[row])
            if n_characters > max_characters:
                break
            pictures[row] = picture
        return pictures


def make_pictures(manifest: Manifest, rows: Sequence[int], side: int = SIDES[1][1]) -> Iterator[Picture]:
    """The pictures of some images, their long side at most ``side`` pixels; a bad file becomes a ``problem``."""

    def picture(row: int) -> Picture:
        try:
            return _as_picture(*small_jpeg(manifest, row, side))
        except ImageError as error:
            return Picture(None, problem=str(error))

    return in_order(picture, rows)


def encoded(pixels: Pixels, side: int) -> Picture:
    """Pixels (H, W, 3) as a picture whose long side has at most ``side`` pixels."""
    small = smaller(pixels, side)
    return _as_picture(jpeg_of(small), small.shape[1], small.shape[0])


def small_jpeg(manifest: Manifest, row: int, side: int, quality: int = QUALITY) -> tuple[bytes, int, int]:
    """One image as a JPEG whose long side has at most ``side`` pixels, its width and height.

    Raises:
        ImageError: it cannot be shown.
    """
    sample = manifest.samples[row]
    long, short = max(sample.width, sample.height), min(sample.width, sample.height)
    try:
        data = manifest.read(row)
        is_same = hashlib.sha256(data).hexdigest() == sample.content_hash
        pixels = decode(data, min_side=max(1, side * short // long)).pixels if is_same else None
    except (ImageError, OSError, ValueError):
        raise ImageError("file not found") from None
    except MemoryError:
        raise ImageError("not enough memory to show it") from None
    if pixels is None:
        raise ImageError("file has changed")
    small = smaller(pixels, side)
    return jpeg_of(small, quality), small.shape[1], small.shape[0]


def problems(pictures: Mapping[int, Picture]) -> Counter[str]:
    """How many pictures are missing, by reason."""
    return Counter(picture.problem for picture in pictures.values() if picture.source is None)


def jpeg_of(pixels: Pixels, quality: int = QUALITY) -> bytes:
    """Pixels (H, W, 3) as a JPEG."""
    jpeg: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return jpeg


def _as_picture(jpeg: bytes, width: int, height: int) -> Picture:
    return Picture("data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii"), width, height)
