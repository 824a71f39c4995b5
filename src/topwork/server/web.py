"""What all pages and servers of topwork share: the socket, the guard, pages, and work in the background.

:class:`OwnPage` is a local page that accepts changes only from itself: the base of ``topwork review`` and ``topwork app``.
Requests under another host name are rejected (DNS rebinding), every change must come from the page's origin with the
token of the page, other sites get no CORS headers, and the page cannot be framed.

uvicorn runs the applications: on SIGINT or SIGTERM it stops listening, finishes requests in progress, and exits. Slow
headers and requests during the shutdown are left to a proxy (``deploy/README.md``).
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn  # noqa: TID253 - only commands that serve load this file
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from topwork.errors import TopworkError, UsageError
from topwork.files import error_reason
from topwork.progress import Reporter

if TYPE_CHECKING:
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SHUTDOWN_SECONDS = 25
MAX_HEAD_BYTES = 32_768
MAX_CONNECTIONS = BACKLOG = 2048
MAX_JSON = 4096  # bytes of a change
OPEN_PATHS = ("/", "/docs", "/openapi.json", "/live", "/ready")  # need no token
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
_HERE = Path(__file__).parent
_LOG = logging.getLogger("topwork.server")


# ---- the process


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UsageError: no such port.
        TopworkError: the address is in use or not available.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: must be from 0 to 65535.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as stack:
            listener = stack.enter_context(socket.socket(family, kind))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
            stack.pop_all()
    except OSError as error:
        advice = " Choose another --port." if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        raise TopworkError(f"cannot listen on {host}:{port}: {error_reason(error)}.{advice}") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach the socket."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def server_of(app: ASGIApp, idle_seconds: float = 10.0) -> uvicorn.Server:
    """Uvicorn for an application, with the limits of this module."""
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
    return uvicorn.Server(config)


def run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises the signal again at the end: exit with status 0
        signal.signal(signum, lambda *_: None)
    server.run(sockets=[listener])


# ---- responses


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as JSON."""
    return Response(json.dumps(value), status, headers, "application/json")


async def as_error(_request: Request, error: Any) -> Response:
    """The JSON answer to a rejected request, from an HTTPException."""
    answer = error.detail if isinstance(error.detail, dict) else {"error": error.detail}
    return as_json(answer, error.status_code, dict(error.headers or {}))


def as_page(template: str, old: str = "{{ token }}", new: str = "") -> Response:
    """A template of the package as a page that only loads resources of this server and cannot be framed."""
    text = (_HERE / "templates" / template).read_text(encoding="utf-8").replace(old, new)
    return HTMLResponse(text, headers={"content-security-policy": PAGE_POLICY, "x-frame-options": "DENY"})


def static_files() -> Mount:
    """The scripts and styles of the pages."""
    return Mount("/static", StaticFiles(directory=_HERE / "static"))


class Guard:
    """Middleware: access control, no 500, metrics and common headers.

    Args:
        is_ours: whether a Host header is allowed.
        token: that every request must send, except for ``OPEN_PATHS``.
        count: called with the status of each response.
    """

    def __init__(
        self,
        app: ASGIApp,
        is_ours: Callable[[str], bool],
        token: str | None = None,
        count: Callable[[int], object] = lambda _status: None,
    ) -> None:
        self.app, self._is_ours, self._token, self._count = app, is_ours, token, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        has_started = False

        async def counted(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                self._count(message["status"])
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            refused = self._refusal(scope["path"], scope["headers"])
            await (refused or self.app)(scope, receive, counted)
            return
        except asyncio.CancelledError:
            reason = "closing"  # it took too long
        except Exception:  # noqa: BLE001 - it has been answered with 503 already, unless it came very early
            _LOG.exception("a request failed")
            reason = "this request could not be answered"
        if not has_started:
            headers = {"retry-after": "1", "connection": "close"}
            await as_json({"error": reason}, 503, headers)(scope, receive, counted)

    def _refusal(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Response | None:
        """The response to a rejected request; None if it is allowed."""
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return as_json({"error": "this host name is not allowed; see --allow-host"}, 421)
        if self._token is None or path in OPEN_PATHS or path.startswith("/static/"):
            return None
        given = next((value for name, value in headers if name == b"authorization"), b"")
        if secrets.compare_digest(given, f"Bearer {self._token}".encode()):
            return None
        answer = {"error": "a token is needed: send the header Authorization: Bearer TOKEN"}
        return as_json(answer, 401, {"www-authenticate": "Bearer", "connection": "close"})


# ---- a page that only it can change


class OwnPage:
    """The address and the token of one page, and its work in the background."""

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        self.job = Job()

    def check(self, request: Request) -> None:
        """Raises HTTPException 403 unless the request comes from the page itself."""
        origin = request.headers.get("origin", "")
        if origin.lower().removeprefix("http://") not in self.hosts:
            raise HTTPException(403, "changes are only accepted from the page itself")
        if not secrets.compare_digest(request.headers.get("x-topwork-token", "").encode(), self.token.encode()):
            raise HTTPException(403, "the page is outdated; reload it")

    async def body(self, request: Request, limit: int) -> bytes:
        """The body of a request from the page itself, at most ``limit`` bytes."""
        self.check(request)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise HTTPException(413, "too large")
        return bytes(body)

    async def asked(self, request: Request) -> dict[str, Any]:
        """The JSON object that the page itself sent."""
        try:
            value = json.loads(await self.body(request, MAX_JSON) or b"{}")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise HTTPException(400, "not a JSON object")
        return value

    def serve(self, routes: Sequence[BaseRoute], listener: socket.socket) -> None:
        """Serves the routes, guarded, until SIGINT or SIGTERM."""
        app = Starlette(routes=[*routes, static_files()], exception_handlers={HTTPException: as_error})
        run(server_of(Guard(app, lambda host: host.lower() in self.hosts)), listener)


class Job(Reporter):
    """Work in a thread, one at a time, with its progress in ``state``."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"state": "none"}

    def begin(self, kind: str, work: Callable[[Reporter], dict[str, Any]]) -> dict[str, Any]:
        """Starts the work, unless some is running; its result becomes part of the state."""
        if self.state["state"] == "running":
            raise HTTPException(409, f"wait for the {self.state['kind']} to finish")
        self.state = {"state": "running", "kind": kind, "step": "starting", "notes": []}
        threading.Thread(target=self._run, args=(kind, work), daemon=True, name=kind).start()
        return self.state

    def _run(self, kind: str, work: Callable[[Reporter], dict[str, Any]]) -> None:
        try:
            found = work(self)
        except TopworkError as error:
            self.state = {"state": "failed", "kind": kind, "error": str(error)}
        except Exception as error:  # noqa: BLE001 - a thread's error must reach the page
            self.state = {"state": "failed", "kind": kind, "error": f"{type(error).__name__}: {error}"}
        else:
            self.state = {"state": "done", "kind": kind, "notes": self.state["notes"], **found}

    def step(self, name: str) -> None:
        """Starts a step."""
        self.state |= {"step": name, "n_done": 0, "n_all": 0}

    def progress(self, n_done: int, n_all: int) -> None:
        """Reports progress within the step."""
        self.state |= {"n_done": n_done, "n_all": n_all}

    def note(self, text: str) -> None:
        """Adds a note for the user."""
        self.state["notes"].append(text)

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch of fine-tuning is done."""
        self.state["epoch"] = {key: record.get(key) for key in ("epoch", "train_loss", "valid_loss", "valid_accuracy")}
