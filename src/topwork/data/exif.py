"""Which way up an image is, from its EXIF block. Broken metadata is no reason to lose sound pixels: it means 1."""

from __future__ import annotations

from struct import Struct, error

_BYTE_ORDERS = {
    b"II": (Struct("<I"), Struct("<H"), Struct("<HHI4s")),
    b"MM": (Struct(">I"), Struct(">H"), Struct(">HHI4s")),
}
_ORIENTATION = 0x0112
_BYTE, _SHORT, _LONG = 1, 3, 4


def orientation_of(exif: bytes) -> int:
    """The orientation 1..8 that an EXIF block (a TIFF header and its first directory) asks for, else 1."""
    if exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    layout = _BYTE_ORDERS.get(exif[:2])
    if layout is None:
        return 1
    long, short, entry = layout
    try:
        (start,) = long.unpack_from(exif, 4)
        (n_entries,) = short.unpack_from(exif, start)
        end = min(start + 2 + 12 * n_entries, len(exif) - (len(exif) - start - 2) % 12)
        for tag, kind, _count, value in entry.iter_unpack(exif[start + 2 : end]):
            if tag == _ORIENTATION:
                found = {_BYTE: value[0], _SHORT: short.unpack_from(value)[0], _LONG: long.unpack(value)[0]}.get(
                    kind, 1
                )
                return found if 1 <= found <= 8 else 1
    except error:
        pass
    return 1
