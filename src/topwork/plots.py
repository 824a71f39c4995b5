"""Plots for notebooks and papers, from a run, a manifest or predictions; each function returns a matplotlib figure.

    from topwork import plots
    plots.show_batch(run)
    plots.confusion_matrix(run)

A run is what ``topwork.fit`` or ``topwork.load_run`` returned, or the path of its folder. Notebooks show the figures;
``figure.savefig("name.png")`` saves them. They do not use pyplot, so nothing needs to be closed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib  # noqa: F401, TID253 - loaded only for this module
import numpy as np
from matplotlib.figure import Figure  # noqa: TID253
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: TID253
from numpy.typing import NDArray

from topwork.data.images import decode
from topwork.data.manifest import Manifest
from topwork.data.transforms import Pixels
from topwork.errors import ImageError, UsageError
from topwork.evaluation.curves import calibration_error, reliability_bins
from topwork.evaluation.predictions import Predictions
from topwork.run import Run, load_run
from topwork.text import count, escape, percent

Source = Run | str | os.PathLike[str]
COLUMNS = 4
SIDE = 224  # minimum short side of decoded pictures, in pixels
MOST_NAMED = 30  # maximum number of classes with names beside a matrix
MOST_NUMBERED = 12  # maximum number of classes with counts in the cells


class Plot(Figure):
    """A figure that a notebook shows once, with any matplotlib backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=96)
        return buffer.getvalue()


def show_batch(source: Source | Manifest, n: int = 12, *, part: str = "train", seed: int = 0) -> Figure:
    """Images with their labels, drawn at random.

    Args:
        source: a run (images of its ``part``) or a manifest.
    """
    rng = np.random.default_rng(seed)
    if isinstance(source, Manifest):
        manifest, rows = source, np.arange(len(source.samples))
    else:
        run = _run(source)
        manifest, rows = run.manifest, run.split.parts().get(part, np.empty(0, np.int64))
    if not len(rows):
        raise UsageError(f"There are no images in {part}.")
    chosen = rng.permutation(rows)[:n].tolist()
    return _images(manifest, chosen, [manifest.samples[row].label for row in chosen])


def confusion_matrix(source: Source | Predictions, *, part: str = "auto") -> Figure:
    """Counts of images: rows are true classes, columns predicted ones.

    Args:
        part: part of a run: ``test``, ``valid``, or ``auto`` (test if there is one).
    """
    found = _predictions(source, part).labeled()
    n = len(found.classes)
    matrix = np.zeros((n, n), np.int64)
    np.add.at(matrix, (found.labels, found.predicted), 1)
    figure, axis = _figure(3.2 + min(n, MOST_NAMED) * 0.3, 2.8 + min(n, MOST_NAMED) * 0.3)
    axis.imshow(matrix / np.maximum(matrix.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    if n <= MOST_NAMED:
        names = [escape(name) for name in found.classes]
        upright = sum(map(len, names)) < 20  # so few letters fit side by side
        axis.set_xticks(range(n), names, fontsize=8, **({} if upright else {"rotation": 45, "ha": "right"}))
        axis.set_yticks(range(n), names, fontsize=8)
    for row, column in zip(*np.nonzero(matrix), strict=True) if n <= MOST_NUMBERED else ():
        dark = matrix[row, column] > matrix[row].sum() / 2
        axis.text(column, row, str(matrix[row, column]), ha="center", va="center", color="white" if dark else "black")
    axis.set(
        xlabel="predicted",
        ylabel="true",
        title=f"Accuracy {percent(float(found.correct.mean()))}, {count(len(found), 'image')}",
    )
    return figure


def top_losses(source: Source, n: int = 8, *, part: str = "auto") -> Figure:
    """The images with the highest loss, with prediction, true class and its probability."""
    run = _run(source)
    found = _predictions(run, part).labeled()
    own = found.probabilities[np.arange(len(found)), found.labels]
    worst = np.argsort(own, kind="stable")[:n]
    titles = [
        f"predicted {escape(found.classes[found.predicted[i]])}\ntrue {escape(found.classes[found.labels[i]])} ({percent(float(own[i]))})"
        for i in worst.tolist()
    ]
    return _images(run.manifest, found.sample_indices[worst].tolist(), titles)


def curves(source: Source) -> Figure:
    """Loss and accuracy by epoch of a fine-tuned run; for a probe, cross-validated accuracy by regularization."""
    history = _run(source).history
    epochs = [record for record in history if "epoch" in record]
    if not epochs:
        return _penalties(history)
    figure, axes = _figure(9, 3.2, columns=2)
    for axis, kind in zip(axes, ("loss", "accuracy"), strict=True):
        for part in ("train", "valid"):
            points = [(r["epoch"], r[f"{part}_{kind}"]) for r in epochs if r.get(f"{part}_{kind}") is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=part)
        axis.set(xlabel="epoch", ylabel=kind)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if kind == "accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(1))
            axis.set_ylim(top=min(1.01, axis.get_ylim()[1]))
        if axis.lines:
            axis.legend()
    return figure


def reliability(source: Source | Predictions, *, part: str = "auto") -> Figure:
    """Reliability diagram: accuracy by confidence, with 95% CIs. A calibrated model is on the diagonal."""
    found = _predictions(source, part)
    bins = reliability_bins(found)
    known = found.labeled()
    error = calibration_error(known.confidence, known.correct)
    figure, axis = _figure(4.2, 4)
    axis.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    x, y = np.array([b.confidence for b in bins]), np.array([b.accuracy for b in bins])
    ends = np.array([(b.accuracy_interval.low, b.accuracy_interval.high) for b in bins]).reshape(-1, 2)
    axis.errorbar(x, y, yerr=np.abs(ends.T - y), fmt="o", capsize=3)
    title = "" if error is None else f"Expected calibration error {percent(error)}"
    axis.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="accuracy", title=title)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1))
    return figure


