"""``topwork app``: topwork in the browser, from a folder of images to a trained model.

In: a folder on this machine. Out: an application for ``serve.py``; only its own page can make changes
(``own_page.py``). It calls the functions of the commands (scan, fit, predict, export; review as a separate process) and
has no other state: dropped images are folders in ``images/``, everything else is a run in ``runs/``. So nothing is lost
on a restart, and the commands work on the same folders.
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
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
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
from topwork.run import interrupted, is_finished, read_evaluation
from topwork.server.app import as_json, static_file
from topwork.server.own_page import OwnPage
from topwork.server.serve import run_app
from topwork.settings import FitSettings, ScanSettings
from topwork.text import escape

if TYPE_CHECKING:
    from starlette.types import ASGIApp

MAX_IMAGE = 50_000_000  # bytes per dropped file
MODES = ("probe", "auto", "tune")
_STATIC = {"start.js": "text/javascript", "start.css": "text/css", "app.css": "text/css"}
_NAME = re.compile(r"[^\0/\\]{1,200}")


class Start(OwnPage):
    """The state of the application: its folder, the running job, and open models.

    Args:
        folder: contains ``images/`` and ``runs/``.
    """

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(port)
        self.images, self.runs = folder / "images", folder / "runs"
        self._job: dict[str, Any] = {"state": "none"}
        self._lock = threading.Lock()
        self._models: dict[str, tuple[Predictor, Heatmaps]] = {}
        self._reviews: dict[str, tuple[subprocess.Popen[str], str]] = {}

    # ---- state

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
            "job": self._job,
        }

    def run_of(self, name: Any) -> Path:
        """The folder of a run by its name."""
        if not isinstance(name, str) or not _is_name(name) or not (self.runs / name / "settings.json").is_file():
            raise HTTPException(404, "no such run")
        return self.runs / name

    def data_of(self, asked: dict[str, Any]) -> Path:
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

    # ---- actions

    def keep(self, name: str, label: str, file: str, data: bytes) -> None:
        """Writes one dropped image without overwriting another."""
        if not all(_is_name(part) for part in (name, label, file)):
            raise HTTPException(422, "invalid folder or file name")
        place = self.images / name / label / file
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            number = 2
            while place.exists() and place.read_bytes() != data:
                place, number = place.with_name(f"{Path(file).stem}-{number}{Path(file).suffix}"), number + 1
            with atomic_file(place) as partial:
                partial.write_bytes(data)
        except OSError as error:
            raise HTTPException(507, f"{escape(str(place))}: cannot be written: {error_reason(error)}") from None

    def begin(self, kind: str, work: Callable[[Reporter], dict[str, Any]]) -> dict[str, Any]:
        """Starts a job, unless one is running."""
        with self._lock:
            if self._job["state"] == "running":
                raise HTTPException(409, f"wait for the {self._job['kind']} to finish")
            self._job = {"state": "running", "kind": kind, "step": "starting", "notes": []}
        threading.Thread(target=self._run, args=(kind, work), daemon=True, name=kind).start()
        return self._job

    def _run(self, kind: str, work: Callable[[Reporter], dict[str, Any]]) -> None:
        teller = _Telling(self._job)
        try:
            found = work(teller)
        except TopworkError as error:
            self._job = {"state": "failed", "kind": kind, "error": str(error)}
        except Exception as error:  # noqa: BLE001 - a thread's error must reach the page
            self._job = {"state": "failed", "kind": kind, "error": f"{type(error).__name__}: {error}"}
        else:
            self._job = {"state": "done", "kind": kind, "notes": self._job["notes"], **found}

    def train(self, data: Path, mode: str, reporter: Reporter) -> dict[str, Any]:
        """``topwork fit``, into the next free run."""
        run, number = self.runs / data.stem, 2
        while (run / "settings.json").exists():
            run, number = self.runs / f"{data.stem}-{number}", number + 1
        return self._fitted(data, run, FitSettings(mode=mode), reporter)  # type: ignore[arg-type]

    def resume(self, run: Path, reporter: Reporter) -> dict[str, Any]:
        """``topwork fit --resume``."""
        path, settings = interrupted(run)
        return self._fitted(Path(path), run, settings, reporter)

    def _fitted(self, data: Path, run: Path, settings: FitSettings, reporter: Reporter) -> dict[str, Any]:
        self._models.pop(run.name, None)
        fit(data, run, settings, overwrite=(run / "settings.json").exists(), reporter=reporter)
        reporter.step("report")
        write_report(run)
        return {"run": run.name}

    def predict(self, run: Path, data: bytes) -> dict[str, Any]:
        """The prediction for one image, with a heatmap as a data URL."""
        predictor, heatmaps = self._opened(run)
        prediction = predictor.predict(data)[0]
        row = row_of(prediction)
        if prediction.label is not None:
            picture = heatmaps.jpeg(data, prediction.top[0][0])
            row["map"] = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
        return row

    def _opened(self, run: Path) -> tuple[Predictor, Heatmaps]:
        with self._lock:
            if run.name not in self._models:
                predictor = Predictor(run)
                self._models[run.name] = predictor, Heatmaps(predictor)
            return self._models[run.name]

    def review(self, run: Path) -> str:
        """The URL of ``topwork review`` for a run, which is started if needed."""
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

    def close(self) -> None:
        """Stops the review pages."""
        for process, _ in self._reviews.values():
            process.terminate()
            process.wait()


def serve_start(folder: Path, listener: socket.socket) -> None:
    """Serves the page until SIGINT or SIGTERM."""
    start = Start(folder, listener.getsockname()[1])
    try:
        run_app(create_start(start), start, listener)
    finally:
        start.close()


def create_start(start: Start) -> ASGIApp:
    """Creates the application: the page, its data and actions."""
    return start.application([*_shown(start), *_done(start)])


def _shown(start: Start) -> list[Route]:
    """The read-only routes."""

    async def page(_request: Request) -> Response:
        return start.page("start.html")

    async def state(_request: Request) -> Response:
        return as_json(await asyncio.to_thread(start.state))

    async def job(_request: Request) -> Response:
        return as_json(start.state()["job"])

    async def report(request: Request) -> Response:
        path = start.run_of(request.path_params["run"]) / "report.html"
        if not path.is_file():
            raise HTTPException(404, "this run has no report yet")
        return HTMLResponse(await asyncio.to_thread(path.read_text, "utf-8"), headers={"x-frame-options": "DENY"})

    async def static(request: Request) -> Response:
        return static_file(request.path_params["name"], _STATIC)

    return [
        Route("/", page),
        Route("/state", state),
        Route("/job", job),
        Route("/report/{run}", report),
        Route("/static/{name}", static),
    ]


def _done(start: Start) -> list[Route]:
    """The routes that make changes; each checks that the request comes from the page."""

    async def keep(request: Request) -> Response:
        data = await start.body(request, MAX_IMAGE)
        name, label, file = (request.query_params.get(key, "") for key in ("images", "label", "file"))
        await asyncio.to_thread(start.keep, name, label, file, data)
        return as_json({})

    async def forget(request: Request) -> Response:
        name = (await start.asked(request)).get("images")
        if isinstance(name, str) and _is_name(name) and (start.images / name).is_dir():
            await asyncio.to_thread(shutil.rmtree, start.images / name)
        return as_json({})

    async def scan(request: Request) -> Response:
        data = start.data_of(await start.asked(request))
        return as_json(start.begin("scan", lambda reporter: _scanned(data, reporter)))

    async def train(request: Request) -> Response:
        asked = await start.asked(request)
        mode = asked.get("mode", "probe")
        if mode not in MODES:
            raise HTTPException(422, f"mode must be one of {', '.join(MODES)}")
        data = start.data_of(asked)
        return as_json(start.begin("training", lambda reporter: start.train(data, mode, reporter)))

    async def resume(request: Request) -> Response:
        run = start.run_of((await start.asked(request)).get("run"))
        return as_json(start.begin("training", lambda reporter: start.resume(run, reporter)))

    async def predict(request: Request) -> Response:
        data = await start.body(request, MAX_IMAGE)
        run = start.run_of(request.query_params.get("run"))
        return as_json(await _answer(start.predict, run, data))

    async def review(request: Request) -> Response:
        run = start.run_of((await start.asked(request)).get("run"))
        return as_json({"url": await _answer(start.review, run)})

    async def export(request: Request) -> Response:
        asked = await start.asked(request)
        run, to = start.run_of(asked.get("run")), asked.get("to")
        if to not in TARGETS:
            raise HTTPException(422, f"to must be one of {', '.join(TARGETS)}")
        return as_json(start.begin("export", lambda reporter: _exported(run, str(to), reporter)))

    written = (keep, forget, scan, train, resume, predict, review, export)
    return [Route(f"/{endpoint.__name__}", endpoint, methods=["POST"]) for endpoint in written]


async def _answer(work: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return await asyncio.to_thread(work, *arguments)
    except TopworkError as error:
        raise HTTPException(422, str(error)) from None


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


class _Telling(Reporter):
    """Records progress in the job, for the page."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job

    def step(self, name: str) -> None:
        """Starts a step."""
        self._job |= {"step": name, "n_done": 0, "n_all": 0}

    def progress(self, n_done: int, n_all: int) -> None:
        """Reports progress within the step."""
        self._job |= {"n_done": n_done, "n_all": n_all}

    def note(self, text: str) -> None:
        """Adds a note for the user."""
        self._job["notes"].append(text)

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch of fine-tuning is done."""
        self._job["epoch"] = {key: record.get(key) for key in ("epoch", "train_loss", "valid_loss", "valid_accuracy")}
