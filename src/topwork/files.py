"""Atomic writing of files and folders, locks, and error messages of the operating system."""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from topwork.errors import TopworkError, UsageError
from topwork.text import escape

BUSY = "another process is writing here. Wait for it to finish, or choose another --out."
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)

_LOG = logging.getLogger("topwork.cache")


@contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """Yields a temporary path and renames it to ``final`` once its data is on disk.

    After an exception the temporary file is removed and ``final`` is unchanged.

    Raises:
        TopworkError: it could not be written (full disk, permissions), with its name.
    """
    partial = _beside(final)
    try:
        with writing(final):
            yield partial
            _flush_file(partial)
            os.replace(partial, final)
            flush_folder(final.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces ``final`` once it is complete.

    After an exception the temporary folder is removed and ``final`` is unchanged.

    Raises:
        TopworkError: it could not be written (full disk, permissions), with its name.
    """
    partial = _beside(final)
    try:
        with writing(final):
            partial.mkdir(parents=True)
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    _flush_file(path)
            replace_folder(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def replace_folder(new: Path, final: Path) -> None:
    """Renames a complete folder to its final name; the old folder is deleted afterwards, or restored on failure."""
    old = _beside(final)
    with contextlib.suppress(FileNotFoundError):
        os.replace(final, old)
    try:
        os.replace(new, final)
    except OSError:
        if old.exists():
            os.replace(old, final)
        raise
    flush_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the errors of libraries that cannot write ``path`` into one error that names it."""
    try:
        yield
    except Exception as error:
        # safetensors and OpenVINO do not raise OSError if the disk is full.
        is_theirs = type(error).__name__ == "SafetensorError" or "iostream" in str(error)
        if not is_theirs and not (isinstance(error, OSError) and _is_below(error.filename, path)):
            raise
        raise TopworkError(
            f"{escape(str(path))}: cannot be written: {error_reason(error)}. Free some space, or write elsewhere (--out for "
            "results, TOPWORK_CACHE for the cache)."
        ) from error


@contextmanager
def writing_cache(path: Path) -> Iterator[None]:
    """Turns an error of the operating system into one that names ``path`` and TOPWORK_CACHE."""
    try:
        yield
    except OSError as error:
        advice = "Set TOPWORK_CACHE to a folder on another disk."
        raise TopworkError(f"{escape(str(path))}: cannot be written: {error_reason(error)}. {advice}") from None


def _is_below(named: object, path: Path) -> bool:
    """Whether an error is about writing ``path``: it names no file, one in its folder, or a folder above it."""
    found = None if named is None else Path(os.fsdecode(str(named)))
    return found is None or found.is_relative_to(path.parent) or path.is_relative_to(found)


def _beside(final: Path) -> Path:
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")


def is_partial(path: Path) -> bool:
    """Whether a file or folder is a partial one left by a killed process."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.partial", path.name) is not None


def remove_partial(folder: Path) -> None:
    """Removes partial files in a folder and below; no other process may be writing there."""
    for path in [path for path in folder.rglob(".*.partial") if is_partial(path)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Makes a new name durable; not every platform can open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def error_reason(error: Exception) -> str:
    """The message of the operating system, in lower case and without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).lower()


@lru_cache
def writable_folder(folder: Path, advice: str) -> Path:
    """The folder, created if needed; if it is read-only, a temporary one with links to its files.

    The temporary folder is removed when the process ends, with one note in the log (``topwork.cache``). It is not used
    for a full or failing disk.

    Raises:
        TopworkError: there is no temporary folder either.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if error.errno not in _NOT_ALLOWED:
            return folder
        problem = f"{escape(str(folder))}: cannot be written ({error_reason(error)})"
    try:
        temporary = Path(tempfile.mkdtemp(prefix="topwork-"))
    except OSError as error:
        raise TopworkError(f"{problem}, and there is no temporary folder: {error_reason(error)}. {advice}") from None
    atexit.register(_remove, temporary, os.getpid())
    for place, folders, names in os.walk(folder.absolute()):
        below = temporary / Path(place).relative_to(folder.absolute())
        for name in folders:
            (below / name).mkdir()
        for name in names:
            (below / name).symlink_to(Path(place, name))
    _LOG.warning("%s: what is there is used, and nothing new is kept. %s", problem, advice)
    return temporary


def _remove(folder: Path, process: int) -> None:
    """Deletes a temporary folder at the end of the process that created it, not of forked children."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(final: Path, busy: str = BUSY) -> Iterator[None]:
    """Locks a file or folder for this process, by a lock file next to it that is removed at the end.

    Locks of dead processes are ignored. Parent folders are created.

    Args:
        busy: error text, after the name, if another process holds the lock.

    Raises:
        UsageError: another process is writing there.
        TopworkError: the lock cannot be written.
    """
    import filelock

    path = final.with_name(f".{final.name}.lock")
    lock = filelock.FileLock(path, timeout=0)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(f"{escape(str(final))}: {busy}") from None
    except OSError as error:
        raise TopworkError(f"{escape(str(final))}: cannot be written: {error_reason(error)}.") from error
    try:
        yield
    finally:
        # Removed while it is held: a process that opened it in the meantime notices and tries again.
        path.unlink(missing_ok=True)
        lock.release()
