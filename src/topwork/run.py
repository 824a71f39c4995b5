"""The run folder: from a path and settings to everything that ``topwork fit`` leaves behind.

``fit`` reads from top to bottom: scan and embed in one pass, split, probe, calibrate, judge, write. Each step is one
public function of the layer below; here is only their order, what is recorded, and when the folder counts as finished
(``evaluation.json`` is written last but for the report, which can always be made again).
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from topwork.data.augment import pipeline
from topwork.data.groups import join_groups
from topwork.data.manifest import Manifest, save_manifest, scan
from topwork.data.shards import atomic_file
from topwork.data.sources import Rules, natural_key, shown
from topwork.data.split import Split, split, split_record, with_valid
from topwork.errors import TopworkError, UsageError
from topwork.evaluation.calibration import fit_temperature
from topwork.evaluation.decisions import fit_ambiguous
from topwork.evaluation.metrics import PartEvaluation, evaluate_part
from topwork.evaluation.overview import Overview, findings, overview
from topwork.evaluation.predictions import Predictions, softmax
from topwork.evaluation.shortcut import check_shortcuts
from topwork.evaluation.unknown import fit_unknown
from topwork.features.careful import LEAST_SURE, CarefulNetwork, careful_features
from topwork.features.embed import Embedder, Features, embed
from topwork.features.engine import compiled_path, fingerprint, load_engine
from topwork.features.neighbours import NearDuplicates, near_duplicates
from topwork.features.probe import Probe, fit_probe
from topwork.features.store import FeatureStore
from topwork.features.views import with_views
from topwork.insights import find_insights
from topwork.models.backbone import Backbone, load_backbone
from topwork.models.classifier import Classifier, load_classifier, save_classifier
from topwork.settings import DataSettings, FitSettings, ScanSettings, as_dict, cache_folder
from topwork.tuning import TunedClassifier, Tuning, tune_classifier

MIN_CLASSES = 2
VALID_OF_TUNING = "choosing the epoch, the mixture of weights, the temperature and the thresholds; its figures flatter"


class Watcher(Protocol):
    """Whoever shows a run: the command line, or nobody."""

    def step(self, name: str) -> None:
        """A step begins."""

    def progress(self, n_done: int, n_all: int) -> None:
        """Part of the present step is done."""

    def note(self, text: str) -> None:
        """A sentence the user should read."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch of tuning is done."""


class Silent:
    """A watcher that shows nothing."""

    def step(self, name: str) -> None:
        """Not shown."""

    def progress(self, n_done: int, n_all: int) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """Not shown."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Not shown."""


