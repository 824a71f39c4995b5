"""Reads the data of a report from a run folder.

Nothing in the folder is computed again; logits are read for the evaluated parts only.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from topwork.commands.compare import stored_predictions
from topwork.data.manifest import Manifest, load_manifest
from topwork.errors import TopworkError
from topwork.evaluation.metrics import HELD_OUT
from topwork.evaluation.predictions import Predictions
from topwork.run import read_evaluation, read_logits
from topwork.text import escape


@dataclass(frozen=True, eq=False)
class Record:
    """The contents of a run folder.

    Attributes:
        folder: absolute path of the run.
        settings, recipe, split, evaluation: the JSON files of those names.
        model: ``model/topwork.json``; empty if it is gone.
        history: one record per line of ``history.jsonl``: trials of the cross-validation, or epochs.
        part_of: (N,) ``train``, ``valid``, ``test`` or "" for each sample of the manifest.
        predictions: by held-out part with images; the main part first.
    """

    folder: Path
    settings: dict[str, Any]
    recipe: dict[str, Any]
    split: dict[str, Any]
    evaluation: dict[str, Any]
    model: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    manifest: Manifest
    part_of: NDArray[np.str_]
    predictions: dict[str, Predictions]

    @property
    def is_evaluation(self) -> bool:
        """Whether this is the folder of ``topwork evaluate --out``: a model that was trained elsewhere on other data."""
        return not self.recipe

    @property
    def name(self) -> str:
        """The name of the data: that of its folder or table."""
        path = str(self.settings.get("path") or self.manifest.root)
        return Path(path).stem or path

    @property
    def backbone(self) -> str:
        """The backbone as the user named it; the architecture if that name is a long path; "" for an evaluation."""
        name, architecture = (str(self.recipe.get(key) or "") for key in ("backbone", "architecture"))
        return name if name and len(name) <= 60 else architecture or name

    @property
    def main_part(self) -> str | None:
        """The main part: test, else valid, else none."""
        return next(iter(self.predictions), None)

    @cached_property
    def rows_by_class(self) -> dict[str, dict[str, list[int]]]:
        """Rows of the manifest by class name and part, in the manifest's order."""
        rows: dict[str, dict[str, list[int]]] = {name: {} for name in self.manifest.classes}
        for row, (sample, part) in enumerate(zip(self.manifest.samples, self.part_of.tolist(), strict=True)):
            for name in self.manifest.names_of(sample):
                rows[name].setdefault(part, []).append(row)
        return rows

    @cached_property
    def insights(self) -> dict[str, Any]:
        """The content of ``insights.json``; empty if missing or unreadable."""
        try:
            return _read_json(self.folder / "insights.json")
        except (OSError, ValueError):
            return {}

    @cached_property
    def domains(self) -> dict[str, Any] | None:
        """The content of ``domains.json``; None for a run that ``topwork adapt`` did not make."""
        return _read_json(self.folder / "domains.json") or None

    def confusion(self, part: str) -> Counter[tuple[int, int]]:
        """Count of each (true, predicted) pair of labels."""
        own = self.predictions[part]
        return Counter(zip(own.labels.tolist(), own.predicted.tolist(), strict=True))


def read_record(run: Path) -> Record:
    """Reads a run folder.

    Raises:
        UsageError: no finished run there.
        TopworkError: a file is damaged.
    """
    evaluation = read_evaluation(run)
    try:
        manifest = load_manifest(run / "manifest.parquet")
        rows, parts, logits = read_logits(run / "predictions.parquet")
        part_of = np.full(len(manifest.samples), "", dtype="<U5")
        part_of[rows] = parts
        history = run / "history.jsonl"
        lines = history.read_text().splitlines() if history.is_file() else []
        return Record(
            folder=run.resolve(),
            settings=_read_json(run / "settings.json"),
            recipe=_read_json(run / "recipe.json"),
            split=_read_json(run / "split.json"),
            evaluation=evaluation,
            model=_read_json(run / "model" / "topwork.json"),
            history=tuple(json.loads(line) for line in lines if line),
            manifest=manifest,
            part_of=part_of,
            predictions={
                part: stored_predictions(
                    manifest, evaluation[part], rows[parts == part], logits[parts == part]
                ).labeled()
                for part in HELD_OUT
                if evaluation.get(part, {}).get("n")
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, pa.ArrowException) as error:
        raise TopworkError(f"{escape(str(run))}: the run is damaged ({type(error).__name__}: {error}).") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is none, since ``topwork evaluate --out`` writes only some."""
    value = json.loads(path.read_text()) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value
