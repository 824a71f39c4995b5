"""``topwork compare`` and ``topwork runs``: which run is better, by paired tests on the same images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.manifest import Manifest, load_manifest
from topwork.data.samples import Sample
from topwork.errors import TopworkError, UsageError
from topwork.evaluation.compare import SIGNIFICANCE, Comparison, compare
from topwork.evaluation.metrics import headline
from topwork.evaluation.predictions import Predictions, Task
from topwork.run import read_evaluation, read_logits, read_recipe
from topwork.text import Described, as_text, canonical, count, escape, percent, percent_ci, points


@dataclass(frozen=True, eq=False)
class EvaluatedPart:
    """The predictions of a run on one of its parts, and the images."""

    run: Path
    manifest: Manifest
    predictions: Predictions

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self.run.resolve().name

    @property
    def samples(self) -> list[Sample]:
        """The images."""
        return [self.manifest.samples[row] for row in self.predictions.sample_indices.tolist()]

    @property
    def hashes(self) -> list[str]:
        """Content hash of each image."""
        return [sample.content_hash for sample in self.samples]


@dataclass(frozen=True, eq=False, repr=False)
class Compared(Described):
    """One run against the first.

    Attributes:
        order: for each image of the first run, its position in the second.
        sentence: which is better, or that there is no clear difference.
    """

    first: EvaluatedPart
    second: EvaluatedPart
    comparison: Comparison
    order: NDArray[np.int64]
    sentence: str

    def facts(self) -> dict[str, object]:
        """Shown in notebooks."""
        found = self.comparison
        return {
            self.first.name: percent(found.accuracy_first),
            self.second.name: percent(found.accuracy_second),
            "Images": f"{found.n:,}",
            "p-value": f"{found.p_value:.3f}",
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; disagreements with path, true label and both predictions."""
        found = self.comparison
        interval = found.difference_interval
        return {
            "first": str(self.first.run),
            "second": str(self.second.run),
            "n": found.n,
            "accuracy_first": found.accuracy_first,
            "accuracy_second": found.accuracy_second,
            "difference": found.difference,
            "difference_interval": interval.as_dict() if interval else None,
            "p_value": found.p_value,
            "n_gained": len(found.gained),
            "n_lost": len(found.lost),
            "per_class": {as_text(name): change for name, change in found.per_class.items()},
            "disagreements": self.disagreements(),
            "sentence": self.sentence,
        }

    def disagreements(self) -> list[dict[str, Any]]:
        """Images that the two classify differently; those that one of them gets right come first."""
        found, rows = self.comparison, []
        changes = dict.fromkeys(found.gained.tolist(), "gained") | dict.fromkeys(found.lost.tolist(), "lost")
        one, two, samples = self.first.predictions, self.second.predictions, self.first.samples
        answers = one.answers, two.answers
        for position in found.disagreements.tolist():
            other = int(self.order[position])
            rows.append(
                {
                    "row": int(one.sample_indices[position]),
                    "path": as_text(samples[position].path),
                    "label": as_text(samples[position].label),
                    "first": as_text(answers[0][position]),
                    "first_probability": float(one.confidence[position]),
                    "second": as_text(answers[1][other]),
                    "second_probability": float(two.confidence[other]),
                    "change": changes.get(position, "both wrong"),
                }
            )
        return sorted(rows, key=lambda row: ("gained", "lost", "both wrong").index(row["change"]))


def compare_runs(
    runs: Sequence[str | os.PathLike[str]], part: str = "auto", *, seed: int = 0
) -> tuple[str, tuple[Compared, ...]]:
    """Compares runs with the first of them, image by image.

    Args:
        part: ``test``, ``valid``, or ``auto``: test if every run has one, else valid, else the part each run was
            evaluated on; it must have the same images.

    Returns:
        The part, and one comparison for each run but the first.

    Raises:
        UsageError: fewer than two runs, an unfinished run, or runs that were not evaluated on the same images.
    """
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise UsageError("compare needs at least two runs: topwork compare RUN_A RUN_B")
    records = [read_evaluation(folder) for folder in folders]
    common = part if part != "auto" else common_part(records)
    names = [common or (headline(record) or ("test", {}))[0] for record in records]
    for folder, record, name in zip(folders, records, names, strict=True):
        if not _has(record, name):
            raise UsageError(f"{escape(str(folder))}: was not evaluated on a {name} part, so it cannot be compared.")
    parts = [evaluated_part(*one) for one in zip(folders, records, names, strict=True)]
    return names[0], tuple(_against(parts[0], other, seed) for other in parts[1:])


def _against(first: EvaluatedPart, second: EvaluatedPart, seed: int) -> Compared:
    try:
        found = compare(first.predictions, second.predictions, first.hashes, second.hashes, seed=seed)
    except UsageError as error:
        raise UsageError(f"{escape(str(first.run))} and {escape(str(second.run))}: {error}.") from None
    order = np.empty(len(first.hashes), dtype=np.int64)
    order[np.argsort(np.asarray(first.hashes), kind="stable")] = np.argsort(np.asarray(second.hashes), kind="stable")
    return Compared(first, second, found, order, comparison_sentence(first.name, second.name, found))


