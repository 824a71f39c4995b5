"""What each section of the report says: in goes a :class:`Record`, out come plain values for one template.

A section function also asks the album for the pictures its template or the script will show. Every text that comes
from the data goes through ``shown``; the templates escape it. Nothing here writes HTML.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

import numpy as np

from topwork.data.sources import shown
from topwork.evaluation.curves import reliability_bins
from topwork.evaluation.predictions import Predictions
from topwork.settings import FitSettings
from topwork.web.pictures import Album
from topwork.web.plots import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, Plot, Scale, line_plot
from topwork.web.record import Record, count, decimal, percent
from topwork.web.summary import CONFIDENT, interval_of, majority_share, recall_interval, sentences

MAX_MATRIX = 40  # classes in the matrix; with more, those with most mistakes
MAX_ROWS = 1000  # of any table
MAX_MISTAKES = 400  # pictures of mistakes, all parts together
N_OPEN = 24  # cards and class groups that are open at first; the rest unfolds
MAX_EXAMPLE_CLASSES = 300
MAX_PAIRS = 12
MAX_REJECT_CHARACTERS = 1_000_000
MISTAKE, EXAMPLE, RIGHT_ANSWER = 0, 1, 2  # importance of pictures
PART_COLOURS = {"train": "train", "valid": "valid", "test": "test"}
STEP_NAMES = {"scan_and_embed": "read and embed", "evaluate": "judge", "write": "write the run"}


def summary(record: Record, album: Album) -> dict[str, Any]:
    """The sentences, and the figures of the part that counts most."""
    part = record.main_part
    return {
        "sentences": sentences(record),
        "part": part,
        "n": record.evaluation[part]["n"] if part else 0,
        "figures": _figures(record, part) if part else [],
    }


def _figures(record: Record, part: str) -> list[dict[str, Any]]:
    judged = record.evaluation[part]
    baseline = majority_share(record, part)
    rows = [_figure("Accuracy", judged["accuracy"]["value"], interval_of(judged, "accuracy"))]
    rows[0] |= {"baseline": baseline, "hint": f"always answering the largest class: {percent(baseline)}"}
    names = [("balanced_accuracy", "Balanced accuracy", "the mean over the classes, large and small alike")]
    if len(judged["classes"]) > 5:
        names.append(("top5_accuracy", "Top-5 accuracy", "the right class is among the first five"))
    names.append(("macro_f1", "Macro F1", "precision and recall in one, mean over the classes"))
    rows += [_figure(label, judged[name], interval_of(judged, name), hint) for name, label, hint in names]
    if judged.get("roc_auc") is not None:
        hint = "area under the ROC curve: 0.5 is chance, 1 is perfect"
        rows.append(_figure("ROC AUC", judged["roc_auc"], interval_of(judged, "roc_auc"), hint, as_percent=False))
    hint = "mean gap between stated probability and share of right answers; smaller is better"
    rows.append(_figure("Calibration error", judged["ece"], interval_of(judged, "ece"), hint))
    hint = "mean of −log(probability of the true class), in nats; smaller is better"
    rows.append(
        _figure("Cross-entropy", judged["cross_entropy"], interval_of(judged, "cross_entropy"), hint, as_percent=False)
        | {"bar": None}
    )
    return rows


def _figure(
    label: str, value: float | None, interval: tuple[float, float] | None, hint: str = "", as_percent: bool = True
) -> dict[str, Any]:
    text = percent if as_percent else decimal
    return {
        "label": label,
        "value": text(value),
        "low": text(interval[0]) if interval else None,
        "high": text(interval[1]) if interval else None,
        "bar": _bar(value, interval),
        "hint": hint,
        "baseline": None,
    }


def _bar(value: float | None, interval: tuple[float, float] | None) -> dict[str, float] | None:
    """Positions in percent of the bar's length."""
    if value is None:
        return None
    low, high = interval or (value, value)
    return {name: round(100 * min(max(v, 0), 1), 2) for name, v in (("value", value), ("low", low), ("high", high))}


# ---- data


