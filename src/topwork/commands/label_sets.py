"""``topwork fit`` and ``evaluate`` where an image may have several labels: the steps that differ from one label an image.

A temperature and a threshold for each class from held-out answers, then the figures of valid and test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from topwork.commands.assess import Judged, unknown_threshold
from topwork.commands.leaks import judge_leaks
from topwork.commands.prepare import Gathered
from topwork.commands.steps import n_train_of, parameters_of
from topwork.data.split import rarest_labels
from topwork.errors import UsageError
from topwork.evaluation.calibration import fit_temperature
from topwork.evaluation.label_sets import LabelPredictions, fit_label_thresholds, sigmoid
from topwork.evaluation.multilabel import evaluate_multilabel
from topwork.evaluation.unknown import fit_unknown
from topwork.features.embed import Features
from topwork.features.probe import Probe
from topwork.models.classifier import Classifier
from topwork.progress import Reporter, Stopwatch
from topwork.settings import FitSettings

if TYPE_CHECKING:
    from topwork.training.finetune import TunedClassifier

ONLY_ONE_LABEL = {  # settings that need one label an image, and their defaults
    "balance": "auto",
    "target_precision": None,
}


def check_settings(settings: FitSettings) -> None:
    """Names what cannot be asked of data with several labels an image.

    Raises:
        UsageError: one of those settings was given.
    """
    for name, default in ONLY_ONE_LABEL.items():
        if getattr(settings, name) != default:
            option = f"--{name.replace('_', '-')} {getattr(settings, name)}"
            raise UsageError(f"{option}: not with --multi-label, which sets a threshold for each label.")


def judge_label_sets(
    data: Gathered, probe: Probe, tuned: TunedClassifier | None, clock: Stopwatch, reporter: Reporter
) -> Judged:
    """Temperature, thresholds and figures, as :func:`topwork.commands.assess.judge` does it for one label an image."""
    parts, truth, seed = data.parts, data.labels, data.settings.seed
    with clock("evaluate"):
        reporter.step("evaluate")
        classifier = _classifier(data, probe, tuned)
        predictions = {
            name: predict_label_sets(classifier, data.features_of(name), rows, truth)
            for name, rows in parts.parts().items()
        }
        n_train = n_train_of(data.manifest, parts)
        evaluation: dict[str, Any] = {
            name: figures(part, n_train, seed) for name, part in predictions.items() if name != "train"
        }
        evaluation |= judge_leaks(
            predictions, data.manifest, parts, lambda part: figures(part, n_train, seed), reporter
        )
    return Judged(classifier, predictions, evaluation | parameters_of(classifier))


def predict_label_sets(
    classifier: Classifier, features: Features, rows: NDArray[np.int64], truth: NDArray[np.bool_]
) -> LabelPredictions:
    """Logits of some rows from stored features.

    Args:
        truth: (N, C) labels of all of the manifest's samples, columns as the classifier's classes.
    """
    blocks = classifier.head.transform.blocks
    chunks = [
        classifier.head.logits(features.blocks(blocks, rows[start : start + 4096]))
        for start in range(0, len(rows), 4096)
    ]
    logits = np.concatenate(chunks) if chunks else np.zeros((0, len(classifier.classes)))
    thresholds = np.asarray(classifier.thresholds["labels"], np.float64)
    return LabelPredictions(classifier.classes, rows, truth[rows], logits, thresholds)


def figures(predictions: LabelPredictions, n_train: dict[str, int], seed: int) -> dict[str, Any]:
    """The figures of one part as ``evaluation.json`` holds them; accuracy is the share of images with every label right."""
    found = evaluate_multilabel(
        predictions.truth, predictions.probabilities, predictions.classes, predictions.thresholds, seed=seed
    ).as_dict()
    exact = found["intervals"].pop("exact_match", None) or {"low": None, "high": None}
    per_class = {
        name: {"n_train": n_train.get(name, 0), **scores, "threshold": round(float(threshold), 4)}
        for (name, scores), threshold in zip(found["per_class"].items(), predictions.thresholds, strict=True)
    }
    stated = predictions.probabilities
    return {
        "multi_label": True,
        "n": found["n"],
        "accuracy": {"value": found["exact_match"], "low": exact["low"], "high": exact["high"]},
        **{name: found[name] for name in ("mean_average_precision", "micro_f1", "macro_f1", "hamming_loss")},
        "calibration_error": calibration_error_of_labels(stated, predictions.truth),
        "n_labels_per_image": round(float(predictions.truth.sum(1).mean()), 3) if found["n"] else None,
        "n_labels_given_per_image": round(float(predictions.given.sum(1).mean()), 3) if found["n"] else None,
        "intervals": found["intervals"],
        "per_class": per_class,
        "classes": list(predictions.classes),
    }


def calibration_error_of_labels(probabilities: NDArray[np.float64], truth: NDArray[np.bool_]) -> float | None:
    """Mean gap between stated probability and share of images that have the label, over (image, class) pairs."""
    from topwork.evaluation.curves import calibration_error

    stated, right = probabilities.ravel(), truth.ravel()
    order = np.lexsort((right, stated))  # so that the sum does not depend on the order of the images
    return calibration_error(stated[order], right[order])


# ---- pieces


def _classifier(data: Gathered, probe: Probe, tuned: TunedClassifier | None) -> Classifier:
    """Head with the temperature folded in, thresholds and unknown detector.

    From out-of-fold answers of train for a probe; from valid for a tuned network, which knows train by heart.
    """
    settings, features, parts, truth = data.settings, data.features, data.parts, data.labels
    if tuned is None:
        head, logits, right = probe.head, probe.out_of_fold_logits, truth[parts.train][probe.rows]
    else:
        answers = data.features_of("valid")
        head, logits = tuned.head, tuned.head.logits(answers.blocks(tuned.head.transform.blocks, parts.valid))
        right = truth[parts.valid]
    temperature = fit_temperature(logits, right)
    limits = fit_label_thresholds(sigmoid(logits / temperature), right)
    # One label an image is enough to find typical images with; those without any make up a class of their own.
    detector = fit_unknown(
        features.block("last", parts.train),
        rarest_labels(truth[parts.train]),
        settings.unknown_false_alarms,
        groups=np.asarray(data.groups)[parts.train] if tuned is None else None,
    )
    unknown = {"unknown": detector.threshold, "unknown_false_alarm_rate": detector.false_alarm_rate}
    if tuned is not None:
        unknown = unknown_threshold(detector, answers.block("last", parts.valid), settings)
    head = head.divided_by(temperature)
    return Classifier(
        data.backbone,
        head.folded() if head.kind == "plain" else head,
        data.manifest.classes,
        temperature,
        data.embedder.engine.precision,
        thresholds={
            "labels": [round(float(limit), 4) for limit in limits],
            "none_is_an_answer": bool((~truth[parts.train].any(axis=1)).any()),
            **unknown,
        },
        arrays={"unknown_centres": detector.centers},
        multi_label=True,
    )
