"""``topwork evaluate``: a saved model on labeled images, with classes matched by name.

Images that the model was trained on are counted, and the metrics without them are added. With an output folder,
predictions and a confusion matrix are written for the report.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.commands.prepare import embedded, scan_and_embed
from topwork.data.manifest import Manifest, save_manifest
from topwork.data.samples import Sample
from topwork.data.split import part_rows
from topwork.errors import TopworkError, UsageError
from topwork.evaluation.calibration import count_outcomes
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions, labels_for, predict_features
from topwork.export.runtime import model_embedder
from topwork.features.duplicates import FeatureSpace, calibrate, search
from topwork.features.embed import Embedder, Features
from topwork.features.engine import load_engine
from topwork.models.classifier import Classifier, load_classifier
from topwork.progress import Reporter, Steps
from topwork.run import asked, images_of_run, run_folder, save_predictions, write_json
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
    settings, steps = settings or DataSettings(), Steps(reporter)
    check(cluster)
    classifier = load_classifier(model, multi_label=True)
    n_train = classifier.provenance.get("n_train")
    if classifier.multi_label:  # the model determines whether images have several labels
        settings = replace(settings, multi_label=True)
    with steps("scan_and_embed"):
        embedder = model_embedder(classifier, cluster)
        if path is None:
            manifest = images_of_run(model, settings)
            features = embedded(manifest, embedder, settings, steps.reporter)
        else:
            manifest, features = scan_and_embed(path, settings, embedder, steps.reporter)
    manifest = _renamed(manifest, rename).named_like(classifier.classes)
    rows = part_rows(manifest, part)

    def measured(some: Predictions) -> dict[str, Any]:
        return evaluate_part(some, n_train, seed=settings.seed)

    with steps("evaluate"):
        predictions = predict_features(classifier, features, rows, labels_for(classifier, manifest))
        figures = measured(predictions)
        figures["outcomes"] = count_outcomes(classifier, predictions, features.block("last", rows))[1]
        if by is not None:
            figures["by"] = {by: {name: measured(own) for name, own in _divided(by, predictions, manifest)}}
        seen = _seen_in_training(model, classifier, manifest, features, embedder, rows)
        figures["seen_in_training"] = None if seen is None else _without_seen(predictions, seen, measured)
    n_unknown = _n_unknown(classifier, manifest, rows)
    notes = [*manifest.notes, *_vocabulary_notes(classifier, manifest, n_unknown, len(rows)), *seen_notes(figures)]
    for note in notes:
        steps.reporter.note(note)
    if out is not None:
        record = asked(path or manifest.root, settings) | {"model": str(Path(model).absolute())}
        _write(Path(out), overwrite, record, manifest, predictions, figures, steps)
    rejects = [reject.as_dict() for reject in manifest.rejects]
    return Evaluated(figures, notes=notes, rejects=rejects, n_unused=manifest.n_failed + n_unknown)


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


def _divided(by: str, predictions: Predictions, manifest: Manifest) -> Iterator[tuple[str, Predictions]]:
    """The predictions of each domain, group or part, with its name."""
    values = [getattr(manifest.samples[row], by) for row in predictions.sample_indices.tolist()]
    names = sorted({value for value in values if value is not None})
    if not names:
        raise UsageError(
            f"--by {by}: {escape(str(manifest.root))} has no {by}. Use a table with the column {by}, or add --{by}-by."
        )
    for name in names:
        yield name, predictions.take(np.array([value == name for value in values]))


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
    try:
        run = images_of_run(model, verb="evaluate")
    except (OSError, ValueError, KeyError, TypeError, TopworkError):
        return None
    trained = {sample.content_hash: sample for sample in run.samples if sample.part == "train"}
    seen = {row: "exact" for row in rows.tolist() if manifest.samples[row].content_hash in trained}
    others = np.array([row for row in rows.tolist() if row not in seen], np.int64)
    near = _near(classifier, list(trained.values()), manifest, features, embedder, others)
    return seen | dict.fromkeys(near, "near")


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


def _without_seen(
    predictions: Predictions, seen: Mapping[int, str], measured: Callable[[Predictions], dict[str, Any]]
) -> dict[str, Any]:
    new = ~np.isin(predictions.sample_indices, np.array(sorted(seen), np.int64))
    kinds, without = list(seen.values()), predictions.take(new)
    has_figures = bool(seen) and len(without.labeled()) > 0
    return {
        "n": len(seen),
        "n_exact": kinds.count("exact"),
        "n_near": kinds.count("near"),
        "without": measured(without) if has_figures else None,
    }


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
    record: dict[str, Any],
    manifest: Manifest,
    predictions: Predictions,
    found: dict[str, Any],
    steps: Steps,
) -> None:
    """Writes the folder that ``report.run_page`` shows as an evaluation: see ``Record.is_evaluation``."""
    figures = {key: value for key, value in found.items() if key != "seen_in_training"}
    seen = found["seen_in_training"]
    evaluation: dict[str, Any] = {"test": figures, "seen_in_training": seen}
    if seen and seen["n"]:
        evaluation["leaks"] = {"test": {"n_leaked": seen["n"]}}
        evaluation |= {"test_without_leaks": seen["without"]} if seen["without"] else {}
    with run_folder(folder, overwrite) as work:
        write_json(work / "settings.json", record)
        save_manifest(manifest, work / "manifest.parquet")
        save_predictions({"test": predictions}, manifest, work / "predictions.parquet")
        if figures.get("confusion") is not None:
            with open(work / "confusion.csv", "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                names = [escape(name) for name in figures["classes"]]
                rows = ([name, *cells] for name, cells in zip(names, figures["confusion"], strict=True))
                csv.writer(file).writerows([["true \\ predicted", *names], *rows])
        evaluation["timing"] = {"seconds": steps.seconds | {"total": steps.total}}
        write_json(work / "evaluation.json", evaluation)


# ---- classes


def _n_unknown(classifier: Classifier, manifest: Manifest, rows: NDArray[np.int64]) -> int:
    """Images that cannot be evaluated, because the model has none of their classes."""
    known = set(classifier.classes)
    names = [manifest.names_of(manifest.samples[row]) for row in rows.tolist()]
    return sum(bool(own) and not known.intersection(own) for own in names)


def _vocabulary_notes(classifier: Classifier, manifest: Manifest, n_unknown: int, n: int) -> list[str]:
    known, found = set(classifier.classes), set(manifest.classes)
    notes = []
    if found - known:
        names = first_names(sorted(found - known, key=natural_key), 8)
        notes.append(
            f"{n_unknown:,} of {count(n, 'image')} not evaluated, because the model does not have their class ({names})."
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
