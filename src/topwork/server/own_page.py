"""A local page that accepts changes only from itself: the base of ``topwork review`` and ``topwork app``.

Requests under another host name are rejected (DNS rebinding), every change must come from the page's origin with the
token of the page, other sites get no CORS headers, and the page cannot be framed.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from topwork.server.app import Access, Guard, as_json, as_page, own_text

if TYPE_CHECKING:
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp

MAX_JSON = 4096  # bytes of a change


class OwnPage:
    """The address and the token of one page; ``is_closing`` is set by the server that runs it."""

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        self.is_closing: Callable[[], bool] = lambda: False

    def page(self, template: str) -> Response:
        """A template of the package with the token in it."""
        return as_page(own_text("templates", template).replace("{{ token }}", self.token))

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

    def application(self, routes: Sequence[BaseRoute]) -> ASGIApp:
        """The application of some routes, guarded."""

        async def refused(_request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            return as_json({"error": error.detail}, error.status_code)

        app = Starlette(routes=routes, exception_handlers={HTTPException: refused})
        return Guard(app, Access(lambda host: host.lower() in self.hosts))
