"""Small pictures inside a page: in go rows of a manifest, out come JPEG data URIs of bounded size and number.

Sections ask an :class:`Album` for what they will show; it is made once, on threads, the important ones first. An image
that is gone, has changed since the run, or no longer fits the page becomes a :class:`Picture` with the reason instead.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import simplejpeg

from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.manifest import Manifest
from topwork.data.transforms import resize
from topwork.errors import ImageError

SIDE = 144  # pixels of the long side; shown at 72 CSS pixels or more
SIDE_OF_MANY = 112
MANY = 500
QUALITY = 70
MISTAKE, EXAMPLE, RIGHT_ANSWER = 0, 1, 2  # importance
MAX_CHARACTERS = 10_000_000  # of all data URIs together: a page stays under 15 MB


@dataclass(frozen=True)
class Picture:
    """A small picture: ``source`` is a data URI, or None with the ``problem``. Width and height in pixels."""

    source: str | None
    width: int = 0
    height: int = 0
    problem: str = ""


@dataclass
class Album:
    """The pictures a page asks for.

    Attributes:
        in_page: rows shown by the page's own HTML; others are only for its script.
        order: rows by how early they were wanted (the lower, the more important).
    """

    in_page: set[int] = field(default_factory=set)
    order: dict[int, int] = field(default_factory=dict)

    def want(self, row: int, importance: int, in_page: bool = True) -> int:
        """Asks for one row, and gives it back.

        Args:
            importance: rows with a lower number are kept when the page would grow too large.
        """
        self.order[row] = min(importance, self.order.get(row, importance))
        if in_page:
            self.in_page.add(row)
        return row

    def make(self, manifest: Manifest, max_characters: int = MAX_CHARACTERS) -> dict[int, Picture]:
        """Every picture asked for, by row."""
        rows = sorted(self.order, key=lambda row: (self.order[row], row))
        side = SIDE if len(rows) <= MANY else SIDE_OF_MANY
        pictures: dict[int, Picture] = {}
        n_characters = 0
        for row, picture in zip(rows, in_order(lambda row: make_picture(manifest, row, side), rows), strict=True):
            n_characters += len(picture.source or "")
            fits = n_characters <= max_characters
            pictures[row] = picture if fits else Picture(None, problem="left out to keep this page small")
        return pictures


def make_picture(manifest: Manifest, row: int, side: int = SIDE) -> Picture:
    """The picture of one image, its long side at most ``side`` pixels; never raises for what is wrong with a file."""
    try:
        jpeg, width, height = small_jpeg(manifest, row, side)
    except ImageError as error:
        return Picture(None, problem=str(error))
    return Picture("data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii"), width, height)


def small_jpeg(manifest: Manifest, row: int, side: int, quality: int = QUALITY) -> tuple[bytes, int, int]:
    """One image as a JPEG whose long side has at most ``side`` pixels, its width and height.

    Raises:
        ImageError: it cannot be shown, with the reason.
    """
    sample = manifest.samples[row]
    long, short = max(sample.width, sample.height), min(sample.width, sample.height)
    try:
        data = manifest.read(row)
        is_same = hashlib.sha256(data).hexdigest() == sample.content_hash
        pixels = decode(data, min_side=max(1, side * short // long)).pixels if is_same else None
    except (ImageError, OSError, ValueError):
        raise ImageError("the file is gone") from None
    except MemoryError:
        raise ImageError("not enough memory to show it") from None
    if pixels is None:
        raise ImageError("the file has changed since")
    height, width = pixels.shape[:2]
    scale = min(1.0, side / max(height, width))
    small = resize(pixels, max(1, round(height * scale)), max(1, round(width * scale)))
    jpeg = simplejpeg.encode_jpeg(small, quality=quality, colorspace="RGB", colorsubsampling="420")
    return jpeg, small.shape[1], small.shape[0]


def problems(pictures: Mapping[int, Picture]) -> dict[str, int]:
    """How many pictures are missing, by reason."""
    found: dict[str, int] = {}
    for picture in pictures.values():
        if picture.source is None:
            found[picture.problem] = found.get(picture.problem, 0) + 1
    return found