@dataclass
class Stopwatch:
    """Seconds of each step, by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 3)


@dataclass(frozen=True)
class Fitted:
    """Everything a fit produced, as values."""

    folder: Path
    manifest: Manifest
    split: Split
    classifier: Classifier
    probe: Probe
    predictions: dict[str, Predictions]
    evaluation: dict[str, Any]
    recipe: dict[str, Any]


def fit(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: FitSettings | None = None,
    *,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> Fitted:
    """Trains, judges and writes a classifier for the images below ``path``.

    Args:
        out: the run folder to make.
        overwrite: replace what a finished run left there.

    Raises:
        UsageError: nothing to train on, or ``out`` is taken.
        TopworkError: something failed on the way; what was embedded is kept and found again.
    """
    settings, watcher, clock = settings or FitSettings(), watcher or Silent(), Stopwatch()
    folder = Path(out)
    with run_folder(folder, overwrite):
        write_json(folder / "settings.json", _asked(path, settings))
        with clock("backbone"):
            watcher.step("backbone")
            backbone = load_backbone(settings.backbone).with_spec(
                height=settings.size, width=settings.size, fit=None if settings.fit == "auto" else settings.fit
            )
            engine = load_engine(backbone, settings.engine, settings.precision)
            embedder = Embedder(backbone, engine, FeatureStore(cache_folder(), fingerprint(backbone, engine)))
        with clock("scan_and_embed"):
            watcher.step("scan and embed")
            manifest, features = scan_and_embed(path, settings, embedder, watcher)
        for note in manifest.notes:
            watcher.note(note)
        with clock("split"):
            near = near_duplicates(manifest, features, embedder) if settings.near_duplicates else None
            groups = join_groups(manifest, near_pairs(near))
            parts = split(manifest, settings.valid_fraction, settings.test_fraction, settings.seed, groups)
            if settings.mode != "probe" and not len(parts.valid):
                parts = with_valid(parts, manifest, settings.valid_fraction, groups)
            _check_trainable(manifest, parts, watcher)
        with clock("probe"):
            watcher.step("probe")
            labels = np.array(manifest.labels)
            augment = pipeline("none" if settings.augment == "auto" else settings.augment)
            views = with_views(
                manifest, features, labels, groups, parts.train, embedder, augment, settings.views, settings.seed,
                settings.workers,
            )  # fmt: skip
            probe = fit_probe(
                views.features,
                views.labels,
                len(manifest.classes),
                rows=views.rows,
                groups=views.groups.tolist(),
                head=settings.head,
                seed=settings.seed,
                on_progress=watcher.progress,
                balance=settings.balance,
            )
            probe = views.images_only(probe)
        probe_features, tuned = features, None
        if settings.mode != "probe":
            with clock("tune"):
                watcher.step("tune")
                tuning = Tuning(backbone, manifest, features, parts, probe, settings, folder)
                tuned = tune_classifier(tuning, watcher.progress, watcher.epoch, watcher.note)
        if tuned is not None:
            with clock("embed_again"):
                watcher.step("embed again")
                engine = load_engine(tuned.backbone, settings.engine, settings.precision)
                store = FeatureStore(cache_folder(), fingerprint(tuned.backbone, engine))
                embedder_of_tuned = Embedder(tuned.backbone, engine, store)
                features = embed(
                    tuned.backbone, manifest, embedder=embedder_of_tuned, n_threads=settings.workers,
                    on_progress=watcher.progress,
                )  # fmt: skip
        with clock("evaluate"):
            watcher.step("evaluate")
            train_features = features.block("last", parts.train)
            train_groups = np.asarray(groups)[parts.train]
            if tuned is None:
                classifier = _classifier(backbone, probe, manifest, labels[parts.train], embedder)
                classifier = with_decisions(
                    classifier, probe, labels[parts.train], train_features, train_groups, settings
                )
            else:
                classifier = _tuned_classifier(tuned, manifest, features, parts, labels, engine.precision, settings)
            predictions = {
                name: predict_features(classifier, features, rows, labels) for name, rows in parts.parts().items()
            }
            for name in predictions.keys() - {"train"}:  # the figures are about what predict will answer
                predictions[name] = with_second_look(classifier, predictions[name], manifest, features)
            evaluation = _evaluation(classifier, manifest, parts, predictions, settings.seed)
            if tuned is not None:
                evaluation |= {"n_parameters": tuned.n_parameters, "n_trainable": tuned.n_trainable}
            evaluation |= _leaks(predictions, manifest, parts, settings.seed, watcher)
        recipe = _recipe(classifier, probe, parts, embedder)
        recipe |= {"augment": augment.name, "views": settings.views if augment.steps or augment.crop else 0}
        recipe |= {"balance": settings.balance, "near_duplicates": len(near.pairs) if near else None}
        if tuned is not None:
            recipe |= {"mode": "tune", "tuning": tuned.recipe, "stages": tuned.stages, "words": list(tuned.words)}
            recipe |= {"temperature_fitted_on": "valid", "valid_used_for": VALID_OF_TUNING}
        with clock("write"):
            watcher.step("write")
            classifier = replace(classifier, provenance=_provenance(manifest, parts, evaluation, settings))
            _write(folder, manifest, parts, classifier, probe, predictions, recipe, embedder)
            append_history(folder / "history.jsonl", tuned.history if tuned else [])
        with clock("insights"):
            watcher.step("insights")
            n_leaked = sum(part["n_leaked"] for part in evaluation.get("leaks", {}).values())
            rate = _timing(clock, embedder)["images_per_second"]
            insights = find_insights(
                manifest, parts, groups, probe, probe_features, classifier, features, predictions, n_leaked=n_leaked,
                is_tuned=tuned is not None, embedding_rate=rate, path=str(path), seed=settings.seed,
            )  # fmt: skip
            write_json(folder / "insights.json", insights.as_dict())
        evaluation["timing"] = _timing(clock, embedder)
        write_json(folder / "evaluation.json", evaluation)
    return Fitted(folder, manifest, parts, classifier, probe, predictions, evaluation, recipe)


def resumed(run: str | os.PathLike[str]) -> tuple[str, str, FitSettings, bool]:
    """What an interrupted run was asked: path, folder, settings, and whether it is finished after all."""
    folder = Path(run)
    try:
        asked = json.loads((folder / "settings.json").read_text())
        settings = FitSettings(**asked["settings"])
        return asked["path"], str(folder), settings, (folder / "evaluation.json").exists()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: no run that could be resumed ({error}).") from None


def scan_and_embed(
    path: str | os.PathLike[str], settings: DataSettings, embedder: Embedder, watcher: Watcher
) -> tuple[Manifest, Features]:
    """One pass over the pixels; what was embedded before an interruption is kept."""
    try:
        manifest = scan(
            path,
            visitor=embedder,
            n_threads=settings.workers,
            on_progress=watcher.progress,
            rules=rules_of(settings),
        )
    finally:
        embedder.flush()
    return manifest, embed(embedder.backbone, manifest, embedder=embedder, n_threads=settings.workers)


def rules_of(settings: DataSettings) -> Rules:
    """What the settings say about how the data is to be read."""
    return Rules(
        root=settings.root,
        label_regex=settings.label_regex,
        group_by=settings.group_by,
        limit_per_class=settings.limit_per_class,
        multi_label=settings.multi_label,
        seed=settings.seed,
    )


def near_pairs(near: NearDuplicates | None) -> list[tuple[int, int]]:
    """Rows that show the same picture, for :func:`topwork.data.groups.join_groups`."""
    return [(pair.a, pair.b) for pair in near.pairs] if near else []


@dataclass(frozen=True)
class Surveyed:
    """What ``topwork scan`` found; ``findings`` are sentences, the weightiest first."""

    manifest: Manifest
    overview: Overview
    findings: tuple[str, ...]


def survey(
    path: str | os.PathLike[str], settings: ScanSettings | None = None, *, watcher: Watcher | None = None
) -> Surveyed:
    """Looks at the data without training: files, duplicates, leaks, shortcuts, sizes, outliers.

    Raises:
        UsageError: nothing usable there.
    """
    settings, watcher = settings or ScanSettings(), watcher or Silent()
    near = None
    if settings.quick:
        watcher.step("scan")
        manifest = scan(path, n_threads=settings.workers, on_progress=watcher.progress, rules=rules_of(settings))
    else:
        watcher.step("backbone")
        backbone = load_backbone(settings.backbone)
        engine = load_engine(backbone)
        embedder = Embedder(backbone, engine, FeatureStore(cache_folder(), fingerprint(backbone, engine)))
        watcher.step("scan and embed")
        manifest, features = scan_and_embed(path, settings, embedder, watcher)
        watcher.step("look")
        near = near_duplicates(manifest, features, embedder)
    groups = join_groups(manifest, near_pairs(near))
    given = any(sample.part for sample in manifest.samples)
    parts = split(manifest, groups=groups) if given else None
    traits = manifest.traits()
    found = overview(manifest, traits, near, parts, check_shortcuts(manifest, traits, groups, settings.seed))
    return Surveyed(manifest, found, tuple(findings(manifest, found)))


def evaluate(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    settings: DataSettings | None = None,
    *,
    part: str = "auto",
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Judges a saved model on labelled images; class names are matched by name.

    Args:
        part: which part to use when the data has parts: ``train``, ``valid``, ``test``, ``all``; ``auto`` takes test,
            else valid, else all.

    Returns:
        One part of ``evaluation.json``, with ``notes``.
    """
    settings, watcher = settings or DataSettings(), watcher or Silent()
    classifier = load_classifier(model)
    embedder = model_embedder(classifier)
    watcher.step("scan and embed")
    manifest, features = scan_and_embed(path, settings, embedder, watcher)
    rows = part_rows(manifest, part)
    index = {name: number for number, name in enumerate(classifier.classes)}
    labels = np.array([index.get(sample.label, -1) for sample in manifest.samples])
    watcher.step("evaluate")
    predictions = predict_features(classifier, features, rows, labels)
    predictions = with_second_look(classifier, predictions, manifest, features)
    n_train = classifier.provenance.get("n_train")
    judged = evaluate_part(predictions, n_train=n_train, seed=settings.seed).as_dict()
    notes = [*manifest.notes, *_vocabulary_notes(classifier, manifest)]
    for note in notes:
        watcher.note(note)
    return judged | {
        "notes": notes,
        "rejects": [asdict(reject) for reject in manifest.rejects],
        "n_unused": len(manifest.rejects),
    }


