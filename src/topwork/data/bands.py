"""TIFF files of many bands (satellites, microscopes): three of them, by number, as red, green and blue.

In: the bytes of a file. Out: the bytes of an RGB TIFF, uncompressed, which is then decoded as any other. Numbers count from 1,
as GDAL and QGIS do. 8-bit samples stay as they are. Others have no agreed brightness, so each band is stretched from its 2nd to
its 98th percentile, as QGIS shows it.

Pillow cannot read such files, but libtiff, which is inside it, can: the samples of a pixel are declared to be pixels of a gray
image that is as many times wider. Limits on size, cost and missing pieces are those of ``images.py``.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data import images
from topwork.errors import ImageError
from topwork.settings import band_numbers

_KEPT = (259, 266, 278, 317, 322, 323)  # compression, fill order, rows per strip, predictor, size of tiles
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANES, _PREDICTOR, _FORMAT = 256, 257, 258, 262, 277, 284, 317, 339
_PIECES = ((324, 325), (273, 279))  # offsets and lengths of tiles, of strips
_DIFFERENCES = 2  # the predictor: each sample is stored as its difference from that of the pixel before
_PLANAR = 2
_DTYPES = {(1, 8): "u1", (1, 16): "u2", (2, 16): "i2", (3, 32): "f4"}  # by sample format and bits
_LOW, _HIGH = 2, 98  # percentiles


def select_bands(data: bytes, bands: str) -> bytes:
    """Three bands of a TIFF as an RGB TIFF; files of other formats as they are.

    Raises:
        ImageError: the file has no such band, is damaged, or would cost too much.
    """
    if images.sniff(data[: images.HEAD_BYTES]) != "TIFF":
        return data
    chosen = band_numbers(bands)
    with images.reading("TIFF"):
        tags = _tags(data)
        n_bands = int(tags.get(_SAMPLES, 1))
        if max(chosen) > n_bands:
            raise ImageError(f"has no band {max(chosen)} (--bands {bands}), only {n_bands}")
        return _encoded(_stretched(_samples(data, tags, chosen, n_bands)))


def _tags(data: bytes) -> Any:
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    file = io.BytesIO(data)
    head = file.read(16 if data[2:3] == b"+" or data[3:4] == b"+" else 8)
    tags = ImageFileDirectory_v2(head)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _samples(data: bytes, tags: Any, chosen: tuple[int, int, int], n_bands: int) -> NDArray[Any]:
    """(H, W, 3) samples as stored."""
    kind = (int(tags.get(_FORMAT, (1,))[0]), int(tags.get(_BITS, (1,))[0]))
    if kind not in _DTYPES or len({*tags.get(_BITS, (1,))}) > 1:
        raise ImageError(f"bands of {kind[1]} bits of this kind are not supported")
    if tags.get(_PLANES, 1) == _PLANAR:
        planes = [_gray(data, tags, kind, 1, part) for part in _planes(tags, chosen, n_bands)]
        return np.stack(planes, -1)
    wide = _gray(data, tags, kind, n_bands, {name: tags[name] for pair in _PIECES for name in pair if name in tags})
    return wide.reshape(len(wide), -1, n_bands)[:, :, [number - 1 for number in chosen]]


def _planes(tags: Any, chosen: tuple[int, int, int], n_bands: int) -> list[dict[int, tuple[int, ...]]]:
    """Offsets and lengths of the pieces of each band."""
    found = []
    for number in chosen:
        part = {}
        for name in (name for pair in _PIECES for name in pair if name in tags):
            n_each = len(tags[name]) // n_bands
            part[name] = tuple(tags[name][(number - 1) * n_each : number * n_each])
        found.append(part)
    return found


def _gray(
    data: bytes, tags: Any, kind: tuple[int, int], n_wide: int, pieces: dict[int, tuple[int, ...]]
) -> NDArray[Any]:
    """(H, W * n_wide) samples of the pieces, read as a gray image."""
    predictor = int(tags.get(_PREDICTOR, 1))
    if n_wide > 1 and predictor not in (1, _DIFFERENCES):
        raise ImageError("interleaved bands with a floating-point predictor are not supported")
    undo = predictor == _DIFFERENCES and n_wide > 1  # libtiff would take the band before for the pixel before
    new: dict[int, tuple[int, ...]] = {name: (tags[name],) for name in _KEPT if name in tags} | pieces
    new |= {_WIDTH: (tags[_WIDTH] * n_wide,), _HEIGHT: (tags[_HEIGHT],), _BITS: (kind[1],), _PHOTOMETRIC: (1,)}
    new |= {_SAMPLES: (1,), _PLANES: (1,), _FORMAT: (kind[0],)}
    if 322 in new:
        new[322] = (new[322][0] * n_wide,)
    if undo:
        new[_PREDICTOR] = (1,)
    found = images.stored_samples(_with_tags(data, new)).astype(_DTYPES[kind], copy=False)
    if undo:
        tile = int(tags.get(322, tags[_WIDTH]))
        whole = found.reshape(len(found), -1, n_wide)
        for start in range(0, whole.shape[1], tile):
            own = whole[:, start : start + tile]
            np.cumsum(own, axis=1, dtype=own.dtype, out=own)
        found = whole.reshape(len(found), -1)
    return found


def _with_tags(data: bytes, tags: dict[int, tuple[int, ...]]) -> bytes:
    """The file with another directory, at its end."""
    order = "<" if data[:1] == b"I" else ">"
    start = len(data) + len(data) % 2
    entries, values, place = b"", b"", start + 2 + 12 * len(tags) + 4
    for name, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        entries += struct.pack(f"{order}HHI", name, 4, len(numbers))
        entries += packed if len(numbers) == 1 else struct.pack(f"{order}I", place + len(values))
        values += packed if len(numbers) > 1 else b""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(f"{order}I", start)
    directory = struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)
    return head + data[8:] + bytes(start - len(data)) + directory + values


def _stretched(samples: NDArray[Any]) -> NDArray[np.uint8]:
    if samples.dtype == np.uint8:
        return samples
    shown = np.zeros(samples.shape, np.uint8)
    for band in range(samples.shape[2]):
        values = samples[:, :, band].astype(np.float32)
        known = np.isfinite(values)
        if known.any():
            low, high = np.percentile(values[known], (_LOW, _HIGH))
            share = (np.where(known, values, low) - low) / max(high - low, 1e-9)
            shown[:, :, band] = np.rint(255 * np.clip(share, 0, 1))
    return shown


def _encoded(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "TIFF")
    return buffer.getvalue()
