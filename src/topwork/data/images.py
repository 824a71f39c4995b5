"""Decodes image files to upright RGB pixels, for training, prediction, the server and the pages.

In: bytes. Out: :class:`Decoded`, the image as a viewer shows it, with the facts of its file; or :class:`ImageError` with
a short reason, and never another error. Files are not opened here, and no name or extension is looked at.

- The content decides the format. Nothing off the list is read (HEIC and DICOM only with their optional parts), and no outside
  program is started. JPEG has a reader of its own (``jpeg.py``); the other formats are read by Pillow's plugins.
- The first frame or page is the image. It is turned upright, transparent pixels show ``BACKGROUND``, and 16-bit gray is
  scaled to 8 (:func:`gray_levels`). Samples that are signed, floating or wider than 16 bits have no agreed brightness
  and are rejected. Embedded color profiles are not applied; CMYK is plain inks on white.
- What Pillow cannot decode to its last row is rejected. Metadata that concern no pixels may be broken.
- Size and cost are worked out from the header, before anything large is made: ``MAX_PIXELS``, ``MAX_MEMORY_BYTES``.
- The plugins are called directly, never through ``Image.open``, so Pillow's own pixel limit, a setting of the whole
  process, is not touched.
- Thread-safe: nothing is shared between calls.

``export/standalone.py`` does the same in a few lines of Pillow; tests compare the two.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topwork.data import jpeg
from topwork.data.jpeg import MAX_PARTS, check_memory, orientation_of
from topwork.errors import ImageError, InputError, UsageError
from topwork.settings import band_numbers

if TYPE_CHECKING:  # JPEG needs no Pillow, and a shipped model answers its first JPEG without importing it
    from PIL.Image import Image

Pixels = NDArray[np.uint8]

# Raise it whenever the same file may give other pixels, facts or reasons: what is cached depends on it.
DECODER_VERSION = "3"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
HEAD_BYTES = 132  # how much of a file :func:`sniff` looks at
MAX_PIXELS = 120_000_000  # width × height as the header says; more is rejected before anything is decoded
MAX_SIDE = 1_000_000  # pixels; keeps one row, the smallest band there is, at a few megabytes
BACKGROUND = (255, 255, 255)  # what shows through transparent pixels
NO_HEIC = "HEIC, which requires: pip install 'topwork[heic]'"
NO_BRIGHTNESS = "signed, floating-point or more than 16 bits per sample: no standard mapping to brightness"
OUT_OF_MEMORY = "not enough memory to decode it"  # the one reason that lies with the machine and may pass

_BMP_HEADER_SIZES = frozenset({12, 40, 52, 56, 64, 108, 124})
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"mif1"})
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
    *((b"P%d%c" % (number, blank), "PPM, PGM or PBM") for number in range(1, 7) for blank in b" \t\r\n"),
    (b"version https://git-lfs", "pointer of Git LFS, which git lfs pull replaces by the image"),
    (b"PK\3\4", "ZIP archive"),
    (b"\x1f\x8b", "gzip archive"),
    (b"\x89HDF", "HDF5"),
    (b"SIMPLE  =", "FITS"),
    (b"v/1\1", "OpenEXR"),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"hevc": "HEIC sequence", b"msf1": "HEIF sequence", b"crx ": "camera raw"}

# Memory of a decoded image in Pillow, in addition to the file and the finished pixels: WebP and HEIC keep the decoder's planes,
# the bytes it hands over and Pillow's image at once; compressed TIFFs a whole strip.
_BYTES_PER_PIXEL = {"WEBP": 16, "HEIC": 16, "TIFF": 8}
_MAX_RLE_BYTES = 5_000_000  # Pillow decodes the run lengths of a BMP in Python
_MAX_TILE_PIXELS = 40_000_000  # a TIFF's tile may be larger than the image, and is decoded whole
_BAND_PIXELS = 4_000_000
_MIN_SHRUNK_SIDE = 32  # pixels; a band is as many rows as one shrunk row takes, so they must not be too many
_BAND_TYPES = ("uint8", "uint16", "int16", "float32")
_STRETCH = (2, 98)  # percentiles
_INVERSE_TURN = {6: 8, 8: 6}  # the other six orientations are their own inverses


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """The header of an image file.

    Attributes:
        format: ``JPEG``, ``PNG``, ``WEBP``, ``GIF``, ``BMP``, ``TIFF``, ``HEIC`` or ``DICOM``, by content.
        width, height: pixels as displayed: upright, and before any shrinking.
        mode: colors as stored, in Pillow's words: ``1 L LA I;16 P RGB RGBA CMYK YCbCr LAB``.
        orientation: EXIF orientation 1..8; 1 if there is none or it is broken.
        is_animated: the file holds further frames or pages; the first is the image.
        is_gray: stored as gray: one color channel, or a palette of nothing but grays.
        patient: a short hash of the PatientID of a DICOM, "" otherwise.
    """

    format: str
    width: int
    height: int
    mode: str
    orientation: int
    is_animated: bool
    is_gray: bool
    patient: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """An image as a viewer shows it: ``pixels`` uint8 (H, W, 3) RGB, C-contiguous, upright, over ``BACKGROUND``."""

    pixels: Pixels
    facts: ImageFacts


def decode(data: bytes, *, min_side: int | None = None) -> Decoded:
    """Decodes an image file to upright RGB.

    Args:
        data: the whole file.
        min_side: if given, the image may come back smaller, by a power of two, so long as its short side keeps this
            many pixels. That saves most of the time on large photos, and the memory on large images of any format.

    Raises:
        ImageError: the file is not a sound image of a supported format, or would cost too much.
    """
    found = sniff(data[:HEAD_BYTES])
    with reading(str(found)):
        if found is None:
            raise ImageError(_not_supported(data[:256]))
        if found == "DICOM":
            return _decode_dicom(data)
        return _decode_jpeg(data, min_side) if found == "JPEG" else _decode_with_pillow(data, found, min_side)


@contextmanager
def reading(format: str) -> Iterator[None]:
    """Converts any exception of a decoder to ImageError with a short reason."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(OUT_OF_MEMORY) from error
    except (OSError, IndexError, EOFError, struct.error) as error:  # what Pillow meets when data are missing
        raise ImageError("damaged or truncated image data") from error
    except SyntaxError as error:  # what Pillow's plugins raise for headers
        raise ImageError(f"damaged {format}, or a variant that is not supported ({_short(error)})") from error
    except Exception as error:  # damaged files make decoders raise all kinds of errors
        if type(error).__name__ == "DecompressionBombError":  # Pillow's WebP reader looks at Pillow's limit itself
            raise ImageError(f"too large: {_short(error)}") from error
        raise ImageError(f"damaged {format} file ({_short(error)})") from error


