"""Errors shown to users, with their exit status.

Every message is one clear line that names the file, option or request, says why, and what to try next.
Nothing here imports anything, so every layer can raise these.
"""

from __future__ import annotations


class TopworkError(Exception):
    """A failure: exit status 1."""

    exit_status = 1


class UsageError(TopworkError):
    """A usage error (wrong option, path or data): exit status 2."""

    exit_status = 2


class InputError(UsageError, ValueError):
    """An invalid value passed from Python; also a ``ValueError``, as scikit-learn users and tools expect."""


class ImageError(TopworkError):
    """An image cannot be used. ``str(error)`` is a short reason without the path.

    Whoever reads many images catches this and counts a reject; it never stops a run.
    """


class ModelError(TopworkError):
    """A model folder, checkpoint or export is damaged, modified, or from a newer version."""


class DownloadError(TopworkError):
    """Weights or data could not be downloaded."""


def changed_since_scan(path: str, reason: object) -> TopworkError:
    """The error for an image that was usable when it was scanned and cannot be used now."""
    return TopworkError(f"{path}: changed since the scan ({reason}). Restore the image, or run fit again.")


class Interrupted(BaseException):
    """A signal asked the program to end; what is open is saved on the way out. Exit status 128 + ``signum``."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
