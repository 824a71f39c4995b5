"""Tar and zip archives, read in place: nothing is ever unpacked to the disk.

In: an archive somebody else may have made. Out: the names in it that may be images, those set aside with the reason, and
the bytes of a member. Names that lead outside (``..``, absolute, with a drive), links, devices and encrypted members are
named and left out; the number of members, the size of each and the ratio of compression have limits.

A zip and a plain tar are read at any place and from several threads. A compressed tar has to be read from front to back:
its members are listed in the order of the archive, and a step back costs at most ``_CHECKPOINT_BYTES`` of decompression
for gzip (states of the decompressor are kept along the way), or a start from the front for bzip2 and xz.
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import tarfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol, cast

from topwork.data.folders import is_hidden
from topwork.data.samples import Reject
from topwork.errors import ImageError, UsageError
from topwork.files import error_reason
from topwork.text import escape

MAX_MEMBERS = 2_000_000
MAX_MEMBER_BYTES = 1 << 29  # more than the largest image that would be decoded
MAX_RATIO = 200  # images hardly shrink; what does so more strongly than this, and is large, was made to do harm
_HARMLESS_BYTES = 1 << 30  # below this no ratio does harm
_HARMLESS_MEMBER_BYTES = 1 << 26
_CHECKPOINT_BYTES = 1 << 24
_KEPT_BYTES = 1 << 26
_SOME = 1 << 20
_GZIP = 31  # zlib's window bits for a gzip header and trailer
# What damaged archives make the readers raise. MemoryError is not among them: that is a matter of the machine.
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RuntimeError,
    NotImplementedError,
    AttributeError,
    IndexError,
)


@dataclass
class Archive:
    """The members of an archive that may be images.

    Attributes:
        names: cleaned paths of regular members, in the order of reading.
        folders: every folder that exists by itself or by a member in it.
        is_sequential: reading in another order than that of ``names`` is slow.
    """

    reader: MemberReader
    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    members: dict[str, Any] = field(default_factory=dict)
    is_sequential: bool = False


class MemberReader(Protocol):
    """Whoever reads the bytes of a member."""

    def read(self, member: Any) -> bytes:
        """All bytes of one member. Called from several threads."""


def is_archive(path: Path) -> bool:
    """Whether the first bytes of a file are those of a zip, a tar, or a compressed file that may be one."""
    try:
        with open(path, "rb") as file:
            head = file.read(265)
    except OSError:
        return False
    compressed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"))
    return compressed or head.startswith((b"PK\3\4", b"PK\5\6")) or head[257:262] == b"ustar"


def open_archive(path: Path) -> Archive:
    """Lists an archive; the same file is listed once a process.

    Raises:
        UsageError: no readable archive, or beyond the limits.
    """
    try:
        status = path.stat()
        return _open(path.absolute(), (status.st_mtime_ns, status.st_size))
    except _DAMAGE as error:
        raise UsageError(f"{escape(str(path))}: cannot be read as an archive: {_reason(error)}.") from None


def read_member(root: Path, path: str) -> bytes:
    """The bytes of one member of an archive."""
    try:
        archive = open_archive(root)
    except UsageError as error:
        raise ImageError(str(error)) from None
    member = archive.members.get(path)
    if member is None:
        raise ImageError("is not in the archive any more")
    try:
        return archive.reader.read(member)
    except _DAMAGE as error:
        raise ImageError(f"cannot be read from the archive: {_reason(error)}") from None


@lru_cache(maxsize=4)
def _open(path: Path, _version: tuple[int, int]) -> Archive:
    with open(path, "rb") as file:
        head = file.read(6)
    return _open_zip(path) if head[:2] == b"PK" else _open_tar(path, head)


def _reason(error: BaseException) -> str:
    text = error_reason(error) if isinstance(error, OSError) else " ".join(str(error).split())
    return text or type(error).__name__


# ---- names


def clean_name(name: str) -> str | None:
    """A member's name relative to the archive, or None where it does not lead to a place inside."""
    # Zips made on Windows may use backslashes; where a name has both, taking both as separators is the careful reading.
    pieces = [piece for piece in re.split(r"[/\\]", name) if piece not in ("", ".")]
    if not pieces or ".." in pieces or "\0" in name or name[0] in "/\\" or re.match(r"[A-Za-z]:", name):
        return None
    return "/".join(pieces)


