"""TIFF files of many bands (satellites, microscopes): three of them, by number, as red, green and blue.

In: the bytes of a file. Out: the bytes of an RGB TIFF, uncompressed, which is then decoded as any other. Numbers count from 1,
as in GDAL and QGIS. 8-bit samples are unchanged. Others have no standard range, so each band is stretched from its 2nd to
its 98th percentile, as QGIS shows it. Read by tifffile (extra ``tiff``).
"""

from __future__ import annotations

import importlib.util
import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data import images
from topwork.data.jpeg import check_memory
from topwork.errors import ImageError, UsageError
from topwork.settings import band_numbers

_LOW, _HIGH = 2, 98  # percentiles
_KINDS = ("uint8", "uint16", "int16", "float32")


def select_bands(data: bytes, bands: str) -> bytes:
    """Three bands of a TIFF as an RGB TIFF; files of other formats are returned unchanged.

    Raises:
        ImageError: the file has no such band, is damaged, or would cost too much.
        UsageError: tifffile is not installed.
    """
    if images.sniff(data[: images.HEAD_BYTES]) != "TIFF":
        return data
    if importlib.util.find_spec("tifffile") is None:
        raise UsageError("--bands requires: pip install 'topwork[tiff]'")
    with images.reading("TIFF"):
        return _encoded(_stretched(_samples(data, bands)))


def _samples(data: bytes, bands: str) -> NDArray[Any]:
    """(H, W, 3) samples as stored."""
    import tifffile

    chosen = band_numbers(bands)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damage is a reject with its reason
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages.first
        pieces = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        if not pieces or any(n < 1 or start + n > len(data) for start, n in pieces):
            raise ImageError("damaged or truncated image data")
        if max(chosen) > page.samplesperpixel:
            raise ImageError(f"has no band {max(chosen)} (--bands {bands}), only {page.samplesperpixel}")
        if str(page.dtype) not in _KINDS:
            raise ImageError(f"bands with {page.bitspersample} bits of this kind are not supported")
        images.check_size(page.imagewidth, page.imagelength)
        check_memory(len(data) + page.nbytes)
        samples: NDArray[Any] = page.asarray()
        planes = 0 if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else -1
    samples = samples.reshape(samples.shape + (1,) * (3 - samples.ndim))  # a single band has no channel axis
    return np.moveaxis(samples, planes, -1)[:, :, [number - 1 for number in chosen]]


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
