"""What a command reports while it works, and how long each step took.

A command tells a :class:`Reporter`; who shows it is up to the caller: the terminal (``console.py``), a notebook, the app,
or nobody.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


class Reporter:
    """Receives what happens. This one shows nothing; others override what they show."""

    def step(self, name: str) -> None:
        """A step begins."""

    def progress(self, n_done: int, n_all: int) -> None:
        """Part of the present step is done."""

    def note(self, text: str) -> None:
        """A sentence that the user should read."""

    def stages(self, rows: Sequence[dict[str, Any]]) -> None:
        """Fine-tuning begins: its stages with their parameters and learning rates."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch of fine-tuning is done."""


@dataclass
class Stopwatch:
    """Seconds of each step, by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds the time of a block to a step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 3)

    @property
    def total(self) -> float:
        """Seconds since it was started."""
        return round(time.perf_counter() - self.started, 3)
