"""Confidence: calibration, abstention, the thresholds of two classes, and how accuracy depends on the number of images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from topwork.blocks import Beside, Block, Cell, Chart, Fold, Series, Share, Stack, Table, Text, as_share
from topwork.evaluation.calibration import too_few_sentence
from topwork.evaluation.curves import positive_scores, rank_correlation, reliability_bins, threshold_curve
from topwork.evaluation.predictions import Floats, Predictions
from topwork.report.pictures import Album
from topwork.report.run_data import Record
from topwork.text import count, escape, percent, points, quoted

MIN_CLASSES = 5  # for accuracy by class size
MAX_DOTS = 1000
MAX_POINTS = 200  # per curve
WANTED_RECALLS = (0.9, 0.95, 0.99)


def confidence(record: Record, _album: Album) -> list[Block]:
    """Calibration and abstention first, then thresholds and the two relations."""
    part = record.main_part
    blocks: list[Block] = []
    if part is not None and not record.manifest.multi_label:
        predictions = record.predictions[part]
        ece = percent(record.evaluation[part]["ece"])
        note = f"Dots: observed accuracy with 95% CI. On the dashed line, the model is perfectly calibrated: predictions with 80% probability are correct 80% of the time. Expected calibration error: {ece}."  # fmt: skip
        blocks.append(Beside(([reliability(predictions, note)], _abstention(record))))
        blocks += _two_classes(part, predictions)
    more = [*_learning_curve(record), *_class_sizes(record)]
    return blocks + ([Beside(tuple([one] for one in more))] if more else [])


def reliability(predictions: Predictions, note: str = "") -> Chart:
    """The reliability diagram."""
    bins = reliability_bins(predictions)
    most = max((found.n for found in bins), default=1)
    spans = tuple((found.accuracy_interval.low, found.accuracy_interval.high) for found in bins)
    labels = tuple(
        f"{count(b.n, 'image')}: mean probability {percent(b.confidence)}, accuracy {Share(b.accuracy, *span)}"
        for b, span in zip(bins, spans, strict=True)
    )
    sizes = tuple(round(2.5 + 4.5 * (found.n / most) ** 0.5, 2) for found in bins)
    series = (
        Series("perfectly calibrated", ((0.0, 0.0), (1.0, 1.0)), kind="dashed", color=0),
        Series("model", tuple((b.confidence, b.accuracy) for b in bins), spans, "dots", labels, sizes, color=1),
    )
    return Chart("Calibration", "predicted probability", "accuracy", series, x_is_share=True, y_is_share=True,
                 x_range=(0, 1), y_range=(0, 1), has_legend=False, note=note)  # fmt: skip


# ---- abstention


def _abstention(record: Record) -> list[Block]:
    decisions = record.insights.get("decisions") or {}
    parts = decisions.get("parts") or {}
    if not parts:
        return []
    rows = []
    for name, part in parts.items():
        n = part["n"] or 1
        shares = [part[f"n_{kind}"] / n for kind in ("label", "ambiguous", "unknown")]
        stack = Stack(tuple(zip(("label", "ambiguous", "unknown"), shares, strict=True)))
        rows.append((name, stack, *(Cell(percent(share), share) for share in shares)))
    first = next(iter(parts.values()))
    avoided = f"Of {count(first['n_wrong'], 'error')}, abstention avoids {first['wrong_left_open']:,}."
    right = first["accuracy_of_labels"]
    if right:
        avoided = f"Of the other answers, {as_share(right)} are correct. {avoided}"
    return [
        Table("Abstention", ("Part", "", "Label", "Ambiguous", "Unknown"), tuple(rows)),
        *(Text(text, "small") for text in (avoided, *rules(decisions.get("thresholds") or {}))),
    ]


def rules(thresholds: dict[str, Any]) -> list[str]:
    """The rules for ambiguous and unknown, in words."""
    said = []
    if thresholds.get("target_precision") is not None:
        met = {"about": "; estimated on few images", "no": "; no threshold achieves it"}
        said.append(
            f"Ambiguous: probability below {percent(thresholds['confidence'])}, so that {percent(thresholds['target_precision'])} "
            f"of the answers are correct{met.get(str(thresholds.get('target_precision_met')), '')}."
        )
    elif thresholds.get("set_probability") is not None:
        said.append(
            f"Ambiguous: the model can't narrow it down to one class (cutoff {percent(thresholds['set_probability'])})."
        )
    few, positive = too_few_sentence(thresholds), thresholds.get("positive")
    if few:
        said.append(few)
    if positive:
        said.append(
            f"{quoted(positive['class'])} is predicted if its probability is at least {percent(positive['threshold'])} ({positive['by']})."
        )
    if thresholds.get("unknown") is not None:
        rate = percent(thresholds.get("unknown_false_alarm_rate"), 0)
        said.append(f"Unknown: unlike the training images (false-positive rate {rate}).")
    return said


# ---- two classes


def _two_classes(part: str, predictions: Predictions) -> list[Block]:
    """ROC and precision-recall curve of the positive class, and thresholds for a target recall."""
    if predictions.n_classes != 2:
        return []
    is_positive, scores = positive_scores(predictions)
    found = threshold_curve(is_positive, scores)
    if found is None:
        return []
    in_use = _threshold_in_use(predictions)
    share, name = float(is_positive.mean()), quoted(predictions.classes[predictions.task.positive], 24)
    chance = Series("chance", ((0.0, 0.0), (1.0, 1.0)), kind="dashed", color=0)
    # The ROC curve starts at a threshold that no image reaches.
    false, true = (np.insert(values, 0, 0.0) for values in (found.false_positive_rate, found.recall))
    roc_line = _curve(false, true, np.insert(found.thresholds, 0, np.inf), in_use)
    pr_line = _curve(found.recall, found.precision, found.thresholds, in_use)
    charts = (
        Chart("ROC curve", "false positive rate", "true positive rate", (chance, roc_line),
              x_is_share=True, y_is_share=True, has_legend=False),
        Chart("Precision-recall curve", "recall", "precision",
              (Series("chance", ((0.0, share), (1.0, share)), kind="dashed", color=0), pr_line), x_is_share=True, y_is_share=True, has_legend=False),
    )  # fmt: skip
    rows = _threshold_rows(scores, is_positive, in_use)
    columns = ("Threshold", "Recall", "Precision", "False positive rate")
    note = f"Positive class: {name}. The ring marks the threshold in use; hover over a curve to see others."
    return [
        Fold(f"Thresholds for {name}, {part}", [
            Beside(tuple([chart] for chart in charts)),
            Table("Thresholds", columns, rows, note, heading=False, chosen=(0,)),
        ])
    ]  # fmt: skip


def _threshold_in_use(predictions: Predictions) -> float:
    """The score threshold of the positive class; 0 for the more probable class."""
    limits, positive = predictions.task.limits(2), predictions.task.positive
    return math.log(float(limits[positive]) / float(limits[1 - positive]))


def _curve(x: Floats, y: Floats, thresholds: Floats, in_use: float) -> Series:
    """Points, subsampled if there are many, each with its threshold as a probability; the one in use has a ring."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int)).tolist()
    at = max(0, int((thresholds >= in_use).sum()) - 1)
    mark = (float(x[at]), float(y[at]))
    labels = tuple(
        f"from {percent(_probability(float(thresholds[i])))}: {percent(float(x[i]))}, {percent(float(y[i]))}"
        for i in kept
    )
    points_ = tuple((float(x[i]), float(y[i])) for i in kept)
    return Series("model", points_, labels=labels, mark=mark, color=1, is_strong=True)