def data(record: Record, album: Album) -> dict[str, Any]:
    """Images used and rejected, images of each class by part, examples, what looked odd."""
    manifest = record.manifest
    rows = [_class_row(name, parts) for name, parts in record.rows_by_class.items()]
    largest = max(row["total"] for row in rows)
    for row in rows:
        row["bars"] = _stacked(row, largest)
    n_leaks = len(record.split.get("leaks", []))
    leaks = [f"{count(n_leaks, 'image')} of valid or test have an exact copy in train; their figures flatter."]
    return {
        "facts": _data_facts(record),
        "classes": rows[:MAX_ROWS],
        "n_classes": len(rows),
        "parts": [name for name in PART_COLOURS if any(row[name] for row in rows)],
        "examples": _examples(record, album),
        "n_open": N_OPEN,
        "notes": [shown(note) for note in manifest.notes] + (leaks if n_leaks else []),
        "rejects": _rejects(record),
        "n_rejects": len(manifest.rejects),
        "reasons": Counter(shown(reject.reason) for reject in manifest.rejects).most_common(8),
    }


def _class_row(name: str, parts: dict[str, list[int]]) -> dict[str, Any]:
    counts = {part: len(parts.get(part, ())) for part in PART_COLOURS}
    return {"name": shown(name), **counts, "total": sum(len(rows) for rows in parts.values())}


def _stacked(row: dict[str, Any], largest: int) -> list[dict[str, Any]]:
    """Segments of a bar: part, start and length in percent of the largest class."""
    segments, start = [], 0.0
    for part in PART_COLOURS:
        length = 100 * row[part] / largest
        if length:
            segments.append({"part": part, "start": round(start, 2), "length": round(length, 2)})
        start += length
    return segments


def _data_facts(record: Record) -> list[tuple[str, str, str]]:
    """Label, value and remark of each tile."""
    samples = record.manifest.samples
    widths, heights = np.array([s.width for s in samples]), np.array([s.height for s in samples])
    sides = np.sort(np.stack([widths, heights]), axis=0)
    formats = Counter(sample.format for sample in samples).most_common(3)
    n_rejects = len(record.manifest.rejects)
    sizes = f"short side {sides[0].min():,} to {sides[0].max():,} px, long side up to {sides[1].max():,} px"
    n_gray = sum(sample.mode in ("1", "L", "LA", "I;16") for sample in samples)
    n_turned = sum(sample.orientation != 1 for sample in samples)
    odd = ", ".join(text for n, text in ((n_gray, f"{n_gray:,} grey"), (n_turned, f"{n_turned:,} turned upright")) if n)
    given = "parts as the data give them" if record.split.get("given") else f"split drawn with seed {record.split.get('seed')}"
    return [
        ("Images used", f"{len(samples):,}", given),
        ("Files rejected", f"{n_rejects:,}", "each is named below, with the reason" if n_rejects else "every file is a sound image"),
        ("Classes", f"{len(record.manifest.classes):,}", _class_sizes(record)),
        ("Median size", f"{int(np.median(widths)):,} × {int(np.median(heights)):,}", sizes),
        ("Formats", ", ".join(f"{name} {n:,}" for name, n in formats), odd or "all in colour, all upright"),
    ]


def _class_sizes(record: Record) -> str:
    sizes = list(record.manifest.counts.values())
    low, high = min(sizes), max(sizes)
    return f"{low:,} images each" if low == high else f"from {low:,} to {high:,} images"


def _examples(record: Record, album: Album) -> list[dict[str, Any]]:
    n_classes = len(record.manifest.classes)
    n_each = 8 if n_classes <= 4 else 5 if n_classes <= 12 else 4 if n_classes <= 40 else 2 if n_classes <= 120 else 1
    groups = []
    for name, parts in list(record.rows_by_class.items())[:MAX_EXAMPLE_CLASSES]:
        rows = parts.get("train") or next(iter(parts.values()))
        chosen = sorted(rows, key=lambda row: record.manifest.samples[row].content_hash)[:n_each]
        groups.append({"name": shown(name), "rows": [album.want(row, EXAMPLE) for row in chosen]})
    return groups


def _rejects(record: Record) -> list[tuple[str, str]]:
    rows, n_characters = [], 0
    for reject in record.manifest.rejects[:MAX_ROWS]:
        rows.append((shown(reject.path), shown(reject.reason)))
        n_characters += len(rows[-1][0])
        if n_characters > MAX_REJECT_CHARACTERS:
            break
    return rows


# ---- training


def training(record: Record, album: Album) -> dict[str, Any]:
    """What was asked and what was done, what was tried, and the curves of an epoch-wise training."""
    trials = [line for line in record.history if "candidate" in line]
    return {
        "rows": _asked_and_done(record),
        "reason": shown(str(record.recipe.get("head", {}).get("reason", ""))),
        "candidates": _candidates(trials),
        "trials": [_trial_row(trial) for trial in trials[:MAX_ROWS]],
        "plots": [asdict(plot) for plot in trial_plots(trials)],
        "curves": [asdict(plot) for plot in epoch_plots(record.history)],
        "n_folds": trials[0]["n_folds"] if trials else 0,
        "n_images": trials[0]["n_images"] if trials else 0,
        "n_trainable": record.evaluation.get("n_trainable"),
        "n_parameters": record.evaluation.get("n_parameters"),
    }


