"""The prediction server as an ASGI application.

In: models and limits. Out: an application for ``serve.py``. Every error is JSON, ``{"error": ...}``; the only 5xx are
503 (full, starting, closing, or an internal error) and 504 (timeout). Paths or URLs from clients are never opened:
images are in the request body. Batches are in ``queue.py``; the page is ``app.html``.
"""

from __future__ import annotations

import asyncio
import html
import io
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import simplejpeg
from fastapi import FastAPI, HTTPException, Query, Request  # noqa: TID253 - only `topwork serve` loads this file
from fastapi.exceptions import RequestValidationError  # noqa: TID253
from PIL import Image
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, Response

import topwork
from topwork.data.images import decode
from topwork.data.loader import default_threads
from topwork.data.transforms import resize
from topwork.errors import ImageError, UsageError
from topwork.export.batch import row_of
from topwork.export.inputs import list_inputs
from topwork.export.predictor import Prediction, Predictor, read_image
from topwork.server.metrics import Measures
from topwork.server.queue import ServedModel
from topwork.settings import ServeSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_TOP = 100
MAX_EXAMPLES, EXAMPLE_SIDE = 12, 640
MAX_FIELDS = 100  # of a form, without files
DRAIN_SECONDS = 1.0
_HERE = Path(__file__).parent
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
_STATIC = {"app.js": "text/javascript", "app.css": "text/css"}
_LOG = logging.getLogger("topwork.server")

_Top = Annotated[int, Query(ge=1, le=MAX_TOP, description="number of classes to return")]
_Explain = Annotated[bool, Query(description="also send a heatmap; one image only")]


def refusal(status: int, text: str, *, closes: bool = False, rows: list[dict[str, Any]] | None = None) -> HTTPException:
    """A rejected request, with the error for the client.

    Args:
        closes: closes the connection without reading the rest of the body.
        rows: error rows for the images.
    """
    headers = ({"connection": "close"} if closes else {}) | ({"retry-after": "1"} if status == 503 else {})
    return HTTPException(status, {"error": text} | ({} if rows is None else {"predictions": rows}), headers)


class Service:
    """The models behind the application, and its load."""

    def __init__(self, models: Mapping[str, Predictor], settings: ServeSettings, token: str | None = None) -> None:
        self.settings, self.token = settings, token
        self.measures = Measures(lambda: self.is_ready)
        self.is_closing: Callable[[], bool] = lambda: False
        self.is_warm = False
        self.failure = "starting"
        threads = settings.workers or default_threads()
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.examples = example_images(settings.examples) if settings.examples is not None else []
        self.models = {
            name: ServedModel(name, predictor, self._decoders, self.measures) for name, predictor in models.items()
        }

    @property
    def is_ready(self) -> bool:
        """Whether a test prediction succeeded and the server is not shutting down."""
        return self.is_warm and not self.is_closing()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the batches; ready after one test prediction per model."""
        tasks = [asyncio.create_task(model.run()) for model in self.models.values()]
        tasks.append(asyncio.create_task(self._warm_up()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for model in self.models.values():
                model.close()
            self._decoders.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admitted(self, n_images: int) -> Iterator[None]:
        """Reserves room for waiting images; rejects the request if there is none."""
        if self.measures.n_waiting + n_images > self.settings.max_queue:
            raise refusal(503, "too many images are queued; try again in a second", closes=True)
        self.measures.n_waiting += n_images
        try:
            yield
        finally:
            self.measures.n_waiting -= n_images

    async def _warm_up(self) -> None:
        from topwork.features.engine import drawn_images

        try:
            for model in self.models.values():
                image = _as_png(drawn_images(model.predictor.classifier.backbone.spec)[0])
                answer = (await model.predict([("warm-up", image)]))[0]
                if answer.error is not None:
                    raise RuntimeError(answer.error)
            self.is_warm = True
        except Exception as error:  # noqa: BLE001 - any error means not ready, and /ready says why
            self.failure = f"the first prediction failed: {error}"
            _LOG.exception("the first prediction failed")


def create_app(service: Service) -> ASGIApp:
    """Creates the application: routes, errors and the guard."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(title="topwork", version=topwork.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_error_texts(app)
    _add_predictions(app, service)
    _add_status(app, service)
    _add_pages(app, service)
    settings = service.settings
    access = Access(names_of_host(settings.host, settings.allow_host), service.token)
    return Guard(app, access, lambda status: service.measures.responses.labels(status).inc())


