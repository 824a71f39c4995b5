"""``topwork add-class``: a new run with additional classes; the weights of the existing classes are unchanged."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.commands.assess import evaluate_parts
from topwork.commands.prepare import VALID_FRACTION, embedded, scan_and_embed, timing
from topwork.data.listing import ANY_LABEL, is_flat
from topwork.data.manifest import Manifest
from topwork.data.remote import absolute, is_folder, is_url, url_of
from topwork.data.samples import Sample
from topwork.data.split import Split, split
from topwork.errors import UsageError
from topwork.evaluation.predictions import labels_for, predict_features
from topwork.evaluation.similarity import fit_unknown
from topwork.export.runtime import model_embedder
from topwork.features.embed import Embedder, Features
from topwork.features.logistic import SoftmaxRegression
from topwork.models.classifier import COMPILED, Classifier, find_model, load_classifier
from topwork.models.head import Floats, LinearHead
from topwork.progress import Reporter, Steps
from topwork.run import images_of_run, provenance, read_recipe, run_folder, write_json, write_run
from topwork.settings import DataSettings
from topwork.text import escape, natural_key

PENALTIES = (0.1, 0.01, 1e-3, 1e-4)  # relative to the mean loss, for features with a mean variance of 1
N_FOLDS = 3
CV_IMAGES = 4000
TOLERANCE = 1e-6


@dataclass(frozen=True)
class GrownRun:
    """What ``topwork add-class`` did.

    Attributes:
        before, after: accuracy on the held-out images of the old classes, and which part they are from.
    """

    folder: Path
    added: tuple[str, ...]
    part: str | None
    n_old: int
    before: float | None
    after: float | None
    evaluation: dict[str, Any]


def add_class(
    run: str | os.PathLike[str],
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: DataSettings | None = None,
    *,
    name: str | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> GrownRun:
    """Writes a new run whose model also recognizes the classes of the new images.

    Features of the old images come from the store; the images are read again only if it was cleared.

    Args:
        run: the run with the model; its manifest lists the old images.
        path: a folder of images of one class, or one folder per class.
        name: class name if ``path`` contains one class; by default the name of the folder.

    Raises:
        UsageError: no run, a class that the model already has, or images in an archive.
    """
    settings, steps, run = settings or DataSettings(), Steps(reporter), find_model(run).parent
    with run_folder(Path(out), overwrite) as folder:
        write_json(folder / "settings.json", {"path": absolute(path), "grown_from": str(run.absolute())})
        classifier, old = load_classifier(run), images_of_run(run, verb="add-class")
        with steps("scan_and_embed"):
            embedder = model_embedder(classifier)
            new = _new_images(Path(path), name, settings, embedder, steps.reporter)
            manifest, parts = _joined(old, new, classifier, settings)
            features = embedded(manifest, embedder, settings, steps.reporter)
        with steps("probe"):
            grown, head = _grown_classifier(classifier, manifest, features, parts, settings.seed)
        with steps("evaluate"):
            labels = np.array(manifest.labels)
            predictions = {key: predict_features(grown, features, rows, labels) for key, rows in parts.parts().items()}
            evaluation = evaluate_parts(grown, manifest, parts, predictions, settings.seed)
        added = tuple(name for name in manifest.classes if name not in classifier.classes)
        part, n_old, before, after = _before_and_after(classifier, grown, manifest, features, parts)
        with steps("write"):
            origin = provenance(manifest, parts, evaluation, settings) | {"added": list(added)}
            recipe, history = read_recipe(run)
            recipe["grown"] = {"from": str(run.absolute()), "added": list(added), **head}
            form = classifier.backbone.folder / COMPILED[0]
            compiled = form if embedder.engine.kind == "openvino" and form.is_file() else None
            grown = replace(grown, provenance=origin)
            write_run(folder, manifest, parts, grown, predictions, recipe, history, compiled)
        evaluation["timing"] = timing(steps, embedder)
        evaluation["old_classes"] = {"part": part, "n": n_old, "accuracy_before": before, "accuracy_after": after}
        write_json(folder / "evaluation.json", evaluation)
    return GrownRun(Path(out), added, part, n_old, before, after, evaluation)


def _new_images(
    path: Path, name: str | None, settings: DataSettings, embedder: Embedder, reporter: Reporter
) -> Manifest:
    """The new images, embedded; a folder that directly contains images is one class."""
    is_class = is_flat(path)
    if is_class:
        settings = replace(settings, label_regex=ANY_LABEL)  # it is replaced
    manifest, _ = scan_and_embed(path, settings, embedder, reporter)
    if is_class or name is not None:
        if not is_class and len(manifest.classes) > 1:
            raise UsageError(
                f"--name {escape(name or '')}: {escape(str(path))} holds {len(manifest.classes)} classes, not one."
            )
        label = name or path.resolve().name
        samples = tuple(replace(sample, label=label) for sample in manifest.samples)
        manifest = replace(manifest, samples=samples, classes=(label,))
    return manifest


def _joined(old: Manifest, new: Manifest, classifier: Classifier, settings: DataSettings) -> tuple[Manifest, Split]:
    """Both sets of images under one root; the old split stays, the new images are split in the same way."""
    new = new.named_like(classifier.classes)
    known = [name for name in new.classes if name in classifier.classes]
    if known:
        raise UsageError(f"The model already has the class {escape(known[0])}; add-class only takes new classes.")
    old.check_is_there()
    if not all(_is_plain_folder(m.root) for m in (old, new)):
        raise UsageError(
            "add-class needs the existing and the new images in folders; unpack the archive or table first."
        )
    twice = {s.content_hash for s in old.samples} & {s.content_hash for s in new.samples}
    if twice:
        path = next(s.path for s in new.samples if s.content_hash in twice)
        raise UsageError(f"{escape(path)}: this image is in the run already, with a different class.")
    has = {sample.part for sample in old.samples}
    valid_fraction = settings.valid_fraction or VALID_FRACTION if "valid" in has else 0.0
    test_fraction = settings.test_fraction if "test" in has else 0.0
    plain = replace(new, samples=tuple(replace(sample, part=None) for sample in new.samples))
    chosen = split(plain, valid_fraction, test_fraction, settings.seed)
    part_of = {row: name for name, rows in chosen.parts().items() for row in rows.tolist()}
    local = [m.root.resolve() for m in (old, new) if not is_url(m.root)]
    root = Path(os.path.commonpath(local)) if local else old.root

    def moved(sample: Sample, home: Path, part: str) -> Sample:
        if is_url(home) or is_url(sample.path):
            path = url_of(sample.path if is_url(sample.path) else home / sample.path)
        else:
            path = os.path.relpath(home.resolve() / sample.path, root)
        return replace(sample, path=path, part=part)

    samples = [moved(sample, old.root, sample.part) for sample in old.samples if sample.part]
    samples += [moved(sample, new.root, part_of[row]) for row, sample in enumerate(plain.samples)]
    classes = tuple(sorted({sample.label for sample in samples}, key=natural_key))
    manifest = replace(old, root=root, samples=tuple(samples), classes=classes, rejects=new.rejects, notes=())
    return manifest, split(manifest, seed=settings.seed)


def _is_plain_folder(root: Path) -> bool:
    """Whether the samples are plain files below the root, not in an archive, a table or a saved dataset."""
    return is_folder(root) if is_url(root) else root.is_dir() and not (root / "dataset_info.json").exists()


def _grown_classifier(
    classifier: Classifier, manifest: Manifest, features: Features, parts: Split, seed: int
) -> tuple[Classifier, dict[str, Any]]:
    """The classifier with new rows, in the order of the manifest's classes, and how the rows were fitted."""
    added = [name for name in manifest.classes if name not in classifier.classes]
    names = [*classifier.classes, *added]
    index = {name: number for number, name in enumerate(names)}
    labels = np.array([index[manifest.samples[row].label] for row in parts.train.tolist()])
    blocks = features.blocks(classifier.head.transform.blocks, parts.train)
    grown = grow_head(classifier.head, classifier.head.transform.apply(blocks), labels, len(added), seed)
    rate = float(classifier.thresholds.get("unknown_false_alarm_rate") or 0.01)
    detector = fit_unknown(features.block("last", parts.train), labels, rate)
    order = [index[name] for name in manifest.classes if name in index]
    order += [index[name] for name in names if name not in manifest.classes]  # classes whose images are gone
    bigger = replace(
        classifier,
        head=replace(grown.head, weight=grown.head.weight[order], bias=grown.head.bias[order]),
        classes=tuple(names[number] for number in order),
        thresholds={key: value for key, value in classifier.thresholds.items() if key != "positive"}
        | {"unknown": max(detector.threshold, classifier.thresholds.get("unknown") or 0.0)},
        arrays=classifier.arrays | {"unknown_centres": detector.centers},
    )
    return bigger, {"penalty": grown.penalty, "cross_entropy": {str(k): v for k, v in grown.cross_entropy.items()}}


