"""JPEG: libjpeg-turbo for nearly every file, at full size or shrunk while decoding; Pillow for odd samplings.

In: the bytes of a file that starts like a JPEG. Out: its header, and the pixels as stored (``images.py`` turns them upright).

libjpeg never fails on damaged pixels: it warns, and fills what is missing with gray. In its strict mode simplejpeg
turns the first warning into an error, which costs nothing on sound files. The few warnings that do not concern pixels
(stray bytes, an unknown JFIF version) get a second try on a cleaned copy. Three kinds of loss come without a warning
and are looked for here: missing scans, and missing data under arithmetic coding or in files only Pillow can decode.

Embedded color profiles are not applied.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from struct import error, iter_unpack, unpack, unpack_from
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from topwork.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]

MAX_MEMORY_BYTES = 1_000_000_000  # what one file of any format may cost, its own bytes and the finished pixels included
MAX_PARTS = 500_000  # segments, chunks or strips of one file; each costs about a microsecond of Python

_SOI, _EOI, _SOS, _APP0, _APP1, _APP14 = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame, all processes
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_ARITHMETIC = frozenset(range(0xC9, 0xD0)) - {0xCC}
_ALONE = frozenset({0x01, _SOI, *range(0xD0, 0xD8)})  # markers without a length
_FOR_PIXELS = _FRAMES | {0xC4, 0xCC, 0xDB, 0xDD, _APP0, _APP14}  # and tables, restart interval, color transform
_EXIF = b"Exif\0\0"
_MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # within a scan: neither stuffed zero, restart nor fill byte
_STRAY = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")
# libjpeg reports only its first warning. These mean lost pixels.
_LOSS = re.compile("remature end|bad Huffman|bad arithmetic|instead of RST|progression")
_ALL_COEFFICIENTS = (1 << 64) - 1
_PADDING = bytes(8) + bytes(i * 73 % 251 for i in range(2048))  # zeros, because arithmetic coders leave those out
# A scan of nearly no bytes still costs a pass over every block, 0.4 ns a pixel. Real files have up to about 20.
_MAX_SCANS = 500
_MAX_SCAN_PIXELS = 6_000_000_000
_MAX_ARITHMETIC_BYTES = 20_000_000  # 3 s, and twice that to find out whether all is there
_MAX_COMPARED_PIXELS = 20_000_000  # two decodings are compared at full size up to here, above at an eighth
_MAX_RETRY_PIXELS = 200_000_000  # decoded in all while looking for stray bytes


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a JPEG; sizes in pixels as stored, orientation 1..8 as EXIF has it."""

    frame: int  # marker, which says the coding process
    width: int
    height: int
    components: bytes  # 3 bytes each: identifier, sampling, table
    orientation: int
    scan: int  # offset of the first start-of-scan marker

    @property
    def n_components(self) -> int:
        """Color channels as stored."""
        return len(self.components) // 3

    @property
    def mode(self) -> str:
        """Colors as stored, in Pillow's words."""
        return _MODES[self.n_components]


def decode(data: bytes, header: Header, min_side: int | None) -> Pixels:
    """The pixels as stored, uint8 (H, W, 3) RGB; see :func:`topwork.data.images.decode`."""
    factor = _factor(header, min_side)
    _check(header, data, factor)
    try:
        pixels = _decode(data, header, factor)
    except ValueError as error:
        data = _without_metadata(data, header)
        pixels = _decode_cleaned(data, header, factor, error)
    if header.frame in _ARITHMETIC:
        _check_complete(pixels, _decode(_padded(data), header, factor, strict=False))
    return pixels


def check_memory(n_bytes: int) -> None:
    """Raises ImageError if decoding would hold more than one file may cost."""
    if n_bytes > MAX_MEMORY_BYTES:
        raise ImageError(f"too large: decoding it would take {n_bytes / 1e9:.1f} GB of memory, and the limit is 1 GB")


