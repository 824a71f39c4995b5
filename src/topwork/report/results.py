"""The results of a run and its mistakes: in goes a :class:`Record`, out come plain values for two templates.

Figures with their intervals, the confusion matrix with the images behind its cells, classes, pairs, the reliability
diagram, and wrong answers with their pictures. The numbers are those of ``evaluation.json``; nothing is judged again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from topwork.evaluation.curves import precision_recall_curve, reliability_bins, roc_curve
from topwork.evaluation.metrics import Metric, metrics_of, positive_scores
from topwork.evaluation.predictions import Floats, Predictions
from topwork.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, Scale, line_plot, tick_percent
from topwork.report.pictures import MISTAKE, RIGHT_ANSWER, Album
from topwork.report.run_data import Record
from topwork.report.summary import CONFIDENT, majority_share, recall_interval
from topwork.text import decimal, escape, percent, quoted

MAX_MATRIX = 40  # classes in the matrix; with more, those with most mistakes
MAX_CLASSES = 1000  # in the table of classes
MAX_MISTAKES = (400, 150)  # pictures of mistakes of the part that comes first, and of the other
MAX_PAIRS = 12
MAX_IN_CELL = 60
MAX_POINTS = 200  # of a curve
N_OPEN = 24  # mistakes that are open at first; the rest unfolds


def results(record: Record, album: Album) -> dict[str, Any]:
    """The figures of every judged part: metrics, confusion matrix, classes, pairs, reliability."""
    return {"parts": [_part(record, name, predictions, album) for name, predictions in record.predictions.items()]}


def _part(record: Record, name: str, predictions: Predictions, album: Album) -> dict[str, Any]:
    judged, cells = record.evaluation[name], record.confusion(name)
    return {
        "name": name,
        "n": judged["n"],
        "n_right": sum(n for (true, predicted), n in cells.items() if true == predicted),
        "n_unknown_class": judged.get("n_unknown_class", 0),
        "figures": figures(record, name),
        "matrix": _matrix(judged["classes"], cells),
        "gallery": _gallery(predictions, album),
        "per_class": _per_class(judged)[:MAX_CLASSES],
        "n_classes": len(judged["classes"]),
        "pairs": _pairs(judged["classes"], cells),
        "reliability": _reliability(predictions),
        "curves": _two_class_curves(predictions),
        "ece": percent(judged["ece"]),
    }


def figures(record: Record, part: str) -> list[dict[str, Any]]:
    """The metrics of a part with intervals, bars and a hint; accuracy first, cross-entropy last."""
    judged = record.evaluation[part]
    rows = {metric.key: metric_figure(metric, judged) for metric in metrics_of(judged)}
    baseline = majority_share(record, part)
    rows["accuracy"] |= {"baseline": baseline, "hint": f"always answering the largest class: {percent(baseline)}"}
    if "average_precision" in rows:
        name = judged["classes"][1]
        chance = decimal(judged["per_class"][name]["n"] / judged["n"], 2)
        rows["average_precision"]["hint"] += f" of {quoted(name, 24)}; chance gives {chance}"
    return list(rows.values())


def metric_figure(metric: Metric, judged: dict[str, Any]) -> dict[str, Any]:
    """One metric: its text, interval, bar and hint."""
    found = metric.figure(judged)
    value, low, high = found["value"], found["low"], found["high"]
    interval = (low, high) if low is not None and high is not None else None
    return {
        "label": metric.title,
        "value": metric.text(value),
        "low": metric.text(low) if interval else None,
        "high": metric.text(high) if interval else None,
        "bar": None if metric.unit == "nats" else bar_of(value, interval),
        "hint": metric.hint,
        "baseline": None,
    }


def bar_of(value: float | None, interval: tuple[float, float] | None) -> dict[str, float] | None:
    """Positions in percent of the bar's length."""
    if value is None:
        return None
    low, high = interval or (value, value)
    return {name: round(100 * min(max(v, 0), 1), 2) for name, v in (("value", value), ("low", low), ("high", high))}


