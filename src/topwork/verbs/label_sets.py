"""``topwork fit`` and ``evaluate`` where an image may have several labels: the steps that differ from one label an image.

``finish_label_sets`` takes over once the probe is fitted: a temperature and a threshold for each class from its
out-of-fold answers, then the figures of valid and test, and the same run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest, save_manifest
from topwork.data.sources import shown
from topwork.data.split import Split, rarest_labels, split_record
from topwork.errors import UsageError
from topwork.evaluation.label_sets import LabelPredictions, fit_label_temperature, fit_label_thresholds, sigmoid
from topwork.evaluation.multilabel import evaluate_multilabel
from topwork.evaluation.unknown import fit_unknown
from topwork.features.embed import Embedder, Features
from topwork.features.engine import compiled_path
from topwork.features.probe import Probe
from topwork.features.views import Probed
from topwork.models.classifier import Classifier, save_classifier
from topwork.run import save_predictions, versions, write_history, write_json
from topwork.settings import FitSettings
from topwork.verbs.leaks import judge_leaks
from topwork.verbs.steps import Stopwatch, Watcher, looked_again, probe_record, timing

ONLY_ONE_LABEL = {  # settings that need one label an image, and their defaults
    "mode": "probe",
    "balance": "auto",
    "target_precision": None,
}


@dataclass(frozen=True, eq=False)
class FittedLabelSets:
    """What a fit on data with several labels an image produced; see ``verbs.fit.Fitted``."""

    folder: Path
    manifest: Manifest
    split: Split
    classifier: Classifier
    probe: Probe
    predictions: dict[str, LabelPredictions]
    evaluation: dict[str, Any]
    recipe: dict[str, Any]


def check_settings(settings: FitSettings) -> None:
    """Names what cannot be asked of data with several labels an image.

    Raises:
        UsageError: one of those settings was given.
    """
    for name, default in ONLY_ONE_LABEL.items():
        if getattr(settings, name) != default:
            option = f"--{name.replace('_', '-')} {getattr(settings, name)}"
            raise UsageError(f"{option}: not with --multi-label, which trains a probe with a threshold for each label.")


def check_label_sets(manifest: Manifest, parts: Split, watcher: Watcher) -> None:
    """Says which labels cannot be learnt.

    Raises:
        UsageError: every training image has the same labels.
    """
    truth = manifest.label_matrix[parts.train]
    counts = truth.sum(0)
    if not ((counts > 0) & (counts < len(truth))).any():
        raise UsageError(
            f"{shown(str(manifest.root))}: every training image has the same labels, so there is nothing to learn. "
            "An empty label means an image with none of them."
        )
    untrained = [name for name, n in zip(manifest.classes, counts.tolist(), strict=True) if not n]
    if untrained:
        names = ", ".join(shown(name) for name in untrained[:5])
        watcher.note(f"{len(untrained)} labels have no training image, so they can never be given: {names}.")


def finish_label_sets(
    folder: Path,
    manifest: Manifest,
    features: Features,
    parts: Split,
    groups: Sequence[int],
    embedder: Embedder,
    probed: Probed,
    settings: FitSettings,
    watcher: Watcher,
    clock: Stopwatch,
) -> FittedLabelSets:
    """Temperature, thresholds, figures and the run folder."""
    truth, probe = manifest.label_matrix, probed.probe
    with clock("evaluate"):
        watcher.step("evaluate")
        classifier = _classifier(manifest, features, parts, groups, probe, embedder, settings)
        predictions = {
            name: predict_label_sets(classifier, manifest, features, rows, truth, careful=name != "train")
            for name, rows in parts.parts().items()
        }
        n_train = dict(zip(manifest.classes, truth[parts.train].sum(0).tolist(), strict=True))
        evaluation: dict[str, Any] = {
            name: judge(part, n_train, settings.seed) for name, part in predictions.items() if name != "train"
        }
        evaluation |= judge_leaks(
            predictions, manifest, parts, lambda part: judge(part, n_train, settings.seed), watcher
        )
    n_head = int(classifier.head.weight.size + classifier.head.bias.size)
    evaluation |= {"n_parameters": classifier.backbone.n_parameters + n_head, "n_trainable": n_head}
    recipe = _recipe(classifier, probed, parts, embedder)
    with clock("write"):
        watcher.step("write")
        judged = next((name for name in ("test", "valid") if name in evaluation), None)
        figures = evaluation[judged] if judged else None
        classifier = _with_provenance(classifier, manifest, n_train, judged, figures, settings.seed)
        _write(folder, manifest, parts, classifier, probe, predictions, recipe, embedder)
    evaluation["timing"] = timing(clock, embedder)
    write_json(folder / "evaluation.json", evaluation)
    return FittedLabelSets(folder, manifest, parts, classifier, probe, predictions, evaluation, recipe)


def predict_label_sets(
    classifier: Classifier,
    manifest: Manifest,
    features: Features,
    rows: NDArray[np.int64],
    truth: NDArray[np.bool_],
    *,
    careful: bool,
) -> LabelPredictions:
    """Logits of some rows from stored features; with ``careful``, the second look that ``Predictor`` takes as well.

    Args:
        truth: (N, C) labels of all of the manifest's samples, columns as the classifier's classes.
    """
    blocks = classifier.head.transform.blocks
    chunks = [
        classifier.head.logits({name: features.block(name, rows[start : start + 4096]) for name in blocks})
        for start in range(0, len(rows), 4096)
    ]
    logits = np.concatenate(chunks) if chunks else np.zeros((0, len(classifier.classes)))
    if careful:
        logits = looked_again(classifier, logits, sigmoid(logits), rows, manifest, features)
    thresholds = np.asarray(classifier.thresholds["labels"], np.float64)
    return LabelPredictions(classifier.classes, rows, truth[rows], logits, thresholds)


def judge(predictions: LabelPredictions, n_train: dict[str, int], seed: int) -> dict[str, Any]:
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


def _classifier(
    manifest: Manifest,
    features: Features,
    parts: Split,
    groups: Sequence[int],
    probe: Probe,
    embedder: Embedder,
    settings: FitSettings,
) -> Classifier:
    """Head with the temperature folded in, thresholds and unknown detector; all from out-of-fold values of train."""
    truth = manifest.label_matrix[parts.train]
    temperature = fit_label_temperature(probe.out_of_fold_logits, truth[probe.rows])
    limits = fit_label_thresholds(sigmoid(probe.out_of_fold_logits / temperature), truth[probe.rows])
    # One label an image is enough to find typical images with; those without any make up a class of their own.
    detector = fit_unknown(
        features.block("last", parts.train),
        rarest_labels(truth),
        settings.unknown_false_alarms,
        groups=np.asarray(groups)[parts.train],
    )
    head = probe.head.divided_by(temperature)
    return Classifier(
        embedder.backbone,
        head.folded() if head.kind == "plain" else head,
        manifest.classes,
        temperature,
        embedder.engine.precision,
        thresholds={
            "labels": [round(float(limit), 4) for limit in limits],
            "none_is_an_answer": bool((~truth.any(axis=1)).any()),
            "unknown": detector.threshold,
            "unknown_false_alarm_rate": detector.false_alarm_rate,
        },
        arrays={"unknown_centres": detector.centres},
        multi_label=True,
    )


def _with_provenance(
    classifier: Classifier,
    manifest: Manifest,
    n_train: dict[str, int],
    judged_on: str | None,
    figures: dict[str, Any] | None,
    seed: int,
) -> Classifier:
    kept = ("n", "accuracy", "mean_average_precision", "micro_f1")
    return replace(
        classifier,
        provenance={
            "data_digest": manifest.digest,
            "n_train": n_train,
            "judged_on": judged_on,
            "figures": {key: figures[key] for key in kept} if figures else None,
            "seed": seed,
            "versions": versions(),
        },
    )


def _recipe(classifier: Classifier, probed: Probed, parts: Split, embedder: Embedder) -> dict[str, Any]:
    """What was done, with no "auto" left in it."""
    probe = probed.probe
    return {
        "mode": "probe",
        "multi_label": True,
        **probe_record(classifier, probe, embedder),
        "temperature": classifier.temperature,
        "thresholds": classifier.thresholds["labels"],
        "temperature_fitted_on": "out-of-fold logits of the train part",
        "valid_used_for": "figures only; nothing was chosen on it" if len(parts.valid) else "there is no valid part",
        "seed": parts.seed,
    }


def _write(
    folder: Path,
    manifest: Manifest,
    parts: Split,
    classifier: Classifier,
    probe: Probe,
    predictions: dict[str, LabelPredictions],
    recipe: dict[str, Any],
    embedder: Embedder,
) -> None:
    from topwork.shipping.card import model_card

    save_manifest(manifest, folder / "manifest.parquet")
    write_json(folder / "split.json", split_record(parts, manifest))
    write_json(folder / "recipe.json", recipe)
    write_history(folder / "history.jsonl", [asdict(trial) for trial in probe.trials])
    save_predictions(predictions, manifest, folder / "predictions.parquet")
    compiled = compiled_path(classifier.backbone) if embedder.engine.kind == "openvino" else None
    save_classifier(classifier, folder / "model", compiled, model_card(classifier))
