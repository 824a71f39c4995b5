"""One HTTP/1.1 connection: uvicorn's, with four changes for clients that are slow, wrong, or still speaking at the end.

A client has ``header_seconds`` for the head of a request, also on a connection that was used before. What a client sends
wrongly is answered in JSON, and the answer reaches it: before a connection with unread data is closed, that data is read
and dropped for a moment, up to the size of a body (closing at once makes the kernel discard the answer). A client that
closes its side early is answered, and told so where its request is not whole. And when the server ends, connections that
have not spoken yet get ``FIRST_WORD_SECONDS`` to do so, those between two requests ``LINGER_SECONDS``, so that no request
is lost that was on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol  # noqa: TID253 - only `topwork serve` loads this file

from topwork.server.metrics import Measures
from topwork.settings import ServeSettings

LINGER_SECONDS = 0.7
FIRST_WORD_SECONDS = 3.0  # a client that has just connected may wait this long for its turn on a busy machine


class Connection(H11Protocol):
    """A connection; made by :func:`connection_type`, which knows settings and measures."""

    settings: ClassVar[ServeSettings]
    measures: ClassVar[Measures]

    _head_timer: asyncio.TimerHandle | None = None
    _is_dropping = False
    _n_dropped = 0
    _is_last = False

    def connection_made(self, transport: Any) -> None:
        """The client has connected; the time for its head begins."""
        super().connection_made(_LingeringTransport(transport, self))  # type: ignore[arg-type]
        self._watch_head(True)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._watch_head(False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests; after the last answer they are dropped."""
        if self._is_dropping:
            self._n_dropped += len(data)
            if self._n_dropped > self.settings.max_body_mb * 1_000_000:
                self.transport.abort()
            return
        super().data_received(data)
        self._watch_head(self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0]))

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """A client that has sent its request and closed its side still gets the answer; half a request is refused."""
        if self._is_working() and self.conn.their_state in (h11.DONE, h11.MUST_CLOSE):
            self._is_last = True
            self.cycle.keep_alive = False
            return True
        if not self._is_dropping and (self._is_working() or self.conn.trailing_data[0]):
            self._refuse(400, "the connection ended before the request did")
        return None

    def handle_events(self) -> None:
        """What the bytes mean; a request that is the last one closes the connection after its answer."""
        super().handle_events()
        if self._is_last and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """A body that the answer did not wait for would otherwise be read for ever."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self.transport.close()

    def shutdown(self) -> None:
        """No request after the one in work; whoever has not spoken yet may do so for a moment."""
        self._is_last = True
        if self._is_working():
            self.cycle.keep_alive = False
        else:
            self._unset_keepalive_if_required()
            seconds = FIRST_WORD_SECONDS if self.cycle is None else LINGER_SECONDS
            self.loop.call_later(seconds, self._close_if_silent)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for a while after an answer."""
        if self.conn.our_state is not h11.ERROR:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(400, msg)

    def stops_reading(self) -> bool:
        """From now on data are dropped; whether any may still come, which has to happen before the end."""
        self._is_dropping = True
        self._watch_head(False)
        return self.conn.their_state not in (h11.DONE, h11.CLOSED, h11.MUST_CLOSE, h11.IDLE)

    def _is_working(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _close_if_silent(self) -> None:
        if not self._is_working() and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()

    def _watch_head(self, is_awaited: bool) -> None:
        if is_awaited and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.settings.header_seconds, self._too_slow)
        elif not is_awaited and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self.measures.cut_off["head"] += 1
        self._refuse(408, f"the head of the request did not arrive within {self.settings.header_seconds:g} s")

    def _refuse(self, status: int, text: str) -> None:
        """Answers without the application, and closes."""
        self.measures.responses[status] += 1
        body = json.dumps({"error": text.rstrip(".").lower()}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer may be half written already
            response = h11.Response(status_code=status, headers=headers, reason=b"")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def connection_type(settings: ServeSettings, measures: Measures) -> type[Connection]:
    """The class of the connections of one server, as uvicorn wants it."""
    return type("ConnectionOfServer", (Connection,), {"settings": settings, "measures": measures})


class _LingeringTransport:
    """A transport whose close lets the client read the answer before the connection goes."""

    def __init__(self, transport: Any, connection: Connection) -> None:
        self._transport, self._connection = transport, connection
        self._is_closing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._is_closing or bool(self._transport.is_closing())

    def close(self) -> None:
        if self.is_closing():
            return
        self._is_closing = True
        if not self._connection.stops_reading():
            self._transport.close()
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.close)
