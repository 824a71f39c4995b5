"""Errors: which classes are confused, every metric by class, the misclassified images, and heatmaps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from topwork.blocks import (
    Bar,
    Block,
    Card,
    Cell,
    Command,
    Fold,
    Gallery,
    Heading,
    Line,
    Picture,
    Share,
    Special,
    Table,
    Text,
    Tile,
)
from topwork.data.images import decode
from topwork.data.loader import in_order
from topwork.data.transforms import InputSpec, smaller
from topwork.errors import ImageError
from topwork.evaluation.explain import overlay
from topwork.evaluation.predictions import Predictions
from topwork.report.pictures import EXAMPLE, GONE, MISTAKE, RIGHT_ANSWER, Album, encoded
from topwork.report.run_data import Record
from topwork.report.sections.summary import CONFIDENT, figures_of
from topwork.settings import quote
from topwork.text import count, decimal, escape, percent

MAX_MATRIX = 40  # classes in the matrix; with more, those with the most errors
MAX_CLASSES = 1000  # in the table of classes
MAX_MISTAKES = (300, 100)  # pictures of errors of the main part, and of the other
MAX_PAIRS = 8
MAX_IN_CELL = 60
N_OPEN, N_HEATMAPS_OPEN = 8, 4  # errors and heatmaps that are open at first
SIDE = 288  # pixels of the long side of a heatmap
METHODS = {
    "activation": "The maps are exact: the contribution of each position of the feature maps to the class score.",
    "gradient": "The maps show how much each position increases the score of the class, based on its gradient.",
    "occlusion": "The maps show how much the score of the class drops when a region is covered.",
}


def errors(record: Record, album: Album) -> list[Block]:
    """The main part, then the other behind a fold."""
    blocks: list[Block] = []
    for number, part in enumerate(record.predictions):
        make = _part_of_several_labels if record.manifest.multi_label else _part
        found = make(record, part, album, MAX_MISTAKES[min(number, 1)])
        blocks += found if number == 0 else [Fold(f"The same for {part}", found)]
    return blocks


def _part(record: Record, part: str, album: Album, most: int) -> list[Block]:
    evaluation, predictions = record.evaluation[part], record.predictions[part]
    wrong = np.flatnonzero(~predictions.correct)
    unknown = evaluation.get("n_unknown_class", 0)
    blocks: list[Block] = [_lead(part, predictions, wrong)]
    if unknown:
        blocks.append(Text(f"{count(unknown, 'image')} of classes that the model does not have, not counted.", "muted"))
    blocks += [_matrix(record, part, album), *_pairs(record, part), _class_table(evaluation, part)]
    if part != record.main_part:
        figures = figures_of(evaluation)
        rows = tuple((figure.label, Cell(figure.value), Cell(figure.interval, style="muted")) for figure in figures)
        blocks.insert(1, Table("Metrics", ("", "", ""), rows, heading=False))
    if len(wrong):
        blocks += [Heading("Wrong predictions"), _mistakes(record, part, album, wrong, most)]
    return blocks


def _lead(part: str, predictions: Predictions, wrong: Any) -> Text:
    if not len(wrong):
        return Text(f"No errors on {count(len(predictions), f'{part} image')}.", "lead")
    confident = int((predictions.confidence[wrong] >= CONFIDENT).sum())
    sure = f", {confident:,} of them with a probability of {percent(CONFIDENT, 0)} or more" if confident else ""
    return Text(f"{len(wrong):,} of {count(len(predictions), f'{part} image')} misclassified{sure}.", "lead")


# ---- the confusion matrix


def _matrix(record: Record, part: str, album: Album) -> Special:
    """The confusion matrix; with many classes, only those with the most errors."""
    cells, per_class = record.confusion(part), record.evaluation[part]["per_class"]
    n_true, every = [scores["n"] for scores in per_class.values()], [escape(name) for name in per_class]
    n_mistakes: Counter[int] = Counter()
    for (true, predicted), n in cells.items():
        if true != predicted:
            n_mistakes[true] += n
            n_mistakes[predicted] += n
    labels = sorted(sorted(range(len(every)), key=lambda label: (-n_mistakes[label], label))[:MAX_MATRIX])
    names, inside = [every[label] for label in labels], set(labels)
    shown = [[_cell(t, p, cells[t, p], n_true[t]) for p in labels] for t in labels]
    values = {
        "rows": [{"name": name, "cells": row} for name, row in zip(names, shown, strict=True)],
        "names": names,
        "size": "s" if len(labels) <= 4 else "m" if len(labels) <= 12 else "l" if len(labels) <= 24 else "xl",
        "n_all": len(every),
        "n_outside": sum(n for (t, p), n in cells.items() if t != p and not (t in inside and p in inside)),
        "part": part,
        "gallery": _in_cells(record.predictions[part], labels, album),
    }
    rows = tuple((name, *(cell["n"] for cell in row)) for name, row in zip(names, shown, strict=True))
    return Special("matrix", values, [Table("Confusion matrix", ("true ↓ predicted →", *names), rows)])


def _cell(true: int, predicted: int, n: int, n_true: int) -> dict[str, Any]:
    """One cell: its count, share of the true class, and color: ``d`` right or ``e`` wrong with a level 1..8."""
    share = n / n_true if n_true else 0.0
    strength = share if true == predicted else share**0.5  # rare errors must be visible
    color = f"{'d' if true == predicted else 'e'}{max(1, round(8 * strength))}" if n else "z"
    return {"true": true, "predicted": predicted, "n": n, "share": percent(share), "color": color}


def _in_cells(predictions: Predictions, labels: Sequence[int], album: Album) -> dict[str, list[int]]:
    """Rows of the manifest for each cell, ``"true,predicted"``, the most confident first.

    Args:
        labels: those in the matrix.
    """
    n_classes = len(labels)
    inside = np.isin(predictions.labels, labels) & np.isin(predictions.predicted, labels)
    n_each = 12 if n_classes <= 4 else 6 if n_classes <= 20 else 3
    chosen: dict[str, list[int]] = {}
    for position in np.argsort(-predictions.confidence, kind="stable").tolist():
        if not inside[position]:
            continue
        true, predicted = int(predictions.labels[position]), int(predictions.predicted[position])
        rows = chosen.setdefault(f"{true},{predicted}", [])
        row = int(predictions.sample_indices[position])
        if true == predicted and len(rows) < n_each:
            rows.append(album.want(row, RIGHT_ANSWER, in_page=False))
        elif true != predicted and len(rows) < MAX_IN_CELL:
            rows.append(row)  # the gallery of wrong predictions requests its picture
    return chosen


def _pairs(record: Record, part: str) -> list[Block]:
    """The most confused pairs, if there are many classes."""
    per_class = record.evaluation[part]["per_class"]
    n_true, names = [scores["n"] for scores in per_class.values()], [escape(name) for name in per_class]
    cells = record.confusion(part).items()
    wrong = sorted((-n, -n / n_true[t], t, p) for (t, p), n in cells if t != p)[:MAX_PAIRS]
    if len(names) < 3 or not wrong:
        return []
    rows = tuple((names[t], names[p], -n, Cell(percent(-share), -share)) for n, share, t, p in wrong)
    keys = tuple(f"{t},{p}" for _, _, t, p in wrong)
    return [Table("Most confused pairs", ("True", "Predicted", "Images", "Share of the true class"), rows,
                  text_columns=(1,), keys=keys)]  # fmt: skip


# ---- classes


def _class_table(evaluation: dict[str, Any], part: str) -> Block:
    """One row per class, lowest recall first; classes without images last."""
    spans, rows = evaluation.get("per_class_intervals", {}), []
    for name, scores in evaluation["per_class"].items():
        found = spans.get(name, {})
        recall = Share(scores["recall"], **(found.get("recall") or {}))
        precision = Share(scores["precision"], **(found.get("precision") or {}))
        rows.append((escape(name), scores["n_train"], scores["n"], recall, Bar(recall), precision, Share(scores["f1"])))
    rows.sort(key=lambda row: (row[3].value is None, row[3].value or 0.0, -row[2]))
    n = len(rows)
    note = (
        f"The {MAX_CLASSES:,} classes with the lowest recall, of {n:,}; all are in evaluation.json."
        if n > MAX_CLASSES
        else ""
    )
    columns = ("Class", "Train", part.capitalize(), "Recall (95% CI)", "", "Precision (95% CI)", "F1")
    return Table(f"Classes, {part}", columns, tuple(rows[:MAX_CLASSES]), note, is_sortable=True, sorted_by=3)  # fmt: skip


# ---- wrong predictions


def _mistakes(record: Record, part: str, album: Album, wrong: Any, most: int) -> Gallery:
    """Wrong predictions, the highest loss first."""
    predictions = record.predictions[part]
    order = wrong[np.argsort(-predictions.loss[wrong], kind="stable")][:most]
    cards = tuple(_card(record, predictions, position, album) for position in order.tolist())
    names = sorted({(card.keys[key], escape(predictions.classes[int(card.keys[key])])) for card in cards for key in ("true", "predicted")}, key=lambda item: item[1])  # fmt: skip
    filters = (("true", "True class", tuple(names)), ("predicted", "Predicted", tuple(names)))
    return Gallery(cards, n_open=N_OPEN, noun="wrong prediction", name=f"mistakes-{part}", filters=filters)


def _card(record: Record, predictions: Predictions, position: int, album: Album) -> Card:
    true, predicted = int(predictions.labels[position]), int(predictions.predicted[position])
    row = int(predictions.sample_indices[position])
    names = escape(predictions.classes[true]), escape(predictions.classes[predicted])
    lines = (
        Line("", names[1], percent(float(predictions.confidence[position])), "bad"),
        Line("true", names[0], percent(float(np.exp(-predictions.loss[position])))),
    )
    tile = Tile(album.want(row, MISTAKE), f"{names[0]}, predicted as {names[1]}")
    path = escape(record.manifest.samples[row].path)
    return Card((tile,), lines, path, keys={"true": str(true), "predicted": str(predicted)})


# ---- several labels


def _part_of_several_labels(record: Record, part: str, album: Album, most: int) -> list[Block]:
    evaluation, predictions = record.evaluation[part], record.predictions[part]
    wrong = np.flatnonzero(~predictions.correct)
    n = count(len(predictions), f"{part} image")
    lead = f"{len(wrong):,} of {n} with a missing or wrong label." if len(wrong) else f"No errors on {n}."
    per_image = f"An image has {evaluation['n_labels_per_image']:.1f} labels on average; the model predicts {evaluation['n_labels_given_per_image']:.1f}."  # fmt: skip
    blocks: list[Block] = [Text(f"{lead} {per_image}", "lead"), _label_table(evaluation, predictions, part)]
    if len(wrong):
        # The largest distance of a wrong label from its threshold first.
        distances = np.abs(predictions.probabilities - predictions.task.limits(predictions.n_classes))
        gaps = np.where(predictions.truth != predictions.given, distances, 0.0)[wrong].max(1)
        order = wrong[np.argsort(-gaps, kind="stable")][:most]
        cards = tuple(_card_of_labels(record, predictions, position, album) for position in order.tolist())
        blocks += [Heading("Wrong predictions"), Gallery(cards, n_open=N_OPEN, noun="image", name=f"mistakes-{part}")]
    return blocks


def _label_table(evaluation: dict[str, Any], predictions: Predictions, part: str) -> Table:
    truth, given = predictions.truth, predictions.given
    missed, added = (truth & ~given).sum(0).tolist(), (given & ~truth).sum(0).tolist()
    rows = []
    for number, (name, s) in enumerate(evaluation["per_class"].items()):
        precision = Share(s["average_precision"])
        rows.append((
            escape(name), s["n_train"], s["n"], precision, Bar(precision), Share(s["f1"]), Share(s["precision"]), Share(s["recall"]),
            missed[number], added[number], Cell(decimal(s["threshold"], 2), s["threshold"]),
        ))  # fmt: skip
    rows.sort(key=lambda row: (row[5].value is None, row[5].value or 0.0, -row[2]))
    columns = ("Label", "Train", part.capitalize(), "Average precision", "", "F1", "Precision", "Recall", "Missed", "Wrong", "Threshold")  # fmt: skip
    note = f"The {MAX_CLASSES:,} labels with the lowest F1, of {len(rows):,}." if len(rows) > MAX_CLASSES else ""
    return Table(f"Labels, {part}", columns, tuple(rows[:MAX_CLASSES]), note, is_sortable=True, sorted_by=5)


def _card_of_labels(record: Record, predictions: Predictions, position: int, album: Album) -> Card:
    row = int(predictions.sample_indices[position])
    truth, given, stated = predictions.truth[position], predictions.given[position], predictions.probabilities[position]
    lines = [
        Line(word, escape(predictions.classes[label]), percent(float(stated[label]), 0), style)
        for word, chosen, style in (("missed", truth & ~given, "bad"), ("wrong", given & ~truth, "bad"), ("right", truth & given, ""))
        for label in np.flatnonzero(chosen).tolist()
    ]  # fmt: skip
    tile = Tile(album.want(row, MISTAKE), "image with a missing or wrong label")
    return Card((tile,), tuple(lines), escape(record.manifest.samples[row].path))


# ---- heatmaps


def heatmaps(record: Record, album: Album) -> list[Block]:
    """Heatmaps with the most similar training images, one card per image; nothing if none was explained."""
    found = record.insights.get("explanations") or {}
    if not found.get("images"):
        return []
    overlays = in_order(partial(_overlays, record), found["images"])
    cards = tuple(
        _heatmap_card(record, image, drawn, album) for image, drawn in zip(found["images"], overlays, strict=True)
    )
    method = METHODS.get(str(found.get("method")), METHODS["occlusion"])
    return [
        Text("Bright regions are evidence for the class below the image. Check that they are on the object.", "lead"),
        Gallery(cards, "l", n_open=N_HEATMAPS_OPEN, noun="image"),
        Text(f"{method} To test what the model relies on (color, texture, shape, background):", "small"),
        Command(f"topwork examine {quote(str(record.folder))}", "Command that tests what the model relies on"),
    ]


def _heatmap_card(record: Record, image: dict[str, Any], drawn: list[Picture], album: Album) -> Card:
    classes, row, samples = record.manifest.classes, image["row"], record.manifest.samples
    true, predicted = escape(classes[image["label"]]), escape(classes[image["predicted"]])
    is_wrong = image["label"] != image["predicted"]
    tiles = [
        Tile(album.want(row, EXAMPLE), f"image of {true}", f"true: {true}" if is_wrong else true),
        Tile(drawn[0], f"evidence for {predicted}", f"{predicted} {percent(image['probability'])}", "bad" if is_wrong else "good"),
    ]  # fmt: skip
    if is_wrong:
        tiles.append(Tile(drawn[1], f"evidence for {true}", f"for {true}"))
    near = tuple(
        Tile(album.want(other, EXAMPLE), f"training image of {escape(samples[other].label)}", escape(samples[other].label),
             "" if samples[other].label == classes[image["label"]] else "bad")
        for other in image["nearest"]
    )  # fmt: skip
    return Card(tuple(tiles), path=escape(samples[row].path), near=near, near_label="Most similar in train")


def _overlays(record: Record, image: dict[str, Any]) -> list[Picture]:
    """The upright image with the map of the predicted class, then with that of the true class if it is another."""
    row, is_wrong = image["row"], image["label"] != image["predicted"]
    maps = [np.array(values, np.float32) for values in image["maps"][: 1 + is_wrong]]
    values = record.recipe.get("preprocessing") or {}
    spec = InputSpec.from_dict({key: values[key] for key in InputSpec.__dataclass_fields__ if key in values})
    try:
        pixels = smaller(decode(record.manifest.read(row), min_side=SIDE).pixels, SIDE)
    except (ImageError, OSError, ValueError):
        return [GONE] * len(maps)
    strongest = max(float(np.max(one)) for one in maps)
    return [encoded(overlay(pixels, one, spec, strongest), SIDE) for one in maps]
