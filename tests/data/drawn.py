"""Images drawn on the spot and files written in every format, for the tests of anything that reads images.

:func:`scene` draws; :func:`encoded` writes through Pillow; :func:`files` writes one drawing in every format. The rest
builds by hand what Pillow cannot write: every PNG layout, TIFFs tag by tag, EXIF blocks, and very large files that take
little time and memory to make.
"""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]


def scene(width: int = 64, height: int = 48, seed: int = 0) -> Pixels:
    """A smooth picture (H, W, 3) whose four corners differ: red, green, blue and white blocks on colored slopes."""
    down, across = np.mgrid[0:height, 0:width]
    waves = np.random.default_rng(seed).uniform(0.5, 2.0, 3)
    slopes = [across / width, down / height, (across + down) / (width + height)]
    pixels = np.stack([127 + 90 * np.sin(6.28 * (w * s + 0.1 * seed)) for w, s in zip(waves, slopes, strict=True)], -1)
    tall, wide = max(1, height // 4), max(1, width // 4)
    for rows, columns, color in (
        (slice(0, tall), slice(0, wide), (230, 20, 20)),
        (slice(0, tall), slice(width - wide, width), (20, 200, 30)),
        (slice(height - tall, height), slice(0, wide), (30, 40, 220)),
        (slice(height - tall, height), slice(width - wide, width), (250, 250, 250)),
    ):
        pixels[rows, columns] = color
    return pixels.astype(np.uint8)


def encoded(image: Image.Image | NDArray[np.generic], format: str, **options: object) -> bytes:
    """An image as the bytes of a file, written by Pillow."""
    target = io.BytesIO()
    drawn = image if isinstance(image, Image.Image) else Image.fromarray(image)
    drawn.save(target, format, **options)
    return target.getvalue()


def files(pixels: Pixels) -> dict[str, bytes]:
    """One drawing in every format and its main variants; by name, which starts with the format."""
    rgb = Image.fromarray(pixels)
    gray, few = rgb.convert("L"), rgb.quantize(16)
    rgba = rgb.copy()
    rgba.putalpha(gray)
    return {
        "JPEG": encoded(rgb, "JPEG", quality=90),
        "JPEG progressive": encoded(rgb, "JPEG", progressive=True),
        "JPEG gray": encoded(gray, "JPEG"),
        "JPEG CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
        "JPEG arithmetic": ARITHMETIC_JPEG,
        "JPEG odd sampling": ODDLY_SAMPLED_JPEG,
        "JPEG three scans": THREE_SCAN_JPEG,
        "PNG": encoded(rgb, "PNG"),
        "PNG gray": encoded(gray, "PNG"),
        "PNG palette": encoded(few, "PNG"),
        "PNG alpha": encoded(rgba, "PNG"),
        "PNG 16 bit": encoded(np.asarray(gray).astype(np.uint16) * 257, "PNG"),
        "PNG interlaced": png(pixels[:, :, 0], bits=8, color=0, is_interlaced=True),
        "PNG animated": encoded(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)]),
        "WEBP": encoded(rgb, "WEBP", quality=90),
        "WEBP lossless": encoded(rgba, "WEBP", lossless=True, exact=True),
        "WEBP animated": encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)]),
        "GIF": encoded(few, "GIF"),
        "GIF animated": encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)]),
        "BMP": encoded(rgb, "BMP"),
        "BMP palette": encoded(few, "BMP"),
        "TIFF": encoded(rgb, "TIFF"),
        "TIFF LZW": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "TIFF deflate": encoded(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "TIFF JPEG": encoded(rgb, "TIFF", compression="jpeg"),
        "TIFF fax": encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "TIFF pages": encoded(rgb, "TIFF", save_all=True, append_images=[rgb.rotate(90)]),
        "TIFF big": encoded(rgb, "TIFF", big_tiff=True),
    }


# ---- by hand