def _before_and_after(
    old: Classifier, new: Classifier, manifest: Manifest, features: Features, parts: Split
) -> tuple[str | None, int, float | None, float | None]:
    """Accuracy on held-out images of the old classes, by the old model and by the new one."""
    known = labels_for(old, manifest) >= 0
    for name in ("test", "valid"):
        rows = getattr(parts, name)
        rows = rows[known[rows]]
        if len(rows):
            before, after = (
                float(predict_features(model, features, rows, labels_for(model, manifest)).correct.mean())
                for model in (old, new)
            )
            return name, len(rows), before, after
    return None, 0, None, None


# ---- the head


@dataclass(frozen=True)
class GrownHead:
    """A head with new rows after the old ones.

    Attributes:
        penalty: the selected L2 penalty.
        cross_entropy: cross-validated, for each penalty tried.
    """

    head: LinearHead
    penalty: float
    cross_entropy: dict[float, float]


def grow_head(head: LinearHead, columns: Floats, labels: NDArray[np.int64], n_new: int, seed: int = 0) -> GrownHead:
    """Fits rows for new classes; the rows of the old classes do not change.

    So a prediction for an old image can only change to a new class. The L2 penalty is chosen by cross-validation.

    Args:
        columns: (N, D) features of old and new training images after ``head.transform``.
        labels: (N,) old classes first; the new ones are the ``n_new`` after them.
    """
    center = columns.mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(np.mean(columns.var(axis=0, dtype=np.float64)))) or 1.0
    x = ((columns - center) / scale).astype(np.float32)
    old = columns.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    total = np.logaddexp.reduce(old, axis=1).astype(np.float32)
    y = np.maximum(labels - len(head.weight) + 1, 0)
    scores = _cross_entropy(x, y, total, n_new, seed)
    penalty = min(scores, key=lambda p: scores[p])
    fitted = _NewRows(x, y, total, n_new, np.ones((1, len(x))))
    fitted.solve(penalty, TOLERANCE)
    weights, biases = fitted.solution()
    weight = weights[0, 1:].astype(np.float64) / scale
    bias = biases[0, 1:] - weight @ center
    grown = replace(
        head,
        weight=np.concatenate([head.weight, weight.astype(np.float32)]),
        bias=np.concatenate([head.bias, bias.astype(np.float32)]),
    )
    return GrownHead(grown, penalty, scores)


