"""TIFF: the first page's directory is read here; Pillow gets the strips or tiles in bands, as small clean TIFFs.

In: the bytes of a file that starts like a TIFF. Out: a :class:`~topwork.data.raster.Raster` of the first page.

Each band of the image is handed over as a file of its own that holds the strips of those rows and the dozen tags their
pixels need. So odd tags neither cost nor break anything, memory stays at a band however large the image is, every strip
is known to lie within the file, and layouts that Pillow does not know can be put in terms of those it does: planes of
separate colors become gray images. Embedded color profiles are not applied.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from struct import Struct, error, pack, unpack_from

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from topwork.data.raster import MAX_PARTS, Raster, check_size, flat, gray_levels, in_bands, is_gray_palette
from topwork.errors import ImageError

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIP_OFFSETS, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES = 273, 274, 277, 278, 279
_PLANES, _T4, _T6, _PREDICTOR, _PALETTE = 284, 292, 293, 317, 320
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _JPEG_TABLES = 338, 339, 347
_YCBCR_FACTORS, _YCBCR_SAMPLING, _REFERENCE_LEVELS, _DNG_VERSION = 529, 530, 532, 50706
_USED = frozenset(
    {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIP_OFFSETS, _ORIENTATION, _SAMPLES}
    | {_ROWS_PER_STRIP, _STRIP_BYTES, _PLANES, _T4, _T6, _PREDICTOR, _PALETTE, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS}
    | {_TILE_BYTES, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _JPEG_TABLES, _YCBCR_FACTORS, _YCBCR_SAMPLING, _REFERENCE_LEVELS}
    | {_DNG_VERSION}
)
_KINDS = {1: "u1", 3: "u2", 4: "u4", 5: "u4", 7: "u1", 13: "u4", 16: "u8", 18: "u8"}  # type of a tag: numpy's type
_SHORT, _LONG, _RATIONAL, _UNDEFINED = 3, 4, 5, 7
_UNCOMPRESSED, _DEFLATE = 1, 8
_COMPRESSIONS = frozenset(
    {_UNCOMPRESSED, 2, 3, 4, 5, 7, _DEFLATE, 32773, 32946, 34925, 50000}
)  # what Pillow's libtiff has
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _INDEXED, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_COLORS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _INDEXED: 1, _CMYK: 4, _YCBCR: 3, _LAB: 3}  # samples a pixel
_MODES = {_RGB: "RGB", _INDEXED: "P", _CMYK: "CMYK", _YCBCR: "YCbCr", _LAB: "LAB"}
# Tags that are handed on: their type, and how many numbers they must have (0: any).
_KEPT = (
    (_FILL_ORDER, _SHORT, 1),
    (_T4, _LONG, 1),
    (_T6, _LONG, 1),
    (_PREDICTOR, _SHORT, 1),
    (_JPEG_TABLES, _UNDEFINED, 0),
    (_YCBCR_FACTORS, _RATIONAL, 6),
    (_YCBCR_SAMPLING, _SHORT, 2),
    (_REFERENCE_LEVELS, _RATIONAL, 12),
)
_MAX_TILE_PIXELS = 40_000_000  # a tile may be larger than the image, and is decoded whole

_Values = NDArray[np.int64]


@dataclass(frozen=True)
class _Page:
    """The first page, as its tags describe it."""

    order: str  # "<" or ">"
    tags: dict[int, _Values]
    width: int
    height: int
    bits: int  # a sample
    n_samples: int
    photometric: int
    compression: int
    is_planar: bool
    has_alpha: bool
    is_tiled: bool
    piece_width: int  # of a strip or tile, in pixels
    piece_height: int
    offsets: _Values
    sizes: _Values  # bytes

    @property
    def is_gray(self) -> bool:
        return self.photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)

    @property
    def has_free_rows(self) -> bool:
        """Whether any rows can be cut out of the file, wherever its strips begin."""
        return self.compression == _UNCOMPRESSED and not self.is_tiled and self.photometric != _YCBCR

    @property
    def row_bytes(self) -> int:
        """Bytes of an uncompressed row of one plane."""
        return (self.width * self.bits * (1 if self.is_planar else self.n_samples) + 7) // 8

    def value(self, tag: int, default: int) -> int:
        return int(self.tags[tag][0]) if tag in self.tags else default


def read(data: bytes) -> Raster:
    """Reads the first page's directory; see :func:`topwork.data.images.decode`."""
    try:
        page, has_more = _read_page(data)
    except (error, OverflowError):
        raise ImageError("truncated or damaged: the page's directory lies beyond the end of the file") from None
    orientation = page.value(_ORIENTATION, 1)
    is_gray = page.is_gray or (page.photometric == _INDEXED and is_gray_palette(_palette(page).astype(np.uint8).T))
    return Raster(
        format="TIFF",
        width=page.width,
        height=page.height,
        mode=_mode(page),
        bands=lambda n_rows: _bands(data, page, n_rows),
        working_bytes=len(data) + _working_bytes(page),
        orientation=orientation if 1 <= orientation <= 8 else 1,
        is_animated=has_more,
        is_gray=is_gray,
    )