def _probability(score: float) -> float:
    return 0.5 * (1 + math.tanh(0.5 * score))


def _threshold_rows(scores: Floats, is_positive: Any, in_use: float) -> tuple[tuple[Any, ...], ...]:
    """The threshold in use, then the highest threshold for each target recall."""
    positive = np.sort(scores[is_positive])[::-1]
    chosen = [in_use]
    for recall in WANTED_RECALLS:
        chosen.append(float(positive[math.ceil(recall * len(positive)) - 1]))
    rows = []
    for number, limit in enumerate(chosen):
        given = scores >= limit
        hits, n_given = int((given & is_positive).sum()), int(given.sum())
        recall, wrong = hits / len(positive), int((given & ~is_positive).sum()) / max(int((~is_positive).sum()), 1)
        precision = hits / n_given if n_given else None
        text = percent(_probability(limit)) + (" (in use)" if number == 0 else "")
        rows.append((text, Share(recall), Share(precision), Share(wrong)))
    return tuple(rows)


# ---- images


def _learning_curve(record: Record) -> list[Block]:
    found = record.insights.get("learning_curve")
    if not found:
        return []
    measured, forecasts = found["points"], found["forecasts"]
    gain, low, high = (points(value) for value in found["gain"])
    series = (
        Series("expected", tuple((p["n"], p["accuracy"]) for p in forecasts), tuple((p["low"], p["high"]) for p in forecasts), "band", color=2),
        Series("fitted", tuple((n, min(v, 1.0)) for n, v in found.get("line", ())) or ((measured[0]["n"], measured[0]["accuracy"]),), kind="dashed", color=2),
        Series("measured", tuple((p["n"], p["accuracy"]) for p in measured), tuple((p["low"], p["high"]) for p in measured), "dots", color=1),
    )  # fmt: skip
    note = f"Cross-validated on train, with 95% CI. Twice the images: {gain} points expected ({low} to {high})."
    marks = tuple((float(p["n"]), f"{p['n']:,}") for p in (measured[0], measured[-1], *forecasts[1:]))
    return [Chart("Learning curve", "training images", "accuracy", series, "log", y_is_share=True, x_ticks=marks, note=note)]  # fmt: skip


def _class_sizes(record: Record) -> list[Block]:
    """Recall of each class by number of training images, and their correlation."""
    part = record.main_part
    if part is None or record.manifest.multi_label or len(record.manifest.classes) < MIN_CLASSES:
        return []
    scores = [(name, s["n_train"], s["recall"]) for name, s in record.evaluation[part]["per_class"].items()]
    known = [(max(n_train or 0, 1), recall, name) for name, n_train, recall in scores if recall is not None]
    sizes = [n for n, _, _ in known]
    if not sizes or max(sizes) < 1.5 * min(sizes):
        return []
    correlation = rank_correlation(sizes, [recall for _, recall, _ in known])
    rows = known[:MAX_DOTS]
    labels = tuple(
        f"{escape(name)}: recall {percent(recall)}, {count(n, 'training image')}" for n, recall, name in rows
    )
    series = Series("classes", tuple((float(n), recall) for n, recall, _ in rows), kind="dots", labels=labels, color=1)
    return [Chart("Recall by class size", "training images", "recall", (series,),
                  "log" if max(sizes) > 8 * min(sizes) else "linear", y_is_share=True, y_range=(0, 1),
                  note=_size_sentence(correlation))]  # fmt: skip


def _size_sentence(found: tuple[float, float] | None) -> str:
    if found is None:
        return "All classes have the same recall."
    correlation, p_value = found
    facts = f"Rank correlation {correlation:+.2f}, p = {p_value:.2g}"
    if p_value >= 0.05:
        return f"{facts}: no significant relation."
    return f"{facts}: classes with more training images have {'higher' if correlation > 0 else 'lower'} recall."