def model_embedder(classifier: Classifier) -> Embedder:
    """An embedder whose features are exactly those that the model's head reads."""
    from topwork.shipping.predictor import engine_of

    engine = engine_of(classifier)
    return Embedder(classifier.backbone, engine, FeatureStore(cache_folder(), fingerprint(classifier.backbone, engine)))


def predict_features(
    classifier: Classifier, features: Features, rows: NDArray[np.int64], labels: NDArray[np.int64]
) -> Predictions:
    """Logits of some rows from stored features, a bounded number at a time."""
    blocks = classifier.head.transform.blocks
    chunks = []
    for start in range(0, len(rows), 4096):
        some = rows[start : start + 4096]
        chunks.append(classifier.head.logits({name: features.block(name, some) for name in blocks}))
    logits = np.concatenate(chunks) if chunks else np.zeros((0, len(classifier.classes)))
    return Predictions(classifier.classes, rows, labels[rows], logits)


def with_second_look(
    classifier: Classifier, predictions: Predictions, manifest: Manifest, features: Features
) -> Predictions:
    """The predictions with those that are not sure computed again, exactly as ``Predictor`` does it."""
    unsure = np.flatnonzero(predictions.confidence < LEAST_SURE)
    rows = predictions.sample_indices[unsure].tolist()
    hashes = [features.hashes[row] for row in rows]
    network = CarefulNetwork(classifier.backbone)
    blocks = careful_features(network, cache_folder(), hashes, lambda number: manifest.read(rows[number]))
    if blocks is None or not rows:
        return predictions
    logits = predictions.logits.astype(np.float64)
    logits[unsure] = classifier.head.logits(dict(blocks))
    return replace(predictions, logits=logits)


