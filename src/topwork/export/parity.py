"""The parity certificate: whether an export, run end to end on image files, makes the same predictions as the original.

In: a predictor, an export with its stand-alone ``predict.py``, and images. The script runs in a separate process, as a
user would run it. Out: a :class:`Certificate`. A different top class fails it, unless it is a tie: the original's
probabilities of both are within ``TIE``, so the order of summation decides. (In 8 bits predictions may differ, at a
stated cost.) The graph itself is also compared on equal pixels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.samples import LABEL_SEPARATOR
from topwork.data.transforms import Pixels
from topwork.errors import TopworkError
from topwork.evaluation.predictions import Task
from topwork.export import standalone
from topwork.export.predictor import Prediction, Predictor
from topwork.export.quantize import Cost, cost
from topwork.export.runtime import engine_of
from topwork.export.targets import open_export, title_and_runtime
from topwork.files import file_digest
from topwork.models.classifier import Classifier

TOLERANCE = 1e-2  # of probabilities, from image files
GRAPH_TOLERANCE = 1e-4  # of probabilities, on equal pixels in f32
TIE = 1e-4
LEAST_SAME_INT8 = 0.9
_GRAPH_IMAGES = 64
_NAMES_PER_CALL = 250  # passed as arguments, which can hold any name


@dataclass(frozen=True)
class Difference:
    """One image with different predictions: top classes, and the original's probabilities of both."""

    path: str
    original: str
    exported: str
    probabilities: tuple[float, float]


@dataclass(frozen=True)
class Checked:
    """The images to check with, their origin in words, and the true class of each if known."""

    paths: list[str]
    words: str
    labels: list[str] | None = None


@dataclass(frozen=True)
class Certificate:
    """What was compared, with the result.

    Attributes:
        sha256: of the exported file.
        images: where the images came from.
        n_same: images with the same top class, of ``n_compared`` that both could read.
        different: the others, without ``ties``.
        not_read: images that one or both could not read, with the errors.
        max_difference: largest difference of any probability, from files; ``mean_difference`` over images.
        graph_difference: the same on equal pixels, against f32.
        is_int8: the export computes in 8-bit integers, so predictions may differ, with effect ``cost``. It fails if
            fewer than ``LEAST_SAME_INT8`` agree.
        cost: accuracy before and after, if true labels are known.
    """

    model: str
    format: str
    sha256: str
    runtime: str
    precision_of_original: str
    images: str
    n_images: int
    n_compared: int
    n_same: int
    different: tuple[Difference, ...]
    ties: tuple[Difference, ...]
    not_read: tuple[tuple[str, str], ...]
    max_difference: float
    mean_difference: float
    tolerance: float
    graph_difference: float
    graph_tolerance: float
    is_int8: bool = False
    cost: Cost | None = None

    @property
    def passed(self) -> bool:
        """Whether no top class differs and the graphs agree; for 8 bits, whether nearly all top classes agree."""
        if self.is_int8:
            return self.n_same >= LEAST_SAME_INT8 * self.n_compared > 0
        return not self.different and self.n_compared > 0 and self.graph_difference <= self.graph_tolerance

    def as_dict(self) -> dict[str, Any]:
        """The certificate as plain JSON values, with the result."""
        return {"passed": self.passed, "within_tolerance": self.max_difference <= self.tolerance, **asdict(self)}


