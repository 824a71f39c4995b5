"""SIGINT and SIGTERM as a question that the loop asks between steps: save and end, rather than die.

In: the signals. Out: :class:`Interruption`, whose ``stopped`` goes to :class:`topwork.training.loop.Surroundings` and
whose ``signal`` gives the exit status 128 + n. A second signal ends the process at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """Context manager: inside it, the first signal only sets ``signal``; the second one acts as usual."""

    kinds = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def stopped(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # elsewhere handlers cannot be set
            self._before = {kind: signal.signal(kind, self._note) for kind in self.kinds}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._before = {}