# ---- growing


@dataclass(frozen=True)
class GrownRun:
    """What ``topwork add-class`` did.

    Attributes:
        before, after: accuracy on the held-out images of the old classes, with the part they are from.
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
    watcher: Watcher | None = None,
) -> GrownRun:
    """A new run whose model also knows the classes of further images; the old classes keep their rows.

    The features of the old images come from the store; only where it has been emptied are the images read again.

    Args:
        run: the run that holds the model; its manifest names the old images.
        path: a folder of images of one class, or one folder a class.
        name: of the class, where ``path`` holds one; by default the name of the folder.

    Raises:
        UsageError: no run, a class that the model has, images in an archive.
    """
    settings, watcher, clock = settings or DataSettings(), watcher or Silent(), Stopwatch()
    folder = Path(out)
    with run_folder(folder, overwrite):
        write_json(
            folder / "settings.json", {"path": str(Path(path).absolute()), "grown_from": str(Path(run).absolute())}
        )
        classifier, old_manifest, old_parts = _grown_from(Path(run))
        with clock("scan_and_embed"):
            watcher.step("scan and embed")
            embedder = model_embedder(classifier)
            manifest_of_new = _new_images(Path(path), name, settings, embedder, watcher)
            manifest, parts = _joined(old_manifest, old_parts, manifest_of_new, classifier, settings)
            features = embed(classifier.backbone, manifest, embedder=embedder, n_threads=settings.workers)
        with clock("probe"):
            watcher.step("probe")
            grown, head = _grown_classifier(classifier, manifest, features, parts, settings.seed)
        with clock("evaluate"):
            watcher.step("evaluate")
            labels = np.array(manifest.labels)
            predictions = {key: predict_features(grown, features, rows, labels) for key, rows in parts.parts().items()}
            for key in predictions.keys() - {"train"}:
                predictions[key] = with_second_look(grown, predictions[key], manifest, features)
            evaluation = _evaluation(grown, manifest, parts, predictions, settings.seed)
        added = tuple(name for name in manifest.classes if name not in classifier.classes)
        part, n_old, before, after = _before_and_after(classifier, grown, manifest, features, parts)
        with clock("write"):
            watcher.step("write")
            grown = replace(
                grown, provenance=_provenance(manifest, parts, evaluation, settings) | {"added": list(added)}
            )
            _write_grown(folder, Path(run), manifest, parts, grown, predictions, embedder, head, added)
        evaluation["timing"] = _timing(clock, embedder)
        evaluation["old_classes"] = {"part": part, "n": n_old, "accuracy_before": before, "accuracy_after": after}
        write_json(folder / "evaluation.json", evaluation)
    return GrownRun(folder, added, part, n_old, before, after, evaluation)


def _grown_from(run: Path) -> tuple[Classifier, Manifest, dict[str, str]]:
    """The model of a run, its images, and the part of each content."""
    from topwork.data.manifest import load_manifest

    classifier = load_classifier(run)
    try:
        manifest = load_manifest(run / "manifest.parquet")
        parts = json.loads((run / "split.json").read_text())["parts"]
        by_hash = {item["content_hash"]: name for name, items in parts.items() for item in items}
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{run}: add-class needs the run that holds the model: its manifest names the old images."
        ) from None
    return classifier, manifest, by_hash


def _new_images(path: Path, name: str | None, settings: DataSettings, embedder: Embedder, watcher: Watcher) -> Manifest:
    """The new images, embedded; a folder with images directly in it is one class."""
    is_flat = path.is_dir() and not any(p.is_dir() and not p.name.startswith(".") for p in path.iterdir())
    if is_flat:
        settings = replace(settings, label_regex="(.)")  # any label will do: it is replaced
    manifest, _ = scan_and_embed(path, settings, embedder, watcher)
    if is_flat or name is not None:
        if not is_flat and len(manifest.classes) > 1:
            raise UsageError(
                f"--name {shown(name or '')}: {shown(str(path))} holds {len(manifest.classes)} classes, not one."
            )
        label = name or path.resolve().name
        samples = tuple(replace(sample, label=label) for sample in manifest.samples)
        manifest = replace(manifest, samples=samples, classes=(label,))
    return manifest


def _joined(
    old: Manifest, old_parts: dict[str, str], new: Manifest, classifier: Classifier, settings: DataSettings
) -> tuple[Manifest, Split]:
    """Both sets of images under one root; the old parts stay, the new images are divided in the same way."""
    known = [name for name in new.classes if name in classifier.classes]
    if known:
        raise UsageError(f"the model has the class {shown(known[0])} already; add-class takes new ones only.")
    if not (old.root.is_dir() and new.root.is_dir()) or any(
        (m.root / "dataset_info.json").exists() for m in (old, new)
    ):
        raise UsageError("add-class needs old and new images in folders; unpack the archive or table first.")
    twice = {s.content_hash for s in old.samples} & {s.content_hash for s in new.samples}
    if twice:
        path = next(s.path for s in new.samples if s.content_hash in twice)
        raise UsageError(f"{shown(path)}: is an image that the model was trained or judged on, under another class.")
    has = set(old_parts.values())
    fractions = [settings.valid_fraction if "valid" in has else 0.0, settings.test_fraction if "test" in has else 0.0]
    plain = replace(new, samples=tuple(replace(sample, part=None) for sample in new.samples))
    chosen = split(plain, fractions[0], fractions[1], settings.seed)
    part_of = {row: name for name, rows in chosen.parts().items() for row in rows.tolist()}
    root = Path(os.path.commonpath([old.root.resolve(), new.root.resolve()]))

    def moved(manifest: Manifest, row: int, part: str) -> Any:
        sample = manifest.samples[row]
        return replace(sample, path=os.path.relpath(manifest.root.resolve() / sample.path, root), part=part)

    samples = [
        moved(old, row, old_parts[s.content_hash]) for row, s in enumerate(old.samples) if s.content_hash in old_parts
    ]
    samples += [moved(plain, row, part_of[row]) for row in range(len(plain.samples))]
    classes = tuple(sorted({sample.label for sample in samples}, key=natural_key))
    manifest = replace(old, root=root, samples=tuple(samples), classes=classes, rejects=new.rejects, notes=())
    return manifest, split(manifest, seed=settings.seed)


def _grown_classifier(
    classifier: Classifier, manifest: Manifest, features: Features, parts: Split, seed: int
) -> tuple[Classifier, dict[str, Any]]:
    """The classifier with new rows, in the order of the manifest's classes; and how the rows were fitted."""
    from topwork.shipping.growing import grow_head, reordered

    added = [name for name in manifest.classes if name not in classifier.classes]
    names = [*classifier.classes, *added]
    index = {name: number for number, name in enumerate(names)}
    labels = np.array([index[manifest.samples[row].label] for row in parts.train.tolist()])
    blocks = {name: features.block(name, parts.train) for name in classifier.head.transform.blocks}
    grown = grow_head(classifier.head, classifier.head.transform.apply(blocks), labels, len(added), seed)
    rate = float(classifier.thresholds.get("unknown_false_alarm_rate") or 0.01)
    detector = fit_unknown(features.block("last", parts.train), labels, rate)
    order = [index[name] for name in manifest.classes if name in index]
    order += [index[name] for name in names if name not in manifest.classes]  # classes whose images are gone
    bigger = replace(
        classifier,
        head=reordered(grown.head, order),
        classes=tuple(names[number] for number in order),
        thresholds=classifier.thresholds
        | {"unknown": max(detector.threshold, classifier.thresholds.get("unknown") or 0.0)},
        arrays=classifier.arrays | {"unknown_centres": detector.centres},
    )
    return bigger, {"penalty": grown.penalty, "cross_entropy": {str(k): v for k, v in grown.cross_entropy.items()}}


