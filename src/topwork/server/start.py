"""``topwork app``: topwork in the browser, from a folder of images to a trained model.

In: a folder on this machine and a listening socket. It calls the functions of the commands (scan, fit, predict, export;
review as a separate process) and has no other state: dropped images are folders in ``images/``, everything else is a run
in ``runs/``. So nothing is lost on a restart, and the commands work on the same folders.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from topwork.commands.fit import fit
from topwork.commands.scan import survey
from topwork.errors import TopworkError, UsageError
from topwork.export.batch import row_of
from topwork.export.package import export_model
from topwork.export.predictor import Heatmaps, Predictor
from topwork.export.targets import TARGETS
from topwork.files import atomic_file, error_reason
from topwork.progress import Reporter
from topwork.report.run_page import write_report
from topwork.run import free_run_folder, interrupted, is_finished, read_evaluation
from topwork.server.web import OwnPage, as_json, as_page
from topwork.settings import FitSettings, ScanSettings
from topwork.text import escape

MAX_IMAGE = 50_000_000  # bytes per dropped file
MODES = ("probe", "auto", "tune")
_NAME = re.compile(r"[^\0/\\]{1,200}")


def serve_start(folder: Path, listener: socket.socket) -> None:
    """Serves the page until SIGINT or SIGTERM."""
    start = Start(folder, listener.getsockname()[1])
    changes = (
        start.keep, start.forget, start.scan, start.train, start.resume, start.predict, start.review, start.export,
    )  # fmt: skip
    routes = [
        Route("/", start.page),
        Route("/state", start.show_state),
        Route("/job", start.show_job),
        Route("/report/{run}", start.report),
        *(Route(f"/{endpoint.__name__}", endpoint, methods=["POST"]) for endpoint in changes),
    ]
    try:
        start.serve(routes, listener)
    finally:
        start.close()


class Start(OwnPage):
    """The application: its folder, the running job, and open models.

    Args:
        folder: contains ``images/`` and ``runs/``.
    """

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(port)
        self.images, self.runs = folder / "images", folder / "runs"
        self._lock = threading.Lock()
        self._models: dict[str, tuple[Predictor, Heatmaps]] = {}
        self._reviews: dict[str, tuple[subprocess.Popen[str], str]] = {}

    # ---- read-only

    async def page(self, _request: Request) -> Response:
        """The page."""
        return as_page("start.html", new=self.token)

    async def show_state(self, _request: Request) -> Response:
        """See :meth:`state`."""
        return as_json(await asyncio.to_thread(self.state))

    async def show_job(self, _request: Request) -> Response:
        """The state of the job."""
        return as_json(self.job.state)

    async def report(self, request: Request) -> Response:
        """The report of a run."""
        path = self._run_of(request.path_params["run"]) / "report.html"
        if not path.is_file():
            raise HTTPException(404, "this run has no report yet")
        return FileResponse(path, headers={"x-frame-options": "DENY"})

    def state(self) -> dict[str, Any]:
        """Dropped image folders, runs, and the job."""
        folders = sorted(path for path in self.images.glob("*") if path.is_dir()) if self.images.is_dir() else []
        runs = sorted(path.parent for path in self.runs.glob("*/settings.json"))
        runs = [run for run in runs if (run / "model").is_dir() or not is_finished(run)]  # evaluations have no model
        return {
            "folder": escape(str(self.runs.absolute().parent)),
            "images": [
                {"name": path.name, "classes": {c.name: _n_files(c) for c in sorted(path.iterdir()) if c.is_dir()}}
                for path in folders
            ],
            "runs": [_about_run(run) for run in runs],
            "targets": {name: target.help for name, target in TARGETS.items()},
            "job": self.job.state,
        }

    # ---- changes

    async def keep(self, request: Request) -> Response:
        """Writes one dropped image without overwriting another."""
        data = await self.body(request, MAX_IMAGE)
        names = [request.query_params.get(key, "") for key in ("images", "label", "file")]
        if not all(map(_is_name, names)):
            raise HTTPException(422, "invalid folder or file name")
        await asyncio.to_thread(_keep, self.images.joinpath(*names), data)
        return as_json({})

    async def forget(self, request: Request) -> Response:
        """Deletes a folder of dropped images."""
        name = (await self.asked(request)).get("images")
        if isinstance(name, str) and _is_name(name) and (self.images / name).is_dir():
            await asyncio.to_thread(shutil.rmtree, self.images / name)
        return as_json({})

    async def scan(self, request: Request) -> Response:
        """``topwork scan --quick``."""
        data = self._data_of(await self.asked(request))
        return as_json(self.job.begin("scan", lambda reporter: _scanned(data, reporter)))

    async def train(self, request: Request) -> Response:
        """``topwork fit``, into the next free run."""
        asked = await self.asked(request)
        mode = asked.get("mode", "probe")
        if mode not in MODES:
            raise HTTPException(422, f"mode must be one of {', '.join(MODES)}")
        data = self._data_of(asked)
        run = free_run_folder(data, lambda path: (path / "settings.json").exists(), self.runs)
        return as_json(self._fit(data, run, FitSettings(mode=mode)))

    async def resume(self, request: Request) -> Response:
        """``topwork fit --resume``."""
        run = self._run_of((await self.asked(request)).get("run"))
        try:
            path, settings = interrupted(run)
        except TopworkError as error:
            raise HTTPException(422, str(error)) from None
        return as_json(self._fit(Path(path), run, settings))

    async def predict(self, request: Request) -> Response:
        """The prediction for one image, with a heatmap as a data URL."""
        data = await self.body(request, MAX_IMAGE)
        return as_json(await _answer(self._predicted, self._run_of(request.query_params.get("run")), data))

    async def review(self, request: Request) -> Response:
        """The URL of ``topwork review`` for a run, which is started if needed."""
        return as_json({"url": await _answer(self._reviewed, self._run_of((await self.asked(request)).get("run")))})

    async def export(self, request: Request) -> Response:
        """``topwork export``, into the run."""
        asked = await self.asked(request)
        run, to = self._run_of(asked.get("run")), asked.get("to")
        if to not in TARGETS:
            raise HTTPException(422, f"to must be one of {', '.join(TARGETS)}")
        return as_json(self.job.begin("export", lambda reporter: _exported(run, str(to), reporter)))

    def close(self) -> None:
        """Stops the review pages."""
        for process, _ in self._reviews.values():
            process.terminate()
            process.wait()

    def _run_of(self, name: Any) -> Path:
        """The folder of a run by its name."""
        if not isinstance(name, str) or not _is_name(name) or not (self.runs / name / "settings.json").is_file():
            raise HTTPException(404, "no such run")
        return self.runs / name

    def _data_of(self, asked: dict[str, Any]) -> Path:
        """The requested images: dropped ones by name, or a path on this machine."""
        name, path = asked.get("images"), asked.get("path")
        if isinstance(name, str) and _is_name(name) and (self.images / name).is_dir():
            return self.images / name
        if isinstance(path, str) and path.strip():
            found = Path(path.strip()).expanduser()
            if found.exists():
                return found
            raise HTTPException(422, f"{escape(str(found))}: no such file or folder")
        raise HTTPException(422, "choose a folder of images")

    def _fit(self, data: Path, run: Path, settings: FitSettings) -> dict[str, Any]:
        def work(reporter: Reporter) -> dict[str, Any]:
            self._models.pop(run.name, None)
            fit(data, run, settings, overwrite=(run / "settings.json").exists(), reporter=reporter)
            reporter.step("report")
            write_report(run)
            return {"run": run.name}

        return self.job.begin("training", work)

    def _predicted(self, run: Path, data: bytes) -> dict[str, Any]:
        with self._lock:
            if run.name not in self._models:
                predictor = Predictor(run)
                self._models[run.name] = predictor, Heatmaps(predictor)
            predictor, heatmaps = self._models[run.name]
        prediction = predictor.predict(data)[0]
        row = row_of(prediction)
        if prediction.label is not None:
            picture = heatmaps.jpeg(data, prediction.top[0][0])
            row["map"] = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
        return row

    def _reviewed(self, run: Path) -> str:
        with self._lock:
            process, url = self._reviews.get(run.name, (None, ""))
            if process is not None and process.poll() is None:
                return url
            command = [sys.executable, "-m", "topwork.cli", "review", str(run), "--port", "0", "--json"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            try:
                url = str(json.loads(process.stdout.readline())["url"])
            except (ValueError, KeyError):
                raise UsageError(f"{run}: its labels cannot be reviewed.") from None
            self._reviews[run.name] = process, url
            return url


async def _answer(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return await asyncio.to_thread(work, *arguments)
    except TopworkError as error:
        raise HTTPException(422, str(error)) from None


def _keep(place: Path, data: bytes) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        stem, suffix, number = place.stem, place.suffix, 2
        while place.exists() and place.read_bytes() != data:
            place, number = place.with_name(f"{stem}-{number}{suffix}"), number + 1
        with atomic_file(place) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise HTTPException(507, f"{escape(str(place))}: cannot be written: {error_reason(error)}") from None


def _scanned(data: Path, reporter: Reporter) -> dict[str, Any]:
    found = survey(data, ScanSettings(quick=True), reporter=reporter).as_dict()
    kept = ("layout", "classes", "n_used", "n_rejected", "parts", "notes", "findings")
    rejects = [{key: escape(reject[key]) for key in ("path", "reason")} for reject in found["rejects"][:20]]
    return {"scan": {key: found[key] for key in kept} | {"rejects": rejects}, "path": escape(str(data))}


def _exported(run: Path, to: str, reporter: Reporter) -> dict[str, Any]:
    reporter.step("export and verify")
    folder = run / "export"
    folder.mkdir(exist_ok=True)
    made = export_model(run, to, folder / f"model{TARGETS[to].endings[0]}", overwrite=True)
    certificate = made.certificate
    return {
        "export": escape(str(made.exported)),
        "script": escape(str(made.script)),
        "checked": f"{certificate.n_same} of {certificate.n_compared} predictions are the same",
    }


def _about_run(run: Path) -> dict[str, Any]:
    about: dict[str, Any] = {"name": run.name, "is_finished": is_finished(run)}
    try:
        about["path"] = escape(json.loads((run / "settings.json").read_text())["path"])
        evaluation = read_evaluation(run)
    except (TopworkError, OSError, ValueError, KeyError, TypeError):
        return about
    part = next((name for name in ("test", "valid") if name in evaluation), None)
    if part is not None:
        about |= {"part": part, "n": evaluation[part]["n"], "accuracy": evaluation[part]["accuracy"]}
    return about


def _n_files(folder: Path) -> int:
    return sum(not entry.name.startswith(".") for entry in os.scandir(folder))


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and not text.startswith(".") and text.isprintable()
