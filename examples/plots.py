"""The plots that the tutorials show, from topwork's values: batch grids, class counts, curves, predictions, confusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from topwork.data.images import decode
from topwork.data.manifest import Manifest
from topwork.data.transforms import InputSpec, fit_to_input
from topwork.evaluation.predictions import Predictions


def show_images(
    manifest: Manifest, rows: Sequence[int], titles: Sequence[str], spec: InputSpec | None = None
) -> Figure:
    """Images in a grid of six columns, each with a title: a batch with its labels, or predictions."""
    spec = spec or InputSpec()
    n_lines = -(-len(rows) // 6)
    figure, axes = plt.subplots(n_lines, 6, figsize=(10, 1.9 * n_lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, row, title in zip(axes.flat, rows, titles, strict=False):
        axis.imshow(fit_to_input(decode(manifest.read(int(row)), min_side=spec.min_side).pixels, spec))
        axis.set_title(title, fontsize=8)
    figure.tight_layout()
    return figure


def class_counts(manifest: Manifest) -> Figure:
    """Images of each class."""
    figure, axis = plt.subplots(figsize=(8, 3))
    axis.bar(list(manifest.counts), list(manifest.counts.values()))
    axis.tick_params(axis="x", rotation=60, labelsize=7)
    axis.set_ylabel("images")
    figure.tight_layout()
    return figure


def curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Loss and accuracy by epoch, on train and, where it was judged, on valid."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
    for axis, kind in zip(axes, ("loss", "accuracy"), strict=True):
        for part in ("train", "valid"):
            points = [(record["epoch"], record[f"{part}_{kind}"]) for record in history if f"{part}_{kind}" in record]
            if points:
                axis.plot(*zip(*points, strict=True), label=part, marker=".")
        axis.set_xlabel("epoch")
        axis.set_ylabel(kind)
        axis.legend()
    figure.tight_layout()
    return figure


def top_k(found: Predictions, position: int, k: int = 5) -> Figure:
    """The most probable classes of one image as bars."""
    probabilities = found.probabilities[position]
    best = np.argsort(probabilities)[::-1][:k][::-1]
    figure, axis = plt.subplots(figsize=(5, 2.2))
    axis.barh([found.classes[label] for label in best], probabilities[best])
    axis.set_xlim(0, 1)
    axis.set_title(f"true: {found.classes[found.labels[position]]}", fontsize=9)
    figure.tight_layout()
    return figure


def confusion(found: Predictions) -> Figure:
    """The confusion matrix: rows are the true classes, columns the predicted ones."""
    n = len(found.classes)
    matrix = np.zeros((n, n), np.int64)
    np.add.at(matrix, (found.labels, found.predicted), 1)
    figure, axis = plt.subplots(figsize=(4 + n / 6, 3.5 + n / 6))
    axis.imshow(matrix, cmap="Greens")
    axis.set_xticks(range(n), found.classes, rotation=60, fontsize=7, ha="right")
    axis.set_yticks(range(n), found.classes, fontsize=7)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    figure.tight_layout()
    return figure


def top_losses(manifest: Manifest, found: Predictions, n: int = 6) -> Figure:
    """The images whose true class the model thought least likely."""
    own = found.probabilities[np.arange(len(found)), found.labels]
    worst = np.argsort(own)[:n]
    titles = [f"{found.classes[found.predicted[i]]}?\nis {found.classes[found.labels[i]]}, {own[i]:.2f}" for i in worst]
    return show_images(manifest, found.sample_indices[worst], titles)
