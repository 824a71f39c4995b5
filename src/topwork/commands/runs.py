"""``topwork runs``: the runs in a folder with their results, and which is best."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from topwork.commands.compare import compare_runs
from topwork.errors import TopworkError, UsageError
from topwork.evaluation.metrics import headline
from topwork.run import read_evaluation
from topwork.text import count, escape, percent_ci


@dataclass(frozen=True)
class RunRow:
    """One run: ``part`` is the part its accuracy was measured on, None if unfinished."""

    name: str
    backbone: str
    mode: str
    part: str | None
    n: int
    accuracy: dict[str, float | None] | None


@dataclass(frozen=True)
class Runs:
    """The runs of a folder, best accuracy first, and a sentence about the best one."""

    folder: Path
    runs: tuple[RunRow, ...]
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"folder": str(self.folder), "runs": [asdict(row) for row in self.runs], "best": self.verdict}


def list_runs(folder: Path) -> Runs:
    """Reads the runs in ``folder``.

    Raises:
        UsageError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{escape(str(folder))}: no such folder. topwork fit PATH creates the first run in runs/.")
    rows = [_row(path.parent) for path in sorted(folder.glob("*/settings.json"))]
    if not rows:
        raise UsageError(f"{escape(str(folder))}: no runs here. topwork fit PATH creates the first run in runs/.")
    rows.sort(key=lambda row: (row.accuracy is None, -((row.accuracy or {}).get("value") or 0.0), row.name))
    return Runs(folder, tuple(rows), _verdict(folder, [row for row in rows if row.accuracy]))


def _row(run: Path) -> RunRow:
    recipe = _read(run / "recipe.json")
    try:
        evaluation = read_evaluation(run)
    except TopworkError:
        evaluation = {}
    part, figure = headline(evaluation) or (None, {})
    return RunRow(
        escape(run.name), str(recipe.get("backbone", "")), str(recipe.get("mode", "evaluation" if part else "")), part,
        figure.get("n", 0), figure.get("accuracy"),
    )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _verdict(folder: Path, finished: list[RunRow]) -> str:
    if len(finished) < 2:
        return f"{count(len(finished), 'finished run')}."
    best, second = finished[:2]
    try:
        _, (compared,) = compare_runs([folder / second.name, folder / best.name])
        return compared.sentence
    except TopworkError:
        return (
            f"{best.name} has the highest accuracy, {percent_ci(best.accuracy)}, but {second.name} was evaluated on different "
            "images, so the two cannot be compared."
        )
