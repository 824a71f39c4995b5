"""Sends epochs to an experiment tracker: TensorBoard, MLflow, Weights & Biases or Trackio.

In: the tracker's name and the records of the loop. All are optional.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        folder: the run folder; its name is the name of the run, and local trackers write to ``tracking`` in it.
    """
    if name is None:
        yield lambda _: None
        return
    place = folder / "tracking"
    place.mkdir(parents=True, exist_ok=True)
    asked = {key: value for key, value in settings.items() if value is not None}
    send, close = _START[name](folder.name or "topwork", place, asked)

    def track(record: dict[str, Any]) -> None:
        values = {key: record[key] for key in SENT if record.get(key) is not None}
        values |= {f"rate/{stage}": rate * _factor(record) for stage, rate in record.get("rates", {}).items()}
        send(values, record["epoch"])

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


def _wandb(run: str, place: Path, settings: dict[str, Any], package: str = "wandb") -> tuple[Send, Callable[[], Any]]:
    tracker = importlib.import_module(package)  # trackio has the same functions
    where = {"dir": str(place)} if package == "wandb" else {}
    tracker.init(project="topwork", name=run, config=settings, **where)
    return lambda values, epoch: tracker.log(values, step=epoch), tracker.finish


def _trackio(run: str, place: Path, settings: dict[str, Any]) -> tuple[Send, Callable[[], Any]]:
    return _wandb(run, place, settings, "trackio")


_START = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb, "trackio": _trackio}


def _factor(record: dict[str, Any]) -> float:
    """The schedule's factor at the last recorded step of the epoch."""
    curve = record.get("curve")
    return float(curve[-1][2]) if curve else 1.0
