"""The server process: its socket, limits and shutdown.

In: models, settings, a listening socket. uvicorn runs the application of ``app.py``: on SIGINT or SIGTERM it stops
listening, finishes requests in progress, and exits. Slow headers and requests during the shutdown are left to a proxy
(``deploy/README.md``).
"""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import uvicorn  # noqa: TID253 - only `topwork serve` loads this file

from topwork.errors import TopworkError, UsageError
from topwork.export.predictor import Predictor
from topwork.files import error_reason
from topwork.server.app import Service, create_app
from topwork.settings import ServeSettings
from topwork.text import escape

if TYPE_CHECKING:
    from starlette.types import ASGIApp

SHUTDOWN_SECONDS = 25
MAX_HEAD_BYTES = 32_768
MAX_CONNECTIONS = 2048
BACKLOG = 2048
MIN_TOKEN = 16


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        TopworkError: the address is in use or not available.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        raise TopworkError(f"cannot listen on {host}:{port}: {error_reason(error)}.") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Model folders by served name: ``NAME=FOLDER``, else the name of the run.

    Raises:
        UsageError: duplicate names, or a name that cannot be part of a URL.
    """
    found: dict[str, str] = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not separator or Path(text).exists():
            place = Path(text).resolve()
            name, folder = (place.parent if place.name == "model" else place).name, text
        if not name or not all(c.isalnum() or c in "-_. " for c in name) or name.strip(".") != name:
            raise UsageError(f"{escape(text)}: cannot be used as a name; use NAME={escape(folder)}.")
        if name in found:
            raise UsageError(f"two models have the name {escape(name)}; use NAME={escape(folder)} to rename one.")
        found[name] = folder
    return found


def read_token(settings: ServeSettings, listener: socket.socket) -> str | None:
    """The token of ``--token-file``; required for other machines, unless ``--no-auth``.

    Raises:
        UsageError: neither was given, or the file holds no token.
    """
    if settings.token_file is not None:
        try:
            token = Path(settings.token_file).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise UsageError(f"--token-file {settings.token_file}: cannot be read: {error_reason(error)}.") from None
        if len(token) < MIN_TOKEN or not token.isprintable():
            raise UsageError(
                f"--token-file {settings.token_file}: must contain a token of at least {MIN_TOKEN} characters."
            )
        return token
    if settings.auth and not is_loopback(listener):
        raise UsageError(
            f"--host {settings.host}: other machines could use this server without a password. "
            "Add --token-file FILE, or --no-auth to allow it."
        )
    return None


class Closing(Protocol):
    """A protocol for applications that need to know whether the server is shutting down."""

    is_closing: Callable[[], bool]


def serve(
    models: Mapping[str, Predictor], settings: ServeSettings, listener: socket.socket, token: str | None = None
) -> None:
    """Serves predictions until SIGINT or SIGTERM; returns after finishing requests in progress."""
    _allow_many_connections()
    service = Service(models, settings, token)
    run_app(create_app(service), service, listener, settings.idle_seconds)


def run_app(app: ASGIApp, service: Closing, listener: socket.socket, idle_seconds: float = 10.0) -> None:
    """Runs an application until SIGINT or SIGTERM, with the limits of this module."""
    config = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=max(1, int(idle_seconds)),
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    server = uvicorn.Server(config)
    service.is_closing = lambda: server.should_exit
    for signum in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again at the end: exit with status 0
        signal.signal(signum, lambda *_: None)
    server.run(sockets=[listener])


def _allow_many_connections() -> None:
    """Raises the limit of open files, which is too low for a thousand clients on many systems."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else min(hard, 16_384)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
