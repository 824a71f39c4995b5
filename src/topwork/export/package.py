"""An export with its stand-alone ``predict.py`` and parity certificate.

In: a model folder, a format and images to check with. The files appear once the certificate has passed; if it fails,
only the certificate is written, which names the images with different predictions.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from topwork.data.images import decode
from topwork.data.manifest import load_manifest
from topwork.data.transforms import Pixels, fit_to_input
from topwork.errors import ImageError, TopworkError, UsageError
from topwork.export.inputs import list_inputs
from topwork.export.parity import Certificate, Checked, certify
from topwork.export.predictor import read_image
from topwork.export.quantize import N_IMAGES
from topwork.export.targets import export_classifier, standalone_script, target_of
from topwork.files import atomic_file, error_reason
from topwork.models.classifier import Classifier, load_classifier
from topwork.text import escape

SCRIPT = "predict.py"
MAX_IMAGES = 500  # of the run's images, if none are given


@dataclass(frozen=True)
class Package:
    """Paths of the files of an export."""

    exported: Path
    script: Path
    certificate_path: Path
    certificate: Certificate


def export_model(
    model: str | os.PathLike[str],
    to: str,
    out: Path,
    check: Sequence[str] = (),
    *,
    int8: bool = False,
    calibrate: Sequence[str] = (),
    overwrite: bool = False,
) -> Package:
    """Exports a model and keeps it only if its predictions, in its own runtime, match the original's.

    Args:
        check: images, folders or patterns; by default images of the model's run, else drawn ones.
        int8: 8-bit weights and activations; predictions may differ, and the certificate states the cost.
        calibrate: images to calibrate int8 on; by default training images of the model's run.

    Raises:
        UsageError: a name that is taken or has the wrong extension, or no images.
        TopworkError: it cannot be exported, or predicts differently for the images named.
    """
    target = target_of(to, out)
    classifier = load_classifier(model, multi_label=True)
    if classifier.backbone.spec.bands:
        raise UsageError(
            "the model was trained with --bands, but an export cannot read the bands of a TIFF. Use predict or serve."
        )
    script = _place(out, SCRIPT, f"predict_{to}.py")
    certificate_path = _place(out, f"{out.stem}.parity.json", f"{out.name}.parity.json")
    pieces = [out, script, certificate_path, *(out.with_suffix(ending) for ending in target.endings[1:])]
    _check_free(pieces, overwrite)
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir(parents=True)
        checked = _images(model, classifier, check, partial)
        pixels = _calibration(model, classifier, calibrate) if int8 else None
        export_classifier(classifier, to, partial / out.name, pixels)
        (partial / script.name).write_text(standalone_script(classifier, partial / out.name), encoding="utf-8")
        certificate = certify(classifier, partial / out.name, partial / script.name, checked, is_int8=int8)
        _check_passed(certificate, out.with_name(f"{out.stem}.parity-failed.json"))
        _write_certificate(certificate, partial / certificate_path.name)
        for piece in reversed(pieces):  # the export last: if it exists, so do the others
            _move(partial / piece.name, piece)
    except OSError as error:
        raise TopworkError(f"{out}: cannot be written: {error_reason(error)}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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


def _check_free(pieces: Sequence[Path], overwrite: bool) -> None:
    taken = [piece for piece in pieces if piece.exists()]
    if taken and not overwrite:
        raise UsageError(f"--out {pieces[0]}: {taken[0]} exists already. Choose another folder, or add --overwrite.")


def _images(model: str | os.PathLike[str], classifier: Classifier, check: Sequence[str], partial: Path) -> Checked:
    """Images to check with."""
    if check:
        return Checked(list_inputs(check), ", ".join(escape(name) for name in check))
    found = _of_run(Path(model), ("test", "valid"))[:MAX_IMAGES]
    if found:
        return Checked(
            [path for path, _ in found], f"held-out images of the run {Path(model).name}", [label for _, label in found]
        )
    return Checked(_drawn(classifier, partial), "drawn images (use --check for real ones)")


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
            "--int8 needs calibration images: give the run directory instead of its model/ folder, or use --calibrate."
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


def _write_certificate(certificate: Certificate, path: Path) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(certificate.as_dict(), indent=1))


def _check_passed(certificate: Certificate, path: Path) -> None:
    if certificate.passed:
        return
    _write_certificate(certificate, path)
    if not certificate.n_compared:
        raise UsageError(f"none of the {certificate.n_images} images could be read; use --check to name others.")
    if certificate.is_int8:
        raise TopworkError(
            f"with 8 bits, only {certificate.n_same} of {certificate.n_compared} predictions stay the same, so the export was "
            f"discarded. Export without --int8, or calibrate on other images. Details: {path}"
        )
    if certificate.different:
        some = "; ".join(
            f"{escape(d.path)}: {escape(d.original)}, exported {escape(d.exported)}" for d in certificate.different[:10]
        )
        raise TopworkError(
            f"the export predicts another class for {len(certificate.different)} of {certificate.n_compared} images and was "
            f"discarded: {some}. Details: {path}"
        )
    raise TopworkError(
        f"the exported graph differs by {certificate.graph_difference:.2g} on the same pixels (tolerance "
        f"{certificate.graph_tolerance}) and was discarded. Details: {path}"
    )


def _move(source: Path, final: Path) -> None:
    with open(source, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(source, final)
