"""``topwork compare-domains``: how far two sets of images lie apart, which classes move, which will break.

In: two paths, or one with domains in it, and possibly a model. Out: values; the page is ``report/other_pages.py``.
Labels of the second set are used to say what moves and, with a model, to set the measured beside the expected.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.align import Domains
from topwork.adaptation.guards import Choice, choose
from topwork.commands.adapt_record import MODEL_ERROR, expected
from topwork.commands.steps import model_embedder, rules_of, scan_and_embed
from topwork.data.manifest import Manifest
from topwork.data.unlabeled import rules_without_labels
from topwork.errors import UsageError
from topwork.evaluation.domains import Distance, class_shifts, energy_distance, farthest, joint_map
from topwork.evaluation.intervals import wilson
from topwork.evaluation.predictions import softmax
from topwork.features.embed import Embedder, Features
from topwork.models.backbone import load_backbone
from topwork.models.classifier import Classifier, load_classifier
from topwork.progress import Reporter
from topwork.settings import DataSettings
from topwork.text import escape

SIGNIFICANCE = 0.01
CLASS_SIGNIFICANCE = 0.05  # over all classes together (Bonferroni)
N_FARTHEST = 12


@dataclass(frozen=True, eq=False)
class ComparedDomains:
    """Two domains.

    Attributes:
        farthest: rows of ``manifest`` that lie farthest from A, the farthest first.
        classes: one record a class: images, shift in within-class deviations, whether it moves, expected and measured
            recall of the model on B.
        positions: (x, y, number of the class in ``classes`` or -1) of some images of both sides, for a map.
        expected: accuracy of the model to expect on B, with its range; None without a model.
    """

    name_a: str
    name_b: str
    manifest: Manifest
    distance: Distance
    farthest: tuple[int, ...]
    classes: tuple[dict[str, Any], ...]
    expected: dict[str, float] | None
    measured: dict[str, float] | None
    sentence: str
    notes: tuple[str, ...]
    positions: dict[str, list[list[float]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "a": self.name_a,
            "b": self.name_b,
            "distance": self.distance.as_dict(),
            "clear_difference": self.distance.p_value < SIGNIFICANCE,
            "sentence": self.sentence,
            "expected_accuracy": self.expected,
            "accuracy": self.measured,
            "classes": list(self.classes),
            "farthest": [escape(self.manifest.samples[row].path) for row in self.farthest],
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class Side:
    """One set of images with features; ``labels`` are names, "?" where there are none."""

    name: str
    manifest: Manifest
    features: Features
    rows: NDArray[np.int64]

    @property
    def labels(self) -> NDArray[np.str_]:
        """(n,) class names."""
        return np.array([self.manifest.samples[row].label for row in self.rows.tolist()], dtype=object).astype(str)

    def last(self) -> NDArray[np.float16]:
        """(n, D) last features."""
        return self.features.block("last", self.rows)


def compare_domains(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None = None,
    settings: DataSettings | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    is_unlabeled: bool = False,
    reporter: Reporter | None = None,
) -> tuple[ComparedDomains, ...]:
    """Compares B with A, or every domain of A with its first.

    Raises:
        UsageError: no usable images; no B, and no domains in A.
    """
    settings, reporter = settings or DataSettings(), reporter or Reporter()
    classifier = load_classifier(model) if model is not None else None
    embedder = model_embedder(classifier) if classifier else Embedder(load_backbone())
    reporter.step("scan and embed")
    first = _sides(a, settings, embedder, reporter, False)
    others = _sides(b, settings, embedder, reporter, is_unlabeled) if b is not None else first[1:]
    if b is None and not others:
        raise UsageError(
            f"{escape(str(a))}: names no two domains. Give a second folder, a table with a column domain, or --domain-by."
        )
    base = first[0] if b is None else _whole(first)
    reporter.step("compare domains")
    return tuple(_compared(base, other, classifier, settings.seed) for other in ([_whole(others)] if b else others))


def _sides(
    path: str | os.PathLike[str], settings: DataSettings, embedder: Embedder, reporter: Reporter, is_unlabeled: bool
) -> list[Side]:
    """One side for each domain of a path; one where it has none."""
    rules, has_no_labels = rules_without_labels(path, rules_of(settings), is_unlabeled)
    manifest, features = scan_and_embed(path, replace(settings, label_regex=rules.label_regex), embedder, reporter)
    if has_no_labels:
        samples = tuple(replace(sample, label="?") for sample in manifest.samples)
        manifest = replace(manifest, samples=samples, classes=("?",), notes=())
    names = [sample.domain or "" for sample in manifest.samples]
    return [
        Side(
            name or Path(path).resolve().name,
            manifest,
            features,
            np.flatnonzero([n == name for n in names]).astype(np.int64),
        )
        for name in sorted(set(names))
    ]


def _whole(sides: list[Side]) -> Side:
    rows = np.sort(np.concatenate([side.rows for side in sides]))
    return replace(sides[0], rows=rows, name=sides[0].manifest.root.name if len(sides) > 1 else sides[0].name)


def _compared(a: Side, b: Side, classifier: Classifier | None, seed: int) -> ComparedDomains:
    features_a, features_b = a.last(), b.last()
    distance = energy_distance(features_a, features_b, seed=seed)
    shifts = class_shifts(features_a, a.labels, features_b, b.labels, seed=seed)
    choice, found, predicted = (None, None, None)
    if classifier is not None:
        choice, predicted, found = _expected(a, b, classifier, seed)
    labels_a, labels_b = a.labels, b.labels
    has_labels = not (labels_b == "?").all()
    names = [name for name in a.manifest.classes if (labels_a == name).any()]
    rows = []
    for name in names:
        shift = shifts.get(name)
        rows.append(
            {
                "name": escape(name),
                "n_a": int((labels_a == name).sum()),
                "n_b": int((labels_b == name).sum()) if has_labels else None,
                "shift": shift.shift if shift else None,
                "moves": shift.p_value * len(shifts) < CLASS_SIGNIFICANCE if shift else None,
                "expected": None,
                "accuracy": None,
            }
            | (
                _expected_class(name, classifier, choice, predicted, labels_b)
                if classifier and choice is not None and predicted is not None
                else {}
            )
        )
    measured = _measured(predicted, labels_b, classifier) if classifier and predicted is not None else None
    far = farthest(features_a, features_b)[:N_FARTHEST]
    return ComparedDomains(
        escape(a.name), escape(b.name), b.manifest, distance, tuple(b.rows[far].tolist()), tuple(rows), found, measured,
        _sentence(escape(a.name), escape(b.name), distance, found, rows), tuple(_notes(names, labels_b, choice)),
        joint_map(features_a, _numbers(names, labels_a), features_b, _numbers(names, labels_b)),
    )  # fmt: skip


def _numbers(names: list[str], labels: NDArray[np.str_]) -> NDArray[np.int64]:
    """The position of each label in the list of names, or -1."""
    index = {name: number for number, name in enumerate(names)}
    return np.array([index.get(str(label), -1) for label in labels.tolist()], np.int64)


def _expected(
    a: Side, b: Side, classifier: Classifier, seed: int
) -> tuple[Choice, NDArray[np.int64], dict[str, float]]:
    """What the model answers on B, and the accuracy to expect of that."""
    index = {name: number for number, name in enumerate(classifier.classes)}
    labels = np.array([index.get(str(name), -1) for name in a.labels], np.int64)
    if not (labels >= 0).any():
        raise UsageError(
            f"{escape(a.name)}: none of its classes is one of the model's; give the images it was trained on."
        )
    transform = classifier.head.transform

    def columns(side: Side, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return transform.apply(side.features.blocks(transform.blocks, rows))

    target = columns(b, b.rows)
    known = np.full(len(target), -1, np.int64)
    domains = Domains(columns(a, a.rows[labels >= 0]), labels[labels >= 0], target, known, len(index))
    head = classifier.head
    answers = softmax(target.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias)
    choice = choose(domains, answers, seed=seed)
    predicted = answers.argmax(1).astype(np.int64)
    return choice, predicted, expected(predicted, choice, answers.max(1))


def _expected_class(
    name: str, classifier: Classifier, choice: Choice, predicted: NDArray[np.int64], labels_b: NDArray[np.str_]
) -> dict[str, Any]:
    """Expected recall of a class from the methods' votes, with its range, and the recall measured where labels are."""
    if name not in classifier.classes:
        return {}
    label = classifier.classes.index(name)
    weight = choice.consensus[:, label]
    total = float(weight.sum())
    hit = predicted == label
    found: dict[str, Any] = {}
    if total > 0.5:
        value = float((weight * hit).sum() / total)
        interval = wilson(value, max(1.0, total))
        low, high = max(0.0, interval.low - MODEL_ERROR), min(1.0, interval.high + MODEL_ERROR)
        found["expected"] = {"value": value, "low": low, "high": high}
    own = labels_b == name
    if own.any():
        interval = wilson(float(hit[own].mean()), int(own.sum()))
        found["accuracy"] = {"value": float(hit[own].mean()), "low": interval.low, "high": interval.high}
    return found


