"""``topwork evaluate``: a saved model on labeled images, with classes matched by name.

Images that the model was trained on are counted, and the metrics without them are added. With an output folder,
predictions and a confusion matrix are written for the report.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.commands.prepare import scan_and_embed
from topwork.data.manifest import Manifest, load_manifest, save_manifest
from topwork.data.samples import Sample
from topwork.data.split import part_rows
from topwork.errors import TopworkError, UsageError
from topwork.evaluation.calibration import count_outcomes
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions, labels_for, predict_features
from topwork.export.runtime import model_embedder
from topwork.features.duplicates import FeatureSpace, calibrate, search
from topwork.features.embed import Embedder, Features, embed
from topwork.features.engine import load_engine
from topwork.models.classifier import Classifier, find_model, load_classifier
from topwork.progress import Reporter, Stopwatch, default_reporter
from topwork.run import asked, images_of_run, read_split, run_folder, save_predictions, write_json
from topwork.settings import HERE, ClusterSettings, DataSettings, check
from topwork.text import Described, count, escape, first_names, natural_key, percent_ci


class Evaluated(Described, dict[str, Any]):
    """The result of :func:`evaluate`: plain JSON values, shown in short."""

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        accuracy = "Exact match" if self.get("multi_label") else "Accuracy"
        return {"Images": self["n"], accuracy: percent_ci(self["accuracy"]), "Classes": len(self["classes"])}


def evaluate(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    settings: DataSettings | None = None,
    *,
    part: str = "auto",
    by: str | None = None,
    rename: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    cluster: ClusterSettings = HERE,
    reporter: Reporter | None = None,
) -> Evaluated:
    """Evaluates a saved model on labeled images; classes are matched by name.

    Args:
        path: the images; None for those of the model's run.
        part: which part to use if the data has parts: ``train``, ``valid``, ``test``, ``all``; ``auto`` takes test,
            else valid, else all.
        by: also evaluate the images of each ``domain``, ``group`` or ``part``.
        rename: ``OLD=NEW``: images of the class OLD count as images of the model's class NEW.
        out: output folder for ``evaluation.json``, ``predictions.parquet`` and ``confusion.csv``.
        overwrite: replace an existing evaluation.
        cluster: machines that read and embed the images.

    Returns:
        One part of ``evaluation.json``, with ``outcomes``, ``notes`` and ``seen_in_training``: None if the model folder does
        not name its training images, else ``n``, ``n_exact``, ``n_near`` and ``without``: the same metrics without them, or
        None if nothing is left or nothing was seen. With ``by``: the same metrics by domain, group or part.

    Raises:
        UsageError: nothing to evaluate, or ``by`` or ``rename`` does not match the data.
    """
    settings, reporter, clock = settings or DataSettings(), reporter or default_reporter(), Stopwatch()
    check(cluster)
    classifier = load_classifier(model, multi_label=True)
    if classifier.multi_label:  # the model determines whether images have several labels
        settings = replace(settings, multi_label=True)
    with clock("scan_and_embed"):
        reporter.step("scan and embed")
        embedder = model_embedder(classifier, cluster)
        if path is None:
            manifest = images_of_run(model, settings)
            features = embed(embedder.backbone, manifest, embedder=embedder, n_threads=settings.workers)
        else:
            manifest, features = scan_and_embed(path, settings, embedder, reporter)
    manifest = _renamed(manifest, rename).named_like(classifier.classes)
    rows = part_rows(manifest, part)
    with clock("evaluate"):
        reporter.step("evaluate")
        found = _evaluated(classifier, manifest, features, rows, settings.seed)
        if by is not None:
            found.figures["by"] = {by: _by(by, found.predictions, manifest, found.n_train, settings.seed)}
        seen = _seen_in_training(model, classifier, manifest, features, embedder, rows)
        found.figures["seen_in_training"] = None if seen is None else _without_seen(found, seen, settings.seed)
    notes = [*manifest.notes, *_vocabulary_notes(classifier, manifest, rows), *seen_notes(found.figures)]
    for note in notes:
        reporter.note(note)
    if out is not None:
        _write(Path(out), overwrite, model, path or manifest.root, settings, manifest, found, clock)
    return Evaluated(
        found.figures,
        notes=notes,
        rejects=[reject.as_dict() for reject in manifest.rejects],
        n_unused=manifest.n_failed + _n_unknown(classifier, manifest, rows),
    )


@dataclass(frozen=True, eq=False)
class _Evaluated:
    predictions: Predictions
    figures: dict[str, Any]
    n_train: Mapping[str, int] | None


def _evaluated(
    classifier: Classifier, manifest: Manifest, features: Features, rows: NDArray[np.int64], seed: int
) -> _Evaluated:
    n_train = classifier.provenance.get("n_train")
    predictions = predict_features(classifier, features, rows, labels_for(classifier, manifest))
    figures = evaluate_part(predictions, n_train, seed=seed)
    figures["outcomes"] = count_outcomes(classifier, predictions, features.block("last", rows))[1]
    return _Evaluated(predictions, figures, n_train)


def _renamed(manifest: Manifest, rename: Sequence[str]) -> Manifest:
    """The manifest with classes renamed by ``--map OLD=NEW``."""
    names = {}
    for pair in rename:
        old, sign, new = pair.partition("=")
        if not (old and sign and new):
            raise UsageError(f"--map {escape(pair)}: must be OLD=NEW: a class of the data and a class of the model.")
        if old not in manifest.classes:
            found = first_names(list(manifest.classes), 8)
            raise UsageError(f"--map {escape(pair)}: the data has no class {escape(old)}. It has: {found}.")
        names[old] = new
    return manifest.renamed(names) if names else manifest


# ---- images that the model was trained on


def _seen_in_training(
    model: str | os.PathLike[str],
    classifier: Classifier,
    manifest: Manifest,
    features: Features,
    embedder: Embedder,
    rows: NDArray[np.int64],
) -> dict[int, str] | None:
    """Rows whose image is in the training part of the model's run: ``exact`` or ``near``; None if that is not known."""
    trained = _training_samples(find_model(model).parent)
    if trained is None:
        return None
    hashes = {sample.content_hash for sample in trained}
    seen = {row: "exact" for row in rows.tolist() if manifest.samples[row].content_hash in hashes}
    others = np.array([row for row in rows.tolist() if row not in seen], np.int64)
    return seen | dict.fromkeys(_near(classifier, trained, manifest, features, embedder, others), "near")