def _asked_and_done(record: Record) -> list[tuple[str, str, str]]:
    """Name, asked, done."""
    asked, recipe = record.settings.get("settings", {}), record.recipe
    head, spec = recipe.get("head", {}), recipe.get("preprocessing", {})
    side = f"{spec.get('width')} × {spec.get('height')} px, {spec.get('fit')}, {spec.get('interpolation')}" if spec else "–"
    weights = "by class, against unequal counts" if recipe.get("class_weights") else "none: the counts are even enough"
    n_part = {part: int((record.part_of == part).sum()) for part in PART_COLOURS}
    sizes = ", ".join(f"{name} {n:,}" for name, n in n_part.items() if n)
    fractions = f"valid {asked.get('valid_fraction')}, test {asked.get('test_fraction')}"
    rows = [
        ("Backbone", asked.get("backbone"), f"{recipe.get('backbone')} ({recipe.get('architecture')})"),
        ("Mode", asked.get("mode"), recipe.get("mode")),
        ("Head", asked.get("head"), f"{head.get('kind')}: {head.get('candidate')}, penalty {head.get('penalty'):g}" if head.get("penalty") else "–"),
        ("Input", f"{asked.get('fit')}, {asked.get('size') or 'as the weights'}", side),
        ("Parts", "as given" if record.split.get("given") else fractions, sizes),
        ("Class weights", "auto", weights),
        ("Engine", f"{asked.get('engine')}, {asked.get('precision')}", f"{recipe.get('engine')}, {recipe.get('precision')}"),
        ("Temperature", "auto", f"{decimal(recipe.get('temperature'))}, from the {recipe.get('temperature_fitted_on', 'train part')}"),
        ("Seed", asked.get("seed"), recipe.get("seed")),
    ]
    return [(name, shown(str(a)), shown(str(b))) for name, a, b in rows]


