"""An export with its stand-alone ``predict.py`` and parity certificate.

In: a model folder, a format and images to check with. ``predict.py`` runs in a separate process, as a user would run it. A
different top class fails the certificate, unless it is a tie: the original's probabilities of both are within ``TIE``, so
the order of summation decides. (In 8 bits predictions may differ, at a stated cost.) The graph itself is also compared on
equal pixels. The files appear once the certificate has passed; if it fails, only the certificate is written, which names
the images with different predictions.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from topwork.data.images import decode
from topwork.data.manifest import load_manifest
from topwork.data.samples import LABEL_SEPARATOR
from topwork.data.transforms import Pixels, fit_to_input
from topwork.errors import ImageError, TopworkError, UsageError
from topwork.evaluation.compare import accuracy_difference_interval
from topwork.evaluation.predictions import Task
from topwork.export import standalone
from topwork.export.inputs import list_inputs, read_image
from topwork.export.predictor import Prediction, Predictor
from topwork.export.runtime import engine_of
from topwork.export.targets import Target, export_classifier, standalone_script, target_of
from topwork.files import atomic_file, error_reason, file_digest
from topwork.models.classifier import Classifier, load_classifier
from topwork.text import escape

SCRIPT = "predict.py"
MAX_IMAGES = 500  # of the run's images, if none are given
N_IMAGES = 200  # to calibrate 8 bits on; more change little
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
class Cost:
    """The cost of 8 bits on labeled images that the model was not trained on.

    Attributes:
        n: labeled images compared.
        accuracy_before, accuracy_after: of the original and of the export.
        difference: after minus before, with its paired 95% CI in ``low`` and ``high``.
    """

    n: int
    accuracy_before: float
    accuracy_after: float
    difference: float
    low: float
    high: float


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


@dataclass(frozen=True)
class Package:
    """Paths of the files of an export."""

    exported: Path
    script: Path
    certificate_path: Path
    certificate: Certificate


def export_model(
    model: str | os.PathLike[str],
    to: str | None,
    out: Path,
    check: Sequence[str] = (),
    *,
    int8: bool = False,
    calibrate: Sequence[str] = (),
    overwrite: bool = False,
) -> Package:
    """Exports a model and keeps it only if its predictions, in its own runtime, match the original's.

    Args:
        to: the format; by default, that of the file extension.
        check: images, folders or patterns; by default images of the model's run, else drawn ones.
        int8: 8-bit weights and activations; predictions may differ, and the certificate states the cost.
        calibrate: images to calibrate int8 on; by default training images of the model's run.

    Raises:
        UsageError: a name that is taken or has the wrong extension, or no images.
        TopworkError: it cannot be exported, or predicts differently for the images named.
    """
    to, target = target_of(to, out)
    classifier = load_classifier(model, multi_label=True)
    if classifier.backbone.spec.bands:
        raise UsageError(
            "the model was trained with --bands, but an export cannot read the bands of a TIFF. Use predict or serve."
        )
    script = _place(out, SCRIPT, f"predict_{to}.py")
    certificate_path = _place(out, f"{out.stem}.parity.json", f"{out.name}.parity.json")
    pieces = [out, script, certificate_path, *(out.with_suffix(ending) for ending in target.endings[1:])]
    taken = [piece for piece in pieces if piece.exists()]
    if taken and not overwrite:
        raise UsageError(f"--out {out}: {taken[0]} exists already. Choose another folder, or add --overwrite.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(".partial", f".{out.name}.", out.parent, ignore_cleanup_errors=True) as folder:
            partial = Path(folder)
            images = _images(model, classifier, check, partial)
            pixels = _calibration(model, classifier, calibrate) if int8 else None
            export_classifier(classifier, to, partial / out.name, pixels)
            text = standalone_script(classifier, partial / out.name, target)
            (partial / script.name).write_text(text, encoding="utf-8")
            certificate = certify(classifier, target, partial / out.name, partial / script.name, *images, is_int8=int8)
            _check_passed(certificate, out.with_name(f"{out.stem}.parity-failed.json"))
            (partial / certificate_path.name).write_text(json.dumps(certificate.as_dict(), indent=1))
            for piece in reversed(pieces):  # the export last: if it exists, so do the others
                _move(partial / piece.name, piece)
    except OSError as error:
        raise TopworkError(f"{out}: cannot be written: {error_reason(error)}.") from None
    return Package(out, script, certificate_path, certificate)


def _place(out: Path, name: str, other: str) -> Path:
    """A name next to the export; the second one if the first is taken, for example by another export."""
    first = out.with_name(name)
    try:
        is_free = f'"model": {json.dumps(out.name)}' in first.read_text(encoding="utf-8")
    except FileNotFoundError:
        is_free = True
    except (OSError, ValueError):
        is_free = False
    return first if is_free else out.with_name(other)


def _check_passed(certificate: Certificate, path: Path) -> None:
    if certificate.passed:
        return
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(certificate.as_dict(), indent=1))
    n_same, n_compared, different = certificate.n_same, certificate.n_compared, certificate.different
    if not n_compared:
        raise UsageError(f"none of the {certificate.n_images} images could be read; use --check to name others.")
    if certificate.is_int8:
        reason = f"with 8 bits, only {n_same} of {n_compared} predictions stay the same, so the export was discarded"
        advice = "Export without --int8, or calibrate on other images. "
        raise TopworkError(f"{reason}. {advice}Details: {path}")
    if different:
        some = "; ".join(
            f"{escape(d.path)}: {escape(d.original)}, exported {escape(d.exported)}" for d in different[:10]
        )
        reason = f"the export predicts another class for {len(different)} of {n_compared} images and was discarded"
        raise TopworkError(f"{reason}: {some}. Details: {path}")
    raise TopworkError(
        f"the exported graph differs by {certificate.graph_difference:.2g} on the same pixels (tolerance "
        f"{certificate.graph_tolerance}) and was discarded. Details: {path}"
    )


def _move(source: Path, final: Path) -> None:
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, final)


# ---- the images


def _images(
    model: str | os.PathLike[str], classifier: Classifier, check: Sequence[str], folder: Path
) -> tuple[list[str], str, list[str] | None]:
    """Images to check with, their origin in words, and the true class of each if known."""
    if check:
        return list_inputs(check), ", ".join(escape(name) for name in check), None
    found = _of_run(Path(model), ("test", "valid"))[:MAX_IMAGES]
    if found:
        paths, labels = map(list, zip(*found, strict=True))
        return paths, f"held-out images of the run {Path(model).name}", labels
    return _drawn(classifier, folder), "drawn images (use --check for real ones)", None


def _of_run(run: Path, parts: Sequence[str]) -> list[tuple[str, str]]:
    """Files of the given parts of a run, with their classes."""
    try:
        manifest = load_manifest(run / "manifest.parquet")
        labels = {sample.path: sample.label for sample in manifest.samples}
        stored = json.loads((run / "split.json").read_text())["parts"]
        pairs = [(item["path"], labels[item["path"]]) for name in parts for item in stored[name]]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []
    return [(str(manifest.root / path), label) for path, label in pairs if (manifest.root / path).is_file()]


def _calibration(model: str | os.PathLike[str], classifier: Classifier, calibrate: Sequence[str]) -> Pixels:
    """Input-sized images for int8 calibration, spread evenly over the available ones."""
    names = list_inputs(calibrate) if calibrate else [path for path, _ in _of_run(Path(model), ("train",))]
    found, spec = [], classifier.backbone.spec
    for number in np.unique(np.linspace(0, len(names) - 1, N_IMAGES).round().astype(int)) if names else ():
        with contextlib.suppress(ImageError):
            found.append(fit_to_input(decode(read_image(names[number]), min_side=spec.min_side).pixels, spec))
    if not found:
        raise UsageError(
            "--int8 needs calibration images: use --calibrate IMAGES, or give a run directory whose images are still there."
        )
    return np.stack(found)


def _drawn(classifier: Classifier, folder: Path) -> list[str]:
    from PIL import Image

    from topwork.features.engine import drawn_images

    paths = []
    for number, pixels in enumerate(drawn_images(classifier.backbone.spec)):
        paths.append(str(folder / f"drawn_{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


# ---- the certificate


def certify(
    classifier: Classifier,
    target: Target,
    exported: Path,
    script: Path,
    paths: list[str],
    origin: str,
    labels: list[str] | None,
    *,
    is_int8: bool = False,
) -> Certificate:
    """Runs the original and the export on the images and compares.

    Args:
        script: the stand-alone ``predict.py`` next to the export.
        origin: of the images, in words.
        labels: true class of each image, if known.

    Raises:
        TopworkError: the stand-alone script cannot run.
    """
    ours = list(Predictor(classifier, n_top=len(classifier.classes)).stream(paths))
    theirs = run_script(script, paths)
    classes = {name: number for number, name in enumerate(classifier.classes)}
    different: list[Difference] = []
    ties: list[Difference] = []
    not_read: list[tuple[str, str]] = []
    gaps: list[float] = []
    answers: list[tuple[str | None, str, str]] = []
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine.error is not None or "error" in other:
            not_read.append((mine.path, f"topwork: {mine.error or 'fine'}; predict.py: {other.get('error', 'fine')}"))
            continue
        stated = np.zeros(len(classes))
        stated[[classes[name] for name, _ in mine.top]] = [p for _, p in mine.top]
        gaps.append(float(np.abs(stated - np.array(other["probabilities"])).max()))
        answers.append((labels[row] if labels else None, str(mine.label), other["label"]))
        if mine.label != other["label"]:
            found = _difference(mine, other["label"], classifier)
            (ties if found.probabilities[0] - found.probabilities[1] < TIE else different).append(found)
    return Certificate(
        model=exported.name,
        format=target.title,
        sha256=file_digest(exported),
        runtime=f"{target.runtime} {metadata.version(target.runtime)}",
        precision_of_original="f32",
        images=origin,
        n_images=len(ours),
        n_compared=len(gaps),
        n_same=len(gaps) - len(different) - len(ties),
        different=tuple(different),
        ties=tuple(ties),
        not_read=tuple(not_read),
        max_difference=max(gaps, default=0.0),
        mean_difference=float(np.mean(gaps)) if gaps else 0.0,
        tolerance=TOLERANCE,
        graph_difference=_graph_difference(classifier, target, exported, paths),
        graph_tolerance=GRAPH_TOLERANCE,
        is_int8=is_int8,
        cost=_cost(answers) if labels and answers else None,
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


def _cost(answers: Sequence[tuple[str | None, str, str]]) -> Cost:
    """The change in accuracy, from (true label, original, export) of each image."""
    true, before, after = (np.array(names) for names in zip(*answers, strict=True))
    interval = accuracy_difference_interval(true == before, true == after)
    first, second = float((true == before).mean()), float((true == after).mean())
    return Cost(len(true), first, second, second - first, interval.low, interval.high)


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


def _graph_difference(classifier: Classifier, target: Target, exported: Path, paths: Sequence[str]) -> float:
    """Largest difference of a probability on equal pixels."""
    pixels = _pixels(classifier, paths)
    logits = classifier.head.logits(dict(engine_of(classifier).run_unrounded(pixels)))
    expected = Task.of(classifier).probabilities(logits)
    return float(np.abs(target.open(exported)(pixels) - expected).max())


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