def comparison_sentence(first: str, second: str, found: Comparison) -> str:
    """A sentence on which of two runs is better."""
    interval = found.difference_interval
    if interval is None or found.accuracy_first is None or found.accuracy_second is None or found.difference is None:
        return f"{second} and {first} have no images of known classes in common and cannot be compared."
    facts = (
        f"On the same {count(found.n, 'image')}, {second} has {percent(found.accuracy_second)} accuracy and {first} "
        f"{percent(found.accuracy_first)}: {points(found.difference)} points (95% CI {points(interval.low)} to "
        f"{points(interval.high)}). Only {second} is correct on {count(len(found.gained), 'image')}, only {first} on "
        f"{len(found.lost):,}"
    )
    if found.p_value >= SIGNIFICANCE:
        return f"{facts}. No significant difference (p = {found.p_value:.2f})."
    better = second if found.difference > 0 else first
    p = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.2g}"
    return f"{facts}. {better[:1].upper()}{better[1:]} is significantly better ({p})."


def common_part(evaluations: Sequence[dict[str, Any]]) -> str | None:
    """The most important part that every run was evaluated on."""
    return next((name for name in ("test", "valid") if all(_has(one, name) for one in evaluations)), None)


def _has(evaluation: dict[str, Any], part: str) -> bool:
    return bool((evaluation.get(part) or {}).get("n"))


def evaluated_part(folder: Path, evaluation: dict[str, Any], part: str) -> EvaluatedPart:
    """Reads the logits of one part of a run."""
    import pyarrow as pa

    try:
        manifest = load_manifest(folder / "manifest.parquet")
        every, in_part, stored = read_logits(folder / "predictions.parquet")
        own = in_part == part
        found = stored_predictions(manifest, evaluation[part], every[own], stored[own])
        predictions = replace(found, classes=tuple(map(canonical, found.classes)))  # spelled the same in both runs
        return EvaluatedPart(folder, manifest, predictions)
    except (OSError, ValueError, KeyError, TypeError, IndexError, pa.ArrowException) as error:
        raise TopworkError(f"{escape(str(folder))}: the run is damaged ({type(error).__name__}: {error}).") from error


def stored_predictions(
    manifest: Manifest, evaluated: dict[str, Any], rows: NDArray[np.int64], logits: NDArray[np.float32]
) -> Predictions:
    """The stored predictions for some rows, with labels as indices into the classes of ``evaluation.json``."""
    classes = tuple(evaluated["classes"])
    if manifest.multi_label:
        return Predictions(classes, rows, manifest.label_matrix[rows], logits, Task.of_part(evaluated))
    index = {canonical(name): number for number, name in enumerate(classes)}
    labels = np.array([index.get(canonical(manifest.samples[row].label), -1) for row in rows.tolist()], np.int64)
    return Predictions(classes, rows, labels, logits, Task.of_part(evaluated))


# ---- the runs of a folder


def list_runs(folder: Path) -> dict[str, Any]:
    """The runs in ``folder``, best accuracy first.

    Returns:
        ``folder``, ``runs``, and ``best``, a sentence about the best run. A run has a name, backbone, mode, the part that its
        accuracy was measured on (None without one), whether it is finished, and the number of images.

    Raises:
        UsageError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{escape(str(folder))}: no such folder. topwork fit PATH creates the first run in runs/.")
    rows = [_row(path.parent) for path in sorted(folder.glob("*/settings.json"))]
    if not rows:
        raise UsageError(f"{escape(str(folder))}: no runs here. topwork fit PATH creates the first run in runs/.")
    rows.sort(key=lambda row: (row["accuracy"] is None, -((row["accuracy"] or {}).get("value") or 0.0), row["name"]))
    return {"folder": str(folder), "runs": rows, "best": _best(folder, [row for row in rows if row["accuracy"]])}


def _row(run: Path) -> dict[str, Any]:
    evaluation, (recipe, _) = _if_there(read_evaluation, run, {}), _if_there(read_recipe, run, ({}, []))
    part, figure = headline(evaluation) or (None, {})
    return {
        "name": escape(run.name),
        "backbone": str(recipe.get("backbone", "")),
        "mode": str(recipe.get("mode", "evaluation" if part else "")),
        "finished": bool(evaluation),
        "part": part,
        "n": figure.get("n", 0),
        "accuracy": figure.get("accuracy"),
    }


def _if_there(read: Callable[[Path], Any], run: Path, default: Any) -> Any:
    try:
        return read(run)
    except TopworkError:
        return default


def _best(folder: Path, finished: list[dict[str, Any]]) -> str:
    if len(finished) < 2:
        return f"{count(len(finished), 'finished run')}."
    best, second = finished[:2]
    try:
        _, (compared,) = compare_runs([folder / second["name"], folder / best["name"]])
        return compared.sentence
    except TopworkError:
        return (
            f"{best['name']} has the highest accuracy, {percent_ci(best['accuracy'])}, but {second['name']} was evaluated on "
            "different images, so the two cannot be compared."
        )
