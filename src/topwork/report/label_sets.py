"""The report of a run whose images may have several labels: in goes a :class:`Record`, out come values for templates.

Summary, results and mistakes; the sections on data, training and repeating the run are those of every run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from topwork.evaluation.metrics import metrics_of
from topwork.evaluation.predictions import Predictions
from topwork.report.pictures import MISTAKE, Album
from topwork.report.results import MAX_CLASSES, N_OPEN, bar_of, metric_figure
from topwork.report.run_data import Record
from topwork.text import count, decimal, escape, percent, quoted

MAX_MISTAKES = 200  # pictures


def summary(record: Record, _album: Album) -> dict[str, Any]:
    """The sentences, and the figures of the part that counts most."""
    part = next(iter(record.predictions), None)
    return {
        "sentences": sentences(record),
        "part": part,
        "n": record.evaluation[part]["n"] if part else 0,
        "figures": figures(record, part) if part else [],
    }


def sentences(record: Record) -> list[str]:
    """What was trained, how good it is, where it is weak, what the parts were used for."""
    part = next(iter(record.predictions), None)
    n_train = int((record.part_of == "train").sum())
    backbone = escape(str(record.recipe.get("architecture", "a backbone")))
    labels = count(len(record.manifest.classes), "label")
    trained = (
        f"This run trained one linear classifier for each of {labels} on the frozen features of {backbone}, with "
        f"{count(n_train, 'image')}; an image may have any number of labels."
    )
    if part is None:
        return [trained, "There is no test and no valid part, so nothing can be said about how good it is."]
    judged = record.evaluation[part]
    accuracy = judged["accuracy"]
    right = (
        f"On the {count(judged['n'], 'image')} of the {part} part every label is right for {percent(accuracy['value'])} "
        f"(95 % interval {percent(accuracy['low'])} to {percent(accuracy['high'])}); an image has "
        f"{judged['n_labels_per_image']:.1f} labels on average and is given {judged['n_labels_given_per_image']:.1f}."
    )
    used = "Head, temperature and the threshold of each label come from cross-validation inside the train part; " + (
        "the test part was touched once, for these figures." if part == "test" else "there is no test part."
    )
    return [trained, right, *_weakest(judged), used]


def _weakest(judged: dict[str, Any]) -> list[str]:
    scored = [(s["f1"], name, s["n"]) for name, s in judged["per_class"].items() if s["f1"] is not None]
    if len(scored) < 2:
        return []
    f1, name, n = min(scored)
    few = " So few images say little." if n < 20 else ""
    return [f"The label with the lowest F1 is {quoted(name)} with {f1:.2f}, on {count(n, 'image')}.{few}"]


def figures(record: Record, part: str) -> list[dict[str, Any]]:
    """The metrics of a part with intervals, bars and a hint; first the share of images with every label right."""
    judged, truth = record.evaluation[part], record.predictions[part].truth
    sets, n_alike = np.unique(truth, axis=0, return_counts=True)
    base = float(n_alike.max() / len(truth)) if len(sets) else None
    rows = [metric_figure(metric, judged) for metric in metrics_of(judged)]
    rows[0] |= {"baseline": base, "hint": f"always answering the most frequent set of labels: {percent(base)}"}
    return rows


def results(record: Record, _album: Album) -> dict[str, Any]:
    """The figures of every judged part, and of every label."""
    return {"parts": [_part(record, name, sets) for name, sets in record.predictions.items()]}


def _part(record: Record, name: str, sets: Predictions) -> dict[str, Any]:
    judged = record.evaluation[name]
    rows = _label_rows(judged, sets)
    return {
        "name": name,
        "n": judged["n"],
        "n_right": int(sets.correct.sum()),
        "figures": figures(record, name),
        "labels": rows[:MAX_CLASSES],
        "n_labels": len(rows),
    }


def _label_rows(judged: dict[str, Any], sets: Predictions) -> list[dict[str, Any]]:
    """One row a label, the lowest F1 first; labels without images in the part last."""
    missed, added = (sets.truth & ~sets.given).sum(0).tolist(), (sets.given & ~sets.truth).sum(0).tolist()
    rows = []
    for number, (name, scores) in enumerate(judged["per_class"].items()):
        value = scores["average_precision"]
        rows.append(
            {
                "name": escape(name),
                "n_train": scores["n_train"],
                "n": scores["n"],
                "average_precision": value,
                "average_precision_text": percent(value),
                "bar": bar_of(value, None),
                "f1": scores["f1"],
                "f1_text": decimal(scores["f1"]),
                "precision_text": percent(scores["precision"]),
                "recall_text": percent(scores["recall"]),
                "threshold": f"{scores['threshold']:.2f}",
                "missed": missed[number],
                "added": added[number],
            }
        )
    return sorted(rows, key=lambda row: (row["f1"] is None, row["f1"] or 0.0, -row["n"]))


def mistakes(record: Record, album: Album) -> dict[str, Any]:
    """Images with a label missed or one too many, those first whose worst label is furthest from its threshold."""
    cards: list[dict[str, Any]] = []
    n_all = 0
    for part, sets in record.predictions.items():
        wrong = np.flatnonzero(~sets.correct)
        n_all += len(wrong)
        cards += [_card(record, part, sets, position) for position in wrong.tolist()]
    cards.sort(key=lambda card: -card["gap"])
    cards = cards[:MAX_MISTAKES]
    for card in cards:
        album.want(card["row"], MISTAKE)
    return {"cards": cards, "n_open": N_OPEN, "n_all": n_all, "n_parts": len(record.predictions)}


def _card(record: Record, part: str, sets: Predictions, position: int) -> dict[str, Any]:
    row = int(sets.sample_indices[position])
    truth, given, stated = sets.truth[position], sets.given[position], sets.probabilities[position]

    def named(chosen: Any) -> list[tuple[str, str]]:
        return [
            (escape(sets.classes[label]), f"{100 * stated[label]:.0f}\u202f%")
            for label in np.flatnonzero(chosen).tolist()
        ]

    return {
        "row": row,
        "part": part,
        "gap": float(np.abs(stated - sets.task.limits(sets.n_classes))[truth != given].max()),
        "right": named(truth & given),
        "missed": named(truth & ~given),
        "added": named(given & ~truth),
        "path": escape(record.manifest.samples[row].path),
    }
