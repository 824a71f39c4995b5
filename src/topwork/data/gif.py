"""GIF: blocks are read here, the first frame's pixels by Pillow's decoder, which sees nothing else.

In: the bytes of a file that starts like a GIF. Out: a :class:`~topwork.data.raster.Raster`: the first frame on its
screen, over the background color where it is transparent or does not reach, as a browser shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from topwork.data.raster import BACKGROUND, Raster, check_size, is_gray_palette
from topwork.errors import ImageError

_EXTENSION, _FRAME, _TRAILER = 0x21, 0x2C, 0x3B
_GRAPHIC_CONTROL = 0xF9
_MAX_BLOCKS = 2_000_000  # half a gigabyte in full blocks
_REASONS = {"not enough image data": "truncated: the image data end too early"}  # Pillow's words


@dataclass(frozen=True)
class _Frame:
    """The first frame: its box on the screen in pixels, its palette, and where its compressed data are."""

    left: int
    top: int
    width: int
    height: int
    palette: bytes
    transparent: int | None
    is_interlaced: bool
    code_bits: int
    start: int
    end: int


def read(data: bytes) -> Raster:
    """Reads the blocks of a GIF; see :func:`topwork.data.images.decode`."""
    try:
        frame, is_animated = _read_blocks(data)
    except IndexError:
        raise ImageError("truncated: the file ends within a block") from None
    width = max(int.from_bytes(data[6:8], "little"), frame.left + frame.width)
    height = max(int.from_bytes(data[8:10], "little"), frame.top + frame.height)
    check_size(width, height)
    check_size(frame.width, frame.height)
    is_gray = is_gray_palette(np.frombuffer(frame.palette, np.uint8).reshape(-1, 3))
    return Raster(
        format="GIF",
        width=width,
        height=height,
        mode="L" if is_gray else "P",
        bands=lambda n_rows: _bands(data, frame, width, height, n_rows),
        working_bytes=len(data) + frame.width * frame.height,
        is_animated=is_animated,
        is_gray=is_gray,
    )


def _read_blocks(data: bytes) -> tuple[_Frame, bool]:
    """The first frame, and whether there are more. Every block must be whole; only the closing byte may be missing."""
    n_colors = 2 << (data[10] & 7) if data[10] & 128 else 0
    palette = data[13 : 13 + 3 * n_colors]
    transparent, frame, n_frames = None, None, 0
    for start, end in _blocks(data, 13 + 3 * n_colors):
        if data[start] == _FRAME:
            frame = frame or _read_frame(data, start, end, palette, transparent)
            n_frames += 1
        elif frame is None and data[start + 1] == _GRAPHIC_CONTROL and data[start + 2] >= 4:
            transparent = data[start + 6] if data[start + 3] & 1 else None
    if frame is None:
        raise ImageError("truncated: there is no frame")
    return frame, n_frames > 1


def _blocks(data: bytes, at: int) -> Iterator[tuple[int, int]]:
    """Start and end of each extension and frame, with their chains of data blocks."""
    n_left = _MAX_BLOCKS
    while at < len(data):
        if data[at] not in (_EXTENSION, _FRAME):
            if data[at]:
                return  # the closing byte, or bytes that mean nothing
            at += 1
            continue
        start = at
        at += 2 if data[at] == _EXTENSION else 11 + _palette_bytes(data[at + 9])
        while length := data[at]:
            at += 1 + length
            n_left -= 1
            if not n_left:
                raise ImageError("damaged: too many blocks")
        at += 1
        yield start, at


def _read_frame(data: bytes, start: int, end: int, palette: bytes, transparent: int | None) -> _Frame:
    left, top, width, height = (int.from_bytes(data[start + i : start + i + 2], "little") for i in (1, 3, 5, 7))
    flags = data[start + 9]
    n_bytes = _palette_bytes(flags)
    palette = data[start + 10 : start + 10 + n_bytes] or palette
    if not palette:
        palette = bytes(value for gray in range(256) for value in (gray, gray, gray))
    code_bits = data[start + 10 + n_bytes]
    if not 1 <= code_bits <= 8:
        raise ImageError("damaged: a code size that no GIF can have")
    return _Frame(
        left, top, width, height, palette, transparent, bool(flags & 64), code_bits, start + 11 + n_bytes, end
    )


def _palette_bytes(flags: int) -> int:
    return 3 * (2 << (flags & 7)) if flags & 128 else 0


# ---- pixels


def _bands(data: bytes, frame: _Frame, width: int, height: int, n_rows: int) -> Iterator[Image.Image]:
    """The screen in RGB bands."""
    coded = memoryview(data)[frame.start : frame.end]
    try:
        image = Image.frombytes("P", (frame.width, frame.height), coded, "gif", frame.code_bits, frame.is_interlaced)
    except ValueError as error:
        raise ImageError(_REASONS.get(str(error), "damaged image data")) from error
    image.putpalette(_flat_palette(frame))
    for top in range(0, height, n_rows):
        n = min(n_rows, height - top)
        if (frame.width, frame.height) == (width, height):
            yield (image if n == height else image.crop((0, top, width, top + n))).convert("RGB")
            continue
        band = Image.new("RGB", (width, n), BACKGROUND)
        first, last = max(top, frame.top), min(top + n, frame.top + frame.height)
        if first < last:
            part = image.crop((0, first - frame.top, frame.width, last - frame.top))
            band.paste(part.convert("RGB"), (frame.left, first - top))
        yield band


def _flat_palette(frame: _Frame) -> bytes:
    """All 256 entries; those the file does not name are black, and the transparent one is the background."""
    palette = bytearray(frame.palette.ljust(768, b"\0"))
    if frame.transparent is not None:
        palette[3 * frame.transparent : 3 * frame.transparent + 3] = bytes(BACKGROUND)
    return bytes(palette)
