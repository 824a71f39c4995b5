"""BMP: header, palette and rows are all read here, with numpy.

In: the bytes of a file that starts like a BMP. Out: a :class:`~topwork.data.raster.Raster`.

Read here because Pillow decodes run-length coding one Python byte at a time, knows only a few arrangements of color
bits, and would hold a second full image where rows can be taken straight from the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from struct import unpack_from

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from topwork.data.raster import Raster, check_size, flat, is_gray_palette
from topwork.errors import ImageError

_HEADER_SIZES = frozenset({12, 40, 52, 56, 64, 108, 124})
_RAW, _RLE8, _RLE4, _MASKS, _ALPHA_MASKS = 0, 1, 2, 3, 6
_END_OF_ROW, _END, _JUMP = 0, 1, 2  # what a run of length 0 means
_DEFAULT_MASKS = {16: (0x7C00, 0x3E0, 0x1F, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}
_MAX_RUN_BYTES = 12_000_000  # 5 s: a run takes at least two bytes, and 0.8 microseconds whatever it draws


@dataclass(frozen=True)
class _Header:
    width: int
    height: int
    is_top_down: bool
    bits: int  # a pixel
    compression: int
    palette: NDArray[np.uint8]  # (n, 3) RGB; empty above 8 bits
    masks: tuple[int, int, int, int]  # red, green, blue, alpha
    start: int  # offset of the pixels

    @property
    def row_bytes(self) -> int:
        return (self.width * self.bits + 31) // 32 * 4


def read(data: bytes) -> Raster:
    """Reads the header of a BMP; see :func:`topwork.data.images.decode`."""
    header = _read_header(data)
    is_coded = header.compression in (_RLE8, _RLE4)
    if is_coded and len(data) - header.start > _MAX_RUN_BYTES:
        raise ImageError("too costly to decode: the run-length coding is too long")
    if not is_coded and len(data) < header.start + header.row_bytes * (header.height - 1) + (
        (header.width * header.bits + 7) // 8  # the padding of the last row may be missing
    ):
        raise ImageError("truncated: rows are missing")
    is_gray = header.bits <= 8 and is_gray_palette(header.palette)
    return Raster(
        format="BMP",
        width=header.width,
        height=header.height,
        mode=_mode(header, is_gray),
        bands=lambda n_rows: _bands(data, header, n_rows),
        working_bytes=len(data) + (2 * header.width * header.height if is_coded else 0),
        is_gray=is_gray,
    )


def _mode(header: _Header, is_gray: bool) -> str:
    if header.bits > 8:
        return "RGBA" if header.masks[3] else "RGB"
    return "P" if not is_gray else "1" if header.bits == 1 else "L"


def _read_header(data: bytes) -> _Header:
    (start,) = unpack_from("<I", data, 10)
    (size,) = unpack_from("<I", data, 14)
    if size == 12:
        width, height, _, bits = unpack_from("<HHHH", data, 18)
        compression, n_colors, entry = _RAW, 0, 3
    else:
        width, height, _, bits, compression, _, _, _, n_colors = unpack_from("<iiHHIIiiI", data, 18)
        entry = 4
    check_size(width, abs(height))
    _check_layout(size, bits, compression, height)
    after = 14 + size
    masks = _DEFAULT_MASKS.get(bits, (0, 0, 0, 0))
    if compression in (_MASKS, _ALPHA_MASKS) and bits > 8:
        has_alpha = size >= 56 or compression == _ALPHA_MASKS
        red, green, blue = unpack_from("<III", data, 54)
        masks = red, green, blue, unpack_from("<I", data, 66)[0] if has_alpha else 0
        after += (16 if has_alpha else 12) if size == 40 else 0
    palette = np.zeros((0, 3), np.uint8)
    if bits <= 8:
        n_colors = min(n_colors or 256, 1 << bits)
        if after < start < after + n_colors * entry:  # a shorter palette than the header says
            n_colors = (start - after) // entry
        palette = np.frombuffer(data, np.uint8, n_colors * entry, after).reshape(-1, entry)[:, 2::-1]
        after += n_colors * entry
    return _Header(width, abs(height), height < 0, bits, compression, palette, masks, start or after)


def _check_layout(size: int, bits: int, compression: int, height: int) -> None:
    fits = {
        _RAW: bits in (1, 2, 4, 8, 16, 24, 32),
        _RLE8: bits == 8 and height > 0,
        _RLE4: bits == 4 and height > 0,
        _MASKS: bits in (16, 32) and size != 64,
        _ALPHA_MASKS: bits in (16, 32),
    }
    if size not in _HEADER_SIZES or not fits.get(compression, False):
        raise ImageError(f"BMP with {bits} bits a pixel and compression {compression} is not supported")


# ---- pixels


def _bands(data: bytes, header: _Header, n_rows: int) -> Iterator[Image.Image]:
    """The image in bands of mode RGB, from top to bottom."""
    if header.compression in (_RLE8, _RLE4):
        rows = _unpack_runs(data, header)
    else:
        rows = _raw_rows(data, header)
    alpha = header.masks[3] and _has_alpha(rows, header)
    for top in range(0, header.height, n_rows):
        band = rows[top : top + n_rows]
        if header.bits <= 8:
            yield Image.fromarray(header.palette[np.minimum(_indices(band, header), len(header.palette) - 1)])
        elif header.bits == 24:
            colors = band[:, : 3 * header.width].reshape(len(band), header.width, 3)
            yield Image.fromarray(np.ascontiguousarray(colors[..., ::-1]))
        else:
            colors = _masked(band, header, header.masks if alpha else header.masks[:3])
            yield flat(Image.fromarray(colors)) if alpha else Image.fromarray(colors)


def _raw_rows(data: bytes, header: _Header) -> NDArray[np.uint8]:
    """The bytes of each row from top to bottom (H, row bytes), as a view of the file."""
    n_bytes = header.row_bytes * header.height
    stored = np.frombuffer(data, np.uint8, offset=header.start)[:n_bytes]
    if len(stored) < n_bytes:  # without the padding of the last row
        stored = np.append(stored, np.zeros(n_bytes - len(stored), np.uint8))
    rows = stored.reshape(header.height, header.row_bytes)
    return rows if header.is_top_down else rows[::-1]


def _indices(band: NDArray[np.uint8], header: _Header) -> NDArray[np.uint8]:
    """Palette indices (h, W) of packed rows; those of run-length coding come one to a byte."""
    if header.bits == 8 or header.compression in (_RLE8, _RLE4):
        return band[:, : header.width]
    shifts = np.arange(8 - header.bits, -1, -header.bits, dtype=np.uint8)
    spread = (band[:, :, np.newaxis] >> shifts) & np.uint8((1 << header.bits) - 1)
    return spread.reshape(len(band), -1)[:, : header.width]


def _has_alpha(rows: NDArray[np.uint8], header: _Header) -> bool:
    """Whether any pixel has alpha: many writers name an alpha mask and leave it zero, meaning opaque."""
    return any((_values(rows[top : top + 256], header) & header.masks[3]).any() for top in range(0, header.height, 256))


def _values(band: NDArray[np.uint8], header: _Header) -> NDArray[np.uint32]:
    kind = "<u2" if header.bits == 16 else "<u4"
    values = np.ascontiguousarray(band).view(kind)[:, : header.width]
    return values.astype(np.uint32)


def _masked(band: NDArray[np.uint8], header: _Header, masks: tuple[int, ...]) -> NDArray[np.uint8]:
    """The colors (h, W, n) that the masks pick from each pixel, scaled to 0..255."""
    values = _values(band, header)
    colors = np.empty((*values.shape, len(masks)), np.uint8)
    for channel, mask in enumerate(masks):
        lowest = mask & -mask
        largest = mask // lowest if mask else 0
        if not largest:
            colors[..., channel] = 0
            continue
        level = (values & np.uint32(mask)) // np.uint32(lowest)
        if largest != 255:
            level = (level.astype(np.uint64) * 255 + largest // 2) // largest
        colors[..., channel] = level
    return colors


def _unpack_runs(data: bytes, header: _Header) -> NDArray[np.uint8]:
    """Palette indices (H, W) of a run-length coded image, from top to bottom. Pixels that are jumped over are 0."""
    pixels = bytearray(header.width * header.height)
    if not _draw_runs(data, header, pixels):
        raise ImageError("truncated: rows are missing")
    return np.frombuffer(pixels, np.uint8).reshape(header.height, header.width)[::-1]


def _draw_runs(data: bytes, header: _Header, pixels: bytearray) -> bool:
    """Draws all runs, the lowest row first, and returns whether they reach the last row.

    Written for speed: a file may hold millions of runs, and each pass through this loop takes 0.8 microseconds.
    """
    width, last, at, x, y, n_bytes = header.width, header.height - 1, header.start, 0, 0, len(data)
    wide = header.compression == _RLE8
    longest = [bytes([value] if wide else [value >> 4, value & 15]) * 255 for value in range(256)]
    while y <= last:
        if at + 2 > n_bytes:
            return y == last and x >= width
        count, value = data[at], data[at + 1]
        at += 2
        if count or value > _JUMP:
            if count:
                run = longest[value][:count]
            else:
                run, at = _read_literal(data, at, value, wide=wide)
            if x + len(run) > width:
                run = run[: max(0, width - x)]
            pixels[y * width + x : y * width + x + len(run)] = run
            x += len(run)
        elif value == _END_OF_ROW:
            x, y = 0, y + 1
        elif value == _END or at + 2 > n_bytes:
            return y == last and value == _END
        else:
            x, y, at = x + data[at], y + data[at + 1], at + 2
    return True


def _read_literal(data: bytes, at: int, n_pixels: int, *, wide: bool) -> tuple[bytes, int]:
    """Palette indices that are spelled out, and the offset after them and their padding."""
    n_bytes = n_pixels if wide else (n_pixels + 1) // 2
    coded = data[at : at + n_bytes]
    if not wide:
        coded = bytes(nibble for byte in coded for nibble in (byte >> 4, byte & 15))
    return coded[:n_pixels], at + n_bytes + n_bytes % 2
