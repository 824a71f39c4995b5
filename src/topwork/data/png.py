"""PNG: chunks are read here, pixels by Pillow's zip decoder, which never sees the metadata.

In: the bytes of a file that starts like a PNG. Out: a :class:`~topwork.data.raster.Raster`.

Reading the chunks here means that no text, profile or animation chunk, however broken or bloated, costs anything or
loses sound pixels; that the checksum of every chunk of pixels is checked; and that transparency is right at every bit
depth. Of an animated PNG the default image is the image. Embedded color profiles and gamma are not applied.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import Struct

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from topwork.data.exif import orientation_of
from topwork.data.raster import BACKGROUND, MAX_PARTS, Raster, check_size, flat, gray_levels, in_bands, is_gray_palette
from topwork.errors import ImageError

_CHUNK = Struct(">I4s")
_CHECKSUM = Struct(">I")
_HEADER = Struct(">IIBBBBB")
_USED_IF_SOUND = frozenset({b"tRNS", b"eXIf", b"acTL"})
_GRAY, _RGB, _PALETTE, _GRAY_ALPHA, _RGB_ALPHA = 0, 2, 3, 4, 6
_CHANNELS = {_GRAY: 1, _RGB: 3, _PALETTE: 1, _GRAY_ALPHA: 2, _RGB_ALPHA: 4}
# (color type, bits) to Pillow's mode of the decoded image and of the file's rows
_PILLOW_MODES = {
    (_GRAY, 1): ("1", "1"),
    (_GRAY, 2): ("L", "L;2"),
    (_GRAY, 4): ("L", "L;4"),
    (_GRAY, 8): ("L", "L"),
    (_GRAY, 16): ("I;16", "I;16B"),
    (_RGB, 8): ("RGB", "RGB"),
    (_RGB, 16): ("RGB", "RGB;16B"),
    (_PALETTE, 1): ("P", "P;1"),
    (_PALETTE, 2): ("P", "P;2"),
    (_PALETTE, 4): ("P", "P;4"),
    (_PALETTE, 8): ("P", "P"),
    (_GRAY_ALPHA, 8): ("LA", "LA"),
    (_GRAY_ALPHA, 16): ("RGBA", "LA;16B"),
    (_RGB_ALPHA, 8): ("RGBA", "RGBA"),
    (_RGB_ALPHA, 16): ("RGBA", "RGBA;16B"),
}
_BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2}  # of Pillow's image; 4 for all others
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # Adam7


@dataclass
class _Chunks:
    """What the chunks of one file say."""

    width: int = 0
    height: int = 0
    bits: int = 0
    color: int = 0
    is_interlaced: bool = False
    is_animated: bool = False
    palette: bytes = b""
    transparency: bytes = b""
    exif: bytes = b""
    pixels: list[memoryview] = field(default_factory=list)


def read(data: bytes) -> Raster:
    """Reads the chunks of a PNG; see :func:`topwork.data.images.decode`."""
    chunks = _read_chunks(data)
    check_size(chunks.width, chunks.height)
    if chunks.color == _PALETTE and not chunks.palette:
        raise ImageError("damaged: the palette is missing")
    mode, _ = _PILLOW_MODES[chunks.color, chunks.bits]
    mode = "LA" if chunks.color == _GRAY_ALPHA else mode
    return Raster(
        format="PNG",
        width=chunks.width,
        height=chunks.height,
        mode=mode,
        bands=lambda n_rows: _bands(chunks, n_rows),
        working_bytes=len(data) + chunks.width * chunks.height * _BYTES_PER_PIXEL.get(mode, 4),
        orientation=orientation_of(chunks.exif),
        is_animated=chunks.is_animated,
        is_gray=chunks.color in (_GRAY, _GRAY_ALPHA)
        or (chunks.color == _PALETTE and is_gray_palette(np.frombuffer(chunks.palette, np.uint8).reshape(-1, 3))),
    )


def _read_chunks(data: bytes) -> _Chunks:
    chunks = _Chunks()
    view = memoryview(data)
    start = 8
    for _ in range(MAX_PARTS):
        if start + 12 > len(data):
            raise ImageError("truncated: the end of the PNG is missing")
        length, name = _CHUNK.unpack_from(data, start)
        end = start + 12 + length
        if end > len(data):
            raise ImageError(f"truncated: the file ends within its {name.decode('latin-1')!r} chunk")
        if start == 8 and name != b"IHDR":
            raise ImageError("damaged: a PNG without a header")
        is_needed = not name[0] & 32  # by the case of its first letter
        if is_needed or name in _USED_IF_SOUND:
            if zlib.crc32(view[start + 4 : end - 4]) == _CHECKSUM.unpack_from(data, end - 4)[0]:
                _take(chunks, name, view[start + 8 : end - 4])
            elif is_needed:
                raise ImageError(f"damaged: the checksum of a {name.decode('latin-1')!r} chunk is wrong")
        if name == b"IEND":
            return chunks
        start = end
    raise ImageError("damaged: too many chunks")


def _take(chunks: _Chunks, name: bytes, body: memoryview) -> None:
    if name == b"IDAT":
        chunks.pixels.append(body)
    elif name == b"IHDR":
        _take_header(chunks, body)
    elif name == b"PLTE":
        if len(body) % 3 == 0 and len(body) <= 768:  # colors that only an indexed image needs
            chunks.palette = bytes(body)
    elif name == b"tRNS":
        chunks.transparency = bytes(body[:256])
    elif name == b"eXIf":
        chunks.exif = bytes(body)
    elif name == b"acTL":
        chunks.is_animated = int.from_bytes(body[:4], "big") > 1
    elif name != b"IEND":
        raise ImageError(f"PNG with an unknown {name.decode('latin-1')!r} chunk is not supported")


def _take_header(chunks: _Chunks, body: memoryview) -> None:
    if len(body) != _HEADER.size:
        raise ImageError("damaged: a header of the wrong size")
    chunks.width, chunks.height, chunks.bits, chunks.color, compression, filtering, interlace = _HEADER.unpack(body)
    if (chunks.color, chunks.bits) not in _PILLOW_MODES or compression or filtering or interlace > 1:
        raise ImageError("damaged: the header says what no PNG can be")
    chunks.is_interlaced = interlace == 1


# ---- pixels


class _Segments:
    """Chunks as one file to read from, without joining them."""

    def __init__(self, segments: list[memoryview]) -> None:
        self._segments = segments
        self._number = self._offset = 0

    def seek(self, offset: int) -> None:
        assert offset == 0
        self._number = self._offset = 0

    def read(self, n_bytes: int) -> bytes:
        while self._number < len(self._segments):
            part = self._segments[self._number][self._offset : self._offset + n_bytes]
            if part:
                self._offset += len(part)
                return bytes(part)
            self._number, self._offset = self._number + 1, 0
        return b""


class _Rows(ImageFile.ImageFile):
    """The rows of a PNG as Pillow's zip decoder reads them: a Pillow image plugin without a file format around it."""

    format = "PNG"

    def __init__(self, chunks: _Chunks) -> None:
        self.chunks = chunks
        super().__init__(_Segments(chunks.pixels))  # type: ignore[arg-type]  # it only reads and seeks

    def _open(self) -> None:
        chunks = self.chunks
        self._mode, raw_mode = _PILLOW_MODES[chunks.color, chunks.bits]
        self._size = chunks.width, chunks.height
        self.tile = [ImageFile._Tile("zip", (0, 0, chunks.width, chunks.height), 0, raw_mode)]
        self.decoderconfig = (1,) if chunks.is_interlaced else ()


