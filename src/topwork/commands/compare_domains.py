"""``topwork compare-domains``: measures the distribution shift between two datasets and estimates the accuracy.

In: two paths, or one with several domains, and optionally a model. The page is in ``report/other_pages.py``. Labels of
the second set only tell which classes shift and, with a model, the measured accuracy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.adaptation.adapted_head import score
from topwork.adaptation.align import Domains, Ints
from topwork.adaptation.expected import MODEL_ERROR, expected_accuracy, expected_recall, share_record
from topwork.adaptation.guards import SIGNIFICANCE, Choice, choose
from topwork.commands.adapt import scan_target
from topwork.data.manifest import NO_LABEL, Manifest
from topwork.errors import UsageError
from topwork.evaluation.domains import ClassShift, Distance, class_shifts, energy_distance, farthest, joint_map
from topwork.evaluation.intervals import wilson
from topwork.evaluation.predictions import softmax
from topwork.export.runtime import model_embedder
from topwork.features.embed import Embedder, Features
from topwork.models.backbone import load_backbone
from topwork.models.classifier import Classifier, load_classifier
from topwork.progress import Reporter, default_reporter
from topwork.settings import DataSettings
from topwork.text import Described, escape, first_names, percent

CLASS_SIGNIFICANCE = 0.05  # over all classes (Bonferroni)
N_FARTHEST = 12


@dataclass(frozen=True, eq=False, repr=False)
class ComparedDomains(Described):
    """Two domains.

    Attributes:
        farthest: rows of ``manifest`` (B), farthest from A first.
        classes: one record per class: images, shift in within-class deviations and whether it is significant, expected and
            measured recall of the model on B.
        positions: (x, y, index into ``classes`` or -1) of some images of both sides, for a map.
        expected: expected accuracy of the model on B, with a range; None without a model.
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

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        return {
            "Domains": f"{self.name_a}, {self.name_b}",
            "Energy distance": f"{self.distance.energy:.3f} (p = {self.distance.p_value:.3f})",
            "AUC": f"{self.distance.auc:.3f}",
            **({"Expected accuracy": percent(self.expected["value"])} if self.expected else {}),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "a": self.name_a,
            "b": self.name_b,
            "distance": asdict(self.distance),
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
    """One set of images with features."""

    name: str
    manifest: Manifest
    features: Features
    rows: Ints

    @property
    def labels(self) -> NDArray[np.str_]:
        """(n,) class names; ``NO_LABEL`` if the folders are not classes."""
        return np.array([self.manifest.samples[row].label for row in self.rows.tolist()], dtype=object).astype(str)

    def last(self) -> NDArray[np.float16]:
        """(n, D) last features."""
        return self.features.block("last", self.rows)


@dataclass(frozen=True, eq=False)
class Model:
    """A model's predictions on B, and their expected accuracy without labels."""

    classes: tuple[str, ...]
    predicted: Ints
    choice: Choice
    expected: dict[str, float]


def compare_domains(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str] | None = None,
    settings: DataSettings | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    is_unlabeled: bool = False,
    reporter: Reporter | None = None,
) -> tuple[ComparedDomains, ...]:
    """Compares B with A, or every other domain of A with its first one.

    Raises:
        UsageError: no usable images, or neither B nor several domains in A.
    """
    settings, reporter = settings or DataSettings(), reporter or default_reporter()
    classifier = load_classifier(model) if model is not None else None
    embedder = model_embedder(classifier) if classifier else Embedder(load_backbone())
    reporter.step("scan and embed")
    first = _sides(a, settings, embedder, reporter, False)
    others = _sides(b, settings, embedder, reporter, is_unlabeled) if b is not None else first[1:]
    if b is None and not others:
        raise UsageError(
            f"{escape(str(a))}: has no domains. Give a second folder, a table with the column domain, or --domain-by."
        )
    base = first[0] if b is None else _whole(first)
    reporter.step("compare domains")
    return tuple(_compared(base, other, classifier, settings.seed) for other in ([_whole(others)] if b else others))


def _sides(
    path: str | os.PathLike[str], settings: DataSettings, embedder: Embedder, reporter: Reporter, is_unlabeled: bool
) -> list[Side]:
    """One side for each domain of a path; one if it has none."""
    manifest, features, _ = scan_target(path, settings, is_unlabeled, embedder, reporter)
    names = np.array([sample.domain or "" for sample in manifest.samples], dtype=object)
    whole = Path(path).resolve().name
    return [Side(name or whole, manifest, features, np.flatnonzero(names == name)) for name in sorted(set(names))]


def _whole(sides: list[Side]) -> Side:
    rows = np.sort(np.concatenate([side.rows for side in sides]))
    return replace(sides[0], rows=rows, name=sides[0].manifest.root.name if len(sides) > 1 else sides[0].name)


