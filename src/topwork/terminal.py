"""What a person sees while a command runs: progress with rate and time left, notes, and the summary.

On a terminal a live bar; elsewhere a plain line every few seconds. All of it goes to stderr, so that stdout holds the
answer and nothing else. Notes are repeated at the end, where scrolling has not lost them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from topwork.data.sources import shown

PLAIN_SECONDS = 5.0
STEP_TEXT = {
    "backbone": "Preparing the backbone",
    "scan": "Reading images",
    "scan and embed": "Reading and embedding images",
    "probe": "Choosing the head by cross-validation",
    "evaluate": "Judging",
    "write": "Writing the run",
    "report": "Writing the report",
    "predict": "Predicting",
}


class Terminal:
    """Shows steps and progress on stderr; a context manager, so that the terminal is left clean."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.notes: list[str] = []
        self._bar: Any = None
        self._task: Any = None
        self._text = ""
        self._started = self._spoken = time.monotonic()

    def __enter__(self) -> Terminal:
        if not self.quiet and sys.stderr.isatty():
            self._bar = _live_bar()
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, name: str) -> None:
        """A step begins: a new line on the terminal."""
        self._text = STEP_TEXT.get(name, name)
        self._started = self._spoken = time.monotonic()
        if self._bar is not None:
            self._finish_task()
            self._task = self._bar.add_task(self._text, total=None)

    def progress(self, n_done: int, n_all: int) -> None:
        """Part of the step is done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=n_done, total=n_all)
        elif not self.quiet and time.monotonic() - self._spoken >= PLAIN_SECONDS:
            self._spoken = time.monotonic()
            rate = n_done / (self._spoken - self._started)
            left = (n_all - n_done) / rate if rate else 0.0
            self.say(f"{self._text}: {n_done} of {n_all}, {rate:.1f}/s, {_seconds(left)} left")

    def note(self, text: str) -> None:
        """A sentence to read at the end."""
        self.notes.append(text)

    def say(self, text: str) -> None:
        """A line now."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Ends the bar and repeats the notes."""
        if self._bar is not None:
            self._finish_task()
            self._bar.stop()
            self._bar = None
        if self.notes:
            self.say(f"\n{len(self.notes)} {'notes' if len(self.notes) > 1 else 'note'}:")
            for text in self.notes:
                self.say(f"  - {text}")

    def _finish_task(self) -> None:
        if self._task is not None:
            task = self._bar.tasks[self._bar.task_ids.index(self._task)]
            total = task.total or 1
            self._bar.update(self._task, total=total, completed=total)


def _live_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            many = task.total is not None and task.total > 1
            return Text(f"{speed:,.0f}/s" if speed and many else "", style="progress.data.speed")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        Rate(),
        Elapsed(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def percent(figure: dict[str, float | None] | float | None) -> str:
    """``94.8 % (91.2 to 97.0)`` for a figure with an interval, ``94.8 %`` for a number."""
    if figure is None:
        return "not measured"
    if isinstance(figure, dict):
        if figure["value"] is None:
            return "not measured"
        low, high = figure["low"], figure["high"]
        interval = f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high is not None else ""
        return f"{100 * figure['value']:.1f} %{interval}"
    return f"{100 * figure:.1f} %"


def part_lines(name: str, part: dict[str, Any]) -> list[str]:
    """The figures of one part, as lines for a person."""
    intervals = part.get("intervals", {})

    def with_interval(metric: str) -> str:
        return percent({"value": part[metric], **intervals[metric]} if metric in intervals else part[metric])

    lines = [f"{name}: {part['n']} images", f"  accuracy           {percent(part['accuracy'])}"]
    lines.append(f"  balanced accuracy  {with_interval('balanced_accuracy')}")
    if len(part["classes"]) > 5:
        lines.append(f"  top-5 accuracy     {with_interval('top5_accuracy')}")
    lines.append(f"  macro F1           {with_interval('macro_f1')}")
    if part.get("roc_auc") is not None:
        auc = intervals.get("roc_auc", {})
        span = f" ({auc['low']:.3f} to {auc['high']:.3f})" if auc.get("low") is not None else ""
        lines.append(f"  area under ROC     {part['roc_auc']:.3f}{span}")
    if part["cross_entropy"] is not None:
        lines.append(f"  cross-entropy      {part['cross_entropy']:.3f}   calibration error {percent(part['ece'])}")
    return lines


def table(rows: Sequence[tuple[str, ...]], heads: tuple[str, ...]) -> str:
    """Rows as aligned text; names are escaped so that they cannot move the cursor."""
    cells = [heads, *[tuple(shown(cell) for cell in row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
