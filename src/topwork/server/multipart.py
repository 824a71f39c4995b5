"""The files in a ``multipart/form-data`` body (RFC 7578) that is already in memory, and the limits on it.

In: the Content-Type header and the bytes. Out: (name, content) of each file. A form reader that writes to disk is not
needed where the whole body is small by then, and a short one is easier to hold to its limits.
"""

from __future__ import annotations

import re

MAX_PARTS = 200
MAX_HEADER_BYTES = 8192
_MAX_NAME = 500
_FILE_NAME = re.compile(rb';\s*filename=(?:"((?:[^"\\]|\\.)*)"|([^\s;]+))', re.IGNORECASE)


class FormError(ValueError):
    """The body is no well-formed form; ``str(error)`` says why."""


def files_of(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """(name, content) of every file in a form; fields that are no files are left out.

    Raises:
        FormError: no boundary, parts cut short, or beyond the limits.
    """
    delimiter = b"--" + _boundary(content_type)
    if not body.startswith(delimiter):
        start = body.find(b"\r\n" + delimiter)
        if start < 0:
            raise FormError("the boundary that Content-Type names is not in the body")
        body = body[start + 2 :]
    pieces = body[len(delimiter) :].split(b"\r\n" + delimiter, MAX_PARTS + 1)
    if len(pieces) > MAX_PARTS + 1:
        raise FormError(f"more than {MAX_PARTS} parts")
    if not pieces[-1].startswith(b"--") and not (len(pieces) == 1 and pieces[0].startswith(b"--")):
        raise FormError("the form ends before its last boundary")
    return [found for piece in pieces[:-1] if (found := _file(piece)) is not None]


def _boundary(content_type: str) -> bytes:
    match = re.search(r'boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))', content_type, re.IGNORECASE)
    if match is None:
        raise FormError("Content-Type names no boundary")
    return (match[1] or match[2]).encode("latin-1", "replace")


def _file(piece: bytes) -> tuple[str, bytes] | None:
    """One part: headers, an empty line, the content."""
    head, separator, content = piece.partition(b"\r\n\r\n")
    if not separator or (not head.startswith(b"\r\n") and head.strip(b" \t")):
        raise FormError("a part without headers")
    if len(head) > MAX_HEADER_BYTES:
        raise FormError(f"headers of a part larger than {MAX_HEADER_BYTES} bytes")
    disposition = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"content-disposition:")), b"")
    match = _FILE_NAME.search(disposition)
    if match is None:
        return None
    name = match[1] if match[1] is not None else match[2]
    return re.sub(rb'\\(["\\])', rb"\1", name).decode("utf-8", "replace")[:_MAX_NAME], content
