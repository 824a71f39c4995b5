"""``topwork review``: likely label errors of a run, to keep, relabel or exclude; then a retrained model without them.

In: a finished run. Out: :class:`Review`: likely label errors with their evidence, and a journal of decisions next to
the run. Images and the run itself are never changed. The page is ``server/review.py``.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from topwork.commands.compare import EvaluatedPart, common_part, comparison_sentence, evaluated_part
from topwork.commands.fit import fit
from topwork.data.corrections import Correction, Decision, Journal
from topwork.data.manifest import Manifest
from topwork.errors import TopworkError, UsageError
from topwork.evaluation.compare import Comparison, compare
from topwork.evaluation.predictions import Predictions
from topwork.progress import Reporter
from topwork.run import images_of_run, read_asked, read_evaluation, read_insights
from topwork.settings import FitSettings, fit_command
from topwork.text import as_text, escape

CORRECTIONS = "corrections.csv"


class Conflict(Exception):
    """Somebody else decided about the image in the meantime."""


@dataclass(frozen=True)
class Doubt:
    """A likely label error.

    Attributes:
        row: in the run's manifest.
        suggested: index of the more likely class.
        label_probability, suggested_probability: cross-validated.
        is_confident: confident learning flags the label; otherwise it only has one of the lowest probabilities.
        neighbors: rows of the most similar images.
    """

    row: int
    suggested: int
    label_probability: float
    suggested_probability: float
    is_confident: bool
    neighbors: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """The effect of the corrections: both runs evaluated on the same images with the corrected labels."""

    run: Path
    part: str
    comparison: Comparison
    n_changed: int
    sentence: str


class Review:
    """Likely label errors of a run and the decisions about them; thread-safe.

    Args:
        corrections: the journal; by default the one the run was fitted with, else ``corrections.csv`` in the run.

    Raises:
        UsageError: no finished run, no list of label errors, another review is open, or the images were moved.
        TopworkError: the run is damaged, or the journal cannot be written.
    """

    def __init__(self, run: str | os.PathLike[str], corrections: str | os.PathLike[str] | None = None) -> None:
        self.run = Path(run)
        read_evaluation(self.run)
        self.path, self.settings = read_asked(self.run)
        self.manifest = images_of_run(self.run, verb="review")
        self.manifest.check_is_there()
        _ = self.manifest.labels  # raises for several labels per image, which have no list of label errors
        self.doubts = _doubts(self.run, self.manifest)
        self.journal = Journal(Path(corrections or self.settings.corrections or self.run / CORRECTIONS))
        self._lock = threading.Lock()
        self._rows = {doubt.row for doubt in self.doubts}

    def state(self, row: int) -> dict[str, Any]:
        """The current ``decision`` and ``label`` (a class index) of an image, or None, and the ``version``."""
        sample = self.manifest.samples[row]
        found = self.journal.corrections.of(sample.content_hash, sample.path)
        classes = self.manifest.classes
        return {
            "decision": found.decision if found else None,
            "label": classes.index(found.label) if found and found.label in classes else None,
            "version": self.journal.corrections.n_made(sample.content_hash),
        }

    def decide(self, row: int, decision: str, label: int | None, version: int) -> dict[str, Any]:
        """Writes a decision about an image to disk and returns the new state.

        Args:
            label: index of the class, with ``relabel``.
            version: of the state that the decision is based on.

        Raises:
            UsageError: the image is not in the list, no such decision, no such class.
            Conflict: another decision was made in the meantime.
            TopworkError: it could not be written.
        """
        classes = self.manifest.classes
        if row not in self._rows:
            raise UsageError("that image is not on the list")
        if decision not in get_args(Decision):
            raise UsageError("decision must be relabel, keep, remove or undo")
        if (decision == "relabel") != (label is not None and 0 <= label < len(classes)):
            raise UsageError("a label is needed for relabel, and only for relabel")
        with self._lock:
            if self.state(row)["version"] != version:
                raise Conflict
            sample = self.manifest.samples[row]
            name = classes[label] if label is not None else ""
            self.journal.add(
                Correction(sample.content_hash, sample.path, cast(Decision, decision), name, was=sample.label)
            )
            return self.state(row)

    def tally(self) -> dict[str, int]:
        """Number of open, kept, relabeled and excluded images."""
        states = [self.state(doubt.row)["decision"] for doubt in self.doubts]
        return {
            "doubts": len(states),
            "open": states.count(None),
            "kept": states.count("keep"),
            "changed": states.count("relabel"),
            "removed": states.count("remove"),
        }

    # ---- the fit with corrected labels

    @property
    def corrected_run(self) -> Path:
        """The first free folder next to the run."""
        base = self.run.resolve()
        names = (base.with_name(f"{base.name}-corrected{'' if n == 1 else f'-{n}'}") for n in range(1, 10_000))
        return next(path for path in names if not path.exists())

    @property
    def corrected_settings(self) -> FitSettings:
        """The settings of the run with the corrections and the same split, so that both use the same test images."""
        return replace(self.settings, corrections=str(self.journal.path.absolute()), split_of=str(self.run.absolute()))

    @property
    def command(self) -> str:
        """The equivalent shell command."""
        return fit_command(self.path, str(self.corrected_run), vars(self.corrected_settings))

    def fit_again(self, reporter: Reporter | None = None) -> Outcome:
        """Fits with the corrected labels and compares with the run.

        Raises:
            UsageError, TopworkError: as ``fit``.
        """
        out = self.corrected_run
        fit(self.path, out, self.corrected_settings, reporter=reporter)
        return outcome_of(self.run, out)

    def close(self) -> None:
        """Releases the lock."""
        self.journal.close()


def outcome_of(run: Path, corrected: Path) -> Outcome:
    """Both runs on the images of the reported part, with the corrected labels."""
    records = read_evaluation(run), read_evaluation(corrected)
    part = common_part(records)
    if part is None:
        raise UsageError(f"{escape(str(run))}: has no test or valid part, so nothing can be compared.")
    first, second = (evaluated_part(f, r, part) for f, r in zip((run, corrected), records, strict=True))
    was, truth = ({sample.content_hash: sample.label for sample in part.samples} for part in (first, second))
    shared = truth.keys() & was.keys()
    (one, one_hashes), (two, two_hashes) = (_by_truth(part, truth, shared) for part in (first, second))
    found = compare(one, two, one_hashes, two_hashes)
    n_changed = sum(truth[image] != was[image] for image in shared)
    sentence = comparison_sentence("the previous run", "the retrained model", found)
    if n_changed:
        sentence += (
            f" {n_changed} {'label' if n_changed == 1 else 'labels'} of these images were corrected after seeing the "
            "model's answer, so both scores may be optimistic."
        )
    return Outcome(corrected, part, found, n_changed, sentence)


def _by_truth(part: EvaluatedPart, truth: dict[str, str], shared: set[str]) -> tuple[Predictions, list[str]]:
    """Predictions on the shared images, each image once, with the labels of ``truth``."""
    first_of = {image: position for position, image in reversed(list(enumerate(part.hashes))) if image in shared}
    hashes = sorted(first_of)
    taken = part.predictions.take(np.array([first_of[image] for image in hashes], np.int64))
    index = {name: number for number, name in enumerate(taken.classes)}
    labels = np.array([index.get(truth[image], -1) for image in hashes], np.int64)
    return replace(taken, labels=labels), hashes


def _doubts(run: Path, manifest: Manifest) -> tuple[Doubt, ...]:
    insights = read_insights(run)
    index = {as_text(name): n for n, name in enumerate(manifest.classes)}
    try:
        return tuple(
            Doubt(
                row=int(found["row"]),
                suggested=index[found["suggested"]],
                label_probability=float(found["label_probability"]),
                suggested_probability=float(found["suggested_probability"]),
                is_confident=bool(found["is_confident"]),
                neighbors=tuple(int(row) for row in found["neighbors"]),
            )
            for found in insights["suspects"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TopworkError(f"{escape(str(run))}: the run is damaged (insights.json: {error}).") from None