def _bands(chunks: _Chunks, n_rows: int) -> Iterator[Image.Image]:
    """The image in bands of mode L or RGB."""
    if not chunks.pixels:
        raise ImageError("truncated: there is no image data")
    image = _Rows(chunks)
    image.load()
    if not _last_row_has_values(image) or chunks.is_interlaced:
        _check_complete(chunks)
    if image.mode == "P":
        image.putpalette(_flat_palette(chunks))
    key = _transparent_key(chunks)
    levels = _gray_table(image, key)
    for band in in_bands([image], n_rows):
        if levels is not None:
            yield Image.fromarray(levels[np.asarray(band.convert("L") if band.mode == "1" else band)])
        elif band.mode in ("LA", "RGBA"):
            yield flat(band)
        elif band.mode == "RGB" and key:
            yield _without_color(band, key)
        else:
            yield band if band.mode in ("L", "RGB") else band.convert("L" if band.mode == "1" else "RGB")


def _last_row_has_values(image: Image.Image) -> bool:
    row = image.crop((0, image.height - 1, image.width, image.height))
    return bool(np.asarray(row).any())


def _check_complete(chunks: _Chunks) -> None:
    """Raises ImageError if the compressed data are an undamaged stream of too few bytes.

    Pillow takes such a stream for the end of the image and leaves the missing rows at zero.
    """
    bits = chunks.bits * _CHANNELS[chunks.color]
    missing = 0
    for x, y, step_x, step_y in _PASSES if chunks.is_interlaced else ((0, 0, 1, 1),):
        width, height = -(-(chunks.width - x) // step_x), -(-(chunks.height - y) // step_y)
        missing += height * (1 + -(-width * bits // 8)) if width > 0 and height > 0 else 0
    stream, rows = zlib.decompressobj(), _Segments(chunks.pixels)
    while missing > 0 and not stream.eof:
        piece = stream.unconsumed_tail or rows.read(1 << 16)
        n_bytes = len(stream.decompress(piece, 1 << 20))
        if not piece and not n_bytes:
            break
        missing -= n_bytes
    if missing > 0:
        raise ImageError("truncated: rows are missing")


# ---- transparency and levels


def _flat_palette(chunks: _Chunks) -> bytes:
    """All 256 entries, each laid over the background by its own alpha; those the file does not name are black."""
    colors = np.zeros((256, 3), np.float64)
    named = np.frombuffer(chunks.palette, np.uint8).reshape(-1, 3)
    colors[: len(named)] = named
    alpha = np.full((256, 1), 255.0)
    alpha[: len(chunks.transparency), 0] = np.frombuffer(chunks.transparency, np.uint8)
    flat_colors: NDArray[np.uint8] = np.rint((colors * alpha + np.array(BACKGROUND) * (255 - alpha)) / 255).astype(
        np.uint8
    )
    return flat_colors.tobytes()


def _transparent_key(chunks: _Chunks) -> tuple[int, ...]:
    """The one color of a gray or RGB image that is transparent, in the values of Pillow's image; empty if none."""
    n_values = {_GRAY: 1, _RGB: 3}.get(chunks.color, 0)
    if not n_values or len(chunks.transparency) < 2 * n_values:
        return ()
    key = [int(value) for value in np.frombuffer(chunks.transparency, ">u2", n_values)]
    if chunks.bits == 16:
        return tuple(key if chunks.color == _GRAY else [value >> 8 for value in key])  # Pillow keeps 8 bits of RGB
    largest = (1 << chunks.bits) - 1
    return tuple((value & largest) * 255 // largest for value in key)


def _gray_table(image: Image.Image, key: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """What each value of a gray image becomes, or None where it stays as it is."""
    if image.mode == "I;16":
        levels = gray_levels(_maximum(image))
    elif image.mode in ("1", "L") and key:
        levels = np.arange(256, dtype=np.uint8)
    else:
        return None
    if key:
        levels[key[0]] = BACKGROUND[0]
    return levels


def _maximum(image: Image.Image) -> int:
    _, maximum = image.getextrema()
    assert isinstance(maximum, (int, float))
    return int(maximum)


def _without_color(band: Image.Image, key: tuple[int, ...]) -> Image.Image:
    pixels = np.array(band)
    pixels[(pixels == key).all(axis=-1)] = BACKGROUND
    return Image.fromarray(pixels)