def _measured(
    predicted: NDArray[np.int64], labels_b: NDArray[np.str_], classifier: Classifier
) -> dict[str, float] | None:
    known = np.isin(labels_b, classifier.classes)
    if not known.any():
        return None
    right = np.array(classifier.classes)[predicted[known]] == labels_b[known]
    interval = wilson(float(right.mean()), len(right))
    return {"value": float(right.mean()), "low": interval.low, "high": interval.high}


def _sentence(a: str, b: str, distance: Distance, found: dict[str, float] | None, rows: list[dict[str, Any]]) -> str:
    facts = f"energy distance {distance.energy:.3f} where sets from one source have {distance.expected:.3f}"
    if distance.p_value >= SIGNIFICANCE:
        return f"{a} and {b}: no clear difference ({facts}, p = {distance.p_value:.2f})."
    text = f"{a} and {b} differ ({facts}, p = {distance.p_value:.3f}; told apart with an area under ROC of {distance.auc:.2f})."
    moving = [row["name"] for row in sorted(rows, key=lambda row: -(row["shift"] or 0)) if row["moves"]]
    if moving:
        text += f" Classes that move most: {', '.join(moving[:5])}."
    if found:
        text += f" Expected accuracy of the model on {b}: {100 * found['value']:.0f} % ({100 * found['low']:.0f} to {100 * found['high']:.0f})."
        broken = [row["name"] for row in rows if row["expected"] and row["expected"]["value"] < 0.5]
        if broken:
            text += f" Likely to break: {', '.join(broken[:5])}."
    return text


def _notes(names: list[str], labels_b: NDArray[np.str_], choice: Choice | None) -> list[str]:
    notes = []
    others = sorted(set(labels_b.tolist()) - set(names) - {"?"})
    if others:
        notes.append(f"Classes of B that A does not have: {', '.join(escape(name) for name in others[:8])}.")
    if choice is not None and choice.outcome == "refused":
        notes.append(f"The figures to expect mean little: {choice.reason}")
    return notes