def heatmap(source: Source, image: str | os.PathLike[str] | bytes, label: str | None = None) -> Figure:
    """Heatmap: an image next to the evidence for a class.

    Args:
        image: a path, or the bytes of a file.
        label: a class; by default the predicted one.
    """
    from topwork.export.inputs import read_image
    from topwork.export.predictor import Heatmaps, Predictor

    predictor = Predictor(_run(source).folder)
    name = "The image" if isinstance(image, bytes) else escape(str(image))
    try:
        data = read_image(image if isinstance(image, bytes) else Path(image))
    except ImageError as error:
        raise UsageError(f"{name}: {error}") from None
    (answer,) = predictor.predict([data])
    if answer.error is not None:
        raise UsageError(f"{name}: {answer.error}")
    label = label or answer.top[0][0]
    if label not in predictor.classes:
        raise UsageError(f"{escape(label)}: not a class of the model.")
    probability = dict(answer.top).get(label)
    title = escape(label) if probability is None else f"{escape(label)} ({percent(probability)})"
    pixels = decode(predictor.as_trained(data), min_side=SIDE).pixels
    height = 3.4 * pixels.shape[0] / pixels.shape[1]
    figure, axes = _figure(7, min(max(height, 1), 6) + 0.3, columns=2)
    _show(axes[0], pixels, "image")
    _show(axes[1], Heatmaps(predictor).picture(data, label), title)
    return figure


# ---- helpers


def _run(source: Source) -> Run:
    return source if isinstance(source, Run) else load_run(source)


def _predictions(source: Source | Predictions, part: str) -> Predictions:
    found = source if isinstance(source, Predictions) else _run(source).predictions_of(part)
    if found.task.multi_label:
        raise UsageError("This plot needs one label per image; for several labels, see the report.")
    return found


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    figure = Plot(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def _images(manifest: Manifest, rows: Sequence[int], titles: Sequence[str]) -> Figure:
    n_lines = max(1, -(-len(rows) // COLUMNS))
    figure, axes = _figure(2.1 * COLUMNS, 2.3 * n_lines, n_lines, COLUMNS)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row, title in zip(axes.flat, rows, titles, strict=False):
        _show(axis, decode(manifest.read(row), min_side=SIDE).pixels, escape(title) if "\n" not in title else title)
    return figure


def _show(axis: Any, pixels: Pixels, title: str) -> None:
    axis.imshow(pixels)
    axis.set_axis_off()
    axis.set_anchor("N")  # titles of a row at one height
    axis.set_title(title, fontsize=8)


def _penalties(history: Sequence[dict[str, Any]]) -> Figure:
    figure, axis = _figure(5.5, 3.4)
    for name in dict.fromkeys(record["candidate"] for record in history):
        trials = sorted(
            (r["penalty"], r["accuracy"]) for r in history if r["candidate"] == name and r["accuracy"] is not None
        )
        points: NDArray[np.float64] = np.array(trials).reshape(-1, 2)
        axis.plot(points[:, 0], points[:, 1], marker=".", label=name)
    axis.set(xscale="log", xlabel="L2 penalty", ylabel="cross-validated accuracy")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(title="features", fontsize=8)
    return figure