def _before_and_after(
    old: Classifier, new: Classifier, manifest: Manifest, features: Features, parts: Split
) -> tuple[str | None, int, float | None, float | None]:
    """Accuracy on held-out images of the old classes, by the old model and by the new one."""
    held_out = {name: rows for name, rows in parts.parts().items() if name != "train"}
    for name in ("test", "valid"):
        rows = held_out.get(name, np.array([], np.int64))
        rows = rows[[manifest.samples[row].label in old.classes for row in rows.tolist()]] if len(rows) else rows
        if not len(rows):
            continue
        accuracies = []
        for classifier in (old, new):
            index = {label: number for number, label in enumerate(classifier.classes)}
            labels = np.array([index.get(sample.label, -1) for sample in manifest.samples])
            found = with_second_look(
                classifier, predict_features(classifier, features, rows, labels), manifest, features
            )
            accuracies.append(float((found.predicted == found.labels).mean()))
        return name, len(rows), accuracies[0], accuracies[1]
    return None, 0, None, None


def _write_grown(
    folder: Path,
    old_run: Path,
    manifest: Manifest,
    parts: Split,
    classifier: Classifier,
    predictions: dict[str, Predictions],
    embedder: Embedder,
    head: dict[str, Any],
    added: tuple[str, ...],
) -> None:
    from topwork.models.classifier import COMPILED
    from topwork.shipping.card import model_card

    recipe = json.loads((old_run / "recipe.json").read_text())
    recipe["grown"] = {"from": str(old_run.absolute()), "added": list(added), **head}
    save_manifest(manifest, folder / "manifest.parquet")
    write_json(folder / "split.json", split_record(parts, manifest))
    write_json(folder / "recipe.json", recipe)
    with atomic_file(folder / "history.jsonl") as partial:
        partial.write_text((old_run / "history.jsonl").read_text())
    save_predictions(predictions, manifest, folder / "predictions.parquet")
    compiled = classifier.backbone.folder / COMPILED[0]
    found = compiled if embedder.engine.kind == "openvino" and compiled.is_file() else None
    save_classifier(classifier, folder / "model", found, model_card(classifier))