def _add_predictions(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, name: str | None, top: int, explain: bool) -> Response:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(service.settings.request_seconds):
                return await _predict(service, request, name, top, explain)
        except TimeoutError:
            raise refusal(504, f"no answer within {service.settings.request_seconds:g} s", closes=True) from None
        except HTTPException as error:
            if "connection" in (error.headers or {}):
                await _drain(request, 4 * service.settings.max_body_mb * 1_000_000)
            raise
        finally:
            service.measures.request_seconds.observe(time.perf_counter() - started)

    @app.post("/predict", openapi_extra=_body_schema(), summary="Classify one or more images")
    async def predict(request: Request, top: _Top = 5, explain: _Explain = False) -> Response:
        return await answer(request, None, top, explain)

    @app.post("/predict/{model}", openapi_extra=_body_schema(), summary="Classify with one of several models")
    async def predict_by(request: Request, model: str, top: _Top = 5, explain: _Explain = False) -> Response:
        return await answer(request, model, top, explain)


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/models", summary="List the models and their classes")
    async def models() -> Response:
        return as_json({"models": [_about(model) for model in service.models.values()]})

    @app.get("/live", summary="Whether the process is running")
    async def live() -> Response:
        return as_json({"status": "live"})

    @app.get("/ready", summary="Whether the models can answer (a real prediction has succeeded)")
    async def ready() -> Response:
        if service.is_ready:
            return as_json({"status": "ready"})
        return as_json({"error": "closing" if service.is_closing() else service.failure}, 503)

    @app.get("/metrics", summary="Metrics for Prometheus")
    async def metrics() -> Response:
        return Response(service.measures.text(), media_type="text/plain; version=0.0.4")


def _add_pages(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return as_page(own_text("templates", "app.html"))

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        address = html.escape(f"{request.url.scheme}://{request.headers.get('host', 'localhost')}")
        return as_page(own_text("templates", "app_docs.html").replace("http://127.0.0.1:8000", address))

    @app.get("/examples", include_in_schema=False)
    async def examples() -> Response:
        return as_json({"n": len(service.examples)})

    @app.get("/examples/{number}", include_in_schema=False)
    async def example(number: int) -> Response:
        if not 0 <= number < len(service.examples):
            raise HTTPException(404)
        return Response(service.examples[number], media_type="image/jpeg")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return static_file(name, _STATIC)


# ---- predictions


async def _predict(service: Service, request: Request, name: str | None, top: int, explain: bool) -> Response:
    if not service.is_warm:
        raise refusal(503, f"not ready: {service.failure}", closes=True)
    model = _chosen(service, name)
    with service.admitted(1), _Held(service) as held:
        images = await _images_of(request, await _read_body(service, request, held), service.settings.max_images)
        with service.admitted(len(images) - 1):
            found = await model.predict(images)
        for prediction in found:
            service.measures.images.labels(model.name, prediction.outcome).inc()
        rows = [_row(prediction, top) for prediction in found]
        if all(prediction.outcome == "error" for prediction in found):
            raise refusal(422, found[0].error or "no image could be read", rows=rows)
        if explain and len(images) == 1:
            rows[0]["map"] = await model.explain(images[0][1], found[0])
    return as_json({"model": model.name, "predictions": rows})


def _chosen(service: Service, name: str | None) -> ServedModel:
    if name is None:
        return next(iter(service.models.values()))
    if name not in service.models:
        raise refusal(404, "no such model; GET /models lists them", closes=True)
    return service.models[name]


class _Held:
    """Bytes of one request, counted against the limit of the server."""

    def __init__(self, service: Service) -> None:
        self._measures = service.measures
        self._limit = service.settings.max_held_mb * 1_000_000
        self._n_bytes = 0

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *error: object) -> None:
        self._measures.n_held_bytes -= self._n_bytes

    def add(self, n_bytes: int) -> None:
        """Adds bytes, or rejects the request."""
        if self._measures.n_held_bytes + n_bytes > self._limit:
            raise refusal(503, "too many requests; try again in a second", closes=True)
        self._n_bytes += n_bytes
        self._measures.n_held_bytes += n_bytes


