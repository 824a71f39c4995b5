"""The prediction server, ``topwork serve``.

In: models, limits and a listening socket. Every error is JSON, ``{"error": ...}``; the only 5xx are 503 (full, starting,
closing, or an internal error) and 504 (timeout). Paths or URLs from clients are never opened: images are in the request
body. Batches are in ``queue.py``; the page is ``app.html``.
"""

from __future__ import annotations

import asyncio
import html
import ipaddress
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import simplejpeg
from fastapi import FastAPI, HTTPException, Query, Request  # noqa: TID253 - only `topwork serve` loads this file
from fastapi.exceptions import RequestValidationError  # noqa: TID253
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import Response

import topwork
from topwork.data.images import decode
from topwork.data.loader import default_threads
from topwork.data.transforms import smaller
from topwork.errors import ImageError, UsageError
from topwork.export.batch import row_of
from topwork.export.inputs import list_inputs, read_image
from topwork.export.predictor import Prediction, Predictor
from topwork.files import error_reason
from topwork.server.queue import Measures, ServedModel
from topwork.server.web import Guard, as_error, as_json, as_page, is_loopback, run, server_of, static_files
from topwork.settings import ServeSettings
from topwork.text import escape

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

MAX_TOP = 100
MAX_EXAMPLES, EXAMPLE_SIDE = 12, 640
MAX_FIELDS = 100  # of a form, without files
DRAIN_SECONDS = 1.0
MIN_TOKEN = 16
_LOG = logging.getLogger("topwork.server")

_Top = Annotated[int, Query(ge=1, le=MAX_TOP, description="number of classes to return")]
_Explain = Annotated[bool, Query(description="also send a heatmap; one image only")]


def serve(
    models: Mapping[str, Predictor], settings: ServeSettings, listener: socket.socket, token: str | None = None
) -> None:
    """Serves predictions until SIGINT or SIGTERM; returns after finishing requests in progress."""
    _allow_many_connections()
    service = Service(models, settings, token)
    server = server_of(create_app(service), settings.idle_seconds)
    service.is_closing = lambda: server.should_exit
    run(server, listener)


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


def _allow_many_connections() -> None:
    """Raises the limit of open files, which is too low for a thousand clients on many systems."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 16_384 if hard == resource.RLIM_INFINITY else min(hard, 16_384)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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

    def reserve(self, held: ExitStack, n_images: int = 0, n_bytes: int = 0) -> None:
        """Counts waiting images and bytes in memory until ``held`` is closed; rejects a request for which there is no room."""
        if self.measures.n_waiting + n_images > self.settings.max_queue:
            raise refusal(503, "too many images are queued; try again in a second", closes=True)
        if self.measures.n_held_bytes + n_bytes > self.settings.max_held_mb * 1_000_000:
            raise refusal(503, "too many requests; try again in a second", closes=True)
        self._count(n_images, n_bytes)
        held.callback(self._count, -n_images, -n_bytes)

    def _count(self, n_images: int, n_bytes: int) -> None:
        self.measures.n_waiting += n_images
        self.measures.n_held_bytes += n_bytes

    async def _warm_up(self) -> None:
        from topwork.features.engine import drawn_images

        try:
            for model in self.models.values():
                image = drawn_images(model.predictor.classifier.backbone.spec)[0]
                answer = (await model.predict([("warm-up", image)]))[0]
                if answer.error is not None:
                    raise RuntimeError(answer.error)
            self.is_warm = True
        except Exception as error:  # noqa: BLE001 - any error means not ready, and /ready says why
            self.failure = f"the first prediction failed: {error}"
            _LOG.exception("the first prediction failed")


def create_app(service: Service) -> ASGIApp:
    """Creates the application: routes, errors and the guard."""
    app = FastAPI(
        title="topwork",
        version=topwork.__version__,
        lifespan=lambda _app: service.running(),
        docs_url=None,
        redoc_url=None,
        routes=[static_files()],
    )
    _add_error_texts(app)
    _add_predictions(app, service)
    _add_status(app, service)
    _add_pages(app, service)
    is_ours = names_of_host(service.settings.host, service.settings.allow_host)
    return Guard(app, is_ours, service.token, lambda status: service.measures.responses.labels(status).inc())


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
        return as_page("app.html")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        address = html.escape(f"{request.url.scheme}://{request.headers.get('host', 'localhost')}")
        return as_page("app_docs.html", "http://127.0.0.1:8000", address)

    @app.get("/examples", include_in_schema=False)
    async def examples() -> Response:
        return as_json({"n": len(service.examples)})

    @app.get("/examples/{number}", include_in_schema=False)
    async def example(number: int) -> Response:
        if not 0 <= number < len(service.examples):
            raise HTTPException(404)
        return Response(service.examples[number], media_type="image/jpeg")


# ---- predictions


async def _predict(service: Service, request: Request, name: str | None, top: int, explain: bool) -> Response:
    if not service.is_warm:
        raise refusal(503, f"not ready: {service.failure}", closes=True)
    for unknown in {*request.query_params} - {"top", "explain"}:
        advice = "; POST /predict/NAME chooses a model" if unknown == "model" else ""
        raise refusal(422, f"unknown parameter {unknown!r:.40}{advice}", closes=True)
    model = _chosen(service, name)
    with ExitStack() as held:
        service.reserve(held, n_images=1)
        images = await _images_of(request, await _read_body(service, request, held), service.settings.max_images)
        service.reserve(held, n_images=len(images) - 1)
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


async def _read_body(service: Service, request: Request, held: ExitStack) -> bytes:
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
                service.reserve(held, n_bytes=len(chunk))
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
        found.append(bytes(simplejpeg.encode_jpeg(smaller(pixels, EXAMPLE_SIDE), quality=90)))
        if len(found) == MAX_EXAMPLES:
            break
    if not found:
        raise UsageError(f"--examples {folder}: no images here.")
    return found


# ---- answers


def _add_error_texts(app: FastAPI) -> None:
    async def wrong_value(_request: Request, error: Any) -> Response:
        first = error.errors()[0]
        return as_json({"error": f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg'].lower()}"}, 422)

    async def fault(_request: Request, _error: Exception) -> Response:
        return as_json({"error": "this request could not be answered"}, 503, {"retry-after": "1"})

    async def gone(_request: Request, _error: Exception) -> Response:
        return _NoResponse()

    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(StarletteHTTPException, as_error)
    app.add_exception_handler(RequestValidationError, wrong_value)
    app.add_exception_handler(Exception, fault)


class _NoResponse(Response):
    """For a client that disconnected: sends nothing and counts no error."""

    async def __call__(self, _scope: Scope, _receive: Receive, _send: Send) -> None:
        return


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
