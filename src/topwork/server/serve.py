"""The server process: its socket, its limits on files, and an end that loses no request.

In: models, settings, a listening socket. It is uvicorn's server with another end; single connections are in
``connection.py``, requests in ``app.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import uvicorn  # noqa: TID253 - only `topwork serve` loads this file

from topwork.errors import TopworkError, UsageError
from topwork.export.predictor import Predictor
from topwork.server.app import Service, create_app
from topwork.server.connection import connection_type
from topwork.server.metrics import Measures
from topwork.settings import ServeSettings
from topwork.text import escape

if TYPE_CHECKING:
    from starlette.types import ASGIApp

SHUTDOWN_SECONDS = 25
LAST_SECONDS = 28.5
MAX_HEAD_BYTES = 32_768
BACKLOG = 2048
_SO_ATTACH_FILTER = 26


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at the address.

    Raises:
        TopworkError: the address is taken or not ours.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        raise TopworkError(f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}.") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def named_models(given: Sequence[str]) -> dict[str, str]:
    """Folders by the name they are served under: ``NAME=FOLDER``, else the name of the run.

    Raises:
        UsageError: two of one name, or a name that is no part of an address.
    """
    found: dict[str, str] = {}
    for text in given:
        name, separator, folder = text.partition("=")
        if not separator or Path(text).exists():
            place = Path(text).resolve()
            name, folder = (place.parent if place.name == "model" else place).name, text
        if not name or not all(c.isalnum() or c in "-_. " for c in name) or name.strip(".") != name:
            raise UsageError(f"{escape(text)}: cannot be served under that name; write NAME={escape(folder)}.")
        if name in found:
            raise UsageError(f"two models are called {escape(name)}; write NAME={escape(folder)} to tell them apart.")
        found[name] = folder
    return found


class Closing(Protocol):
    """What is told that the server ends."""

    is_closing: bool


def serve(models: Mapping[str, Predictor], settings: ServeSettings, listener: socket.socket) -> None:
    """Serves predictions until SIGINT or SIGTERM; returns when every accepted request has been answered."""
    _allow_many_connections()
    service = Service(models, settings)
    run_app(create_app(service), service, settings, service.measures, listener)


def run_app(
    app: ASGIApp, service: Closing, settings: ServeSettings, measures: Measures, listener: socket.socket
) -> None:
    """Runs an application until SIGINT or SIGTERM, with this module's connections and its end."""
    config = uvicorn.Config(
        app,
        http=connection_type(settings, measures),
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=max(1, int(settings.header_seconds)),
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    Server(config, service).run([listener])


class Server(uvicorn.Server):
    """uvicorn's server with another end: status 0 on a signal, every accepted request answered."""

    def __init__(self, config: uvicorn.Config, service: Closing) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """SIGINT and SIGTERM end it; a second one ends it at once."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._end)
        yield
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signum)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts what has connected, refuses what has not, and waits for the answers."""
        for listener in sockets or []:
            _refuse_new_connections(listener)
        await asyncio.sleep(0.02)  # those already made are accepted in this time
        for server in self.servers:
            server.close()
        await asyncio.sleep(0)
        await super().shutdown(sockets)

    def _end(self) -> None:
        self.force_exit = self.should_exit
        if not self.should_exit:
            _exit_at_the_latest(LAST_SECONDS)
        self.should_exit = self._service.is_closing = True


def _exit_at_the_latest(seconds: float) -> None:
    """Ends the process even if a thread hangs in a library: by then every request has had its answer or its deadline."""
    last = threading.Timer(seconds, os._exit, (0,))
    last.daemon = True
    last.start()


def _refuse_new_connections(listener: socket.socket) -> None:
    """From now on no connection is made that nobody will accept: closing the socket would reset those in its queue.

    On Linux a filter drops what new clients send, so that they are refused a second later, once the socket is closed.
    Elsewhere the queue is shortened to one connection, which may be lost.
    """
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0 bytes of any packet
    try:
        if sys.platform != "linux":
            raise OSError
        program = struct.pack("@HP", 1, ctypes.addressof(instruction))
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except OSError:
        with contextlib.suppress(OSError):
            listener.listen(0)


def _allow_many_connections() -> None:
    """A thousand clients need more files than many systems allow a process to begin with."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else min(hard, 16_384)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