def _matrix(classes: Sequence[str], cells: dict[tuple[int, int], int]) -> dict[str, Any]:
    """Rows of the matrix; with many classes, only those in most mistakes."""
    n_true: Counter[int] = Counter()
    n_mistakes: Counter[int] = Counter()
    for (true, predicted), n in cells.items():
        n_true[true] += n
        if true != predicted:
            n_mistakes[true] += n
            n_mistakes[predicted] += n
    labels = sorted(sorted(range(len(classes)), key=lambda label: (-n_mistakes[label], label))[:MAX_MATRIX])
    names = [escape(classes[label]) for label in labels]
    size = "s" if len(labels) <= 4 else "m" if len(labels) <= 12 else "l" if len(labels) <= 24 else "xl"
    inside = set(labels)
    n_outside = sum(n for (t, p), n in cells.items() if t != p and not (t in inside and p in inside))
    rows = [
        {"name": name, "cells": [_cell(t, p, cells.get((t, p), 0), n_true[t]) for p in labels]}
        for t, name in zip(labels, names, strict=True)
    ]
    return {"rows": rows, "names": names, "size": size, "n_all": len(classes), "n_outside": n_outside}


def _cell(true: int, predicted: int, n: int, n_true: int) -> dict[str, Any]:
    """One cell: its count, share of the true class, and color: ``d`` right or ``e`` wrong with a level 1..8."""
    share = n / n_true if n_true else 0.0
    strength = share if true == predicted else share**0.5  # rare mistakes must still be seen
    color = f"{'d' if true == predicted else 'e'}{max(1, round(8 * strength))}" if n else "z"
    return {"true": true, "predicted": predicted, "n": n, "share": percent(share), "color": color}


def _gallery(predictions: Predictions, album: Album) -> dict[str, list[int]]:
    """Rows of the manifest to show for each cell, ``"true,predicted"``; the surest answers first."""
    n_classes = predictions.n_classes
    n_each = 12 if n_classes <= 4 else 6 if n_classes <= 20 else 3 if n_classes <= 60 else 1
    chosen: dict[str, list[int]] = {}
    for position in np.argsort(-predictions.confidence, kind="stable").tolist():
        true, predicted = int(predictions.labels[position]), int(predictions.predicted[position])
        rows = chosen.setdefault(f"{true},{predicted}", [])
        row = int(predictions.sample_indices[position])
        if true == predicted and len(rows) < n_each:
            rows.append(album.want(row, RIGHT_ANSWER, in_page=False))
        elif true != predicted and len(rows) < MAX_IN_CELL:
            rows.append(row)  # its picture is asked for by the section of mistakes
    return chosen


