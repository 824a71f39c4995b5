"""Progress reporting, timing of steps, and experiment trackers.

Commands report to a :class:`Reporter`; the caller decides where it is shown: in the terminal (``console.py``), a
notebook, the app, or nowhere.
"""

from __future__ import annotations

import html
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from topwork.text import escape


class Reporter:
    """Receives progress. This base class shows nothing."""

    def step(self, name: str) -> None:
        """Starts a step."""

    def progress(self, n_done: int, n_all: int) -> None:
        """Reports progress in the current step."""

    def note(self, text: str) -> None:
        """Adds a note for the user."""

    def stages(self, rows: Sequence[dict[str, Any]]) -> None:
        """Reports the stages with their parameters and learning rates before fine-tuning."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Reports an epoch of fine-tuning."""


class Steps:
    """The steps of a command, reported and timed.

    Attributes:
        seconds: of each step, by name.
    """

    def __init__(self, reporter: Reporter | None = None) -> None:
        self.reporter = reporter or default_reporter()
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Reports a step, and times it."""
        self.reporter.step(name.replace("_", " "))
        with self.timed(name):
            yield

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a step, without reporting it."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 3)

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return round(time.perf_counter() - self._started, 3)


class NotebookReporter(Reporter):
    """Shows steps, a progress bar, notes and epochs below a notebook cell."""

    def __init__(self) -> None:
        # tqdm, a dependency of timm, warns in notebooks without ipywidgets; its bars are not used
        warnings.filterwarnings("ignore", message="IProgress not found")
        shown_by: Any = importlib.import_module("IPython.display")  # in a notebook it is there
        self._html, self._shown = shown_by.HTML, 0.0
        self._steps: list[str] = []
        self._lines: list[str] = []
        self._handle: Any = shown_by.display(self._html(""), display_id=True)

    def step(self, name: str) -> None:
        """Adds the step to the list of steps."""
        self._steps.append(name)
        self._show(0, 0)

    def progress(self, n_done: int, n_all: int) -> None:
        """Moves the bar, at most five times per second."""
        if n_done >= n_all or time.monotonic() - self._shown > 0.2:
            self._show(n_done, n_all)

    def note(self, text: str) -> None:
        """Adds a line."""
        self._lines.append(text)
        self._show(0, 0)

    def epoch(self, record: dict[str, Any]) -> None:
        """Adds a line."""
        valid = f", valid loss {record['valid_loss']:.3f}" if record.get("valid_loss") is not None else ""
        self.note(f"Epoch {record['epoch']}: loss {record['train_loss']:.3f}{valid}")

    def _show(self, n_done: int, n_all: int) -> None:
        self._shown = time.monotonic()
        bar = f" <progress value='{n_done}' max='{n_all}'></progress> {n_done:,} of {n_all:,}" if n_all else ""
        lines = "".join(f"<div>{html.escape(escape(line))}</div>" for line in self._lines)
        if self._handle is not None:
            self._handle.update(self._html(f"<div>{html.escape(' → '.join(self._steps))}{bar}</div>{lines}"))


def default_reporter() -> Reporter:
    """Progress bars in a notebook; elsewhere nothing is shown."""
    return NotebookReporter() if "ipykernel" in sys.modules else Reporter()


# ---- experiment trackers, all of them optional

SENT = (
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_calibrated_loss",
    "valid_accuracy",
    "images_per_second",
    "seconds",
)
Send = Callable[[dict[str, float], int], Any]  # values by name, epoch


@contextmanager
def tracking(name: str | None, folder: Path, settings: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Starts and ends a tracker; yields a function that takes the record of an epoch. Without a name nothing is sent.

    Args:
        name: ``tensorboard``, ``mlflow``, ``wandb`` or ``trackio``.
        folder: the run folder; its name is the name of the run, and local trackers write to ``tracking`` in it.
    """
    if name is None:
        yield lambda _: None
        return
    place = folder / "tracking"
    place.mkdir(parents=True, exist_ok=True)
    starts: dict[str, Callable[..., tuple[Send, Callable[[], Any]]]] = {"tensorboard": _tensorboard, "mlflow": _mlflow}
    start = starts.get(name, partial(_wandb, name))
    chosen = {key: value for key, value in settings.items() if value is not None}
    send, close = start(folder.name or "topwork", place, chosen)

    def track(record: dict[str, Any]) -> None:
        values = {key: record[key] for key in SENT if record.get(key) is not None}
        factor = record["curve"][-1][2] if record.get("curve") else 1.0  # the schedule's, at the last recorded step
        send(values | {f"rate/{stage}": rate * factor for stage, rate in record["rates"].items()}, record["epoch"])

    try:
        yield track
    finally:
        close()


def _tensorboard(run: str, place: Path, settings: dict[str, Any]) -> tuple[Send, Callable[[], Any]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(place / run))
    writer.add_text("settings", "\n".join(f"- {key}: {value}" for key, value in settings.items()))

    def send(values: dict[str, float], epoch: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, epoch)

    return send, writer.close


def _mlflow(run: str, place: Path, settings: dict[str, Any]) -> tuple[Send, Callable[[], Any]]:
    mlflow = importlib.import_module("mlflow")
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{place / 'mlflow.db'}")
    mlflow.set_experiment("topwork")
    mlflow.start_run(run_name=run)
    mlflow.log_params(settings)
    return mlflow.log_metrics, mlflow.end_run


def _wandb(package: str, run: str, place: Path, settings: dict[str, Any]) -> tuple[Send, Callable[[], Any]]:
    tracker = importlib.import_module(package)  # trackio has the same functions
    where = {"dir": str(place)} if package == "wandb" else {}
    tracker.init(project="topwork", name=run, config=settings, **where)
    return lambda values, epoch: tracker.log(values, step=epoch), tracker.finish