# ---- the folder


@contextmanager
def run_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """Holds a run folder: made if needed, refused when it is taken or when another run is writing to it."""
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        with lock:
            _check_free(folder, overwrite)
            yield
    except filelock.Timeout:
        raise UsageError(f"{folder}: another run is writing here. Wait for it, or choose another --out.") from None
    except OSError as error:
        raise TopworkError(f"{error.filename or folder}: {(error.strerror or str(error)).lower()}") from error
    finally:
        if folder.is_dir() and [p.name for p in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink(missing_ok=True)
            folder.rmdir()


def _check_free(folder: Path, overwrite: bool) -> None:
    if (folder / "evaluation.json").exists():
        if not overwrite:
            raise UsageError(f"{folder}: holds a finished run. Choose another --out, or add --overwrite.")
        (folder / "evaluation.json").unlink()
    elif not (folder / "settings.json").exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise UsageError(f"{folder}: holds files that are no run. Choose another --out.")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False))


def _write(
    folder: Path,
    manifest: Manifest,
    parts: Split,
    classifier: Classifier,
    probe: Probe,
    predictions: dict[str, Predictions],
    recipe: dict[str, Any],
    embedder: Embedder,
) -> None:
    from topwork.shipping.card import model_card

    save_manifest(manifest, folder / "manifest.parquet")
    write_json(folder / "split.json", split_record(parts, manifest))
    write_json(folder / "recipe.json", recipe)
    with atomic_file(folder / "history.jsonl") as partial:
        partial.write_text("".join(json.dumps(asdict(trial)) + "\n" for trial in probe.trials))
    save_predictions(predictions, manifest, folder / "predictions.parquet")
    compiled = compiled_path(classifier.backbone) if embedder.engine.kind == "openvino" else None
    save_classifier(classifier, folder / "model", compiled, model_card(classifier))


def append_history(path: Path, records: list[dict[str, Any]]) -> None:
    """Adds records to the lines of a history, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(path.read_text() + "".join(json.dumps(record) + "\n" for record in records))


def save_predictions(predictions: dict[str, Predictions], manifest: Manifest, path: Path) -> None:
    """One row an image of every part: truth, answer, probability and logits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for name, part in predictions.items():
        names = np.array(part.classes, dtype=object)
        rows = part.sample_indices.tolist()
        columns = {
            "path": [os.fsencode(manifest.samples[row].path).decode("utf-8", "backslashreplace") for row in rows],
            "part": [name] * len(rows),
            "row": rows,
            "label": [manifest.samples[row].label.encode("utf-8", "backslashreplace").decode() for row in rows],
            "predicted": [str(n).encode("utf-8", "backslashreplace").decode() for n in names[part.predicted]],
            "probability": part.confidence,
            "correct": part.correct,
        }
        flat = pa.array(part.logits.astype(np.float32).reshape(-1))
        table = pa.table(columns)
        tables.append(table.append_column("logits", pa.FixedSizeListArray.from_arrays(flat, len(names))))
    with atomic_file(path) as partial:
        pq.write_table(pa.concat_tables(tables), partial)


# ---- pieces of fit