def _candidates(trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a candidate, at its best penalty; the chosen one first."""
    best: dict[str, dict[str, Any]] = {}
    for trial in trials:
        old = best.get(trial["candidate"])
        if old is None or (trial["chosen"], -trial["cross_entropy"]) > (old["chosen"], -old["cross_entropy"]):
            best[trial["candidate"]] = trial
    rows = sorted(best.values(), key=lambda trial: (not trial["chosen"], trial["cross_entropy"]))
    return [_trial_row(trial) for trial in rows]


def _trial_row(trial: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": shown(str(trial["candidate"])),
        "plain": trial["plain"],
        "penalty": f"{trial['penalty']:g}",
        "accuracy": percent(trial["accuracy"]),
        "error": f"±\u202f{100 * trial['standard_error']:.1f}",
        "cross_entropy": decimal(trial["cross_entropy"]),
        "chosen": trial["chosen"],
    }


def trial_plots(trials: Sequence[dict[str, Any]]) -> list[Plot]:
    """Accuracy and cross-entropy against the penalty, a line for each candidate; nothing where there is one trial."""
    if len({trial["penalty"] for trial in trials}) < 2:
        return []
    return [
        line_plot(title, _trial_lines(trials, name), "penalty (weak to strong)", label, text, x_is_log=True)
        for title, name, label, text in (
            ("Accuracy in cross-validation", "accuracy", "accuracy", _tick_percent),
            ("Cross-entropy in cross-validation", "cross_entropy", "nats", _tick_number),
        )
    ]


def _trial_lines(trials: Sequence[dict[str, Any]], name: str) -> list[Line]:
    by_candidate: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        by_candidate.setdefault(trial["candidate"], []).append(trial)
    lines, colour = [], 1
    for candidate, tried in by_candidate.items():
        chosen = next((trial for trial in tried if trial["chosen"]), None)
        colour += chosen is None
        points = tuple(sorted((trial["penalty"], trial[name]) for trial in tried))
        mark = (chosen["penalty"], chosen[name]) if chosen else None
        lines.append(Line(shown(candidate), points, 1 if chosen else min(colour, 6), chosen is not None, mark))
    return sorted(lines, key=lambda line: line.is_strong)  # the chosen one is drawn last, over the others


def epoch_plots(history: Sequence[dict[str, Any]]) -> list[Plot]:
    """Curves of an epoch-wise training: losses, accuracy and rate, as far as the records hold them.

    Args:
        history: records with ``epoch`` and any of ``train_loss``, ``valid_loss``, ``valid_accuracy``, ``rate``;
            records without ``epoch`` are passed over.
    """
    plots = []
    for title, names, label, text in (
        ("Loss", ("train_loss", "valid_loss"), "cross-entropy", _tick_number),
        ("Accuracy on valid", ("valid_accuracy",), "accuracy", _tick_percent),
        ("Learning rate", ("rate",), "rate", _tick_number),
    ):
        lines = [_epoch_line(history, name, number) for number, name in enumerate(names, start=1)]
        drawn = [line for line in lines if len(line.points) > 0]
        if drawn:
            plots.append(line_plot(title, drawn, "epoch", label, text))
    return plots


def _epoch_line(history: Sequence[dict[str, Any]], name: str, colour: int) -> Line:
    points = [(float(r["epoch"]), float(r[name])) for r in history if "epoch" in r and r.get(name) is not None]
    finite = tuple(point for point in points if np.isfinite(point).all())
    return Line(name.replace("_", " "), finite, colour, is_strong=name.startswith("valid"))


def _tick_percent(value: float) -> str:
    return f"{100 * value:g}\u202f%"


def _tick_number(value: float) -> str:
    return f"{value:.4g}"


# ---- results


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
        "figures": _figures(record, name),
        "matrix": _matrix(judged["classes"], cells),
        "gallery": _gallery(predictions, cells, album),
        "per_class": _per_class(judged)[:MAX_ROWS],
        "n_classes": len(judged["classes"]),
        "pairs": _pairs(judged["classes"], cells),
        "reliability": _reliability(predictions),
        "ece": percent(judged["ece"]),
    }


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
    names = [shown(classes[label]) for label in labels]
    size = "s" if len(labels) <= 4 else "m" if len(labels) <= 12 else "l" if len(labels) <= 24 else "xl"
    inside = set(labels)
    n_outside = sum(n for (t, p), n in cells.items() if t != p and not (t in inside and p in inside))
    rows = [
        {"label": t, "name": name, "n": n_true[t], "cells": [_cell(t, p, cells.get((t, p), 0), n_true[t]) for p in labels]}
        for t, name in zip(labels, names, strict=True)
    ]
    return {"rows": rows, "names": names, "size": size, "n_all": len(classes), "n_outside": n_outside}


def _cell(true: int, predicted: int, n: int, n_true: int) -> dict[str, Any]:
    """One cell: its count, share of the true class, and colour: ``d`` right or ``e`` wrong with a level 1..8."""
    share = n / n_true if n_true else 0.0
    strength = share if true == predicted else share**0.5  # rare mistakes must still be seen
    colour = f"{'d' if true == predicted else 'e'}{max(1, round(8 * strength))}" if n else "z"
    return {"true": true, "predicted": predicted, "n": n, "share": percent(share), "colour": colour}


def _gallery(predictions: Predictions, cells: dict[tuple[int, int], int], album: Album) -> dict[str, list[int]]:
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
        elif true != predicted and len(rows) < 60:
            rows.append(row)  # its picture is asked for by the section of mistakes
    return chosen


def _per_class(judged: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a class, the lowest recall first; classes without images in the part last."""
    rows = []
    for name, scores in judged["per_class"].items():
        interval = recall_interval(scores["recall"], scores["n"]) if scores["recall"] is not None else None
        rows.append(
            {
                "name": shown(name),
                "n_train": scores["n_train"],
                "n": scores["n"],
                "recall": scores["recall"],
                "recall_text": percent(scores["recall"]),
                "low": percent(interval[0], 0) if interval else "",
                "high": percent(interval[1], 0) if interval else "",
                "bar": _bar(scores["recall"], interval),
                "precision": scores["precision"],
                "precision_text": percent(scores["precision"]),
                "f1": scores["f1"],
                "f1_text": decimal(scores["f1"]),
            }
        )
    return sorted(rows, key=lambda row: (row["recall"] is None, row["recall"] or 0, -row["n"]))


def _pairs(classes: Sequence[str], cells: dict[tuple[int, int], int]) -> list[dict[str, Any]]:
    n_true: Counter[int] = Counter()
    for (true, _), n in cells.items():
        n_true[true] += n
    wrong = sorted((-n, -n / n_true[t], t, p) for (t, p), n in cells.items() if t != p)
    return [
        {"true": t, "predicted": p, "true_name": shown(classes[t]), "predicted_name": shown(classes[p]), "n": -n, "share": percent(-s)}
        for n, s, t, p in wrong[:MAX_PAIRS]
    ]


def _reliability(predictions: Predictions) -> dict[str, Any]:
    """Positions of a reliability diagram, with its numbers."""
    x, y = Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(0, 1, HEIGHT - 46, TOP)
    most = max(1, *(found.n for found in reliability_bins(predictions)))
    rows = []
    for found in reliability_bins(predictions):
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
    marks = [(x(v / 4), y(v / 4), _tick_percent(v / 4)) for v in range(5)]
    return {"rows": rows, "ticks": marks, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - 46,
            "width": WIDTH, "height": HEIGHT}  # fmt: skip


# ---- mistakes


def mistakes(record: Record, album: Album) -> dict[str, Any]:
    """Wrong answers with their pictures, the surest first."""
    cards, n_all = [], 0
    for part, predictions in record.predictions.items():
        wrong = np.flatnonzero(~predictions.correct)
        n_all += len(wrong)
        order = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")]
        cards += [_card(record, part, predictions, position) for position in order[: MAX_MISTAKES - len(cards)].tolist()]
    cards.sort(key=lambda card: -card["probability"])
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
    names = shown(predictions.classes[true]), shown(predictions.classes[predicted])
    return {
        "row": row,
        "part": part,
        "labels": [(true, names[0]), (predicted, names[1])],
        "true": names[0],
        "predicted": names[1],
        "probability": float(predictions.confidence[position]),
        "probability_text": percent(float(predictions.confidence[position])),
        "true_text": percent(float(np.exp(-predictions.loss[position]))),
        "path": shown(record.manifest.samples[row].path),
    }


# ---- reproducibility


def reproduce(record: Record, album: Album) -> dict[str, Any]:
    """How to get the same run again, what it depended on, how long it took, and how to use the model."""
    seconds = dict(record.evaluation.get("timing", {}).get("seconds", {}))
    total = seconds.pop("total", None) or sum(seconds.values()) or 1.0
    timing = record.evaluation.get("timing", {})
    return {
        "command": repeat_command(record),
        "model": shown(str(record.folder / "model")),
        "predict": f"topwork predict {quote(str(record.folder))} IMAGES --out answers.csv",
        "python": _python(str(record.folder / "model")),
        "versions": [(name, shown(str(v))) for name, v in record.settings.get("versions", {}).items()]
        + [("python", shown(str(record.settings.get("python", "–"))))],
        "facts": _facts(record),
        "seconds": [(STEP_NAMES.get(n, n), f"{s:.2f}\u202fs", round(min(100, 100 * s / total), 2)) for n, s in seconds.items()],
        "total": f"{total:.2f}\u202fs",
        "n_embedded": timing.get("n_embedded"),
        "rate": timing.get("images_per_second"),
        "settings": json.dumps(record.settings, indent=1),
        "recipe": json.dumps(record.recipe, indent=1),
    }


def _facts(record: Record) -> list[tuple[str, str]]:
    """Names and digests that identify the run."""
    rows = [
        ("Data", record.settings.get("path")),
        ("Run", str(record.folder)),
        ("Started", record.settings.get("started")),
        ("Platform", record.settings.get("platform")),
        ("Images and labels", record.manifest.digest),
        ("Split", record.split.get("digest")),
        ("Backbone weights", record.model.get("weights_digest")),
    ]
    return [(name, shown(str(value))) for name, value in rows if value]


def repeat_command(record: Record) -> str:
    """The command that makes the same run in a folder beside this one: every setting that is not the default."""
    words = ["topwork", "fit", str(record.settings.get("path", record.manifest.root))]
    words += ["--out", f"{record.folder}-again"]
    defaults = {item.name: item.default for item in fields(FitSettings)}
    for name, value in record.settings.get("settings", {}).items():
        flag = "--" + name.replace("_", "-")
        if value is None or (value == defaults.get(name, MISSING) and name != "seed"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, str(value)]
    return " ".join(quote(word) for word in words)


def quote(word: str) -> str:
    """A word for a POSIX shell; with control characters or undecodable bytes in the ``$'...'`` form of bash."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = re.sub(r"[\\']", lambda found: "\\" + found[0], word)
    encoded = "".join(c if c.isprintable() else _octal(c) for c in escaped)
    return f"$'{encoded}'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))


def _python(model: str) -> str:
    return (
        "from topwork import Predictor\n\n"
        f"predictor = Predictor({ascii(model) if not model.isprintable() else repr(model)})\n"
        'for answer in predictor.predict(["image.jpg"]):\n'
        "    print(answer.label, answer.probability)"
    )
