"""Tar and zip archives: listed and read in place, within limits.

In: an untrusted archive. Out: the names of possible images in it, what is not used with the reason, and
the bytes of a member. Names that lead outside (``..``, absolute, with a drive), links, devices and encrypted members are
named and left out. Limits: the number of members, the size of each, of the headers and of the list of names, the ratio
of compression.

Zips and plain tars support random access from several threads. A compressed tar is decompressed once into the
cache, as one plain tar; no member is ever unpacked.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import re
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

from topwork.data.folders import hidden_reason
from topwork.data.samples import Reject
from topwork.errors import ImageError, UsageError
from topwork.files import atomic_file, error_reason, writing_cache
from topwork.settings import cache_folder
from topwork.text import escape, percent

MAX_MEMBERS = 2_000_000
MAX_MEMBER_BYTES = 1 << 29  # more than the largest image that would be decoded
MAX_RATIO = 200  # images hardly compress; a large archive beyond this ratio counts as a decompression bomb
_HARMLESS_BYTES = 1 << 30  # below this no ratio does harm
_HARMLESS_MEMBER_BYTES = 1 << 26
_MAX_HEADER_BYTES = 1 << 20  # of one header of a tar, which is read into memory; names have a few hundred bytes
_MAX_GLOBAL_FIELDS = 1000
_MAX_DIRECTORY_SHARE = 0.25  # of a zip that the list of its members may take; images are larger than their names
_HARMLESS_DIRECTORY_BYTES = 1 << 22
_SOME = 1 << 20
# What damaged archives make the readers raise. MemoryError is not among them: that depends on the machine.
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
        read: the bytes of one of the values of ``members``; called from several threads.
        names: cleaned paths of regular members, in the order of the archive.
        folders: every folder, listed explicitly or implied by a member.
        members: what the reader needs to find each name.
    """

    read: Callable[[Any], bytes]
    names: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    members: dict[str, Any] = field(default_factory=dict)
    _known_folders: set[str] = field(default_factory=set)
    _n_seen: int = 0

    def count_one(self) -> None:
        """Counts a member; raises UsageError if there are too many."""
        self._n_seen += 1
        if self._n_seen > MAX_MEMBERS:
            raise UsageError(f"the archive has more than {MAX_MEMBERS:,} members; split it.")

    def add(self, raw_name: str, member: Any, reason: str | None) -> None:
        """Adds a file, or rejects it with a reason."""
        name = clean_name(raw_name)
        if name is None:
            reason, name = "leads outside the archive", raw_name
        elif reason is None:
            reason = hidden_reason(name)
        if reason is None and name in self.members:
            reason = "the name is used twice in the archive"
        if reason is not None:
            self.rejects.append(Reject(name, reason, expected=hidden_reason(name) is not None))
            return
        self.members[name] = member
        self.names.append(name)
        self.add_folders(name.rpartition("/")[0])

    def add_folders(self, name: str) -> None:
        """Adds a folder and those that it is in."""
        while name and name not in self._known_folders and hidden_reason(name) is None:
            self._known_folders.add(name)
            self.folders.append(name)
            name = name.rpartition("/")[0]


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
    """Lists an archive, once per process.

    Raises:
        UsageError: the archive is unreadable or exceeds the limits.
    """
    try:
        status = path.stat()
        return _open(path.absolute(), (status.st_mtime_ns, status.st_size))
    except UsageError as error:
        raise error if str(path) in str(error) else UsageError(f"{escape(str(path))}: {error}.") from None
    except _DAMAGE as error:
        raise UsageError(
            f"{escape(str(path))}: cannot be read as an archive: {_reason(error)}. If its download was cut short, download it again."
        ) from None


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
        return archive.read(member)
    except _DAMAGE as error:
        raise ImageError(f"cannot be read from the archive: {_reason(error)}") from None


@lru_cache(maxsize=128)  # shards of one dataset, read in any order
def _open(path: Path, _version: tuple[int, int]) -> Archive:
    with open(path, "rb") as file:
        head = file.read(6)
    if head[:2] == b"PK":
        return _open_zip(path)
    return _open_tar(_decompressed(path, head) if head.startswith(tuple(_COMPRESSIONS)) else path)


def _reason(error: BaseException) -> str:
    text = error_reason(error) if isinstance(error, OSError) else " ".join(str(error).split())
    return text or type(error).__name__


# ---- names


def clean_name(name: str) -> str | None:
    """A member's name relative to the archive, or None if it does not lead to a place inside."""
    # Zips made on Windows may use backslashes; if a name has both, treating both as separators is safest.
    pieces = [piece for piece in re.split(r"[/\\]", name) if piece not in ("", ".")]
    if not pieces or ".." in pieces or "\0" in name or name[0] in "/\\" or re.match(r"[A-Za-z]:", name):
        return None
    return "/".join(pieces)


# ---- zip


def _open_zip(path: Path) -> Archive:
    _check_directory_size(path)
    file = zipfile.ZipFile(path)
    archive = Archive(partial(_read_zip, file))
    for member in file.infolist():
        archive.count_one()
        if member.is_dir():
            archive.add_folders(clean_name(_name_in_zip(member)) or "")
        else:
            archive.add(_name_in_zip(member), member, _zip_reason(member))
    archive.names.sort(key=lambda name: archive.members[name].header_offset)
    return archive


