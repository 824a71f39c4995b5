"""What the server counts about itself, in the text format that Prometheus reads.

Names end in their unit. Nothing here waits or locks: it is called from the one thread of the event loop.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass
class Histogram:
    """Counts of values up to each bound, their sum, and their number."""

    bounds: tuple[float, ...] = BOUNDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        """The histogram under a name."""
        found, below = [], 0
        for bound, count in zip((*[f"{b:g}" for b in self.bounds], "+Inf"), self.counts, strict=True):
            below += count
            found.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*found, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


@dataclass
class Measures:
    """Counters and present values of one server."""

    responses: Counter[int] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    cut_off: Counter[str] = field(default_factory=Counter)
    request_seconds: Histogram = field(default_factory=Histogram)
    batch_images: Histogram = field(default_factory=lambda: Histogram((1, 2, 4, 8, 16)))
    n_waiting: int = 0
    n_held_bytes: int = 0

    def text(self, is_ready: bool) -> str:
        """The page at /metrics."""
        lines = [
            "# HELP topwork_responses_total HTTP responses by status.",
            "# TYPE topwork_responses_total counter",
            *[f'topwork_responses_total{{status="{status}"}} {n}' for status, n in sorted(self.responses.items())],
            "# HELP topwork_images_total Images answered, by model and outcome.",
            "# TYPE topwork_images_total counter",
            *[
                f'topwork_images_total{{model="{_escaped(model)}",outcome="{outcome}"}} {n}'
                for (model, outcome), n in sorted(self.outcomes.items())
            ],
            "# HELP topwork_connections_cut_off_total Connections closed because the client was too slow, by what was awaited.",
            "# TYPE topwork_connections_cut_off_total counter",
            *[f'topwork_connections_cut_off_total{{awaited="{key}"}} {n}' for key, n in sorted(self.cut_off.items())],
            "# HELP topwork_request_seconds Time to answer a request for predictions.",
            "# TYPE topwork_request_seconds histogram",
            *self.request_seconds.lines("topwork_request_seconds"),
            "# HELP topwork_batch_images Images that the network saw at once.",
            "# TYPE topwork_batch_images histogram",
            *self.batch_images.lines("topwork_batch_images"),
            "# HELP topwork_images_waiting Images taken in and not answered yet.",
            "# TYPE topwork_images_waiting gauge",
            f"topwork_images_waiting {self.n_waiting}",
            "# HELP topwork_held_bytes Bytes of requests in memory.",
            "# TYPE topwork_held_bytes gauge",
            f"topwork_held_bytes {self.n_held_bytes}",
            "# HELP topwork_ready Whether requests for predictions are welcome.",
            "# TYPE topwork_ready gauge",
            f"topwork_ready {int(is_ready)}",
        ]
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
