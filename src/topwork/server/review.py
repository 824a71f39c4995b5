"""The page of ``topwork review``: shows likely label errors one by one, to keep, relabel or exclude.

In: a :class:`~topwork.commands.review.Review`. Out: an application for ``serve.py`` on localhost; only its own page can
make changes (``own_page.py``). Images are addressed by their number in the run and sent as JPEG, so nothing else can be
read.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from topwork.commands.review import Conflict, Outcome, Review
from topwork.errors import ImageError, TopworkError, UsageError
from topwork.progress import Reporter
from topwork.report.pictures import small_jpeg
from topwork.report.run_page import write_report
from topwork.server.app import as_json, static_file
from topwork.server.own_page import OwnPage
from topwork.server.serve import run_app
from topwork.text import escape

if TYPE_CHECKING:
    from starlette.types import ASGIApp

SIDE, SMALL_SIDE, QUALITY = 768, 192, 85
_STATIC = {"review.js": "text/javascript", "review.css": "text/css", "app.css": "text/css"}


class Desk(OwnPage):
    """The state of the application: the review, and a running fit."""

    def __init__(self, review: Review, port: int) -> None:
        super().__init__(port)
        self.review = review
        self.shown_rows = {row for doubt in review.doubts for row in (doubt.row, *doubt.neighbors)}
        self.report: Path | None = None  # of the new run
        self._fit = {"state": "none"}
        self._lock = threading.Lock()

    def begin_fit(self) -> dict[str, Any]:
        """Starts a fit with the corrected labels, unless one is running."""
        with self._lock:
            if self._fit["state"] == "running":
                return self._fit
            self._fit = {"state": "running", "doing": "starting"}
        threading.Thread(target=self._fit_again, daemon=True, name="fit again").start()
        return self._fit

    def _fit_again(self) -> None:
        def doing(words: str) -> None:
            self._fit = {"state": "running", "doing": words}

        try:
            outcome = self.review.fit_again(_Telling(doing))
            self.report = write_report(outcome.run)
        except TopworkError as error:
            self._fit = {"state": "failed", "error": str(error)}
        except Exception as error:  # noqa: BLE001 - a thread's error must reach the page
            self._fit = {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        else:
            self._fit = {"state": "done", **_outcome(outcome)}

    @property
    def fit(self) -> dict[str, Any]:
        """The state of the fit."""
        return self._fit


def serve_review(review: Review, listener: socket.socket) -> None:
    """Serves the page until SIGINT or SIGTERM."""
    desk = Desk(review, listener.getsockname()[1])
    run_app(create_review(desk), desk, listener)


class _Telling(Reporter):
    """Records the progress of a fit."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._step = tell, ""

    def step(self, name: str) -> None:
        """Starts a step."""
        self._step = name
        self._tell(name)

    def progress(self, n_done: int, n_all: int) -> None:
        """Reports progress within the step."""
        self._tell(f"{self._step}: {n_done:,} of {n_all:,}")


def create_review(desk: Desk) -> ASGIApp:
    """The application: the page, its data, images of the run, decisions, the fit."""
    return desk.application([*_shown(desk), *_changed(desk)])


def _shown(desk: Desk) -> list[Route]:
    """The read-only routes."""

    async def page(_request: Request) -> Response:
        return desk.page("review.html")

    async def items(_request: Request) -> Response:
        return as_json(_items(desk.review))

    async def image(request: Request) -> Response:
        row = request.path_params["row"]
        if row not in desk.shown_rows:
            raise HTTPException(404, "no such image")
        side = SMALL_SIDE if request.query_params.get("size") == "small" else SIDE
        try:
            jpeg, _, _ = await asyncio.to_thread(small_jpeg, desk.review.manifest, row, side, QUALITY)
        except ImageError as error:
            raise HTTPException(404, str(error)) from None
        return Response(jpeg, media_type="image/jpeg")

    async def static(request: Request) -> Response:
        return static_file(request.path_params["name"], _STATIC)

    async def report(_request: Request) -> Response:
        if desk.report is None:
            raise HTTPException(404, "there is no retrained run yet")
        text = await asyncio.to_thread(desk.report.read_text, "utf-8")
        return HTMLResponse(text, headers={"x-frame-options": "DENY"})

    async def progress(_request: Request) -> Response:
        return as_json(desk.fit)

    return [
        Route("/", page),
        Route("/items", items),
        Route("/image/{row:int}", image),
        Route("/static/{name}", static),
        Route("/fit", progress, methods=["GET"]),
        Route("/report", report),
    ]


def _changed(desk: Desk) -> list[Route]:
    """What writes."""

    async def decide(request: Request) -> Response:
        asked = await desk.asked(request)
        row, decision, version, label = (asked.get(key) for key in ("row", "decision", "version", "label"))
        if not _is_number(row) or not _is_number(version) or not isinstance(decision, str):
            raise HTTPException(422, "row and version must be integers, decision a string")
        if label is not None and not _is_number(label):
            raise HTTPException(422, "label must be a class number or null")
        try:
            state = await asyncio.to_thread(desk.review.decide, row, decision, label, version)
        except Conflict:
            current = desk.review.state(row)
            return as_json(
                {"error": "someone else has decided on this image; this is the current decision", **current}, 409
            )
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        except TopworkError as error:
            return as_json({"error": str(error).rstrip(".")}, 507)
        return as_json({**state, "tally": desk.review.tally()})

    async def begin(request: Request) -> Response:
        await desk.asked(request)
        return as_json(desk.begin_fit())

    return [Route("/decide", decide, methods=["POST"]), Route("/fit", begin, methods=["POST"])]


def _is_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _items(review: Review) -> dict[str, Any]:
    samples, classes = review.manifest.samples, review.manifest.classes
    index = {name: number for number, name in enumerate(classes)}
    return {
        "classes": [escape(name) for name in classes],
        "doubts": [
            {
                "row": doubt.row,
                "path": escape(samples[doubt.row].path),
                "part": review.part_of.get(samples[doubt.row].content_hash, ""),
                "label": index[samples[doubt.row].label],
                "suggested": doubt.suggested,
                "label_probability": doubt.label_probability,
                "suggested_probability": doubt.suggested_probability,
                "is_confident": doubt.is_confident,
                "neighbors": [
                    {"row": row, "label": index[samples[row].label], "path": escape(samples[row].path)}
                    for row in doubt.neighbors
                ],
                **{f"now_{key}": value for key, value in review.state(doubt.row).items()},
            }
            for doubt in review.doubts
        ],
        "tally": review.tally(),
        "corrections": escape(str(review.journal.path)),
        "command": escape(review.command),
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        "run": escape(str(outcome.run)),
        "report": escape(str(outcome.run / "report.html")),
        "part": outcome.part,
        "sentence": outcome.sentence,
    }