def certify(
    classifier: Classifier, exported: Path, script: Path, checked: Checked, *, is_int8: bool = False
) -> Certificate:
    """Runs both on the images and compares.

    Args:
        script: the stand-alone ``predict.py`` next to the export.

    Raises:
        TopworkError: the stand-alone script cannot run.
    """
    paths = checked.paths
    ours = list(Predictor(classifier, n_top=len(classifier.classes)).stream(paths))
    theirs = run_script(script, paths)
    classes = {name: number for number, name in enumerate(classifier.classes)}
    different: list[Difference] = []
    ties: list[Difference] = []
    not_read: list[tuple[str, str]] = []
    gaps: list[float] = []
    for mine, other in zip(ours, theirs, strict=True):
        if mine.error is not None or "error" in other:
            not_read.append((mine.path, f"topwork: {mine.error or 'fine'}; predict.py: {other.get('error', 'fine')}"))
            continue
        stated = np.zeros(len(classes))
        stated[[classes[name] for name, _ in mine.top]] = [p for _, p in mine.top]
        gaps.append(float(np.abs(stated - np.array(other["probabilities"])).max()))
        if mine.label != other["label"]:
            found = _difference(mine, other["label"], classifier)
            (ties if found.probabilities[0] - found.probabilities[1] < TIE else different).append(found)
    title, runtime = title_and_runtime(exported)
    return Certificate(
        model=exported.name,
        format=title,
        sha256=file_digest(exported),
        runtime=f"{runtime} {metadata.version(runtime)}",
        precision_of_original="f32",
        images=checked.words,
        n_images=len(ours),
        n_compared=len(gaps),
        n_same=len(gaps) - len(different) - len(ties),
        different=tuple(different),
        ties=tuple(ties),
        not_read=tuple(not_read),
        max_difference=max(gaps, default=0.0),
        mean_difference=float(np.mean(gaps)) if gaps else 0.0,
        tolerance=TOLERANCE,
        graph_difference=_graph_difference(classifier, exported, paths),
        graph_tolerance=GRAPH_TOLERANCE,
        is_int8=is_int8,
        cost=_cost(checked, ours, theirs),
    )


def run_script(script: Path, paths: Sequence[str]) -> list[dict[str, Any]]:
    """The output of a stand-alone ``predict.py``, one dict per image, in order."""
    rows: list[dict[str, Any]] = []
    for start in range(0, len(paths), _NAMES_PER_CALL):
        names = [str(Path(path).absolute()) for path in paths[start : start + _NAMES_PER_CALL]]
        command = [sys.executable, str(script), "--json", *names]
        done = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"PYTHONUTF8": "1"})
        found = [json.loads(line) for line in done.stdout.splitlines()]
        if len(found) != len(names):
            reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no answer"])[-1]
            raise TopworkError(f"{script}: stopped after {len(rows) + len(found)} of {len(paths)} images: {reason}")
        rows += found
    return rows


def _cost(checked: Checked, ours: Sequence[Prediction], theirs: Sequence[dict[str, Any]]) -> Cost | None:
    rows = [row for row, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a.error is None and "error" not in b]
    if checked.labels is None or not rows:
        return None
    labels = [checked.labels[row] for row in rows]
    return cost(labels, [str(ours[row].label) for row in rows], [theirs[row]["label"] for row in rows])


def _difference(mine: Prediction, other: str, classifier: Classifier) -> Difference:
    """The difference; with thresholds, that of the label farthest from its threshold."""
    stated, thresholds = dict(mine.top), Task.of(classifier).thresholds
    if thresholds is None:
        return Difference(mine.path, str(mine.label), other, (stated[str(mine.label)], stated[other]))
    limits = dict(zip(classifier.classes, thresholds.tolist(), strict=True))
    turned = set(str(mine.label).split(LABEL_SEPARATOR)) ^ set(other.split(LABEL_SEPARATOR))
    far = max(turned - {""}, key=lambda name: abs(stated[name] - limits[name]))
    ends = sorted((stated[far], limits[far]), reverse=True)
    return Difference(mine.path, str(mine.label), other, (ends[0], ends[1]))


def _graph_difference(classifier: Classifier, exported: Path, paths: Sequence[str]) -> float:
    """Largest difference of a probability on equal pixels."""
    pixels = _pixels(classifier, paths)
    logits = classifier.head.logits(dict(engine_of(classifier).run_unrounded(pixels)))
    expected = Task.of(classifier).probabilities(logits)
    found: NDArray[np.float32] = open_export(exported)(pixels)
    return float(np.abs(found - expected).max())


def _pixels(classifier: Classifier, paths: Sequence[str]) -> Pixels:
    """Some of the images as the model's input; drawn ones if none can be read."""
    from topwork.features.engine import drawn_images

    spec, found = classifier.backbone.spec, []
    for path in paths:
        try:
            found.append(standalone.prepare(path, spec.as_dict()))
        except (OSError, ValueError, SyntaxError, MemoryError):
            continue
        if len(found) == _GRAPH_IMAGES:
            break
    return np.stack(found) if found else drawn_images(spec)
