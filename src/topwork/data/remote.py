"""Images anywhere: files behind any URL that fsspec knows (``s3://``, ``gs://``, ``hf://``, ``https://``, ``sftp://`` ...).

In: a URL. Out: the names below it, the bytes of a file, or a copy of a file in the cache (tables, archives, Parquet). Reads
are retried with back-off. Credentials are those that fsspec's own libraries find; a URL that contains some is refused, so
that none is ever stored in a run or printed.

A URL passes through the rest of topwork as a path: ``Path("s3://bucket/a")`` is ``s3:/bucket/a``, and :func:`url_of` gives
the URL back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from topwork.data.folders import MAX_FILE_BYTES, MAX_TABLE_BYTES, Found, hidden_reason
from topwork.data.samples import Reject
from topwork.errors import ImageError, TopworkError, UsageError
from topwork.files import atomic_file, atomic_folder, writing_cache
from topwork.settings import cache_folder
from topwork.text import escape, natural_key

N_READERS = 32  # reads in flight: at 20 ms a read that is 1,600 images per second
_OF_A_RUN = ("settings.json", "manifest.parquet", "evaluation.json")  # may be replaced; other files of the user may not
_WAITS = (0.2, 1.0, 3.0)  # seconds before each further try
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)  # two letters at least: C:/ is a drive
_SECRET = re.compile(r"[?&][^=&]*(sig|signature|token|key|secret|credential|password)[^=&]*=", re.IGNORECASE)
T = TypeVar("T")
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UsageError)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, also after ``Path`` has taken one of its slashes."""
    return _URL.match(os.fspath(path)) is not None


def url_of(path: str | os.PathLike[str]) -> str:
    """The URL of a path.

    Raises:
        UsageError: it contains credentials.
    """
    url = _URL.sub(lambda match: f"{match[1]}://{'/' * (match[1].lower() == 'file')}", os.fspath(path), count=1)
    host = url.split("://", 1)[1].split("/", 1)[0]
    if ":" in host.rpartition("@")[0] or _SECRET.search(url):
        name = escape(re.sub(r"://[^/@]*@", "://", url).split("?", 1)[0])
        raise UsageError(
            f"{name}: a URL with credentials would be stored in the run. Provide them the way the fsspec library expects."
        )
    return url


def n_threads_for(root: Path, paths: list[str], n_threads: int | None) -> int | None:
    """Threads for reading and decoding: many if reading waits for a network, else as asked."""
    return N_READERS if is_url(root) or any(map(is_url, paths[:1000])) else n_threads


def is_folder(path: Path) -> bool:
    """Whether a URL is a folder.

    Raises:
        UsageError: there is nothing, or it cannot be reached; in one sentence.
    """
    url = url_of(path)
    with _reaching(url):
        fs, place = _opened(url)
        kind = fs.info(place)["type"]
    return bool(kind == "directory")


def walk(path: Path) -> Found:
    """The files below a URL; hidden and too large ones are rejected, as in a local folder."""
    url, folders = url_of(path), set()
    with _reaching(url):
        fs, place = _opened(url)
        listed = fs.find(place, detail=True)
    found = Found(read=lambda name: read(path / name, MAX_TABLE_BYTES))
    for full, info in listed.items():
        name = full.lstrip("/").removeprefix(place.strip("/") + "/")
        if not name or name.endswith("/"):  # the mark of an empty folder
            continue
        if (reason := hidden_reason(name)) is not None:
            found.rejects.append(Reject(name, reason, expected=True))
        elif (info.get("size") or 0) > MAX_FILE_BYTES:
            found.rejects.append(Reject(name, f"larger than {MAX_FILE_BYTES >> 20} MiB"))
        else:
            found.files.append(name)
        folders |= {str(parent) for parent in PurePosixPath(name).parents} - {"."}
    found.files.sort(key=natural_key)
    found.folders = sorted((name for name in folders if hidden_reason(name) is None), key=natural_key)
    return found


