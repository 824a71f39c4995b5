"""From a fitted head to a classifier that can be trusted, and its figures: temperature, decisions, answers, evaluation.

In: what was gathered, the probe, the tuned network where there is one. Out: :class:`Judged`. Where an image may have
several labels, ``commands/label_sets.py`` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topwork.commands.leaks import judge_leaks
from topwork.commands.prepare import Gathered
from topwork.commands.steps import evaluate_parts, predict_features
from topwork.evaluation.calibration import fit_temperature
from topwork.evaluation.decisions import fit_ambiguous
from topwork.evaluation.label_sets import LabelPredictions
from topwork.evaluation.metrics import evaluate_part
from topwork.evaluation.predictions import Predictions, softmax
from topwork.evaluation.unknown import UnknownDetector, fit_unknown
from topwork.features.probe import Probe
from topwork.models.classifier import Classifier
from topwork.progress import Reporter, Stopwatch
from topwork.settings import FitSettings

if TYPE_CHECKING:
    from topwork.training.finetune import TunedClassifier


@dataclass(frozen=True)
class Judged:
    """A classifier, its answers for every part, and the figures of the parts held back."""

    classifier: Classifier
    predictions: Mapping[str, Predictions | LabelPredictions]
    evaluation: dict[str, Any]


def judge(data: Gathered, probe: Probe, tuned: TunedClassifier | None, clock: Stopwatch, reporter: Reporter) -> Judged:
    """Calibrates the classifier and has it answer for every part.

    Args:
        data: with the backbone and the features that the head reads, so those of the tuned network where there is one.
    """
    settings, parts, labels = data.settings, data.parts, data.labels
    with clock("evaluate"):
        reporter.step("evaluate")
        classifier = _probe_classifier(data, probe) if tuned is None else _tuned_classifier(data, tuned)
        predictions = {
            name: predict_features(classifier, data.features_of(name), rows, labels)
            for name, rows in parts.parts().items()
        }
        evaluation = evaluate_parts(classifier, data.manifest, parts, predictions, settings.seed)
        evaluation |= judge_leaks(
            predictions, data.manifest, parts, lambda part: evaluate_part(part, seed=settings.seed).as_dict(), reporter
        )
    return Judged(classifier, predictions, evaluation)


def _probe_classifier(data: Gathered, probe: Probe) -> Classifier:
    """Temperature (folded into the head) and thresholds of a probe come from out-of-fold values of the train part."""
    settings, train = data.settings, data.parts.train
    labels = data.labels[train]
    temperature = fit_temperature(probe.out_of_fold_logits, labels[probe.rows])
    probabilities = softmax(probe.out_of_fold_logits / temperature)
    detector = fit_unknown(
        data.features.block("last", train), labels, settings.unknown_false_alarms, groups=np.asarray(data.groups)[train]
    )
    thresholds = {
        "unknown": detector.threshold,
        "unknown_false_alarm_rate": detector.false_alarm_rate,
        **fit_ambiguous(probabilities, labels[probe.rows], settings.coverage, settings.target_precision),
    }
    head = probe.head.divided_by(temperature)
    return Classifier(
        data.backbone,
        head.folded() if head.kind == "plain" else head,
        data.manifest.classes,
        temperature,
        data.embedder.engine.precision,
        thresholds,
        {"unknown_centres": detector.centers},
    )


def _tuned_classifier(data: Gathered, tuned: TunedClassifier) -> Classifier:
    """Temperature and thresholds of a tuned network come from valid: it has learned the training images by heart."""
    settings, parts, labels, features = data.settings, data.parts, data.labels, data.features
    answers = data.features_of("valid")
    held_out = answers.block("last", parts.valid)
    logits = tuned.head.logits(answers.blocks(tuned.head.transform.blocks, parts.valid))
    temperature = fit_temperature(logits, labels[parts.valid])
    probabilities = softmax(logits / temperature)
    detector = fit_unknown(features.block("last", parts.train), labels[parts.train], settings.unknown_false_alarms)
    thresholds = {
        **unknown_threshold(detector, held_out, settings),
        **fit_ambiguous(probabilities, labels[parts.valid], settings.coverage, settings.target_precision),
    }
    return Classifier(
        data.backbone,
        tuned.head.divided_by(temperature),
        data.manifest.classes,
        temperature,
        data.embedder.engine.precision,
        thresholds,
        {"unknown_centres": detector.centers},
    )


def unknown_threshold(
    detector: UnknownDetector, held_out: NDArray[np.float16], settings: FitSettings
) -> dict[str, float]:
    """The threshold of *unknown* for a tuned network: no lower than what as many images of valid stay below as was asked.

    Its training images lie closer together than any new ones will.
    """
    scores = np.sort(detector.score(held_out))
    rank = min(len(scores), math.ceil((len(scores) + 1) * (1 - settings.unknown_false_alarms))) - 1
    return {
        "unknown": max(detector.threshold, float(scores[rank])),
        "unknown_false_alarm_rate": settings.unknown_false_alarms,
    }