def _per_class(judged: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a class, the lowest recall first; classes without images in the part last."""
    rows, intervals = [], judged.get("per_class_intervals", {})
    for name, scores in judged["per_class"].items():
        interval = recall_interval(scores["recall"], scores["n"]) if scores["recall"] is not None else None
        rows.append(
            {
                "name": escape(name),
                "n_train": scores["n_train"],
                "n": scores["n"],
                "recall": scores["recall"],
                "recall_text": percent(scores["recall"]),
                "low": percent(interval[0], 0) if interval else "",
                "high": percent(interval[1], 0) if interval else "",
                "bar": bar_of(scores["recall"], interval),
                "precision": scores["precision"],
                "precision_text": percent(scores["precision"]),
                "precision_span": _span(intervals.get(name, {}).get("precision"), lambda v: percent(v, 0)),
                "f1": scores["f1"],
                "f1_text": decimal(scores["f1"]),
                "f1_span": _span(intervals.get(name, {}).get("f1"), lambda v: decimal(v, 2)),
            }
        )
    return sorted(rows, key=lambda row: (row["recall"] is None, row["recall"] or 0, -row["n"]))


def _span(interval: dict[str, float] | None, text: Callable[[float], str]) -> str:
    return f"{text(interval['low'])} to {text(interval['high'])}" if interval else ""


def _pairs(classes: Sequence[str], cells: dict[tuple[int, int], int]) -> list[dict[str, Any]]:
    n_true: Counter[int] = Counter()
    for (true, _), n in cells.items():
        n_true[true] += n
    wrong = sorted((-n, -n / n_true[t], t, p) for (t, p), n in cells.items() if t != p)
    return [
        {
            "true": t,
            "predicted": p,
            "true_name": escape(classes[t]),
            "predicted_name": escape(classes[p]),
            "n": -n,
            "share": percent(-s),
        }
        for n, s, t, p in wrong[:MAX_PAIRS]
    ]


def _reliability(predictions: Predictions) -> dict[str, Any]:
    """Positions of a reliability diagram, with its numbers."""
    x, y = Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(0, 1, HEIGHT - BOTTOM, TOP)
    bins = reliability_bins(predictions)
    most = max(found.n for found in bins)
    rows = []
    for found in bins:
        if found.confidence is None or found.accuracy is None or found.accuracy_interval is None:
            continue
        rows.append(
            {
                "x": x(found.confidence),
                "y": y(found.accuracy),
                "low": y(found.accuracy_interval.low),
                "high": y(found.accuracy_interval.high),
                "radius": round(2.5 + 4.5 * (found.n / most) ** 0.5, 2),
                "n": found.n,
                "range": f"{percent(found.low, 0)} to {percent(found.high, 0)}",
                "confidence": percent(found.confidence),
                "accuracy": percent(found.accuracy),
                "interval": f"{percent(found.accuracy_interval.low)} to {percent(found.accuracy_interval.high)}",
            }
        )
    marks = [(x(v / 4), y(v / 4), tick_percent(v / 4)) for v in range(5)]
    frame = {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM}
    return {"rows": rows, "ticks": marks, **frame, "width": WIDTH, "height": HEIGHT}


def _two_class_curves(predictions: Predictions) -> dict[str, Any] | None:
    """ROC and precision-recall curve of the second of two classes; the mark is the more likely class, the rule in use."""
    if predictions.n_classes != 2:
        return None
    is_positive, scores = positive_scores(predictions)
    roc, recalled = roc_curve(is_positive, scores), precision_recall_curve(is_positive, scores)
    if roc is None or recalled is None:
        return None
    share = float(is_positive.mean())
    chance = Line("guessing", ((0.0, 0.0), (1.0, 1.0)), 6)
    at = max(0, int((roc.thresholds >= 0).sum()) - 1)
    line = Line("model", *_curve(roc.false_positive_rate, roc.true_positive_rate, at))
    first = line_plot(
        "ROC curve: true against false positives",
        [chance, line],
        "false positives",
        "true positives",
        tick_percent,
        x_text=tick_percent,
    )
    chance = Line("guessing", ((0.0, share), (1.0, share)), 6)
    line = Line(
        "model", *_curve(recalled.recall, recalled.precision, max(0, int((recalled.thresholds >= 0).sum()) - 1))
    )
    second = line_plot(
        "Precision against recall", [chance, line], "recall", "precision", tick_percent, x_text=tick_percent
    )
    return {"plots": [asdict(first), asdict(second)], "positive": quoted(predictions.classes[1])}


def _curve(x: Floats, y: Floats, at: int) -> tuple[tuple[tuple[float, float], ...], int, bool, tuple[float, float]]:
    """Points, thinned where they are many, color, strength, and the point to mark."""
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_POINTS)).round().astype(int))
    points = tuple(zip(x[kept].tolist(), y[kept].tolist(), strict=True))
    return points, 1, True, (float(x[at]), float(y[at]))


# ---- mistakes


def mistakes(record: Record, album: Album) -> dict[str, Any]:
    """Wrong answers with their pictures, the highest loss first."""
    cards, n_all = [], 0
    for (part, predictions), most in zip(record.predictions.items(), MAX_MISTAKES, strict=False):
        wrong = np.flatnonzero(~predictions.correct)
        n_all += len(wrong)
        order = wrong[np.argsort(-predictions.loss[wrong], kind="stable")]
        cards += [_card(record, part, predictions, position) for position in order[:most].tolist()]
    cards.sort(key=lambda card: -card["loss"])
    for card in cards:
        album.want(card["row"], MISTAKE)
    names = sorted({(label, name) for card in cards for label, name in card["labels"]})
    return {
        "cards": cards,
        "n_open": N_OPEN,
        "n_all": n_all,
        "n_confident": sum(card["probability"] >= CONFIDENT for card in cards),
        "confident": percent(CONFIDENT, 0),
        "classes": names,
        "parts": sorted({card["part"] for card in cards}),
    }


def _card(record: Record, part: str, predictions: Predictions, position: int) -> dict[str, Any]:
    true, predicted = int(predictions.labels[position]), int(predictions.predicted[position])
    row = int(predictions.sample_indices[position])
    names = escape(predictions.classes[true]), escape(predictions.classes[predicted])
    return {
        "row": row,
        "part": part,
        "labels": [(true, names[0]), (predicted, names[1])],
        "true": names[0],
        "predicted": names[1],
        "probability": float(predictions.confidence[position]),
        "probability_text": percent(float(predictions.confidence[position])),
        "true_text": percent(float(np.exp(-predictions.loss[position]))),
        "loss": float(predictions.loss[position]),
        "loss_text": decimal(float(predictions.loss[position]), 2),
        "path": escape(record.manifest.samples[row].path),
    }