def sniff(head: bytes) -> str | None:
    """The format, one of ``FORMATS``, ``HEIC`` or ``DICOM``, that the first bytes of a file are of, or None."""
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
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS and b"avif" not in head[8:32]:
        return "HEIC"
    if head[128:132] == b"DICM":
        return "DICOM"
    return None


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
    looks = f"; this may be: {name}" if name else ""
    return f"not an image of a supported format ({', '.join(FORMATS)}{looks})"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 100 else text[:97] + "..."


def check_size(width: int, height: int) -> None:
    """Raises ImageError for an image that has no pixels or too many."""
    if width < 1 or height < 1:
        raise ImageError(f"has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(f"too large: {width} x {height} is more than {MAX_PIXELS // 10**6} million pixels")
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"too large: {width} x {height} has a side of more than {MAX_SIDE:,} pixels")


def _decode_jpeg(data: bytes, min_side: int | None) -> Decoded:
    header = jpeg.read_header(data)
    check_size(header.width, header.height)
    stored = jpeg.decode(data, header, min_side)
    shown = upright(stored, header.orientation)
    pixels = stored if header.orientation == 1 else np.empty(shown.shape, np.uint8)
    if pixels is not stored:
        _copy(shown, pixels)
    width, height = (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)
    facts = ImageFacts("JPEG", width, height, header.mode, header.orientation, False, header.mode == "L")
    return Decoded(pixels, facts)


def _decode_dicom(data: bytes) -> Decoded:
    from topwork.data import dicom

    header = dicom.read_header(data)
    width, height = int(header.Columns), int(header.Rows)
    check_size(width, height)
    is_animated, mode = int(header.get("NumberOfFrames") or 1) > 1, dicom.mode_of(header)
    facts = ImageFacts("DICOM", width, height, mode, 1, is_animated, mode in ("L", "I;16"), dicom.patient_of(header))
    return Decoded(dicom.pixels_of(header), facts)


# ---- every other format


def _decode_with_pillow(data: bytes, format: str, min_side: int | None) -> Decoded:
    if format == "PNG":
        _check_png_chunks(data)
    with _plugin(format)(io.BytesIO(data)) as image:
        factor = _check_cost(image, data, format, min_side)
        # Asking Pillow's GIF plugin would read on to the second frame, and fail if that is damaged.
        is_animated = data.count(b"\0\x21\xf9\4") > 1 if format == "GIF" else getattr(image, "is_animated", False)
        image.load()
        mode = "I;16" if image.mode.startswith("I;16") else image.mode
        orientation = _orientation(image, format)  # in a PNG it may follow the pixels
        width, height = (image.height, image.width) if orientation >= 5 else image.size
        is_gray = mode in ("1", "L", "LA", "I;16") or (mode == "P" and _is_gray_palette(image))
        turn = 1 if format == "HEIC" else orientation
        return Decoded(
            _rgb(image, turn, factor), ImageFacts(format, width, height, mode, orientation, is_animated, is_gray)
        )


def _plugin(format: str) -> Any:
    if format == "HEIC":
        try:
            from pillow_heif import HeifImageFile
        except ImportError:
            raise ImageError(NO_HEIC) from None
        return HeifImageFile
    return _plugins()[format]


@cache
def _plugins() -> dict[str, Any]:
    """Pillow's reader of each format; made on first use, because JPEG needs no Pillow."""
    from PIL import BmpImagePlugin, GifImagePlugin, Image, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

    class Tiff(TiffImagePlugin.TiffImageFile):
        """Rotated by us for all layouts, and read even if its metadata are broken."""

        orientation = 1

        def _setup(self) -> None:
            _check_tiff(self.tag_v2)
            self.orientation = self.tag_v2.get(274, 1)
            super()._setup()
            self._size = self._tile_size

        def load_prepare(self) -> None:
            if self._im is None:
                self.im = Image.new(self.mode, self.size, None).im  # without Pillow's own pixel limit
            super().load_prepare()

        def load_end(self) -> None:
            pass  # the plugin would read the EXIF block here and turn the image

    return {
        "PNG": PngImagePlugin.PngImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
        "GIF": GifImagePlugin.GifImageFile,
        "BMP": BmpImagePlugin.BmpImageFile,
        "TIFF": Tiff,
    }


def _check_png_chunks(data: bytes) -> None:
    """Raises ImageError for a PNG of very many chunks, each of which costs Pillow a few microseconds."""
    start = 8
    for _ in range(MAX_PARTS):
        if start + 8 > len(data):
            return
        start += 12 + int.from_bytes(data[start : start + 4], "big")
    raise ImageError("too costly to decode: too many chunks")


def _check_tiff(tags: Any) -> None:
    """Raises ImageError for a page that Pillow would read wrongly or at too high a cost; mends wrong color tags."""
    if (
        max(map(len, tags._tagdata.values()), default=0) > 8 * MAX_PARTS
    ):  # looked at before they become Python's numbers
        raise ImageError("too costly to decode: too many strips or tiles")
    photometric, n_samples, bits = tags.get(262, 0), tags.get(277, 1), tags.get(258, (1,))
    if 50706 in tags or photometric in (32803, 34892):
        raise ImageError("camera raw files are not supported")
    if not set(tags.get(339, (1,))) <= {1, 4} or max(bits) > 16:
        raise ImageError(NO_BRIGHTNESS)
    if photometric in (0, 1) and n_samples == 3:
        tags[262] = 2  # three bands are RGB regardless of the color tag
    elif n_samples > 4 + len(tags.get(338, ())) or (photometric in (0, 1) and n_samples > 2):
        raise ImageError(f"has {n_samples} bands; choose red, green and blue with --bands, such as --bands 3,2,1")
    if tags.get(284, 1) == 2 and n_samples > 1 and max(bits) > 8:
        raise ImageError("TIFF with 16-bit colors in separate planes is not supported")
    if photometric == 6 and tags.get(259, 1) == 1 and tuple(tags.get(530, (1, 1))) != (1, 1):
        raise ImageError("TIFF with colors at half resolution and no compression is not supported")
    if photometric == 3 and max(tags.get(320, (256,))) < 256:
        tags[320] = tuple(257 * value for value in tags[320])  # a palette of 8 bits, which should have 16
    _check_pieces(tags)


def _check_pieces(tags: Any) -> None:
    """Raises ImageError unless all strips or tiles are there: Pillow would leave the others black."""
    width, height, tile_width, tile_height = (tags.get(tag, 0) for tag in (256, 257, 322, 323))
    check_size(width, height)
    if tile_width * tile_height > max(_MAX_TILE_PIXELS, width * height):
        raise ImageError("too costly to decode: the tiles are far larger than the image")
    down = -(-height // max(1, tile_height or tags.get(278, height)))
    n_pieces = down * -(-width // max(1, tile_width or width)) * (tags.get(277, 1) if tags.get(284, 1) == 2 else 1)
    if n_pieces > MAX_PARTS:
        raise ImageError("too costly to decode: too many strips or tiles")
    if len(tags.get(324) or tags.get(273) or ()) < n_pieces:
        raise ImageError("truncated: strips or tiles are missing")


def _check_cost(image: Image, data: bytes, format: str, min_side: int | None) -> int:
    """Raises ImageError if the image would cost too much; returns the factor to shrink it by: 1, 2, 4, 8 ..."""
    check_size(*image.size)
    if format == "BMP" and image.info.get("compression") in (1, 2) and len(data) > _MAX_RLE_BYTES:
        raise ImageError("too costly to decode: too long run lengths")
    factor, short, n_pixels = 1, min(image.size), image.width * image.height
    while min_side is not None and -(-short // (2 * factor)) >= max(min_side, _MIN_SHRUNK_SIDE):
        factor *= 2
    per_pixel = 4 if image.info.get("compression") == "raw" else _BYTES_PER_PIXEL.get(format, 4)
    check_memory(len(data) + n_pixels * per_pixel + 3 * n_pixels // factor**2)
    return factor


def _orientation(image: Any, format: str) -> int:
    if format == "HEIC":
        return 1  # libheif has turned it
    found = image.orientation if format == "TIFF" else orientation_of(image.info.get("exif", b""))
    return found if found in range(1, 9) else 1


def _is_gray_palette(image: Image) -> bool:
    colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    return bool((colors == colors[:, :1]).all())


def _rgb(image: Image, orientation: int, factor: int) -> Pixels:
    """Upright pixels, made in bands, so that converting and shrinking never hold a second full image.

    Shrinking averages boxes of ``factor`` pixels a side, like the scaled decoding of JPEG.
    """
    width, height = -(-image.width // factor), -(-image.height // factor)
    pixels = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), np.uint8)
    as_stored = upright(pixels, _INVERSE_TURN.get(orientation, orientation))
    n_rows = max(1, _BAND_PIXELS // (image.width * factor)) * factor
    boxes = [(0, top, image.width, min(top + n_rows, image.height)) for top in range(0, image.height, n_rows)]
    levels = None
    if image.mode.startswith("I;16"):
        levels = gray_levels(max(int(np.asarray(image.crop(box)).max()) for box in boxes))
        if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF whose zero is white
            levels = 255 - levels
        if isinstance(clear := image.info.get("transparency"), int):
            levels[clear] = BACKGROUND[0]
    for box in boxes:
        rows = np.asarray(_band_rgb(image.crop(box), levels).reduce(factor))
        top = box[1] // factor
        _copy(rows, as_stored[top : top + len(rows)])
    return pixels


def _band_rgb(band: Image, levels: NDArray[np.uint8] | None) -> Image:
    from PIL import Image

    if levels is not None:
        return Image.fromarray(levels[np.asarray(band)]).convert("RGB")
    if band.has_transparency_data:
        rgba = band.convert("LA").convert("RGBA") if band.mode == "La" else band.convert("RGBA")
        over = Image.new("RGB", band.size, BACKGROUND)
        over.paste(rgba, mask=rgba.getchannel("A"))
        return over
    if band.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        shown = ImageCms.applyTransform(band, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
        assert shown is not None
        return shown
    if band.mode in ("I", "F"):
        raise ImageError(NO_BRIGHTNESS)
    return band.convert("RGB")


def gray_levels(maximum: int) -> NDArray[np.uint8]:
    """The 8-bit gray of each 16-bit value: a table of 65536.

    The whole range 0..65535 maps to 0..255. Cameras and microscopes also put 8, 10 or 12 bits into 16 without scaling,
    which would look black: if the largest value of the image is below an eighth of the range, the range ends at the
    smallest of 255, 511, 1023 ... that holds it. A file is thus always read the same way.
    """
    limit = 65535 if maximum >= 8192 else max(255, (1 << maximum.bit_length()) - 1)
    levels = np.arange(65536, dtype=np.uint32)
    return np.minimum((levels * 255 + limit // 2) // limit, 255).astype(np.uint8)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """A view of stored pixels (H, W, 3) as EXIF orientation 1..8 says to display them."""
    if orientation in (2, 3, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7):
        pixels = pixels[::-1]
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation == 6:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation == 8 else pixels


def _copy(source: Pixels, target: Pixels) -> None:
    """Copies channel by channel, which is four times faster for rotated images: 0.8 instead of 3.6 ms per megapixel."""
    if source.flags.c_contiguous and target.flags.c_contiguous:
        target[...] = source
        return
    for channel in range(3):
        target[:, :, channel] = source[:, :, channel]


# ---- TIFF files of many bands (satellites, microscopes)


def select_bands(data: bytes, bands: str) -> bytes:
    """Three bands of a TIFF as an uncompressed RGB TIFF; files of other formats are returned unchanged.

    Numbers count from 1, as in GDAL and QGIS. 8-bit samples are unchanged. Others have no standard range, so each band is stretched
    from its 2nd to its 98th percentile, as QGIS shows it. Read by tifffile (extra ``tiff``).

    Raises:
        ImageError: the file has no such band, is damaged, or would cost too much.
        UsageError: tifffile is not installed.
    """
    if sniff(data[:HEAD_BYTES]) != "TIFF":
        return data
    if importlib.util.find_spec("tifffile") is None:
        raise UsageError("--bands requires: pip install 'topwork[tiff]'")
    from PIL import Image

    buffer = io.BytesIO()
    with reading("TIFF"):
        pixels = _stretched(_band_samples(data, bands))
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "TIFF")
    return buffer.getvalue()


def _band_samples(data: bytes, bands: str) -> NDArray[Any]:
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
        if str(page.dtype) not in _BAND_TYPES:
            raise ImageError(f"bands with {page.bitspersample} bits of this kind are not supported")
        check_size(page.imagewidth, page.imagelength)
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
            low, high = np.percentile(values[known], _STRETCH)
            share = (np.where(known, values, low) - low) / max(high - low, 1e-9)
            shown[:, :, band] = np.rint(255 * np.clip(share, 0, 1))
    return shown


# ---- images that are not files


def encoded_image(image: Any) -> bytes:
    """A Pillow image of any mode as the bytes of a file, so that it is decoded as files are."""
    from PIL import Image

    if isinstance(image, bytes):
        return image
    if not isinstance(image, Image.Image):
        raise InputError(f"An image is a path, a Pillow image or a uint8 array, not {type(image).__name__}.")
    if image.mode in ("F", "I"):  # Pillow would clip them to 0..255
        raise ImageError(NO_BRIGHTNESS)
    buffer = io.BytesIO()
    kind = "TIFF" if image.mode in ("CMYK", "YCbCr", "LAB") else "PNG"
    kept = (
        image if kind == "TIFF" or image.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else image.convert("RGB")
    )
    options = {"compress_level": 1} if kind == "PNG" else {}
    kept.save(buffer, kind, exif=image.getexif(), **options)
    return buffer.getvalue()


def as_rgb(array: NDArray[Any]) -> Pixels:
    """uint8 (H, W, 3) of an array (H, W, 3), (H, W, 1) or (H, W); raises InputError for others."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise InputError(
            f"An image array must be uint8 with shape (H, W, 3) or (H, W), not {array.dtype} {array.shape}. "
            "Scale floats to 0..255 and convert them; move channels that come first with array.transpose(1, 2, 0)."
        )
    if array.ndim == 2:
        array = array[:, :, None]
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))