def _training_samples(run: Path) -> list[Sample] | None:
    """The training images of a run, each content once; None if the folder is not a run."""
    try:
        manifest, parts = load_manifest(run / "manifest.parquet"), read_split(run)["parts"]
        hashes = {item["content_hash"] for item in parts["train"]}
    except (OSError, ValueError, KeyError, TypeError, TopworkError):
        return None
    return list({sample.content_hash: sample for sample in manifest.samples if sample.content_hash in hashes}.values())


def _near(
    classifier: Classifier,
    trained: list[Sample],
    manifest: Manifest,
    features: Features,
    embedder: Embedder,
    rows: NDArray[np.int64],
) -> list[int]:
    """Rows that are near duplicates of training images, if their features are still in the store."""
    store = embedder.store
    if not all(sample.content_hash in store for sample in trained):  # stored in the precision of training
        store = Embedder(classifier.backbone, load_engine(classifier.backbone, precision=classifier.precision)).store
    trained = [sample for sample in trained if sample.content_hash in store]
    if not trained or not len(rows):
        return []
    both = replace(manifest, samples=(*(manifest.samples[row] for row in rows.tolist()), *trained))
    last = store.load([sample.content_hash for sample in trained], "last")
    space = FeatureSpace.of(np.concatenate([features.block("last", rows), last]))
    thumbs = both.traits().thumbs
    labels = [sample.label for sample in both.samples]
    # copies are made of the evaluated images, since the training images may be gone
    measured = calibrate(manifest, rows, space, thumbs, embedder)
    found = search(space, thumbs, labels, measured)
    return sorted({int(rows[pair.a]) for pair in found.pairs if pair.a < len(rows) <= pair.b})


def _without_seen(found: _Evaluated, seen: Mapping[int, str], seed: int) -> dict[str, Any]:
    new = ~np.isin(found.predictions.sample_indices, np.array(sorted(seen), np.int64))
    kinds = list(seen.values())
    record: dict[str, Any] = {"n": len(seen), "n_exact": kinds.count("exact"), "n_near": kinds.count("near")}
    without = found.predictions.take(new)
    has_figures = bool(seen) and len(without.labeled()) > 0
    return record | {"without": evaluate_part(without, found.n_train, seed=seed) if has_figures else None}


