"""``topwork fit``: from a folder of images to a run folder.

``fit`` reads from top to bottom: scan and embed in one pass, split, probe, tune where asked, calibrate, judge, write.
Each step is one public function of the layer below; here is only their order and what is recorded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.groups import join_groups
from topwork.data.manifest import Manifest, save_manifest
from topwork.data.sources import shown
from topwork.data.split import Split, leave_out, split, split_record, with_valid
from topwork.errors import UsageError
from topwork.evaluation.calibration import fit_temperature
from topwork.evaluation.decisions import fit_ambiguous
from topwork.evaluation.insights import find_insights
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions, softmax
from topwork.evaluation.unknown import fit_unknown
from topwork.features.blas import few_threads
from topwork.features.candidates import Choice, choose, names_of, subsample
from topwork.features.embed import Embedder, Features, embed
from topwork.features.engine import Engine, compiled_path, fingerprint, load_engine, with_resizer
from topwork.features.neighbours import near_duplicates
from topwork.features.probe import Probe, fit_probe
from topwork.features.store import FeatureStore
from topwork.features.views import Probed, View, asked_views, buy_views, with_views
from topwork.models.backbone import Backbone, load_backbone
from topwork.models.classifier import Classifier, save_classifier
from topwork.models.head import Changes
from topwork.run import (
    asked,
    run_folder,
    save_predictions,
    write_history,
    write_json,
)
from topwork.settings import FitSettings, as_dict, cache_folder, is_launched
from topwork.training.tracking import check_tracker, tracking
from topwork.training.tuning import TunedClassifier, Tuning, head_spec, tune_classifier
from topwork.training.verdict import weigh
from topwork.verbs.label_sets import FittedLabelSets, check_label_sets, check_settings, finish_label_sets
from topwork.verbs.leaks import judge_leaks
from topwork.verbs.steps import (
    Silent,
    Stopwatch,
    Watcher,
    evaluate_parts,
    near_pairs,
    predict_features,
    probe_record,
    provenance,
    scan_and_embed,
    timing,
    with_second_look,
)

MIN_CLASSES = 2
VALID_OF_TUNING = "choosing the epoch, the mixture of weights, the temperature and the thresholds; its figures flatter"


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


@dataclass(frozen=True)
class Gathered:
    """What is known before anything is trained."""

    settings: FitSettings
    backbone: Backbone
    embedder: Embedder
    manifest: Manifest
    features: Features
    groups: Sequence[int]
    parts: Split
    n_near: int | None
    choice: Choice | None = None

    @property
    def labels(self) -> NDArray[Any]:
        """(N,) class index of every sample; (N, C) which classes it has, where it may have several."""
        if self.manifest.multi_label:
            return self.manifest.label_matrix
        return np.asarray(self.manifest.labels, np.int64)


@dataclass(frozen=True)
class Judged:
    """A classifier, its features and answers for every part, and the figures of the parts held back."""

    classifier: Classifier
    features: Features
    predictions: dict[str, Predictions]
    evaluation: dict[str, Any]


def fit(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: FitSettings | None = None,
    *,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> Fitted | FittedLabelSets:
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
    head_spec(settings)  # what cannot be is named before the work begins
    check_tracker(settings.track)
    if settings.multi_label:
        check_settings(settings)
    with run_folder(folder, overwrite):
        write_json(folder / "settings.json", asked(path, settings))
        data = gather(path, settings, clock, watcher)
        if data.choice is not None:  # what is resumed must not choose again: rates differ from time to time
            write_json(folder / "settings.json", asked(path, settings) | {"backbones": data.choice.as_dict()})
        n_values = len(data.manifest.samples) * data.backbone.n_features
        with clock("probe"), few_threads(n_values):
            watcher.step("probe")
            probed = _probe(data, clock, watcher)
        if data.manifest.multi_label:
            return finish_label_sets(
                folder, data.manifest, data.features, data.parts, data.groups, data.embedder, probed, settings, watcher,
                clock,
            )  # fmt: skip
        tuned, words = _tune(data, probed.probe, folder, clock, watcher)
        with few_threads(n_values):
            judged = _judge(data, probed.probe, tuned, clock, watcher)
        recipe = _recipe(data, probed, tuned, judged.classifier) | ({"words": words} if words else {})
        with clock("write"):
            watcher.step("write")
            known = provenance(data.manifest, data.parts, judged.evaluation, settings)
            judged = replace(judged, classifier=replace(judged.classifier, provenance=known))
            _write(folder, data, probed.probe, tuned, judged, recipe)
        with clock("insights"), few_threads(n_values):
            watcher.step("insights")
            _write_insights(folder, path, data, probed.probe, judged, tuned is not None, clock)
        evaluation = judged.evaluation | {"timing": timing(clock, data.embedder)}
        write_json(folder / "evaluation.json", evaluation)
    return Fitted(
        folder, data.manifest, data.parts, judged.classifier, probed.probe, judged.predictions, evaluation, recipe
    )


def follow(path: str | os.PathLike[str], out: str | os.PathLike[str], settings: FitSettings) -> None:
    """What every process but the first does when several train one network: it takes its share and writes nothing.

    It waits until the first one has read and embedded the images, finds everything in the cache, and trains along.

    Raises:
        UsageError: there is nothing to share without tuning.
    """
    if settings.mode == "probe":
        return
    watcher, clock = Silent(), Stopwatch()
    _meet()
    data = gather(path, settings, clock, watcher)
    probed = _probe(data, clock, watcher)
    tuning = Tuning(data.backbone, data.manifest, data.features, data.parts, probed.probe, settings, Path(out))
    tune_classifier(tuning, watcher.progress, watcher.epoch, watcher.note)


def _meet() -> None:
    """Waits until every process has come here."""
    from topwork.training.distributed import processes

    processes().wait()


# ---- the steps, in their order


def gather(path: str | os.PathLike[str], settings: FitSettings, clock: Stopwatch, watcher: Watcher) -> Gathered:
    """Scans, embeds and splits."""
    names = names_of(settings.backbone)
    with clock("backbone"):
        watcher.step("backbone")
        backbones = [_backbone(name, settings) for name in names]
        backbone = backbones[0]
        embedder = _embedder(backbone, settings)
    with clock("scan_and_embed"):
        watcher.step("scan and embed")
        manifest, features = scan_and_embed(path, settings, embedder, watcher)
    for note in manifest.notes:
        watcher.note(note)
    with clock("split"):
        near = near_duplicates(manifest, features, embedder) if settings.near_duplicates else None
        groups = join_groups(manifest, near_pairs(near))
        if settings.leave_out is not None:
            parts = leave_out(manifest, settings.leave_out, settings.valid_fraction, settings.seed, groups)
        else:
            parts = split(manifest, settings.valid_fraction, settings.test_fraction, settings.seed, groups)
        if settings.mode != "probe" and not len(parts.valid):
            parts = with_valid(parts, manifest, settings.valid_fraction, groups)
        if manifest.multi_label:
            check_label_sets(manifest, parts, watcher)
        else:
            _check_trainable(manifest, parts, watcher)
    n_near = len(near.pairs) if near else None
    data = Gathered(settings, embedder.backbone, embedder, manifest, features, groups, parts, n_near)
    return _with_chosen(data, backbones, clock, watcher) if len(backbones) > 1 else data


def _backbone(name: str, settings: FitSettings) -> Backbone:
    backbone = load_backbone(name).changed(Changes(settings.pooling, settings.drop_hidden))
    fit = None if settings.fit == "auto" else settings.fit
    return backbone.with_spec(height=settings.size, width=settings.size, fit=fit)


def _with_chosen(data: Gathered, backbones: Sequence[Backbone], clock: Stopwatch, watcher: Watcher) -> Gathered:
    """The same images and split with the backbone that cross-validation on a few training images prefers."""
    settings, manifest = data.settings, data.manifest
    if manifest.multi_label:
        raise UsageError(
            f"--backbone {settings.backbone}: comparing backbones needs one label an image; give one name."
        )
    with clock("compare_backbones"):
        watcher.step("compare backbones")
        rows = subsample(data.labels, data.parts.train, settings.seed)
        some = replace(manifest, samples=tuple(manifest.samples[row] for row in rows.tolist()))
        embedders: dict[str, Embedder] = {data.backbone.name: data.embedder}

        def embedded(backbone: Backbone) -> tuple[Features, Engine]:
            embedder = embedders.setdefault(backbone.name, _embedder(backbone, settings))
            features = embed(
                backbone, some, embedder=embedder, n_threads=settings.workers, on_progress=watcher.progress
            )  # fmt: skip
            return features, embedder.engine

        groups = np.asarray(data.groups)[rows].tolist()
        choice = choose(backbones, embedded, data.labels[rows], len(manifest.classes), groups, settings.seed)
        watcher.note(choice.words)
    backbone = next(one for one in backbones if one.name == choice.name)
    with clock("scan_and_embed"):
        watcher.step("embed again")
        embedder = embedders[backbone.name]
        features = embed(
            backbone, manifest, embedder=embedder, n_threads=settings.workers, on_progress=watcher.progress
        )  # fmt: skip
    return replace(data, backbone=embedder.backbone, embedder=embedder, features=features, choice=choice)


def _embedder(backbone: Backbone, settings: FitSettings) -> Embedder:
    engine = load_engine(backbone, settings.engine, settings.precision)
    backbone = with_resizer(backbone, engine)
    return Embedder(backbone, engine, FeatureStore(cache_folder(), fingerprint(backbone, engine)))


def _probe(data: Gathered, clock: Stopwatch, watcher: Watcher) -> Probed:
    """The head, with the augmented views that were asked for or that the time budget buys."""
    settings = data.settings

    def fitted(views: Sequence[View]) -> Probe:
        seen = with_views(
            data.manifest, data.features, data.labels, data.groups, data.parts.train, data.embedder, views,
            settings.seed, settings.workers, watcher.progress,
        )  # fmt: skip
        probe = fit_probe(
            seen.features,
            seen.labels,
            len(data.manifest.classes),
            rows=seen.rows,
            groups=seen.groups.tolist(),
            head="plain" if settings.head == "cosine" else settings.head,
            seed=settings.seed,
            on_progress=watcher.progress,
            balance=settings.balance,
        )
        return seen.images_only(probe)

    if settings.augment != "auto":
        return Probed(fitted(views := asked_views(settings.augment, settings.views)), tuple(views), ())
    if settings.mode != "probe" or settings.time_budget_seconds is None:
        return Probed(fitted(()), (), ())
    rate = timing(clock, data.embedder)["images_per_second"]
    left = settings.time_budget_seconds - clock.total
    return buy_views(fitted, data.labels[data.parts.train], rate, left)


def _tune(
    data: Gathered, probe: Probe, folder: Path, clock: Stopwatch, watcher: Watcher
) -> tuple[TunedClassifier | None, list[str]]:
    """The tuned network, or None where there is none or where the probe is kept; and what was decided, in words."""
    settings, words = data.settings, []

    def say(text: str) -> None:
        words.append(text)
        watcher.note(text)

    if settings.mode == "probe":
        return None, words
    with clock("tune"):
        watcher.step("tune")
        if is_launched():
            _meet()
        tuning = Tuning(data.backbone, data.manifest, data.features, data.parts, probe, settings, folder)
        with tracking(settings.track, folder, asdict(settings)) as track:

            def on_epoch(record: dict[str, Any]) -> None:
                watcher.epoch(record)
                track(record)

            tuned = tune_classifier(tuning, watcher.progress, on_epoch, say, watcher.stages)
    if tuned is None or settings.hidden is not None or settings.head == "cosine":  # a head that was asked for is kept
        return tuned, words
    with clock("embed_again"):
        watcher.step("embed again")
        valid = data.parts.valid
        held_out = replace(data.manifest, samples=tuple(data.manifest.samples[row] for row in valid.tolist()))
        features = embed(
            tuned.backbone, held_out, embedder=_embedder(tuned.backbone, settings), n_threads=settings.workers,
            on_progress=watcher.progress,
        )  # fmt: skip
    before = probe.head.logits({name: data.features.block(name, valid) for name in probe.head.transform.blocks})
    after = tuned.head.logits({"last": features.block("last")})
    verdict = weigh(before, after, data.labels[valid], asked_for=settings.mode == "tune")
    say(verdict.words)
    return (tuned if verdict.keeps_tuned else None), words


def _judge(data: Gathered, probe: Probe, tuned: TunedClassifier | None, clock: Stopwatch, watcher: Watcher) -> Judged:
    """Calibrates the classifier and has it answer for every part."""
    settings, parts, labels, features = data.settings, data.parts, data.labels, data.features
    if tuned is not None:
        with clock("embed_again"):
            watcher.step("embed again")
            embedder = _embedder(tuned.backbone, settings)
            tuned = replace(tuned, backbone=embedder.backbone)
            features = embed(
                tuned.backbone, data.manifest, embedder=embedder, n_threads=settings.workers,
                on_progress=watcher.progress,
            )  # fmt: skip
    with clock("evaluate"):
        watcher.step("evaluate")
        if tuned is None:
            classifier = _probe_classifier(data, probe)
        else:
            precision = embedder.engine.precision
            classifier = _tuned_classifier(tuned, data.manifest, features, parts, labels, precision, settings)
        predictions = {
            name: predict_features(classifier, features, rows, labels) for name, rows in parts.parts().items()
        }
        for name in predictions.keys() - {"train"}:  # the figures are about what predict will answer
            predictions[name] = with_second_look(classifier, predictions[name], data.manifest, features)
        evaluation = evaluate_parts(classifier, data.manifest, parts, predictions, settings.seed)
        if tuned is not None:
            evaluation |= {"n_parameters": tuned.n_parameters, "n_trainable": tuned.n_trainable}
        evaluation |= judge_leaks(
            predictions, data.manifest, parts, lambda part: evaluate_part(part, seed=settings.seed).as_dict(), watcher
        )
    return Judged(classifier, features, predictions, evaluation)


def _write_insights(
    folder: Path,
    path: str | os.PathLike[str],
    data: Gathered,
    probe: Probe,
    judged: Judged,
    is_tuned: bool,
    clock: Stopwatch,
) -> None:
    insights = find_insights(
        data.manifest,
        data.parts,
        data.groups,
        probe,
        data.features,
        judged.classifier,
        judged.features,
        judged.predictions,
        leaks=judged.evaluation.get("leaks"),
        is_tuned=is_tuned,
        embedding_rate=timing(clock, data.embedder)["images_per_second"],
        path=str(Path(path).absolute()),
        out=str(folder.absolute()),
        settings=as_dict(data.settings),
        seed=data.settings.seed,
    )
    write_json(folder / "insights.json", insights.as_dict())


def _write(
    folder: Path,
    data: Gathered,
    probe: Probe,
    tuned: TunedClassifier | None,
    judged: Judged,
    recipe: dict[str, Any],
) -> None:
    from topwork.shipping.card import model_card

    save_manifest(data.manifest, folder / "manifest.parquet")
    write_json(folder / "split.json", split_record(data.parts, data.manifest))
    write_json(folder / "recipe.json", recipe)
    write_history(folder / "history.jsonl", [*map(asdict, probe.trials), *(tuned.history if tuned else [])])
    save_predictions(judged.predictions, data.manifest, folder / "predictions.parquet")
    classifier = judged.classifier
    compiled = compiled_path(classifier.backbone) if data.embedder.engine.kind == "openvino" else None
    save_classifier(classifier, folder / "model", compiled, model_card(classifier))


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


def _probe_classifier(data: Gathered, probe: Probe) -> Classifier:
    """Folds the temperature, fitted on out-of-fold logits of train, into the head, and adds the decisions."""
    train = data.parts.train
    labels = data.labels[train]
    temperature = fit_temperature(probe.out_of_fold_logits, labels[probe.rows])
    head = probe.head.divided_by(temperature)
    head = head.folded() if head.kind == "plain" else head
    classifier = Classifier(data.backbone, head, data.manifest.classes, temperature, data.embedder.engine.precision)
    groups = np.asarray(data.groups)[train]
    return with_decisions(classifier, probe, labels, data.features.block("last", train), groups, data.settings)


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


def _recipe(data: Gathered, probed: Probed, tuned: TunedClassifier | None, classifier: Classifier) -> dict[str, Any]:
    """What was done, with no "auto" left in it."""
    probe, parts, embedder = probed.probe, data.parts, data.embedder
    recipe = {
        "mode": "probe",
        **probe_record(classifier, probe, embedder),
        "class_weights": None if probe.class_weights is None else probe.class_weights.tolist(),
        "temperature": classifier.temperature,
        "temperature_fitted_on": "out-of-fold logits of the train part",
        "valid_used_for": "figures only; nothing was chosen on it" if len(parts.valid) else "there is no valid part",
        "seed": parts.seed,
        "augment": probed.views[0].pipeline.name if probed.views else "none",
        "views": [view.name for view in probed.views],
        "views_tried": list(probed.tried),
        "balance": data.settings.balance,
        "near_duplicates": data.n_near,
    }
    if data.choice is not None:
        recipe |= {"backbones": data.choice.as_dict()}
    if tuned is not None:
        recipe |= {"mode": "tune", "tuning": tuned.recipe, "stages": tuned.stages, "probe": recipe["head"]}
        recipe["head"] = {
            "kind": classifier.head.kind,
            "candidate": f"tuned with the network, {head_spec(data.settings)}",
            "penalty": None,
            "n_features": int(classifier.head.weight.shape[1]),
            "reason": "tuned with the network; the heads of the probe, from which tuning starts, are below.",
        }
        recipe |= {"temperature_fitted_on": "valid", "valid_used_for": VALID_OF_TUNING}
    return recipe
