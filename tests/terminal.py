"""The command line as tests call it: in this process, where torch and the rest are loaded already."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from unittest.mock import patch

from topwork import cli


def topwork(
    *arguments: object,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    input: str = "",
) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run`` would return for this command, several seconds sooner.

    A test that kills the process, limits it or looks at what it imports starts one of its own.
    """
    out, err, words = _stream(), _stream(), [str(argument) for argument in arguments]
    status: object = 0
    with (
        _as_before(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or "."),
        patch.dict(os.environ, env or {}, clear=env is not None),
        patch.object(sys, "stdin", _stream(input)),
        patch.object(sys, "argv", ["topwork", *words]),
    ):
        try:
            cli.main(words)
        except SystemExit as end:
            status = end.code
    return subprocess.CompletedProcess(words, int(str(status or 0)), _text(out), _text(err))


def _stream(text: str = "") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape")), "utf-8", "surrogateescape")


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]  # it is a BytesIO


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Puts back what a command changes for the whole process: signals, warnings, the garbage collector."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    handlers, threshold = [signal.getsignal(kind) for kind in kinds], gc.get_threshold()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            yield
        finally:
            gc.set_threshold(*threshold)
            for kind, handler in zip(kinds, handlers, strict=True):
                signal.signal(kind, handler)