class _NewRows(SoftmaxRegression):
    """Rows for new classes; class 0 stands for all old ones, and its logit, their log-sum-exp, is fixed."""

    def __init__(
        self, x: Floats, y: NDArray[np.int64], old: Floats, n_new: int, sample_weights: NDArray[np.float64]
    ) -> None:
        super().__init__(x, y, n_new + 1, sample_weights)
        self.old = old[:, None]

    def _logits(self, w: Floats, rows: slice = slice(None)) -> Floats:
        logits = super()._logits(w, rows)
        logits[:, :, 0] = self.old[rows]
        return logits

    def _errors(self, w: Floats, rows: slice, share: Floats) -> tuple[NDArray[np.float64], Floats]:
        loss, errors = super()._errors(w, rows, share)
        errors[:, :, 0] = 0
        return loss, errors


def _cross_entropy(x: Floats, y: NDArray[np.int64], old: Floats, n_new: int, seed: int) -> dict[float, float]:
    """Cross-validated, for each penalty, on all new images and a limited number of old ones."""
    order = np.random.default_rng(seed).permutation(len(x))
    is_new = y[order] > 0
    order = np.concatenate([order[is_new], order[~is_new]])[: max(CV_IMAGES, int(is_new.sum()))]
    fold = np.arange(len(order)) % N_FOLDS  # new images come first, so every fold has some
    held_out = fold == np.arange(N_FOLDS)[:, None]
    problems = _NewRows(x[order], y[order], old[order], n_new, (~held_out).astype(np.float64))
    scores = {}
    for penalty in PENALTIES:
        problems.solve(penalty, TOLERANCE)
        logits = problems.logits()[fold, np.arange(len(order))]
        own = logits[np.arange(len(order)), y[order]]
        scores[penalty] = float((np.logaddexp.reduce(logits.astype(np.float64), axis=1) - own).mean())
    return scores