def _mode(page: _Page) -> str:
    if not page.is_gray:
        return _MODES[page.photometric] + ("A" if page.photometric == _RGB and page.has_alpha else "")
    if page.bits > 8:
        return "I;16"
    return "LA" if page.has_alpha else "1" if page.bits == 1 else "L"


def _working_bytes(page: _Page) -> int:
    """Memory of the largest band: its coded strips, their decoded bytes, Pillow's image; and all of 16-bit gray."""
    n_pixels = page.width * (1 if page.has_free_rows else min(page.height, page.piece_height))
    coded = int(page.sizes.max()) * -(-page.width // page.piece_width)
    kept = 2 * page.width * page.height if page.is_gray and page.bits > 8 else 0
    return coded + n_pixels * (page.n_samples * page.bits // 8 + 4) + kept


# ---- the directory


def _read_page(data: bytes) -> tuple[_Page, bool]:
    order = "<" if data[:2] == b"II" else ">"
    tags, has_more = _read_tags(data, order)
    if not {_WIDTH, _HEIGHT} <= tags.keys():
        raise ImageError("damaged: a TIFF page without a size")
    width, height = int(tags[_WIDTH][0]), int(tags[_HEIGHT][0])
    check_size(width, height)
    one = np.ones(1, np.int64)
    compression, photometric = (int(tags.get(tag, one)[0]) for tag in (_COMPRESSION, _PHOTOMETRIC))
    bits, samples = tags.get(_BITS, one), int(tags.get(_SAMPLES, one)[0])
    _check_layout(tags, bits[:samples], samples, compression, photometric)
    extra = tags.get(_EXTRA_SAMPLES, np.zeros(0, np.int64))
    is_tiled = _TILE_OFFSETS in tags
    page = _Page(
        order=order,
        tags=tags,
        width=width,
        height=height,
        bits=int(bits[0]),
        n_samples=samples,
        photometric=photometric,
        compression=compression,
        is_planar=samples > 1 and int(tags.get(_PLANES, one)[0]) == 2,
        has_alpha=samples > _COLORS[photometric] and (not len(extra) or extra[0] in (1, 2)),
        is_tiled=is_tiled,
        piece_width=int(tags[_TILE_WIDTH][0]) if is_tiled else width,
        piece_height=int(tags[_TILE_HEIGHT][0])
        if is_tiled
        else min(height, int(tags.get(_ROWS_PER_STRIP, [height])[0])),
        offsets=tags.get(_TILE_OFFSETS if is_tiled else _STRIP_OFFSETS, one[:0]),
        sizes=tags.get(_TILE_BYTES if is_tiled else _STRIP_BYTES, one[:0]),
    )
    return _with_checked_pieces(page, len(data)), has_more


def _read_tags(data: bytes, order: str) -> tuple[dict[int, _Values], bool]:
    """The tags of the first directory that pixels depend on, and whether a second directory follows."""
    is_big = data[2:4] in (b"+\0", b"\0+")
    offset, count, entry = ("Q", "Q", Struct(order + "HHQ8s")) if is_big else ("I", "H", Struct(order + "HHI4s"))
    (start,) = unpack_from(order + offset, data, 8 if is_big else 4)
    (n_entries,) = unpack_from(order + count, data, start)
    start += 8 if is_big else 2
    end = start + n_entries * entry.size
    if end > len(data):
        raise ImageError("truncated: the file ends within the page's directory")
    tags: dict[int, _Values] = {}
    for tag, kind, n_values, inline in entry.iter_unpack(memoryview(data)[start:end]):
        if tag in _USED and kind in _KINDS and tag not in tags and n_values:
            number = np.dtype(order + _KINDS[kind])
            n_numbers = n_values * (2 if kind == _RATIONAL else 1)
            fits = n_numbers * number.itemsize <= len(inline)
            at = 0 if fits else unpack_from(order + offset, inline)[0]
            source = inline if fits else data
            if at + n_numbers * number.itemsize <= len(source):
                tags[tag] = np.frombuffer(source, number, n_numbers, at).astype(np.int64)
    following = data[end : end + (8 if is_big else 4)]
    return tags, any(following)


def _check_layout(tags: dict[int, _Values], bits: _Values, samples: int, compression: int, photometric: int) -> None:
    if _DNG_VERSION in tags or photometric in (32803, 34892):
        raise ImageError("camera raw files are not supported")
    if compression not in _COMPRESSIONS:
        raise ImageError(f"TIFF with compression {compression} is not supported")
    if not len(bits) or not bits.min() >= 1:
        raise ImageError("damaged: pixels without samples")
    if not set(tags.get(_SAMPLE_FORMAT, np.ones(1))) <= {1, 4} or bits.max() > 16:
        raise ImageError("signed, floating or wider than 16 bits: there is no agreed brightness for such samples")
    n_colors = _COLORS.get(photometric, 99)
    if not n_colors <= samples <= n_colors + 3 or len(set(bits.tolist())) > 1:
        raise ImageError(f"TIFF with {samples} samples a pixel of color type {photometric} is not supported")


def _with_checked_pieces(page: _Page, n_bytes: int) -> _Page:
    """The page with as many strips or tiles as it must have, all within the file."""
    if page.piece_width < 1 or page.piece_height < 1:
        raise ImageError("damaged: strips or tiles without pixels")
    if page.piece_width * page.piece_height > max(_MAX_TILE_PIXELS, page.width * page.height):
        raise ImageError("too costly to decode: the tiles are far larger than the image")
    down, across = -(-page.height // page.piece_height), -(-page.width // page.piece_width)
    n_pieces = down * across * (page.n_samples if page.is_planar else 1)
    if n_pieces > MAX_PARTS:
        raise ImageError("too costly to decode: too many strips or tiles")
    offsets, sizes = page.offsets[:n_pieces], page.sizes[:n_pieces]
    if page.has_free_rows:  # a writer's sizes may be wrong where nothing depends on them
        rows = np.full((page.n_samples if page.is_planar else 1, down), page.piece_height)
        rows[:, -1] = page.height - (down - 1) * page.piece_height
        sizes = rows.ravel() * page.row_bytes
    elif not len(sizes) and len(offsets) == 1:
        sizes = n_bytes - offsets
    if len(offsets) < n_pieces or len(sizes) < n_pieces or (sizes <= 0).any() or (offsets <= 0).any():
        raise ImageError("truncated: strips or tiles are missing")
    if (sizes > n_bytes - offsets).any():
        raise ImageError("truncated: strips or tiles lie beyond the end of the file")
    return replace(page, offsets=offsets, sizes=sizes)


# ---- bands


def _bands(data: bytes, page: _Page, n_rows: int) -> Iterator[Image.Image]:
    """The page in bands of mode L or RGB."""
    images = _native_bands(data, page, n_rows)
    if page.is_gray and page.bits > 8:
        images = _gray_bands(images, page)
    shown = (_shown(part) for image in images for part in in_bands([image], n_rows))
    return in_bands(shown, n_rows)


def _native_bands(data: bytes, page: _Page, n_rows: int) -> Iterator[Image.Image]:
    """The page in bands of whole strips or tiles, in the modes that Pillow reads them in."""
    unit = 1 if page.has_free_rows else page.piece_height
    step = max(1, n_rows // unit) * unit
    for top in range(0, page.height, step):
        end = min(top + step, page.height)
        if page.is_planar:
            yield _merged([_decode(_plane_file(data, page, plane, top, end)) for plane in _used_planes(page)], page)
        else:
            yield _decode(_file(data, page, top, end))


def _used_planes(page: _Page) -> range:
    if page.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK):
        raise ImageError("TIFF with this color type in separate planes is not supported")
    return range(_COLORS[page.photometric] + (page.has_alpha and page.photometric != _CMYK))


def _merged(planes: list[Image.Image], page: _Page) -> Image.Image:
    """Planes of gray as one image; 16-bit colors keep their upper 8 bits, as Pillow does where they are not apart."""
    if len(planes) == 1:
        return planes[0]
    if page.bits > 8:
        planes = [Image.fromarray((np.asarray(plane) >> (page.bits - 8)).astype(np.uint8)) for plane in planes]
    mode = "CMYK" if page.photometric == _CMYK else "RGB" if page.photometric == _RGB else "L"
    return Image.merge(
        mode + ("A" if len(planes) > _COLORS[page.photometric] else ""), [p.convert("L") for p in planes]
    )


def _decode(file: bytes) -> Image.Image:
    try:
        image = _Band(io.BytesIO(file))
    except SyntaxError as problem:
        raise ImageError(f"TIFF of this layout is not supported ({problem})") from problem
    image.load()
    return image


class _Band(TiffImagePlugin.TiffImageFile):
    """Pillow's TIFF plugin without its check of the pixel count, which warns; the count was checked before."""

    def load_prepare(self) -> None:
        if self._im is None:
            self.im = Image.new(self.mode, self.size, None).im
        super().load_prepare()


def _gray_bands(images: Iterator[Image.Image], page: _Page) -> Iterator[Image.Image]:
    """Bands of 16-bit gray brought to 8 bits. All are decoded first, because the largest value decides."""
    bands = list(images)
    maximum = max(int(np.asarray(band).max()) for band in bands)
    levels = gray_levels(maximum, (1 << page.bits) - 1)
    if page.photometric == _WHITE_IS_ZERO:
        levels = 255 - levels
    for band in bands:
        yield Image.fromarray(levels[np.asarray(band)])


def _shown(image: Image.Image) -> Image.Image:
    """An image as Pillow reads it from a TIFF, in mode L or RGB."""
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    if mode in ("La", "PA", "LA", "RGBA"):
        return flat(image.convert({"La": "LA", "PA": "RGBA"}.get(mode, mode)))
    if mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        shown = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
        assert shown is not None
        return shown
    return image.convert("L" if mode == "1" else "RGB")


# ---- small clean files


def _file(data: bytes, page: _Page, top: int, end: int) -> bytes:
    """A TIFF of the rows ``top`` to ``end`` of a page whose samples lie together."""
    extra = [1 if page.has_alpha and page.tags.get(_EXTRA_SAMPLES, [2])[0] == 1 else 2 if page.has_alpha else 0, 0, 0]
    tags: dict[int, tuple[int, Sequence[int] | _Values]] = {
        _BITS: (_SHORT, [page.bits] * page.n_samples),
        # Pillow knows white-is-zero up to 8 bits only; above that the levels are turned round in _gray_bands.
        _PHOTOMETRIC: (_SHORT, [_BLACK_IS_ZERO if page.is_gray and page.bits > 8 else page.photometric]),
        _SAMPLES: (_SHORT, [page.n_samples]),
    }
    if page.n_samples > _COLORS[page.photometric]:
        tags[_EXTRA_SAMPLES] = _SHORT, extra[: page.n_samples - _COLORS[page.photometric]]
    if page.photometric == _INDEXED:
        tags[_PALETTE] = _SHORT, _palette(page).ravel()
    return _assemble(page, tags, _pieces(data, page, 0, top, end), end - top)


def _plane_file(data: bytes, page: _Page, plane: int, top: int, end: int) -> bytes:
    """A gray TIFF of the rows ``top`` to ``end`` of one plane."""
    is_turned = page.photometric == _WHITE_IS_ZERO and page.bits <= 8 and plane == 0
    tags: dict[int, tuple[int, Sequence[int] | _Values]] = {
        _BITS: (_SHORT, [page.bits]),
        _PHOTOMETRIC: (_SHORT, [_WHITE_IS_ZERO if is_turned else _BLACK_IS_ZERO]),
        _SAMPLES: (_SHORT, [1]),
    }
    return _assemble(page, tags, _pieces(data, page, plane, top, end), end - top)


def _pieces(data: bytes, page: _Page, plane: int, top: int, end: int) -> list[memoryview]:
    """The strips or tiles of one plane that hold the rows ``top`` to ``end``, in order; of free rows, just those."""
    view, pieces = memoryview(data), []
    down, across = -(-page.height // page.piece_height), -(-page.width // page.piece_width)
    if page.has_free_rows:
        while top < end:
            strip, row = divmod(top, page.piece_height)
            n_rows = min(end - top, page.piece_height - row)
            at = int(page.offsets[plane * down + strip]) + row * page.row_bytes
            pieces.append(view[at : at + n_rows * page.row_bytes])
            top += n_rows
        return [memoryview(b"".join(pieces))]
    first = plane * down * across
    numbers = range(first + top // page.piece_height * across, first + -(-end // page.piece_height) * across)
    return [view[page.offsets[n] : page.offsets[n] + page.sizes[n]] for n in numbers]


def _palette(page: _Page) -> _Values:
    """The colors of a palette (3, n), 0..65535. Some writers fill in 8-bit values, which would look black."""
    n_colors = 1 << page.bits
    if len(page.tags.get(_PALETTE, ())) < 3 * n_colors:
        raise ImageError("damaged: the palette is missing")
    palette = page.tags[_PALETTE][: 3 * n_colors].reshape(3, n_colors)
    return palette * 257 if palette.max() < 256 else palette


def _assemble(
    page: _Page, tags: dict[int, tuple[int, Sequence[int] | _Values]], pieces: list[memoryview], height: int
) -> bytes:
    """A TIFF file of these strips or tiles, with these tags and those of the page that say how they are coded."""
    compression = page.compression
    if compression == _UNCOMPRESSED and page.photometric == _YCBCR:
        # Pillow leaves only compressed files to libtiff, which alone understands subsampled colors.
        compression, pieces = _DEFLATE, [memoryview(zlib.compress(piece, 0)) for piece in pieces]
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    offsets = 8 + np.cumsum(sizes) - sizes
    tags |= {_WIDTH: (_LONG, [page.width]), _HEIGHT: (_LONG, [height]), _COMPRESSION: (_SHORT, [compression])}
    if page.is_tiled:
        tags |= {_TILE_WIDTH: (_LONG, [page.piece_width]), _TILE_HEIGHT: (_LONG, [page.piece_height])}
        tags |= {_TILE_OFFSETS: (_LONG, offsets), _TILE_BYTES: (_LONG, sizes)}
    else:
        tags |= {_ROWS_PER_STRIP: (_LONG, [height if page.has_free_rows else page.piece_height])}
        tags |= {_STRIP_OFFSETS: (_LONG, offsets), _STRIP_BYTES: (_LONG, sizes)}
    for tag, kind, n_values in _KEPT:
        if tag in page.tags and len(page.tags[tag]) >= n_values:
            tags[tag] = kind, page.tags[tag][: n_values or None]
    # 12-bit samples are packed the same in either order, and Pillow knows them in one.
    return _written("<" if page.bits == 12 else page.order, tags, pieces)


def _written(order: str, tags: dict[int, tuple[int, Sequence[int] | _Values]], pieces: list[memoryview]) -> bytes:
    body = b"".join(pieces)
    body += b"\0" * (len(body) % 2)
    place = 8 + len(body) + 2 + 12 * len(tags) + 4  # of the first values that do not fit into their entry
    entries, values = [], []
    for tag, (kind, numbers) in sorted(tags.items()):
        packed = np.asarray(numbers).astype(order + _KINDS[kind]).tobytes()
        count = len(numbers) // 2 if kind == _RATIONAL else len(numbers)
        entries.append(pack(order + "HHI", tag, kind, count))
        if len(packed) > 4:
            values.append(packed + b"\0" * (len(packed) % 2))
            entries.append(pack(order + "I", place))
            place += len(values[-1])
        else:
            entries.append(packed.ljust(4, b"\0"))
    header = (b"II" if order == "<" else b"MM") + pack(order + "HI", 42, 8 + len(body))
    return b"".join([header, body, pack(order + "H", len(tags)), *entries, bytes(4), *values])