def _compared(a: Side, b: Side, classifier: Classifier | None, seed: int) -> ComparedDomains:
    features_a, features_b, labels_a, labels_b = a.last(), b.last(), a.labels, b.labels
    distance = energy_distance(features_a, features_b, seed=seed)
    shifts = class_shifts(features_a, labels_a, features_b, labels_b, seed=seed)
    model = None if classifier is None else _predicted(a, b, classifier, seed)
    names = [name for name in a.manifest.classes if (labels_a == name).any()]
    rows = tuple(_class_record(name, labels_a, labels_b, shifts, model) for name in names)
    known = np.isin(labels_b, model.classes) if model else np.zeros(0, bool)
    right = np.array(model.classes)[model.predicted] == labels_b if model else known
    far = farthest(features_a, features_b)[:N_FARTHEST]
    name_a, name_b = escape(a.name), escape(b.name)
    return ComparedDomains(
        name_a,
        name_b,
        b.manifest,
        distance,
        tuple(b.rows[far].tolist()),
        rows,
        model.expected if model else None,
        share_record(int(right[known].sum()), int(known.sum())),
        " ".join(_sentences(name_a, name_b, distance, model, rows)),
        tuple(_notes(names, labels_b, model)),
        joint_map(features_a, _numbers(names, labels_a), features_b, _numbers(names, labels_b)),
    )


def _numbers(names: list[str], labels: NDArray[np.str_]) -> NDArray[np.int64]:
    """The position of each label in the list of names, or -1."""
    index = {name: number for number, name in enumerate(names)}
    return np.array([index.get(str(label), -1) for label in labels.tolist()], np.int64)


def _predicted(a: Side, b: Side, classifier: Classifier, seed: int) -> Model:
    """The model's predictions on B, and their expected accuracy."""
    index = {name: number for number, name in enumerate(classifier.classes)}
    labels = np.array([index.get(str(name), -1) for name in a.labels], np.int64)
    if not (labels >= 0).any():
        raise UsageError(
            f"{escape(a.name)}: none of its classes is a class of the model. A must be images of the domain it was trained on."
        )
    transform = classifier.head.transform
    source, target = (
        transform.apply(side.features.blocks(transform.blocks, rows))
        for side, rows in ((a, a.rows[labels >= 0]), (b, b.rows))
    )
    domains = Domains(source, labels[labels >= 0], target, np.full(len(target), -1, np.int64), len(index))
    given = softmax(score(classifier.head, target))
    choice, predicted = choose(domains, given, seed=seed), given.argmax(1).astype(np.int64)
    return Model(classifier.classes, predicted, choice, expected_accuracy(predicted, choice, given.max(1)))


def _class_record(
    name: str,
    labels_a: NDArray[np.str_],
    labels_b: NDArray[np.str_],
    shifts: Mapping[str, ClassShift],
    model: Model | None,
) -> dict[str, Any]:
    shift, own, has_labels = shifts.get(name), labels_b == name, not (labels_b == NO_LABEL).all()
    found: dict[str, Any] = {
        "name": escape(name),
        "n_a": int((labels_a == name).sum()),
        "n_b": int(own.sum()) if has_labels else None,
        "shift": shift.shift if shift else None,
        "moves": shift.p_value * len(shifts) < CLASS_SIGNIFICANCE if shift else None,
        "expected": None,
        "accuracy": None,
    }
    if model is not None and name in model.classes:
        label = model.classes.index(name)
        hit, n_votes = model.predicted == label, float(model.choice.votes[:, label].sum())
        value = expected_recall(model.predicted, model.choice.votes, label)
        if value is not None and n_votes > 0.5:
            interval = wilson(value, max(1.0, n_votes))
            low, high = max(0.0, interval.low - MODEL_ERROR), min(1.0, interval.high + MODEL_ERROR)
            found["expected"] = {"value": value, "low": low, "high": high}
        found["accuracy"] = share_record(int(hit[own].sum()), int(own.sum()))
    return found


def _sentences(a: str, b: str, distance: Distance, model: Model | None, rows: tuple[dict[str, Any], ...]) -> list[str]:
    energy = f"energy distance {distance.energy:.3f}, {distance.expected:.3f} expected by chance"
    if distance.p_value >= SIGNIFICANCE:
        return [f"No significant difference between {a} and {b} ({energy}; p = {distance.p_value:.2f})."]
    found = [f"{a} and {b} differ ({energy}; p = {distance.p_value:.3f}; linear separability: AUC {distance.auc:.2f})."]
    shifted = [row["name"] for row in sorted(rows, key=lambda row: -(row["shift"] or 0)) if row["moves"]]
    if shifted:
        found.append(f"Largest class shifts: {', '.join(shifted[:5])}.")
    if model is not None:
        value, low, high = (percent(model.expected[key], 0) for key in ("value", "low", "high"))
        found.append(f"Expected accuracy of the model on {b}: {value} (range {low.rstrip('%')}–{high.rstrip('%')}).")
    weak = [row["name"] for row in rows if row["expected"] and row["expected"]["value"] < 0.5]
    if weak:
        found.append(f"Likely to fail: {', '.join(weak[:5])}.")
    return found


def _notes(names: list[str], labels_b: NDArray[np.str_], model: Model | None) -> list[str]:
    notes, others = [], sorted({*labels_b.tolist()} - {*names, NO_LABEL})
    if others:
        notes.append(f"Classes in B but not in A: {first_names(others, 8)}.")
    if model is not None and model.choice.outcome == "refused":
        notes.append(f"The expected accuracy may be unreliable. {model.choice.reason}")
    return notes
