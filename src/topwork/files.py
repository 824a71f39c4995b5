"""Files that are whole at their final name, and what the operating system says when they cannot be had."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from topwork.errors import TopworkError, UsageError
from topwork.text import escape


class atomic_file:
    """Context manager that gives a temporary path and renames it to ``final`` once its data are on the disk.

    After an exception the temporary file is removed and ``final`` is untouched.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.partial = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.partial")

    def __enter__(self) -> Path:
        return self.partial

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                with open(self.partial, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(self.partial, self.final)
                flush_folder(self.final.parent)
        finally:
            self.partial.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Makes the new name itself durable; not every platform can open a folder."""
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


def error_reason(error: Exception) -> str:
    """What the operating system said, in lower case and without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).lower()


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Holds a file or folder for this process alone, by a lock beside it that is removed at the end.

    A lock that a dead process left does not block. Folders above ``final`` are made.

    Raises:
        UsageError: another process is writing there.
        TopworkError: the place cannot be written.
    """
    import filelock

    path = final.with_name(f".{final.name}.lock")
    lock = filelock.FileLock(path, timeout=0)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(
            f"{escape(str(final))}: another process is writing here. Wait for it, or choose another --out."
        ) from None
    except OSError as error:
        raise TopworkError(f"{escape(str(error.filename or final))}: {error_reason(error)}.") from error
    try:
        yield
    finally:
        path.unlink(
            missing_ok=True
        )  # while it is held: whoever opened it meanwhile sees that it is gone and asks again
        lock.release()
