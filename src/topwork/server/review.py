"""The page of ``topwork review``: shows likely label errors one by one, to keep, relabel or exclude.

In: a :class:`~topwork.commands.review.Review` and a listening socket. Images are addressed by their number in the run and
sent as JPEG, so nothing else can be read.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, TypeGuard

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from topwork.commands.review import Conflict, Review
from topwork.errors import ImageError, TopworkError, UsageError
from topwork.progress import Reporter
from topwork.report.pictures import small_jpeg
from topwork.report.run_page import write_report
from topwork.server.web import OwnPage, as_json, as_page
from topwork.text import escape

SIDE, SMALL_SIDE, QUALITY = 768, 192, 85


def serve_review(review: Review, listener: socket.socket) -> None:
    """Serves the page until SIGINT or SIGTERM."""
    desk = Desk(review, listener.getsockname()[1])
    routes = [
        Route("/", desk.page),
        Route("/items", desk.items),
        Route("/image/{row:int}", desk.image),
        Route("/fit", desk.progress),
        Route("/report", desk.show_report),
        Route("/decide", desk.decide, methods=["POST"]),
        Route("/fit", desk.begin, methods=["POST"]),
    ]
    desk.serve(routes, listener)


class Desk(OwnPage):
    """The review, and the fit with corrected labels."""

    def __init__(self, review: Review, port: int) -> None:
        super().__init__(port)
        self.review = review
        self.shown_rows = {row for doubt in review.doubts for row in (doubt.row, *doubt.neighbors)}
        self.report: Path | None = None  # of the new run

    # ---- read-only

    async def page(self, _request: Request) -> Response:
        """The page."""
        return as_page("review.html", new=self.token)

    async def items(self, _request: Request) -> Response:
        """Likely label errors, and the decisions about them."""
        return as_json(_items(self.review))

    async def image(self, request: Request) -> Response:
        """An image of the list."""
        row = request.path_params["row"]
        if row not in self.shown_rows:
            raise HTTPException(404, "no such image")
        side = SMALL_SIDE if request.query_params.get("size") == "small" else SIDE
        try:
            jpeg, _, _ = await asyncio.to_thread(small_jpeg, self.review.manifest, row, side, QUALITY)
        except ImageError as error:
            raise HTTPException(404, str(error)) from None
        return Response(jpeg, media_type="image/jpeg")

    async def progress(self, _request: Request) -> Response:
        """The state of the fit."""
        return as_json(self.job.state)

    async def show_report(self, _request: Request) -> Response:
        """The report of the new run."""
        if self.report is None:
            raise HTTPException(404, "there is no retrained run yet")
        return FileResponse(self.report, headers={"x-frame-options": "DENY"})

    # ---- changes

    async def decide(self, request: Request) -> Response:
        """Saves a decision."""
        asked = await self.asked(request)
        row, decision, version, label = (asked.get(key) for key in ("row", "decision", "version", "label"))
        if not _is_number(row) or not _is_number(version) or not isinstance(decision, str):
            raise HTTPException(422, "row and version must be integers, decision a string")
        if label is not None and not _is_number(label):
            raise HTTPException(422, "label must be a class number or null")
        try:
            state = await asyncio.to_thread(self.review.decide, row, decision, label, version)
        except Conflict:
            text = "someone else has decided on this image; this is the current decision"
            return as_json({"error": text, **self.review.state(row)}, 409)
        except UsageError as error:
            raise HTTPException(422, str(error)) from None
        except TopworkError as error:
            raise HTTPException(507, str(error).rstrip(".")) from None
        return as_json({**state, "tally": self.review.tally()})

    async def begin(self, request: Request) -> Response:
        """Starts a fit with the corrected labels."""
        await self.asked(request)
        return as_json(self.job.begin("retraining", self._fit_again))

    def _fit_again(self, reporter: Reporter) -> dict[str, Any]:
        outcome = self.review.fit_again(reporter)
        self.report = write_report(outcome.run)
        found = {"run": escape(str(outcome.run)), "report": escape(str(self.report))}
        return found | {"part": outcome.part, "sentence": outcome.sentence}


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
                "part": samples[doubt.row].part or "",
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