def chunk(name: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    """A PNG chunk, with a right checksum unless another is given."""
    found = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", found)


def png(
    samples: NDArray[np.generic],
    *,
    bits: int,
    color: int,
    is_interlaced: bool = False,
    extra: bytes = b"",
    stream: bytes | None = None,
) -> bytes:
    """A PNG of any bit depth and color type, with unfiltered rows.

    Args:
        samples: (H, W) or (H, W, channels) of values as stored, each below 2 to the power of ``bits``.
        color: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA.
        extra: chunks to put before the image data, such as a palette.
        stream: compressed rows to write instead of the right ones.
    """
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, int(is_interlaced))
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = []
    for x, y, step_x, step_y in passes if is_interlaced else ((0, 0, 1, 1),):
        rows += [b"\0" + packed(row, bits) for row in samples[y::step_y, x::step_x] if len(row)]
    body = zlib.compress(b"".join(rows)) if stream is None else stream
    return PNG_MAGIC + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def packed(values: NDArray[np.generic], bits: int, order: str = ">") -> bytes:
    """Values of 1 to 16 bits, the first in the upper bits of the first byte; the last byte is filled up."""
    if bits == 16:
        return values.astype(order + "u2").tobytes()
    spread = (values.reshape(-1, 1).astype(np.int64) >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(spread.astype(np.uint8).ravel()).tobytes()


def tiff(
    tags: Mapping[int, tuple[int, Sequence[int]]], pieces: Sequence[bytes], *, order: str = "<", after: int = 0
) -> bytes:
    """A TIFF from its tags, tag to (type, values), and its strips, or tiles where there is a tile width.

    Args:
        after: offset of a second page's directory, 0 for none.
    """
    sizes = [len(piece) for piece in pieces]
    offsets = [8 + sum(sizes[:n]) for n in range(len(sizes))]
    where = (324, 325) if 322 in tags else (273, 279)
    all_tags = {where[0]: (4, offsets), where[1]: (4, sizes), **tags}
    body = b"".join(pieces)
    body += bytes(len(body) % 2)
    place = 8 + len(body) + 2 + 12 * len(all_tags) + 4
    entries, values = b"", b""
    for tag, (kind, numbers) in sorted(all_tags.items()):
        letter = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B", 11: "f"}[kind]
        coded = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        inline = coded.ljust(4, b"\0") if len(coded) <= 4 else struct.pack(order + "I", place + len(values))
        values += coded + bytes(len(coded) % 2) if len(coded) > 4 else b""
        entries += struct.pack(order + "HHI", tag, kind, len(numbers)) + inline
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(body))
    return head + body + struct.pack(order + "H", len(all_tags)) + entries + struct.pack(order + "I", after) + values


def tiff_tags(
    width: int, height: int, bits: Sequence[int], color: int, compression: int = 1
) -> dict[int, tuple[int, Sequence[int]]]:
    """The tags every TIFF needs, for one strip. Color: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK."""
    return {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, bits),
        259: (3, [compression]),
        262: (3, [color]),
        277: (3, [len(bits)]),
        278: (4, [height]),
    }


def bmp(
    width: int,
    height: int,
    bits: int,
    rows: bytes,
    *,
    palette: bytes = b"",
    compression: int = 0,
    masks: Sequence[int] = (),
    n_colors: int = 0,
) -> bytes:
    """A BMP with a header of 40 bytes, or 56 where there are four masks; ``rows`` as stored, padding included."""
    size = 56 if len(masks) == 4 else 40
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, len(rows), 0, 0, n_colors, 0)
    header += struct.pack(f"<{len(masks)}I", *masks) + palette
    return b"BM" + struct.pack("<III", 14 + len(header) + len(rows), 0, 14 + len(header)) + header + rows