def names_in(url: str) -> list[str]:
    """The names of the files in a folder behind a URL; none if it is not there yet.

    Raises:
        UsageError: it cannot be reached.
    """
    with _reaching(url):
        fs, place = _opened(url)
        fs.invalidate_cache()
        with suppress(FileNotFoundError):
            return [name.rpartition("/")[2] for name in fs.find(place, maxdepth=1)]
    return []


def read(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file, retried with back-off.

    Raises:
        ImageError: the file cannot be read, with the reason.
    """

    def fetch() -> bytes:
        fs, place = _opened(url_of(path))
        data: bytes = fs.cat_file(place)
        return data

    try:
        data = _retried(fetch)
    except Exception as error:  # noqa: BLE001
        raise ImageError(_reason(error)) from None
    if len(data) > max_bytes:
        raise ImageError(f"larger than {max_bytes >> 20} MiB")
    return data


def shown(path: str | os.PathLike[str]) -> str:
    """A path as the user typed it: a URL with both its slashes."""
    return url_of(path) if is_url(path) else os.fspath(path)


def absolute(path: str | os.PathLike[str]) -> str:
    """A path in the form that is recorded: the URL, or an absolute path."""
    return url_of(path) if is_url(path) else str(Path(path).expanduser().absolute())


def local_folder(path: str | os.PathLike[str]) -> Path:
    """A run or model folder on this machine: if it is behind a URL, a copy of its present version in the cache.

    Raises:
        UsageError: there is nothing, or it cannot be reached.
        TopworkError: the cache cannot be written.
    """
    if not is_url(path):
        return Path(path)
    url = url_of(path).rstrip("/")
    with _reaching(url):
        fs, place = _opened(url)
        versions = {name: str(fs.ukey(name)) for name in fs.find(place)}
    if not versions:
        raise UsageError(f"{escape(url)}: no such bucket, folder or file.")
    key = hashlib.sha256(json.dumps([url, versions], sort_keys=True).encode()).hexdigest()[:32]
    copy = cache_folder() / "runs" / key / url.rpartition("/")[2]
    if not copy.is_dir():
        with atomic_folder(copy) as partial:
            for name in versions:
                target = partial / name.removeprefix(place).lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                _download(fs, name, url, target)
    return copy


def work_path(out: str | os.PathLike[str]) -> Path:
    """Where a file or folder for ``--out`` is written: there, or if that is a URL, in the cache until it is uploaded."""
    if not is_url(out):
        return Path(out)
    url = url_of(out).rstrip("/")
    return cache_folder() / "outbox" / hashlib.sha256(url.encode()).hexdigest()[:32] / url.rpartition("/")[2]


@contextmanager
def uploaded(out: str | os.PathLike[str], *, overwrite: bool, option: str = "--out") -> Iterator[Path]:
    """The local path to write a file or folder to; if it is for a URL, it is uploaded at the end.

    Uploading starts once everything is written. After an exception it stays in the cache, so that the same command resumes.

    Raises:
        UsageError: the target exists and may not be replaced, or the URL cannot be reached.
        TopworkError: it cannot be written.
    """
    if not is_url(out):
        yield Path(out)
        return
    url = url_of(out).rstrip("/")
    with _reaching(url, f"{option} "):
        fs, place = _opened(url)
        before = set(fs.find(place))
    if before and not overwrite:
        raise UsageError(f"{option} {escape(url)}: exists already. Choose another name, or add --overwrite.")
    if before and before != {place} and not any(f"{place.rstrip('/')}/{name}" in before for name in _OF_A_RUN):
        raise UsageError(f"{option} {escape(url)}: holds files that are no run of topwork. Choose another name.")
    work = work_path(out)
    work.parent.mkdir(parents=True, exist_ok=True)
    yield work
    if work.is_file():
        upload(work, url)
    else:
        files = [path for path in sorted(work.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        names = {path: f"/{path.relative_to(work).as_posix()}" for path in files}
        for path in sorted(files, key=lambda path: path.name == "evaluation.json"):  # the file that says it is done
            upload(path, url + names[path])
        for name in before - {place.rstrip("/") + name for name in names.values()}:
            fs.rm_file(name)
    shutil.rmtree(work.parent, ignore_errors=True)


def check_local(out: str) -> None:
    """Refuses a URL for ``--out`` of the commands whose files belong together on one disk.

    Raises:
        UsageError: it is one.
    """
    if is_url(out):
        raise UsageError(f"--out {escape(url_of(out))}: give a local path for this command, and copy what it writes.")


def upload(path: Path, url: str) -> None:
    """Writes a file behind a URL, retried with back-off.

    Raises:
        TopworkError: it cannot be written, in one sentence.
    """

    def put() -> None:
        fs, place = _opened(url)
        if not getattr(fs, "async_impl", False):  # object stores have no folders, and would make a bucket
            fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        fs.put_file(os.fspath(path), place)

    try:
        _retried(put)
    except Exception as error:  # noqa: BLE001
        raise TopworkError(f"{escape(url)}: cannot be written: {_reason(error)}.") from None


def local_copy(path: Path) -> Path:
    """A file behind a URL in the cache, downloaded once for each version of it; a local file is its own copy.

    Raises:
        UsageError: it cannot be had.
        TopworkError: the cache cannot be written.
    """
    if not is_url(path):
        return path
    url = url_of(path)
    with _reaching(url):
        fs, place = _opened(url)
        version = fs.ukey(place)
    key = hashlib.sha256(f"{url}\0{version}".encode()).hexdigest()[:32]
    copy = cache_folder() / "archives" / key / path.name
    if copy.is_file():
        return copy
    with writing_cache(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(copy) as partial:
            _download(fs, place, url, partial)
    return copy


def _download(fs: Any, place: str, url: str, target: Path) -> None:
    """Raises OSError if the target cannot be written, UsageError if the file cannot be had."""
    try:
        _retried(lambda: fs.get_file(place, os.fspath(target)))
    except Exception as error:
        if isinstance(error, OSError) and (error.filename == os.fspath(target) or error.errno == errno.ENOSPC):
            raise
        raise UsageError(f"{escape(url)}: {_reason(error)}.") from None


@contextmanager
def _reaching(url: str, option: str = "") -> Iterator[None]:
    """Converts any exception of a file system to a UsageError of one sentence."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - each file system raises what its library does
        raise UsageError(f"{option}{escape(url)}: {_reason(error)}.") from None


def _retried(action: Callable[[], T]) -> T:
    """The result of an action, tried again with back-off unless its error is final; raises the last one."""
    for wait in _WAITS:
        try:
            return action()
        except Exception as error:
            if isinstance(error, _FINAL) or getattr(error, "errno", 0) == errno.ENOSPC or _is_refused(error):
                raise
            time.sleep(wait)
    return action()


def _opened(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        fs, place = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"requires an fsspec library that is not installed ({error})") from None
    except ValueError as error:
        raise UsageError(f"fsspec does not support this kind of URL ({error})") from None
    return fs, place


def _is_refused(error: Exception) -> bool:
    names = {type(each).__name__ for each in (error, error.__cause__, error.__context__) if each is not None}
    return bool(names & {"NoCredentialsError", "ClientError", "RefreshError", "AuthenticationException"}) and not any(
        word in str(error)
        for word in ("SlowDown", "Throttl", "Timeout", "timed out", "InternalError", "ServiceUnavailable")
    )


def _reason(error: Exception) -> str:
    """One clause, without the text of a library, which may quote what was sent."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return "no such bucket, folder or file"
    if isinstance(error, PermissionError) or _is_refused(error):
        return "access denied; check your credentials (for s3, those of the AWS tools)"
    return f"cannot be reached ({type(error).__name__}); check the network and the endpoint"
