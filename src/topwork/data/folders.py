"""Lists the files in a folder recursively.

In: a folder. Out: :class:`Found`, the names of its files and folders, and what is not used with the reason; and the bytes of a file.

The rule for folders, the same everywhere: the first level names the class (or the part: train, valid, test), nested
folders belong to it. Hidden files and folders (leading dot, or left by an operating system) are named and not read.
Links are followed after all real files are listed. Their targets count at the place of the link, so that folders of
links into a store are a layout like any other; loops are not followed, and no image is used twice. Only regular files are opened.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from topwork.data.samples import Reject
from topwork.errors import ImageError
from topwork.files import error_reason
from topwork.text import natural_key

_OF_TOPWORK = (("settings.json", "manifest.parquet"), ("topwork.json", "model.safetensors"))  # run, model folder
_SYSTEM_NAMES = {
    "thumbs.db", "_ds_store", "desktop.ini", "__macosx", "$recycle.bin", "system volume information", "@eadir", "#recycle", "lost+found",
    "__pycache__",
}  # fmt: skip
MAX_FILE_BYTES = 512 << 20  # its bytes count towards the 1 GB that one file may cost
MAX_TABLE_BYTES = 1 << 30
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Found:
    """The names below a root, with ``/``, whether it is a folder, an archive or behind a URL.

    Attributes:
        rejects: what is not used.
        links: for a file that is a link or lies behind one, the name under which the same file was listed first.
        read: the bytes of a file, for tables among them; raises ImageError.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    read: Callable[[str], bytes] = lambda _: b""


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


def cached_by_version(n_kept: int) -> Callable[[Callable[Concatenate[Path, P], T]], Callable[Concatenate[Path, P], T]]:
    """Keeps what a function makes of a file or folder, its first argument, until that changes."""

    def decorated(function: Callable[Concatenate[Path, P], T]) -> Callable[Concatenate[Path, P], T]:
        kept: Any = lru_cache(n_kept)(lambda path, _version, *args, **options: function(path, *args, **options))

        def call(path: Path, /, *args: P.args, **options: P.kwargs) -> T:
            found: T = kept(path, _version_of(path), *args, **options)
            return found

        return call

    return decorated


def _version_of(path: Path) -> tuple[int, ...]:
    status = path.stat()
    newest = max(item.stat().st_mtime_ns for item in path.iterdir()) if stat.S_ISDIR(status.st_mode) else 0
    return status.st_mtime_ns, status.st_size, newest


def walk_folder(root: Path) -> Found:
    """Every file and folder below a folder, real ones before links."""
    walk = _Walk(root)
    walk.list_below("")
    # Links last, in natural order, and again for links found behind links: what is real always wins.
    is_first = True
    while walk.pending:
        pending, walk.pending = sorted(walk.pending, key=natural_key), []
        for name in pending:
            walk.follow(name, is_first)
        is_first = False
    return walk.found


class _Walk:
    """What one walk has met; links wait in ``pending`` until everything real has been seen."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found = Found(read=lambda name: read_regular_file(root / name, MAX_TABLE_BYTES))
        self.pending: list[str] = []
        self._folders = {_identity(root.stat()): ""}
        self._files: dict[tuple[int, int], str] = {}

    def list_below(self, relative: str, *, is_again: bool = False) -> None:
        unread = [relative]
        while unread:
            folder = unread.pop()
            try:
                with os.scandir(self.root / folder) as scan:
                    items = sorted(scan, key=lambda item: natural_key(item.name))
            except OSError as error:
                self.found.rejects.append(Reject(folder + "/", f"folder cannot be read: {error_reason(error)}"))
                continue
            if folder and is_run({item.name for item in items}):  # of ``fit`` in the folder of the images
                self.found.folders.remove(folder)
                self.found.rejects.append(Reject(folder + "/", "a run or model", expected=True))
                continue
            for item in items:
                name = f"{folder}/{item.name}" if folder else item.name
                if is_hidden(item.name):
                    self.found.rejects.extend(_hidden_rejects(self.root, name, item))
                elif item.is_symlink():
                    if not is_again:  # its target was listed with the folder itself
                        self.pending.append(name)
                elif item.is_dir(follow_symlinks=False):
                    # A bind mount can show a folder twice.
                    first = self._folders.setdefault(_identity(item.stat(follow_symlinks=False)), name)
                    if is_again or first == name:
                        self.found.folders.append(name)
                        unread.append(name)
                else:
                    self._take_file(name, item.stat(follow_symlinks=False), is_link=is_again)

    def _take_file(self, name: str, status: os.stat_result, *, is_link: bool) -> None:
        if not stat.S_ISREG(status.st_mode):
            self.found.rejects.append(Reject(name, "not a regular file"))
            return
        first = self._files.setdefault(_identity(status), name)
        if is_link and first != name:
            self.found.links[name] = first
        self.found.files.append(name)

    def follow(self, name: str, is_first: bool) -> None:
        """Adds the target of a link: new files and folders, and those already listed under the link's name as well.

        A folder that holds the link itself would be a loop. Folders that were listed are walked again only for links that do
        not lie behind other links, so the walk ends.
        """
        try:
            status = (self.root / name).stat()
        except (OSError, RuntimeError) as error:
            self.found.rejects.append(Reject(name, f"broken link or link loop: {error_reason(error)}"))
            return
        if not stat.S_ISDIR(status.st_mode):
            self._take_file(name, status, is_link=True)
            return
        first = self._folders.setdefault(_identity(status), name)
        if first != name and (not is_first or f"{name}/".startswith(f"{first}/".lstrip("/"))):
            self.found.rejects.append(Reject(name, "link to a folder already listed", expected=True))
            return
        self.found.folders.append(name)
        self.list_below(name, is_again=first != name)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def is_run(names: Container[str]) -> bool:
    """Whether a folder with these files is a run or a model folder."""
    return any(first in names and second in names for first, second in _OF_TOPWORK)


def is_hidden(name: str) -> bool:
    """Whether files or folders of this name are skipped."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def hidden_reason(name: str) -> str | None:
    """Why a path such as ``a/.b/c.jpg`` is skipped; None if it is not."""
    *folders, own = name.split("/")
    if any(map(is_hidden, folders)):
        return "in a hidden or system folder"
    return "hidden or system file" if is_hidden(own) else None


def _hidden_rejects(root: Path, name: str, item: os.DirEntry[str]) -> Iterator[Reject]:
    if not item.is_dir(follow_symlinks=False):
        yield Reject(name, "hidden or system file", expected=True)
    elif "/" not in name:  # .git and the like next to the class folders: one line is enough
        yield Reject(name + "/", "hidden or system folder", expected=True)
    else:
        for folder, _, files in os.walk(root / name):
            for file in files:
                yield Reject(os.path.relpath(Path(folder) / file, root), "in a hidden or system folder", expected=True)