def _asked(path: str | os.PathLike[str], settings: FitSettings) -> dict[str, Any]:
    """``settings.json``: enough to repeat or resume the run."""
    return {
        "path": str(Path(path).absolute()),
        "settings": as_dict(settings),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    found = {}
    for name in ("topwork", "torch", "timm", "openvino", "numpy", "pillow", "simplejpeg", "cykooz.resizer"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _check_trainable(manifest: Manifest, parts: Split, watcher: Watcher) -> None:
    if len(manifest.classes) < MIN_CLASSES:
        raise UsageError(
            f"{shown(str(manifest.root))}: only one class, {shown(manifest.classes[0])}. A classifier needs at least two: "
            "one folder a class."
        )
    trained = {manifest.samples[row].label for row in parts.train}
    if len(trained) < MIN_CLASSES:
        raise UsageError(f"{shown(str(manifest.root))}: the train part has images of only {len(trained)} class.")
    untrained = [name for name in manifest.classes if name not in trained]
    if untrained:
        names = ", ".join(shown(name) for name in untrained[:5])
        watcher.note(f"{len(untrained)} classes have no training image, so they can never be predicted: {names}.")


def _classifier(
    backbone: Backbone, probe: Probe, manifest: Manifest, train_labels: NDArray[np.int64], embedder: Embedder
) -> Classifier:
    """Folds the temperature, fitted on out-of-fold logits of train, into the head."""
    temperature = fit_temperature(probe.out_of_fold_logits, train_labels[probe.rows])
    head = probe.head.divided_by(temperature)
    head = head.folded() if head.kind == "plain" else head
    return Classifier(backbone, head, manifest.classes, temperature, embedder.engine.precision)


def _tuned_classifier(
    tuned: TunedClassifier,
    manifest: Manifest,
    features: Features,
    parts: Split,
    labels: NDArray[np.int64],
    precision: str,
    settings: FitSettings,
) -> Classifier:
    """Temperature and thresholds of a tuned network come from valid: it has learnt the training images by heart."""
    held_out = features.block("last", parts.valid)
    logits = tuned.head.logits({"last": held_out})
    temperature = fit_temperature(logits, labels[parts.valid])
    probabilities = softmax(logits / temperature)
    detector = fit_unknown(features.block("last", parts.train), labels[parts.train], settings.unknown_false_alarms)
    scores = np.sort(detector.score(held_out))
    rank = min(len(scores), math.ceil((len(scores) + 1) * (1 - settings.unknown_false_alarms))) - 1
    thresholds = {
        "unknown": max(detector.threshold, float(scores[rank])),
        "unknown_false_alarm_rate": settings.unknown_false_alarms,
        **fit_ambiguous(probabilities, labels[parts.valid], settings.coverage, settings.target_precision),
    }
    return Classifier(
        tuned.backbone,
        tuned.head.divided_by(temperature),
        manifest.classes,
        temperature,
        precision,
        thresholds,
        {"unknown_centres": detector.centres},
    )


def with_decisions(
    classifier: Classifier,
    probe: Probe,
    train_labels: NDArray[np.int64],
    train_features: NDArray[np.float16],
    train_groups: NDArray[np.int64],
    settings: FitSettings,
) -> Classifier:
    """Adds the rule for label, ambiguous and unknown; all of it from out-of-fold values of the train part."""
    probabilities = softmax(probe.out_of_fold_logits / classifier.temperature)
    detector = fit_unknown(train_features, train_labels, settings.unknown_false_alarms, groups=train_groups)
    thresholds = {
        "unknown": detector.threshold,
        "unknown_false_alarm_rate": detector.false_alarm_rate,
        **fit_ambiguous(probabilities, train_labels[probe.rows], settings.coverage, settings.target_precision),
    }
    return replace(classifier, thresholds=thresholds, arrays={"unknown_centres": detector.centres})


def _evaluation(
    classifier: Classifier, manifest: Manifest, parts: Split, predictions: dict[str, Predictions], seed: int
) -> dict[str, Any]:
    labels = np.array(manifest.labels)
    counts = np.bincount(labels[parts.train], minlength=len(manifest.classes))
    n_train = dict(zip(manifest.classes, counts.tolist(), strict=True))
    judged: dict[str, Any] = {}
    for name in ("valid", "test"):
        if name in predictions:
            part: PartEvaluation = evaluate_part(predictions[name], n_train=n_train, seed=seed)
            judged[name] = part.as_dict()
    n_head = int(classifier.head.weight.size + classifier.head.bias.size)
    return judged | {"n_parameters": classifier.backbone.n_parameters + n_head, "n_trainable": n_head}


def _leaks(
    predictions: dict[str, Predictions], manifest: Manifest, parts: Split, seed: int, watcher: Watcher
) -> dict[str, Any]:
    """Figures of the parts that the user gave with and without images that train has, too; {} where there are none."""
    leaked = dict(parts.leaks)
    found: dict[str, Any] = {}
    for name in ("valid", "test"):
        if name not in predictions or not leaked:
            continue
        part = predictions[name]
        clean = np.array([row not in leaked for row in part.sample_indices.tolist()])
        if clean.all():
            continue
        rest = Predictions(part.classes, part.sample_indices[clean], part.labels[clean], part.logits[clean])
        judged = {
            key: evaluate_part(p, seed=seed).as_dict()
            for key, p in (("with", part), ("without", rest))
            if len(p.labels)
        }
        figures = {
            key: {k: values[k] for k in ("n", "accuracy", "balanced_accuracy")} for key, values in judged.items()
        }
        pairs = [(row, leaked[row]) for row in part.sample_indices[~clean].tolist()]
        paths = [[manifest.samples[a].path, manifest.samples[b].path] for a, b in pairs]
        found[name] = {"n_leaked": len(pairs), **figures, "pairs": paths}
        watcher.note(_leak_note(name, len(pairs), figures))
    return {"leaks": found} if found else {}


def _leak_note(name: str, n_leaked: int, figures: dict[str, Any]) -> str:
    images = "1 image" if n_leaked == 1 else f"{n_leaked} images"
    text = f"{images} of {name} leaked: the same picture, or one of the same group, is in train."
    if "without" not in figures:
        return f"{text} Nothing is left of {name} without them: its figures mean little."
    accuracy, clean = figures["with"]["accuracy"]["value"], figures["without"]["accuracy"]["value"]
    if accuracy is None or clean is None:
        return text
    return f"{text} Accuracy {100 * accuracy:.1f} % with them, {100 * clean:.1f} % without."


def _recipe(classifier: Classifier, probe: Probe, parts: Split, embedder: Embedder) -> dict[str, Any]:
    """What was done, with no "auto" left in it."""
    chosen = next(trial for trial in probe.trials if trial.chosen)
    return {
        "mode": "probe",
        "backbone": classifier.backbone.name,
        "architecture": classifier.backbone.architecture,
        "preprocessing": classifier.backbone.spec.as_dict(),
        "engine": embedder.engine.kind,
        "precision": embedder.engine.precision,
        "head": {
            "kind": classifier.head.kind,
            "candidate": chosen.candidate,
            "penalty": chosen.penalty,
            "n_features": int(classifier.head.weight.shape[1]),
            "reason": probe.reason,
        },
        "cross_validation": {
            "n_folds": chosen.n_folds,
            "n_images": chosen.n_images,
            "accuracy": chosen.accuracy,
            "standard_error": chosen.standard_error,
        },
        "class_weights": None if probe.class_weights is None else probe.class_weights.tolist(),
        "temperature": classifier.temperature,
        "temperature_fitted_on": "out-of-fold logits of the train part",
        "valid_used_for": "figures only; nothing was chosen on it" if len(parts.valid) else "there is no valid part",
        "seed": parts.seed,
    }


def _provenance(manifest: Manifest, parts: Split, evaluation: dict[str, Any], settings: DataSettings) -> dict[str, Any]:
    judged = "test" if "test" in evaluation else "valid" if "valid" in evaluation else None
    labels = np.array(manifest.labels)
    counts = np.bincount(labels[parts.train], minlength=len(manifest.classes))
    return {
        "data_digest": manifest.digest,
        "n_train": dict(zip(manifest.classes, counts.tolist(), strict=True)),
        "judged_on": judged,
        "figures": {k: evaluation[judged][k] for k in ("n", "accuracy", "balanced_accuracy")} if judged else None,
        "seed": settings.seed,
        "versions": versions(),
    }


def _timing(clock: Stopwatch, embedder: Embedder) -> dict[str, Any]:
    seconds = clock.seconds["scan_and_embed"]
    return {
        "seconds": clock.seconds | {"total": round(time.perf_counter() - clock.started, 3)},
        "n_embedded": embedder.n_embedded,
        "images_per_second": round(embedder.n_embedded / seconds, 1) if embedder.n_embedded and seconds else None,
        "engine_images_per_second": (
            round(embedder.n_embedded / embedder.engine_seconds, 1) if embedder.engine_seconds else None
        ),
    }


def part_rows(manifest: Manifest, part: str) -> NDArray[np.int64]:
    """Rows of the wanted part; all rows where the data has no parts."""
    by_part: dict[str, list[int]] = {}
    for row, sample in enumerate(manifest.samples):
        by_part.setdefault(sample.part or "none", []).append(row)
    if part == "auto":
        part = next((name for name in ("test", "valid") if name in by_part), "all")
    if part == "all":
        return np.arange(len(manifest.samples))
    if part not in by_part:
        raise UsageError(
            f"--part {part}: {shown(str(manifest.root))} has no such part; found {', '.join(sorted(by_part))}."
        )
    return np.array(by_part[part])


def _vocabulary_notes(classifier: Classifier, manifest: Manifest) -> list[str]:
    known, found = set(classifier.classes), set(manifest.classes)
    notes = []
    if found - known:
        names = ", ".join(shown(name) for name in sorted(found - known)[:8])
        notes.append(f"Classes the model does not know, left out of the figures: {names}.")
    if known - found:
        names = ", ".join(shown(name) for name in sorted(known - found)[:8])
        notes.append(f"Classes of the model without images here, not measured: {names}.")
    if not known & found:
        raise UsageError(
            f"{shown(str(manifest.root))}: none of its classes is one of the model's. "
            f"The model knows: {', '.join(shown(n) for n in classifier.classes[:8])}."
        )
    return notes
