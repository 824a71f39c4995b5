"""What is to be classified: files, folders, archives, patterns and URLs, as a list of single images, and their bytes."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from topwork.data import remote
from topwork.data.archives import is_archive, open_archive, read_member
from topwork.data.folders import is_hidden, read_regular_file
from topwork.data.layouts import looks_like_image, without_notes
from topwork.data.listing import read_image as listed_image
from topwork.data.remote import is_folder, is_url, local_copy, url_of, walk
from topwork.errors import ImageError, UsageError
from topwork.text import escape, natural_key

ARCHIVES = (".zip", ".tar", ".gz", ".tgz")


def list_inputs(names: Sequence[str], *, must_exist: bool = False) -> list[str]:
    """Files to predict on: names as given, folders walked in natural order, patterns expanded, archives listed.

    Members of a tar or zip archive are named ``ARCHIVE/MEMBER``, in the order of the archive; what its reader rejects
    (links, names that lead outside, hidden files) has its row too.

    Args:
        must_exist: whether a name that does not exist is an error; otherwise it becomes an error row.

    Raises:
        UsageError: nothing to predict on, or a name that does not exist.
    """
    inputs: list[str] = []
    for name in names:
        if not name:
            continue
        if name.startswith("~"):
            name = os.path.expanduser(name)  # noqa: PLW2901, PTH111 - a name stays as it was typed but for this
        if is_url(name):
            inputs += _below_url(Path(name))
        elif Path(name).is_dir():
            inputs += _files_below(name)
        elif members := _members(name):
            inputs += members
        elif not os.path.lexists(name) and glob.has_magic(name):
            found = sorted(glob.glob(name, recursive=True), key=natural_key)  # noqa: PTH207 - keeps names as given
            if must_exist and not found:
                raise UsageError(f"{escape(name)}: no file matches this pattern.")
            inputs += found or [name]
        else:
            if must_exist and not os.path.lexists(name) and not _is_member(name):
                raise UsageError(f"{escape(name)}: no such file or folder.")
            inputs.append(name)
    if not inputs:
        raise UsageError("No images. Give files, folders, quoted glob patterns, or - to read a list from stdin.")
    return inputs


def _files_below(folder: str) -> list[str]:
    """Regular files, hidden ones and texts beside images left out; links to folders are not followed, so the walk ends."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            path = str(Path(place, name))
            if not is_hidden(name) and _is_regular(path):
                found.append(path)
    return sorted(without_notes(found), key=natural_key)


def _below_url(path: Path) -> list[str]:
    """The files of a folder behind a URL, the members of an archive behind one, or the URL itself."""
    if looks_like_image(path.name):  # not asked for one by one: what is not there has its row with the reason
        return [url_of(path)]
    if is_folder(path):
        return [url_of(path / name) for name in without_notes(walk(path).files)]
    if path.suffix.lower() in ARCHIVES and is_archive(copy := local_copy(path)):
        return [url_of(path / name) for name in without_notes(open_archive(copy).names)]
    return [url_of(path)]


def _members(name: str) -> list[str]:
    """The members of an archive, the rejected ones last; none if it is no readable archive."""
    if not Path(name).is_file() or not is_archive(Path(name)):
        return []
    try:
        archive = open_archive(Path(name))
    except UsageError:
        return []  # an image with such a beginning, or damaged: it is one row, with the reason
    return [
        f"{name}/{member}" for member in (*without_notes(archive.names), *(reject.path for reject in archive.rejects))
    ]


def _is_member(name: str) -> bool:
    """Whether a name leads into an archive."""
    return any(place.is_file() for place in Path(name).parents)


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return True  # named as an error row


def read_image(image: str | os.PathLike[str] | bytes) -> bytes:
    """The bytes of an input: itself, a file, or a member of an archive, named ``ARCHIVE/MEMBER``.

    Raises:
        ImageError: with the reason.
    """
    if isinstance(image, bytes):
        return image
    path = Path(image)
    if is_url(path):
        return _read_remote(path)
    try:
        return read_regular_file(path)
    except ImageError:
        archive = next((place for place in path.parents if place.is_file()), None)
        if archive is None:
            raise
    member = path.relative_to(archive).as_posix()
    try:
        return read_member(archive, member)
    except ImageError:
        for reject in open_archive(archive).rejects if archive.is_file() else ():
            if f"{archive}/{reject.path}" == str(image):
                raise ImageError(reject.reason) from None
        raise


def _read_remote(path: Path) -> bytes:
    """A file at a URL, or a member of an archive at a URL."""
    archive = next((place for place in path.parents if place.suffix.lower() in ARCHIVES), None)
    if archive is None:
        return remote.read(path)
    return listed_image(archive, path.relative_to(archive).as_posix())
