"""The server process: sockets, slow clients, and an end that loses no request.

In: models and settings. It builds on uvicorn and changes four things. A client has ``header_seconds`` for the head of a
request, also on a connection that was used before. What a client sends wrongly is answered in JSON, and the answer
reaches it: before a connection with unread data is closed, that data is read and dropped for a moment, up to the size
of a body (closing at once makes the kernel discard the answer). A client that closes its side early is answered. And at
the end, connections that were accepted but have not spoken yet get ``LINGER_SECONDS`` to do so, so that no request is
lost that was on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import signal
import socket
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from topwork.data.sources import shown
from topwork.errors import TopworkError, UsageError
from topwork.settings import ServeSettings
from topwork.shipping.predictor import Predictor
from topwork.web.app import Service, create_app

if TYPE_CHECKING:
    import uvicorn

LINGER_SECONDS = 0.7
SHUTDOWN_SECONDS = 25
MAX_HEAD_BYTES = 32_768
BACKLOG = 2048


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
            raise UsageError(f"{shown(text)}: cannot be served under that name; write NAME={shown(folder)}.")
        if name in found:
            raise UsageError(f"two models are called {shown(name)}; write NAME={shown(folder)} to tell them apart.")
        found[name] = folder
    return found


def serve(models: Mapping[str, Predictor], settings: ServeSettings, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; returns when every accepted request has been answered."""
    import uvicorn

    _allow_many_connections()
    service = Service(models, settings)
    config = uvicorn.Config(
        create_app(service),
        http=_protocol(service),
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
    _server(config, service).run([listener])


def _server(config: uvicorn.Config, service: Service) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        """Ends with status 0 on a signal; a second one ends it at once."""

        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            loop = asyncio.get_running_loop()
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(signum, self._end)
            yield
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)

        def _end(self) -> None:
            self.force_exit = self.should_exit
            self.should_exit = service.is_closing = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Not more than one connection can now be made that nobody accepts; those already made are accepted here.
            for listener in sockets or []:
                listener.listen(0)
            await asyncio.sleep(0.02)
            for server in self.servers:
                server.close()
            await asyncio.sleep(0)
            await super().shutdown(sockets)

    return Server(config)


def _protocol(service: Service) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1 protocol with the four changes."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None
        _is_dropping = False
        _n_dropped = 0
        _is_last = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(_LingeringTransport(transport, self))  # type: ignore[arg-type]
            self._watch_head(True)

        def connection_lost(self, exc: Exception | None) -> None:
            self._watch_head(False)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._is_dropping:
                self._n_dropped += len(data)
                if self._n_dropped > service.settings.max_body_mb * 1_000_000:
                    self.transport.abort()
                return
            super().data_received(data)
            self._watch_head(self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0]))

        def eof_received(self) -> bool | None:
            """A client that has sent its request and closed its side still gets the answer."""
            is_working = self.cycle is not None and not self.cycle.response_complete
            if is_working and self.conn.their_state is h11.DONE:
                self._is_last = True
                self.cycle.keep_alive = False
                return True
            return None

        def handle_events(self) -> None:
            super().handle_events()
            if self._is_last and self.cycle is not None:
                self.cycle.keep_alive = False

        def on_response_complete(self) -> None:
            super().on_response_complete()
            # A body that the answer did not wait for would otherwise be read for ever.
            if self.conn.their_state is h11.SEND_BODY:
                self.transport.close()

        def shutdown(self) -> None:
            """No request after the one in work; whoever has not spoken yet may do so for a moment."""
            self._is_last = True
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.keep_alive = False
            else:
                self._unset_keepalive_if_required()
                self.loop.call_later(LINGER_SECONDS, self._close_if_silent)

        def timeout_keep_alive_handler(self) -> None:
            if self.conn.our_state is not h11.ERROR:
                super().timeout_keep_alive_handler()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, msg)

        def close_when_done(self) -> bool:
            """Whether data of an unfinished request may still arrive, which has to be dropped before the end."""
            self._is_dropping = True
            self._watch_head(False)
            return self.conn.their_state not in (h11.DONE, h11.CLOSED, h11.MUST_CLOSE, h11.IDLE)

        def _close_if_silent(self) -> None:
            is_working = self.cycle is not None and not self.cycle.response_complete
            if not is_working and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
                self.transport.close()

        def _watch_head(self, is_awaited: bool) -> None:
            if is_awaited and self._head_timer is None:
                self._head_timer = self.loop.call_later(service.settings.header_seconds, self._too_slow)
            elif not is_awaited and self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_slow(self) -> None:
            service.measures.cut_off["head"] += 1
            self._refuse(408, f"the head of the request did not arrive within {service.settings.header_seconds:g} s")

        def _refuse(self, status: int, text: str) -> None:
            """Answers without the application, and closes."""
            service.measures.responses[status] += 1
            body = json.dumps({"error": text.rstrip(".").lower()}).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            with contextlib.suppress(h11.LocalProtocolError):  # an answer may be half written already
                response = h11.Response(status_code=status, headers=headers, reason=b"")
                for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Protocol


class _LingeringTransport:
    """A transport whose close lets the client read the answer before the connection goes."""

    def __init__(self, transport: Any, protocol: Any) -> None:
        self._transport, self._protocol = transport, protocol
        self._is_closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._is_closing or bool(self._transport.is_closing())

    def close(self) -> None:
        if self._is_closing or self._transport.is_closing():
            return
        self._is_closing = True
        if not self._protocol.close_when_done():
            self._transport.close()
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.close)


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
