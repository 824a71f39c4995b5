"""From a fitted head to an evaluated classifier: temperature, decision rule, predictions and metrics.

In: the prepared data, the probe, and the tuned network if there is one. Out: :class:`Assessed`. Single-label and
multi-label models differ only in how thresholds are fitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topwork.commands.prepare import PreparedData
from topwork.data.manifest import Manifest
from topwork.data.split import Split, n_train_of, rarest_labels
from topwork.errors import UsageError
from topwork.evaluation.calibration import (
    count_outcomes,
    fit_ambiguous,
    fit_positive,
    fit_temperature,
    fit_thresholds,
    too_few_sentence,
)
from topwork.evaluation.metrics import evaluate_held_out, evaluate_part, headline, leak_sentence
from topwork.evaluation.predictions import Predictions, predict_features, sigmoid, softmax
from topwork.evaluation.similarity import UnknownDetector, fit_unknown
from topwork.features.probe import Probe
from topwork.models.classifier import Classifier
from topwork.models.head import LinearHead
from topwork.progress import Reporter, Steps
from topwork.settings import FitSettings
from topwork.text import canonical, escape

if TYPE_CHECKING:
    from topwork.training.finetune import TunedClassifier

TRAIN_LOGITS = 100_000_000  # maximum in predictions.parquet: 100,000 images of 1,000 classes
ONLY_ONE_LABEL = {"balance": "auto", "target_precision": None, "positive": None, "zero_shot": None}
"""Settings that need exactly one label per image, with their defaults."""


@dataclass(frozen=True)
class Assessed:
    """A classifier, its predictions for every part, and the metrics of the held-out parts."""

    classifier: Classifier
    predictions: Mapping[str, Predictions]
    evaluation: dict[str, Any]


def check_labels(settings: FitSettings) -> None:
    """Rejects settings that cannot be combined with several labels per image, or with each other.

    Raises:
        UsageError: naming the option.
    """
    for name, default in ONLY_ONE_LABEL.items():
        if settings.multi_label and getattr(settings, name) != default:
            option = f"--{name.replace('_', '-')} {getattr(settings, name)}"
            raise UsageError(f"{option} cannot be combined with --multi-label, which fits a threshold per label.")
    for name in ("positive_recall", "miss_cost"):
        if settings.positive is None and getattr(settings, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} has no effect without --positive NAME.")
    if settings.positive_recall is not None and settings.miss_cost is not None:
        raise UsageError("--positive-recall and --miss-cost both set the threshold; use one of them.")
    if settings.positive is not None and settings.target_precision is not None:
        raise UsageError("--positive and --target-precision both set thresholds; use one of them.")


def assess(data: PreparedData, probe: Probe, tuned: TunedClassifier | None, steps: Steps) -> Assessed:
    """Calibrates the classifier, predicts every part, and evaluates the held-out parts.

    Args:
        data: with the backbone and features of the tuned network, if there is one.
    """
    parts, seed, reporter = data.parts, data.settings.seed, steps.reporter
    with steps("evaluate"):
        classifier = _classifier(data, probe, tuned)
        predictions = {}
        for name, rows in parts.parts().items():
            shown = _shown(name, rows, classifier, reporter)
            predictions[name] = predict_features(classifier, data.features_of(name), shown, data.labels)
        evaluation = evaluate_parts(classifier, data.manifest, parts, predictions, seed)
        for name in predictions.keys() - {"train"}:
            last = data.features_of(name).block("last", parts.parts()[name])
            evaluation[name]["outcomes"] = count_outcomes(classifier, predictions[name], last)[1]
    leaks = [leak_sentence(name, evaluation) for name in evaluation.get("leaks", {})]
    for note in filter(None, [too_few_sentence(classifier.thresholds), *leaks]):
        reporter.note(note)
    return Assessed(classifier, predictions, evaluation)


def _classifier(data: PreparedData, probe: Probe, tuned: TunedClassifier | None) -> Classifier:
    """The head including the temperature, the thresholds and the unknown detector.

    They are fitted on out-of-fold predictions of train for a probe, and on valid for a tuned network, which has
    overfitted train.
    """
    settings, features, parts, labels = data.settings, data.features, data.parts, data.labels
    answers = data.features_of("valid")
    if tuned is None:
        head, logits, truth = probe.head, probe.out_of_fold_logits, labels[parts.train][probe.rows]
    else:
        head, logits = tuned.head, tuned.head.logits(answers.blocks(tuned.head.transform.blocks, parts.valid))
        truth = labels[parts.valid]
    temperature, several = fit_temperature(logits, truth), data.manifest.multi_label
    # One label per image is enough for the unknown detector; images without labels form their own class.
    trained = rarest_labels(labels[parts.train]) if several else labels[parts.train]
    groups = np.asarray(data.groups)[parts.train] if tuned is None else None
    detector = fit_unknown(features.block("last", parts.train), trained, settings.unknown_false_alarms, groups=groups)
    unknown = {"unknown": detector.threshold, "unknown_false_alarm_rate": detector.false_alarm_rate}
    if tuned is not None:
        rate = settings.unknown_false_alarms
        limit = _threshold_of_unknown(detector, answers.block("last", parts.valid), rate)
        unknown = {"unknown": limit, "unknown_false_alarm_rate": rate}
    if several:
        limits = [round(float(one), 4) for one in fit_thresholds(sigmoid(logits / temperature), truth)]
        rule = {"labels": limits, "none_is_an_answer": bool((~labels[parts.train].any(axis=1)).any())}
    elif settings.positive is not None:
        classes = data.manifest.classes
        label = [canonical(name) for name in classes].index(canonical(settings.positive))
        stated, recall, miss_cost = softmax(logits / temperature), settings.positive_recall, settings.miss_cost
        threshold, by = fit_positive(stated, truth, label, recall=recall, miss_cost=miss_cost)
        rule = {"positive": {"class": classes[label], "threshold": threshold, "by": by}}
    else:
        rule = fit_ambiguous(softmax(logits / temperature), truth, settings.coverage, settings.target_precision)
    head = head.divided_by(temperature)
    return Classifier(
        data.backbone,
        head.folded() if head.kind == "plain" else head,
        data.manifest.classes,
        temperature,
        data.embedder.engine.precision,
        thresholds={**unknown, **rule},
        arrays={"unknown_centres": detector.centers},
        multi_label=several,
    )


def _shown(name: str, rows: NDArray[np.int64], classifier: Classifier, reporter: Reporter) -> NDArray[np.int64]:
    """The rows of a part whose predictions are saved; limited for train, which is not evaluated."""
    step = math.ceil(len(rows) * len(classifier.classes) / TRAIN_LOGITS) if name == "train" else 1
    if step <= 1:
        return rows
    reporter.note(
        f"predictions.parquet holds every {step}th training image: all of them with their logits would be too many."
    )
    return rows[::step]


def check_positive(settings: FitSettings, classes: Sequence[str]) -> None:
    """Checks that ``--positive`` names one of two classes.

    Raises:
        UsageError: it does not.
    """
    name = settings.positive
    if name is None:
        return
    if len(classes) != 2:
        raise UsageError(f"--positive {escape(name)}: needs exactly two classes; the data has {len(classes)}.")
    if canonical(name) not in map(canonical, classes):
        known = " and ".join(map(escape, classes))
        raise UsageError(f"--positive {escape(name)}: no such class. The classes are {known}.")


def _threshold_of_unknown(detector: UnknownDetector, held_out: NDArray[np.float16], rate: float) -> float:
    """The threshold for a tuned network: at least as high as the scores of the known images of valid.

    To a tuned network, training images look more alike than new ones.
    """
    scores = np.sort(detector.score(held_out))
    rank = min(len(scores), math.ceil((len(scores) + 1) * (1 - rate))) - 1
    return max(detector.threshold, float(scores[rank]))


def evaluate_parts(
    classifier: Classifier, manifest: Manifest, parts: Split, predictions: Mapping[str, Predictions], seed: int
) -> dict[str, Any]:
    """The metrics of valid and test and the numbers of parameters, as in ``evaluation.json``."""
    leaked = dict(parts.leaks)
    found = evaluate_held_out(predictions, leaked, n_train_of(manifest, parts), seed)
    for name, leaks in found.get("leaks", {}).items():
        rows = [row for row in predictions[name].sample_indices.tolist() if row in leaked]
        leaks["pairs"] = [[manifest.samples[row].path, manifest.samples[leaked[row]].path] for row in rows]
    n_head = int(classifier.head.weight.size + classifier.head.bias.size)
    return found | {"n_parameters": classifier.backbone.n_parameters + n_head, "n_trainable": n_head}


def zero_shot_accuracy(data: PreparedData, head: LinearHead, evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracy of a zero-shot head on the images of the headline; None if nothing was held out."""
    found = headline(evaluation)
    if found is None:
        return None
    name, figures = found
    rows = data.parts.parts()[name]
    if f"{name}_without_leaks" in evaluation:
        rows = rows[~np.isin(rows, list(dict(data.parts.leaks)))]
    classes = data.manifest.classes
    logits = head.logits(data.features.blocks(head.transform.blocks, rows))
    measured = evaluate_part(Predictions(classes, rows, data.labels[rows], logits), n_resamples=0)
    assert measured["n"] == figures["n"], "the same images as the classifier's"
    return {"prompt": data.settings.zero_shot, "part": name, "n": measured["n"], "accuracy": measured["accuracy"]}
