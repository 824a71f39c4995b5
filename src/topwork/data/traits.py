"""Image statistics: compression, camera, brightness, sharpness, border, coarse colors.

In: the bytes of a file and its standard view (the whole image squashed to 224 pixels). Out: :class:`Traits`, and for many
images a :class:`TraitTable` of arrays. They are computed when an image is decoded and cached by content hash, so the
scan report, the shortcut check and the search for near duplicates need no second pass over the pixels.

A large photo that was decoded at a reduced scale may give slightly other values than the same photo decoded in full;
nothing here decides about single images so finely that it matters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from topwork.data.jpeg import camera_of, segments
from topwork.data.shards import Shards, matrix_column, matrix_of, room_for
from topwork.data.transforms import InputSpec, Pixels, resize
from topwork.errors import ImageError

TRAITS_VERSION = "5"  # bump when the traits of an image or their storage format change
VIEW = InputSpec(height=224, width=224)
THUMB_SIDE = 32
COLOR_SIDE = 8
NUMBERS = (
    "jpeg_level",  # mean of the luma quantization table, 0 if there is none: high means strongly compressed
    "jpeg_subsampling",  # pixels that share a color sample: 1, 2 or 4; 0 if it is not a JPEG
    "jpeg_progressive",
    "brightness",  # mean gray level, 0..255
    "contrast",  # standard deviation of the green channel
    "sharpness",  # variance of the Laplacian by the variance of the green channel; low means blurred
    "border_red",  # mean of the outermost pixels, 0..255
    "border_green",
    "border_blue",
    "border_spread",  # standard deviation of the outermost pixels around that mean; 0 is a frame of one color
)
_BORDER = 4  # pixels of the standard view, 1.8% of its side
_SHARD_ROWS = 4096
_PARTS = np.repeat(np.eye(COLOR_SIDE, dtype=np.float32), THUMB_SIDE // COLOR_SIDE, axis=1)  # whole numbers: exact
_BLOB_BYTES = THUMB_SIDE**2 + COLOR_SIDE**2 * 3


@dataclass(frozen=True, slots=True, eq=False)
class Traits:
    """Traits of one image.

    Attributes:
        camera: maker and model from EXIF, "" if missing.
        numbers: (len(NUMBERS),) float32.
        thumb: uint8 (32, 32) gray levels of the whole image.
        colors: uint8 (8, 8, 3) mean colors of its parts.
    """

    camera: str
    numbers: NDArray[np.float32]
    thumb: NDArray[np.uint8]
    colors: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class TraitTable:
    """Traits of N images as arrays, in the order that was asked for."""

    cameras: tuple[str, ...]
    numbers: NDArray[np.float32]
    thumbs: NDArray[np.uint8]
    colors: NDArray[np.uint8]

    def column(self, name: str) -> NDArray[np.float32]:
        """(N,) one of NUMBERS."""
        return self.numbers[:, NUMBERS.index(name)]


def traits_of(data: bytes, view: Pixels) -> Traits:
    """Traits from the bytes of a file and its standard view, uint8 (224, 224, 3)."""
    header = jpeg_header(data)
    # Green approximates gray, and every eighth row is enough for a variance.
    rows = view.reshape(VIEW.height // 8, 8, VIEW.width, 3)[:, 2:5, :, 1].astype(np.int16)
    above, center, below = rows[:, 0], rows[:, 1], rows[:, 2]
    laplacian = 4 * center[:, 1:-1] - above[:, 1:-1] - below[:, 1:-1] - center[:, :-2] - center[:, 2:]
    variance, roughness = _variance(center), _variance(laplacian)
    border_mean, border_spread = _border(view)
    small = resize(view, THUMB_SIDE, THUMB_SIDE)
    colors = (_PARTS @ (_PARTS @ small.reshape(THUMB_SIDE, -1)).reshape(COLOR_SIDE, THUMB_SIDE, 3)).astype(np.int32)
    colors //= (THUMB_SIDE // COLOR_SIDE) ** 2
    thumb = (small @ np.array([77, 150, 29], np.uint16)) >> 8
    numbers = [
        header.level,
        header.subsampling,
        header.progressive,
        float(thumb.mean()),
        variance**0.5,
        roughness / max(variance, 1.0),
        *border_mean,
        border_spread,
    ]
    return Traits(header.camera, np.array(numbers, np.float32), thumb.astype(np.uint8), colors.astype(np.uint8))


class TraitStore(Shards):
    """Stored traits, by content hash.

    Args:
        cache: the cache folder.
    """

    def __init__(self, cache: Path) -> None:
        super().__init__(cache / f"traits-{TRAITS_VERSION}")
        self._new: dict[str, Traits] = {}

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._new or super().__contains__(content_hash)

    def put(self, content_hash: str, traits: Traits) -> None:
        """Adds the traits of one image; written periodically, and by ``flush``."""
        if content_hash not in self:
            if not self._new:
                self.check_writable()
            self._new[content_hash] = traits
            if len(self._new) >= _SHARD_ROWS:
                self.flush()

    def flush(self) -> None:
        """Writes what is new as one shard."""
        if self._new:
            rows = self._new.values()
            blobs = np.stack([np.concatenate([row.thumb.ravel(), row.colors.ravel()]) for row in rows])
            columns = {
                "camera": pa.array([row.camera for row in rows], pa.string()),
                "numbers": matrix_column(np.stack([row.numbers for row in rows])),
                # Bytes, since Parquet keeps each uint8 of a list in four.
                "blob": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(_BLOB_BYTES), len(blobs), [None, pa.py_buffer(blobs)]
                ),
            }
            self.append(list(self._new), columns)
            self._new = {}

    def load(self, hashes: Sequence[str]) -> TraitTable:
        """The traits of these contents, in this order; zeros and no camera for unknown ones."""
        self.flush()
        cameras = np.full(len(hashes), "", object)
        numbers = np.zeros((len(hashes), len(NUMBERS)), np.float32)
        blobs = room_for((len(hashes), _BLOB_BYTES), np.uint8)
        blobs[:] = 0
        for positions, table, rows in self.read(hashes, ["camera", "numbers", "blob"]):
            cameras[positions] = np.array(table["camera"].to_pylist(), object)[rows]
            numbers[positions] = matrix_of(table["numbers"])[rows]
            bytes_of = np.frombuffer(b"".join(table["blob"].to_pylist()), np.uint8).reshape(-1, _BLOB_BYTES)
            blobs[positions] = bytes_of[rows]
        thumbs = blobs[:, : THUMB_SIDE**2].reshape(-1, THUMB_SIDE, THUMB_SIDE)
        colors = blobs[:, THUMB_SIDE**2 :].reshape(-1, COLOR_SIDE, COLOR_SIDE, 3)
        return TraitTable(tuple(cameras), numbers, thumbs, colors)


# ---- headers


@dataclass
class JpegHeader:
    """What a JPEG says before its pixels; all zero for other formats. Damaged metadata count as none."""

    level: float = 0.0
    subsampling: int = 0
    progressive: bool = False
    camera: str = ""


def jpeg_header(data: bytes) -> JpegHeader:
    """Compression and camera of a JPEG file."""
    found = JpegHeader()
    if data[:3] != b"\xff\xd8\xff":
        return found
    with contextlib.suppress(IndexError, ValueError, ImageError):
        for marker, start, end in segments(data):
            body = data[start + 4 : end]
            if marker == 0xDB and not found.level:
                found.level = _luma_level(body)
            elif marker in (0xC0, 0xC1, 0xC2):
                found.subsampling, found.progressive = _subsampling(body), marker == 0xC2
            elif marker == 0xE1 and body[:6] == b"Exif\0\0" and not found.camera:
                found.camera = camera_of(body[6:])
    return found


def _luma_level(body: bytes) -> float:
    wide = body[0] >> 4
    table = np.frombuffer(body[1 : 1 + 64 * (1 + wide)], ">u2" if wide else np.uint8)
    return float(table.mean()) if len(table) else 0.0


def _subsampling(body: bytes) -> int:
    """Luma samples for each chroma sample; 1 for gray images."""
    if body[5] < 3:
        return 1
    luma, chroma = body[7], body[10]
    across, down = (luma >> 4) / max(1, chroma >> 4), (luma & 15) / max(1, chroma & 15)
    return int(across * down)


# ---- arrays


def _variance(values: NDArray[np.int16]) -> float:
    """The variance; sums of squares as dot products are five times as fast as ``np.var``."""
    flat = values.astype(np.float32).ravel()
    flat -= flat.mean(dtype=np.float64).astype(np.float32)
    return float(flat @ flat) / len(flat)


def _border(view: Pixels) -> tuple[NDArray[np.float64], float]:
    """Mean color of the outermost pixels, and their standard deviation around it over all three channels."""
    n = _BORDER
    sides = (view[:n], view[-n:], view[n:-n, :n], view[n:-n, -n:])
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    flat = border.ravel().astype(np.int32)
    # All sums are whole and small enough for their types, so they are exact: a frame of one color has spread 0.
    n_pixels, total = len(border), (np.ones(len(border), np.float32) @ border.astype(np.float32)).astype(np.float64)
    spread = n_pixels * float(flat @ flat) - total @ total
    return total / n_pixels, float(spread / 3) ** 0.5 / n_pixels