class _Members:
    """Sorts members into images-to-be, folders and rejects."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self._folders: set[str] = set()
        self._n_seen = 0

    def count(self) -> None:
        self._n_seen += 1
        if self._n_seen > MAX_MEMBERS:
            raise UsageError(f"the archive has more than {MAX_MEMBERS:,} members; divide it.")

    def add(self, raw_name: str, member: Any, reason: str | None) -> None:
        """Takes a file, or names it where there is a reason against it."""
        name = clean_name(raw_name)
        if name is None:
            reason, name = "leads outside the archive", raw_name
        elif reason is None:
            reason = _hidden_reason(name)
        if reason is None and name in self.archive.members:
            reason = "the name is used twice in the archive"
        if reason is not None:
            self.archive.rejects.append(Reject(name, reason, expected=_hidden_reason(name) is not None))
            return
        self.archive.members[name] = member
        self.archive.names.append(name)
        self.add_folders(name.rpartition("/")[0])

    def add_folders(self, name: str) -> None:
        while name and name not in self._folders and not any(is_hidden(piece) for piece in name.split("/")):
            self._folders.add(name)
            self.archive.folders.append(name)
            name = name.rpartition("/")[0]


def _hidden_reason(name: str) -> str | None:
    *folders, own = name.split("/")
    if any(is_hidden(piece) for piece in folders):
        return "in a hidden or system folder"
    return "hidden or system file" if is_hidden(own) else None


# ---- zip


class _ZipReader:
    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file

    def read(self, member: zipfile.ZipInfo) -> bytes:
        with self._file.open(member) as stream:  # the CRC is checked when the end is reached
            data = stream.read(member.file_size + 1)
        if len(data) != member.file_size:
            raise ImageError("is larger than the archive says")
        return data


def _open_zip(path: Path) -> Archive:
    _check_directory_size(path)
    file = zipfile.ZipFile(path)
    archive = Archive(_ZipReader(file))
    members = _Members(archive)
    for member in file.infolist():
        members.count()
        if member.is_dir():
            members.add_folders(clean_name(member.filename) or "")
        else:
            members.add(member.filename, member, _zip_reason(member))
    archive.names.sort(key=lambda name: archive.members[name].header_offset)
    return archive


def _zip_reason(member: zipfile.ZipInfo) -> str | None:
    kind = (member.external_attr >> 16) & 0o170000
    if kind == 0o120000:
        return "a link, which is not followed in archives"
    if kind not in (0, 0o100000):
        return "not a regular file"
    if member.flag_bits & 1:
        return "encrypted"
    if member.file_size > MAX_MEMBER_BYTES:
        return f"larger than {MAX_MEMBER_BYTES >> 20} MiB"
    if member.file_size > _HARMLESS_MEMBER_BYTES and member.file_size > MAX_RATIO * max(1, member.compress_size):
        return f"would grow more than {MAX_RATIO}-fold"
    return None


def _check_directory_size(path: Path) -> None:
    """Refuses a directory that cannot belong to few enough members before zipfile reads it into memory."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65_600))
        tail = file.read()
    place = tail.rfind(b"PK\5\6")
    n_bytes = int.from_bytes(tail[place + 12 : place + 16], "little") if place >= 0 else 0
    if min(n_bytes, size) > MAX_MEMBERS * 200:
        raise UsageError(f"{escape(str(path))}: has more than {MAX_MEMBERS:,} members; divide it.")


# ---- tar


@dataclass(frozen=True, slots=True)
class _Span:
    """Where the bytes of a member lie in the (decompressed) tar, and the number of the next member."""

    start: int
    n_bytes: int


class _TarReader:
    """Reads a plain tar at any place."""

    def __init__(self, path: Path) -> None:
        self.file = _opened(path)
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self.file.close()

    def read(self, member: _Span) -> bytes:
        """All bytes of one member."""
        with self._lock:
            self.file.seek(member.start)
            data = self.file.read(member.n_bytes)
        if len(data) != member.n_bytes:
            raise ImageError("the archive ends within it")
        return data


class _StreamReader:
    """Reads a compressed tar from front to back; what a thread skips on its way is kept for the others."""

    def __init__(self, stream: IO[bytes], spans: list[_Span]) -> None:
        self._stream = stream
        self._spans = spans
        self._number = {span.start: number for number, span in enumerate(spans)}
        self._next = 0
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, member: _Span) -> bytes:
        with self._lock:
            if member.start in self._kept:
                return self._kept.pop(member.start)
            number = self._number[member.start]
            # Threads ask nearly in order: what lies between is wanted at once by the others.
            if self._next < number <= self._next + 64:
                for skipped in self._spans[self._next : number]:
                    self._keep(skipped.start, self._read(skipped))
            self._next = number + 1
            return self._read(member)

    def _read(self, span: _Span) -> bytes:
        self._stream.seek(span.start)
        data = self._stream.read(span.n_bytes)
        if len(data) != span.n_bytes:
            raise ImageError("the archive ends within it")
        return data

    def _keep(self, start: int, data: bytes) -> None:
        self._kept[start] = data
        while sum(map(len, self._kept.values())) > _KEPT_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)