async def _read_body(service: Service, request: Request, held: _Held) -> bytes:
    """The whole body, within time and size limits."""
    settings = service.settings
    limit = int(settings.max_body_mb * 1_000_000)
    too_large = refusal(413, f"the body is larger than {settings.max_body_mb:g} MB", closes=True)
    length = request.headers.get("content-length")
    if length is None and "transfer-encoding" not in request.headers:
        raise refusal(411, "send the image as the body, with a Content-Length", closes=True)
    if length is not None and (not length.isdecimal() or len(length) > 18 or int(length) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise too_large
                held.add(len(chunk))
                body += chunk
    except TimeoutError:
        raise refusal(408, f"the body did not arrive within {settings.body_seconds:g} s", closes=True) from None
    return bytes(body)


async def _drain(request: Request, limit: float) -> None:
    """Reads on for a moment, because closing a connection with unread data can discard the response."""
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for chunk in request.stream():
                limit -= len(chunk)
                if limit < 0:
                    return


async def _images_of(request: Request, body: bytes, max_images: int) -> list[tuple[str, bytes]]:
    """(name, content) of each image in a body: the files of a form, or the body itself."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images = await _files_of(request, body, max_images)
    elif kind.startswith(("text/", "multipart/")) or kind == "application/json":
        raise refusal(415, "send an image as the body, or files as multipart/form-data")
    else:
        images = [("image", body)] if body else []
    if not images:
        raise refusal(400, "the request has no image")
    if len(images) > max_images:
        raise refusal(413, f"more than {max_images} images in one request")
    return images


async def _files_of(request: Request, body: bytes, max_images: int) -> list[tuple[str, bytes]]:
    """The files of a form in memory, so that nothing is written to disk."""

    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=max_images + 1, max_fields=MAX_FIELDS)  # type: ignore[arg-type]
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise refusal(413, f"more than {max_images} images in one request") from None
        raise refusal(400, f"malformed form: {error.message.rstrip('.').lower()}") from None
    if not body.rstrip(b"\r\n").endswith(b"--"):
        raise refusal(400, "malformed form: it ends before its last boundary")
    files = [value for _, value in form.multi_items() if not isinstance(value, str)]
    return [(file.filename or "", await file.read()) for file in files]


def _row(prediction: Prediction, top: int) -> dict[str, Any]:
    row = row_of(prediction)
    return row | {"top": row["top"][:top]}


def _about(model: ServedModel) -> dict[str, Any]:
    classifier = model.predictor.classifier
    several = {"multi_label": True} if classifier.multi_label else {}
    return several | {
        "name": model.name,
        "classes": list(classifier.classes),
        "backbone": classifier.backbone.name,
        "precision": model.predictor.engine.precision,
        "figures": classifier.provenance.get("figures"),
    }


def _as_png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def example_images(folder: str) -> list[bytes]:
    """The first images of a folder as small JPEG files, for the page.

    Raises:
        UsageError: no such folder, or no image in it.
    """
    found: list[bytes] = []
    for path in list_inputs([folder], must_exist=True):
        try:
            pixels = decode(read_image(path), min_side=EXAMPLE_SIDE).pixels
        except ImageError:
            continue
        scale = min(1.0, EXAMPLE_SIDE / max(pixels.shape[:2]))
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        found.append(bytes(simplejpeg.encode_jpeg(resize(pixels, height, width), quality=90)))
        if len(found) == MAX_EXAMPLES:
            break
    if not found:
        raise UsageError(f"--examples {folder}: no images here.")
    return found


# ---- answers


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as JSON."""
    return Response(json.dumps(value), status, headers, "application/json")


def _add_error_texts(app: FastAPI) -> None:
    async def refused(_request: Request, error: Any) -> Response:
        answer = error.detail if isinstance(error.detail, dict) else {"error": str(error.detail).lower()}
        return as_json(answer, error.status_code, dict(error.headers or {}))

    async def wrong_value(_request: Request, error: Any) -> Response:
        first = error.errors()[0]
        return as_json({"error": f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg'].lower()}"}, 422)

    async def fault(_request: Request, _error: Exception) -> Response:
        return as_json({"error": "this request could not be answered"}, 503, {"retry-after": "1"})

    async def gone(_request: Request, _error: Exception) -> Response:
        return _NoResponse()

    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(StarletteHTTPException, refused)
    app.add_exception_handler(RequestValidationError, wrong_value)
    app.add_exception_handler(Exception, fault)


class _NoResponse(Response):
    """For a client that disconnected: sends nothing and counts no error."""

    async def __call__(self, _scope: Scope, _receive: Receive, _send: Send) -> None:
        return


def as_page(text: str) -> Response:
    """A page that only loads resources of this server and cannot be framed."""
    return HTMLResponse(text, headers={"content-security-policy": PAGE_POLICY, "x-frame-options": "DENY"})


def static_file(name: str, kinds: Mapping[str, str]) -> Response:
    """A static file, if listed.

    Args:
        kinds: media types by name.
    """
    if name not in kinds:
        raise HTTPException(404)
    return Response(own_text("static", name), media_type=kinds[name])


def own_text(folder: str, name: str) -> str:
    """A file of the package: a template or a static one."""
    return (_HERE / folder / name).read_text(encoding="utf-8")


def _body_schema() -> dict[str, Any]:
    """The request body of the endpoints, for /openapi.json."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    form = {"schema": {"type": "object", "properties": {"images": files}}}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": binary, "image/*": binary, "multipart/form-data": form},
        }
    }


def names_of_host(host: str, more: Iterable[str] = ()) -> Callable[[str], bool]:
    """Whether a Host header is valid for this server: an IP address, localhost, the given name, or an allowed one.

    Protects against DNS rebinding: requests under the name of another site are rejected.
    """
    names = {"localhost", host.lower(), *(name.lower() for name in more)}

    def is_ours(value: str) -> bool:
        name = value.rpartition(":")[0] if value.rpartition(":")[2].isdecimal() else value
        if "*" in names or name.lower() in names:
            return True
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
        return False

    return is_ours


@dataclass(frozen=True)
class Access:
    """Access control: allowed host names, and the token, if any."""

    is_ours: Callable[[str], bool]
    token: str | None = field(default=None, repr=False)
    open_paths: tuple[str, ...] = ("/", "/docs", "/openapi.json", "/live", "/ready")

    def refusal(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Response | None:
        """The response to a rejected request; None if it is allowed."""
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self.is_ours(hosts[0]):
            return as_json({"error": "this host name is not allowed; see --allow-host"}, 421)
        if self.token is None or path in self.open_paths or path.startswith("/static/"):
            return None
        given = next((value for name, value in headers if name == b"authorization"), b"")
        if secrets.compare_digest(given, f"Bearer {self.token}".encode()):
            return None
        answer = {"error": "a token is needed: send the header Authorization: Bearer TOKEN"}
        return as_json(answer, 401, {"www-authenticate": "Bearer", "connection": "close"})


class Guard:
    """Middleware: access control, no 500, metrics and common headers."""

    def __init__(self, app: ASGIApp, access: Access, count: Callable[[int], None] = lambda _status: None) -> None:
        self.app, self._access, self._count = app, access, count

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
            refused = self._access.refusal(scope["path"], scope["headers"])
            await (refused or self.app)(scope, receive, counted)
        except asyncio.CancelledError:  # closing took too long
            if not has_started:
                await _fault("closing")(scope, receive, counted)
        except Exception:  # noqa: BLE001 - it has been answered with 503 already, unless it came very early
            _LOG.exception("a request failed")
            if not has_started:
                await _fault("this request could not be answered")(scope, receive, counted)


def _fault(text: str) -> Response:
    return as_json({"error": text}, 503, {"retry-after": "1", "connection": "close"})
