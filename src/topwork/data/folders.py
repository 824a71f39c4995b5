"""Lists the files in a folder recursively.

In: a folder. Out: a :class:`Walk`: the names of its files and folders, and what is not used with the reason; and the bytes of a file.

The rule for folders, the same everywhere: the first level names the class (or the part: train, valid, test), nested
folders belong to it. Hidden files and folders (leading dot, or left by an operating system) are named and not read.
Links are followed after all real files are listed. Their targets count at the place of the link, so that folders of
links into a store are a layout like any other; loops are not followed, and no image is used twice. Only regular files are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from topwork.data.samples import Reject
from topwork.errors import ImageError
from topwork.files import error_reason
from topwork.text import natural_key

_SYSTEM_NAMES = {
    "thumbs.db", "_ds_store", "desktop.ini", "__macosx", "$recycle.bin", "system volume information", "@eadir", "#recycle", "lost+found",
    "__pycache__",
}  # fmt: skip
MAX_FILE_BYTES = 512 << 20  # its bytes count towards the 1 GB that one file may cost


def read_regular_file(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file; never waits on a pipe or device.

    Raises:
        ImageError: missing, unreadable, not a regular file, or larger than ``max_bytes``.
    """
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would otherwise hang for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise ImageError(error_reason(error)) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):  # asked before Python wraps it, which fails on a folder
            raise ImageError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if status.st_size > max_bytes:
            raise ImageError(f"larger than {max_bytes >> 20} MiB")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise ImageError(error_reason(error)) from None
    finally:
        os.close(descriptor)


@dataclass
class Walk:
    """What one walk has collected; links wait until everything real has been seen.

    Attributes:
        links: for a file that is a link or lies behind one, the name under which the same file was listed first.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)
    seen: dict[tuple[int, int], str] = field(default_factory=dict)
    listed: dict[tuple[int, int], str] = field(default_factory=dict)


def walk_folder(root: Path) -> Walk:
    """Every file and folder below a folder, real ones before links."""
    walk = Walk()
    status = root.stat()
    walk.seen[status.st_dev, status.st_ino] = ""
    _walk_folder(root, "", walk)
    # Links last, in natural order, and again for links found behind links: what is real always wins.
    is_first = True
    while walk.pending:
        pending, walk.pending = sorted(walk.pending, key=natural_key), []
        for name in pending:
            _follow(root, name, walk, is_first)
        is_first = False
    return walk


def _walk_folder(root: Path, relative: str, walk: Walk, *, is_again: bool = False) -> None:
    pending = [relative]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as scan:
                found = sorted(scan, key=lambda item: natural_key(item.name))
        except OSError as error:
            walk.rejects.append(Reject(folder + "/", f"folder cannot be read: {error_reason(error)}"))
            continue
        for item in found:
            name = f"{folder}/{item.name}" if folder else item.name
            if is_hidden(item.name):
                walk.rejects.extend(_hidden_rejects(root, name, item))
            elif item.is_symlink():
                if not is_again:  # its target was listed with the folder itself
                    walk.pending.append(name)
            elif item.is_dir(follow_symlinks=False):
                status = item.stat(follow_symlinks=False)
                if is_again or (status.st_dev, status.st_ino) not in walk.seen:  # a bind mount can show a folder twice
                    walk.seen.setdefault((status.st_dev, status.st_ino), name)
                    walk.folders.append(name)
                    pending.append(name)
            else:
                _take_file(name, item.stat(follow_symlinks=False), walk, is_link=is_again)


def _take_file(name: str, status: os.stat_result, walk: Walk, *, is_link: bool = False) -> None:
    if not stat.S_ISREG(status.st_mode):
        walk.rejects.append(Reject(name, "not a regular file"))
        return
    first = walk.listed.setdefault((status.st_dev, status.st_ino), name)
    if is_link and first != name:
        walk.links[name] = first
    walk.files.append(name)


def _follow(root: Path, name: str, walk: Walk, is_first: bool) -> None:
    """Adds the target of a link: new files and folders, and those already listed under the link's name as well.

    A folder that holds the link itself would be a loop. Folders that were listed are walked again only for links that do
    not lie behind other links, so the walk ends.
    """
    try:
        status = (root / name).stat()
    except (OSError, RuntimeError) as error:
        walk.rejects.append(Reject(name, f"broken link or link loop: {error_reason(error)}"))
        return
    if not stat.S_ISDIR(status.st_mode):
        _take_file(name, status, walk, is_link=True)
        return
    first = walk.seen.setdefault((status.st_dev, status.st_ino), name)
    if first != name and (not is_first or f"{name}/".startswith(f"{first}/".lstrip("/"))):
        walk.rejects.append(Reject(name, "link to a folder already listed", expected=True))
        return
    walk.folders.append(name)
    _walk_folder(root, name, walk, is_again=first != name)


def is_hidden(name: str) -> bool:
    """Whether files or folders of this name are skipped."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _hidden_rejects(root: Path, name: str, item: os.DirEntry[str]) -> Iterator[Reject]:
    if not item.is_dir(follow_symlinks=False):
        yield Reject(name, "hidden or system file", expected=True)
    elif "/" not in name:  # .git and the like next to the class folders: one line is enough
        yield Reject(name + "/", "hidden or system folder", expected=True)
    else:
        for folder, _, files in os.walk(root / name):
            for file in files:
                yield Reject(os.path.relpath(Path(folder) / file, root), "in a hidden or system folder", expected=True)
