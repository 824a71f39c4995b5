"""Errors shown to users, with their exit status.

Every message is one line that names the file, option or request, the reason, and what to try next.
"""

from __future__ import annotations


class TopworkError(Exception):
    """A failure: exit status 1."""

    exit_status = 1


class UsageError(TopworkError):
    """A usage error (wrong option, path or data): exit status 2."""

    exit_status = 2


class AmbiguousError(UsageError):
    """The images can be read in several ways. The message lists them, one per line, so that others can be added."""


class NoLabelColumnError(UsageError):
    """A table has no column of labels, as that of a competition's test part."""


class InputError(UsageError, ValueError):
    """An invalid value passed from Python; also a ``ValueError``, as scikit-learn users and tools expect."""


class ImageError(TopworkError):
    """An image cannot be used. ``str(error)`` is a short reason without the path.

    Code that reads many images catches it and counts a reject.
    """


class ModelError(TopworkError):
    """A model folder, checkpoint or export is damaged, modified, or from a newer version."""


class DownloadError(TopworkError):
    """Weights or data could not be downloaded."""


def changed_since_scan(path: str, reason: object) -> TopworkError:
    """The error for an image that was usable when it was scanned and cannot be used now."""
    return TopworkError(f"{path}: changed since the scan ({reason}). Restore the image, or run fit again.")


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class Interrupted(BaseException):
    """The program was interrupted by a signal; progress is saved. Exit status 128 + ``signum``."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