def seen_notes(figures: Mapping[str, Any]) -> list[str]:
    """Notes about images that the model was trained on."""
    seen = figures.get("seen_in_training")
    if not seen or not seen["n"]:
        return []
    text = f"{count(seen['n'], 'image')} {'was' if seen['n'] == 1 else 'were'} seen in training"
    if seen["n_near"]:
        text += f" ({seen['n_exact']:,} identical, {seen['n_near']:,} near duplicates)"
    if seen["without"] is None:
        return [f"{text} and no other images are left, so the metrics are optimistic."]
    return [f"{text}; trust the metrics without {'it' if seen['n'] == 1 else 'them'}."]


# ---- the output folder


def _write(
    folder: Path,
    overwrite: bool,
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    settings: DataSettings,
    manifest: Manifest,
    found: _Evaluated,
    clock: Stopwatch,
) -> None:
    """Writes the folder that ``report.run_page`` shows as an evaluation: see ``Record.is_evaluation``."""
    figures = {key: value for key, value in found.figures.items() if key != "seen_in_training"}
    seen = found.figures["seen_in_training"]
    evaluation: dict[str, Any] = {"test": figures, "seen_in_training": seen}
    if seen and seen["n"]:
        evaluation["leaks"] = {"test": {"n_leaked": seen["n"]}}
        evaluation |= {"test_without_leaks": seen["without"]} if seen["without"] else {}
    with run_folder(folder, overwrite) as work:
        write_json(work / "settings.json", asked(path, settings) | {"model": str(Path(model).absolute())})
        save_manifest(manifest, work / "manifest.parquet")
        save_predictions({"test": found.predictions}, manifest, work / "predictions.parquet")
        if figures.get("confusion") is not None:
            with open(work / "confusion.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                names = [escape(name) for name in figures["classes"]]
                rows = ([name, *cells] for name, cells in zip(names, figures["confusion"], strict=True))
                csv.writer(file).writerows([["true \\ predicted", *names], *rows])
        evaluation["timing"] = {"seconds": clock.seconds | {"total": clock.total}}
        write_json(work / "evaluation.json", evaluation)


# ---- classes


def _by(
    by: str, predictions: Predictions, manifest: Manifest, n_train: Mapping[str, int] | None, seed: int
) -> dict[str, Any]:
    """The metrics of each domain, group or part, by its name."""
    values = [getattr(manifest.samples[row], by) for row in predictions.sample_indices.tolist()]
    names = sorted({value for value in values if value is not None})
    if not names:
        raise UsageError(
            f"--by {by}: {escape(str(manifest.root))} has no {by}. Use a table with the column {by}, or add --{by}-by."
        )
    found = {}
    for name in names:
        own = predictions.take(np.array([value == name for value in values]))
        found[name] = evaluate_part(own, n_train=n_train, seed=seed)
    return found


def _n_unknown(classifier: Classifier, manifest: Manifest, rows: NDArray[np.int64]) -> int:
    """Images that cannot be evaluated, because the model has none of their classes."""
    known = set(classifier.classes)
    names = [manifest.names_of(manifest.samples[row]) for row in rows.tolist()]
    return sum(bool(own) and not known.intersection(own) for own in names)


def _vocabulary_notes(classifier: Classifier, manifest: Manifest, rows: NDArray[np.int64]) -> list[str]:
    known, found = set(classifier.classes), set(manifest.classes)
    notes = []
    if found - known:
        n_left = _n_unknown(classifier, manifest, rows)
        names = first_names(sorted(found - known, key=natural_key), 8)
        notes.append(
            f"{n_left:,} of {count(len(rows), 'image')} not evaluated, because the model does not have their class ({names})."
        )
    if known - found:
        names = ", ".join(escape(name) for name in sorted(known - found)[:8])
        notes.append(f"Classes of the model without images here, not evaluated: {names}.")
    if not known & found:
        raise UsageError(
            f"{escape(str(manifest.root))}: none of its classes is a class of the model, which has: "
            f"{', '.join(escape(n) for n in classifier.classes[:8])}."
        )
    return notes