def _name_in_zip(member: zipfile.ZipInfo) -> str:
    """The name of a member; that of macOS is UTF-8 without the flag that says so, which zipfile takes for code page 437."""
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            return member.filename.encode("cp437").decode()
    return member.filename


def _read_zip(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with file.open(member) as stream:  # the CRC is checked when the end is reached
        data = stream.read(member.file_size + 1)
    if len(data) != member.file_size:
        raise ImageError("is larger than the archive states")
    return data


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
        return f"would expand more than {MAX_RATIO}-fold"
    return None


def _check_directory_size(path: Path) -> None:
    """Refuses a zip that is mostly names, or has too many, before zipfile reads their list into memory."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65_600))
        tail = file.read()
    place = tail.rfind(b"PK\5\6")
    n_bytes = min(size, int.from_bytes(tail[place + 12 : place + 16], "little") if place >= 0 else 0)
    if n_bytes > MAX_MEMBERS * 200:
        raise UsageError(f"{escape(str(path))}: has more than {MAX_MEMBERS:,} members; split it.")
    if n_bytes > max(_HARMLESS_DIRECTORY_BYTES, _MAX_DIRECTORY_SHARE * size):
        share = percent(n_bytes / size, 0)
        raise UsageError(
            f"{escape(str(path))}: {share} of the archive are file names, so it cannot be an archive of images."
        )


# ---- tar


class _TarReader:
    """Random access to a plain tar."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb")  # noqa: SIM115 - open as long as the archive is known
        self._lock = threading.Lock()

    def __del__(self) -> None:
        self.file.close()

    def read(self, member: tuple[int, int]) -> bytes:
        """The bytes of a member, which is where they start and how many they are."""
        start, n_bytes = member
        with self._lock:
            self.file.seek(start)
            data = self.file.read(n_bytes)
        if len(data) != n_bytes:
            raise ImageError("the archive is truncated")
        return data


_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Header(tarfile.TarInfo):
    """A tar header with a limit on its size in memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADER_TYPES and self.size > _MAX_HEADER_BYTES:
            raise UsageError(f"a header of {self.size:,} bytes, as no archive of images has")
        if len(tar.pax_headers) > _MAX_GLOBAL_FIELDS:
            raise UsageError(f"more than {_MAX_GLOBAL_FIELDS:,} global header fields, as no archive of images has")
        return super()._proc_member(tar)  # type: ignore[misc, no-any-return]

    def _proc_gnusparse_10(self, *_: object) -> None:
        """Leaves out the map of a sparse file, whose length the file itself states: it is no image anyway."""


def _open_tar(path: Path) -> Archive:
    reader = _TarReader(path)
    archive = Archive(reader.read)
    with tarfile.open(fileobj=reader.file, mode="r:", errorlevel=0, tarinfo=_Header) as file:
        for member in _until_damage(file, archive):
            archive.count_one()
            if member.isdir():
                archive.add_folders(clean_name(member.name) or "")
            else:
                archive.add(member.name, (member.offset_data, member.size), _tar_reason(member))
            # tarfile keeps every member it has seen; ours are enough.
            file.members = []  # type: ignore[attr-defined]
    return archive


def _until_damage(file: tarfile.TarFile, archive: Archive | None) -> Iterator[tarfile.TarInfo]:
    """Members in order; if the archive is damaged, those before the damage, with a note on the rest."""
    seen = False
    while True:
        try:
            member = file.next()
        except _DAMAGE as error:
            if not seen:
                raise
            if archive is not None:
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


# ---- compressed tars

_COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ": lzma.LZMAFile}


def _decompressed(path: Path, head: bytes) -> Path:
    """Decompresses a tar into the cache; if it is damaged, as far as possible.

    Raises:
        UsageError: the compression ratio or header size exceeds the limits.
        TopworkError: the cache cannot be written.
    """
    status = path.stat()
    key = hashlib.sha256(f"{path}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape")).hexdigest()
    plain = cache_folder() / "archives" / f"{key[:32]}.tar"
    if plain.is_file():
        return plain
    limit = max(_HARMLESS_BYTES, MAX_RATIO * status.st_size)
    kind = next(kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic))
    with writing_cache(plain):
        plain.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(plain) as partial_tar, open(partial_tar, "wb") as target, kind(path) as source:
            copy: Any = _Copy(source, target, plain, limit)
            # The headers are read on the way, so that what they ask for is refused before it is decompressed.
            with tarfile.open(fileobj=copy, mode="r|", tarinfo=_Header) as tar:
                for _ in _until_damage(tar, None):
                    tar.members = []  # type: ignore[attr-defined]
            with contextlib.suppress(*_DAMAGE):
                while copy.read(_SOME):
                    pass
    return plain


class _Copy:
    """A stream that copies everything read from it to a file, up to a limit."""

    def __init__(self, source: Any, target: IO[bytes], name: Path, limit: int) -> None:
        self._source, self._target, self._name = source, target, name
        self._limit = limit

    def read(self, n_bytes: int) -> bytes:
        try:
            data: bytes = self._source.read1(n_bytes)
        except _DAMAGE as error:
            raise tarfile.ReadError(_reason(error)) from None
        if self._target.tell() + len(data) > self._limit:
            raise UsageError(f"expands more than {MAX_RATIO}-fold, which images never do")
        with writing_cache(self._name):
            self._target.write(data)
        return data