def _decode(data: bytes, header: Header, factor: int, *, strict: bool = True) -> Pixels:
    height, width = (-(-side // factor) if factor > 1 else 0 for side in (header.height, header.width))
    pixels: Pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, strict=strict)
    return pixels


# ---- the header


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the first scan, found the way libjpeg finds them.

    Raises:
        IndexError, ValueError, ImageError: the data end before, or there are too many.
    """
    end = 2
    for _ in range(MAX_PARTS):
        start = data.index(b"\xff", end)  # bytes before a marker are skipped
        while data[start + 1] == 0xFF:
            start += 1
        marker = data[start + 1]
        if marker == 0 or marker in _ALONE:
            end = start + 2
            continue
        end = start + 2 + max(2, data[start + 2] << 8 | data[start + 3])
        yield marker, start, end
        if marker in (_SOS, _EOI):
            return
    raise ImageError("damaged: too many segments")


def read_header(data: bytes) -> Header:
    """Size, colors, orientation and the place of the first scan."""
    frame, orientation = None, 0
    try:
        for marker, start, end in segments(data):
            if marker == _APP1 and not orientation and data[start + 4 : start + 10] == _EXIF:
                orientation = orientation_of(data[start + 10 : end])
            elif marker in _FRAMES and frame is None:
                frame = marker, start
            elif marker == _SOS and frame is not None and end <= len(data):
                return _header(data, *frame, orientation or 1, start)
    except (IndexError, ValueError):
        pass
    raise ImageError("truncated: there is no image data")


def _header(data: bytes, marker: int, start: int, orientation: int, scan: int) -> Header:
    bits, n_components = data[start + 4], data[start + 9]
    if bits != 8:
        raise ImageError(f"JPEG with {bits} bits per sample is not supported, only 8")
    if n_components not in _MODES:
        raise ImageError(f"JPEG with {n_components} color components is not supported, only 1, 3 or 4")
    height, width = data[start + 5] << 8 | data[start + 6], data[start + 7] << 8 | data[start + 8]
    components = data[start + 10 : start + 10 + 3 * n_components]
    return Header(marker, width, height, components, orientation, scan)


def _factor(header: Header, min_side: int | None) -> int:
    """What to divide the sides by, so that ``min_side`` is kept: libjpeg-turbo has no fast code for the eighths between.

    Measured on a 12 megapixel photo with colors at half resolution: 1/1 36 ms, 7/8 99, 5/8 28, 1/2 16, 3/8 23, 1/4 17.
    """
    short = min(header.width, header.height)
    return next((one for one in (8, 4, 2) if min_side is not None and -(-short // one) >= min_side), 1)


def _check(header: Header, data: bytes, factor: int) -> None:
    """Raises ImageError if decoding would cost too much, or if scans are missing."""
    if header.frame in _ARITHMETIC and len(data) > _MAX_ARITHMETIC_BYTES:
        raise ImageError("too costly to decode: too much arithmetic coding")
    n_pixels = header.width * header.height
    n_out = -(-header.width // factor) * -(-header.height // factor)
    is_copied = header.orientation > 1 or header.frame in _ARITHMETIC
    memory = len(data) + n_out * (7 if header.n_components == 4 else 6 if is_copied else 3)
    if header.frame in _PROGRESSIVE or data[header.scan + 4] < header.n_components:
        memory += 2 * _n_coefficients(header)  # kept for the whole image until the last scan
        _check_scans(header, data, n_pixels)
    check_memory(memory)


def _n_coefficients(header: Header) -> int:
    samplings = [(value >> 4, value & 15) for value in header.components[1::3]]
    across, down = max(s[0] for s in samplings), max(s[1] for s in samplings)
    if not across or not down:
        raise ImageError("damaged: a sampling factor is 0")
    return sum(-(-header.width * s[0] // across) * -(-header.height * s[1] // down) for s in samplings)


def _check_scans(header: Header, data: bytes, n_pixels: int) -> None:
    """Raises ImageError unless the scans bring every coefficient of every component, in a bearable number."""
    missing = dict.fromkeys(header.components[0::3], _ALL_COEFFICIENTS)
    n_scans = 0
    for marker, start in _markers(data, header.scan):
        if marker == _SOS:
            n_scans += 1
            if n_scans > min(_MAX_SCANS, max(20, _MAX_SCAN_PIXELS // n_pixels)):
                raise ImageError("too costly to decode: too many scans")
            n_components = data[start + 4]
            selection = data[start + 5 + 2 * n_components : start + 8 + 2 * n_components]
            if len(selection) < 3:
                break  # the file ends here
            first, last, bits = selection
            if header.frame not in _PROGRESSIVE:
                first, last, bits = 0, 63, 0
            if bits & 15 == 0:  # otherwise a later scan brings the low bits
                brought = (2 << last) - (1 << first)
                for name in data[start + 5 : start + 5 + 2 * n_components : 2]:
                    missing[name] = missing.get(name, 0) & ~brought
    if any(missing.values()):
        raise ImageError("truncated: scans are missing")


def _markers(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Marker and offset of each segment from the first scan to the end of the image, stepping over the coded data."""
    while match := _MARKER.search(data, start):
        start = match.start()
        yield data[start + 1], start
        if data[start + 1] == _EOI:
            return
        start += 2 if data[start + 1] in _ALONE else 2 + int.from_bytes(data[start + 2 : start + 4], "big")


# ---- metadata


def orientation_of(exif: bytes) -> int:
    """The orientation 1..8 that an EXIF block (a TIFF header and its first directory) asks for, else 1.

    Broken metadata is no reason to lose sound pixels: it means 1.
    """
    order, entries = _exif_directory(exif.removeprefix(_EXIF))
    for tag, kind, _count, value in entries:
        if tag == 0x0112:
            (short,), (long,) = unpack_from(order + "H", value), unpack(order + "I", value)
            found = {1: value[0], 3: short, 4: long}.get(kind, 1)
            return found if 1 <= found <= 8 else 1
    return 1


def camera_of(exif: bytes) -> str:
    """Maker and model in an EXIF block without its name; "" if there are none."""
    order, entries = _exif_directory(exif)
    found = {}
    for tag, kind, count, value in entries:
        if tag in (0x010F, 0x0110) and kind == 2 and 4 < count <= 200:
            (start,) = unpack(order + "I", value)
            found[tag] = exif[start : start + count].split(b"\0")[0].decode("ascii", "replace").strip()
    return " ".join(found[tag] for tag in sorted(found))


def _exif_directory(exif: bytes) -> tuple[str, list[tuple[int, int, int, bytes]]]:
    """The byte order of an EXIF block and its entries, each a tag, type, count and value; none if it is broken."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return "", []
    try:
        (start,) = unpack_from(order + "I", exif, 4)
        (n_entries,) = unpack_from(order + "H", exif, start)
    except error:
        return order, []
    end = min(start + 2 + 12 * n_entries, len(exif) - (len(exif) - start - 2) % 12)
    return order, list(iter_unpack(order + "HHI4s", exif[start + 2 : end]))


# ---- files that strict decoding refuses


def _decode_cleaned(data: bytes, header: Header, factor: int, first_error: ValueError) -> Pixels:
    """Decodes a copy without metadata, and if needed without stray bytes, or raises ImageError with the reason."""
    message = str(first_error)
    if not _LOSS.search(message):
        try:
            return _decode(data, header, factor)
        except ValueError as error:
            message = str(error)
    if "subsampling" in message:
        return _decode_with_pillow(data, header, factor)
    if stray := _STRAY.search(message):
        for mended in _without_stray(data, int(stray[1]), int(stray[2], 16), header.width * header.height):
            try:
                return _decode(mended, header, factor)
            except ValueError as error:
                message = str(error)
    if "remature end" in message:
        raise ImageError("truncated: the image data end too early") from first_error
    raise ImageError(f"damaged image data ({message.removeprefix('Corrupt JPEG data: ')})") from first_error


def _without_metadata(data: bytes, header: Header) -> bytes:
    """The file with only the segments its pixels need, and those in a form that libjpeg does not warn about."""
    kept = [b"\xff\xd8"]
    for marker, start, end in segments(data):
        segment = data[start:end]
        if marker == _APP0:
            segment = segment[:9] + b"\1\1" + segment[11:] if segment[4:9] == b"JFIF\0" else b""
        elif marker == _APP14:
            known, default = ((0, 2), 2) if header.n_components == 4 else ((0, 1), 1)
            if segment[4:9] != b"Adobe" or len(segment) < 16:
                segment = b""
            elif segment[15] not in known:
                segment = segment[:15] + bytes([default]) + segment[16:]
        if marker in _FOR_PIXELS:
            kept.append(segment)
    return b"".join([*kept, data[header.scan :]])


def _without_stray(data: bytes, n_stray: int, marker: int, n_pixels: int) -> Iterator[bytes]:
    """Copies of the file, each with the stray bytes before one of the markers of that kind cut out."""
    scan = _first_scan(data)
    n_tries = max(1, _MAX_RETRY_PIXELS // n_pixels)
    places = [start for found, start in _markers(data, scan) if found == marker and start - n_stray > scan]
    for start in places[:n_tries]:
        yield data[: start - n_stray] + data[start:]


def _decode_with_pillow(data: bytes, header: Header, factor: int) -> Pixels:
    """Decodes samplings that simplejpeg does not know. Pillow ignores libjpeg's warnings, so losses are looked for.

    Shrunk by averaging: libjpeg's scaled decoding leaves such colors in coarse blocks.
    """
    check_memory(2 * len(data) + 11 * header.width * header.height)
    image = _pillow_image(data)
    coarse = 8 if header.width * header.height > _MAX_COMPARED_PIXELS else 1
    overview, pixels = np.asarray(image.reduce(coarse)), np.array(image.reduce(factor))
    del image
    _check_complete(overview, np.asarray(_pillow_image(_padded(data)).reduce(coarse)))
    return pixels


def _pillow_image(data: bytes) -> Image:
    from PIL import JpegImagePlugin

    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        return image.convert("RGB")


def _first_scan(data: bytes) -> int:
    return next(start for marker, start, _ in segments(data) if marker == _SOS)


def _padded(data: bytes) -> bytes:
    """The file with meaningless data appended to its last scan, up to the end of the image."""
    end = next((start for marker, start in _markers(data, _first_scan(data)) if marker == _EOI), len(data))
    return data[:end] + _PADDING + b"\xff\xd9"


def _check_complete(pixels: Pixels, pixels_of_padded: Pixels) -> None:
    """Raises ImageError if data appended to the last scan change the image, for then its own ended too early."""
    if not np.array_equal(pixels, pixels_of_padded):
        raise ImageError("truncated: the image data end too early")