def exif(orientation: int, order: str = ">", kind: int = 3) -> bytes:
    """An EXIF block, without its ``Exif`` mark, of one tag: the orientation as a number of that type."""
    value = struct.pack(order + ("H2x" if kind == 3 else "I"), orientation)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return head + struct.pack(order + "HHHI", 1, 0x0112, kind, 1) + value + bytes(4)


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment, right after its start."""
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def stored(orientation: int, upright: Pixels) -> Pixels:
    """The pixels that a file with this EXIF orientation must hold to be displayed as ``upright``."""
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    return np.ascontiguousarray(undo[orientation](upright))


# ---- large files that cost nothing to make


def flat_png(width: int, height: int, *, bits: int, color: int) -> bytes:
    """A PNG of zeros of any size, a thousandth of its pixels in bytes."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    row, squeeze = bytes(1 + (width * channels * bits + 7) // 8), zlib.compressobj(1)
    rows_at_once = max(1, 10_000_000 // len(row))
    pieces = [squeeze.compress(row * min(rows_at_once, height - top)) for top in range(0, height, rows_at_once)]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(768)) if color == 3 else b""
    body = b"".join([*pieces, squeeze.flush()])
    return PNG_MAGIC + chunk(b"IHDR", header) + palette + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tall_jpeg(width: int, height: int) -> bytes:
    """A baseline JPEG of one row of blocks, repeated: each is a restart interval, so all are the same bytes."""
    strip = encoded(scene(width, 16), "JPEG", quality=90, restart_marker_rows=1)
    frame, scan = strip.index(b"\xff\xc0"), strip.index(b"\xff\xda")
    start = scan + 2 + int.from_bytes(strip[scan + 2 : scan + 4], "big")
    head = strip[: frame + 5] + struct.pack(">H", height) + strip[frame + 7 : start]
    coded, n_rows = strip[start:-2], -(-height // 16)
    return head + b"".join(coded + bytes([0xFF, 0xD0 + n % 8]) for n in range(n_rows - 1)) + coded + b"\xff\xd9"


# ---- by encoders that are not at hand: scene(40, 32), written by libjpeg-turbo 2.1.5

# cjpeg -quality 60 -sample 1x1 | jpegtran -arithmetic
ARITHMETIC_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU"
    "`kO^PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2J01*fPAOI)>0T"
    "BQK5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf#07uUH61v>6mt+@Agn-uKq2K<t!PL#{*i~AR3DY(&Bcw=Wlt3FOrSgR;t=Nx9$mE"
    "Cqo;tx6V5rnCFGvQygYtaFq6o`kqengZxQ@0KrL1#$al5~z_KSlcnug>F&f7$rXbQGe90O&P1D%i;Zys6OrW$qR1TlS?57)1>g;TY>2{f~"
    "5M~&?_a#s^X@;^R`UwW?9yjj7FENT}lP8XnZVO#~`ALpv+BG-Wsq#iO_llC_E$mFnsW^yz9YQHv}s4MPo^-M-H%Zk|abh(nj#RR=Zm~RAU"
    "6qE04{{ZR(5QHjP^5AfQ|Je"
)
# cjpeg -quality 60 -optimize -sample 3x1: simplejpeg does not know this sampling
ODDLY_SAMPLED_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU"
    "`kO^PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2A01*fPAOI)>0W"
    "kmq5di}c0sq7R8UO$S0|5a50000000000000CA00IRA2mizXArJro0|WvC0RR9100000000010t5pRAu$CJ2C=dt|HJ?o0RRI50RR91000"
    "000000000adF0|5WT03#6q0RsaB0s{a5000000000100IL91rZVxaj^y?A~BKw+5ij#0RRFK0}%i}0K*zMxT#Zyp!H4N^rtt$ZTdRe>}40"
    "_GHK8kYLQZ$Dvw0hUeEx7%Yn^Hj~yuK-KqKGq|+L^Z7V9fdR&=ruG_~{(U3}KaE$D=9TG!vkjj!9X2@kII?5^-&dXBFdFyV<N}jf^OsDb-"
    "e#cP5f>E~$e@ju3IR(Z;Dsl^E$N@ZmGK_|w(A1o0(rcCr6*Zq~15vNMpq0QmE@2x7l*!>J<nlP3>-X^E)5uKK9LnOflkfAT|Je"
)
# cjpeg -quality 60 -optimize -sample 1x1 -scans, with the script "0; 1; 2;": one scan a component, not progressive
THREE_SCAN_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU"
    "`kO^PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2A01*fPAOI)>0T"
    "BQK5di}c0sq7R82|tS0RaI30000000000000C91_A>I|HJ?x5C8xM0s;d80000000000000330|XKwF$EC@v9con+5iXv0RR9$07fb}xTN"
    "O{!pygCqa4=-H_+_lQf?EABG+EX04ifXnvBYQJsv`}zMF%hNKP^gazbgbGah-@V-lyGPa#tI1HQqLIRnN)j&cW0h~UMfsNkT>S@vKT61$2"
    "|2_+Yi#P46fg%3|3|HJ?o0RaI40RaF2000000000000adC1_A%X03Hzl0s;a80{{R300000000000RjUA5d|R=ak2l}00;pB5dc2`mQ=)+"
    "po+1xpd6K(qD$A)nl8GTy;ZTw4?(Sq2GiMMSmw3TC&kb^s{tzeI>2^GD;evW(JwM-!J<k3!~hoo0RaI40000000000000001qK8I|HJ?y5"
    "dZ-M0RsgA0000000000000330|XKgA+ZG$6e4kf|Jncu0Rs^LKLETVI^4L<<oUu9FP(BVI$W!{K5`yY*J9{#w;JeAJ~hZzlxi;c*AW`^_B"
    "mUxu|E3#!qlsazQ3t7GYY4Q-`-R)>X{pwso7I8|Je"
)