def _open_tar(path: Path, head: bytes) -> Archive:
    stream = _decompressed(path, head)
    plain = _TarReader(path)
    archive = Archive(plain, is_sequential=stream is not None)
    members = _Members(archive)
    with tarfile.open(fileobj=stream or plain.file, mode="r:", errorlevel=0) as file:
        for member in _until_damage(file, archive):
            members.count()
            if member.isdir():
                members.add_folders(clean_name(member.name) or "")
            else:
                members.add(member.name, _Span(member.offset_data, member.size), _tar_reason(member))
            # tarfile keeps every member it has seen; ours are enough.
            file.members = []  # type: ignore[attr-defined]
            _check_ratio(path, member.offset_data + member.size if stream is not None else 0)
    if stream is not None:
        archive.reader = _StreamReader(stream, [archive.members[name] for name in archive.names])
    return archive


def _until_damage(file: tarfile.TarFile, archive: Archive) -> Iterator[tarfile.TarInfo]:
    """Members in order; where the archive is damaged, what came before counts and the rest is named."""
    seen = False
    while True:
        try:
            member = file.next()
        except _DAMAGE as error:
            if not seen:
                raise
            archive.rejects.append(Reject("(rest of the archive)", f"damaged: {_reason(error)}"))
            return
        if member is None:
            return
        seen = True
        yield member


def _tar_reason(member: tarfile.TarInfo) -> str | None:
    if member.issym() or member.islnk():
        return "a link, which is not followed in archives"
    if not member.isreg() or member.issparse():
        return "not a regular file"
    if member.size > MAX_MEMBER_BYTES:
        return f"larger than {MAX_MEMBER_BYTES >> 20} MiB"
    return None


def _check_ratio(path: Path, n_bytes: int) -> None:
    if n_bytes > _HARMLESS_BYTES and n_bytes > MAX_RATIO * path.stat().st_size:
        raise UsageError(f"{escape(str(path))}: grows more than {MAX_RATIO}-fold, as images never do.")


def _opened(path: Path) -> IO[bytes]:
    """A file that stays open as long as the archive is known; whoever holds it closes it when that ends."""
    return open(path, "rb")


def _decompressed(path: Path, head: bytes) -> IO[bytes] | None:
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], GzipStream(path))
    if head.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(path))
    if head.startswith(b"\xfd7zXZ"):
        return cast(IO[bytes], lzma.LZMAFile(path))
    return None


class GzipStream:
    """A decompressed gzip file in which one can step back: the decompressor's state is kept every few megabytes."""

    def __init__(self, path: Path) -> None:
        self._file = _opened(path)
        # (decompressed position, compressed position, state); a state weighs about 40 kB
        self._checkpoints: list[tuple[int, int, Any]] = [(0, 0, zlib.decompressobj(_GZIP))]
        self._state: Any = None  # the decompressor; None between two gzip files that are joined end to end
        self._position = self._offset = 0
        self._pending = self._buffer = b""
        self._restart(0)

    def __del__(self) -> None:
        self._file.close()

    def tell(self) -> int:
        """The decompressed position."""
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a decompressed position; stops at the end of the data."""
        target = position + (self._position if whence == os.SEEK_CUR else 0)
        start_of_buffer = self._position - self._offset
        if target < start_of_buffer:
            self._restart(target)
        elif target < self._position:
            self._position, self._offset = target, target - start_of_buffer
        while self._position < target and self._take(target - self._position):
            pass
        return self._position

    def read(self, n_bytes: int) -> bytes:
        """So many bytes, fewer at the end of the data."""
        pieces = []
        while n_bytes and (piece := self._take(n_bytes)):
            pieces.append(piece)
            n_bytes -= len(piece)
        return b"".join(pieces)

    def _restart(self, target: int) -> None:
        start, place, state = [checkpoint for checkpoint in self._checkpoints if checkpoint[0] <= target][-1]
        self._file.seek(place)
        self._state = state.copy()
        self._position, self._pending = start, b""
        self._buffer, self._offset = b"", 0

    def _take(self, n_bytes: int) -> bytes:
        if self._offset == len(self._buffer):
            self._buffer, self._offset = self._decompress(), 0
        piece = self._buffer[self._offset : self._offset + n_bytes]
        self._offset += len(piece)
        self._position += len(piece)
        return piece

    def _decompress(self) -> bytes:
        """The next decompressed bytes, at most a few megabytes; b"" at the end."""
        while True:
            if not self._pending:
                self._remember()
                self._pending = self._file.read(_SOME)
            if self._state is None:
                self._pending = self._pending.lstrip(b"\0")  # padding, as tapes have it
                if not self._pending:
                    return b""
                self._state = zlib.decompressobj(_GZIP)  # gzip files may be joined end to end
            at_end = not self._pending
            data: bytes = self._state.decompress(self._pending, 4 * _SOME)
            self._pending = self._state.unconsumed_tail
            if self._state.eof:
                self._pending, self._state = self._state.unused_data, None
            elif at_end and not data:
                raise EOFError("the compressed data end too early")
            if data:
                return data

    def _remember(self) -> None:
        if self._state is not None and self._position >= self._checkpoints[-1][0] + _CHECKPOINT_BYTES:
            self._checkpoints.append((self._position, self._file.tell(), self._state.copy()))
