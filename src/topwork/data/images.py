"""From the bytes of one file to upright RGB pixels: the one decoder of training, prediction, server and web pages.

In: bytes. Out: :class:`Decoded`, the image as a person sees it, with the facts of its file; or :class:`ImageError` with
a short reason, and never another error. Files are not opened here, and no name or extension is looked at.

What every format has in common, and every reader (``jpeg.py``, ``png.py`` ...) keeps to:

- The content decides the format. Nothing off the list is read (HEIC only with its optional part), and no outside
  program is started.
- The first frame or page is the image. It is turned upright, transparent pixels show ``BACKGROUND``, and 16-bit gray
  is brought to 8 by :func:`~topwork.data.raster.gray_levels`. Samples that are signed, floating or wider than 16 bits
  have no agreed brightness and are rejected. Embedded color profiles are not applied; CMYK is plain inks on white.
- An image is decoded to its last row or rejected. Metadata that concern no pixels may be broken.
- Size and cost are worked out from the header, before anything large is made: ``MAX_PIXELS``, ``MAX_MEMORY_BYTES``.
- Readers hand Pillow pixels without metadata and call its plugins directly, never ``Image.open``. So Pillow has
  nothing to warn about, and neither the warning filters nor Pillow's pixel limit, which are settings of the whole
  process, are touched.
- Nothing is shared between calls, so any number of threads may decode at once.
"""

from __future__ import annotations

import struct

from topwork.data import jpeg
from topwork.data.raster import BACKGROUND as BACKGROUND
from topwork.data.raster import MAX_MEMORY_BYTES as MAX_MEMORY_BYTES
from topwork.data.raster import MAX_PIXELS as MAX_PIXELS
from topwork.data.raster import Decoded as Decoded
from topwork.data.raster import ImageFacts as ImageFacts
from topwork.data.raster import Raster, finish
from topwork.errors import ImageError

DECODER_VERSION = (
    "1"  # raise it whenever the same file may give other pixels, facts or reasons: what is cached depends on it
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
HEAD_BYTES = 32  # how much of a file :func:`sniff` looks at
NO_HEIC = "HEIC, which needs an optional part: pip install 'topwork[heic]'"
OUT_OF_MEMORY = "not enough memory to decode it"  # the one reason that lies with the machine and may pass

_BMP_HEADER_SIZES = frozenset({12, 40, 52, 56, 64, 108, 124})
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHER_FORMATS = (
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\1\0", "icon"),
    (b"\0\0\0\x0cjP", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL", "JPEG XL"),
    (b"P4", "PNM"),
    (b"PK\3\4", "ZIP archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"\x89HDF", "HDF5"),
    (b"SIMPLE  =", "FITS"),
    (b"v/1\1", "OpenEXR"),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"hevc": "HEIC sequence", b"msf1": "HEIF sequence", b"crx ": "camera raw"}


def decode(data: bytes, *, min_side: int | None = None) -> Decoded:
    """Decodes an image file to upright RGB.

    Args:
        data: the whole file.
        min_side: if given, the image may come back smaller, by a power of two, so long as its short side keeps this
            many pixels. That saves most of the time on large photos, and the memory on large images of any format.

    Raises:
        ImageError: the file is not a sound image of a supported format, or would cost too much.
    """
    try:
        if data[:3] == b"\xff\xd8\xff":
            return jpeg.decode(data, min_side)
        return finish(_read(data), min_side)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(OUT_OF_MEMORY) from error
    except (OSError, IndexError, struct.error) as error:  # what Pillow and the readers meet when data are missing
        raise ImageError("damaged or truncated image data") from error
    except Exception as error:  # damaged files make decoders fail in more ways than anybody can list
        raise ImageError(f"damaged {sniff(data[:HEAD_BYTES])} file ({_short(error)})") from error


def sniff(head: bytes) -> str | None:
    """The format, one of ``FORMATS``, that the first bytes of a file are of, or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:4] in _TIFF_MAGIC and head[8:10] != b"CR":  # Canon's raw files start like a TIFF
        return "TIFF"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return "BMP"
    return None


def _read(data: bytes) -> Raster:
    """Reads the header with the reader of its format. Imported here: JPEG alone needs neither these nor Pillow."""
    match sniff(data[:HEAD_BYTES]):
        case "PNG":
            from topwork.data import png

            return png.read(data)
        case "WEBP":
            from topwork.data import webp

            return webp.read(data)
        case "GIF":
            from topwork.data import gif

            return gif.read(data)
        case "BMP":
            from topwork.data import bmp

            return bmp.read(data)
        case "TIFF":
            from topwork.data import tiff

            return tiff.read(data)
    if data[4:8] == b"ftyp":
        from topwork.data import heic

        if heic.is_heic(data[:HEAD_BYTES]):
            return heic.read(data)
    raise ImageError(_not_supported(data[:256]))


def _not_supported(head: bytes) -> str:
    if not head:
        return "the file is empty"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    name = next((name for magic, name in _OTHER_FORMATS if head.startswith(magic)), None)
    if head[4:8] == b"ftyp":
        name = _BRANDS.get(head[8:12], "video")
    elif text.startswith((b"<svg", b"<?xml")):
        name = "SVG" if b"<svg" in text else "XML"
    elif text.startswith((b"<!doctype html", b"<html")):
        name = "web page"
    looks = f"; it looks like {name}" if name else ""
    return f"not an image of a supported format ({', '.join(FORMATS)}{looks})"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 100 else text[:97] + "..."
