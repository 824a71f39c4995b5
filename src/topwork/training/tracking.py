"""Epochs sent to an experiment tracker, through accelerate: TensorBoard, MLflow, Weights & Biases, Trackio.

In: the tracker's name and the records of the loop. Nothing else in topwork knows of trackers, and none is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from topwork.errors import UsageError

PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}


class Track(Protocol):
    """Takes the record of an epoch."""

    def __call__(self, record: dict[str, Any]) -> None:
        """Sends it."""


def check_tracker(name: str | None) -> None:
    """Raises UsageError where the tracker's package is not installed; called before the work begins."""
    import importlib.util

    if name is not None and importlib.util.find_spec(PACKAGES[name]) is None:
        raise UsageError(
            f"--track {name}: the package {PACKAGES[name]} is not installed (pip install {PACKAGES[name]})."
        )


@contextmanager
def tracking(name: str | None, folder: Path, settings: dict[str, Any]) -> Iterator[Track]:
    """Starts a tracker and ends it; without a name nothing is sent.

    Args:
        folder: the run; local trackers write to ``tracking`` in it, and its name is the name of the run.
    """
    if name is None:
        yield lambda _: None
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # accelerate's trackers ask it which process they are in
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = folder / "tracking"
    place.mkdir(parents=True, exist_ok=True)
    options = {"logging_dir": str(place)} if kind.requires_logging_directory else {}
    tracker = kind(folder.name or "topwork", **options)
    tracker.start()
    tracker.store_init_configuration({key: value for key, value in settings.items() if value is not None})

    def send(record: dict[str, Any]) -> None:
        values = {key: record[key] for key in SENT if record.get(key) is not None}
        values |= {f"rate/{stage}": rate * _factor(record) for stage, rate in record.get("rates", {}).items()}
        tracker.log(values, step=record["epoch"])

    try:
        yield send
    finally:
        tracker.finish()


SENT = (
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_calibrated_loss",
    "valid_accuracy",
    "images_per_second",
    "seconds",
)


def _factor(record: dict[str, Any]) -> float:
    """Where the schedule was at the last noted step of the epoch."""
    curve = record.get("curve")
    return float(curve[-1][2]) if curve else 1.0
